"""Objects of generated scenes: furniture, which the tiny base knows, and vehicles and trees.

Every function makes one object of random proportions: it stands on y = 0, its middle is at
x = z = 0, its front faces +z, and it is about one unit large. Parts touch and hardly overlap.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from midi3d_lora.demo_base.solids import Part, Solid, on_its_side

Random = np.random.Generator


def box(x: float, y: float, z: float, at: tuple[float, float, float]) -> Part:
    """A box with these half extents on the point `at`, the middle of its lower face."""
    return Part("box", (x, y, z), np.array([at[0], at[1] + y, at[2]]))


def frustum(half: float, below: float, above: float, at: tuple[float, float, float]) -> Part:
    """A frustum on the point `at`."""
    return Part("frustum", (half, below, above), np.array([at[0], at[1] + half, at[2]]))


def ball(radius: float, at: tuple[float, float, float]) -> Part:
    """A ball on the point `at`."""
    return Part("ball", (radius,), np.array([at[0], at[1] + radius, at[2]]))


def wheel(radius: float, half: float, x: float, z: float) -> Part:
    """A wheel that stands at (x, 0, z) and rolls along x."""
    return Part("frustum", (half, radius, radius), np.array([x, radius, z]), on_its_side("z"))


def corners(x: float, z: float) -> list[tuple[float, float]]:
    """The four (±x, ±z)."""
    return [(i * x, k * z) for i in (-1, 1) for k in (-1, 1)]


# -- furniture -------------------------------------------------------------------------------------


def table(rng: Random) -> list[Part]:
    """A plate on four legs."""
    x, z, height = rng.uniform(0.35, 0.6), rng.uniform(0.25, 0.4), rng.uniform(0.45, 0.7)
    leg, plate = rng.uniform(0.055, 0.08), rng.uniform(0.04, 0.06)
    legs = [box(leg, height / 2, leg, (i, 0, k)) for i, k in corners(x - leg, z - leg)]
    return [*legs, box(x, plate, z, (0, height, 0))]


def chair(rng: Random) -> list[Part]:
    """A seat on four legs, with a back at -z."""
    x, z, height = rng.uniform(0.22, 0.3), rng.uniform(0.22, 0.3), rng.uniform(0.35, 0.5)
    leg, seat, back = rng.uniform(0.05, 0.07), rng.uniform(0.04, 0.06), rng.uniform(0.2, 0.35)
    legs = [box(leg, height / 2, leg, (i, 0, k)) for i, k in corners(x - leg, z - leg)]
    rest = box(x, back, 0.055, (0, height + 2 * seat, 0.055 - z))
    return [*legs, box(x, seat, z, (0, height, 0)), rest]


def stool(rng: Random) -> list[Part]:
    """A round seat on one leg with a foot."""
    radius, height = rng.uniform(0.22, 0.34), rng.uniform(0.3, 0.6)
    leg = rng.uniform(0.06, 0.1)
    return [
        frustum(0.04, 0.8 * radius, 0.7 * radius, (0, 0, 0)),
        frustum(height / 2, leg, leg, (0, 0.08, 0)),
        frustum(0.04, radius, radius, (0, height + 0.08, 0)),
    ]


def cabinet(rng: Random) -> list[Part]:
    """A box, and a smaller one on it."""
    x, y, z = rng.uniform(0.2, 0.45), rng.uniform(0.25, 0.5), rng.uniform(0.15, 0.28)
    parts = [box(x, y, z, (0, 0, 0))]
    if rng.random() < 0.5:
        parts.append(box(0.6 * x, 0.35 * y, 0.8 * z, (0, 2 * y, 0)))
    return parts


def lamp(rng: Random) -> list[Part]:
    """A foot, a pole and a shade."""
    height, shade = rng.uniform(0.6, 0.9), rng.uniform(0.18, 0.28)
    pole = rng.uniform(0.045, 0.06)
    return [
        frustum(0.04, 0.2, 0.16, (0, 0, 0)),
        frustum(height / 2, pole, pole, (0, 0.08, 0)),
        frustum(rng.uniform(0.1, 0.16), shade, 0.6 * shade, (0, height + 0.08, 0)),
    ]


def vase(rng: Random) -> list[Part]:
    """Two frustums, wide in the middle."""
    foot, belly, neck = rng.uniform(0.1, 0.18), rng.uniform(0.2, 0.32), rng.uniform(0.08, 0.16)
    low, high = rng.uniform(0.12, 0.25), rng.uniform(0.12, 0.3)
    return [frustum(low, foot, belly, (0, 0, 0)), frustum(high, belly, neck, (0, 2 * low, 0))]


def sofa(rng: Random) -> list[Part]:
    """A seat, a back at -z and two arms."""
    x, z, seat = rng.uniform(0.4, 0.6), rng.uniform(0.22, 0.3), rng.uniform(0.12, 0.18)
    arm = rng.uniform(0.05, 0.08)
    arms = [box(arm, 1.6 * seat, z, (i * (x + arm), 0, 0)) for i in (-1, 1)]
    return [box(x, seat, z, (0, 0, 0)), *arms, box(x, seat, 0.08, (0, 2 * seat, 0.08 - z))]


def blocks(rng: Random) -> list[Part]:
    """One to three solids on each other, so that the base has seen every kind and proportion."""
    parts, height = [], 0.0
    for _ in range(rng.integers(1, 4)):
        wide, half = rng.uniform(0.12, 0.4), rng.uniform(0.08, 0.25)
        at = (0.0, height, 0.0)
        kind = rng.integers(4)
        if kind == 0:
            parts.append(box(wide, half, rng.uniform(0.12, 0.4), at))
        elif kind == 1:
            parts.append(frustum(half, wide, rng.uniform(0.3, 1.0) * wide, at))
        elif kind == 2:
            half = rng.uniform(0.12, 0.28)
            parts.append(ball(half, at))
        else:
            tube = rng.uniform(0.06, 0.12)
            parts.append(Part("ring", (wide, tube), np.array([0, height + tube, 0])))
            half = tube
        height += 2 * half
    return parts


# -- outdoors --------------------------------------------------------------------------------------


def car(rng: Random) -> list[Part]:
    """A body on four wheels, with a cabin."""
    x, y, z = rng.uniform(0.42, 0.6), rng.uniform(0.09, 0.13), rng.uniform(0.2, 0.27)
    radius = rng.uniform(0.11, 0.16)
    wheels = [wheel(radius, 0.05, i, k) for i, k in corners(0.62 * x, z + 0.05)]
    roof = box(rng.uniform(0.4, 0.6) * x, y, 0.85 * z, (rng.uniform(-0.2, 0.2) * x, radius + y, 0))
    return [box(x, y, z, (0, radius - y, 0)), roof, *wheels]


def truck(rng: Random) -> list[Part]:
    """A cabin in front of a load, on six wheels."""
    z, radius, load = rng.uniform(0.2, 0.26), rng.uniform(0.1, 0.14), rng.uniform(0.3, 0.45)
    height, cabin = rng.uniform(0.2, 0.32), rng.uniform(0.12, 0.17)
    middle = load + cabin
    wheels = [wheel(radius, 0.05, x, k) for x in (-middle + 0.15, 0.1, middle - 0.14)
              for k in (-z, z)]  # fmt: skip
    front = box(cabin, 0.7 * height, z, (load, radius, 0))
    return [box(load, height, z, (-cabin, radius, 0)), front, *wheels]


def tree(rng: Random) -> list[Part]:
    """A trunk with a round crown."""
    trunk, crown = rng.uniform(0.15, 0.3), rng.uniform(0.22, 0.34)
    thick = rng.uniform(0.05, 0.08)
    return [
        frustum(trunk, 1.3 * thick, thick, (0, 0, 0)),
        ball(crown, (0, 2 * trunk - 0.05, 0)),
        ball(0.7 * crown, (0, 2 * trunk + 1.2 * crown, 0)),
    ]


def fir(rng: Random) -> list[Part]:
    """A trunk with two cones."""
    trunk, wide, half = rng.uniform(0.08, 0.15), rng.uniform(0.24, 0.36), rng.uniform(0.18, 0.26)
    return [
        frustum(trunk, 0.06, 0.06, (0, 0, 0)),
        frustum(half, wide, 0.4 * wide, (0, 2 * trunk, 0)),
        frustum(half, 0.75 * wide, 0.0, (0, 2 * trunk + 2 * half, 0)),
    ]


def tower(rng: Random) -> list[Part]:
    """A round house under a pointed roof, with a gallery around it."""
    radius, half = rng.uniform(0.15, 0.24), rng.uniform(0.25, 0.4)
    roof, tube = rng.uniform(0.15, 0.25), rng.uniform(0.04, 0.06)
    return [
        frustum(half, radius, 0.85 * radius, (0, 0, 0)),
        Part("ring", (0.95 * radius, tube), np.array([0, 1.5 * half, 0])),
        frustum(roof, 1.25 * radius, 0.0, (0, 2 * half, 0)),
    ]


FURNITURE: dict[str, Callable[[Random], list[Part]]] = {
    "table": table, "chair": chair, "stool": stool, "cabinet": cabinet, "lamp": lamp,
    "vase": vase, "sofa": sofa, "blocks": blocks,
}  # fmt: skip
OUTDOORS: dict[str, Callable[[Random], list[Part]]] = {
    "car": car, "truck": truck, "tree": tree, "fir": fir, "tower": tower,
}  # fmt: skip


def make(name: str, rng: Random) -> Solid:
    """One object by its name."""
    return Solid(name, tuple((FURNITURE | OUTDOORS)[name](rng)))
