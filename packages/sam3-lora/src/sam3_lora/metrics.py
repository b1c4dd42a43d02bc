"""Scores of phrase-prompted detection: cgF1, and false positives on absent concepts.

A unit is one (image, phrase) pair: what is there, and what was found, both at the original size.
Only numbers stay of it, so memory does not grow with the masks. COCO mAP: `average_precision`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["bbox", "segm"]
Record = dict[str, Any]
Matrix = NDArray[np.float64]

REGION = {"bbox": "bbox", "segm": "segmentation"}  # where a record has what is compared
IOU_LEVELS = np.linspace(0.5, 0.95, 10)  # COCO's
CONFIDENT = 0.5  # the score from which cgF1 and the false positives count a detection
EPS = 1e-4  # of the official cgF1, in object figures
IMAGE_EPS = 1e-6  # of the official cgF1, in image-level figures


@dataclass
class Unit:
    """One (image, phrase) pair.

    Attributes:
        category: what tells the phrase from the others of the data set.
        truth: COCO annotations: "bbox" (x, y, width, height) in pixels, and optionally
            "segmentation" (run lengths), "area" and "iscrowd". Their ids do not matter.
        found: COCO results: "score", "bbox", and "segmentation" (run lengths) for "segm".
        exhaustive: every object of the phrase is annotated. cgF1 leaves the others out.
    """

    category: int
    truth: Sequence[Record]
    found: Sequence[Record]
    exhaustive: bool = True

    def without_masks(self) -> bool:
        """Whether an object's mask is unknown, so that masks cannot be scored fairly."""
        return any(not truth.get("segmentation") for truth in self.truth)


def is_crowd(record: Record) -> bool:
    """Whether an annotation is a region of many objects, which are not told apart."""
    return bool(record.get("iscrowd", 0))


def overlaps(found: Sequence[Record], truth: Sequence[Record], kind: Kind) -> Matrix:
    """IoU [n, m] of boxes or masks; with a crowd: the share of the detection inside it."""
    from pycocotools import mask as coco_mask

    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    key, crowd = REGION[kind], [int(is_crowd(record)) for record in truth]
    return np.asarray(
        coco_mask.iou([one[key] for one in found], [one[key] for one in truth], crowd)
    )


# -- cgF1 ----------------------------------------------------------------------------------------


@dataclass
class CgF1:
    """Classification-gated F1 of SA-Co: how well objects are found, times whether at all.

    cgF1(tau) = pmF1(tau) * MCC, and cgF1 is the mean over tau in 0.50, 0.55, ..., 0.95.

    pmF1 is the F1 of objects, pooled over the units that have some; MCC is Matthews' correlation of
    "the phrase is in the image" with "something was found", over all units. Without negative units
    MCC and cgF1 are 0 however good the objects are: see `cgf1_notes`.

    Attributes:
        skipped: units that are not exhaustive, or (for masks) have objects without masks.
    """

    kind: Kind
    skipped: int = 0
    _truth: list[int] = field(default_factory=list)
    _found: list[int] = field(default_factory=list)
    _hits: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, unit: Unit) -> None:
        """Count one unit. Crowd regions are no objects, and what is found in them counts."""
        if not unit.exhaustive or (self.kind == "segm" and unit.without_masks()):
            self.skipped += 1
            return
        found = [one for one in unit.found if one["score"] >= CONFIDENT]
        truth = [one for one in unit.truth if not is_crowd(one)]
        self._truth.append(len(truth))
        self._found.append(len(found))
        self._hits.append(true_positives(overlaps(found, truth, self.kind)))

    def summary(self) -> dict[str, float]:
        """The figures of the official evaluation, by its names; all are 0 without any unit.

        Without a suffix they are the mean over the ten levels of IoU, with "@0.5" and "@0.75" those
        of one. "precision", "recall", "F1": objects, with the false positives of every unit;
        "positive_micro_*" (pmF1): with those of units that have objects; "positive_macro_F1": mean
        over the units that have both objects and detections; "IL_*": of images, whether at all.
        "positive_units", "negative_units": counts.
        """
        truth, found = np.array(self._truth, dtype=np.int64), np.array(self._found, dtype=np.int64)
        hits = np.array(self._hits, dtype=np.int64).reshape(-1, len(IOU_LEVELS))
        image = image_level(truth > 0, found > 0)
        levels = object_level(truth, found, hits)
        levels = {"cgF1": levels["positive_micro_F1"] * image["IL_MCC"], **levels}
        figures = {name: float(values.mean()) for name, values in levels.items()}
        figures |= image
        for level, index in (("0.5", 0), ("0.75", 5)):
            figures |= {f"{name}@{level}": float(row[index]) for name, row in levels.items()}
        positive = int((truth > 0).sum())
        return figures | {"positive_units": positive, "negative_units": len(truth) - positive}


