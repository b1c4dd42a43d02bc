"""`--lora_last_blocks`: adapters at the end of the transformer alone, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_midi_run
import torch
from adapted_models import base
from tiny_transformers import random_inputs
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.injection import lora_layers
from lora_core.testing import Case
from lora_core.testing.frozen_start import nothing_is_kept_before_the_last_blocks
from midi3d_lora import lora, memory, model
from midi3d_lora.adapter_files import load_adapter
from midi3d_lora.config import Config
from midi3d_lora.lora_choice import ROLES, LoraChoice
from midi3d_lora.train import main

Capture = pytest.CaptureFixture[str]
BLOCKS = [f"blocks.{number}" for number in range(5)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_midi_run.write_scenes(tmp_path_factory.mktemp("scenes"))


def output(net: nn.Module) -> Tensor:
    found: Tensor = net(**random_inputs(base(), 3), instance_groups=[0, 0, 1], return_dict=False)[0]
    return found


@pytest.mark.parametrize("targets", [LoraChoice().target_modules, ("all-linear",)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("again", [False, True], ids=["whole", "checkpointed"])
def test_nothing_is_kept_before_the_last_blocks(
    tmp_path: Path, targets: tuple[str, ...], count: int, again: bool
) -> None:
    """The skips from the first half to the second carry no graph either."""

    def make() -> nn.Module:
        net = base()
        if again:
            net.enable_gradient_checkpointing()
        return net

    within = [f"re:blocks\\..*{name}" for name in (".*",)] if "all" in targets[0] else targets

    def case(last: int | None) -> Case:
        config = LoraChoice(2, 4, 0.0, tuple(within), last_blocks=last).config()
        return Case(make, output, config, ROLES, tolerance=2e-5)

    nothing_is_kept_before_the_last_blocks(case(count), case(None), BLOCKS, count, tmp_path)


@pytest.mark.parametrize("last", [0, 6])
def test_other_numbers_of_blocks_are_refused(
    scenes: Path, tmp_path: Path, capsys: Capture, last: int
) -> None:
    run = tmp_path / "run"
    assert main(tiny_midi_run.command(scenes, run, lora_last_blocks=last)) == 2
    wanted = {0: "--lora_last_blocks is 0: it must be at least 1", 6: "6 were asked for (1 to 5)"}
    assert wanted[last] in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


def test_a_run_trains_them_and_a_dry_run_says_what_fewer_take(
    scenes: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    words = tiny_midi_run.command(scenes, run, lora_last_blocks=2, num_epochs=1)
    assert main([*words, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "memory of a step on a CPU  fp32" in out
    table = out[out.index("--lora_last_blocks, fp32") :].splitlines()[2:4]
    assert [line.split("  ")[0].strip() for line in table] == ["2, as set", "1"]
    assert main(words) == 0
    net = model.build(config(scenes, run))
    load_adapter(net, run / "adapter")
    blocks = {".".join(path.split(".")[:2]) for path in lora_layers(net)}
    assert blocks == {"blocks.3", "blocks.4"}


def config(scenes: Path, run: Path, **given: Any) -> Config:
    settings = tiny_midi_run.settings(scenes, run, **given) | {"tensorboard": False}
    return Config(**{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})


def test_it_is_advised_when_memory_runs_out_and_not_in_use(scenes: Path, tmp_path: Path) -> None:
    def advised(**given: Any) -> list[str]:
        cfg = config(scenes, tmp_path, **given)
        net = model.adapted(model.skeleton(cfg), cfg)
        return [text for text in memory.advice(cfg, net).remedies if "last_blocks" in text]

    blocks = len(lora.stack(model.skeleton(config(scenes, tmp_path))).blocks)
    assert advised() == [
        f"--lora_last_blocks {blocks // 2} (nothing is kept of the "
        f"{blocks - blocks // 2} blocks before)"
    ]
    assert advised(lora_last_blocks=2) == []


def test_the_number_is_checked_in_code_too() -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        LoraChoice(last_blocks=0)
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"has 5 blocks, 9 were asked for \(1 to 5\)"):
        lora.inject(base(), LoraChoice(last_blocks=9))
