"""Generated rooms of Gaussians: what the embedded tiny base learned from. Numpy only.

A room is a pure function of its seed and its `Style`: floor, walls, doors, windows, rugs and
furniture, sampled by points on their surfaces. Each point becomes a flat Gaussian in its surface
with a colour, an opacity, a label, and the language vector of its class.

Two styles: `DAY` is what the base was pretrained on; `NIGHT` is the other domain of the adaptation
task. The rooms are the same, what differs is how they were captured:

    colour      dim light of another hue, with a cast of its own in every room
    opacity     thinner Gaussians: walls have 0.71 instead of 0.88, windows 0.12 instead of 0.29
    noise       displaced and unequal Gaussians, grain in the colours, floaters in the air
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scenesplat_lora.demo_base.furniture import (
    AT_WALLS,
    DENSITY,
    PIECES,
    Floats,
    Piece,
    Points,
    joined,
    rectangle,
)
from scenesplat_lora.scenes.scene import Scene

GRID_SIZE = 0.1  # metres, voxels that the base was made for
WIDTH = 32  # channels of the language vectors
HELD_OUT_SEED = 5  # of the rooms that the base's figures are measured on; never trained on
PLACES = 30  # places tried for a piece before it is left out
GAP = 0.08  # metres between two pieces, and between a piece and its wall, at least

# Class -> first colours, of which a piece has one, and second colour; 0..1.
COLOURS: dict[str, tuple[tuple[tuple[float, float, float], ...], tuple[float, float, float]]] = {
    "wall": (((0.93, 0.92, 0.88), (0.90, 0.85, 0.74), (0.84, 0.88, 0.90)), (0, 0, 0)),
    "floor": (((0.62, 0.45, 0.28), (0.52, 0.35, 0.20), (0.70, 0.55, 0.38)), (0, 0, 0)),
    "door": (((0.40, 0.24, 0.12), (0.30, 0.18, 0.10)), (0, 0, 0)),
    "window": (((0.62, 0.80, 0.96), (0.72, 0.86, 0.98)), (0, 0, 0)),
    "rug": (((0.66, 0.16, 0.18), (0.48, 0.18, 0.46), (0.16, 0.24, 0.52)), (0, 0, 0)),
    "table": (((0.80, 0.64, 0.42), (0.72, 0.54, 0.34)), (0.50, 0.36, 0.22)),
    "chair": (((0.16, 0.16, 0.18), (0.70, 0.20, 0.14), (0.20, 0.34, 0.50)), (0.30, 0.30, 0.32)),
    "sofa": (((0.36, 0.46, 0.34), (0.56, 0.52, 0.46), (0.26, 0.30, 0.40)), (0, 0, 0)),
    "bed": (((0.92, 0.92, 0.94), (0.66, 0.76, 0.90), (0.90, 0.78, 0.80)), (0.46, 0.32, 0.20)),
    "cabinet": (((0.58, 0.38, 0.22), (0.88, 0.87, 0.84)), (0, 0, 0)),
    "lamp": (((0.98, 0.90, 0.58), (0.96, 0.82, 0.46)), (0.20, 0.20, 0.20)),
    "plant": (((0.18, 0.50, 0.18), (0.30, 0.58, 0.22)), (0.62, 0.34, 0.22)),
}
CLASSES = tuple(COLOURS)
# Logit of the mean opacity, where it is not that of solid surfaces.
OPACITY = {"window": -1.0, "lamp": 0.6, "plant": 1.2}
SOLID = 2.2
GROUPS = (
    ("wall", "door", "window"), ("floor", "rug"), ("table", "cabinet"), ("chair", "sofa", "bed"),
    ("lamp", "plant"),
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How the rooms of one domain were captured.

    Attributes:
        hue: degrees by which colours are turned around the grey axis.
        light: brightness, 1 by day.
        cast: largest change of a room's channels, as a share.
        grain: standard deviation of every Gaussian's colour, 0..1.
        haze: added to the logits of opacity.
        jitter: standard deviation of positions, metres.
        spread: standard deviation of the logarithms of scales.
        floaters: Gaussians in the air without a class, as a share of the others.
    """

    hue: float
    light: float
    cast: float
    grain: float
    haze: float
    jitter: float
    spread: float
    floaters: float


