"""COCO's mean average precision by pycocotools, image by image.

pycocotools reads a whole data set at once and keeps every mask. Here each image is matched when it
comes, only scores and matches stay, and the accumulation over the data set is pycocotools' own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3_lora.metrics import REGION, Kind, Record, Unit, is_crowd

BEST_OF_IMAGE = 100  # detections of an image that count, over all categories together
COCO_FIGURES = (
    "AP", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large", "AR_maxDets@1", "AR_maxDets@10",
    "AR_maxDets@100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matches:
    """The matches of one unit, for COCO's four ranges of object size and ten levels of IoU.

    Attributes:
        scores: f64 [D], the best first.
        matched, ignored: bool [4, 10, D], of each detection.
        truth_ignored: bool [4, G], of each object.
    """

    scores: NDArray[np.float64]
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    truth_ignored: NDArray[np.bool_]


class Results(Sequence[Record | None]):
    """pycocotools' `evalImgs`, [category, size range, image] in one row, made when it is read."""

    def __init__(
        self, images: Sequence[dict[int, Matches]], categories: Sequence[int], ranges: int
    ) -> None:
        self.images, self.categories, self.ranges = images, categories, ranges

    def __len__(self) -> int:
        return len(self.categories) * self.ranges * len(self.images)

    def __getitem__(self, index: Any) -> Any:
        rest, image = divmod(index, len(self.images))
        category, size = divmod(rest, self.ranges)
        found = self.images[image].get(self.categories[category])
        if found is None:
            return None
        return {
            "dtScores": found.scores,
            "dtMatches": found.matched[size],
            "dtIgnore": found.ignored[size],
            "gtIgnore": found.truth_ignored[size],
        }


@dataclass
class MeanAveragePrecision:
    """COCO's twelve figures by pycocotools, fed image by image.

    About 9 kB stay of 100 detections and 0.6 kB of a category, for each image, whatever its size.

    Attributes:
        kind: compare boxes or masks.
        positive_split: count detections only of categories that the image contains.
        skipped: units left out because a mask of theirs is unknown.
    """

    kind: Kind
    positive_split: bool = False
    skipped: int = 0
    _images: dict[int, dict[int, Matches]] = field(default_factory=dict)

    def add(self, image: int, units: Sequence[Unit]) -> None:
        """Take all units of one image.

        Raises:
            ValueError: the image was added before, or two units have one category.
        """
        if image in self._images or len({unit.category for unit in units}) < len(units):
            raise ValueError(
                f"image {image} was added twice, or a category of it: one call per image, one unit "
                "per category"
            )
        units = best_of_image(units)
        if self.positive_split:
            units = [unit for unit in units if unit.truth]
        if self.kind == "segm":
            complete = [unit for unit in units if not unit.without_masks()]
            self.skipped += len(units) - len(complete)
            units = complete
        matches = ((unit.category, match(unit, self.kind)) for unit in units)
        self._images[image] = {category: found for category, found in matches if found}

    def summary(self) -> dict[str, float]:
        """COCO's figures; -1 for what does not occur, such as objects of a size."""
        return dict(zip(COCO_FIGURES, self._accumulated().stats.tolist(), strict=True))

    def per_category(self) -> dict[int, float]:
        """AP of each category that occurs."""
        accumulated = self._accumulated()
        precision = accumulated.eval["precision"][..., 0, -1]  # [T, R, K], every size, 100 best
        means = {}
        for k, category in enumerate(accumulated.params.catIds):
            values = precision[..., k]
            if (values > -1).any():
                means[category] = float(values[values > -1].mean())
        return means

    def matches(self) -> Iterator[Matches]:
        """The matches of every unit with objects or detections, image by image."""
        for units in self._images.values():
            yield from units.values()

    def _accumulated(self) -> Any:
        from pycocotools.cocoeval import COCOeval

        # Sorted, as pycocotools does: of equal scores the first image's come first.
        images = [self._images[key] for key in sorted(self._images)]
        categories = sorted({category for image in images for category in image})
        evaluator = COCOeval(iouType=self.kind)
        evaluator.params.catIds, evaluator.params.imgIds = categories, list(range(len(images)))
        evaluator._paramsEval = evaluator.params
        evaluator.evalImgs = Results(images, categories, len(evaluator.params.areaRng))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
            evaluator.accumulate()
            evaluator.summarize()
        return evaluator


def best_of_image(units: Sequence[Unit], limit: int = BEST_OF_IMAGE) -> list[Unit]:
    """The units of one image with its `limit` best detections over all categories."""
    scores = np.array([one["score"] for unit in units for one in unit.found], dtype=np.float64)
    kept = np.zeros(len(scores), dtype=bool)
    kept[np.argsort(-scores, kind="stable")[:limit]] = True
    result, start = [], 0
    for unit in units:
        part = kept[start : start + len(unit.found)]
        start += len(unit.found)
        found = [one for one, keep in zip(unit.found, part, strict=True) if keep]
        result.append(Unit(unit.category, unit.truth, found, unit.exhaustive))
    return result


def match(unit: Unit, kind: Kind) -> Matches | None:
    """Match one unit as pycocotools does; None if there is nothing at all."""
    from pycocotools.cocoeval import COCOeval

    if not unit.truth and not unit.found:
        return None
    evaluator = COCOeval(iouType=kind)
    key = (0, 0)
    # Numbered from 1: a match is stored as the id of the partner, and 0 means none.
    evaluator._gts[key] = [
        {
            "id": number,
            "area": truth.get("area", _area(truth, kind)),
            "ignore": is_crowd(truth),
            "iscrowd": int(is_crowd(truth)),
            REGION[kind]: truth[REGION[kind]],
        }
        for number, truth in enumerate(unit.truth, start=1)
    ]
    evaluator._dts[key] = [
        {
            "id": number,
            "area": _area(one, kind),
            "score": one["score"],
            REGION[kind]: one[REGION[kind]],
        }
        for number, one in enumerate(unit.found, start=1)
    ]
    evaluator.ious = {key: evaluator.computeIoU(*key)}
    most = evaluator.params.maxDets[-1]
    results = [evaluator.evaluateImg(*key, limits, most) for limits in evaluator.params.areaRng]
    return Matches(
        np.array(results[0]["dtScores"], dtype=np.float64),
        np.array([result["dtMatches"] > 0 for result in results]),
        np.array([result["dtIgnore"] for result in results], dtype=bool),
        np.array([result["gtIgnore"] for result in results], dtype=bool),
    )


def _area(record: Record, kind: Kind) -> float:
    """Pixels of the mask, or of the box."""
    from pycocotools import mask as coco_mask

    if kind == "segm":
        return float(coco_mask.area(record["segmentation"]))
    return float(record["bbox"][2] * record["bbox"][3])
