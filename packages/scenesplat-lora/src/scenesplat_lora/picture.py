"""A picture of a scene: Gaussians as opaque ellipses, seen from above at a slant, by a z-buffer.

Orthographic, for a viewer at azimuth a (0: in the south, 90: in the east) and elevation e above the
floor; V is the rotation with the rows right, up and near:

    right = x cos a + y sin a,   back = y cos a - x sin a
    up = back sin e + z cos e,   near = z sin e - back cos e

A Gaussian with covariance S covers where d^T C^-1 d <= REACH^2, for C = V S V^T in right and up.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scenesplat_lora.scenes.scene import Scene, take_rows

Array = NDArray[np.floating]
PAPER = 255
WIDTH = 900  # pixels
REACH = 2.0  # standard deviations that are drawn
MOST_REACH = 1 / 45  # of the picture's width; of the largest Gaussians
ELEVATION = 50.0  # degrees
AZIMUTHS = (25.0, 115.0, 205.0, 295.0)  # slanting, so that no wall is seen edge on
OUTSIDE = 0.005  # share of the Gaussians that may lie far away, on each side
MARGIN = 0.1  # of the frame, on each side, where there are Gaussians
BORDER = 6  # pixels around the outermost centres
FAINT = 0.1  # opacity below which a Gaussian is no part of a surface
SAMPLED = 20_000  # Gaussians that a side is chosen by
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


# -- where things are in the picture ---------------------------------------------------------------


@dataclass(frozen=True)
class Ellipses:
    """Gaussians in a picture, in pixels, the nearest last.

    Attributes:
        row, column: f64 [N] of the centres, whole numbers.
        inverse: f64 [N, 3], of C^-1 the entries (right, right), (right, up), (up, up).
        reach: f64 [N, 2], how far they go in right and up.
        near: f64 [N], metres.
        order: int64 [N], which Gaussian each is.
        shape: height and width of the picture.
    """

    row: Array
    column: Array
    inverse: Array
    reach: Array
    near: Array
    order: NDArray[np.int64]
    shape: tuple[int, int]


def view(azimuth: float, elevation: float) -> NDArray[np.float64]:
    """V [3, 3]: rows right, up, near, for angles in degrees."""
    a, e = np.radians((azimuth, elevation))
    right, back = np.array([np.cos(a), np.sin(a), 0]), np.array([-np.sin(a), np.cos(a), 0])
    above = np.array([0, 0, 1])
    up, near = back * np.sin(e) + above * np.cos(e), above * np.sin(e) - back * np.cos(e)
    return np.stack([right, up, near])


def covariances(scene: Scene) -> NDArray[np.float64]:
    """S = R diag(scale^2) R^T of every Gaussian, [N, 3, 3], square metres."""
    from scipy.spatial.transform import Rotation

    axes = Rotation.from_quat(scene["quat"][:, [1, 2, 3, 0]]).as_matrix()
    axes *= scene["scale"][:, None, :]
    return axes @ axes.transpose(0, 2, 1)


def project(scene: Scene, azimuth: float, elevation: float, width: int) -> Ellipses:
    """Where the Gaussians of a scene are in a picture of this width, in pixels."""
    turn = view(azimuth, elevation)
    right, up, near = turn @ scene["coord"].astype(np.float64).T
    (left, end), (bottom, top) = _range(right), _range(up)
    inner = width - 1 - 2 * BORDER
    scale = inner / max(end - left, (top - bottom) / 2, 1e-6)  # at most twice as high
    height = round((top - bottom) * scale) + 1 + 2 * BORDER
    flat = turn[:2] @ covariances(scene) @ turn[:2].T * scale**2
    xx, xy, yy = flat[:, 0, 0], flat[:, 0, 1], flat[:, 1, 1]
    least = (0.5 / REACH) ** 2  # nothing is smaller than a pixel
    xx, yy = xx + least, yy + least
    reach = REACH * np.sqrt(np.stack([xx, yy], axis=1))
    shrink = np.minimum(1, MOST_REACH * width / reach.max(axis=1))
    determinant = np.maximum(xx * yy - xy**2, least**2)  # rounding may leave less
    inverse = np.stack([yy, -xy, xx], axis=1) / (determinant * shrink**2)[:, None]
    order = np.argsort(near, kind="stable")
    return Ellipses(
        np.floor((top - up[order]) * scale + 0.5) + BORDER,
        np.floor((right[order] - left) * scale + 0.5) + BORDER,
        inverse[order],
        (reach * shrink[:, None])[order],
        near[order],
        order,
        (height, width),
    )


def _range(values: Array) -> tuple[float, float]:
    """From where to where a picture goes: all, but not to the few that lie far away."""
    low, high = np.quantile(values, (OUTSIDE, 1 - OUTSIDE))
    margin = MARGIN * (high - low)
    return float(max(values.min(), low - margin)), float(min(values.max(), high + margin))


def front(ellipses: Ellipses) -> NDArray[np.int64]:
    """The nearest ellipse of each pixel, as its row in `ellipses`; int64 [H, W], -1: none."""
    height, width = ellipses.shape
    nearest = np.full(height * width, -1, np.int64)
    across, along = np.ceil(ellipses.reach.max(axis=0)).astype(int).tolist()
    for dy in range(-along, along + 1):
        rows = np.flatnonzero(ellipses.reach[:, 1] >= abs(dy))
        for dx in range(-across, across + 1):
            some = rows[ellipses.reach[rows, 0] >= abs(dx)]
            a, b, c = ellipses.inverse[some].T
            # Up in the scene is towards smaller rows, so that dy stands for -up.
            some = some[a * dx * dx - 2 * b * dx * dy + c * dy * dy <= REACH**2]
            x, y = ellipses.column[some] + dx, ellipses.row[some] + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            pixel = (y[inside] * width + x[inside]).astype(np.int64)
            np.maximum.at(nearest, pixel, some[inside])
    return nearest.reshape(height, width)


def best_azimuth(scene: Scene, elevation: float = ELEVATION) -> float:
    """The one of `AZIMUTHS` from which one sees farthest: over the lowest walls into the room."""
    step = -(-len(scene["coord"]) // SAMPLED)
    some = take_rows(scene, np.arange(0, len(scene["coord"]), step))
    depths = []
    for azimuth in AZIMUTHS:
        ellipses = project(some, azimuth, elevation, WIDTH // 6)
        nearest = front(ellipses)
        depths.append(-ellipses.near[nearest[nearest >= 0]].mean())
    return AZIMUTHS[int(np.argmax(depths))]


# -- pictures --------------------------------------------------------------------------------------


def visible(
    scene: Scene, azimuth: float = 0.0, elevation: float = ELEVATION, width: int = WIDTH
) -> NDArray[np.int64]:
    """Which Gaussian is seen in each pixel, int64 [H, width]; -1: none.

    The frame leaves out Gaussians that lie far away: half a percent on every side at most.
    """
    ellipses = project(scene, azimuth, elevation, width)
    nearest = front(ellipses)
    return np.where(nearest >= 0, ellipses.order[nearest], -1)


def painted(seen: NDArray[np.int64], color: NDArray[np.generic]) -> NDArray[np.uint8]:
    """A picture of what `visible` gave, white where nothing is; uint8 [H, W, 3].

    Args:
        color: [N, 3] of the Gaussians, 0..255.
    """
    picture = np.full((*seen.shape, 3), PAPER, np.uint8)
    hit = seen >= 0
    picture[hit] = np.clip(color[seen[hit]], 0, 255).astype(np.uint8)
    return picture


def scene_sheet(
    scene: Scene,
    panels: Sequence[tuple[str, NDArray[np.integer]]],
    names: Sequence[str],
    cut_above: float = 0.8,
    width: int = WIDTH,
) -> NDArray[np.uint8]:
    """The scene's own colours, beside them labels [N] by caption, and what their colours mean.

    Args:
        width: of each panel, pixels.

    Returns:
        uint8 [H, W, 3].
    """
    from lora_core.pictures import overlay

    some = shown(scene, cut_above)
    drawn = take_rows(scene, some)
    seen = visible(drawn, best_azimuth(drawn), width=width)
    pictures = [("colours", painted(seen, drawn["color"]))]
    counts: Counter[int] = Counter()
    for caption, labels in panels:
        chosen = labels[some]
        pictures.append((caption, painted(seen, label_colours(chosen, len(names)))))
        counts.update(dict(enumerate(np.bincount(chosen[chosen >= 0], minlength=len(names)))))
    colours = class_colours(len(names)).tolist()
    frequent = sorted(c for c, count in counts.most_common(MOST_NAMES) if count)
    legend = [(names[c], (colours[c][0], colours[c][1], colours[c][2])) for c in frequent]
    return overlay.panels(pictures, str(scene.get("name", "")), legend)