def true_positives(iou: Matrix) -> NDArray[np.int64]:
    """How many pairs reach each IoU level [10], for the one-to-one matching of greatest summed IoU.

    Args:
        iou: [detections, objects].
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(iou, maximize=True)
    return (iou[rows, columns][:, None] >= IOU_LEVELS).sum(0)


def _f1(precision: Matrix, recall: Matrix, eps: float) -> Matrix:
    return 2 * precision * recall / (precision + recall + eps)


def object_level(
    truth: NDArray[np.int64], found: NDArray[np.int64], hits: NDArray[np.int64]
) -> dict[str, Matrix]:
    """Figures of objects per IoU level, [10] each.

    Args:
        truth: objects per unit [U].
        found: detections per unit [U].
        hits: matched pairs per unit and level [U, 10].
    """
    positive = truth > 0
    both = positive & (found > 0)
    tp = hits.sum(0)
    recall = tp / (truth.sum() + EPS)
    precision = tp / (found.sum() + EPS)
    positive_precision = tp / (found[positive].sum() + EPS)
    one_f1 = _f1(
        hits[both] / (found[both, None] + EPS), hits[both] / (truth[both, None] + EPS), EPS
    )
    return {
        "precision": precision,
        "recall": recall,
        "F1": _f1(precision, recall, EPS),
        "positive_micro_precision": positive_precision,
        "positive_micro_F1": _f1(positive_precision, recall, EPS),
        "positive_macro_F1": one_f1.mean(0) if both.any() else np.zeros(len(IOU_LEVELS)),
    }


def image_level(present: NDArray[np.bool_], seen: NDArray[np.bool_]) -> dict[str, float]:
    """Figures of "is the phrase in the image at all?", over units [U].

    MCC = (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))
    """
    tp, tn = int((present & seen).sum()), int((~present & ~seen).sum())
    fp, fn = int((~present & seen).sum()), int((present & ~seen).sum())
    precision, recall = tp / (tp + fp + IMAGE_EPS), tp / (tp + fn + IMAGE_EPS)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "IL_precision": precision,
        "IL_recall": recall,
        "IL_F1": 2 * precision * recall / (precision + recall + IMAGE_EPS),
        "IL_FPR": fp / (fp + tn + IMAGE_EPS),
        "IL_MCC": (tp * tn - fp * fn) / (root + IMAGE_EPS),
    }


def cgf1_notes(figures: dict[str, float]) -> list[str]:
    """What a reader must know before trusting cgF1; empty if it means what it should.

    Args:
        figures: of `CgF1.summary`.
    """
    pm_f1 = figures["positive_micro_F1"]
    if not figures["positive_units"] + figures["negative_units"]:
        return ["cgF1: no exhaustively annotated (image, phrase) pair to score"]
    if not figures["negative_units"]:
        return [
            "cgF1 is 0 by its definition: no image was asked for a phrase that it does not "
            f"contain. Add negative phrases to the validation, or read pmF1 ({pm_f1:.4f})"
        ]
    if not figures["positive_units"]:
        return ["cgF1 is 0 by its definition: no (image, phrase) pair has an object"]
    return []


# -- absent concepts -----------------------------------------------------------------------------


def false_positive_rate(best_scores: Iterable[float], threshold: float = CONFIDENT) -> float:
    """Share of units without the concept in which something was found; NaN without units.

    Args:
        best_scores: the highest score of each (image, absent phrase) pair.
    """
    scores = list(best_scores)
    if not scores:
        return math.nan
    return sum(score >= threshold for score in scores) / len(scores)
