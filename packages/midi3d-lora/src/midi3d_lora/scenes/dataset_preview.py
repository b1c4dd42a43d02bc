"""dataset_preview.png: whether pictures, maps and points of prepared scenes show the same.

Points are drawn as a camera in front of the scene sees them, in the colours of their instances in
the map: a label that belongs to another mesh, or an axis taken for another, is seen at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import one_line
from lora_core.pictures.overlay import PALETTE, panels, save
from lora_core.report import plural
from midi3d_lora.meshes.render import Camera
from midi3d_lora.scenes.scene_folders import SceneSettings, read_scene

PREVIEW = "dataset_preview.png"
SCENES = 8
SIDE = 320  # pixels of each picture
POINTS = 6000  # of each instance
WIDTH = 2  # pixels of a point to each side of its centre


def write_preview(output: Path, names: Sequence[str]) -> None:
    """Draw some scenes of a folder.

    Raises:
        DataError: a scene was changed meanwhile.
        CheckpointError: the disk refuses.
    """
    rows = [_row(output / name) for name in names[:SCENES]]
    if rows:
        width = max(row.shape[1] for row in rows)
        save(output / PREVIEW, np.concatenate([_widened(row, width) for row in rows]))


def _row(folder: Path) -> NDArray[np.uint8]:
    """A scene's picture, its instances, and its points, beside each other."""
    settings = SceneSettings(SIDE, POINTS, max_instances=2**16, smallest_share=0.0)
    scene = read_scene(folder, settings, np.random.default_rng(0))
    index = scene.pictures.seg.index
    colours = _colours(len(scene))[index - 1]
    tinted = np.where(index[..., None] > 0, (scene.pictures.scene + colours) / 2, 255)
    shown = [
        (one_line(folder.name)[:40], scene.pictures.scene),
        (plural(len(scene), "instance"), np.round(tinted).astype(np.uint8)),
        ("points", drawn_points([surface.joined() for surface in scene.surfaces], SIDE)),
    ]
    return panels(shown)


def _colours(count: int) -> NDArray[np.float64]:
    """[count, 3] 0..255."""
    return np.array([PALETTE[k % len(PALETTE)] for k in range(count)], np.float64)


def drawn_points(instances: Sequence[NDArray[np.float32]], size: int) -> NDArray[np.uint8]:
    """Points with normals [N, 6] of each instance, seen from +z: uint8 [size, size, 3].

    Each is a square in the colour of its instance times 0.3 + 0.7 |n_z|; the nearest one covers.
    """
    values = np.concatenate(instances).astype(np.float64)
    owner = np.repeat(np.arange(len(instances)), [len(one) for one in instances])
    pixel, depth = Camera().project(values[:, :3], size)
    shaded = _colours(len(instances))[owner] * (0.3 + 0.7 * np.abs(values[:, 5]))[:, None]
    canvas = np.full((size, size, 3), 255, np.uint8)
    nearest_last = np.argsort(-depth, kind="stable")  # numpy keeps the last of several writes
    column, row = np.floor(pixel[nearest_last]).astype(np.int64).T
    steps = np.arange(-WIDTH, WIDTH + 1)
    rows = (row[:, None, None] + steps[:, None]).clip(0, size - 1)
    columns = (column[:, None, None] + steps).clip(0, size - 1)
    canvas[rows, columns] = np.round(shaded[nearest_last]).astype(np.uint8)[:, None, None, :]
    return canvas


def _widened(row: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    missing = width - row.shape[1]
    return np.pad(row, ((0, 0), (0, missing), (0, 0)), constant_values=255)
