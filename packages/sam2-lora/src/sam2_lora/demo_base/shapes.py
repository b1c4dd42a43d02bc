"""Generated pictures of shapes with one mask per shape: what the embedded tiny base learned from.

A picture is a pure function of its seed. Shapes are sets {f(u, v) < 1} in local coordinates
(shifted, rotated, scaled); they are painted one over the other, so a mask holds the *visible*
pixels. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MIN_PIXELS = 40  # a smaller visible rest of a shape is no target
MIN_VISIBLE = 0.45  # share of a shape that must be left uncovered for it to be a target


@dataclass(frozen=True)
class Difficulty:
    """What the pictures of one level look like.

    objects: fewest and most shapes painted; radius: smallest and largest, as a share of the side;
    contrast: least difference of mean colour between a shape and what lies under it, 0..1;
    clutter: 0..1, strength of textures, uneven light, blur, noise, shadows and lines.
    """

    objects: tuple[int, int]
    radius: tuple[float, float]
    contrast: float
    clutter: float


EASY = Difficulty(objects=(2, 3), radius=(0.16, 0.34), contrast=0.35, clutter=0.15)
FULL = Difficulty(objects=(2, 6), radius=(0.09, 0.30), contrast=0.15, clutter=1.0)
EMPTY = Difficulty(objects=(0, 0), radius=(0.1, 0.1), contrast=0.15, clutter=1.0)

HELD_OUT_SEED = 3  # of the pictures that the base's figures are measured on; never trained on


def held_out(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first pictures of the held-out set, each as `picture` returns it."""
    return (picture((HELD_OUT_SEED, i, 0), FULL) for i in range(count))


def picture(
    seed: int | Sequence[int], difficulty: Difficulty, size: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Paint one picture.

    Args:
        seed: anything `numpy.random.default_rng` takes; the same seed gives the same picture.
        difficulty: which kind of picture.
        size: side in pixels.

    Returns:
        image uint8 [size, size, 3] and masks bool [N, size, size] of visible pixels; N may be
        smaller than the number painted, as shapes hidden by later ones are no targets.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1)  # [S, S], 0..1
    grey = rng.random() < 0.5
    base = _colour(rng, grey)
    canvas = _texture(rng, x, y, base, difficulty.clutter, grey)
    whole: list[int] = []  # pixels of each shape before others cover it
    visible: list[np.ndarray] = []
    for _ in range(rng.integers(difficulty.objects[0], difficulty.objects[1] + 1)):
        mask, u, v = _shape(rng, x, y, difficulty.radius)
        if mask.sum() < MIN_PIXELS:
            continue
        _paint(rng, canvas, mask, u, v, (x, y), difficulty, grey)
        visible = [other & ~mask for other in visible]
        whole.append(int(mask.sum()))
        visible.append(mask)
    kept = [
        mask
        for mask, pixels in zip(visible, whole, strict=True)
        if mask.sum() >= max(MIN_PIXELS, MIN_VISIBLE * pixels)
    ]
    image = _camera(rng, canvas, x, y, difficulty.clutter, grey)
    return image, np.stack(kept) if kept else np.zeros((0, size, size), bool)