DAY = Style(
    hue=0, light=1.0, cast=0.06, grain=0.04, haze=0, jitter=0.005, spread=0.25, floaters=0.0
)
NIGHT = Style(
    hue=50, light=0.65, cast=0.12, grain=0.08, haze=-1.2, jitter=0.02, spread=0.5, floaters=0.04
)


def text_vectors() -> NDArray[np.float32]:
    """Unit vectors [12, WIDTH] of the classes, as of a text tower: related words are closer.

    Each is a cosine of its own plus half of one that its group shares.
    """
    at = (np.arange(WIDTH) + 0.5) * math.pi / WIDTH
    cosines = [math.sqrt(2 / WIDTH) * np.cos(k * at) for k in range(1, WIDTH)]
    group = {name: number for number, names in enumerate(GROUPS) for name in names}
    vectors = [cosines[i] + 0.5 * cosines[-1 - group[name]] for i, name in enumerate(CLASSES)]
    return np.stack([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)


def held_out(count: int, style: Style = DAY) -> Iterator[Scene]:
    """The first rooms of the held-out set."""
    return (room((HELD_OUT_SEED, i, 0), style) for i in range(count))


def room(seed: int | Sequence[int], style: Style = DAY) -> Scene:
    """One room.

    Args:
        seed: anything `numpy.random.default_rng` takes; the same seed gives the same room, and
            furniture and walls are the same in every style.

    Returns:
        A scene as `scenesplat_lora.scenes.scene` describes it, with all arrays of Gaussians.
    """
    plan, look = np.random.default_rng(seed).spawn(2)
    built = _build(plan)
    return _captured(look, built, style)


# -- what is where ---------------------------------------------------------------------------------


@dataclass
class Built:
    """Surfaces of a room, part by part: points, class of each, and number of the object."""

    points: list[Points] = field(default_factory=list)
    segment: list[NDArray[np.int64]] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)  # x0 y0 x1 y1

    def add(self, points: Points, name: str) -> None:
        """One object of one class."""
        self.points.append(points)
        self.segment.append(np.full(len(points.coord), CLASSES.index(name)))

    def free(self, place: tuple[float, float, float, float]) -> bool:
        """Whether nothing stands there yet."""
        x0, y0, x1, y1 = place
        return all(
            x1 + GAP < a0 or a1 + GAP < x0 or y1 + GAP < b0 or b1 + GAP < y0
            for a0, b0, a1, b1 in self.taken
        )


def _build(rng: np.random.Generator) -> Built:
    """Floor, two to four walls, and furniture; the floor's centre is the origin."""
    w, d = rng.uniform(2.6, 3.6, 2)
    built = Built()
    _add_floor(rng, built, w, d)
    _add_walls(rng, built, w, d, rng.uniform(1.85, 2.05))
    wanted = rng.permutation(list(PIECES) * 2)[: rng.integers(4, 9)]
    for name in wanted:
        _place(rng, built, str(name), w, d)
    return built


def _add_floor(rng: np.random.Generator, built: Built, w: float, d: float) -> None:
    floor = rectangle(rng, (-w / 2, -d / 2, 0), (w, 0, 0), (0, d, 0))
    if rng.random() < 0.6:
        sides = rng.uniform(1.0, 1.7, 2)
        middle = rng.uniform(-0.25, 0.25, 2) * (w, d)
        x, y = (np.abs(floor.coord[:, :2] - middle) < sides / 2).T
        _split(built, floor, x & y, "floor/rug")
    else:
        built.add(floor, "floor")


