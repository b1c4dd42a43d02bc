"""Two processes train as one with twice the batch, and make one run.

Whatever their pictures ask and hold: the loss divides by the queries and objects of all processes.
"""

from __future__ import annotations

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


def words(base: Path, output: Path, **more: object) -> list[str]:
    """Two epochs of two updates over pictures with 5, 2 and 0 objects, in batches of one."""
    same = {
        "dataset__enable_augmentation": False,
        "dataset__max_negatives": 1,  # so that they ask for unequal numbers of phrases, too
        "lora__dropout": 0,  # its masks differ between processes
        "training__enable_segmentation": True,
        "training__batch_size": 1,
        "training__learning_rate": 1e-4,
    }
    return command(base, output, **(same | more))


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process with batches of two."""
    output = tmp_path_factory.mktemp("one")
    assert main(words(base, output, training__batch_size=2)) == 0
    return output


def check_alike(two: Path, one: Path) -> None:
    """Equal but for the order of sums: every figure of both, and the adapters."""
    found = [rows(output) for output in (two, one)]
    assert [row["split"] for row in found[0]] == ["val", *["train", "train", "val"] * 2]
    for a, b in zip(*found, strict=True):
        for name in a.keys() - {"split", "epoch"}:
            assert bool(a[name]) == bool(b[name]), name
            if a[name]:
                rel = 1e-4 if name == "grad_norm" else 1e-5
                assert float(a[name]) == pytest.approx(float(b[name]), rel=rel, abs=1e-8), name
    a, b = (tensors(output / "checkpoints" / "epoch_2.pt") for output in (two, one))
    assert a.keys() == b.keys()
    for name in a:
        # Adam gives an entry whose gradient is all rounding a whole step in either direction.
        close = torch.isclose(a[name], b[name], rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.98, f"{name}: {close:.1%} of the entries are alike"


@pytest.mark.fault("R18", "R19", "R23", "R25")
def test_two_processes_equal_one_with_twice_the_batch(
    base: Path, alone: Path, tmp_path: Path
) -> None:
    """The third picture leaves the second process without one of its own."""
    ended = run(lambda rank: main(words(base, tmp_path)))
    for process in ended:
        assert process.status == 0, process.output
    assert ended[0].output.count("before training") == 1
    own = [line for line in ended[1].output.splitlines()
           if "reducer.cpp" not in line and "[transformers]" not in line]  # fmt: skip
    assert own == [], "only the first process speaks"
    check_alike(tmp_path, alone)


def test_accumulated_batches_equal_one_of_their_size(
    base: Path, alone: Path, tmp_path: Path
) -> None:
    assert main(words(base, tmp_path, training__gradient_accumulation_steps=2)) == 0
    check_alike(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.fault("R27")
def test_a_base_divided_among_processes_trains_alike(
    base: Path, alone: Path, tmp_path: Path
) -> None:
    ended = run(lambda rank: main(words(base, tmp_path, shard_base=True)))
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
    base: Path, tmp_path: Path
) -> None:
    def target(rank: int) -> int:
        folder = tiny_run.PICTURES if rank == 0 else tmp_path / "none"
        return main([*words(base, tmp_path / "out"),
                     "--dataset.train_img_folder", str(folder)])  # fmt: skip

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    assert str(tmp_path / "none") in ended[1].output + ended[0].output
    assert not any("Traceback" in process.output for process in ended)
    assert not (tmp_path / "out" / "checkpoints" / "best.pt").exists()
