"""The promises of every package's training command, on the small random SAM 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from lora_core.testing import program
from sam3_lora.config import Config
from sam3_lora.train import main

EXAMPLE = Path(__file__).parent.parent / "src" / "configs" / "lora_config_example.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


def tiny(base: Path) -> program.Program:
    """The command with a run of two epochs over three pictures."""

    def small(folder: Path) -> list[str]:
        # The loss on the validation data still falls in the second epoch.
        settings = {"training__best_metric": "loss", "training__learning_rate": 1e-3}
        return tiny_run.command(base, folder, **settings)

    return program.Program(
        main,
        small,
        lambda folder: ["--resume", str(folder / "checkpoints")],
        Config,
        examples=[EXAMPLE],
        base="paths.sam3_checkpoint",
        data="dataset.train_img_folder",
        output="checkpoint.save_dir",
    )


@pytest.mark.fault("K08", "K13", "K23", "K49")
@pytest.mark.parametrize("promise", program.CONTRACT, ids=lambda promise: promise.__name__)
def test_the_promises_of_every_training_command_hold(
    promise: Callable[[program.Program, Path], None], base: Path, tmp_path: Path
) -> None:
    promise(tiny(base), tmp_path)


@pytest.mark.slow
@pytest.mark.fault("K01", "K08", "K13", "K49")
@pytest.mark.parametrize("promise", program.SLOW, ids=lambda promise: promise.__name__)
def test_the_promises_that_take_their_time_hold(
    promise: Callable[[program.Program, Path], None], base: Path, tmp_path: Path
) -> None:
    promise(tiny(base), tmp_path)
