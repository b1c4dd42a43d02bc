"""A picture of a scene: Gaussians as discs, seen from above at a slant, by a z-buffer.

Orthographic: with the viewer to the south at elevation e above the floor,

    right = x,   up = y sin e + z cos e,   near = z sin e - y cos e
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scenesplat_lora.scene import Scene

Array = NDArray[np.floating]
PAPER = 255
WIDTH = 900  # pixels
MOST_RADIUS = 6  # pixels; of the largest Gaussians
FAINT = 0.1  # opacity below which a Gaussian is no part of a surface
GOLDEN = 0.6180339887498949  # steps of hue that never come close to earlier ones
NO_LABEL = (200, 200, 200)
MOST_NAMES = 24  # in a legend


def class_colours(count: int) -> NDArray[np.uint8]:
    """Colours of `count` classes, uint8 [count, 3]: hues by the golden ratio, three strengths."""
    tones = ((0.75, 0.9), (0.45, 0.95), (0.9, 0.6))  # saturation, value
    rgb = [colorsys.hsv_to_rgb(0.58 + i * GOLDEN, *tones[i % 3]) for i in range(count)]
    return (np.array(rgb).reshape(-1, 3) * 255).round().astype(np.uint8)


def label_colours(labels: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """Colour of every label, uint8 [N, 3]; grey for -1."""
    table = np.concatenate([class_colours(count), np.array([NO_LABEL], np.uint8)])
    return table[labels]


def shown(scene: Scene, cut_above: float) -> NDArray[np.bool_]:
    """Which Gaussians are drawn: no faint ones, and none above a share of the scene's height.

    Args:
        cut_above: 0 ... 1 of the height between the 1st and 99th percentile: a ceiling hides
            the room below it.
    """
    z = scene["coord"][:, 2]
    low, high = np.percentile(z, (1, 99))
    chosen = (scene["opacity"][:, 0] >= FAINT) & (z <= low + cut_above * (high - low) + 1e-6)
    return chosen if chosen.any() else np.ones(len(z), np.bool_)


def render(
    coord: Array,
    color: NDArray[np.generic],
    radius: Array,
    elevation: float = 55.0,
    width: int = WIDTH,
) -> NDArray[np.uint8]:
    """A picture, uint8 [H, width, 3], white where nothing is.

    The frame leaves out half a percent of the Gaussians on every side: some lie far away.

    Args:
        coord: [N, 3] metres, z up. color: [N, 3], 0..255. radius: [N] metres.
        elevation: degrees of the viewer above the floor.
    """
    slant = np.radians(elevation)
    x, y, z = coord.astype(np.float64).T
    right, up = x, y * np.sin(slant) + z * np.cos(slant)
    order = np.argsort(z * np.sin(slant) - y * np.cos(slant), kind="stable")  # the nearest last
    (left, end), (bottom, top) = (np.percentile(axis, (0.5, 99.5)) for axis in (right, up))
    per_metre = (width - 1) / max(end - left, (top - bottom) / 2, 1e-6)  # at most twice as high
    height = round((top - bottom) * per_metre) + 1
    column = np.floor((right[order] - left) * per_metre + 0.5)
    row = np.floor((top - up[order]) * per_metre + 0.5)
    size = np.clip(radius[order] * per_metre, 0.5, MOST_RADIUS)
    front = _front(column, row, size, (height, width))
    picture = np.full((height, width, 3), PAPER, np.uint8)
    hit = front >= 0
    picture[hit] = np.clip(color[order][front[hit]], 0, 255).astype(np.uint8)
    return picture


def _front(column: Array, row: Array, size: Array, shape: tuple[int, int]) -> NDArray[np.int64]:
    """The last of the discs that covers each pixel, int64 [H, W]; -1: none.

    Args:
        column, row: centres in pixels. size: radii in pixels. All [N], the nearest disc last.
    """
    height, width = shape
    front = np.full(height * width, -1, np.int64)
    reach = range(-MOST_RADIUS, MOST_RADIUS + 1)
    for dy, dx in ((dy, dx) for dy in reach for dx in reach):
        covers = np.flatnonzero(size >= np.hypot(dx, dy))
        x, y = column[covers] + dx, row[covers] + dy
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        pixel = (y[inside] * width + x[inside]).astype(np.int64)
        np.maximum.at(front, pixel, covers[inside])
    return front.reshape(shape)


def scene_sheet(
    scene: Scene,
    panels: Sequence[tuple[str, NDArray[np.integer]]],
    names: Sequence[str],
    cut_above: float = 0.8,
) -> NDArray[np.uint8]:
    """The scene's own colours, beside them labels [N] by caption, and what their colours mean.

    Returns:
        uint8 [H, W, 3].
    """
    from lora_core.pictures import overlay

    some = shown(scene, cut_above)
    coord, radius = scene["coord"][some], scene["scale"][some].mean(axis=1)
    pictures = [("colours", render(coord, scene["color"][some], radius))]
    counts: Counter[int] = Counter()
    for caption, labels in panels:
        chosen = labels[some]
        pictures.append((caption, render(coord, label_colours(chosen, len(names)), radius)))
        counts.update(dict(enumerate(np.bincount(chosen[chosen >= 0], minlength=len(names)))))
    colours = class_colours(len(names)).tolist()
    frequent = sorted(c for c, count in counts.most_common(MOST_NAMES) if count)
    legend = [(names[c], (colours[c][0], colours[c][1], colours[c][2])) for c in frequent]
    return overlay.panels(pictures, str(scene.get("name", "")), legend)
