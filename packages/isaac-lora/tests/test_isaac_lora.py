"""LoRA on Isaac: its layers, the recorded step, and what is refused."""

import json
import re
from collections import Counter
from typing import Any

import pytest
import safetensors.torch
import torch
from recorded_isaac import CASE, GOLDENS, labels_of, padded, recorded_model, sample
from torch import Tensor, nn

from isaac_lora.adapter_files import load_adapter
from isaac_lora.lora import (
    LoraChoice,
    adapted_layers,
    by_part,
    inject,
    lora_parameters,
    remove,
)
from isaac_lora.lora_choice import names_of, part_of
from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core.errors import ConfigError
from lora_core.testing.goldens import load_golden

STEP = load_golden(GOLDENS / "lora_step")
PATTERN = json.loads((STEP.folder / "adapter_config.json").read_text())["target_modules"]
GUIDE = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.fixture(scope="module")
def released() -> IsaacForConditionalGeneration:
    config = IsaacConfig.from_pretrained(GOLDENS / "keys" / "isaac_0_1_config.json")
    with torch.device("meta"):
        return IsaacForConditionalGeneration(config)


def parts(model: IsaacForConditionalGeneration, *names: str) -> dict[str, int]:
    return dict(Counter(map(part_of, adapted_layers(model, LoraChoice(target_modules=names)))))


# -- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "parameters"), [(128, 145_031_168), (16, 18_128_896)])
def test_the_released_model_gets_198_layers(
    released: IsaacForConditionalGeneration, r: int, parameters: int
) -> None:
    with torch.device("meta"):
        summary = inject(released, LoraChoice(r=r))
    try:
        assert len(summary.rows) == 198
        assert summary.trainable == parameters
        assert all(re.fullmatch(PATTERN, row.path) for row in summary.rows)
        assert by_part([row.path for row in summary.rows]) == "decoder 196, projector 2"
    finally:
        remove(released)


def test_the_names_of_the_guide_leave_the_tower_alone(
    released: IsaacForConditionalGeneration, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parts(released, GUIDE) == {"decoder": 196}
    said = capsys.readouterr().out
    assert "vision tower: 81 layers with these names stay frozen" in said


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (("auto",), {"decoder": 196, "projector": 2}),
        (("all-linear",), {"decoder": 196, "projector": 2}),
        (("attention",), {"decoder": 112}),
        (("mlp", "projector"), {"decoder": 84, "projector": 2}),
        (("vision",), {"vision tower": 162}),
        (("vision", "q_proj"), {"vision tower": 162, "decoder": 28}),
        (("vision_embedding.1",), {"projector": 1}),
        (("**.vision_embedding.0.**.fc1",), {"vision tower": 27}),
        (("**",), {"decoder": 196, "projector": 2}),
        ((r"re:model\.layers\.(0|27)\..*_proj",), {"decoder": 14}),
        (("q_proj", "lm_head"), {"decoder": 28, "lm_head": 1}),
        (("embed_tokens",), {"embeddings": 1}),
    ],
)
def test_parts_are_reached_by_names_that_ask_for_them(
    released: IsaacForConditionalGeneration, names: tuple[str, ...], counts: dict[str, int]
) -> None:
    assert parts(released, *names) == counts


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("1", "3"), "'1' names modules that cannot be adapted"),
        (("fc1",), "'fc1' means layers of the vision tower alone"),
        (("q_prj",), "did you mean 'q_proj'"),
        (("model.layers.28.self_attn.q_proj",), "28 blocks, 0 to 27"),
        (("position_embedding",), "leave none"),
    ],
)
def test_names_that_reach_nothing_are_refused(
    released: IsaacForConditionalGeneration, names: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        adapted_layers(released, LoraChoice(target_modules=names))


def test_all_wrong_names_are_told_at_once(released: IsaacForConditionalGeneration) -> None:
    with pytest.raises(ConfigError) as told:
        adapted_layers(released, LoraChoice(target_modules=("nothing", "q_proj", "fc1")))
    assert "'nothing'" in str(told.value)
    assert "'fc1'" in str(told.value)


def test_a_list_of_names_is_split_at_commas_outside_of_brackets() -> None:
    assert names_of("q_proj, v_proj") == ("q_proj", "v_proj")
    assert names_of([r"re:model\.layers\.\d{1,2}\..*", "a,b"]) == (
        r"re:model\.layers\.\d{1,2}\..*",
        "a",
        "b",
    )
    assert names_of(None) == ("auto",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "rank"),
        ({"alpha": 0}, "above 0"),
        ({"dropout": 1.0}, "0 <= p < 1"),
        ({"bias": "some"}, "lora_only"),
        ({"target_modules": "q_proj,"}, "expected names"),
        ({"target_modules": ()}, "expected names"),
        ({"target_modules": "q_proj,v_proj,q_proj"}, "stands twice"),
    ],
)
def test_choices_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraChoice(**settings)


