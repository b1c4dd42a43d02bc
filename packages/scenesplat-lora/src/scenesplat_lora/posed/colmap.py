"""COLMAP's cameras and poses, from its text or binary files.

    cameras.txt    CAMERA_ID MODEL WIDTH HEIGHT PARAMS...
    images.txt     IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of points, or empty

Poses are world-to-camera. https://colmap.github.io/format.html
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from lora_core.data_file import open_regular
from lora_core.errors import DataError, one_line
from lora_core.pictures.reading import Reading, inside
from scenesplat_lora.posed.pinhole import STRAIGHT, View, focal_lengths, image_key, numbers, pixels

Bend = tuple[float, float, float, float, float]
COLMAP_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0", ".")

# Number in binary files -> name, focal lengths, all parameters: f..., cx, cy, those of the lens.
MODELS = {
    0: ("SIMPLE_PINHOLE", 1, 3), 1: ("PINHOLE", 2, 4), 2: ("SIMPLE_RADIAL", 1, 4),
    3: ("RADIAL", 1, 5), 4: ("OPENCV", 2, 8), 5: ("OPENCV_FISHEYE", 2, 8),
    6: ("FULL_OPENCV", 2, 12), 7: ("FOV", 2, 5), 8: ("SIMPLE_RADIAL_FISHEYE", 1, 4),
    9: ("RADIAL_FISHEYE", 1, 5), 10: ("THIN_PRISM_FISHEYE", 2, 12),
}  # fmt: skip
BY_NAME = {name: (focals, count) for name, focals, count in MODELS.values()}
# Those whose lens is k1, k2, p1, p2, k3 as far as it has them; of FULL_OPENCV k4, k5, k6 must be 0.
LENSES = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
UNDISTORT = "run `colmap image_undistorter` and give what it writes"


class Pose(NamedTuple):
    """A line of images.txt."""

    turn: tuple[float, ...]  # quaternion w, x, y, z
    shift: tuple[float, ...]
    camera: int
    name: str


@dataclass(frozen=True)
class Camera:
    """A line of cameras.txt."""

    model: str
    width: int
    height: int
    parameters: tuple[float, ...]

    def parts(self) -> tuple[tuple[float, float], tuple[float, float], Bend]:
        """Focal lengths and centre in pixels, and k1, k2, p1, p2, k3.

        Raises:
            DataError: another lens, or parameters that make no sense.
        """
        if self.model not in LENSES:
            raise DataError(
                f"camera model {self.model}: expected one of {', '.join(LENSES)}; {UNDISTORT}"
            )
        focals, count = BY_NAME[self.model]
        values = numbers(self.parameters, (count,), f"parameters of {self.model}")
        lens = values[focals + 2 :]
        if lens[5:].any():
            raise DataError(f"{self.model} with k4, k5 or k6: {UNDISTORT}")
        x, y = values[focals : focals + 2].tolist()
        k1, k2, p1, p2, k3 = np.append(lens[:5], STRAIGHT)[:5].tolist()
        focal = focal_lengths([values[0], values[focals - 1]], "focal length")
        return focal, (x, y), (k1, k2, p1, p2, k3)


def colmap_file(folder: Path) -> Path | None:
    """images.bin or images.txt, where COLMAP and programs around it put them."""
    for name in COLMAP_FOLDERS:
        for ending in ("bin", "txt"):
            if (file := folder / name / f"images.{ending}").exists():
                return file
    return None


def read_colmap(path: Path, reading: Reading, folder: Path) -> list[View]:
    """The views of images.bin or images.txt, with the cameras beside it.

    Args:
        folder: of the scene; images are in its folder `images`.

    Raises:
        DataError: damaged files. What is wrong with single images goes to `reading`.
    """
    cameras_path = path.with_name(f"cameras{path.suffix}")
    if path.suffix == ".bin":
        cameras = dict(_cameras_in_bytes(cameras_path))
        poses = list(_poses_in_bytes(path))
    else:
        cameras = dict(_cameras_in_text(cameras_path))
        poses = list(_poses_in_text(path))
    views = []
    for pose in poses:
        with reading.collecting(one_line(pose.name[:200])):
            if pose.camera not in cameras:
                raise DataError(f"camera {pose.camera} is not in {cameras_path.name}")
            views.append(_view(pose, cameras[pose.camera], folder, reading))
    return views


def _view(pose: Pose, camera: Camera, folder: Path, reading: Reading) -> View:
    w, x, y, z = numbers(pose.turn, (4,), "quaternion")
    if not abs(np.hypot(np.hypot(w, x), np.hypot(y, z)) - 1) < 1e-2:
        raise DataError("its quaternion has not length 1: no rotation")
    focal, centre, bend = camera.parts()
    return View(
        image=inside(folder / "images", pose.name, reading),
        key=image_key(pose.name),
        focal=focal,
        centre=centre,
        size=(pixels(camera.height, "height"), pixels(camera.width, "width")),
        rotation=Rotation.from_quat([x, y, z, w]).as_matrix(),
        translation=numbers(pose.shift, (3,), "translation"),
        bend=bend,
    )


# -- text ------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without comments; empty ones too."""
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8", "replace").strip()
            if not text.startswith("#"):
                yield number, text


