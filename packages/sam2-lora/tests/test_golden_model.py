"""The network against recorded numbers of the official implementation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_core.injection import lora_layers
from sam2_lora import model as m
from sam2_lora import names, placement
from sam2_lora.config import Config
from sam2_lora.losses import Rule, official_terms

CASE = Path(__file__).parent / "goldens" / "image_model"
STEP = CASE.parent / "lora_step"
TOLERANCE = 1e-4
PROMPTS = {
    "points": ("points", "point_labels", None, None),
    "box": (None, None, "boxes", None),
    "box_points": ("points", "point_labels", "boxes", None),
    "points_mask": ("points", "point_labels", None, "mask_input"),
    "multi": ("multi_points", "multi_labels", None, None),
}


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(CASE / "io.safetensors")


@pytest.fixture
def network(golden_base: Path) -> Any:
    return m.load(golden_base)


def prompt(io: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    keys = zip(("points", "labels", "boxes", "mask_input"), PROMPTS[name], strict=True)
    return {argument: io[key] for argument, key in keys if key is not None}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_golden_features(network: Any, io: dict[str, Tensor]) -> None:
    assert network.config._attn_implementation == "sdpa"
    features = m.encode(network, io["pixel_values"])
    for name, level in features._asdict().items():
        close(level, io[name])
    close(network.get_image_wide_positional_embeddings(), io["dense_pe"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_golden_masks_in_both_modes(
    network: Any, io: dict[str, Tensor], name: str, training: bool
) -> None:
    network.train(training)
    image = torch.zeros(4, dtype=torch.long) if name == "multi" else torch.arange(2)
    arguments = prompt(io, name)
    with torch.no_grad():
        features = m.encode(network, io["pixel_values"])
        several = m.decode(network, features, image, **arguments)
        single = m.decode(network, features, image, **arguments, multimask=False)
        stable = m.decode(network, features, image, **arguments, multimask=False, stability=True)
    close(several.masks, io[f"{name}.masks"])
    close(several.iou, io[f"{name}.iou"])
    close(several.object_score, io[f"{name}.obj"])
    for result, key in ((single, "single"), (stable, "stable")):
        if f"{name}.{key}_mask" in io:
            close(result.masks, io[f"{name}.{key}_mask"])
            close(result.iou, io[f"{name}.{key}_iou"])
    assert network.mask_decoder.training is training
    assert network.mask_decoder.dynamic_multimask_via_stability is True


def test_golden_stability_separates_the_objects(network: Any, io: dict[str, Tensor]) -> None:
    threshold = network.mask_decoder.dynamic_multimask_stability_thresh
    falls_back = io["multi.stability"] < threshold
    changed = (io["multi.stable_mask"] != io["multi.single_mask"]).flatten(1).any(1)
    assert falls_back.sum() == 2
    assert torch.equal(changed, falls_back)


# -- one training step ---------------------------------------------------------------------------


def adapters(network: Any, kind: str = "value") -> dict[str, Tensor]:
    """Official module name + .lora_A / .lora_B -> value or gradient."""
    found = {}
    for path, layer in lora_layers(network).items():
        for letter, factor in zip("AB", layer.lora_factors("default"), strict=True):
            tensor = factor.grad if kind == "grad" else factor.detach()
            found[f"{names.module_to_official(path)}.lora_{letter}"] = tensor
    return found


def test_lora_step_golden(golden_base: Path, io: dict[str, Tensor]) -> None:
    """Forward, official loss, every gradient, clipping and one AdamW step with an adapter."""
    settings = json.loads((STEP / "config.json").read_text())
    expected = load_file(STEP / "io.safetensors")
    network = m.load(golden_base)
    cfg = Config(
        image_size="128",
        lora_rank=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
    )
    placement.adapt(network, cfg)
    initial = load_file(STEP / "lora.safetensors")
    assert adapters(network).keys() == initial.keys()
    for name, value in adapters(network).items():
        value.copy_(initial[name])
    network.train()

    def step_loss() -> tuple[Any, m.Decoded, m.Features]:
        features = m.encode(network, io["pixel_values"])
        decoded = m.decode(network, features, torch.arange(2), io["points"], io["point_labels"])
        targets = expected["gt"].to(torch.uint8)
        return official_terms(*decoded, targets, num_objects=2.0), decoded, features

    terms, decoded, features = step_loss()
    close(features.image_embed, expected["image_embed"])
    close(decoded.masks, expected["masks"])
    close(decoded.iou, expected["iou"])
    close(decoded.object_score, expected["obj"])
    for part, name in zip(terms, ("mask", "dice", "iou", "class"), strict=True):
        torch.testing.assert_close(part, expected[f"loss.loss_{name}"][0], rtol=1e-5, atol=0)
    total = terms.total(Rule())
    torch.testing.assert_close(total, expected["loss.core_loss"][0], rtol=1e-5, atol=0)

    total.backward()
    recorded = load_file(STEP / "grads.safetensors")
    for name, grad in adapters(network, "grad").items():
        error = (grad - recorded[name]).abs().max()
        assert error <= 1e-3 * recorded[name].abs().max(), name
    parameters = [p for p in network.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings["clip_grad_norm"])
    torch.testing.assert_close(norm, expected["grad_norm"][0], rtol=1e-4, atol=0)

    options = {key: settings["optimizer"][key] for key in ("lr", "weight_decay", "betas", "eps")}
    torch.optim.AdamW(parameters, **options).step()
    after = load_file(STEP / "lora_after.safetensors")
    for name, value in adapters(network).items():
        firm = recorded[name].abs() > 1e-4
        torch.testing.assert_close(value[firm], after[name][firm], rtol=0, atol=1e-6)
    with torch.no_grad():
        loss_after = step_loss()[0].total(Rule())
    torch.testing.assert_close(loss_after, expected["loss_after_one_step"][0], rtol=1e-4, atol=0)
