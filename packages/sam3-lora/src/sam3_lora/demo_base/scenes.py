"""Generated scenes with phrases that name their objects: what the embedded tiny base learned from.

A scene is a pure function of its seed and its `Style`. Objects have a shape, a colour, a size and
a surface; a phrase is any of these words before a noun: "red circle", "small square", "striped
shape". Every object that a phrase describes is an answer, and a phrase that describes none is a
true negative. Objects hardly touch each other, so masks and boxes are exact. Numpy only.

Three styles: `EASY` and `FULL` are what the base was pretrained on; `SHIFTED` is the other domain
of the adaptation task. It differs in

    backgrounds     checks, weave and stripes with colours of their own, instead of grey clouds
    colours         a cast of the light, less saturation and contrast, shading across objects
    noise           strong and coarse, lines across the picture
    shapes          turned by any angle, stretched, with rims, and of a wider range of sizes
    phrases         two adjectives, "small red circle": words that the base knows, never seen
                    together
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

SIZE = 112  # pixels, side of the pictures that the base was made for

COLOURS = {
    "red": (0.86, 0.13, 0.13),
    "green": (0.13, 0.66, 0.18),
    "blue": (0.14, 0.27, 0.88),
    "yellow": (0.93, 0.84, 0.13),
    "purple": (0.60, 0.16, 0.72),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
SURFACES = ("plain", "striped", "dotted")  # "plain" is never asked for
ANY = "shape"  # the noun that names every object

ADJECTIVES = (*COLOURS, *SIZES, *SURFACES[1:])
NOUNS = (*SHAPES, ANY)
PHRASES = (*SHAPES, *(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS))
PAIRS = tuple(  # two adjectives of different kinds, in the usual order of English
    f"{first} {second} {noun}"
    for kinds in ((SIZES, SURFACES[1:]), (SIZES, tuple(COLOURS)), (SURFACES[1:], tuple(COLOURS)))
    for first in kinds[0]
    for second in kinds[1]
    for noun in NOUNS
)

HELD_OUT_SEED = 3  # of the scenes that the base's figures are measured on; never trained on
PLACES = 40  # places tried for an object before it is left out
GAP = 2  # pixels between two objects, at least

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Style:
    """What the scenes of one domain look like.

    Attributes:
        objects: fewest and most.
        radius: smallest and largest of each size word, as a share of the side.
        turn: largest angle that a shape is turned by, in degrees.
        stretch: least ratio of the two axes of a shape.
        contrast: 0..1, how far colours stand out from the background.
        cast: strength of the coloured light, 0..1.
        noise: largest standard deviation, 0..1.
        clutter: 0..1, strength of the background's texture.
        pattern: backgrounds are coloured patterns, not grey clouds.
    """

    objects: tuple[int, int]
    radius: dict[str, tuple[float, float]]
    turn: float
    stretch: float
    contrast: float
    cast: float
    noise: float
    clutter: float
    pattern: bool


EASY = Style(
    objects=(1, 2), radius={"small": (0.11, 0.13), "large": (0.19, 0.23)}, turn=10, stretch=1.0,
    contrast=1.0, cast=0.0, noise=0.02, clutter=0.1, pattern=False,
)  # fmt: skip
FULL = Style(
    objects=(1, 5), radius={"small": (0.10, 0.13), "large": (0.18, 0.24)}, turn=20, stretch=0.85,
    contrast=0.9, cast=0.1, noise=0.06, clutter=0.5, pattern=False,
)  # fmt: skip
SHIFTED = Style(
    objects=(2, 6), radius={"small": (0.09, 0.13), "large": (0.17, 0.26)}, turn=180, stretch=0.65,
    contrast=0.6, cast=0.5, noise=0.14, clutter=1.0, pattern=True,
)  # fmt: skip


@dataclass
class Thing:
    """One object of a scene.

    Attributes:
        shape, colour, size, surface: the words that describe it.
        mask: bool [S, S].
    """

    shape: str
    colour: str
    size: str
    surface: str
    mask: Mask

    @property
    def words(self) -> frozenset[str]:
        return frozenset((self.shape, self.colour, self.size, self.surface, ANY))

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in pixels; x1 and y1 are behind the last one."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(cx, cy, w, h) as shares of the side."""
        x0, y0, x1, y1 = self.corners
        side = 2 * len(self.mask)
        return (x0 + x1) / side, (y0 + y1) / side, 2 * (x1 - x0) / side, 2 * (y1 - y0) / side


