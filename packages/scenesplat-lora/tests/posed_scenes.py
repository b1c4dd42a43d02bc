"""Made scenes with cameras and masks: two parallel planes, and folders of posed images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scenesplat_lora.posed.pinhole import View
from scenesplat_lora.scenes.files import write_scene

SIZE = (48, 64)  # height and width of the images
FOCAL = 50.0


def look(
    eye: Any, at: Any, key: str = "a", size: tuple[int, int] = SIZE, focal: float = FOCAL
) -> View:
    """A camera at `eye` that looks at `at`, upright (z is up)."""
    forward = np.subtract(at, eye).astype(np.float64)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    centre = (size[1] / 2, size[0] / 2)
    translation = -rotation @ np.asarray(eye, np.float64)
    return View(key, Path(f"{key}.png"), (focal, focal), centre, size, rotation, translation)


def plane(y: float, half: float, step: float, label: int) -> dict[str, np.ndarray]:
    """Gaussians of a wall: x and z from -half to half at that y, thin along y, opaque."""
    side = np.arange(-half, half + 1e-9, step)
    x, z = (grid.ravel() for grid in np.meshgrid(side, side))
    rows = len(x)
    return {
        "coord": np.stack([x, np.full(rows, y), z], axis=1).astype(np.float32),
        "color": np.full((rows, 3), 128, np.float32),
        "opacity": np.full((rows, 1), 0.95, np.float32),
        "scale": np.tile(np.array([step, 0.002, step], np.float32), (rows, 1)),
        "quat": np.tile(np.array([1, 0, 0, 0], np.float32), (rows, 1)),
        "segment": np.full(rows, label, np.int32),
    }


def two_planes() -> dict[str, Any]:
    """A small wall (class 0) at y = 1 before a large one (class 1) at y = 2."""
    small, large = plane(1, 0.3, 0.04, 0), plane(2, 1.2, 0.06, 1)
    return {name: np.concatenate([small[name], large[name]]) for name in small}


def plane_labels(view: View) -> np.ndarray:
    """What a camera sees of the two planes, exactly: 1 for the small one, 2, 0 for nothing."""
    assert view.size is not None
    height, width = view.size
    row, column = np.mgrid[:height, :width] + 0.5
    ray = np.stack(
        [
            (column - view.centre[0]) / view.focal[0],
            (row - view.centre[1]) / view.focal[1],
            np.ones_like(row),
        ],
        axis=-1,
    ) @ view.rotation  # fmt: skip
    eye = -view.rotation.T @ view.translation
    labels = np.zeros(view.size, np.int64)
    for label, (y, half) in ((2, (2, 1.2)), (1, (1, 0.3))):
        along = (y - eye[1]) / ray[..., 1]
        x, z = eye[0] + along * ray[..., 0], eye[2] + along * ray[..., 2]
        hit = (along > 0) & (np.abs(x) <= half) & (np.abs(z) <= half)
        labels[hit] = label
    return labels


def frame(view: View, name: str) -> dict[str, Any]:
    """A frame of transforms.json: camera-to-world with OpenGL's axes."""
    pose = np.eye(4)
    pose[:3, :3] = view.rotation.T * [1, -1, -1]
    pose[:3, 3] = -view.rotation.T @ view.translation
    return {"file_path": f"images/{name}", "transform_matrix": pose.tolist()}


VIEWS = tuple(
    look((x, -1, z), (0, 2, 0), f"{number:04}")
    for number, (x, z) in enumerate([(0, 0), (0.8, 0.1), (-0.8, -0.1)])
)


def write_capture(folder: Path, features: np.ndarray | None = None) -> None:
    """Images, masks and cameras of the two planes; features [2, D] beside every mask."""
    for name in ("images", "masks", "features"):
        (folder / name).mkdir(parents=True)
    for view in VIEWS:
        labels = plane_labels(view)
        colours = np.array([[0, 0, 0], [200, 40, 40], [40, 40, 200]], np.uint8)
        Image.fromarray(colours[labels]).save(folder / "images" / f"{view.key}.png")
        Image.fromarray(labels.astype(np.uint8)).save(folder / "masks" / f"{view.key}.png")
        if features is not None:
            np.save(folder / "features" / f"{view.key}.npy", features)
    content = {
        "w": SIZE[1], "h": SIZE[0], "fl_x": FOCAL, "fl_y": FOCAL, "cx": SIZE[1] / 2,
        "cy": SIZE[0] / 2, "camera_model": "OPENCV", "k1": 0.0,
        "frames": [frame(view, f"{view.key}.png") for view in VIEWS],
    }  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(content))


def write_all(root: Path, features: np.ndarray | None, names: tuple[str, ...] = ("office",)) -> Any:
    """Scenes in root/data/train and their captures in root/captures; gives the flags for both."""
    for name in names:
        write_scene(root / "data" / "train" / name, two_planes())
        write_capture(root / "captures" / name, features)
    return ["--data_root", str(root / "data"), "--images", str(root / "captures")]
