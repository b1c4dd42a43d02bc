"""The promises of every package's training command, on the packaged base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.testing import program
from sam2_lora import demo
from sam2_lora.config import Config
from sam2_lora.train import main


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with one bright square each, and their masks."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(6):
        split = root / ("train" if number < 4 else "val")
        mask = np.zeros((64, 64), np.uint8)
        x, y = rng.integers(8, 32, 2)
        mask[y : y + 20, x : x + 20] = 255
        grey = np.where(mask > 0, 190, 80) + rng.integers(0, 30, mask.shape)
        for name, array in (("images", np.repeat(grey[..., None], 3, 2)), ("masks", mask)):
            (split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(split / name / f"{number}.png")
    return root


@pytest.mark.fault("K08", "K13", "K23", "K49")
@pytest.mark.parametrize("promise", program.CONTRACT, ids=lambda promise: promise.__name__)
def test_the_promises_of_every_training_command_hold(
    promise: Callable[[program.Program, Path], None], pictures: Path, tmp_path: Path
) -> None:
    def small(folder: Path) -> list[str]:
        settings: dict[str, object] = {
            "data_root": pictures,
            "checkpoint": demo.base_checkpoint(),
            "output_dir": folder / "models",
            "logs_dir": folder / "logs",
            "image_size": 64,
            "steps": 4,
            "eval_steps": 2,
            "log_steps": 1,
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "lora_dropout": 0.1,
            "correction_clicks": 1,
            "num_workers": 0,
            "tensorboard": False,
        }
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def resume(folder: Path) -> list[str]:
        (run,) = (folder / "models").iterdir()
        return ["--resume", str(run)]

    promise(program.Program(main, small, resume, Config), tmp_path)
