"""The threshold on scores: where the F1 of detections is highest on validation data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam3_lora.average_precision import Matches
from sam3_lora.metrics import CONFIDENT, IOU_LEVELS

EVERY_SIZE, LEVEL = 0, 0  # of COCO's ranges of object size, and of `IOU_LEVELS`: IoU 0.5


@dataclass(frozen=True)
class Calibration:
    """What is found with scores above a threshold; all 0..1.

    Attributes:
        threshold: between the lowest score that is kept and the next lower one.
        f1, precision, recall: of detections at this threshold, matched at an IoU of `iou`.
        f1_at_half: F1 at the threshold of 0.5, for comparison.
        objects: how many the figures come from; with few of them the threshold is a guess.
    """

    threshold: float
    f1: float
    precision: float
    recall: float
    f1_at_half: float
    objects: int
    iou: float = float(IOU_LEVELS[LEVEL])


def calibrate(matches: Iterable[Matches]) -> Calibration | None:
    """The threshold t with the highest F1; of equally good ones the highest.

        F1(t) = 2 TP(t) / (D(t) + G)

    D(t): detections with scores above t. TP(t): those of them that are matched, as COCO does it:
    the best score first, so that a threshold changes no match above it. G: objects. Crowd regions,
    and detections in them, count neither way.

    Returns:
        None if no detection is right.
    """
    parts = [_counted(one) for one in matches]
    if not parts:
        return None
    scores, hits = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    objects = sum(part[2] for part in parts)
    if not hits.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], hits[order]
    tp, kept = np.cumsum(hits), np.arange(1, len(scores) + 1)
    f1 = 2 * tp / (kept + objects)
    ends = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # equal scores go together
    best = int(ends[f1[ends].argmax()])
    below = float(scores[best + 1]) if best + 1 < len(scores) else 0.0
    above_half = int((scores > CONFIDENT).sum())
    return Calibration(
        threshold=(float(scores[best]) + below) / 2,
        f1=float(f1[best]),
        precision=float(tp[best] / kept[best]),
        recall=float(tp[best] / objects),
        f1_at_half=float(f1[above_half - 1]) if above_half else 0.0,
        objects=objects,
    )


def _counted(matches: Matches) -> tuple[NDArray[np.float64], NDArray[np.bool_], int]:
    """Scores [D] of the detections of one unit that count, whether they are right [D]; objects."""
    counts = ~matches.ignored[EVERY_SIZE, LEVEL]
    objects = int((~matches.truth_ignored[EVERY_SIZE]).sum())
    return matches.scores[counts], matches.matched[EVERY_SIZE, LEVEL][counts], objects