# -- on the model --------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_alone_trains() -> None:
    model, inputs = recorded_model(), sample("image1")
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(**inputs).logits
    inject(model, LoraChoice(r=4, alpha=8))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    with pytest.raises(ConfigError, match="LoRA already"):
        inject(model)
    remove(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("names", ["auto", "vision", "lm_head,embed_tokens"])
def test_all_adapters_get_gradients_with_and_without_checkpointing(names: str) -> None:
    model = recorded_model().train()
    inject(model, LoraChoice(r=4, dropout=0.0, target_modules=(names,)))
    for weight in lora_parameters(model):
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(weight.numel()))
    batch = padded(("image1", "text"), "right")
    found = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable()
        found.append(torch.autograd.grad(model(**batch).loss, lora_parameters(model)))
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-7)


# -- the recorded step ---------------------------------------------------------------------------


def recorded_name(name: str) -> str:
    return "base_model.model." + re.sub(r"\.default(?=\.)", "", name)


def test_the_recorded_step() -> None:
    """Logits 1e-5, loss 1e-6, gradients 1e-6 + 1e-4 relative, the step where |gradient| > 1e-6."""
    model, io, said = recorded_model(), STEP.io, STEP.config
    load_adapter(model, STEP.folder, trainable=True)
    for name in said["samples"]:
        with torch.no_grad():
            logits = model(**sample(name)).logits
        torch.testing.assert_close(logits, io[f"{name}.logits"], rtol=0, atol=1e-5)

    loss = model(**padded(tuple(said["samples"]), "right")).loss
    torch.testing.assert_close(loss.reshape(1), io["loss"].reshape(1), rtol=0, atol=1e-6)
    loss.backward()
    live: dict[str, Tensor] = {
        recorded_name(name): weight for name, weight in model.named_parameters() if ".lora_" in name
    }
    gradients = {k.removeprefix("grad."): v for k, v in io.items() if k.startswith("grad.")}
    assert live.keys() == gradients.keys()
    assert len(live) == 2 * (7 * CASE.config["num_hidden_layers"] + 2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(live[name].grad, gradient, rtol=1e-4, atol=1e-6)
    norm = nn.utils.get_total_norm([weight.grad for weight in live.values()])
    torch.testing.assert_close(norm.reshape(1), io["grad_norm"].reshape(1), rtol=1e-4, atol=1e-6)

    settings = {name: said[name] for name in ("lr", "betas", "eps", "weight_decay")}
    torch.optim.AdamW(lora_parameters(model), **settings).step()
    for name, gradient in gradients.items():
        moved = gradient.abs() > 1e-6
        after = io[f"after.{name}"]
        torch.testing.assert_close(live[name][moved], after[moved], rtol=0, atol=1e-5)


def test_the_recorded_adapter_is_that_of_the_default_layers() -> None:
    tensors = safetensors.torch.load_file(STEP.folder / "adapter_model.safetensors")
    layers = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}
    assert layers == set(adapted_layers(recorded_model(), LoraChoice()))
    assert labels_of("image1").shape == sample("image1")["input_ids"].shape
