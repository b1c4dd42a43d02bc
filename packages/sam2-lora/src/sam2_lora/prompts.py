"""Prompts made from masks: where a user would click or drag a box.

Training draws them at random from a numpy generator; evaluation computes them from the truth, so
that its curves compare. Points are pixels (x, y), boxes (x0, y0, x1, y1) with the first and the
last pixel inside, both in the frame of the mask: the official conventions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

EMPTY_SHARE = 0.1  # corrections that are drawn as if nothing had been predicted yet
JITTER_LIMIT = 20.0  # pixels of the model's input


class Click(NamedTuple):
    """A point and what it says: label 1 "this belongs to it", 0 "this does not"."""

    xy: tuple[int, int]
    label: int


# -- boxes -----------------------------------------------------------------------------------------


def box_of(mask: Mask) -> NDArray[np.float32]:
    """The tight box of a mask that is not empty, float32 [4]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)


def jittered(
    box: NDArray[np.float32], share: float, size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float32]:
    """A box as a hand would draw it.

    Each side moves by uniform(-1, 1) * min(share * length, 20 pixels), and stays in the picture.

    Args:
        box: float32 [4], pixels of the model's input.
        size: (height, width) of that input.
    """
    length = np.tile(box[2:] - box[:2], 2)
    moved = box + rng.uniform(-1, 1, 4) * np.minimum(share * length, JITTER_LIMIT)
    height, width = size
    return np.clip(moved, 0, [width - 1, height - 1] * 2).astype(np.float32)


# -- random clicks ---------------------------------------------------------------------------------


def random_pixel(region: Mask, rng: np.random.Generator) -> tuple[int, int]:
    """One pixel (x, y) of a region that is not empty, all equally likely."""
    inside = np.flatnonzero(region)
    y, x = divmod(int(inside[rng.integers(len(inside))]), region.shape[1])
    return x, y


def random_correction(
    prediction: Mask, target: Mask, rng: np.random.Generator, empty_share: float = EMPTY_SHARE
) -> Click:
    """The click of a training step that follows a prediction: any wrong pixel, equally likely.

    With probability `empty_share` it is drawn as if nothing had been predicted. Where nothing is
    wrong, it is any pixel of the background.
    """
    if rng.random() < empty_share:
        prediction = np.zeros_like(target)
    wrong = prediction != target
    if not wrong.any():
        wrong = ~target if not target.all() else target
    x, y = random_pixel(wrong, rng)
    return Click((x, y), int(target[y, x]))


# -- clicks of the evaluation ----------------------------------------------------------------------


def center_click(mask: Mask) -> Click:
    """The pixel of a mask, not empty, that is farthest from its border; the first of several."""
    return Click(_farthest(mask)[0], 1)


def center_correction(prediction: Mask, target: Mask) -> Click:
    """The middle of the thicker error: missed pixels get label 1, false ones 0.

    Thickness is the largest distance of a pixel to the region's border; outside of the picture
    counts as outside of the region. Where nothing is wrong, it is the middle of the background.
    """
    missed, false = target & ~prediction, prediction & ~target
    if not missed.any() and not false.any():
        return Click(_farthest(~target)[0], 0) if not target.all() else center_click(target)
    (at_missed, depth_missed), (at_false, depth_false) = _farthest(missed), _farthest(false)
    return Click(at_missed, 1) if depth_missed > depth_false else Click(at_false, 0)


def _farthest(region: Mask) -> tuple[tuple[int, int], float]:
    """The pixel (x, y) farthest from the region's border, and that distance; 0 if it is empty.

    Only the region's box, with one pixel of padding, is transformed: the nearest pixel outside of
    the region is never beyond that padding, so the distances are exact.
    """
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return (0, 0), 0.0
    top, left = int(rows[0]), int(columns[0])
    crop = np.pad(region[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    distance = ndimage.distance_transform_edt(crop)
    y, x = divmod(int(distance.argmax()), crop.shape[1])
    return (left + x - 1, top + y - 1), float(distance[y, x])
