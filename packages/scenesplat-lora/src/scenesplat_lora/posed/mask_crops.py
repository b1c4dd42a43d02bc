"""Features of the masks of an image: the vision tower of SigLIP 2 on two crops of each.

    g_m = normalise( tower(box) + tower(masked box) )

The box is the mask's bounding box, widened to a square where the image goes on; the masked box is
the bounding box with black around the mask, widened to a square with black.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scenesplat_lora.language.siglip_images import VisionTower
from scenesplat_lora.posed.back_projection import unit_rows

Crop = Literal["both", "box", "masked"]
Picture = NDArray[np.uint8]
MASKS_AT_ONCE = 64  # bounds the memory of crops


def mask_features(
    tower: VisionTower, image: Picture, labels: NDArray[np.integer], crop: Crop = "both"
) -> NDArray[np.float32]:
    """Unit features of the masks 1 ... M, float32 [M, D]; zeros for numbers without a pixel.

    Args:
        image: RGB uint8 [H, W, 3]. labels: integers [H, W], 0: no mask.
    """
    boxes = ndimage.find_objects(labels)
    features = np.zeros((len(boxes), tower.width), np.float32)
    there = [number for number, box in enumerate(boxes) if box is not None]
    for begin in range(0, len(there), MASKS_AT_ONCE):
        some = there[begin : begin + MASKS_AT_ONCE]
        for how in ("box", "masked") if crop == "both" else (crop,):
            crops = [
                square_box(image, boxes[n]) if how == "box" else masked_box(image, labels, boxes, n)
                for n in some
            ]
            features[some] += tower.embed(crops).numpy()
    return unit_rows(features)


def square_box(image: Picture, box: tuple[slice, slice]) -> Picture:
    """The box in its surroundings: as wide as high, as far as the image goes."""
    side = max(part.stop - part.start for part in box)
    rows, columns = (
        _widened(part, side, length) for part, length in zip(box, image.shape[:2], strict=True)
    )
    return image[rows, columns]


def masked_box(
    image: Picture, labels: NDArray[np.integer], boxes: list[tuple[slice, slice]], number: int
) -> Picture:
    """The mask `number` + 1 alone, on a black square."""
    box = boxes[number]
    inside = labels[box] == number + 1
    height, width = inside.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side, 3), np.uint8)
    square[top : top + height, left : left + width] = image[box] * inside[..., None]
    return square


def _widened(part: slice, side: int, length: int) -> slice:
    """`side` pixels around a part, moved into 0 ... length, or all of it."""
    if side >= length:
        return slice(0, length)
    begin = min(max((part.start + part.stop - side) // 2, 0), length - side)
    return slice(begin, begin + side)
