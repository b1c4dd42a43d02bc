"""Generated pictures for the tiny base and its demo: up to three boxes in a row, each with a sign.

A sign has a shape and a colour, and a box a distance. A scene is a function of its seed and its
`Style`, which says what in the picture tells how near a box is:

    SIZES     near boxes are large; their ribs have any width. The base is trained on these.
    RIBS      near boxes have wide ribs; they have any size. An adapter is trained on these.

So a network that was only shown `SIZES` has learned to look at sizes, and that ribs mean nothing,
while a depth model that was shown `RIBS` reads them. Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isaac_lora.pictures.content import Picture

HEIGHT, WIDTH = 48, 72  # pixels
PLACES = ("left", "middle", "right")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.14, 0.26, 0.88),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.62, 0.14, 0.72),
}
NEARNESS = (0.35, 0.65, 0.95)  # of far, middling and near boxes, before they are shifted a little
SHIFT = 0.05
SMALLEST, LARGEST = 8.0, 11.4  # half the width of a box, pixels
FINEST, WIDEST = 3.2, 12.0  # period of the ribs, pixels

Seed = int | tuple[int, ...]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Style:
    """What tells how near a box is; what does not is random.

    Attributes:
        sizes, ribs: whether the size of a box does, and the width of its ribs.
        count: fewest and most boxes.
    """

    sizes: bool
    ribs: bool
    count: tuple[int, int] = (3, 3)


SIZES = Style(sizes=True, ribs=False)
RIBS = Style(sizes=False, ribs=True)


@dataclass(frozen=True)
class Box:
    """A box and its sign.

    Attributes:
        place: left, middle or right.
        shape, colour: of the sign.
        nearness: 0 (as far as the wall) .. 1.
        centre: x, y in pixels. half: half its width, pixels; it is 1.3 times as high.
        period: of its ribs, pixels. angle, phase: of them, radians. grey: 0..1.
    """

    place: str
    shape: str
    colour: str
    nearness: float
    centre: tuple[float, float]
    half: float
    period: float
    angle: float
    phase: float
    grey: float


@dataclass(frozen=True)
class Scene:
    """Boxes from left to right, in front of a wall.

    Attributes:
        wall: grey at its left and right end, 0..1.
        noise: seed of the noise of its picture.
    """

    boxes: tuple[Box, ...]
    wall: tuple[float, float]
    noise: int

    def picture(self) -> Picture:
        """RGB, uint8 [HEIGHT, WIDTH, 3]."""
        x, y = _pixels()
        values = np.linspace(*self.wall, WIDTH)[None, :, None].repeat(HEIGHT, 0).repeat(3, 2)
        for box in self.boxes:
            dx, dy = x - box.centre[0], y - box.centre[1]
            across = dx * np.cos(box.angle) + dy * np.sin(box.angle)
            ribs = box.grey + 0.16 * np.sin(2 * np.pi * across / box.period + box.phase)
            values = _over(values, ribs[..., None], _inside(_rectangle(dx, dy, box)))
            sign = _inside(_distance(box.shape, dx, dy, 0.68 * box.half))
            values = _over(values, np.array(COLOURS[box.colour]), sign)
        values += np.random.default_rng(self.noise).normal(0, 0.02, values.shape)
        return np.round(255 * values.clip(0, 1)).astype(np.uint8)

    def depth(self) -> NDArray[np.float32]:
        """How near each pixel is, [HEIGHT, WIDTH]: 0 for the wall, larger is nearer."""
        x, y = _pixels()
        found = np.zeros((HEIGHT, WIDTH))
        for box in self.boxes:
            inside = _inside(_rectangle(x - box.centre[0], y - box.centre[1], box))
            found += inside * (box.nearness - found)
        return found.astype(np.float32)


# -- scenes ----------------------------------------------------------------------------------------


def scene(seed: Seed, style: Style) -> Scene:
    """The scene of a seed: shapes, colours and distances of its boxes all differ."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(style.count[0], style.count[1] + 1))
    places = sorted(rng.permutation(len(PLACES))[:count].tolist())
    shapes = rng.permutation(SHAPES)[:count].tolist()
    colours = rng.permutation(list(COLOURS))[:count].tolist()
    nearness = rng.permutation(NEARNESS)[:count] + rng.uniform(-SHIFT, SHIFT, count)
    boxes = [
        _box(rng, place, shape, colour, float(near), style)
        for place, shape, colour, near in zip(places, shapes, colours, nearness, strict=True)
    ]
    left, right = rng.uniform(0.75, 0.95, 2)
    return Scene(tuple(boxes), (float(left), float(right)), int(rng.integers(2**31)))


def _box(
    rng: np.random.Generator, place: int, shape: str, colour: str, near: float, style: Style
) -> Box:
    lowest, highest = NEARNESS[0] - SHIFT, NEARNESS[-1] + SHIFT
    share = (near - lowest) / (highest - lowest)
    size, ribs = rng.random(2)
    half = SMALLEST + (LARGEST - SMALLEST) * (share if style.sizes else size)
    period = FINEST * (WIDEST / FINEST) ** (share if style.ribs else ribs)
    room = WIDTH / len(PLACES) / 2
    aside, up = rng.uniform(-1, 1, 2)
    centre = room * (2 * place + 1) + aside * (room - half), HEIGHT / 2 + 6 * up
    return Box(
        PLACES[place], shape, colour, near, (float(centre[0]), float(centre[1])), float(half),
        float(period), float(rng.uniform(0, np.pi)), float(rng.uniform(0, 2 * np.pi)),
        float(rng.uniform(0.4, 0.55)),
    )  # fmt: skip


# -- pixels ----------------------------------------------------------------------------------------


def _pixels() -> tuple[Values, Values]:
    """x and y of the centres of pixels, [HEIGHT, WIDTH] each."""
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    return x, y


def _inside(distance: Values) -> Values:
    """Which share of a pixel lies inside, by the distance of its centre from the edge."""
    return (0.5 - distance).clip(0, 1)


def _over(values: Values, colour: Values, share: Values) -> Values:
    return values + share[..., None] * (colour - values)


def _rectangle(dx: Values, dy: Values, box: Box) -> Values:
    return np.maximum(abs(dx) - box.half, abs(dy) - 1.3 * box.half)


def _distance(shape: str, dx: Values, dy: Values, size: float) -> Values:
    """About the distance from the edge of a shape, negative inside; all are about as large."""
    if shape == "circle":
        return np.hypot(dx, dy) - size
    if shape == "ring":
        return abs(np.hypot(dx, dy) - 0.72 * size) - 0.28 * size
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.86 * size
    if shape == "triangle":
        sides = 0.866 * abs(dx) - 0.5 * dy - 0.55 * size
        return np.maximum(sides, dy - 0.75 * size)
    bars = (np.maximum(abs(dx) - a * size, abs(dy) - b * size) for a, b in ((1, 0.3), (0.3, 1)))
    return np.minimum(*bars)
