"""The cameras of a scene, as the usual programs write them into one folder.

    transforms.json         nerfstudio, instant-ngp: camera-to-world, OpenGL's axes
    cameras.json            beside the splats of the original 3DGS code: camera-to-world
    sparse/0/{cameras,images}.{bin,txt}, sparse/..., colmap/sparse/0/...    COLMAP: `colmap`

The first that is there counts. Cameras are pinholes, or have OpenCV's lens (k1, k2, p1, p2, k3);
images of fisheyes must be undistorted first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.data_file import read_json
from lora_core.errors import DataError, listing, one_line
from lora_core.pictures.reading import Reading, inside
from scenesplat_lora.posed.colmap import COLMAP_FOLDERS, colmap_file, read_colmap
from scenesplat_lora.posed.pinhole import (
    View,
    focal_lengths,
    from_camera_to_world,
    image_key,
    numbers,
    pixels,
)

LENSES = ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "OPENCV", "SIMPLE_RADIAL", "RADIAL")
BEND = ("k1", "k2", "p1", "p2", "k3")
OTHERS = ("k4", "k5", "k6", "is_fisheye")  # of other rules
ENDINGS = ("", ".png", ".jpg", ".jpeg", ".JPG", ".PNG")  # names may be without: blender, 3DGS
UNDISTORT = "undistort the images first (such as `colmap image_undistorter`) and give its cameras"


def camera_file(folder: Path) -> Path:
    """The file that says where the cameras of a scene are.

    Raises:
        DataError: none; with the names that are looked for.
    """
    for name in ("transforms.json", "cameras.json"):
        if (folder / name).exists():
            return folder / name
    found = colmap_file(folder)
    if found is not None:
        return found
    there = "" if folder.is_dir() else " (no such folder)"
    raise DataError(
        f"{one_line(folder.absolute())}: no cameras{there}: expected transforms.json (nerfstudio, "
        f"instant-ngp), cameras.json (3DGS), or images.bin or images.txt of COLMAP in "
        f"{', '.join(COLMAP_FOLDERS)}"
    )


def read_views(folder: Path, follow_links: bool = False) -> list[View]:
    """The views of a scene's folder, sorted by their names.

    Args:
        follow_links: take images that links outside of the folder lead to.

    Raises:
        DataError: everything that is wrong with the cameras, in one message.
    """
    path = camera_file(folder)
    reading = Reading(folder, follow_links=follow_links)
    if path.name == "transforms.json":
        views = _transforms(path, reading)
    elif path.name == "cameras.json":
        views = _splat_cameras(path, reading)
    else:
        views = read_colmap(path, reading, folder)
    twice = [key for key, count in Counter(view.key for view in views).items() if count > 1]
    if twice:
        reading.problems.append(
            f"{len(twice)} images share their name up to the suffix: {one_line(twice[0])}"
        )
    if not views and not reading.problems:
        reading.problems.append("it has no cameras")
    if reading.problems:
        raise DataError(listing([f"{one_line(path)}: {what}" for what in reading.problems]))
    return sorted(views, key=lambda view: view.key)


def _existing(path: Path) -> Path:
    """The image that a name without suffix may mean."""
    for ending in ENDINGS:
        if (file := path.with_name(path.name + ending)).is_file():
            return file
    return path


# -- nerfstudio and instant-ngp --------------------------------------------------------------------


def _transforms(path: Path, reading: Reading) -> list[View]:
    content = read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list):
        raise DataError(f"{one_line(path)}: expected an object with a list `frames`")
    views = []
    for number, frame in enumerate(frames):
        with reading.collecting(f"frame {number}"):
            if not isinstance(frame, dict):
                raise DataError("expected an object")
            views.append(_frame({**content, **frame}, path.parent, reading))
    return views


def _frame(values: Mapping[str, Any], folder: Path, reading: Reading) -> View:
    """A view from its own values over those of the whole file."""
    name = values.get("file_path")
    image = inside(folder, name, reading)
    bend = _bend(values)
    size = None
    if "w" in values or "h" in values:
        size = (pixels(values.get("h"), "h"), pixels(values.get("w"), "w"))
    centre = None
    if "cx" in values or "cy" in values:
        x, y = numbers([values.get("cx"), values.get("cy")], (2,), "cx, cy")
        centre = (float(x), float(y))
    matrix = values.get("transform_matrix")
    rows = len(matrix) if isinstance(matrix, list) and len(matrix) == 3 else 4
    pose = numbers(matrix, (rows, 4), "transform_matrix")
    turn, shift = from_camera_to_world(pose, "transform_matrix", opengl=True)
    focal = _focal(values, size)
    view = View(_key(str(name)), _existing(image), focal, centre, size, turn, shift, bend)
    return view if size is None else view.sized(size)


def _key(name: str) -> str:
    """Key of an image that is named from the folder of the scene: images/a/0001.png is a/0001."""
    _, _, below = name.replace("\\", "/").removeprefix("./").partition("/")
    return image_key(below or name)


def _focal(values: Mapping[str, Any], size: tuple[int, int] | None) -> tuple[float, float]:
    if "fl_x" in values:
        found = [values["fl_x"], values.get("fl_y", values["fl_x"])]
        return focal_lengths(found, "fl_x, fl_y")
    if "camera_angle_x" not in values:
        raise DataError("no focal length: expected fl_x (pixels) or camera_angle_x (radians)")
    if size is None:
        raise DataError("camera_angle_x needs w and h, the size of the images in pixels")
    angles = [values["camera_angle_x"], values.get("camera_angle_y", 1.0)]
    across, down = numbers(angles, (2,), "camera_angle_x, camera_angle_y")
    if not 0 < min(across, down) <= max(across, down) < math.pi:
        raise DataError("camera_angle_x, camera_angle_y: expected radians between 0 and pi")
    x = size[1] / 2 / math.tan(across / 2)
    return x, size[0] / 2 / math.tan(down / 2) if "camera_angle_y" in values else x


def _bend(values: Mapping[str, Any]) -> tuple[float, float, float, float, float]:
    """k1, k2, p1, p2, k3."""
    model = values.get("camera_model", "OPENCV")
    if model not in LENSES:
        raise DataError(
            f"camera_model {str(model)[:40]!r}: expected one of {', '.join(LENSES)}; {UNDISTORT}"
        )
    others = [name for name in OTHERS if values.get(name, 0) not in (0, None)]
    if others:
        raise DataError(f"a lens with {', '.join(others)} is not supported: {UNDISTORT}")
    given = [values.get(name, 0) for name in BEND]
    k1, k2, p1, p2, k3 = numbers(given, (5,), ", ".join(BEND)).tolist()
    return k1, k2, p1, p2, k3


# -- the original code of 3D Gaussian splatting ----------------------------------------------------


def _splat_cameras(path: Path, reading: Reading) -> list[View]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{one_line(path)}: expected a list of cameras")
    views = []
    for number, camera in enumerate(content):
        with reading.collecting(f"camera {number}"):
            if not isinstance(camera, dict):
                raise DataError("expected an object")
            views.append(_splat_camera(camera, path.parent, reading))
    return views


def _splat_camera(camera: Mapping[str, Any], folder: Path, reading: Reading) -> View:
    import numpy as np

    name = camera.get("img_name")
    image = inside(folder / "images", name, reading)
    size = (pixels(camera.get("height"), "height"), pixels(camera.get("width"), "width"))
    turn = numbers(camera.get("rotation"), (3, 3), "rotation")
    position = numbers(camera.get("position"), (3,), "position")
    pose = np.concatenate([turn, position[:, None]], axis=1)
    rotation, translation = from_camera_to_world(pose, "rotation", opengl=False)
    focal = focal_lengths([camera.get("fx"), camera.get("fy")], "fx, fy")
    key = image_key(str(name))
    return View(key, _existing(image), focal, None, None, rotation, translation).sized(size)
