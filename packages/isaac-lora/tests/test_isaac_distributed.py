"""Two processes train as one with twice the batch, and make one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_isaac_run
import torch
from tiny_isaac_run import rows

from isaac_lora.adapter_files import read_adapter
from isaac_lora.train import main
from lora_core.testing.processes import run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


def words(data: Path, output: Path, **more: Any) -> list[str]:
    """Two epochs of three updates over five conversations, in batches of one, with depth."""
    same = {"lora_dropout": 0, "per_device_train_batch_size": 1, "learning_rate": 1e-4}
    return tiny_isaac_run.command(data, output, **(same | tiny_isaac_run.depth(data) | more))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process with batches of two."""
    output = tmp_path_factory.mktemp("one") / "run"
    assert main(words(data, output, per_device_train_batch_size=2)) == 0
    return output


def check_alike(two: Path, one: Path) -> None:
    """Equal but for the order of sums: every figure of both, and the adapters."""
    found = [rows(output) for output in (two, one)]
    assert [row["split"] for row in found[0]] == ["val", *["train", "train", "train", "val"] * 2]
    for a, b in zip(*found, strict=True):
        for name in a.keys() - {"split", "epoch"}:
            assert bool(a[name]) == bool(b[name]), name
            if a[name]:
                rel = 1e-3 if name == "grad_norm" else 1e-4
                assert float(a[name]) == pytest.approx(float(b[name]), rel=rel, abs=1e-8), name
    first, second = (read_adapter(output).file.tensors for output in (two, one))
    assert first.keys() == second.keys()
    for name in first:
        # Adam gives an entry whose gradient is all rounding a whole step in either direction.
        close = torch.isclose(first[name], second[name], rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.98, f"{name}: {close:.1%} of the entries are alike"


@pytest.mark.fault("R18", "R19", "R25", "R45")
def test_two_processes_equal_one_with_twice_the_batch(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    """Answers of different lengths, with zero to two pictures; the last batch is not full."""
    ended = run(lambda rank: main(words(data, tmp_path / "run", cache_vision="true")))
    for process in ended:
        assert process.status == 0, process.output
    assert ended[0].output.count("before training") == 1
    check_alike(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.fault("R27")
def test_a_base_that_is_divided_among_the_processes_trains_alike(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    ended = run(lambda rank: main(words(data, tmp_path / "run", shard_base="true")))
    for process in ended:
        assert process.status == 0, process.output
    check_alike(tmp_path / "run", alone)


@pytest.mark.fault("R23")
def test_a_process_whose_batch_has_no_picture_keeps_nobody_waiting(
    data: Path, tmp_path: Path
) -> None:
    """Projector and tower are trained: the others wait for their gradients."""
    more = {"target_modules": "vision,projector,attention", "val_data_path": None}
    ended = run(lambda rank: main(words(data, tmp_path / "run", **more)))
    assert [process.status for process in ended] == [0, 0], ended
    assert len(rows(tmp_path / "run")) == 6


@pytest.mark.fault("D48", "R20")
def test_processes_that_see_other_conversations_end_with_one_message(
    data: Path, tmp_path: Path
) -> None:
    other = tiny_isaac_run.write_conversations(tmp_path / "other", train=2)

    def target(rank: int) -> int:
        root = data if rank == 0 else other
        places = {"data_path": root / "train.json", "image_folder": root / "images"}
        return main(words(data, tmp_path / "run", val_data_path=None, **places))

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    said = "".join(process.output for process in ended)
    assert "not the conversations that the first process of the run reads" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
