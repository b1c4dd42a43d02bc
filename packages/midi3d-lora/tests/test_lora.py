"""LoRA on the transformer: its layers, the recorded step, and what is refused."""

import json
import re
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_transformers import CASES, GOLDENS, random_inputs, recorded_transformer
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.testing import load_golden
from midi3d_lora.adapter_files import load_adapter, read_adapter
from midi3d_lora.flow.losses import (
    Weighting,
    add_noise,
    drop_conditioning,
    velocity_loss,
)
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.lora import LoraChoice, adapted_layers, inject, lora_parameters, remove
from midi3d_lora.transformer.dit import TripoSGDiTModel
from midi3d_lora.transformer.groups import official_groups

STEP = load_golden(GOLDENS / "lora_step")
LOSS = load_golden(GOLDENS / "loss")
MIDDLE = ("blocks.1", "blocks.2", "blocks.3")


def released() -> TripoSGDiTModel:
    with torch.device("meta"):
        return TripoSGDiTModel()


def tiny() -> TripoSGDiTModel:
    return recorded_transformer(CASES["dit_5_layers"])


def choice(**settings: Any) -> LoraChoice:
    defaults: dict[str, Any] = {"rank": 4, "multi_instance_blocks": MIDDLE}
    return LoraChoice(**(defaults | settings))


# -- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "parameters"), [(16, 13_590_528), (4, 13_590_528 // 4)])
def test_the_released_model_gets_231_layers(rank: int, parameters: int) -> None:
    model = released()
    with torch.device("meta"):
        summary = inject(model, LoraChoice(rank=rank))
    assert len(summary.rows) == 231
    assert summary.trainable == parameters
    listed = json.loads((GOLDENS / "keys" / "lora_targets.json").read_text())["modules"]
    alive = {name for name in listed if not name.endswith("attn2.to_q")}
    assert {row.path for row in summary.rows} == alive
    assert len(listed) == 252


def test_the_blocks_of_the_guide_are_the_default() -> None:
    model = released()
    with torch.device("meta"):
        inject(model)
    assert model.multi_instance_blocks == tuple(f"blocks.{index}" for index in range(8, 13))


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("attn1.to_q",), 21),
        (("attention",), 231),
        (("feed_forward", "skip_linear"), 42 + 10),
        (("all-linear",), 308 - 21),
        (("blocks.1?.attn2_2.to_*",), 30),
    ],
)
def test_layers_are_named_by_their_end_by_a_role_or_by_a_pattern(
    names: tuple[str, ...], count: int
) -> None:
    assert len(adapted_layers(released(), LoraChoice(target_modules=names))) == count


def test_adapting_a_part_of_the_thirds_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    inject(tiny(), choice())
    inject(tiny(), choice(target_modules=("attn2_2.to_q", "ff.net.2")))
    assert "third of the heads" not in capsys.readouterr().out
    inject(tiny(), choice(target_modules=("attn1.to_q", "attn1.to_v")))
    assert "a third of the heads. Where only to_q, to_v is adapted" in capsys.readouterr().out


# -- on the model --------------------------------------------------------------------------------


@torch.no_grad()
def run(model: TripoSGDiTModel, rows: int = 3) -> Tensor:
    out: Tensor = model(**random_inputs(model, rows), instance_groups=[0] * rows).sample
    return out


def test_a_new_adapter_changes_nothing_and_alone_trains() -> None:
    model = tiny()
    before = run(model)
    inject(model, choice(dropout=0.0))
    assert torch.equal(run(model), before)
    assert torch.equal(run(model.train()), before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert sum(weight.numel() for weight in lora_parameters(model)) == 14080 - 5 * 4 * 64


def test_all_adapters_get_gradients_with_and_without_checkpointing() -> None:
    model = tiny().train()
    inject(model, choice(dropout=0.0))
    for weight in lora_parameters(model):
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(weight.numel()))
    found = []
    for on in (False, True):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
        out = model(**random_inputs(model, rows=5), instance_groups=[0, 0, 0, 1, 1]).sample
        found.append(torch.autograd.grad(out.square().mean(), lora_parameters(model)))
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-7)


def test_removing_gives_the_base_back() -> None:
    model = tiny()
    keys, before = list(model.state_dict()), run(model)
    inject(model, choice())
    remove(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model), before)


