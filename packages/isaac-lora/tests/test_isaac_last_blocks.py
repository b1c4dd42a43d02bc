"""`--last_blocks`: adapters at the end of the decoder alone, and what that saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_isaac_run
import torch
from recorded_isaac import recorded_model, sample
from torch import Tensor, nn

from isaac_lora import memory, model
from isaac_lora.adapter_files import load_adapter
from isaac_lora.config import Config
from isaac_lora.lora import LoraChoice, adapted_layers, inject
from isaac_lora.lora_choice import part_of
from isaac_lora.train import main
from lora_core.errors import ConfigError
from lora_core.injection import lora_layers
from lora_core.testing import Case
from lora_core.testing.frozen_start import nothing_is_kept_before_the_last_blocks

Capture = pytest.CaptureFixture[str]
BLOCKS = [f"model.layers.{number}" for number in range(2)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


def logits(net: nn.Module) -> Tensor:
    found: Tensor = net(**sample("image2")).logits
    return found


@pytest.mark.parametrize("names", ["auto", "attention,lm_head"])
@pytest.mark.parametrize("again", [False, True], ids=["whole", "checkpointed"])
def test_nothing_is_kept_before_the_last_blocks(tmp_path: Path, names: str, again: bool) -> None:
    def make() -> nn.Module:
        net = recorded_model()
        if again:
            model.checkpoint_activations(net)
        return net

    def case(last: int | None) -> Case:
        choice = LoraChoice(4, 8, 0.0, target_modules=(names,), last_blocks=last)
        return Case(make, logits, choice.config(adapted_layers(recorded_model(), choice)))

    nothing_is_kept_before_the_last_blocks(case(1), case(None), BLOCKS, 1, tmp_path)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("auto", {"decoder"}),
        ("all-linear", {"decoder"}),
        ("q_proj,projector", {"decoder", "projector"}),
        ("auto,re:model.vision_embedding.[13]", {"decoder", "projector"}),
        ("auto,lm_head", {"decoder", "lm_head"}),
        ("auto,vision", {"decoder", "vision tower"}),
    ],
)
def test_the_projector_is_adapted_only_if_it_is_named(names: str, parts: set[str]) -> None:
    choice = LoraChoice(target_modules=(names,), last_blocks=1)
    found = adapted_layers(recorded_model(), choice)
    assert {part_of(path) for path in found} == parts
    assert not any(path.startswith(f"{BLOCKS[0]}.") for path in found)
    if names == "auto":
        net = recorded_model()
        assert len(inject(net, replace(choice, r=2)).rows) == 7


def test_who_leaves_the_projector_out_is_told_how_to_ask(capsys: Capture) -> None:
    adapted_layers(recorded_model(), LoraChoice(last_blocks=1))
    assert "projector: 2 layers with these names stay frozen; for these too: projector" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"last_blocks": 0}, "--last_blocks is 0: it must be at least 1"),
        ({"last_blocks": 3}, "has 2 blocks, 3 were asked for (1 to 2)"),
        ({"last_blocks": 1, "lora_bias": "all"}, "lora_only trains those of adapted layers"),
    ],
)
def test_what_cannot_be_is_refused(
    root: Path, tmp_path: Path, capsys: Capture, given: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    assert main(tiny_isaac_run.command(root, run, **given)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


def test_the_number_is_checked_in_code_too() -> None:
    with pytest.raises(ConfigError, match="last_blocks is 0: it must be at least 1"):
        LoraChoice(last_blocks=0)


def test_a_run_trains_them_and_a_dry_run_says_what_fewer_take(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert main([*tiny_isaac_run.command(root, run), "--dry_run"]) == 0
    out = capsys.readouterr().out
    table = out[out.index("--last_blocks, fp32") :].splitlines()[2:4]
    assert [line.split("  ")[0].strip() for line in table] == ["2, as set", "1"]
    assert main(tiny_isaac_run.command(root, run, last_blocks=1, max_steps=1)) == 0
    net = recorded_model()
    load_adapter(net, run)
    assert list(lora_layers(net)) == adapted_layers(recorded_model(), LoraChoice(last_blocks=1))


def test_it_is_advised_when_memory_runs_out_and_not_in_use(root: Path, tmp_path: Path) -> None:
    def advised(**given: Any) -> list[str]:
        settings = tiny_isaac_run.settings(root, tmp_path, **given)
        plain = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
        cfg = Config(**plain | {"tensorboard": False, "use_cpu": True})
        net = model.adapted(model.skeleton(cfg), cfg)
        return [text for text in memory.advice(cfg, net).remedies if "--last_blocks" in text]

    torch.manual_seed(0)
    assert advised() == ["--last_blocks 1 (nothing is kept of the 1 block before)"]
    assert advised(last_blocks=1) == []