@dataclass
class Scene:
    """A picture uint8 [S, S, 3] and what is in it."""

    image: NDArray[np.uint8]
    things: list[Thing]

    def answers(self, phrase: str) -> list[int]:
        """Which things a phrase describes; none: the phrase is a true negative."""
        wanted = set(phrase.split())
        return [i for i, thing in enumerate(self.things) if wanted <= thing.words]


def held_out(count: int, style: Style = FULL) -> Iterator[Scene]:
    """The first scenes of the held-out set."""
    return (scene((HELD_OUT_SEED, i, 0), style) for i in range(count))


def scene(seed: int | Sequence[int], style: Style = FULL, size: int = SIZE) -> Scene:
    """Paint one scene.

    Args:
        seed: anything `numpy.random.default_rng` takes; the same seed gives the same scene.
        style: which kind of scene.
        size: side in pixels.
    """
    rng = np.random.default_rng(seed)
    canvas = _background(rng, style, size)
    taken = np.zeros((size, size), bool)
    things: list[Thing] = []
    for _ in range(rng.integers(style.objects[0], style.objects[1] + 1)):
        thing = _place(rng, canvas, taken, style)
        if thing is not None:
            things.append(thing)
    return Scene(_camera(rng, canvas, style), things)


# -- objects -------------------------------------------------------------------------------------


def _place(
    rng: np.random.Generator, canvas: Image, taken: NDArray[np.bool_], style: Style
) -> Thing | None:
    """Paint an object where there is room, in place; None if there is none."""
    size = len(canvas)
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    length, surface = str(rng.choice(SIZES)), str(rng.choice(SURFACES))
    radius = size * rng.uniform(*style.radius[length])
    angle = math.radians(rng.uniform(-style.turn, style.turn))
    stretch = rng.uniform(style.stretch, 1)
    reach = math.ceil(1.2 * radius) + 1
    for _ in range(PLACES):
        cx, cy = rng.uniform(radius, size - radius, 2)
        x0, y0 = max(0, int(cx) - reach), max(0, int(cy) - reach)
        here = slice(y0, int(cy) + reach + 1), slice(x0, int(cx) + reach + 1)
        if not taken[here].mean() < 0.25:
            continue
        y, x = np.mgrid[here[0].start : min(size, here[0].stop), x0 : min(size, here[1].stop)]
        dx, dy = (x + 0.5 - cx) / radius, (y + 0.5 - cy) / radius
        u = math.cos(angle) * dx + math.sin(angle) * dy
        v = (math.cos(angle) * dy - math.sin(angle) * dx) / stretch
        away = _OUTLINES[shape](u, v)  # below 1 inside, and about linear in the distance
        if (taken[here] & (away < 1 + GAP / radius)).any():
            continue
        inside = away < 1
        _paint(rng, canvas[here], inside, (u, v), radius, colour, surface, style)
        mask = np.zeros((size, size), bool)
        mask[here] = inside
        taken |= mask
        return Thing(shape, colour, length, surface, mask)
    return None


def _circle(u: NDArray, v: NDArray) -> NDArray:
    return np.hypot(u, v)


def _square(u: NDArray, v: NDArray) -> NDArray:
    return np.maximum(np.abs(u), np.abs(v)) / 0.86


def _triangle(u: NDArray, v: NDArray) -> NDArray:
    """Equilateral, point upwards: the largest distance along the three sides' normals."""
    v = v - 0.2
    slanted = 0.5 * math.sqrt(3) * np.abs(u) - 0.5 * v
    return np.maximum(v, slanted) / 0.56


