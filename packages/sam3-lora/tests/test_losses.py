"""The training loss: recorded official values and gradients, and its promises at the borders."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import ConfigError, DataError
from lora_core.memory import simulate
from lora_core.testing import load_golden
from sam3_lora import losses
from sam3_lora.losses import LossSettings, loss, stacked, terms
from sam3_lora.mask_losses import at_pixels, compare, sample, uncertain_points
from sam3_lora.matching import MatchSettings, match
from sam3_lora.normalisers import Normalisers, counted, masked_queries
from sam3_lora.outputs import Detections, Outputs, Targets

GOLDENS = Path(__file__).parent / "goldens"
SUFFIXES = ("_aux_0", "_aux_1", "", "_aux_0_o2m", "_aux_1_o2m", "_o2m")  # layers as stacked
VALUE, GRADIENT = 1e-5, 1e-5  # relative tolerances of the recorded cases
BOXES = ("loss_bbox", "loss_giou", "loss_ce", "presence_loss")
MASKS = ("loss_mask", "loss_dice", "loss_semantic_seg", "loss_semantic_dice")


# -- recorded --------------------------------------------------------------------------------------


def golden_outputs(io: dict[str, Tensor], layers: tuple[str, ...], presence: str) -> Outputs:
    def half(suffix: str) -> list[Detections]:
        return [
            Detections(
                io[f"{layer}pred_logits{suffix}"].flatten(1),
                io[f"{layer}pred_boxes{suffix}"],
                io.get(f"{layer}pred_masks{suffix}"),
            )
            for layer in layers
        ]

    return Outputs(
        one_to_one=half(""),
        one_to_many=half("_o2m"),
        presence=[io[f"{layer}{presence}"].flatten() for layer in layers],
        semantic=io[f"{layers[-1]}semantic_seg"],
    )


def golden_targets(io: dict[str, Tensor]) -> Targets:
    return Targets(
        io["target.boxes"], io["target.num_boxes"], io["target.masks"],
        io.get("target.is_valid_mask"),
    )  # fmt: skip


def golden_settings(o2m_threshold: float = 0.4) -> LossSettings:
    """What the recorded config.json says, name for name."""
    given = load_golden(GOLDENS / "losses").config
    weights, one, many = given["loss_weights"], given["o2o"], given["o2m"]
    return LossSettings(
        bbox=weights["loss_bbox"],
        giou=weights["loss_giou"],
        ce=weights["loss_ce"],
        presence=weights["presence_loss"],
        mask=weights["loss_mask"],
        dice=weights["loss_dice"],
        semantic=weights["loss_semantic_seg"],
        semantic_dice=weights["loss_semantic_dice"],
        o2m_weight=many["weight"],
        positive_weight=given["iabce"]["pos_weight"],
        pad_queries=given["pad_n_queries"],
        scale_by_batch=given["scale_by_find_batch_size"],
        matching=MatchSettings(
            one["cost_class"], one["cost_bbox"], one["cost_giou"],
            many["alpha"], o2m_threshold, many["topk"],
        ),
    )  # fmt: skip


def all_terms(outputs: Outputs, targets: Targets, settings: LossSettings) -> dict[str, Tensor]:
    layers = stacked(outputs, settings)
    found = match(
        layers.logits, layers.boxes, targets, settings.matching, one_to_many_last=layers.has_second
    )
    sizes = Normalisers(len(found.counts), float(found.counts.sum()))
    return terms(outputs, targets, settings, layers, found, sizes)


def assert_terms(io: dict[str, Tensor], prefix: str, values: dict[str, Tensor]) -> None:
    """Compare every term of every layer; a term that is not recorded must be 0."""
    compared = 0
    for name, of_layers in values.items():
        for suffix, value in zip(SUFFIXES, of_layers, strict=True):
            key = f"{prefix}.{name}{suffix}"
            torch.testing.assert_close(
                value.detach(), io.get(key, torch.tensor(0.0)), rtol=VALUE, atol=0.0
            )
            compared += key in io
    recorded = [key for key in io if key.startswith(f"{prefix}.") and is_term(key)]
    assert compared == len(recorded)


def is_term(key: str) -> bool:
    return key.split(".")[1].startswith((*BOXES, *MASKS))


def test_the_defaults_are_the_recorded_settings() -> None:
    assert golden_settings() == LossSettings()


def test_golden_losses_and_gradients() -> None:
    io = load_golden(GOLDENS / "losses").io
    leaves = {name: value for name, value in io.items() if name.startswith("out.")}
    for value in leaves.values():
        value.requires_grad_()
    outputs = golden_outputs(io, ("out.aux0.", "out.aux1.", "out."), "presence_logit_dec")
    assert_terms(io, "loss", all_terms(outputs, golden_targets(io), LossSettings()))
    value, parts = loss(outputs, golden_targets(io), LossSettings())
    torch.testing.assert_close(value, io["loss.core_loss"], rtol=VALUE, atol=0.0)
    assert parts["presence_accuracy"] == io["loss.presence_dec_acc"]
    value.backward()
    for name, leaf in leaves.items():
        expected = io[f"grad.{name}"]
        torch.testing.assert_close(
            leaf.grad, expected, rtol=0.0, atol=GRADIENT * float(expected.abs().max())
        )


def test_golden_losses_of_boxes_only() -> None:
    io = load_golden(GOLDENS / "losses").io
    outputs = golden_outputs(io, ("out.aux0.", "out.aux1.", "out."), "presence_logit_dec")
    outputs.semantic = outputs.one_to_one[-1].masks = None
    targets = replace(golden_targets(io), masks=None, has_mask=None)
    settings = LossSettings(masks=False)
    assert_terms(io, "loss_boxonly", all_terms(outputs, targets, settings))
    value, parts = loss(outputs, targets, settings)
    torch.testing.assert_close(value, io["loss_boxonly.core_loss"], rtol=VALUE, atol=0.0)
    assert not set(parts) & set(MASKS)


def test_golden_train_step_losses() -> None:
    io = load_golden(GOLDENS / "train_step").io
    outputs = golden_outputs(io, ("aux0.", "aux1.", "final."), "presence_logit")
    settings = golden_settings(o2m_threshold=0.2)
    assert_terms(io, "loss", all_terms(outputs, golden_targets(io), settings))
    value, _ = loss(outputs, golden_targets(io), settings)
    torch.testing.assert_close(value, io["loss.core_loss"], rtol=VALUE, atol=0.0)


# -- made up ---------------------------------------------------------------------------------------


def random_case(
    counts: list[int], queries: int = 12, side: int = 24, seed: int = 0
) -> tuple[Outputs, Targets, list[Tensor]]:
    """Two layers, both halves; outputs, targets, and the leaves of the outputs."""
    g = torch.Generator().manual_seed(seed)
    batch, total = len(counts), sum(counts)
    leaves: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        leaves.append(value.requires_grad_())
        return value

    def boxes(*shape: int) -> Tensor:
        size = 0.05 + 0.4 * torch.rand(*shape, 2, generator=g)
        return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, generator=g), size], -1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def half() -> list[Detections]:
        layers = [
            Detections(leaf(normal(batch, queries)), leaf(boxes(batch, queries))) for _ in range(2)
        ]
        layers[-1].masks = leaf(normal(batch, queries, side // 2, side // 2))
        return layers

    outputs = Outputs(
        half(), half(), [leaf(normal(batch)) for _ in range(2)],
        leaf(normal(batch, 1, side // 2, side // 2)),
    )  # fmt: skip
    masks = torch.rand(total, side, side, generator=g) < 0.4
    return outputs, Targets(boxes(total), torch.tensor(counts, dtype=torch.int64), masks), leaves


def easy(threshold: float = 0.1) -> LossSettings:
    """Random boxes hardly overlap: let many of them answer."""
    return LossSettings(matching=MatchSettings(o2m_threshold=threshold))


def assert_finite(leaves: list[Tensor]) -> None:
    for value in leaves:
        assert value.grad is None or value.grad.isfinite().all()


def test_the_parts_add_up_to_the_loss() -> None:
    outputs, targets, _ = random_case([2, 0, 3])
    value, parts = loss(outputs, targets, easy())
    weights = LossSettings().weights()
    bracket = sum(weights[name] * parts[name] for name in (*BOXES, *MASKS))
    bracket = bracket + parts["loss_aux"] + parts["loss_o2m"]
    torch.testing.assert_close(value.detach(), math.sqrt(3) * bracket)
    assert set(parts) == {*BOXES, *MASKS, "loss_aux", "loss_o2m", "presence_accuracy"}
    assert not any(part.requires_grad for part in parts.values())


def test_without_a_weight_the_one_to_many_half_is_left_out() -> None:
    outputs, targets, leaves = random_case([2, 1])
    value, parts = loss(outputs, targets, LossSettings(o2m_weight=0))
    alone, _ = loss(replace(outputs, one_to_many=[]), targets, LossSettings())
    assert value == alone
    assert "loss_o2m" not in parts
    value.backward()
    assert all(leaf.grad is None for leaf in leaves[5:10])  # of the one-to-many half


def test_outputs_of_evaluation_give_the_last_layers_terms() -> None:
    outputs, targets, _ = random_case([2, 0, 1])
    last = Outputs(outputs.one_to_one[-1:], [], outputs.presence[-1:], outputs.semantic)
    with torch.no_grad():
        _, parts = loss(outputs, targets)
        _, alone = loss(last, targets)
    for name in (*BOXES, *MASKS, "presence_accuracy"):
        assert parts[name] == alone[name]
    assert alone["loss_aux"] == 0


def test_a_negative_phrase_trains_its_presence_only() -> None:
    outputs, targets, _ = random_case([2, 0])
    loss(outputs, targets, easy())[0].backward()
    for layer in (*outputs.one_to_one, *outputs.one_to_many):
        assert layer.logits.grad is not None
        assert not layer.logits.grad[1].any()
        assert layer.logits.grad[0].all()
    for presence in outputs.presence:
        assert presence.grad is not None
        assert presence.grad.all()


def test_without_the_batch_factor_the_loss_is_smaller_by_its_root() -> None:
    outputs, targets, _ = random_case([1, 1, 2])
    value, _ = loss(outputs, targets)
    plain, _ = loss(outputs, targets, LossSettings(scale_by_batch=False))
    torch.testing.assert_close(value, math.sqrt(3) * plain)


def test_as_many_queries_as_are_padded_to_are_averaged_over() -> None:
    outputs, targets, _ = random_case([2, 1], queries=12)
    at_200 = loss(outputs, targets)[1]["loss_ce"]
    at_12 = loss(outputs, targets, LossSettings(pad_queries=5))[1]["loss_ce"]
    torch.testing.assert_close(at_200 * 200, at_12 * 12)


def part_of(outputs: Outputs, targets: Targets, query: int) -> tuple[Outputs, Targets]:
    """One query of a batch as a batch of its own."""

    def alone(layer: Detections) -> Detections:
        one = slice(query, query + 1)
        masks = None if layer.masks is None else layer.masks[one]
        return Detections(layer.logits[one], layer.boxes[one], masks)

    ends = targets.counts.cumsum(0).tolist()
    own = slice(ends[query] - int(targets.counts[query]), ends[query])
    assert outputs.semantic is not None
    assert targets.masks is not None
    return Outputs(
        [alone(layer) for layer in outputs.one_to_one],
        [alone(layer) for layer in outputs.one_to_many],
        [presence[query : query + 1] for presence in outputs.presence],
        outputs.semantic[query : query + 1],
    ), Targets(
        targets.boxes[own], targets.counts[query : query + 1], targets.masks[own],
        None if targets.has_mask is None else targets.has_mask[own],
    )  # fmt: skip


@pytest.mark.fault("R19")
def test_the_mean_over_batches_that_know_the_whole_update_is_its_loss() -> None:
    """Values, parts and gradients; with unequal queries, one of them without any object."""
    outputs, targets, leaves = random_case([3, 0, 1])
    whole, parts = loss(outputs, targets)
    expected = torch.autograd.grad(whole, leaves)
    sums = counted({"targets": vars(targets)}, masks=True)
    assert sums == {"queries": 3, "objects": 4, "masked": 2}
    sizes = Normalisers(**sums, share=4.0)
    each = [loss(*part_of(outputs, targets, query), sizes=sizes) for query in range(3)]
    empty = Normalisers(**sums, share=0.0)  # the batch of a process that no picture was left for
    each.append(loss(*part_of(outputs, targets, 0), sizes=empty))
    assert each[-1][0] == 0
    mean = torch.stack([value for value, _ in each]).mean()
    torch.testing.assert_close(mean, whole)
    for name, value in parts.items():
        torch.testing.assert_close(torch.stack([one[name] for _, one in each]).mean(), value)
    for grad, wanted in zip(torch.autograd.grad(mean, leaves), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_queries_whose_masks_are_unknown_or_empty_are_not_counted_as_masked() -> None:
    masks = torch.zeros(5, 4, 4, dtype=torch.uint8)
    masks[[0, 1, 3], 1] = 1
    known = torch.tensor([1, 1, 1, 0, 1], dtype=torch.uint8)  # as batches have it
    counts = torch.tensor([2, 0, 1, 1, 1])
    assert masked_queries(counts, masks, known) == 1
    assert masked_queries(counts, masks, None) == 2
    assert masked_queries(torch.tensor([0, 0]), None, None) == 0


def test_a_query_with_two_targets_is_labelled_by_the_later_one() -> None:
    outputs, targets, _ = random_case([2], queries=4)
    targets.boxes[:] = torch.tensor([[0.4, 0.4, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4]])
    with torch.no_grad():
        outputs.one_to_many[-1].boxes[:] = targets.boxes[0]  # IoU 1 with the first target
    layers = stacked(outputs, easy())
    found = match(layers.logits, layers.boxes, targets, easy().matching, one_to_many_last=True)
    assert found.sizes[-1] == 8
    labels = losses.soft_labels(layers, losses.paired(layers, targets, found), found)
    iou = 0.3 * 0.3 / (2 * 0.4 * 0.4 - 0.3 * 0.3)  # with the second
    torch.testing.assert_close(labels[-1, 0], layers.logits[-1, 0].sigmoid() ** 0.25 * iou**0.75)


# -- borders ---------------------------------------------------------------------------------------


@pytest.mark.fault("R43")
@pytest.mark.parametrize("masks", [True, False])
def test_only_negative_phrases_give_a_presence_loss_and_zero_gradients_elsewhere(
    masks: bool,
) -> None:
    outputs, targets, leaves = random_case([0, 0])
    targets.masks = targets.masks if masks else None  # none are needed for no target
    value, parts = loss(outputs, targets)
    presence = 20 * (parts["presence_loss"]) + parts["loss_aux"]
    torch.testing.assert_close(value.detach(), math.sqrt(2) * presence)
    assert all(parts[name] == 0 for name in (*MASKS, "loss_bbox", "loss_giou", "loss_ce"))
    value.backward()
    for leaf in leaves:
        assert leaf.grad is not None  # DDP waits for every head
        assert leaf.grad.any() == (leaf.dim() == 1)


def test_targets_whose_masks_are_not_known_train_their_boxes_only() -> None:
    outputs, targets, _ = random_case([2, 1])
    targets.has_mask = torch.zeros(3, dtype=torch.bool)
    value, parts = loss(outputs, targets, easy())
    assert all(parts[name] == 0 for name in MASKS)
    boxes, _ = loss(outputs, targets, replace(easy(), masks=False))
    torch.testing.assert_close(value, boxes)


def test_what_a_mask_of_unknown_content_holds_does_not_matter() -> None:
    outputs, targets, _ = random_case([2, 1])
    targets.has_mask = torch.tensor([True, False, True])
    before, _ = loss(outputs, targets, easy())
    targets.masks[1] = ~targets.masks[1]
    assert loss(outputs, targets, easy())[0] == before


def test_masks_may_be_bool_or_bytes() -> None:
    outputs, targets, _ = random_case([2, 0, 2])
    before, _ = loss(outputs, targets)
    for value in (1, 255):
        as_bytes = replace(targets, masks=targets.masks.to(torch.uint8) * value)
        assert loss(outputs, as_bytes)[0] == before


def test_empty_masks_have_no_part_in_the_semantic_mean() -> None:
    outputs, targets, _ = random_case([1, 1])
    targets.masks[1] = False
    both, alone = loss(outputs, targets)[1], replace(targets, has_mask=torch.tensor([True, False]))
    for name in ("loss_semantic_seg", "loss_semantic_dice"):
        torch.testing.assert_close(both[name], loss(outputs, alone)[1][name])


def test_more_targets_than_queries_and_fewer_queries_than_answers_are_no_trouble() -> None:
    outputs, targets, leaves = random_case([7, 0, 2], queries=3)
    value, _ = loss(outputs, targets, easy(0.0))
    assert value.isfinite()
    value.backward()
    assert_finite(leaves)


def test_boxes_without_area_give_finite_losses_and_gradients() -> None:
    outputs, targets, leaves = random_case([2, 1])
    with torch.no_grad():
        targets.boxes[0, 2] = targets.boxes[2, 3] = 0
        for layer in (*outputs.one_to_one, *outputs.one_to_many):
            layer.boxes[:, :6, 2:] = 0
    value, _ = loss(outputs, targets, easy(0.0))
    assert value.isfinite()
    value.backward()
    assert_finite(leaves)


def test_a_phrase_whose_targets_have_no_area_counts_as_absent() -> None:
    outputs, targets, _ = random_case([1, 1])
    targets.boxes[0, 2] = 0
    loss(outputs, targets, easy())[0].backward()
    for layer in outputs.one_to_one:
        assert layer.logits.grad is not None
        assert not layer.logits.grad[0].any()
        assert layer.logits.grad[1].all()


@pytest.mark.fault("R42")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("counts", [[2, 1], [0, 0]])
@pytest.mark.parametrize("place", ["logits", "boxes", "presence"])
def test_the_loss_is_nan_wherever_a_prediction_is_not_finite(
    bad: float, counts: list[int], place: str
) -> None:
    outputs, targets, _ = random_case(counts)
    with torch.no_grad():
        if place == "presence":
            outputs.presence[0][1] = bad
        else:
            getattr(outputs.one_to_many[0], place)[1, 3] = bad  # matched or not
    value, parts = loss(outputs, targets)
    assert not value.isfinite()
    assert parts["presence_accuracy"].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_compared_in_float32(dtype: torch.dtype) -> None:
    outputs, targets, leaves = random_case([2, 0, 3])

    def rounded(to: torch.dtype) -> Outputs:
        def half(layers: list[Detections]) -> list[Detections]:
            return [
                Detections(
                    d.logits.to(dtype).to(to), d.boxes.to(dtype).to(to),
                    None if d.masks is None else d.masks.to(dtype).to(to),
                )
                for d in layers
            ]  # fmt: skip

        return Outputs(
            half(outputs.one_to_one), half(outputs.one_to_many),
            [p.to(dtype).to(to) for p in outputs.presence], outputs.semantic.to(dtype).to(to),
        )  # fmt: skip

    expected, _ = loss(rounded(torch.float32), targets, easy())
    with torch.autocast("cpu", torch.bfloat16):
        value, parts = loss(rounded(dtype), targets, easy())
    assert value.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert value == expected
    value.backward()
    assert_finite(leaves)


# -- refusals --------------------------------------------------------------------------------------


def test_targets_in_pixels_are_refused() -> None:
    outputs, targets, _ = random_case([1, 1])
    targets.boxes *= 1008
    with pytest.raises(DataError, match=r"2 of 2 target boxes .* look like pixels"):
        loss(outputs, targets)


def test_masks_that_are_missing_are_named() -> None:
    outputs, targets, _ = random_case([1, 1])
    with pytest.raises(ValueError, match="the 2 targets have none"):
        loss(outputs, replace(targets, masks=None))
    with pytest.raises(ValueError, match="hold no semantic map"):
        loss(replace(outputs, semantic=None), targets)
    outputs.one_to_many[-1].masks = None
    with pytest.raises(ValueError, match="hold no masks"):
        loss(outputs, targets)


def test_settings_that_cannot_work_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        LossSettings(bbox=-1, o2m_weight=float("nan"), mask_pixels=0)
    message = str(caught.value)
    assert all(name in message for name in ("bbox", "o2m_weight", "mask_pixels"))


# -- masks: some pairs at a time, and points -------------------------------------------------------


def pairs(count: int, low: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(count)
    logits = (4 * torch.randn(count, low, low, generator=g)).requires_grad_()
    masks = (torch.rand(5, size, size, generator=g) < 0.3).to(torch.uint8)
    return logits, masks, torch.randint(0, 5, (count,), generator=g)


@pytest.mark.parametrize("lot", [1, 3, 100])
def test_a_few_masks_at_a_time_give_the_values_and_gradients_of_all_at_once(lot: int) -> None:
    logits, masks, target = pairs(7, 12, 30)
    plain = at_pixels(logits, masks, target, 0.25)
    (expected,) = torch.autograd.grad((plain[0] + 3 * plain[1]).sum(), logits)
    values = compare(logits, masks, target, alpha=0.25, pixels=lot * 30 * 30)
    (gradient,) = torch.autograd.grad((values[0] + 3 * values[1]).sum(), logits)
    torch.testing.assert_close(values[0], plain[0])
    torch.testing.assert_close(values[1], plain[1])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


class MaskLogits(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(count, 288, 288))


def test_sixty_full_size_masks_take_a_twentieth_of_the_plain_forms_memory() -> None:
    batch = (torch.zeros(10, 1008, 1008, dtype=torch.uint8), torch.arange(60) % 10)

    def plain(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        focal, dice = at_pixels(1 * net.logits, *batch, alpha=0.25)
        return (focal + dice).sum(), {}

    def few(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        focal, dice = compare(1 * net.logits, *batch, alpha=0.25)
        return (focal + dice).sum(), {}

    steps = []
    for form in (plain, few):
        with torch.device("meta"):
            network = MaskLogits(60)
        steps.append(simulate(network, form, batch))
    assert steps[1].saved < steps[0].saved / 20
    assert steps[1].peak < steps[0].peak / 5


def test_points_estimate_what_all_pixels_give_where_they_are_drawn_evenly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sam3_lora.mask_losses.IMPORTANT", 0.0)
    coarse = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(coarse, size=(160, 160), mode="bilinear")[:, 0]
    masks = logits.roll(20, dims=1) > 0
    target = torch.arange(4)
    torch.manual_seed(0)
    at_points = compare(logits, masks, target, alpha=0.25, points=20_000)
    at_all = compare(logits, masks, target, alpha=0.25)
    for estimate, exact in zip(at_points, at_all, strict=True):
        torch.testing.assert_close(estimate, exact, rtol=0.03, atol=0.0)


def test_three_quarters_of_the_points_lie_where_the_logits_are_uncertain() -> None:
    logits = torch.full((2, 32, 32), 9.0)
    logits[:, :, 8:20] = 0.1
    torch.manual_seed(0)
    points = uncertain_points(logits, 400)
    assert points.shape == (2, 400, 2)
    values = sample(logits, points)
    assert (values[:, :300] < 8.9).all()  # 3/8 of 1200 candidates suffice
    assert (values[:, 300:] > 8.9).any()


def test_samples_are_those_of_scaling_up() -> None:
    values = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    full = F.interpolate(values[:, None], size=(20, 28), mode="bilinear", align_corners=False)
    y, x = torch.meshgrid(
        (torch.arange(20) + 0.5) / 20, (torch.arange(28) + 0.5) / 28, indexing="ij"
    )
    xy = torch.stack([x.flatten(), y.flatten()], -1).expand(2, -1, -1)
    torch.testing.assert_close(sample(values, xy), full.flatten(1))


def test_points_train_all_the_masks_and_are_not_used_in_evaluation() -> None:
    outputs, targets, _ = random_case([2, 0, 1])
    sampled = replace(easy(), mask_points=50)
    with torch.no_grad():
        assert loss(outputs, targets, sampled)[0] == loss(outputs, targets, easy())[0]
    value, _ = loss(outputs, targets, sampled)
    assert value != loss(outputs, targets, easy())[0]
    value.backward()
    masks = outputs.one_to_one[-1].masks
    assert masks is not None
    assert masks.grad is not None
    assert masks.grad.flatten(2).any(2).sum(1).tolist() == [2, 0, 1]


def test_the_loss_runs_without_values_to_estimate_memory() -> None:
    outputs, targets, _ = random_case([2, 0, 1])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.masks = nn.Parameter(torch.empty(3, 12, 12, 12))

    def run(net: nn.Module, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        last = replace(outputs.one_to_one[-1], masks=net.masks * 1)
        last.logits, last.boxes = net.masks[..., 0, 0], net.masks[..., 0, :4]
        return loss(Outputs([last], [last], outputs.presence[-1:], outputs.semantic), targets)

    with torch.device("meta"):
        network = Net()
    assert simulate(network, run, targets).peak > 0
