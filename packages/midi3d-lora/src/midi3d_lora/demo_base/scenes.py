"""Generated scenes of solids: what the embedded tiny base learned from. Numpy only.

A scene is a pure function of its seed and its `Style`: objects side by side on one floor, at random
depths and angles, in the frame that `midi3d-lora prepare` gives to meshes. Distances to the
surfaces are exact, so that the field of every object is known everywhere.

Two styles: `INDOORS`, furniture, is what the base was pretrained on; `OUTDOORS`, vehicles and
trees, is the other domain of the adaptation task. The autoencoder was trained on the objects of
both and the transformer and its encoder on those of the first: as in MIDI-3D, whose autoencoder
knows more shapes than its scenes show, and a LoRA adapts the transformer alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midi3d_lora.demo_base import objects
from midi3d_lora.demo_base.solids import Solid
from midi3d_lora.meshes.mesh_loading import Mesh
from midi3d_lora.meshes.render import Camera, Render, render
from midi3d_lora.scenes.scene_frame import fit_frame

IMAGE_SIZE = 64  # pixels, side of the pictures that the base was made for
NUM_TOKENS = 64  # of an object's latents; equals the transformer's width, as in the released model
NUM_POINTS = 2048  # of an object's surface
GAP = 0.06  # units between two objects along x
SEEN = 0.01  # least share of the pixels that an object takes
HELD_OUT_SEED = 9  # of the scenes that the base's figures are measured on; never trained on

Seed = int | Sequence[int]


@dataclass(frozen=True)
class Style:
    """What the scenes of one domain hold.

    Attributes:
        kinds: names of objects.
        count: fewest and most objects.
        angle: radians, largest by which an object is turned around y.
        depth: how far apart along z objects may be, in units of one object.
    """

    kinds: tuple[str, ...]
    count: tuple[int, int]
    angle: float
    depth: float


INDOORS = Style(tuple(objects.FURNITURE), count=(1, 3), angle=0.4, depth=0.8)
OUTDOORS = Style(tuple(objects.OUTDOORS), count=(1, 3), angle=0.4, depth=0.8)
ALL = Style((*INDOORS.kinds, *OUTDOORS.kinds), count=(1, 3), angle=0.4, depth=0.8)


@dataclass(frozen=True, eq=False)
class Scene:
    """Objects in one frame, y up, largest half-extent 0.95.

    Attributes:
        solids: from left to right.
    """

    solids: tuple[Solid, ...]

    def __len__(self) -> int:
        return len(self.solids)

    def meshes(self) -> list[Mesh]:
        """The surfaces of the objects."""
        return [solid.mesh() for solid in self.solids]

    def picture(self, size: int = IMAGE_SIZE) -> Render:
        """What `midi3d-lora prepare` would draw of it."""
        return render(self.meshes(), size, Camera())


def scene(seed: Seed, style: Style = INDOORS) -> Scene:
    """The scene of a seed, in which every object can be seen."""
    return scene_and_picture(seed, style)[0]


def scene_and_picture(seed: Seed, style: Style = INDOORS) -> tuple[Scene, Render]:
    """The scene of a seed, and its picture of `IMAGE_SIZE`."""
    rng = np.random.default_rng(seed)
    while True:
        found = unchecked(rng, style)
        picture = found.picture()
        shares = [(picture.instances == k + 1).mean() for k in range(len(found))]
        if min(shares) >= SEEN:
            return found, picture


def unchecked(rng: np.random.Generator, style: Style = INDOORS) -> Scene:
    """A scene that nobody has looked at: objects may hide each other."""
    return Scene(_framed(_placed(rng, style)))


def held_out(count: int, style: Style = INDOORS) -> Iterator[Scene]:
    """Scenes that the base has not seen."""
    return (scene((HELD_OUT_SEED, number), style) for number in range(count))


def _placed(rng: np.random.Generator, style: Style) -> list[Solid]:
    """Objects side by side along x, in the units of `objects`."""
    placed, edge = [], 0.0
    for _ in range(rng.integers(style.count[0], style.count[1] + 1)):
        name = style.kinds[rng.integers(len(style.kinds))]
        angle = rng.uniform(-style.angle, style.angle)
        solid = objects.make(name, rng).moved((0, 0, 0), angle)
        vertices = solid.mesh().vertices
        left, right = vertices[:, 0].min(), vertices[:, 0].max()
        depth = rng.uniform(-style.depth / 2, style.depth / 2)
        placed.append(solid.moved((edge - left, 0, depth)))
        edge += right - left + GAP + rng.uniform(0, 0.2)
    return placed


def _framed(solids: Sequence[Solid]) -> tuple[Solid, ...]:
    """The objects in the frame of their common box."""
    vertices = np.concatenate([solid.mesh().vertices for solid in solids])
    frame = fit_frame(vertices.min(axis=0), vertices.max(axis=0))
    return tuple(solid.in_frame(frame) for solid in solids)


def field_points(
    solid: Solid, surface: NDArray[np.float32], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Points and the distances there, to learn a field from: f32 [count, 3] and [count].

    Half of them are drawn from the whole box ±1.05, half around the surface, at two scales.

    Args:
        surface: [M, 3 or more] points on the surface.
    """
    near = count // 2
    chosen = surface[rng.integers(len(surface), size=near), :3]
    spread = np.where(rng.random((near, 1)) < 0.5, 0.02, 0.08)
    around = chosen + spread * rng.standard_normal((near, 3))
    anywhere = rng.uniform(-1.05, 1.05, (count - near, 3))
    points = np.concatenate([around, anywhere])
    return points.astype(np.float32), solid.distance(points).astype(np.float32)