def _add_walls(rng: np.random.Generator, built: Built, w: float, d: float, h: float) -> None:
    """Walls with a door, windows or neither; the cameras did not see all of the four."""
    corners = [(-w / 2, -d / 2), (w / 2, -d / 2), (w / 2, d / 2), (-w / 2, d / 2)]
    seen = rng.permutation(4)[: rng.integers(2, 5)]
    for number, side in enumerate(seen):
        (x0, y0), (x1, y1) = corners[side], corners[(side + 1) % 4]
        wall = rectangle(rng, (x0, y0, 0), (0, 0, h), (x1 - x0, y1 - y0, 0))  # the normal is inward
        length = math.hypot(x1 - x0, y1 - y0)
        along = np.hypot(wall.coord[:, 0] - x0, wall.coord[:, 1] - y0)
        height = wall.coord[:, 2]
        kind = "door" if number == 0 else str(rng.choice(["window", "window", "wall"]))
        size = rng.uniform(0.8, 0.95) if kind == "door" else rng.uniform(0.9, 1.3)
        start = rng.uniform(0.15, length - size - 0.15)
        low, high = (0, 1.75) if kind == "door" else (0.75, rng.uniform(1.5, 1.7))
        inside = (along > start) & (along < start + size) & (height >= low) & (height < high)
        if kind == "wall":
            built.add(wall, "wall")
        else:
            _split(built, wall, inside, f"wall/{kind}")


def _split(built: Built, points: Points, inside: NDArray[np.bool_], names: str) -> None:
    """Add a surface as two objects "outer/inner"."""
    for name, rows in zip(names.split("/"), (~inside, inside), strict=True):
        if rows.any():
            built.add(Points(points.coord[rows], points.normal[rows], points.tone[rows]), name)


def _place(rng: np.random.Generator, built: Built, name: str, w: float, d: float) -> None:
    """Put a piece where there is room; leave it out if there is none."""
    piece: Piece = PIECES[name](rng)
    for _ in range(PLACES):
        quarter = int(rng.integers(4))
        sx, sy = piece.sides if quarter % 2 == 0 else piece.sides[::-1]
        reach = np.array([w - sx, d - sy]) / 2 - GAP
        if (reach < 0).any():
            continue
        middle = rng.uniform(-reach, reach)
        if name in AT_WALLS:  # turned by a quarter its back is at +x, then +y, then -x
            axis, sign = ((1, -1), (0, 1), (1, 1), (0, -1))[quarter]
            middle[axis] = sign * reach[axis]
        half = np.array([sx, sy]) / 2
        place = (*(middle - half), *(middle + half))
        if built.free(place):
            built.taken.append(place)
            built.add(_moved(piece.points, quarter, middle), name)
            return


def _moved(points: Points, quarter: int, middle: Floats) -> Points:
    """Turned to the left by quarters of a full turn, then shifted along the floor."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter]
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], float)
    coord = points.coord @ turn.T + (*middle, 0)
    return Points(coord, points.normal @ turn.T, points.tone)


# -- how it was captured ---------------------------------------------------------------------------


def _captured(rng: np.random.Generator, built: Built, style: Style) -> Scene:
    """The Gaussians of a room's surfaces, and floaters."""
    points, segment = joined(built.points), np.concatenate(built.segment)
    instance = np.repeat(np.arange(len(built.segment)), [len(s) for s in built.segment])
    count = len(segment)
    color = _light(rng, _colours(rng, segment, instance, points.tone), style)
    logit = np.array([OPACITY.get(name, SOLID) for name in CLASSES])[segment]
    logit = logit + style.haze + rng.normal(0, 0.7, count)
    spacing = 0.6 / math.sqrt(DENSITY)
    scale = spacing * np.exp(rng.normal(0, style.spread, (count, 3))) * (1, 1, 0.15)
    features, valid = _language(rng, segment, instance)
    scene: Scene = {
        "coord": points.coord + rng.normal(0, style.jitter, (count, 3)),
        "color": np.clip(color * 255, 0, 255),
        "opacity": 1 / (1 + np.exp(-logit[:, None])),
        "scale": scale,
        "quat": _quaternions(rng, points.normal),
        "normal": points.normal,
        "segment": segment,
        "instance": instance,
        "lang_feat": features,
        "valid_feat_mask": valid,
    }
    return _typed(_with_floaters(rng, scene, style.floaters))


