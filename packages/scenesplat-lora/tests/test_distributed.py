"""Two processes train as one with twice the batch, and make one run.

The network of these tests draws nothing at random, and its curves are z-curves: the Hilbert curve's
orientation depends on the largest coordinate of a batch, as in the official code.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_scenes
import torch
from tiny_scenes import rows

from lora_core.testing.processes import run
from scenesplat_lora.train import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, settings of a network that draws nothing, and scenes with texts."""
    folder = tmp_path_factory.mktemp("files")
    tiny_scenes.write_base(folder / "base.pth")
    fixed = {"order": ["z", "z-trans"], "shuffle_orders": False, "drop_path": 0.0}
    backbone = tiny_scenes.BACKBONE | fixed
    (folder / "fixed.json").write_text(json.dumps({"model": {"backbone": backbone}}))
    tiny_scenes.write_scenes(folder / "data")
    tiny_scenes.write_texts(folder / "texts.npz")
    return folder


def words(files: Path, output: Path, **more: object) -> list[str]:
    """Two epochs of two updates over three scenes, in batches of one."""
    same = {
        "config": files / "fixed.json",
        "data__text_embeddings": files / "texts.npz",
        "lora__lora_dropout": 0,  # its masks differ between processes
        "mix_prob": 0,
        "batch_size": 1,
        "optimizer__lr": 1e-4,
    }
    return tiny_scenes.command(files / "base.pth", files / "data", output, **(same | more))


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process with batches of two."""
    output = tmp_path_factory.mktemp("one") / "run"
    assert main(words(files, output, batch_size=2)) == 0
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
    a, b = (
        torch.load(output / "model" / "lora_epoch_2.pth", weights_only=True)["lora_state_dict"]
        for output in (two, one)
    )
    assert a.keys() == b.keys()
    for name in a:
        # Adam gives an entry whose gradient is all rounding a whole step in either direction.
        close = torch.isclose(a[name], b[name], rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.98, f"{name}: {close:.1%} of the entries are alike"


@pytest.mark.fault("R18", "R19", "R25")
def test_two_processes_equal_one_with_twice_the_batch(
    files: Path, alone: Path, tmp_path: Path
) -> None:
    """The third scene leaves the second process without one of its own."""
    ended = run(lambda rank: main(words(files, tmp_path / "run")))
    for process in ended:
        assert process.status == 0, process.output
    assert ended[0].output.count("before training") == 1
    own = [line for line in ended[1].output.splitlines()
           if "reducer.cpp" not in line and "[transformers]" not in line]  # fmt: skip
    assert own == [], "only the first process speaks"
    check_alike(tmp_path / "run", alone)


def test_accumulated_batches_equal_one_of_their_size(
    files: Path, alone: Path, tmp_path: Path
) -> None:
    assert main(words(files, tmp_path / "run", gradient_accumulation_steps=2)) == 0
    check_alike(tmp_path / "run", alone)


@pytest.mark.fault("R20")
def test_processes_that_see_other_scenes_end_with_one_message(files: Path, tmp_path: Path) -> None:
    other = tiny_scenes.write_scenes(tmp_path / "other", train=2)

    def target(rank: int) -> int:
        root = files / "data" if rank == 0 else other
        return main([*words(files, tmp_path / "run"), "--data.train.data_root", str(root)])

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    said = "".join(process.output for process in ended)
    assert "not the scenes that the first process of the run sees, such as train/room_2" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "model" / "lora_best.pth").exists()
