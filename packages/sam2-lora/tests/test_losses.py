"""The training loss: recorded official values and gradients, and what a batch's loss promises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sam2_lora import losses
from sam2_lora.config import Config
from sam2_lora.image import preprocess
from sam2_lora.losses import (
    Rule,
    Terms,
    dice_loss,
    focal_loss,
    legacy_terms,
    mask_iou,
    official_terms,
)
from sam2_lora.model import encode, load

CASE = Path(__file__).parent / "goldens" / "losses"
STEP = Path(__file__).parent / "goldens" / "lora_step"
VALUE, GRADIENT = 1e-6, 1e-5  # relative tolerances of the recorded case


@pytest.fixture
def io() -> dict[str, Tensor]:
    tensors = load_file(CASE / "io.safetensors")
    for name in ("src_masks", "pred_ious", "object_score_logits"):
        tensors[name].requires_grad_()
    return tensors


def variant(name: str) -> Rule:
    given = json.loads((CASE / "config.json").read_text())["variants"][name]
    weights = given["weights"]
    return Rule(
        mask=weights["loss_mask"],
        dice=weights["loss_dice"],
        iou=weights["loss_iou"],
        classes=weights["loss_class"],
        all_scores=given["supervise_all_iou"],
        l1_scores=given["iou_use_l1_loss"],
        object_scores=given["pred_obj_scores"],
        class_alpha=given.get("focal_alpha_obj_score", -1),
        class_gamma=given.get("focal_gamma_obj_score", 0.0),
    )


def decodings(io: dict[str, Tensor], name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    masks, scores, objects = io["src_masks"], io["pred_ious"], io["object_score_logits"]
    first = (masks, scores, objects)
    return (
        [first, (0.5 * masks[:, :1], scores[:, :1], 2 * objects)]
        if name == "two_steps"
        else [first]
    )


def close(actual: Tensor, expected: Tensor, relative: float) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * scale)


def test_golden_terms_of_every_mask(io: dict[str, Tensor]) -> None:
    masks, targets = io["src_masks"].detach(), io["targets"][:, None]
    count = len(targets)
    close(focal_loss(masks, targets).mean((-2, -1)) / count, io["focal"], VALUE)
    close(dice_loss(masks, targets) / count, io["dice"], VALUE)
    error = io["pred_ious"].detach() - mask_iou(masks > 0, targets > 0)
    close(error.abs() / count, io["iou_l1"], VALUE)
    close(error.square() / count, io["iou_mse"], VALUE)


@pytest.mark.parametrize("name", ["default", "best_only", "two_steps"])
def test_golden_losses_and_gradients(io: dict[str, Tensor], name: str) -> None:
    rule = variant(name)
    steps = [official_terms(*inputs, io["targets"], 3.0, rule) for inputs in decodings(io, name)]
    terms = Terms(*(torch.stack(part).sum() for part in zip(*steps, strict=True)))
    recorded = {"mask": terms.mask, "dice": terms.dice, "iou": terms.iou, "class": terms.classes}
    for part, value in recorded.items():
        close(value[None], io[f"{name}.loss_{part}"], VALUE)
    total = terms.total(rule)
    close(total[None], io[f"{name}.core_loss"], VALUE)
    total.backward()
    for tensor in ("src_masks", "pred_ious", "object_score_logits"):
        if f"{name}.grad.{tensor}" in io:
            close(io[tensor].grad, io[f"{name}.grad.{tensor}"], GRADIENT)
        else:
            assert io[tensor].grad is None or not io[tensor].grad.any()


def test_golden_losses_of_small_masks_scaled_up_to_the_targets() -> None:
    io = load_file(STEP / "io.safetensors")
    terms = official_terms(io["masks"], io["iou"], io["obj"], io["gt"], len(io["gt"]))
    for part, value in zip(("mask", "dice", "iou", "class"), terms, strict=True):
        close(value[None], io[f"loss.loss_{part}"], 1e-5)
    close(terms.total(Rule())[None], io["loss.core_loss"], 1e-5)


def test_differentiating_only_the_best_mask_equals_differentiating_all(
    io: dict[str, Tensor],
) -> None:
    masks, scores, objects = decodings(io, "default")[0]
    official_terms(masks, scores, objects, io["targets"], 3.0).total(Rule()).backward()
    fast = masks.grad
    assert fast is not None

    masks.grad = None
    targets = io["targets"][:, None]
    present = (io["targets"].flatten(1) > 0).any(1).float()
    cost = 20 * focal_loss(masks, targets).mean((-2, -1)) + dice_loss(masks, targets)
    ((cost.min(1).values * present).sum() / 3.0).backward()
    torch.testing.assert_close(fast, masks.grad)


def test_an_empty_target_trains_the_object_score_only(io: dict[str, Tensor]) -> None:
    masks, scores, objects = decodings(io, "default")[0]
    official_terms(masks, scores, objects, torch.zeros_like(io["targets"]), 3.0).total(
        Rule()
    ).backward()
    assert not masks.grad.any()
    assert not scores.grad.any()
    assert (objects.grad > 0).all()  # down, towards "there is nothing"


def test_half_precision_predictions_give_the_loss_in_float32(io: dict[str, Tensor]) -> None:
    half = [tensor.detach().bfloat16() for tensor in decodings(io, "default")[0]]
    terms = official_terms(*half, io["targets"], 3.0)
    exact = official_terms(*(tensor.float() for tensor in half), io["targets"], 3.0)
    assert all(value.dtype == torch.float32 for value in terms)
    assert terms == exact


def test_legacy_loss_is_bce_of_mask_0_and_a_twentieth_of_its_score_error(
    io: dict[str, Tensor],
) -> None:
    targets = io["targets"][:2]  # both have foreground
    masks, scores, objects = (tensor[:2] for tensor in decodings(io, "default")[0])
    total = legacy_terms(masks, scores, objects, targets, 2.0).total(losses.LEGACY)
    bce = F.binary_cross_entropy_with_logits(masks[:, 0], targets)
    found, truth = masks[:, 0] > 0, targets > 0
    iou = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2))
    torch.testing.assert_close(total, bce + 0.05 * (scores[:, 0] - iou).abs().mean())


# -- a batch's loss ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(golden_base: Path) -> Any:
    return load(golden_base)


def disc(x: float, y: float, radius: float) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    return ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).to(torch.uint8)


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two pictures; three objects with a click, one of them without a target, two with a box."""
    torch.manual_seed(0)
    return {
        "pixel_values": torch.randn(2, 3, 128, 128),
        "keys": ["a", "b"],
        "seed": [7, 8],
        "buckets": [
            {
                "image": torch.tensor([0, 0, 1]),
                "points": torch.tensor([[[30.0, 40.0]], [[90.0, 80.0]], [[64.0, 64.0]]]),
                "labels": torch.ones(3, 1, dtype=torch.long),
                "targets": torch.stack(
                    [disc(30, 40, 20), disc(90, 80, 12), torch.zeros(128, 128).byte()]
                ),
            },
            {
                "image": torch.tensor([0, 1]),
                "boxes": torch.tensor([[10.0, 20, 50, 60], [70.0, 70, 110, 100]]),
                "targets": torch.stack([disc(30, 40, 20), disc(90, 85, 15)]),
            },
        ],
    }


