"""mAP and cgF1 against recorded values and whole pycocotools runs, and what they promise."""

import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_lora.average_precision import COCO_FIGURES, MeanAveragePrecision, best_of_image
from sam3_lora.metrics import (
    CgF1,
    Kind,
    Unit,
    cgf1_notes,
    false_positive_rate,
    overlaps,
    true_positives,
)

CASE = Path(__file__).parent / "goldens" / "metrics"
TOLERANCE = 1e-6
KINDS: tuple[Kind, ...] = ("bbox", "segm")


def read(name: str) -> Any:
    return json.loads((CASE / name).read_text("utf-8"))


EXPECTED = read("expected.json")


def of(records: list[dict[str, Any]], **keys: int) -> list[dict[str, Any]]:
    return [one for one in records if all(one[key] == value for key, value in keys.items())]


def coco_images(truth: Any, found: list[dict[str, Any]]) -> dict[int, list[Unit]]:
    """All (image, category) pairs of a COCO data set and its results."""
    return {
        image["id"]: [
            Unit(
                category["id"],
                of(truth["annotations"], image_id=image["id"], category_id=category["id"]),
                of(found, image_id=image["id"], category_id=category["id"]),
            )
            for category in truth["categories"]
        ]
        for image in truth["images"]
    }


def fed(measure: MeanAveragePrecision, images: dict[int, list[Unit]]) -> MeanAveragePrecision:
    for image, units in images.items():
        measure.add(image, units)
    return measure


# -- COCO mAP ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("split", "prefix"), [(False, ""), (True, "positive_split_")])
def test_golden_coco_figures(kind: Kind, split: bool, prefix: str) -> None:
    images = coco_images(read("coco_gt.json"), read("coco_predictions.json"))
    figures = fed(MeanAveragePrecision(kind, positive_split=split), images).summary()
    recorded = {name: EXPECTED[f"coco_eval_{prefix}{kind}_{name}"] for name in COCO_FIGURES}
    assert figures == pytest.approx(recorded, abs=TOLERANCE)


