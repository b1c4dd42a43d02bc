"""Two processes train as one with twice the batch, and make one run folder."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sam2_lora import demo
from sam2_lora.train import main

SCRIPT = Path(__file__).parent.parent / "train_lora.py"


def command(output: Path, batch_size: int) -> list[str]:
    """Flags of two steps on the generated steel, results in `output`."""
    words: dict[str, object] = {
        "data_root": output.parent / "data",
        "checkpoint": demo.base_checkpoint(),
        "image_size": "64x320",
        "batch_size": batch_size,
        "steps": 2,
        "log_steps": 1,
        "eval_steps": 2,
        "learning_rate": 1e-4,
        "lora_dropout": 0,  # its masks differ between processes
        "correction_clicks": 1,
        "num_workers": 0,
        "device": "cpu",
        "tensorboard": False,
        "output_dir": output,
        "logs_dir": output / "logs",
    }
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def losses(output: Path) -> list[float]:
    (table,) = (output / "logs").glob("*.csv")
    with table.open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    demo.write_severstal(tmp_path / "data", train=4, val=1, test=1)
    shutil.rmtree(tmp_path / "data" / "test_split")
    assert main(command(tmp_path / "one", batch_size=2)) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *command(tmp_path / "two", batch_size=1)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("before training") == 1, "only the first process speaks"
    assert len(list((tmp_path / "two").glob("sam2_*"))) == 1
    assert len(losses(tmp_path / "one")) == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