def config(**settings: Any) -> Config:
    return Config(image_size="128", **settings)


def split_bucket(bucket: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in bucket.items()}


def test_loss_does_not_depend_on_how_objects_are_bucketed(
    network: Any, batch: dict[str, Any]
) -> None:
    whole, parts = losses.loss(network, batch, config())
    clicks, boxes = batch["buckets"]
    batch["buckets"] = [split_bucket(clicks, slice(1)), boxes, split_bucket(clicks, slice(1, None))]
    again, again_parts = losses.loss(network, batch, config())
    torch.testing.assert_close(again, whole)
    assert again_parts == pytest.approx(parts, rel=1e-5)


def test_loss_from_cached_features_equals_loss_from_pixels(
    network: Any, batch: dict[str, Any]
) -> None:
    whole, _ = losses.loss(network, batch, config())
    with torch.no_grad():
        batch["features"] = encode(network, batch.pop("pixel_values"))._asdict()
    cached, _ = losses.loss(network, batch, config())
    torch.testing.assert_close(cached, whole, rtol=0, atol=0)


def test_bytes_of_any_size_give_the_loss_of_floats_bit_for_bit(
    network: Any, batch: dict[str, Any]
) -> None:
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (*size, 3), np.uint8) for size in ((96, 160), (300, 70))]
    batch["pixel_values"] = torch.stack([preprocess(rgb, (128, 128)) for rgb in pictures])
    settings = config(correction_clicks=1)
    expected, expected_parts = losses.loss(network, batch, settings)
    del batch["pixel_values"]
    batch["images"] = [torch.from_numpy(rgb) for rgb in pictures]
    found, parts = losses.loss(network, batch, settings)
    assert torch.equal(found, expected)
    assert parts == expected_parts


