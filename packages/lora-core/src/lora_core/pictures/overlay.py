"""Pictures for people: masks, boxes and clicks drawn over a photograph, panels with captions.

The names of a legend and of boxes are drawn in the font that comes with PIL, which has the letters
of European languages.
"""

from __future__ import annotations

import math
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
SWATCH = 8 / 5  # width of a legend's patch of colour, in heights of its letters

Colour = tuple[int, int, int]
Place = tuple[float, float, float, float]  # x0, y0, x1, y1


def draw(
    rgb: NDArray[np.uint8],
    masks: Iterable[NDArray[np.bool_]] = (),
    *,
    boxes: Sequence[Sequence[float]] | NDArray[np.floating] = (),
    points: Sequence[Sequence[float]] | NDArray[np.floating] = (),
    labels: Sequence[int] | NDArray[np.integer] = (),
    colours: Sequence[Colour] = PALETTE,
    captions: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """Draw masks with outlines, then boxes, then clicks, then the captions of the boxes.

    A small picture is enlarged by a whole factor first, so that lines stay fine, and a very large
    one made smaller.

    Args:
        rgb: uint8 [H, W, 3].
        masks: bool [H, W] each; mask i has colour i, as box i has.
        boxes: (x0, y0, x1, y1) in the picture's pixels.
        points: (x, y) in the picture's pixels.
        labels: 1 foreground (+) or 0 background (-), one per point; all 1 when empty.
        colours: of masks and boxes, from the first one again after the last.
        captions: short texts, one per box, those that matter most first: none covers an earlier one
            where there is room beside it.

    Returns:
        uint8 [H', W', 3].
    """
    longer = max(rgb.shape[:2])
    factor = LARGEST / longer if longer > LARGEST else max(1, round(SMALLEST / longer))
    size = (round(rgb.shape[1] * factor), round(rgb.shape[0] * factor))
    canvas = np.array(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    width = max(2, round(max(size) / 400))
    for index, mask in enumerate(masks):
        _paint(canvas, _enlarge(mask, size), colours[index % len(colours)], width)
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    places = [tuple(float(value) * factor for value in box) for box in boxes]
    for index, place in reversed(list(enumerate(places))):  # the first on top
        _box(pen, place, colours[index % len(colours)], width)
    for index, (x, y) in enumerate(points):
        positive = len(labels) == 0 or labels[index] == 1
        _click(pen, ((x + 0.5) * factor, (y + 0.5) * factor), positive, 3 * width)
    tinted = [colours[index % len(colours)] for index in range(len(captions))]
    _write(pen, places, captions, tinted, size)
    return np.asarray(picture)


def panels(
    pictures: Sequence[tuple[str, NDArray[np.uint8]]],
    title: str = "",
    legend: Sequence[tuple[str, Colour]] = (),
    *,
    columns: int | None = None,
    letters: int | None = None,
) -> NDArray[np.uint8]:
    """Put pictures of one size beside each other (strips below each other), captions on top.

    Args:
        pictures: pairs of caption and uint8 [H, W, 3].
        title: a line above all panels.
        legend: what colours mean, below all panels.
        columns: pictures in a row; None: all, or of strips one.
        letters: their height in pixels; None: what goes with the pictures.
    """
    height, width = pictures[0][1].shape[:2]
    letters = letters or max(16, min(2 * height, width) // 48)
    font = ImageFont.load_default(size=letters)
    line = letters * 8 // 5
    gap = line // 2
    columns = columns or (1 if width > 2 * height else len(pictures))
    rows = math.ceil(len(pictures) / columns)
    top = gap + (line if title else 0)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, top + rows * (height + line + gap)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((gap, gap), title, fill=INK, font=font)
    for index, (caption, picture) in enumerate(pictures):
        row, column = divmod(index, columns)
        x, y = gap + column * (width + gap), top + row * (height + line + gap)
        pen.text((x, y), caption, fill=INK, font=font)
        sheet.paste(Image.fromarray(picture), (x, y + line))
    if not legend:
        return np.asarray(sheet)
    return np.concatenate([np.asarray(sheet), _legend(legend, sheet.width, letters)])


def _legend(entries: Sequence[tuple[str, Colour]], width: int, letters: int) -> NDArray[np.uint8]:
    """Patches of colour with their names, in as many lines as they need; uint8 [h, width, 3]."""
    font, line = ImageFont.load_default(size=letters), letters * 8 // 5
    patch, gap = round(SWATCH * letters), line // 2
    spots: list[tuple[int, int]] = []
    x, y = gap, 0
    for name, _ in entries:
        needed = patch + gap + round(font.getlength(name))
        if x > gap and x + needed > width - gap:
            x, y = gap, y + line
        spots.append((x, y))
        x += needed + 2 * gap
    strip = Image.new("RGB", (width, y + line + gap), PAPER)
    pen = ImageDraw.Draw(strip)
    for (x, y), (name, colour) in zip(spots, entries, strict=True):
        pen.rectangle((x, y, x + patch, y + letters), fill=colour, outline=INK)
        pen.text((x + patch + gap // 2, y + letters / 2), name, fill=INK, font=font, anchor="lm")
    return np.asarray(strip)


def save(path: Path, pixels: NDArray[Any]) -> None:
    """Write a PNG, uint8 [H, W, 3] or uint8 or uint16 [H, W]; an old file is replaced at once."""
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def _enlarge(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    grey = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255)
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) > 127


def _paint(
    canvas: NDArray[np.float32], mask: NDArray[np.bool_], colour: Colour, width: int
) -> None:
    """Tint the inside, draw the border in full colour with a thin dark line around it."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return
    margin = width + 2
    window = tuple(slice(max(0, part.start - margin), part.stop + margin) for part in found[0])
    inside, view = mask[window].astype(np.uint8), canvas[window]
    # What a square reaches around each pixel: on large masks 25 times faster than distances.
    core = ndimage.minimum_filter(inside, 2 * width + 1, mode="constant", cval=1)
    reach = ndimage.maximum_filter(inside, 2 * max(1, width // 2) + 1, mode="constant", cval=0)
    paint = np.array(colour, dtype=np.float32)
    view[inside > 0] = (1 - FILL) * view[inside > 0] + FILL * paint
    view[inside > core] = paint
    view[reach > inside] *= 0.35


def _box(pen: ImageDraw.ImageDraw, box: Place, colour: Colour, width: int) -> None:
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


# -- captions ------------------------------------------------------------------------------------


def _write(
    pen: ImageDraw.ImageDraw,
    boxes: Sequence[Place],
    captions: Sequence[str],
    colours: Sequence[Colour],
    size: tuple[int, int],
) -> None:
    """Write each box's caption on a patch of its colour, where it covers no other caption.

    Args:
        size: (width, height) of the picture.
    """
    letters = max(12, min(size) // 42)
    font, margin = ImageFont.load_default(size=letters), max(2, letters // 5)
    taken: list[Place] = []
    for box, text, colour in zip(boxes, captions, colours, strict=False):
        extent = font.getlength(text) + 2 * margin, letters * 1.2 + 2 * margin
        patch = _free_place(box, extent, size, taken)
        taken.append(patch)
        pen.rectangle(patch, fill=colour, outline=(0, 0, 0))
        middle = patch[0] + margin, (patch[1] + patch[3]) / 2
        pen.text(middle, text, fill=_ink_on(colour), font=font, anchor="lm")


def _free_place(
    box: Place, extent: tuple[float, float], size: tuple[int, int], taken: Sequence[Place]
) -> Place:
    """Where a text of `extent` (w, h) goes: above its box, else at a corner, else below it.

    Where all is taken, it goes to where it covers least.
    """
    (x0, y0, x1, y1), (width, height) = box, extent
    corners = [
        (x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1),
        (x0, y1 - height), (x1 - width, y0), (x1 - width, y1 - height),
    ]  # fmt: skip
    best: tuple[float, Place] | None = None
    for x, y in corners:
        left = min(max(x, 0), max(size[0] - width, 0))
        top = min(max(y, 0), max(size[1] - height, 0))
        place = (left, top, left + width, top + height)
        covered = sum(_common(place, other) for other in taken)
        if best is None or covered < best[0]:
            best = covered, place
        if not covered:
            break
    assert best is not None
    return best[1]


def _common(a: Place, b: Place) -> float:
    """Area that two rectangles share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _ink_on(colour: Colour) -> Colour:
    """Black or white, whichever reads better on a colour: relative luminance of WCAG 2."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (part / 255 for part in colour)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Contrast is (lighter + 0.05) / (darker + 0.05); both are equal at sqrt(0.05 * 1.05) - 0.05.
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
