"""The way of pictures, boxes and masks to the model's input, as in official training.

A training picture is resized to a square of random side, without keeping the aspect ratio, and laid
at a random place on a black input; a validation picture fills the input. Nothing is mirrored and no
colour changed, unless asked for: phrases may speak of sides and colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lora_core.pictures.masks import Object, Size
from sam3_lora.records import Box

OFFICIAL_SIDE = 1008  # pixels of the official model's input
SIDES = range(480, 993, 32)  # pixels: what official training resizes to for it
HALF = 0.5 + 1e-6  # an exact half must not depend on rounding


class Placement(NamedTuple):
    """Where a picture lies in the model's input, and how."""

    content: Size  # (height, width) to which it is resized
    offset: tuple[int, int]  # (left, top) in the input
    size: Size  # (height, width) of the input
    mirrored: bool = False  # left-right, before anything else


def filling(size: Size) -> Placement:
    """The picture fills the input."""
    return Placement(size, (0, 0), size)


def drawn_placement(size: Size, rng: np.random.Generator) -> Placement:
    """A random size at a random place.

    For an input of 1008 x 1008 the sides are 480, 512, ..., 992; for others the same shares of its
    sides, rounded.
    """
    share = int(rng.choice(SIDES)) / OFFICIAL_SIDE
    height, width = (max(1, round(side * share)) for side in size)
    left = int(rng.integers(size[1] - width, endpoint=True))
    top = int(rng.integers(size[0] - height, endpoint=True))
    return Placement((height, width), (left, top), size)


# -- pictures --------------------------------------------------------------------------------------


def place_picture(rgb: NDArray[np.uint8], place: Placement) -> Tensor:
    """The picture where it lies in the model's input, uint8 [height, width, 3]; black around it.

    PIL's bilinear filter, which is what official training uses: the 8-bit values are the same.

    Args:
        rgb: uint8 [H, W, 3].
    """
    if place.mirrored:
        rgb = rgb[:, ::-1]
    (height, width), (left, top) = place.content, place.offset
    resized = Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR)
    canvas = torch.zeros((*place.size, 3), dtype=torch.uint8)
    canvas[top : top + height, left : left + width] = torch.from_numpy(np.array(resized))
    return canvas


def network_input(placed: Sequence[Tensor]) -> Tensor:
    """Pictures of `place_picture` as the network reads them, on the device where they are.

    The data set gives bytes, and floats are made here: a quarter travels to where the network is.

    Args:
        placed: I pictures, uint8 [H, W, 3] each.

    Returns:
        f32 [I, 3, H, W], -1..1.
    """
    pixels = torch.stack(list(placed)).permute(0, 3, 1, 2).contiguous()
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


def preprocess(rgb: NDArray[np.uint8], size: Size) -> Tensor:
    """A picture uint8 [H, W, 3] as the model sees it in validation, f32 [3, height, width]."""
    return network_input([place_picture(rgb, filling(size))])[0]


# -- boxes -----------------------------------------------------------------------------------------


def place_boxes(boxes: Sequence[Box], original: Size, place: Placement) -> Tensor:
    """Boxes (x0, y0, x1, y1) in a picture's pixels as (cx, cy, w, h), shares of the input's sides.

    Args:
        original: (height, width) of the picture.

    Returns:
        f32 [N, 4].
    """
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 2, 2)
    if place.mirrored:
        corners[..., 0] = original[1] - corners[:, ::-1, 0]
    content, sides = (np.array(one[::-1], dtype=np.float64) for one in (place.content, place.size))
    corners = (corners * (content / original[::-1]) + place.offset) / sides
    low, high = corners[:, 0], corners[:, 1]
    return torch.from_numpy(np.concatenate([(low + high) / 2, high - low], axis=1)).float()


def jittered(box: Box, size: Size, std: float, most: float, rng: np.random.Generator) -> Box:
    """A box as somebody might have drawn it.

    Noise N(0, std) of its sides, at most `most` pixels, is added to each corner coordinate; the
    result is cut to the picture. Where nothing would be left the box stays as it is.
    """
    x0, y0, x1, y1 = box
    sides = np.array([x1 - x0, y1 - y0] * 2)
    noise = np.clip(rng.normal(0.0, std, 4) * sides, -most, most)
    height, width = size
    moved = np.clip(np.array(box) + noise, 0, [width, height, width, height])
    if moved[2] <= moved[0] or moved[3] <= moved[1]:
        return box
    return float(moved[0]), float(moved[1]), float(moved[2]), float(moved[3])


# -- masks -----------------------------------------------------------------------------------------


def place_mask(mask: Object, place: Placement) -> NDArray[np.uint8]:
    """The mask in the model's input, uint8 [height, width] of 0 and 1.

    Bilinear with antialias, then more than a half: official training rounds halves to even, to 0.
    """
    if place.mirrored:
        mask = mask.mirrored()
    left, top = place.offset
    full = np.zeros(place.size, dtype=np.uint8)
    target = full[top : top + place.content[0], left : left + place.content[1]]
    if not mask.crop.size:
        return full
    rows = _span(mask.window[0], mask.size[0], place.content[0])
    columns = _span(mask.window[1], mask.size[1], place.content[1])
    source = np.zeros((len(rows.source), len(columns.source)), dtype=np.float32)
    y, x = mask.origin[1] - rows.source.start, mask.origin[0] - columns.source.start
    source[y : y + mask.crop.shape[0], x : x + mask.crop.shape[1]] = mask.crop
    window = Image.fromarray(source).resize(
        (len(columns.target), len(rows.target)),
        Image.Resampling.BILINEAR,
        box=(columns.first, rows.first, columns.last, rows.last),
    )
    part = target[rows.target.start : rows.target.stop, columns.target.start : columns.target.stop]
    part[:] = np.asarray(window) > HALF
    return full


class _Span(NamedTuple):
    """The resized pixels that a window of a picture may touch, and what they are made of."""

    target: range  # resized pixels
    source: range  # original pixels
    first: float  # where `target` begins and ends, in pixels of `source`
    last: float


def _span(window: slice, old: int, new: int) -> _Span:
    """Resizing a window alone is much faster than a large picture that is empty but for it.

    A resized pixel is made of the original ones within max(1, old / new) of its centre.
    """
    scale = old / new
    margin = math.ceil(max(1.0, 1 / scale)) + 1
    start = max(0, math.floor(window.start / scale) - margin)
    stop = min(new, math.ceil(window.stop / scale) + margin)
    low, high = math.floor(start * scale), min(old, math.ceil(stop * scale))
    return _Span(
        range(start, stop), range(low, high), start * scale - low, min(stop * scale, high) - low
    )
