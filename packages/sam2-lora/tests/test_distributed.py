"""Two processes train as one with twice the batch, and make one run folder."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lora_core import checkpoint
from lora_core.testing.processes import run
from sam2_lora import demo
from sam2_lora.train import main

SCRIPT = Path(__file__).parent.parent / "train_lora.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated steel: five strips to train with, one to validate, none to test."""
    folder = tmp_path_factory.mktemp("steel") / "data"
    demo.write_severstal(folder, train=5, val=1, test=1)
    shutil.rmtree(folder / "test_split")
    return folder


def command(data: Path, output: Path, batch_size: int, **more: object) -> list[str]:
    """Flags of three updates, results in `output`."""
    words: dict[str, object] = {
        "data_root": data,
        "checkpoint": demo.base_checkpoint(),
        "image_size": "64x320",
        "batch_size": batch_size,
        "steps": 3,
        "log_steps": 1,
        "eval_steps": 3,
        "learning_rate": 1e-4,
        "lora_dropout": 0,  # its masks differ between processes
        "correction_clicks": 1,
        "num_workers": 0,
        "device": "cpu",
        "tensorboard": False,
        "output_dir": output,
        "logs_dir": output / "logs",
        **more,
    }
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def losses(output: Path) -> list[float]:
    (table,) = (output / "logs").glob("*.csv")
    with table.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["split"] == "train"]
    assert [int(row["step"]) for row in found] == list(range(1, len(found) + 1))
    return [float(row["loss"]) for row in found]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process with batches of two."""
    output = tmp_path_factory.mktemp("one")
    assert main(command(data, output, batch_size=2)) == 0
    return losses(output)


@pytest.mark.fault("R18", "R19", "R23", "R25")
def test_two_processes_equal_one_with_twice_the_batch(
    data: Path, alone: list[float], tmp_path: Path
) -> None:
    """Pictures with unequal numbers of objects; in the third update one process has none left."""
    ended = run(lambda rank: main(command(data, tmp_path / "two", batch_size=1)))
    for process in ended:
        assert process.status == 0, process.output
    assert ended[0].output.count("before training") == 1
    own = [line for line in ended[1].output.splitlines() if "reducer.cpp" not in line]
    assert own == [], "only the first process speaks"  # a started command silences torch as well
    assert len(list((tmp_path / "two").glob("sam2_*"))) == 1
    assert len(alone) == 3
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
@pytest.mark.fault("R27")
def test_a_base_divided_among_processes_trains_and_merges_alike(
    data: Path, alone: list[float], tmp_path: Path
) -> None:
    ended = run(lambda rank: main(command(data, tmp_path, batch_size=1, shard_base=True)))
    for process in ended:
        assert process.status == 0, process.output
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-6)
    assert len(list(tmp_path.glob("sam2_*/best_merged_*.torch"))) == 1


@pytest.mark.fault("R20", "R29")
def test_data_that_one_process_cannot_read_end_all_with_one_message(
    data: Path, tmp_path: Path
) -> None:
    def target(rank: int) -> int:
        return main(command(data if rank == 0 else tmp_path / "none", tmp_path / "out", 1))

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    assert str(tmp_path / "none") in ended[1].output + ended[0].output
    assert not any("Traceback" in process.output for process in ended)


def rank_one(launcher: int) -> int | None:
    """The process that a launcher started as RANK=1."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"\0RANK=1\0" in (path / "environ").read_bytes():
                return int(path.name)
    return None


def launched(*words: str) -> subprocess.Popen[str]:
    """Two processes of `sam2-lora train` under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [sys.executable, *launch, *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def end(process: subprocess.Popen[str], folder: Path) -> None:
    """Kill a launcher, and the processes it has started, which would outlive it."""
    process.kill()
    for path in Path("/proc").glob("[0-9]*"):
        if str(folder) in words_of(path):
            with suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.fault("K23", "K25", "R29")
def test_stopping_torchrun_ends_all_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    words = command(data, tmp_path, 1, steps=5000, eval_steps=2)
    process = launched(str(SCRIPT), *words)
    try:
        wait_for(tmp_path, "sam2_*/state/checkpoint-2")
        process.terminate()
        output, _ = process.communicate(timeout=100)
    finally:
        end(process, tmp_path)
    found = re.search(r"stopped by SIGTERM after step (\d+) of 5000; saved in (.*?);", output)
    assert found, output[-4000:]
    assert checkpoint.load(found[2])["step"] == int(found[1])
    assert "find_unused_parameters" not in output, "a remark of torch that is for its developers"
    left = [path for path in Path("/proc").glob("[0-9]*") if str(tmp_path) in words_of(path)]
    assert left == []


def words_of(process: Path) -> str:
    with suppress(OSError):
        return (process / "cmdline").read_text()
    return ""


@pytest.mark.slow
@pytest.mark.fault("R21", "R28", "R29")
def test_torchrun_starts_a_run_again_that_lost_a_rank_and_it_resumes(
    data: Path, tmp_path: Path
) -> None:
    """The command is the same in the second attempt; the log has no gap and no repeat."""
    words = command(data, tmp_path / "two", 1, steps=12, eval_steps=2, resume="latest")
    process = launched("--max-restarts", "1", str(SCRIPT), *words)
    try:
        wait_for(tmp_path, "two/sam2_*/state/checkpoint-2")
        victim = rank_one(process.pid)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=200)
    finally:
        end(process, tmp_path)
    assert process.returncode == 0, output[-4000:]
    assert "rank 1 (process " in output
    assert "continuing at step " in output
    assert "no unfinished run" in output, "the first attempt"
    assert "frame #" not in output, "stack traces of torch's connections"
    assert len(list((tmp_path / "two").glob("sam2_*"))) == 1
    assert main(command(data, tmp_path / "one", 2, steps=12, eval_steps=2)) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