def _colours(
    rng: np.random.Generator,
    segment: NDArray[np.int64],
    instance: NDArray[np.int64],
    tone: NDArray[np.int64],
) -> Floats:
    """[N, 3] 0..1 by daylight: every object has its own, a little unevenly."""
    color = np.empty((len(segment), 3))
    walls = rng.integers(100)  # one paint for all walls of a room
    for number in range(int(instance.max()) + 1):
        rows = np.flatnonzero(instance == number)
        name = CLASSES[segment[rows[0]]]
        first, second = COLOURS[name]
        chosen = first[(walls if name == "wall" else rng.integers(100)) % len(first)]
        shade = rng.normal(0, 0.02, 3)
        color[rows] = np.where(tone[rows, None] == 0, chosen, second) + shade
    return color


def _light(rng: np.random.Generator, color: Floats, style: Style) -> Floats:
    """What the cameras made of the colours [N, 3]."""
    cast = 1 + rng.uniform(-style.cast, style.cast, 3)
    seen = color @ hue_rotation(style.hue).T * style.light * cast
    return seen + rng.normal(0, style.grain, color.shape)


def hue_rotation(degrees: float) -> Floats:
    """[3, 3], rotation of colours around (1, 1, 1); Rodrigues' formula."""
    angle = math.radians(degrees)
    axis = np.full(3, math.sqrt(1 / 3))
    cross = np.cross(np.eye(3), axis)
    return (
        math.cos(angle) * np.eye(3)
        + math.sin(angle) * cross
        + (1 - math.cos(angle)) * np.outer(axis, axis)
    )


def _quaternions(rng: np.random.Generator, normal: Floats) -> Floats:
    """(w, x, y, z) [N, 4], w >= 0: a random turn about z, then the shortest that takes z to n."""
    x, y, z = normal.T
    shortest = np.stack([1 + z, -y, x, np.zeros(len(z))], axis=1)
    shortest[1 + z < 1e-12] = (0, 1, 0, 0)  # half a turn: there is no shortest one
    shortest /= np.linalg.norm(shortest, axis=1, keepdims=True)
    half = rng.uniform(-math.pi / 2, math.pi / 2, len(z))
    c, s = np.cos(half), np.sin(half)
    w, a, b, _ = shortest.T
    quat = np.stack([w * c, a * c + b * s, b * c - a * s, w * s], axis=1)
    return np.where(quat[:, :1] < 0, -quat, quat)


def _language(
    rng: np.random.Generator, segment: NDArray[np.int64], instance: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Unit vectors [N, WIDTH] near those of the classes, and which rows have one.

    As from pictures: every object differs a little from its word, every Gaussian from its object,
    and what no camera saw well has none.
    """
    own = rng.normal(0, 0.3 / math.sqrt(WIDTH), (int(instance.max()) + 1, WIDTH))
    noise = rng.normal(0, 0.2 / math.sqrt(WIDTH), (len(segment), WIDTH))
    vectors = text_vectors()[segment] + own[instance] + noise
    valid = rng.random(len(segment)) < 0.93
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * valid[:, None], valid


def _with_floaters(rng: np.random.Generator, scene: Scene, share: float) -> Scene:
    """Add Gaussians in the air; they look like any other and have neither class nor feature."""
    count = int(share * len(scene["coord"]))
    rows = rng.integers(len(scene["coord"]), size=count)
    more = {name: value[rows].copy() for name, value in scene.items()}
    low, high = scene["coord"].min(0), scene["coord"].max(0)
    more["coord"] = rng.uniform(low, high, (count, 3))
    more["segment"][:] = more["instance"][:] = -1
    more["lang_feat"][:] = 0
    more["valid_feat_mask"][:] = False
    return {name: np.concatenate([scene[name], more[name]]) for name in scene}


def _typed(scene: Scene) -> Scene:
    special = {
        "segment": np.int32,
        "instance": np.int32,
        "lang_feat": np.float16,
        "valid_feat_mask": np.bool_,
    }
    return {name: value.astype(special.get(name, np.float32)) for name, value in scene.items()}
