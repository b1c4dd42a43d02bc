"""The promises of every package's training command, on a small random language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_scenes
import torch

from lora_core.testing import program
from scenesplat_lora.config import Config
from scenesplat_lora.train import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    return tiny_scenes.write_base(folder / "base.pth"), tiny_scenes.write_scenes(folder / "data")


def tiny(files: tuple[Path, Path]) -> program.Program:
    """The command with a run of two epochs over three scenes."""
    base, data = files
    return program.Program(
        main,
        # The loss on the validation scene is measured, and still falls in the second epoch.
        lambda folder: tiny_scenes.command(base, data, folder / "run", optimizer__lr=1e-3),
        lambda folder: ["--resume", str(folder / "run")],
        Config,
        base="lora_training.pretrained_path",
        data="data.train.data_root",
        output="save_path",
        tensors=lambda path: torch.load(path, weights_only=True)["lora_state_dict"],
    )


@pytest.mark.fault("K08", "K13", "K23", "K49")
@pytest.mark.parametrize("promise", program.CONTRACT, ids=lambda promise: promise.__name__)
def test_the_promises_of_every_training_command_hold(
    promise: Callable[[program.Program, Path], None], files: tuple[Path, Path], tmp_path: Path
) -> None:
    promise(tiny(files), tmp_path)


@pytest.mark.slow
@pytest.mark.fault("K01", "K08", "K13", "K49")
@pytest.mark.parametrize("promise", program.SLOW, ids=lambda promise: promise.__name__)
def test_the_promises_that_take_their_time_hold(
    promise: Callable[[program.Program, Path], None], files: tuple[Path, Path], tmp_path: Path
) -> None:
    promise(tiny(files), tmp_path)
