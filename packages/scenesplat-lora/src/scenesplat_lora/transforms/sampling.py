"""Transforms that leave out Gaussians; defaults are the official training list's."""

from __future__ import annotations

from typing import Literal

import numpy as np

from lora_core.errors import ConfigError
from scenesplat_lora.scenes.scene import Scene, row_count, stable_order, take_rows


def random_dropout(
    scene: Scene,
    rng: np.random.Generator,
    *,
    dropout_ratio: float = 0.2,
    dropout_application_ratio: float = 0.2,
) -> Scene:
    """With probability `dropout_application_ratio` keep int((1 - dropout_ratio) n) random rows.

    At least one stays.
    """
    if rng.random() >= dropout_application_ratio:
        return scene
    rows = row_count(scene)
    kept = max(1, int(rows * (1 - dropout_ratio)))
    return take_rows(scene, rng.choice(rows, kept, replace=False))


def sphere_crop(
    scene: Scene,
    rng: np.random.Generator,
    *,
    point_max: int = 192_000,
    mode: Literal["random", "center"] = "random",
) -> Scene:
    """The `point_max` rows nearest to a random row, or to row n // 2; nearest first.

    A scene that is small enough stays as it is.

    Raises:
        ConfigError: `point_max` is below 1, which leaves nothing.
    """
    if point_max < 1:
        raise ConfigError(f"SphereCrop: point_max is {point_max}: it must be at least 1")
    rows = row_count(scene)
    if rows <= point_max:
        return scene
    coord = scene["coord"]
    centre = coord[int(rng.integers(rows)) if mode == "random" else rows // 2]
    distance = np.square(coord - centre).sum(axis=1)
    return take_rows(scene, stable_order(distance)[:point_max])
