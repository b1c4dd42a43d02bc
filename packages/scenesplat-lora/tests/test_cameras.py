"""Cameras of nerfstudio, 3DGS and COLMAP are the same cameras; what cannot be used is told."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import posed_scenes
import pytest
from scipy.spatial.transform import Rotation

from lora_core.errors import DataError
from scenesplat_lora.posed.cameras import camera_file, read_views
from scenesplat_lora.posed.pinhole import View

VIEWS = posed_scenes.VIEWS
HEAD = {"w": 64, "h": 48, "fl_x": 50, "fl_y": 50, "cx": 32, "cy": 24}


def write_transforms(folder: Path, **head: Any) -> Path:
    frames = [posed_scenes.frame(view, f"{view.key}.png") for view in VIEWS]
    text = json.dumps(HEAD | head | {"frames": head.get("frames", frames)})
    (folder / "transforms.json").write_text(text)
    return folder


def write_splat_cameras(folder: Path) -> None:
    cameras = [
        {
            "id": number, "img_name": view.key, "width": 64, "height": 48, "fx": 50.0, "fy": 50.0,
            "position": (-view.rotation.T @ view.translation).tolist(),
            "rotation": view.rotation.T.tolist(),
        }
        for number, view in enumerate(VIEWS)
    ]  # fmt: skip
    (folder / "cameras.json").write_text(json.dumps(cameras))


def quaternion(view: View) -> list[float]:
    x, y, z, w = Rotation.from_matrix(view.rotation).as_quat()
    return [w, x, y, z]


def write_colmap_text(folder: Path, model: str = "PINHOLE 64 48 50 50 32 24") -> None:
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text(f"# comment\n1 {model}\n")
    lines = ["# comment"]
    for number, view in enumerate(VIEWS):
        pose = " ".join(map(repr, map(float, [*quaternion(view), *view.translation])))
        lines += [f"{number} {pose} 1 {view.key}.png", "1.0 2.0 -1" if number % 2 else ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")


def write_colmap_bytes(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "cameras.bin").write_bytes(
        struct.pack("<QiiQQ3d", 1, 7, 0, 64, 48, 50, 32, 24)  # SIMPLE_PINHOLE
    )
    data = struct.pack("<Q", len(VIEWS))
    for number, view in enumerate(VIEWS):
        data += struct.pack("<i7di", number, *quaternion(view), *view.translation, 7)
        data += f"{view.key}.png".encode() + b"\0" + struct.pack("<Qddq", 1, 1.0, 2.0, -1)
    (folder / "images.bin").write_bytes(data)


@pytest.mark.parametrize("kind", ["nerfstudio", "3dgs", "colmap text", "colmap bytes"])
def test_all_kinds_of_files_give_the_same_cameras(tmp_path: Path, kind: str) -> None:
    write = {
        "nerfstudio": lambda: write_transforms(tmp_path),
        "3dgs": lambda: write_splat_cameras(tmp_path),
        "colmap text": lambda: write_colmap_text(tmp_path / "sparse"),
        "colmap bytes": lambda: write_colmap_bytes(tmp_path / "sparse" / "0"),
    }
    write[kind]()
    (tmp_path / "images").mkdir()
    for view in VIEWS:
        (tmp_path / "images" / f"{view.key}.png").touch()
    found = read_views(tmp_path)
    assert [view.key for view in found] == [view.key for view in VIEWS]
    for one, expected in zip(found, VIEWS, strict=True):
        assert one.image == tmp_path / "images" / f"{expected.key}.png"
        assert np.allclose(one.rotation, expected.rotation, atol=1e-9)
        assert np.allclose(one.translation, expected.translation, atol=1e-9)
        assert (one.focal, one.centre, one.size) == ((50, 50), (32, 24), (48, 64))


def test_instant_ngp_gives_an_angle_and_names_without_suffix(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "r_0.5.png").touch()
    frame = posed_scenes.frame(VIEWS[0], "") | {"file_path": "./train/r_0.5"}
    content = {"camera_angle_x": 2 * math.atan(32 / 50), "w": 64, "h": 48, "frames": [frame]}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    (view,) = read_views(tmp_path)
    assert np.allclose(view.focal, 50)
    assert (view.key, view.centre) == ("r_0.5", (32, 24))
    assert view.image == tmp_path / "train" / "r_0.5.png"


def test_a_frame_may_have_its_own_camera_and_the_size_may_be_unsaid(tmp_path: Path) -> None:
    frame = posed_scenes.frame(VIEWS[0], "a/0001.jpg") | {"fl_x": 70, "fl_y": 80}
    content = {"fl_x": 50, "frames": [frame]}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    (view,) = read_views(tmp_path)
    assert (view.focal, view.size, view.centre, view.key) == ((70, 80), None, None, "a/0001")
    assert view.sized((48, 64)).centre == (32, 24)


def test_a_world_that_was_turned_and_scaled_shows_the_same_picture() -> None:
    turn = Rotation.from_euler("x", 90, degrees=True).as_matrix()
    view, point = VIEWS[1], np.array([0.3, 1.4, -0.2])
    moved = view.placed(turn, 0.5)
    seen = view.rotation @ point + view.translation
    again = moved.rotation @ (0.5 * turn @ point) + moved.translation
    assert np.allclose(again, 0.5 * seen)


def changed(pose: Any) -> list[Any]:
    return [posed_scenes.frame(VIEWS[0], "0.png") | {"transform_matrix": pose}]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"k4": 0.1}, "frame 0: a lens with k4 is not supported: undistort"),
        ({"is_fisheye": True}, "frame 0: a lens with is_fisheye is not supported: undistort"),
        ({"k1": "strong"}, "k1, k2, p1, p2, k3 is .*expected numbers"),
        ({"camera_model": "OPENCV_FISHEYE"}, "'OPENCV_FISHEYE': expected one of .*; undistort"),
        ({"fl_x": 0}, "focal lengths are pixels above 0"),
        ({"w": 64.5}, "w is '64.5'|w is 64.5"),
        ({"cx": "middle"}, "cx, cy is .*expected numbers"),
        ({"frames": {}}, "an object with a list `frames`"),
        ({"frames": [1]}, "frame 0: expected an object"),
        ({"frames": []}, "it has no cameras"),
        ({"frames": changed(None)}, "transform_matrix has shape|expected numbers"),
        ({"frames": changed((2 * np.eye(4)).tolist())}, "its last row is|no rotation"),
        ({"frames": changed(np.diag([2, 2, 2, 1]).tolist())}, "R R.T differs from 1 by 3|no rotat"),
        ({"frames": changed(np.diag([1, 1, -1, 1]).tolist())}, "no rotation: it mirrors"),
        (
            {"frames": [posed_scenes.frame(VIEWS[0], "x.png") | {"file_path": "../../x.png"}]},
            "must be a path below",
        ),
        ({"frames": [posed_scenes.frame(VIEWS[0], "x.png")] * 2}, "share their name up to"),
    ],
)
def test_cameras_that_cannot_be_used_are_told(
    tmp_path: Path, head: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_views(write_transforms(tmp_path, **head))


def test_numbers_that_are_not_finite_are_told(tmp_path: Path) -> None:
    write_transforms(tmp_path)
    text = (tmp_path / "transforms.json").read_text().replace('"fl_x": 50', '"fl_x": NaN')
    (tmp_path / "transforms.json").write_text(text)
    with pytest.raises(DataError, match="fl_x is nan"):
        read_views(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("FULL_OPENCV 64 48 50 50 32 24 0 0 0 0 0 1 0 0", "FULL_OPENCV with k4, k5 or k6"),
        ("OPENCV_FISHEYE 64 48 50 50 32 24 0 0 0 0", "model OPENCV_FISHEYE: expected one of"),
        ("PINHOLE 64 48 50 50 32", "parameters of PINHOLE has shape"),
        ("PINHOLE wide 48", "cameras.txt:2: expected CAMERA_ID MODEL"),
    ],
)
def test_colmap_cameras_that_cannot_be_used_are_told(
    tmp_path: Path, model: str, message: str
) -> None:
    write_colmap_text(tmp_path / "sparse", model)
    with pytest.raises(DataError, match=message):
        read_views(tmp_path)


@pytest.mark.parametrize(
    ("model", "bend"),
    [
        ("SIMPLE_RADIAL 64 48 50 32 24 0.1", (0.1, 0, 0, 0, 0)),
        ("RADIAL 64 48 50 32 24 0.1 0.2", (0.1, 0.2, 0, 0, 0)),
        ("OPENCV 64 48 50 50 32 24 0.1 0.2 0.3 0.4", (0.1, 0.2, 0.3, 0.4, 0)),
        ("FULL_OPENCV 64 48 50 50 32 24 .1 .2 .3 .4 .5 0 0 0", (0.1, 0.2, 0.3, 0.4, 0.5)),
    ],
)
def test_lenses_of_colmap_are_those_of_nerfstudio(
    tmp_path: Path, model: str, bend: tuple[float, ...]
) -> None:
    write_colmap_text(tmp_path / "sparse", model)
    (tmp_path / "n").mkdir()
    write_transforms(tmp_path / "n", **dict(zip(("k1", "k2", "p1", "p2", "k3"), bend, strict=True)))
    for folder in (tmp_path, tmp_path / "n"):
        view = read_views(folder)[0]
        assert (view.focal, view.centre, view.bend) == ((50, 50), (32, 24), bend)


def test_a_lens_folds_where_its_rule_turns_round() -> None:
    view = replace(VIEWS[0], bend=(-0.3, 0.0, 0.0, 0.0, 0.0))
    assert math.isclose(view.reach(), 1 / 0.9)
    assert VIEWS[0].reach() == math.inf
    assert replace(VIEWS[0], bend=(0.3, 0.1, 0.0, 0.0, 0.0)).reach() == math.inf


def test_a_cut_off_colmap_file_is_told(tmp_path: Path) -> None:
    write_colmap_bytes(tmp_path / "sparse")
    file = tmp_path / "sparse" / "images.bin"
    for length in (4, 60, len(file.read_bytes()) - 1):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(DataError, match=r"images\.bin: ends too early"):
            read_views(tmp_path)
        write_bytes = tmp_path / f"again{length}"
        write_colmap_bytes(write_bytes)
        file.write_bytes((write_bytes / "images.bin").read_bytes())


def test_a_folder_without_cameras_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no cameras: expected transforms\.json"):
        camera_file(tmp_path)
    with pytest.raises(DataError, match=r"no cameras \(no such folder\)"):
        read_views(tmp_path / "none")