def box_mask(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    canvas = np.zeros((200, 300), np.uint8, order="F")
    canvas[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(canvas)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def at(x: int, y: int, width: int, height: int, **more: Any) -> dict[str, Any]:
    mask = box_mask(x, y, width, height)
    return {"bbox": [x, y, width, height], "segmentation": mask, **more}


def random_set(seed: int, images: int = 5) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of every COCO size, crowds among them, and detections with many equal scores."""
    draw = random.Random(seed)
    truth: dict[str, Any] = {
        "images": [{"id": 3 + 2 * k, "height": 200, "width": 300} for k in range(images)],
        "categories": [{"id": 4, "name": "a"}, {"id": 9, "name": "b"}],
        "annotations": [],
    }
    found = []
    for image in truth["images"]:
        for category in (4, 9):
            ids = {"image_id": image["id"], "category_id": category}
            for _ in range(draw.randrange(4)):
                side = draw.choice([12, 60, 110])
                x, y = draw.randrange(150), draw.randrange(80)
                number = len(truth["annotations"]) + 1
                crowd = int(draw.random() < 0.2)
                area = side * (side + 3)
                truth["annotations"].append(
                    at(x, y, side, side + 3, area=area, iscrowd=crowd, id=number, **ids)
                )
                for _ in range(draw.randrange(1, 4)):
                    dx, dy = draw.randrange(9), draw.randrange(9)
                    score = draw.randrange(1, 11) / 10
                    found.append(at(x + dx, y + dy, side, side, score=score, **ids))
            if draw.random() < 0.5:
                found.append(at(5, 5, 40, 20, score=draw.randrange(1, 11) / 10, **ids))
    return truth, found


def whole(truth: dict[str, Any], found: list[dict[str, Any]], kind: Kind) -> dict[str, float]:
    """The usual run of pycocotools over everything at once."""
    dropped = "segmentation" if kind == "bbox" else "bbox"
    coco = COCO()
    coco.dataset = json.loads(json.dumps(truth))
    coco.createIndex()
    results = [{key: one[key] for key in one if key != dropped} for one in found]
    evaluator = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return dict(zip(COCO_FIGURES, evaluator.stats.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_image_by_image_equals_pycocotools_over_everything(kind: Kind, seed: int) -> None:
    truth, found = random_set(seed)
    images = coco_images(truth, found)
    expected = whole(truth, found, kind)
    assert 0 < expected["AP"] < 1
    assert fed(MeanAveragePrecision(kind), images).summary() == expected
    backwards = dict(reversed(images.items()))
    assert fed(MeanAveragePrecision(kind), backwards).summary() == expected


def test_the_mean_over_categories_is_the_whole_ap() -> None:
    truth, found = random_set(1)
    measure = fed(MeanAveragePrecision("bbox"), coco_images(truth, found))
    each = measure.per_category()
    assert set(each) == {4, 9}
    assert sum(each.values()) / 2 == pytest.approx(measure.summary()["AP"])


def test_a_truth_with_id_0_is_matched_as_any_other() -> None:
    unit = Unit(1, [at(10, 10, 50, 50, id=0)], [at(10, 10, 50, 50, score=0.9)])
    measure = MeanAveragePrecision("bbox")
    measure.add(0, [unit])
    assert measure.summary()["AP"] == pytest.approx(1.0)


def test_100_best_of_an_image_are_chosen_over_all_categories() -> None:
    many = Unit(1, [], [at(0, 0, 5, 5, score=0.5 + k / 1000) for k in range(120)])
    good = [at(10, 10, 50, 50, score=score) for score in (0.9, 0.1)]
    few = Unit(2, [at(10, 10, 50, 50)], good)
    kept = best_of_image([many, few])
    assert [len(unit.found) for unit in kept] == [99, 1]
    assert kept[0].found == many.found[21:]
    assert kept[1].found == good[:1]


def test_what_is_not_among_the_100_best_of_its_image_does_not_count() -> None:
    many = Unit(1, [], [at(0, 0, 5, 5, score=0.8)] * 100)
    late = Unit(2, [at(10, 10, 50, 50)], [at(10, 10, 50, 50, score=0.7)])
    together, apart = MeanAveragePrecision("bbox"), MeanAveragePrecision("bbox")
    together.add(1, [many, late])
    apart.add(1, [many])
    apart.add(2, [late])
    assert together.summary()["AP"] == 0
    assert apart.summary()["AP"] == pytest.approx(1)


def test_equal_scores_keep_the_first_detections() -> None:
    found = [at(j, 0, 5, 5, score=(0.5, 0.6)[j % 2]) for j in range(150)]
    (kept,) = best_of_image([Unit(1, [], found)])
    assert kept.found == [one for j, one in enumerate(found) if j % 2 or j < 50]


def test_the_size_of_an_object_is_its_recorded_area() -> None:
    measure = MeanAveragePrecision("bbox")
    box = at(10, 10, 20, 20)
    measure.add(1, [Unit(1, [box | {"area": 100 * 100}], [box | {"score": 0.9}])])
    figures = measure.summary()
    assert (figures["AP_small"], figures["AP_large"]) == (-1, pytest.approx(1))


def test_without_truth_or_images_the_figures_are_pycocotools_minus_1() -> None:
    assert set(MeanAveragePrecision("bbox").summary().values()) == {-1.0}
    measure = MeanAveragePrecision("segm")
    measure.add(1, [Unit(1, [], [at(1, 1, 5, 5, score=0.9)])])
    assert set(measure.summary().values()) == {-1.0}
    assert measure.per_category() == {}


@pytest.mark.parametrize("second", [(7, [1]), (8, [2, 2])])
def test_a_unit_added_twice_is_an_error(second: tuple[int, list[int]]) -> None:
    measure = MeanAveragePrecision("bbox")
    measure.add(7, [])
    image, categories = second
    with pytest.raises(ValueError, match=f"image {image} was added twice, or a category of it"):
        measure.add(image, [Unit(category, [], []) for category in categories])


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    fed(MeanAveragePrecision("segm"), coco_images(*random_set(0))).summary()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_masks(kind: Kind) -> None:
    noise = np.asfortranarray(np.random.default_rng(0).random((200, 300)) > 0.5).astype(np.uint8)
    counts = coco_mask.encode(noise)["counts"].decode()

    def unit(category: int) -> Unit:
        found = [
            {
                "score": k / 20,
                "bbox": [k, k, 9, 9],
                "segmentation": {"size": [200, 300], "counts": counts},
            }
            for k in range(20)
        ]
        return Unit(category, [at(10, 10, 9, 9)], found)

    measure, cgf1 = MeanAveragePrecision(kind), CgF1(kind)
    images = 5

    def feed(image: int) -> None:
        units = [unit(1), unit(2)]
        measure.add(image, units)
        for one in units:
            cgf1.add(one)

    feed(-1)  # what is made once
    tracemalloc.start()
    try:
        for image in range(images):
            feed(image)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(counts) > 10_000  # one mask alone
    assert held / images < 10_000, held


# -- cgF1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_golden_cgf1_and_all_its_parts(kind: Kind) -> None:
    truth, found = read("pairs_gt.json"), read("pairs_predictions.json")
    measure = CgF1(kind)
    for image in truth["images"]:
        annotations = of(truth["annotations"], image_id=image["id"])
        results = of(found, image_id=image["id"])
        measure.add(Unit(1, annotations, results, image["is_instance_exhaustive"]))
    figures = measure.summary()
    prefix = f"cgF1_eval_{kind}_"
    recorded = {
        key.removeprefix(prefix): value for key, value in EXPECTED.items() if key.startswith(prefix)
    }
    assert len(recorded) == 26
    assert {name: figures[name] for name in recorded} == pytest.approx(recorded, abs=TOLERANCE)
    assert set(figures) == {*recorded, "positive_units", "negative_units"}
    assert measure.skipped == sum(not one["is_instance_exhaustive"] for one in truth["images"])


OBJECT = at(10, 10, 50, 50)
HIT = at(10, 10, 50, 50, score=0.9)
MISS = at(200, 100, 20, 20, score=0.9)


def cgf1_of(*units: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, float]:
    measure = CgF1("bbox")
    for truth, found in units:
        measure.add(Unit(1, truth, found))
    return measure.summary()


def test_all_found_and_nothing_invented_is_1() -> None:
    figures = cgf1_of(([OBJECT], [HIT]), ([], []))
    assert figures["cgF1"] == pytest.approx(1, abs=1e-3)
    assert (figures["positive_units"], figures["negative_units"]) == (1, 1)
    assert cgf1_notes(figures) == []


def test_without_negative_units_cgf1_is_0_and_the_note_gives_pmf1() -> None:
    figures = cgf1_of(([OBJECT], [HIT]), ([OBJECT], [HIT]))
    assert figures["cgF1"] == 0
    (note,) = cgf1_notes(figures)
    assert "no image was asked for a phrase that it does not contain" in note
    assert f"pmF1 ({figures['positive_micro_F1']:.4f})" in note


def test_without_any_unit_or_object_the_figures_are_0_with_a_note() -> None:
    assert set(cgf1_of().values()) == {0}
    assert "no exhaustively annotated" in cgf1_notes(cgf1_of())[0]
    negatives = cgf1_of(([], []), ([], [HIT]))
    assert negatives["cgF1"] == 0
    assert "no (image, phrase) pair has an object" in cgf1_notes(negatives)[0]


def test_an_invention_in_a_negative_unit_hurts_the_gate_and_not_pmf1() -> None:
    clean = cgf1_of(([OBJECT], [HIT]), ([], []), ([], []))
    dirty = cgf1_of(([OBJECT], [HIT]), ([], []), ([], [MISS]))
    assert dirty["positive_micro_F1"] == clean["positive_micro_F1"]
    assert dirty["F1"] < clean["F1"]
    assert dirty["IL_MCC"] == pytest.approx(0.5, abs=1e-5)  # (1*1 - 1*0) / sqrt(2*1*2*1)
    assert dirty["IL_FPR"] == pytest.approx(0.5, abs=1e-5)


def test_an_invention_in_a_positive_unit_hurts_pmf1_and_not_the_gate() -> None:
    figures = cgf1_of(([OBJECT], [HIT, MISS]), ([], []))
    assert figures["IL_MCC"] == pytest.approx(1, abs=1e-5)
    assert figures["positive_micro_precision"] == pytest.approx(0.5, abs=1e-4)


def test_detections_count_from_a_score_of_one_half_on() -> None:
    below, at_limit = (
        cgf1_of(([OBJECT], [HIT | {"score": score}]), ([], [])) for score in (0.4999, 0.5)
    )
    assert below["recall"] == 0
    assert at_limit["recall"] == pytest.approx(1, abs=1e-3)


def test_a_crowd_region_is_no_object() -> None:
    figures = cgf1_of(([OBJECT | {"iscrowd": 1}], []), ([OBJECT], [HIT]))
    assert (figures["positive_units"], figures["negative_units"]) == (1, 1)
    assert figures["cgF1"] == pytest.approx(1, abs=1e-3)


def test_the_matching_is_best_in_sum_and_not_greedy() -> None:
    # Greedy takes 0.9 first and is left with 0.1; the sum is greatest with 0.8 and 0.7.
    iou = np.array([[0.9, 0.8], [0.7, 0.1]])
    assert true_positives(iou).tolist() == [2, 2, 2, 2, 2, 1, 1, 0, 0, 0]


def test_a_pair_exactly_at_a_level_reaches_it() -> None:
    assert true_positives(np.array([[0.75]])).sum() == 6


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 2)])
def test_nothing_found_or_nothing_there_matches_nothing(shape: tuple[int, int]) -> None:
    assert true_positives(np.zeros(shape)).tolist() == [0] * 10


def test_units_with_unknown_masks_are_left_out_of_mask_scores_and_counted() -> None:
    unknown = Unit(1, [{"bbox": [1, 1, 5, 5]}, OBJECT], [HIT])
    for kind, skipped in (("bbox", 0), ("segm", 1)):
        cgf1, coco = CgF1(kind), MeanAveragePrecision(kind)
        cgf1.add(unknown)
        coco.add(1, [unknown])
        assert (cgf1.skipped, coco.skipped) == (skipped, skipped)


@pytest.mark.parametrize("kind", KINDS)
def test_overlaps_of_boxes_and_masks(kind: Kind) -> None:
    there = [at(0, 0, 10, 10), at(0, 0, 20, 10, iscrowd=1)]
    iou = overlaps([at(5, 0, 10, 10, score=0.5)], there, kind)
    assert iou.tolist() == [[pytest.approx(50 / 150), 1.0]]
    assert overlaps([], there, kind).shape == (0, 2)


# -- absent concepts -----------------------------------------------------------------------------


@pytest.mark.fault("R48")
def test_false_positives_are_the_share_of_absent_concepts_that_fire() -> None:
    assert false_positive_rate([0.1, 0.5, 0.49, 0.9]) == 0.5
    assert false_positive_rate(score for score in (0.1, 0.2)) == 0.0
    assert math.isnan(false_positive_rate([]))