def _shape(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random mask bool [S, S] and the local coordinates u, v (about -1..1 inside the shape)."""
    angle = rng.uniform(0, 2 * np.pi)
    across = np.exp(rng.uniform(np.log(radius[0]), np.log(radius[1])))
    aspect = rng.uniform(0.45, 1.0)
    dx, dy = x - rng.uniform(0.05, 0.95), y - rng.uniform(0.05, 0.95)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / across
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / (across * aspect)
    kind = rng.choice(["round", "corners", "blob", "ring", "crescent", "bars"], p=KINDS)
    return OUTLINES[kind](rng, u, v) < 1, u, v


def _round(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Superellipse |u|^p + |v|^p: diamond (1), ellipse (2), rounded box (4) and box (16)."""
    p = rng.choice([1, 2, 2, 2, 4, 16])
    return np.abs(u) ** p + np.abs(v) ** p


def _corners(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Regular polygon of 3 to 7 sides: the distance along the nearest side's normal."""
    sector = 2 * np.pi / rng.integers(3, 8)
    theta = np.arctan2(v, u) % sector - sector / 2
    return np.hypot(u, v) * np.cos(theta) / np.cos(sector / 2)


def _blob(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Radius varies along the angle as a random Fourier series of five terms."""
    theta, edge = np.arctan2(v, u), np.full_like(u, 0.8)
    for k in range(1, 6):
        edge += rng.normal(0, 0.22 / k**0.7) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) / np.maximum(edge, 0.2)


def _ring(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    rho = np.hypot(u, v)
    return np.where(rho < rng.uniform(0.3, 0.6), 2, rho)


def _crescent(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    bite = np.hypot(u - rng.uniform(0.7, 1.1), v)
    return np.where(bite < rng.uniform(0.6, 0.9), 2, np.hypot(u, v))


def _bars(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two crossed bars: cross, T or L, by where the second one sits."""
    first = np.maximum(np.abs(u), np.abs(v) / rng.uniform(0.25, 0.45))
    width, shift = rng.uniform(0.25, 0.45), rng.choice([0, 0.6])
    second = np.maximum(np.abs(u - shift) / width, np.abs(v))
    return np.minimum(first, second)


OUTLINES = {
    "round": _round,
    "corners": _corners,
    "blob": _blob,
    "ring": _ring,
    "crescent": _crescent,
    "bars": _bars,
}
KINDS = (0.34, 0.18, 0.26, 0.06, 0.08, 0.08)  # how often, in the order of OUTLINES


def _paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    mask: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    grid: tuple[np.ndarray, np.ndarray],
    difficulty: Difficulty,
    grey: bool,
) -> None:
    """Put one shape on the canvas, in place: shadow, texture, shading, rim."""
    under = canvas[mask].mean(0)
    for _ in range(20):  # a colour that differs enough; the last try stands
        colour = _colour(rng, grey)
        if np.abs(colour - under).max() >= difficulty.contrast:
            break
    if rng.random() < 0.25 * difficulty.clutter:
        shift = tuple(rng.integers(-4, 5, 2))
        canvas[np.roll(mask, shift, (0, 1)) & ~mask] *= rng.uniform(0.5, 0.85)
    surface = _texture(rng, *grid, colour, 0.7 * difficulty.clutter, grey)
    if rng.random() < 0.4:  # light from one side, as on a sphere or a coin
        side = rng.uniform(0, 2 * np.pi)
        tilt = np.cos(side) * u + np.sin(side) * v
        surface = surface * (1 + rng.uniform(0, 0.35) * np.clip(tilt, -1, 1))[..., None]
    canvas[mask] = surface[mask]
    if rng.random() < 0.3 * difficulty.clutter:
        inner = mask.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= np.roll(mask, step, axis)
        canvas[mask & ~inner] *= rng.choice([0.5, 0.7, 1.3])


def _texture(
    rng: np.random.Generator,
    x: np.ndarray,
    y: np.ndarray,
    colour: np.ndarray,
    clutter: float,
    grey: bool,
) -> np.ndarray:
    """Surface float32 [S, S, 3] around a mean colour: flat, gradient, stripes, checks or clouds."""
    kind = rng.choice(["flat", "gradient", "stripes", "checks", "clouds", "grain"])
    strength = clutter * rng.uniform(0.03, 0.22)
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    if kind == "flat":
        wave = np.zeros_like(x)
    elif kind == "gradient":
        wave = 2 * along - 1
    elif kind == "stripes":
        wave = np.sin(2 * np.pi * rng.uniform(3, 20) * along)
    elif kind == "checks":
        across, cells = np.cos(angle) * y - np.sin(angle) * x, rng.uniform(3, 14)
        wave = np.sign(np.sin(np.pi * cells * along) * np.sin(np.pi * cells * across))
    elif kind == "clouds":
        wave = clouds(rng, x.shape[0], int(rng.integers(3, 24)))
    else:
        wave = rng.standard_normal(x.shape, np.float32)
    tint = np.ones(3) if grey else rng.uniform(0.2, 1.0, 3)
    return (colour + strength * wave[..., None] * tint).astype(np.float32)


def clouds(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise float32 [size, size]: a random grid of `cells` nodes, bilinearly enlarged."""
    nodes = rng.standard_normal((cells + 1, cells + 1), np.float32)
    at = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    low = at.astype(int)
    part = at - low
    rows = nodes[low] * (1 - part)[:, None] + nodes[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _colour(rng: np.random.Generator, grey: bool) -> np.ndarray:
    """Mean colour float [3], 0.05..0.95; one value for all channels of a grey picture."""
    return np.full(3, rng.uniform(0.05, 0.95)) if grey else rng.uniform(0.05, 0.95, 3)


def _camera(
    rng: np.random.Generator,
    canvas: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    clutter: float,
    grey: bool,
) -> np.ndarray:
    """Thin lines, uneven light, blur, noise and rounding: canvas float -> uint8 [S, S, 3]."""
    if rng.random() < 0.3 * clutter:
        for _ in range(rng.integers(1, 4)):
            angle = rng.uniform(0, np.pi)
            distance = np.cos(angle) * (x - rng.random()) + np.sin(angle) * (y - rng.random())
            canvas[np.abs(distance) < 0.006] = _colour(rng, grey)
    if rng.random() < 0.5 * clutter:
        light = clouds(rng, x.shape[0], int(rng.integers(1, 4)))
        canvas = canvas * np.exp(rng.uniform(0.05, 0.35) * light)[..., None]
    for _ in range(rng.choice([0, 1, 1, 2, 3]) if rng.random() < clutter else 1):
        canvas = _blur(canvas)
    if rng.random() < 0.6 * clutter:
        noise = rng.standard_normal((*canvas.shape[:2], 1 if grey else 3), np.float32)
        canvas = canvas + rng.uniform(0.01, 0.08) * noise
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


def _blur(canvas: np.ndarray) -> np.ndarray:
    """Smooth with the binomial kernel (1, 2, 1) / 4 along both axes, edges repeated."""
    for axis in (0, 1):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(canvas, pad, mode="edge")
        n = canvas.shape[axis]
        low, mid, high = (wide.take(range(k, k + n), axis) for k in range(3))
        canvas = 0.25 * low + 0.5 * mid + 0.25 * high
    return canvas
