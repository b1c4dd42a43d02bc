"""The promises of every package's training command, on the recorded tiny Isaac."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_isaac_run

from isaac_lora.config import Config
from isaac_lora.train import main
from lora_core.testing import program


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


def tiny(data: Path) -> program.Program:
    """The command with a run of two epochs over five conversations, with depth."""
    more = tiny_isaac_run.depth(data) | {"lora_dropout": 0.1}
    return program.Program(
        main,
        lambda folder: tiny_isaac_run.command(data, folder / "run", **more),
        lambda folder: ["--resume_from_checkpoint", str(folder / "run")],
        Config,
        base="model_path",
        data="data_path",
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
