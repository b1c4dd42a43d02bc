"""Two processes train as one with twice the batch, and make one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_midi_run
import torch
from tiny_midi_run import rows

from lora_core.testing.processes import run
from midi3d_lora.adapter_files import read_adapter
from midi3d_lora.train import main


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_midi_run.write_scenes(tmp_path_factory.mktemp("data"))


def words(scenes: Path, output: Path, **more: Any) -> list[str]:
    """Two epochs of two updates over three scenes, in batches of one."""
    same = {"lora_dropout": 0, "batch_size": 1, "learning_rate": 1e-4}  # masks differ by process
    return tiny_midi_run.command(scenes, output, **(same | more))


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process with batches of two."""
    output = tmp_path_factory.mktemp("one") / "run"
    assert main(words(scenes, output, batch_size=2)) == 0
    return output


def check_alike(two: Path, one: Path) -> None:
    """Equal but for the order of sums: every figure of both, and the adapters."""
    found = [rows(output) for output in (two, one)]
    assert [row["split"] for row in found[0]] == ["val", *["train", "train", "val"] * 2]
    for a, b in zip(*found, strict=True):
        for name in a.keys() - {"split", "epoch"}:
            assert bool(a[name]) == bool(b[name]), name
            if a[name]:
                rel = 1e-3 if name == "grad_norm" else 1e-4
                assert float(a[name]) == pytest.approx(float(b[name]), rel=rel, abs=1e-8), name
    first, second = (read_adapter(output / "lora-final").file.tensors for output in (two, one))
    assert first.keys() == second.keys()
    for name in first:
        # Adam gives an entry whose gradient is all rounding a whole step in either direction.
        close = torch.isclose(first[name], second[name], rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.98, f"{name}: {close:.1%} of the entries are alike"


@pytest.mark.fault("R18", "R19", "R25")
def test_two_processes_equal_one_with_twice_the_batch(
    scenes: Path, alone: Path, tmp_path: Path
) -> None:
    """Scenes of 1, 2 and 3 rows: an update is the mean over rows, whoever has how many."""
    ended = run(lambda rank: main(words(scenes, tmp_path / "run")))
    for process in ended:
        assert process.status == 0, process.output
    assert ended[0].output.count("before training") == 1
    check_alike(tmp_path / "run", alone)


def test_a_base_that_is_divided_among_the_processes_trains_alike(
    scenes: Path, alone: Path, tmp_path: Path
) -> None:
    ended = run(lambda rank: main(words(scenes, tmp_path / "run", shard_base="true")))
    for process in ended:
        assert process.status == 0, process.output
    check_alike(tmp_path / "run", alone)


def test_accumulated_batches_equal_one_of_their_size(
    scenes: Path, alone: Path, tmp_path: Path
) -> None:
    assert main(words(scenes, tmp_path / "run", gradient_accumulation_steps=2)) == 0
    check_alike(tmp_path / "run", alone)


@pytest.mark.fault("R20")
def test_processes_that_see_other_scenes_end_with_one_message(scenes: Path, tmp_path: Path) -> None:
    other = tiny_midi_run.write_scenes(tmp_path / "other", train=2)

    def target(rank: int) -> int:
        root = scenes if rank == 0 else other
        return main([*words(scenes, tmp_path / "run"), "--data_dir", str(root / "train")])

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    said = "".join(process.output for process in ended)
    assert "not the scenes that the first process of the run sees, such as scene_2" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