def _cross(u: NDArray, v: NDArray) -> NDArray:
    """Two bars, each a third as wide as long."""
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a, b / 0.34), np.maximum(b, a / 0.34)) / 0.98


_OUTLINES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def _paint(
    rng: np.random.Generator,
    canvas: Image,
    inside: NDArray[np.bool_],
    place: tuple[NDArray, NDArray],
    radius: float,
    colour: str,
    surface: str,
    style: Style,
) -> None:
    """Colour the pixels inside, in place.

    Args:
        place: (u, v), about -1..1 inside the object.
        radius: in pixels.
    """
    u, v = place
    bright = rng.uniform(0.85, 1.0) * (1 - 0.3 * rng.random() * style.cast)
    pure = np.array(COLOURS[colour]) + rng.normal(0, 0.03, 3)
    grey = 1 - style.contrast
    light = pure * bright * (1 - 0.5 * grey) + 0.5 * grey * pure.mean()
    tone = np.ones_like(u)
    if surface == "striped":
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 8) / radius
        along = math.cos(angle) * u + math.sin(angle) * v + rng.random()
        tone = np.where(along % period < 0.45 * period, 0.35, 1.0)
    elif surface == "dotted":
        period = rng.uniform(6.5, 8) / radius
        tone = np.where(
            np.hypot(u % period - period / 2, v % period - period / 2) < 0.3 * period, 0.2, 1.0
        )
    if style.cast and rng.random() < 0.5:  # light from one side
        side = rng.uniform(0, 2 * np.pi)
        slope = np.clip(math.cos(side) * u + math.sin(side) * v, -1, 1)
        tone = tone * (1 + 0.5 * style.cast * slope)
    canvas[inside] = (light * tone[..., None])[inside]


# -- everything around them ------------------------------------------------------------------------


@cache
def _grid(size: int) -> tuple[Image, Image]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return x, y


def _background(rng: np.random.Generator, style: Style, size: int) -> Image:
    """Grey clouds, a slope or grain; with `pattern` coloured checks, stripes or weave."""
    x, y = _grid(size)
    base = np.full(3, rng.uniform(0.2, 0.62)) + rng.normal(0, 0.02, 3)
    angle = rng.uniform(0, np.pi)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    strength = style.clutter * rng.uniform(0.04, 0.2)
    if style.pattern:
        kind, cells = rng.integers(3), rng.uniform(4, 12)
        waves = np.sin(np.pi * cells * along), np.sin(np.pi * cells * across)
        wave = (np.sign(waves[0] * waves[1]), waves[0], np.maximum(*waves))[kind]
        tint = rng.uniform(-1, 1, 3)
        base = base + rng.uniform(-0.15, 0.15, 3)
    else:
        wave = (clouds(rng, size, int(rng.integers(2, 16))), 2 * along - 1)[rng.integers(2)]
        tint = np.ones(3)
    return (base + strength * wave[..., None] * tint).astype(np.float32)


def clouds(rng: np.random.Generator, size: int, cells: int) -> Image:
    """Smooth noise [size, size]: a random grid of `cells` nodes, bilinearly enlarged."""
    nodes = rng.standard_normal((cells + 1, cells + 1), np.float32)
    at = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    low = at.astype(int)
    part = at - low
    rows = nodes[low] * (1 - part)[:, None] + nodes[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _camera(rng: np.random.Generator, canvas: Image, style: Style) -> NDArray[np.uint8]:
    """Lines, coloured light, noise and rounding."""
    size = len(canvas)
    if style.pattern and rng.random() < 0.5:
        x, y = _grid(size)
        for _ in range(rng.integers(1, 4)):
            angle = rng.uniform(0, np.pi)
            distance = np.cos(angle) * (x - rng.random()) + np.sin(angle) * (y - rng.random())
            canvas[np.abs(distance) < 0.005] = rng.uniform(0.1, 0.9)
    light = 1 + style.cast * rng.uniform(-0.5, 0.15, 3)
    noise = rng.standard_normal((size, size, 3), np.float32)
    canvas = canvas * light.astype(np.float32) + rng.uniform(0, style.noise) * noise
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