# -- the recorded step ---------------------------------------------------------------------------


def test_the_recorded_step() -> None:
    """Prediction 2e-5, gradients 1e-5 + 1e-4 relative, the step where |gradient| > 1e-6."""
    model, io, said = tiny(), LOSS.io, STEP.config
    model.set_multi_instance_blocks(said["multi_instance_blocks"])
    file = STEP.folder / "lora.safetensors"
    adapter = read_adapter(file, alpha=said["lora"]["alpha"])
    load_adapter(model, adapter, trainable=True)
    assert adapter.rank == said["lora"]["r"]
    assert len(adapter.file.tensors) == 2 * said["n_modules"]

    scene_of_row = torch.arange(3).repeat_interleave(int(io["num_instances_per_batch"]))
    rows = add_noise(io["latents"], io["noise"], io["u"], scene_of_row, RectifiedFlowScheduler())
    embeds = io["image_embeds_1"], io["image_embeds_2"]
    embeds = drop_conditioning(embeds, io["drop_scene"], scene_of_row)
    groups = official_groups(
        len(scene_of_row), io["num_instances"], int(io["num_instances_per_batch"])
    )
    prediction = model(rows.noisy_latents, rows.timesteps, *embeds, instance_groups=groups).sample
    loss, _ = velocity_loss(prediction, rows, Weighting(), io["is_real_row"])
    torch.testing.assert_close(prediction, STEP.io["model_pred"], rtol=0, atol=2e-5)
    torch.testing.assert_close(loss, STEP.io["loss"], rtol=1e-5, atol=0)

    loss.backward()
    recorded = safetensors.torch.load_file(STEP.folder / "grads.safetensors")
    live = {
        re.sub(r"\.default(?=\.)", "", name): weight
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }
    assert live.keys() == recorded.keys()
    dead = {name for name, weight in live.items() if weight.grad is None}
    assert dead == {name for name in recorded if "attn2.to_q" in name}
    assert all(recorded[name].abs().max() < 1e-7 for name in dead)  # rounding
    trained = live.keys() - dead
    for name in trained:
        torch.testing.assert_close(live[name].grad, recorded[name], rtol=1e-4, atol=1e-5)
    norm = nn.utils.get_total_norm([live[name].grad for name in trained])
    torch.testing.assert_close(norm, STEP.io["grad_norm"], rtol=1e-5, atol=0)

    settings = {k: v for k, v in said["optimizer"].items() if k != "name"}
    torch.optim.AdamW(lora_parameters(model), **settings).step()
    after = safetensors.torch.load_file(STEP.folder / "lora_after.safetensors")
    for name in trained:
        moved = recorded[name].abs() > 1e-6
        torch.testing.assert_close(live[name][moved], after[name][moved], rtol=1e-4, atol=1e-5)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.fault("C13")
def test_a_second_adapter_of_the_same_name_is_refused() -> None:
    model = tiny()
    inject(model, choice())
    with pytest.raises(ConfigError, match="has LoRA already"):
        inject(model, choice())


@pytest.mark.fault("C14", "C31")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multi_instance_blocks": ("blocks.2", "blocks.99")}, r"'blocks\.99': .* to blocks\.4"),
        ({"target_modules": ("to_q", "to_qq")}, "'to_qq' matches no module.*did you mean 'to_q'"),
        ({"target_modules": ("blocks.7.attn1.to_q",)}, "blocks has 5 blocks, 0 to 4"),
    ],
)
def test_names_that_the_model_lacks_leave_it_as_it_was(
    settings: dict[str, Any], message: str
) -> None:
    model = tiny()
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        inject(model, choice(**settings))
    assert list(model.state_dict()) == keys
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.multi_instance_blocks == MIDDLE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "r is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"target_modules": ()}, "is empty"),
        ({"target_modules": ("attn2.to_q",)}, "has no effect"),
        ({"multi_instance_blocks": ("8",)}, r"'8': write blocks\.8"),
        ({"multi_instance_blocks": ("blocks.08",)}, r"'blocks\.08': write"),
        ({"multi_instance_blocks": ("blocks.1", "blocks.1")}, "stands twice"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraChoice(**settings)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraChoice(rank=0, target_modules=("attn2.to_q",), multi_instance_blocks=("block.1",))
    assert len(str(caught.value).splitlines()) == 3
