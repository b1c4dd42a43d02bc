"""Where LoRA goes: the exact Linears and counts, and gradients that reach every adapter."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.injection import lora_layers
from lora_core.targets import resolve
from sam2_lora import model as m
from sam2_lora import official, placement
from sam2_lora.config import PRESETS, Config

TOTAL_PER_RANK = {"tiny": 48_544, "small": 57_760, "base_plus": 84_720, "large": 184_144}
TRAINABLE = {  # at r = 4, 8, 16
    "tiny": (194_176, 388_352, 776_704),
    "small": (231_040, 462_080, 924_160),
    "base_plus": (338_880, 677_760, 1_355_520),
    "large": (736_576, 1_473_152, 2_946_304),
}
LAYERS = {"tiny": 56, "small": 64, "base_plus": 80, "large": 128}
HEADS = (18, 7_813)  # Linears, parameters per unit of rank


@cache
def network_on_meta(variant: str) -> Any:
    return m.network(official.published(variant))


def config(**settings: Any) -> Config:
    return dataclasses.replace(Config(image_size="64"), **settings)


@pytest.mark.parametrize("variant", official.VARIANTS)
def test_the_default_adapts_the_recorded_linears(facts: dict[str, Any], variant: str) -> None:
    network = network_on_meta(variant)
    size = variant.partition("_hiera_")[2]
    recorded = facts["lora_targets"][f"sam2.1_hiera_{size}"]
    paths = resolve(network, placement.lora_config(config()))
    assert set(paths) == {theirs for _, theirs, *_ in recorded}
    assert len(paths) == LAYERS[size]
    modules = dict(network.named_modules())
    found = sorted((modules[p].in_features, modules[p].out_features) for p in paths)
    assert found == sorted((into, out) for _, _, into, out, _ in recorded)


@pytest.mark.parametrize("size", official.SIZES)
def test_counts_by_formula_are_the_published_ones(size: str) -> None:
    settings = network_on_meta(f"sam2.1_hiera_{size}").config
    per_role = {role: placement.linears(settings, role) for role in placement.ROLES}
    total = {role: sum(map(sum, pairs)) for role, pairs in per_role.items()}
    assert (len(per_role["decoder_attention"]), total["decoder_attention"]) == (28, 11_776)
    assert (len(per_role["decoder_mlp"]), total["decoder_mlp"]) == (4, 9_216)
    assert (len(per_role["decoder_heads"]), total["decoder_heads"]) == HEADS
    default = sum(total[role] for role in PRESETS["default"])
    assert default == TOTAL_PER_RANK[size]
    assert tuple(rank * default for rank in (4, 8, 16)) == TRAINABLE[size]


@pytest.mark.parametrize("targets", [p + h for p in PRESETS for h in ("", "+heads")])
def test_every_preset_adapts_what_it_says(golden_base: Path, targets: str) -> None:
    network = m.load(golden_base)
    cfg = config(targets=targets, lora_rank=1)  # a head has a single output
    placement.adapt(network, cfg)
    paths = set(lora_layers(network))
    encoder = {p for p in paths if p.startswith("vision_encoder.backbone.blocks.")}
    attention = {p for p in paths if p.startswith("mask_decoder.transformer") and "attn" in p}
    mlp = {p for p in paths if p.startswith("mask_decoder.transformer") and ".mlp." in p}
    heads = paths - encoder - attention - mlp
    preset = targets.removesuffix("+heads")
    assert len(encoder) == (14 if preset in ("default", "encoder") else 0)
    assert len(attention) == (0 if preset == "encoder" else 28)
    assert len(mlp) == (4 if preset in ("default", "decoder") else 0)
    assert len(heads) == (18 if targets.endswith("+heads") else 0)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert not any(name.startswith("prompt_encoder") for name in trained)


def test_an_adapted_network_computes_what_the_base_does(golden_base: Path) -> None:
    network = m.load(golden_base)
    before = objective(network)
    placement.adapt(network, config())
    assert torch.equal(objective(network), before)


def test_other_names_in_the_library_are_noticed(
    golden_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = [r"re:mask_decoder\.transformer\.layers\.0\.mlp\.proj_in"]
    monkeypatch.setitem(placement.ROLES, "decoder_mlp", narrow)
    with pytest.raises(RuntimeError, match=r"adapted 43 layers .* instead of 46"):
        placement.adapt(m.load(golden_base), config())


# -- gradients -----------------------------------------------------------------------------------


def objective(network: Any) -> Tensor:
    """A scalar that depends on masks, scores and the object score, from clicks and from a box."""
    side = m.image_size(network)[0]
    picture = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    image, place = torch.tensor([0]), torch.tensor([[[0.3, 0.6], [0.7, 0.2]]]) * side
    features = m.encode(network, picture)
    click = m.decode(network, features, image, place)
    box = m.decode(network, features, image, boxes=place.sort(1).values.flatten(1), multimask=False)
    return sum(
        (part.square().mean() for decoded in (click, box) for part in decoded),
        start=torch.zeros(()),
    )


def without_gradient(network: Any, factor: str) -> list[str]:
    """Adapters of which no entry of A, or of B, received a gradient."""
    gradients = {
        name: parameter.grad
        for name, parameter in network.named_parameters()
        if f".{factor}." in name
    }
    assert gradients, f"the network has no {factor}"
    return [name for name, grad in gradients.items() if grad is None or not grad.abs().max() > 0]


def check_gradients(network: Any, cfg: Config) -> None:
    """B starts at zero, so A receives a gradient from the second step on."""
    placement.adapt(network, cfg)
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    objective(network).backward()
    assert without_gradient(network, "lora_B") == []
    optimizer.step()
    moved = {name: p for name, p in network.named_parameters() if ".lora_B." in name}
    assert all(p.abs().max() > 0 for p in moved.values())
    optimizer.zero_grad()
    objective(network).backward()
    assert without_gradient(network, "lora_A") == []
    frozen = [p for p in network.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("targets", ["default+heads", "decoder"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter(
    golden_base: Path, targets: str, checkpointing: bool
) -> None:
    network = m.load(golden_base)
    if checkpointing:
        m.enable_gradient_checkpointing(network)
    check_gradients(network, config(targets=targets, lora_rank=1, lora_dropout=0.0))


def tiled(noise: Tensor, shape: torch.Size) -> Tensor:
    """The same noise again and again, scaled by the fan-in: quicker than drawing 217 M numbers."""
    count = shape.numel()
    tensor = noise.repeat(count // len(noise) + 1)[:count].view(shape).clone()
    return tensor / max(1, count // shape[0]) ** 0.5 if len(shape) > 1 else 1 + 0.1 * tensor


@pytest.mark.parametrize("size", official.SIZES)
def test_gradients_reach_every_adapter_of_every_size(size: str) -> None:
    """The published architectures with random weights, at 64 px."""
    network = m.network(official.published(f"sam2_hiera_{size}"))
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    state = {name: tiled(noise, tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    m.set_image_size(network, (64, 64))
    check_gradients(network, config(lora_dropout=0.0))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained == TRAINABLE[size][1]