def _cameras_in_text(path: Path) -> Iterator[tuple[int, Camera]]:
    for number, line in _lines(path):
        if not line:
            continue
        try:
            name, model, width, height, *parameters = line.split()
            camera = Camera(model, int(width), int(height), tuple(map(float, parameters)))
            yield int(name), camera
        except ValueError:
            raise DataError(
                f"{one_line(path)}:{number}: expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS..."
            ) from None


def _poses_in_text(path: Path) -> Iterator[Pose]:
    lines = _lines(path)
    for number, line in lines:
        if not line:
            continue
        try:
            _, *pose, camera, name = line.split(maxsplit=9)
            values = tuple(map(float, pose))
            yield Pose(values[:4], values[4:], int(camera), name)
        except ValueError:
            raise DataError(
                f"{one_line(path)}:{number}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
            ) from None
        next(lines, None)  # the line of its points


# -- bytes -----------------------------------------------------------------------------------------


class _Bytes:
    """Little-endian values one after the other; the end of the file is a DataError."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self.path, self.data, self.at = path, file.read(), 0

    def take(self, layout: str) -> tuple[float, ...]:
        """The next values of a struct layout."""
        layout = "<" + layout
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, self.at - struct.calcsize(layout))

    def count(self) -> int:
        """A number of things that follow."""
        return int(self.take("Q")[0])

    def text(self) -> str:
        """Characters up to a zero byte."""
        end = self.data.find(b"\0", self.at)
        if end < 0:
            self._cut_off()
        found = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return found

    def skip(self, size: int) -> None:
        """Pass over bytes."""
        if self.at + size > len(self.data):
            self._cut_off()
        self.at += size

    def _cut_off(self) -> None:
        raise DataError(f"{one_line(self.path)}: ends too early: copied incompletely?")


def _cameras_in_bytes(path: Path) -> Iterator[tuple[int, Camera]]:
    data = _Bytes(path)
    for _ in range(data.count()):
        number, model, width, height = map(int, data.take("iiQQ"))
        if model not in MODELS:
            raise DataError(f"{one_line(path)}: camera model {model} is unknown; {UNDISTORT}")
        name, _, count = MODELS[model]
        yield number, Camera(name, width, height, data.take(f"{count}d"))


def _poses_in_bytes(path: Path) -> Iterator[Pose]:
    data = _Bytes(path)
    for _ in range(data.count()):
        values = data.take("i7di")
        name = data.text()
        data.skip(24 * data.count())  # points: x, y, and the number of the point in space
        yield Pose(values[1:5], values[5:8], int(values[8]), name)
