"""The promises of every package's training command, on a small random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_midi_run

from lora_core.testing import program
from midi3d_lora.config import Config
from midi3d_lora.train import main

CONFIGS = Path(__file__).parents[1] / "configs" / "train"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_midi_run.write_scenes(tmp_path_factory.mktemp("data"))


def tiny(data: Path) -> program.Program:
    """The command with a run of two epochs over three scenes."""
    return program.Program(
        main,
        lambda folder: tiny_midi_run.command(data, folder / "run"),
        lambda folder: ["--resume_from_checkpoint", str(folder / "run")],
        Config,
        examples=sorted(CONFIGS.glob("*.yaml")),
        base="pretrained_model",
        data="data_dir",
        output="output_dir",
    )


@pytest.mark.fault("K08", "K13", "K23", "K49")
@pytest.mark.parametrize("promise", program.CONTRACT, ids=lambda promise: promise.__name__)
def test_the_promises_of_every_training_command_hold(
    promise: Callable[[program.Program, Path], None], data: Path, tmp_path: Path
) -> None:
    promise(tiny(data), tmp_path)


@pytest.mark.slow
@pytest.mark.fault("K01", "K08", "K13", "K49")
@pytest.mark.parametrize("promise", program.SLOW, ids=lambda promise: promise.__name__)
def test_the_promises_that_take_their_time_hold(
    promise: Callable[[program.Program, Path], None], data: Path, tmp_path: Path
) -> None:
    promise(tiny(data), tmp_path)
