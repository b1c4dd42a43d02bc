"""Pictures for people: masks, boxes and clicks drawn over a photograph, panels with captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from lora_core.tensor_file import atomic_write

# Okabe and Ito's colours, told apart with every common kind of colour blindness.
PALETTE = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
FOREGROUND, BACKGROUND = (0, 158, 115), (213, 94, 0)  # clicks; told apart by + and - as well
FILL = 0.4  # opacity of a mask's inside
SMALLEST, LARGEST = 768, 2048  # longer side of a drawn picture in pixels
PAPER, INK = (255, 255, 255), (40, 40, 40)


def draw(
    rgb: NDArray[np.uint8],
    masks: Iterable[NDArray[np.bool_]] = (),
    *,
    boxes: Sequence[Sequence[float]] | NDArray[np.floating] = (),
    points: Sequence[Sequence[float]] | NDArray[np.floating] = (),
    labels: Sequence[int] | NDArray[np.integer] = (),
) -> NDArray[np.uint8]:
    """Draw masks with outlines, then boxes, then clicks.

    A small picture is enlarged by a whole factor first, so that lines stay fine, and a very large
    one made smaller.

    Args:
        rgb: uint8 [H, W, 3].
        masks: bool [H, W] each; mask i has colour i of the palette, as box i has.
        boxes: (x0, y0, x1, y1) in the picture's pixels.
        points: (x, y) in the picture's pixels.
        labels: 1 foreground (+) or 0 background (-), one per point; all 1 when empty.

    Returns:
        uint8 [H', W', 3].
    """
    longer = max(rgb.shape[:2])
    factor = LARGEST / longer if longer > LARGEST else max(1, round(SMALLEST / longer))
    size = (round(rgb.shape[1] * factor), round(rgb.shape[0] * factor))
    canvas = np.array(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    width = max(2, round(max(size) / 400))
    for index, mask in enumerate(masks):
        _paint(canvas, _enlarge(mask, size), PALETTE[index % len(PALETTE)], width)
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for index, box in enumerate(boxes):
        _box(pen, [value * factor for value in box], PALETTE[index % len(PALETTE)], width)
    for index, (x, y) in enumerate(points):
        positive = len(labels) == 0 or labels[index] == 1
        _click(pen, ((x + 0.5) * factor, (y + 0.5) * factor), positive, 3 * width)
    return np.asarray(picture)


def panels(pictures: Sequence[tuple[str, NDArray[np.uint8]]], title: str = "") -> NDArray[np.uint8]:
    """Put pictures of one size beside each other (strips below each other), captions on top.

    Args:
        pictures: pairs of caption and uint8 [H, W, 3].
        title: a line above all panels.
    """
    height, width = pictures[0][1].shape[:2]
    letters = max(16, min(2 * height, width) // 48)  # pixels
    font = ImageFont.load_default(size=letters)
    line = letters * 8 // 5
    gap = line // 2
    stacked = width > 2 * height
    columns, rows = (1, len(pictures)) if stacked else (len(pictures), 1)
    top = gap + (line if title else 0)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, top + rows * (height + line + gap)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((gap, gap), title, fill=INK, font=font)
    for index, (caption, picture) in enumerate(pictures):
        column, row = (0, index) if stacked else (index, 0)
        x, y = gap + column * (width + gap), top + row * (height + line + gap)
        pen.text((x, y), caption, fill=INK, font=font)
        sheet.paste(Image.fromarray(picture), (x, y + line))
    return np.asarray(sheet)


def save(path: Path, pixels: NDArray[Any]) -> None:
    """Write a PNG, uint8 [H, W, 3] or uint8 or uint16 [H, W]; an old file is replaced at once."""
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def _enlarge(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    grey = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255)
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) > 127


def _paint(
    canvas: NDArray[np.float32], mask: NDArray[np.bool_], colour: tuple[int, int, int], width: int
) -> None:
    """Tint the inside, draw the border in full colour with a thin dark line around it."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return
    margin = width + 2
    window = tuple(slice(max(0, part.start - margin), part.stop + margin) for part in found[0])
    inside, view = mask[window], canvas[window]
    distance = ndimage.distance_transform_edt(inside)
    outer = ndimage.distance_transform_edt(~inside) if not inside.all() else np.zeros(inside.shape)
    paint = np.array(colour, dtype=np.float32)
    view[inside] = (1 - FILL) * view[inside] + FILL * paint
    view[inside & (distance <= width)] = paint
    view[~inside & (outer <= max(1, width // 2))] *= 0.35


def _box(
    pen: ImageDraw.ImageDraw, box: Sequence[float], colour: tuple[int, int, int], width: int
) -> None:
    x0, y0, x1, y1 = box
    pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=width + 2)
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=width)


def _click(pen: ImageDraw.ImageDraw, xy: tuple[float, float], positive: bool, radius: int) -> None:
    x, y = xy
    colour = FOREGROUND if positive else BACKGROUND
    pen.ellipse(
        (x - radius, y - radius, x + radius, y + radius), fill=colour, outline=PAPER, width=2
    )
    arm, stroke = radius * 0.55, max(2, radius // 4)
    pen.line((x - arm, y, x + arm, y), fill=PAPER, width=stroke)
    if positive:
        pen.line((x, y - arm, x, y + arm), fill=PAPER, width=stroke)
