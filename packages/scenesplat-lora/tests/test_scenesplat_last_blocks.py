"""`--lora.last_blocks`: adapters in the last blocks that run alone, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_scenes
from lora_models import tiny_batch, tiny_model

from lora_core.config import LoraConfig, parse
from lora_core.errors import ConfigError
from lora_core.injection import lora_layers
from lora_core.testing import Case
from lora_core.testing.frozen_start import nothing_is_kept_before_the_last_blocks
from scenesplat_lora import memory, model
from scenesplat_lora.config import Config
from scenesplat_lora.lora import inject_choice, inject_lora_with_preset, load_lora_checkpoint
from scenesplat_lora.names import blocks_of, chosen_layers
from scenesplat_lora.network.frozen_norms import freeze_statistics
from scenesplat_lora.network.models import LangPretrainer
from scenesplat_lora.presets import PRESETS, LoraChoice, preset_choice
from scenesplat_lora.train import main

Capture = pytest.CaptureFixture[str]
ENCODER = [f"backbone.enc.enc{s}.block{b}" for s, b in ((0, 0), (1, 0), (2, 0), (2, 1))]
DECODER = ["backbone.dec.dec1.block0", "backbone.dec.dec0.block0"]  # as they run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_scenes.write_base(folder / "base.pth")
    tiny_scenes.write_scenes(folder / "data")
    return folder


def command(files: Path, output: Path, **given: Any) -> list[str]:
    return tiny_scenes.command(files / "base.pth", files / "data", output, **given)


def with_fixed_statistics() -> LangPretrainer:
    net = tiny_model()
    freeze_statistics(net)
    return net


def blocks(choice: LoraChoice) -> list[str]:
    return blocks_of(layer.path for layer in chosen_layers(tiny_model(), choice))


@pytest.mark.parametrize(
    ("given", "every", "count"),
    [
        ({}, ENCODER, 1),
        ({"target_modules": ("attn", "mlp")}, ENCODER, 3),
        ({"encoder_only": False}, ENCODER + DECODER, 1),
        ({"encoder_only": False}, ENCODER + DECODER, 3),
    ],
)
def test_nothing_is_kept_before_the_last_blocks(
    tmp_path: Path, given: dict[str, Any], every: list[str], count: int
) -> None:
    def case(last: int | None) -> Case:
        choice = preset_choice("standard", **given, last_blocks=last)
        assert blocks(choice) == every[-(last or len(every)) :]
        paths = [layer.path for layer in chosen_layers(tiny_model(), choice)]
        config = LoraConfig(paths, r=2, lora_alpha=4)
        return Case(with_fixed_statistics, lambda net: net(tiny_batch()), config, tolerance=2e-5)

    nothing_is_kept_before_the_last_blocks(case(count), case(None), every, count, tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_with_it(preset: str) -> None:
    """Counted among the blocks that the preset means."""
    whole = blocks(PRESETS[preset])
    for count in range(1, len(whole) + 1):
        assert blocks(preset_choice(preset, last_blocks=count)) == whole[-count:]
    with pytest.raises(ConfigError, match=rf"mean {len(whole)} blocks \(1 to {len(whole)}\)"):
        inject_lora_with_preset(tiny_model(), preset, last_blocks=len(whole) + 1)
    net = inject_lora_with_preset(tiny_model(), preset, last_blocks=1)
    assert blocks_of(lora_layers(net)) == whole[-1:]


@pytest.mark.parametrize("last", [0, -1, True, 1.5])
def test_a_number_that_counts_nothing_is_refused(last: Any) -> None:
    with pytest.raises(ConfigError, match="it must be a whole number, 1 or more"):
        LoraChoice(last_blocks=last)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora__last_blocks": 0}, "last_blocks is 0: it must be a whole number, 1 or more"),
        ({"lora__last_blocks": 5}, "last_blocks is 5: preset, encoder_only and target_stages mean"),
        ({"lora__last_blocks": 1, "lora__bias": "all"}, "lora_only trains those of adapted layers"),
    ],
)
def test_what_cannot_be_is_refused(
    files: Path, tmp_path: Path, capsys: Capture, given: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    assert main(command(files, run, **given)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


def test_a_run_trains_them_and_a_dry_run_says_what_fewer_take(
    files: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert main([*command(files, run, lora__preset="full"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    table = out[out.index("--lora.last_blocks, fp32") :].splitlines()[2:5]
    assert [line.split("  ")[0].strip() for line in table] == ["4, as set", "2", "1"]
    assert main(command(files, run, epoch=1, lora__last_blocks=2)) == 0
    net = model.build(parse(Config, command(files, run), prog="t"))
    load_lora_checkpoint(net, run / "adapter")
    assert blocks_of(lora_layers(net)) == ENCODER[-2:]


def test_it_is_advised_when_memory_runs_out_and_not_in_use(files: Path, tmp_path: Path) -> None:
    def advised(**given: Any) -> list[str]:
        cfg = parse(Config, command(files, tmp_path, **given), prog="t")
        net = model.skeleton(cfg)
        inject_choice(net, cfg.lora.choice(0))
        return [text for text in memory.advice(cfg, net).remedies if "last_blocks" in text]

    assert advised() == ["--lora.last_blocks 2 (nothing is kept of the 2 blocks before)"]
    assert advised(lora__last_blocks=2) == []
