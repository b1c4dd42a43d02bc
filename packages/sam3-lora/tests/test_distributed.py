"""Two processes train as one with twice the batch, and make one run.

This is so where each of them has as many queries (B) and objects (n) as the other. The official
loss is sqrt(B) / n times a sum over a process's own batch: with unequal counts the mean over the
processes is another number than the loss of all pictures together. That is how SAM 3 was trained,
and no fault of the distribution. With equal counts only the factor sqrt(2) remains, which clipping
takes out of the update.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import command, rows, tensors

from lora_core.testing.processes import run
from sam3_lora.train import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"), dropout=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("data") / "pictures", 4)


def words(base: Path, pictures: Path, output: Path, **more: object) -> list[str]:
    """Two epochs of two updates over four equal pictures, in batches of one."""
    same = {
        "dataset__train_img_folder": pictures,
        "dataset__train_ann_file": pictures / "_annotations.coco.json",
        "dataset__enable_augmentation": False,
        "lora__dropout": 0,  # its masks differ between processes
        "training__batch_size": 1,
        "training__learning_rate": 1e-3,
    }
    return command(base, output, **(same | more))


@pytest.fixture(scope="module")
def alone(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process with batches of two."""
    output = tmp_path_factory.mktemp("one")
    assert main(words(base, pictures, output, training__batch_size=2)) == 0
    return output


def check_alike(two: Path, one: Path) -> None:
    """Equal but for the order of sums; see the module's text for the root of two."""
    losses = [[float(row["loss"]) for row in rows(output, "train")] for output in (two, one)]
    assert len(losses[0]) == 4
    assert [math.sqrt(2) * loss for loss in losses[0]] == pytest.approx(losses[1], rel=1e-4)
    assert float(rows(two, "val")[-1]["loss"]) == pytest.approx(
        float(rows(one, "val")[-1]["loss"]), rel=1e-4
    )
    a, b = (tensors(output / "checkpoints" / "epoch_2.pt") for output in (two, one))
    assert a.keys() == b.keys()
    for name in a:
        # Adam gives an entry whose gradient is all rounding a whole step in either direction.
        close = torch.isclose(a[name], b[name], rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.98, f"{name}: {close:.1%} of the entries are alike"


@pytest.mark.fault("R18", "R19", "R23", "R25")
def test_two_processes_equal_one_with_twice_the_batch(
    base: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    ended = run(lambda rank: main(words(base, pictures, tmp_path)))
    for process in ended:
        assert process.status == 0, process.output
    assert ended[0].output.count("before training") == 1
    own = [line for line in ended[1].output.splitlines()
           if "reducer.cpp" not in line and "[transformers]" not in line]  # fmt: skip
    assert own == [], "only the first process speaks"
    check_alike(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.fault("R27")
def test_a_base_divided_among_processes_trains_alike(
    base: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    ended = run(lambda rank: main(words(base, pictures, tmp_path, shard_base=True)))
    for process in ended:
        assert process.status == 0, process.output
    check_alike(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.fault("R20")
def test_an_adapted_text_encoder_and_unequal_pictures_train_in_two_processes(
    base: Path, tmp_path: Path
) -> None:
    """The third picture leaves the second process without a sample of its own."""
    argv = command(base, tmp_path, lora__apply_to_text_encoder=True, training__batch_size=1)
    ended = run(lambda rank: main(argv))
    for process in ended:
        assert process.status == 0, process.output
    assert [row["step"] for row in rows(tmp_path, "train")] == ["1", "2", "3", "4"]


@pytest.mark.fault("R20", "R29")
def test_data_that_one_process_cannot_read_end_all_with_one_message(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    def target(rank: int) -> int:
        folder = pictures if rank == 0 else tmp_path / "none"
        return main([*words(base, pictures, tmp_path / "out"),
                     "--dataset.train_img_folder", str(folder)])  # fmt: skip

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    assert str(tmp_path / "none") in ended[1].output + ended[0].output
    assert not any("Traceback" in process.output for process in ended)
    assert not (tmp_path / "out" / "checkpoints" / "best.pt").exists()
