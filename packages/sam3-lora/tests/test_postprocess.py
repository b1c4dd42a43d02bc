"""Scores, boxes, masks and mask NMS against recorded values, and their borders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from lora_core.errors import NumericError
from lora_core.testing import Golden, load_golden
from sam3_lora import postprocess
from sam3_lora.outputs import Detections, Outputs
from sam3_lora.postprocess import (
    Found,
    coco_records,
    detections,
    encode,
    encode_masks,
    full_masks,
    keep_best,
    mask_iou,
    suppress,
)

CASE = Path(__file__).parent / "goldens" / "postprocess"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden(CASE)


def outputs_of(golden: Golden) -> Outputs:
    io = golden.io
    last = Detections(io["pred_logits"][..., 0], io["pred_boxes"], io["pred_masks"])
    return Outputs([last], [], [io["presence_logit_dec"][:, 0]])


@pytest.fixture(scope="module")
def found(golden: Golden) -> list[Found]:
    sizes = [(int(h), int(w)) for h, w in golden.io["original_sizes_hw"].tolist()]
    return detections(outputs_of(golden), sizes, golden.config["score_threshold"])


def outputs(logits: Tensor, presence: Tensor, masks: Tensor | None = None) -> Outputs:
    boxes = torch.full((*logits.shape, 4), 0.5)
    return Outputs([Detections(logits, boxes, masks)], [], [presence])


def objects(scores: list[float], size: tuple[int, int] = (8, 8)) -> Found:
    boxes = torch.arange(len(scores) * 4.0).reshape(-1, 4)
    return Found(torch.tensor(scores), boxes, size, torch.zeros(len(scores), 4, 4))


# -- recorded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [0, 1])
def test_golden_scores_and_boxes(golden: Golden, found: list[Found], query: int) -> None:
    expected = golden.io[f"out.{query}.scores"]
    assert torch.allclose(found[query].scores, expected, rtol=0, atol=1e-6)
    boxes = golden.io[f"out.{query}.boxes_xyxy"]
    assert torch.allclose(found[query].boxes, boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("query", [0, 1])
def test_golden_masks_at_original_size(golden: Golden, found: list[Found], query: int) -> None:
    masks, expected = full_masks(found[query]), golden.io[f"out.{query}.masks"].bool()
    assert masks.shape == expected.shape
    assert (masks != expected).sum() <= 3
    other = golden.io[f"transformers.{query}.masks"].bool()  # probabilities resized
    assert (other != expected).sum() > 3


@pytest.mark.parametrize("query", [0, 1])
def test_golden_mask_nms(golden: Golden, query: int) -> None:
    io = golden.io
    rles = encode(io[f"out.{query}.masks"].bool())
    iou = torch.from_numpy(mask_iou(rles)).float()
    assert torch.allclose(iou, io[f"out.{query}.mask_iou"], rtol=0, atol=1e-6)
    for threshold in golden.config["nms_iou_thresholds"]:
        kept = suppress(io[f"out.{query}.scores"], rles, threshold)
        assert kept.tolist() == io[f"out.{query}.nms_keep@{threshold}"].bool().tolist()


# -- scores and boxes ----------------------------------------------------------------------------


def test_presence_gates_every_object() -> None:
    logits = torch.zeros(2, 3)
    present, absent = detections(outputs(logits, torch.tensor([20.0, -20.0])), [(8, 8)] * 2, 0.3)
    assert len(present) == 3
    assert len(absent) == 0


def test_a_threshold_is_exceeded_and_none_keeps_everything() -> None:
    logits = torch.tensor([[0.0, 0.1, -200.0]])
    given = outputs(logits, torch.tensor([200.0]))
    assert len(detections(given, [(8, 8)], 0.5)[0]) == 1
    everything = detections(given, [(8, 8)], None)[0]
    assert everything.scores[[0, 2]].tolist() == [0.5, 0.0]


def test_a_limit_keeps_the_best_of_each_query_in_their_order() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, 6.0]])
    given = outputs(logits, torch.full((2,), 50.0))
    kept = detections(given, [(8, 8)] * 2, None, limit=2)
    assert [one.scores.logit().round().tolist() for one in kept] == [[2, 1], [5, 6]]


def test_boxes_are_scaled_by_their_own_image_and_not_cut() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]], [[0.0, 0.0, 0.5, 0.5]]])
    given = Outputs([Detections(torch.zeros(2, 1), boxes)], [], [torch.zeros(2)])
    wide, tall = detections(given, [(100, 200), (400, 40)], None)
    assert wide.boxes.tolist() == [pytest.approx([80, 30, 120, 70])]
    assert tall.boxes.tolist() == [pytest.approx([-10, -100, 10, 100])]


def test_the_number_of_sizes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        detections(outputs(torch.zeros(2, 1), torch.zeros(2)), [(8, 8)], None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["logits", "presence"])
def test_scores_that_are_no_numbers_are_an_error(value: float, where: str) -> None:
    tensors = {"logits": torch.zeros(1, 2), "presence": torch.zeros(1)}
    tensors[where].flatten()[0] = value
    with pytest.raises(NumericError, match="NaN or infinite"):
        detections(outputs(**tensors), [(8, 8)], 0.3)


def test_half_precision_gives_float32_scores_and_boxes() -> None:
    given = outputs(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16))
    given.one_to_one[-1].boxes = given.one_to_one[-1].boxes.bfloat16()
    kept = detections(given, [(1001, 2003)], None)[0]
    assert (kept.scores.dtype, kept.boxes.dtype) == (torch.float32, torch.float32)
    assert kept.scores.item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item() ** 2)
    assert kept.boxes[0, 2].item() == pytest.approx(0.75 * 2003)


def test_the_best_of_an_image_are_chosen_over_all_queries() -> None:
    first, second = keep_best([objects([0.1, 0.9, 0.5]), objects([0.5, 0.8])], 3)
    assert first.scores.tolist() == pytest.approx([0.9, 0.5])  # of equal scores the first
    assert second.scores.tolist() == pytest.approx([0.8])
    assert first.boxes.tolist() == objects([0, 0, 0]).boxes[1:].tolist()


def test_scores_that_another_metric_needs_stay_beyond_the_limit() -> None:
    first, second = keep_best([objects([0.1, 0.9, 0.5]), objects([0.5, 0.8])], 1, above=0.5)
    assert len(first) == 2
    assert len(second) == 2
    assert keep_best([], 1) == []


# -- masks ---------------------------------------------------------------------------------------


def with_masks(count: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Found:
    logits = torch.randn(count, 12, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Found(torch.linspace(0.1, 0.9, count), torch.rand(count, 4), size, logits)


def test_no_object_gives_masks_of_the_original_size() -> None:
    empty = with_masks(3, (30, 50)).select(torch.zeros(3, dtype=torch.bool))
    assert full_masks(empty).shape == (0, 30, 50)
    assert encode_masks(empty) == []
    assert coco_records(empty, 1, 1) == []


@pytest.mark.parametrize("values", [1, 30 * 50, 2 * 30 * 50])
def test_chunks_by_memory_change_no_pixel(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    five = with_masks(5, (30, 50))
    masks, rles = full_masks(five), encode_masks(five)
    monkeypatch.setattr(postprocess, "UPSCALED_VALUES", values)
    assert torch.equal(full_masks(five), masks)
    assert encode_masks(five) == rles


def test_half_precision_logits_are_resized_in_float32() -> None:
    half = with_masks(2, (211, 307), torch.bfloat16)
    assert half.mask_logits is not None
    exact = F.interpolate(half.mask_logits[:, None].float(), (211, 307), mode="bilinear")[:, 0] > 0
    assert torch.equal(full_masks(half), exact)


def test_run_lengths_decode_to_the_same_masks_and_fit_json() -> None:
    three = with_masks(3, (31, 50))
    rles = json.loads(json.dumps(encode_masks(three)))
    decoded = torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in rles]))
    assert torch.equal(decoded.bool(), full_masks(three))


def test_masks_that_were_not_computed_are_an_error() -> None:
    without = Found(torch.ones(1), torch.ones(1, 4), (8, 8))
    for function in (full_masks, encode_masks):
        with pytest.raises(ValueError, match="no masks were computed"):
            function(without)


# -- mask NMS ------------------------------------------------------------------------------------


def strips(*ends: int) -> list[dict[str, object]]:
    """Masks of one row of 100 pixels, from 0 to each end."""
    return encode(torch.arange(100)[None, None] < torch.tensor(ends)[:, None, None])


def test_nms_keeps_the_best_of_masks_that_overlap_too_much() -> None:
    kept = suppress(torch.tensor([0.5, 0.9, 0.7, 0.6]), strips(100, 90, 60, 89), 0.7)
    # 90 stays; 60/90 stays; 89/90 goes; 90/100 goes
    assert kept.tolist() == [False, True, True, False]


def test_nms_compares_only_with_masks_that_stay() -> None:
    kept = suppress(torch.tensor([0.9, 0.8, 0.7]), strips(100, 80, 64), 0.7)
    assert kept.tolist() == [True, False, True]  # 64/80 is above, but the 80 is gone


def test_nms_at_exactly_the_threshold_keeps_both() -> None:
    assert suppress(torch.tensor([0.9, 0.8]), strips(100, 50), 0.5).all()


def test_nms_of_empty_masks_and_of_none() -> None:
    assert suppress(torch.tensor([0.9, 0.8]), strips(0, 0), 0.5).all()
    assert suppress(torch.zeros(0), [], 0.5).tolist() == []
    assert mask_iou([]).shape == (0, 0)


# -- records -------------------------------------------------------------------------------------


def test_records_are_coco_results() -> None:
    two = with_masks(2, (30, 50))
    two.boxes = torch.tensor([[1.5, 2, 11.5, 22], [0, 0, 50, 30]])
    records = json.loads(json.dumps(coco_records(two, image_id=7, category_id=3)))
    assert [set(one) for one in records] == [
        {"image_id", "category_id", "score", "bbox", "segmentation"}
    ] * 2
    assert [(one["image_id"], one["category_id"]) for one in records] == [(7, 3)] * 2
    assert [one["bbox"] for one in records] == [[1.5, 2, 10, 20], [0, 0, 50, 30]]
    assert [one["score"] for one in records] == pytest.approx([0.1, 0.9])
    assert [one["segmentation"] for one in records] == encode_masks(two)


def test_records_without_masks_have_boxes_only_and_given_masks_are_used() -> None:
    without = Found(torch.tensor([0.5]), torch.ones(1, 4), (1, 100))
    assert "segmentation" not in coco_records(without, 1, 1)[0]
    given = strips(40)
    assert coco_records(without, 1, 1, given)[0]["segmentation"] == given[0]