def test_parts_hold_the_terms_and_the_users_iou(network: Any, batch: dict[str, Any]) -> None:
    total, parts = losses.loss(network, batch, config())
    weighted = (
        20 * parts["loss_mask"] + parts["loss_dice"] + parts["loss_iou"] + parts["loss_class"]
    )
    assert total.item() == pytest.approx(weighted)
    assert 0 <= parts["iou"] <= parts["dice"] <= 1


def test_a_batch_without_targets_has_no_iou(network: Any, batch: dict[str, Any]) -> None:
    batch["buckets"] = [split_bucket(batch["buckets"][0], slice(2, None))]
    total, parts = losses.loss(network, batch, config())
    assert set(parts) == {"loss_mask", "loss_dice", "loss_iou", "loss_class"}
    assert total.item() == pytest.approx(parts["loss_class"])


def test_correction_clicks_add_one_loss_each_and_follow_the_batchs_seed(
    network: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    real = losses.decode

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(losses, "decode", watched)
    state = torch.get_rng_state()
    total, _ = losses.loss(network, batch, config(correction_clicks=2))
    again, _ = losses.loss(network, batch, config(correction_clicks=2))
    assert torch.equal(total, again)
    assert torch.equal(state, torch.get_rng_state())
    clicks, boxes = seen[:3], seen[3:6]
    assert [call["multimask"] for call in clicks] == [True, False, False]
    assert [call["points"].shape[1] for call in clicks] == [1, 2, 3]
    assert [call["multimask"] for call in boxes] == [False, False, False]
    assert [None if c["points"] is None else c["points"].shape[1] for c in boxes] == [None, 1, 2]
    assert boxes[2]["boxes"] is batch["buckets"][1]["boxes"]
    for call in (*clicks[1:], *boxes[1:]):
        assert not call["mask_input"].requires_grad
        assert call["mask_input"].abs().max() <= 32

    batch["seed"] = [8, 9]
    other, _ = losses.loss(network, batch, config(correction_clicks=2))
    assert not torch.equal(total, other)


def test_correction_clicks_do_not_depend_on_the_other_pictures(
    network: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clicks: list[Tensor] = []
    real = losses._append_clicks
    monkeypatch.setattr(
        losses, "_append_clicks", lambda *args: clicks.append(real(*args)[0]) or real(*args)
    )
    settings = config(correction_clicks=1)
    batch["buckets"] = batch["buckets"][:1]
    losses.loss(network, batch, settings)
    alone = {
        "pixel_values": batch["pixel_values"][1:],
        "seed": batch["seed"][1:],
        "buckets": [
            {**split_bucket(batch["buckets"][0], slice(2, None)), "image": torch.tensor([0])}
        ],
    }
    losses.loss(network, alone, settings)
    assert torch.equal(clicks[0][2:], clicks[1])


def test_correction_clicks_lie_where_mask_and_target_disagree(
    network: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any, Any]] = []
    real = losses.random_correction

    def watched(mask: Any, target: Any, rng: Any) -> Any:
        click = real(mask, target, rng)
        calls.append((mask, target, click))
        return click

    monkeypatch.setattr(losses, "random_correction", watched)
    losses.loss(network, batch, config(correction_clicks=1))
    assert len(calls) == 5
    for _, target, click in calls:
        x, y = (int(v) for v in click.xy)
        assert bool(target[y, x]) == bool(click.label)


def test_gradients_reach_encoder_and_decoder(network: Any, batch: dict[str, Any]) -> None:
    names = ("vision_encoder.backbone.blocks.0.attn.qkv.weight",
             "mask_decoder.transformer.layers.0.self_attn.q_proj.weight")  # fmt: skip
    weights = [network.get_parameter(name).requires_grad_() for name in names]
    try:
        total, _ = losses.loss(network, batch, config(correction_clicks=1))
        total.backward()
        assert all(weight.grad is not None and weight.grad.any() for weight in weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def test_legacy_loss_trains_on_the_first_of_three_masks(
    network: Any, batch: dict[str, Any]
) -> None:
    total, parts = losses.loss(network, batch, config(loss="legacy"))
    assert total.item() == pytest.approx(parts["loss_mask"] + 0.05 * parts["loss_iou"])
    assert parts["loss_dice"] == parts["loss_class"] == 0


def test_objects_are_counted_over_all_kinds_of_prompts() -> None:
    targets = torch.zeros(3, 8, 8)
    assert losses.object_count({"buckets": [{"targets": targets}, {"targets": targets[:1]}]}) == 4
