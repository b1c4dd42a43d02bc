"""LoRA on the attention of the official model, whose q, k and v are one tensor.

The network here has them apart; merged files and the official layers put them together.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_core.config import LoraConfig, Slices
from lora_core.injection import inject, lora_layers
from lora_core.testing import load_golden

CASE = load_golden(Path(__file__).parent / "goldens" / "mha_lora")
MASKS = {
    "plain": {},
    "padded": {"key_padding_mask": CASE.io["key_padding_mask"].bool()},
    "bias": {"attn_mask": CASE.io["attn_bias"]},
    "boolmask": {"attn_mask": CASE.io["attn_bool_mask"].bool()},
}


def adapted() -> nn.ModuleDict:
    """The golden attention with its adapters on q, k, v and the output."""
    attention = nn.MultiheadAttention(CASE.config["embed_dim"], CASE.config["num_heads"])
    attention.load_state_dict(CASE.weights)
    model = nn.ModuleDict({"attn": attention})
    parts = {"attn": Slices(use=("q", "k", "v"))}
    inject(model, LoraConfig(["attn"], r=3, lora_alpha=6, slices=parts))
    return model


def fill(model: nn.ModuleDict) -> None:
    def factors(part: str) -> tuple[Tensor, Tensor]:
        name = f"adapter.{part}_proj.lora_"
        return CASE.io[f"{name}A"], CASE.io[f"{name}B"]

    fused = [torch.cat(both) for both in zip(*map(factors, "qkv"), strict=True)]
    for path, layer in lora_layers(model).items():
        for weight in layer.lora_adapters["default"].weight_names:
            given = fused if "in_proj" in weight else factors("out")
            for own, values in zip(layer.lora_factors("default", weight), given, strict=True):
                assert own.shape == values.shape, (path, weight)
                own.data.copy_(values)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_adapted_attention_gives_the_recorded_outputs(mask: str, mode: str) -> None:
    model = adapted().train(mode == "train")
    inputs = [CASE.io[name] for name in ("query", "key", "value")]
    base, _ = model["attn"](*inputs, need_weights=False, **MASKS[mask])
    torch.testing.assert_close(base, CASE.io[f"base.{mask}"], rtol=1e-5, atol=1e-5)
    fill(model)
    found, _ = model["attn"](*inputs, need_weights=False, **MASKS[mask])
    torch.testing.assert_close(found, CASE.io[f"lora.{mask}"], rtol=1e-5, atol=1e-5)


def test_merged_weights_are_the_recorded_ones() -> None:
    model = adapted()
    fill(model)
    merged: dict[str, Tensor] = {}
    for path, layer in lora_layers(model).items():
        place = path.removeprefix("attn").strip(".")
        for name, weight in layer.lora_merged_weights().items():
            merged[f"{place}.{name}".strip(".")] = weight
    assert set(merged) == {"in_proj_weight", "out_proj.weight"}
    for name, weight in merged.items():
        torch.testing.assert_close(weight, CASE.io[f"merged.{name}"], rtol=1e-5, atol=1e-5)
