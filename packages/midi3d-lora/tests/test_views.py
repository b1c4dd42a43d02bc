"""Pictures of generated scenes: all is in them, in its colour, from the side that is meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from lora_core.errors import ConfigError
from midi3d_lora.conditioning.pictures import split
from midi3d_lora.conditioning.seg_maps import seg_map
from midi3d_lora.meshes import views
from midi3d_lora.meshes.extraction import Mesh


def ball(x: float = 0, y: float = 0, z: float = 0, radius: float = 0.2, level: int = 3) -> Mesh:
    made = trimesh.creation.icosphere(level, radius)
    vertices = (made.vertices + np.array([x, y, z])).astype(np.float32)
    return Mesh(vertices, made.faces.astype(np.int32))


def hues(picture: views.Picture) -> np.ndarray:
    """The strongest channel of each pixel, -1 where it is white."""
    return np.where((picture == 255).all(-1), -1, picture.argmax(-1))


def centre_of(picture: views.Picture, colour: np.ndarray) -> tuple[float, float]:
    """Mean (row, column) of the pixels with a colour's proportions."""
    values = picture.astype(float)
    ratio = values / np.maximum(values.max(-1, keepdims=True), 1)
    near = np.abs(ratio - colour / colour.max()).max(-1) < 0.05
    rows, columns = np.nonzero(near & (hues(picture) >= 0))
    return float(rows.mean()), float(columns.mean())


# -- a coarser copy --------------------------------------------------------------------------------


def test_a_coarse_copy_has_few_faces_and_the_same_surface() -> None:
    mesh = ball(level=6, radius=0.5)
    vertices, faces = views.clustered(mesh.vertices, mesh.faces, 0.05)
    assert len(faces) < len(mesh.faces) / 10
    radius = np.linalg.norm(vertices, axis=1)
    assert np.abs(radius - 0.5).max() < 0.01
    made = trimesh.Trimesh(vertices, faces, process=False)
    assert made.is_watertight
    assert made.volume == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.02)


def test_what_is_smaller_than_a_pixel_stays() -> None:
    mesh = ball(radius=0.001, level=1)
    _, faces = views.clustered(mesh.vertices, mesh.faces, 1.0)
    assert len(faces) == len(mesh.faces)


# -- views -----------------------------------------------------------------------------------------


def test_a_scene_is_wholly_in_every_picture_and_fills_it() -> None:
    meshes = [ball(-2, 0, 0), ball(2, 0, 0.5), ball(0, 3, -1), ball(0, 0, 2)]
    scene, widest = views.stage(meshes, 96), 0
    for picture in views.turntable(scene, 12):
        shown = hues(picture) >= 0
        assert not shown[[0, -1]].any()
        assert not shown[:, [0, -1]].any()
        widest = max(widest, *(int(np.ptp(np.nonzero(shown)[axis])) for axis in (0, 1)))
    assert widest > 70


def test_turns_are_counter_clockwise_seen_from_above() -> None:
    """What lies in front (+z) goes to the right (+x), and from above it is lower than the back."""
    scene = views.stage([ball(z=1), ball(z=-1)], 128)
    front, back = views.instance_colours(2)
    assert centre_of(scene.view(0.0), front)[1] == pytest.approx(63.5, abs=1)
    assert centre_of(scene.view(60.0), front)[1] > 80
    above = scene.view(0.0, 40.0)
    assert centre_of(above, front)[0] > centre_of(above, back)[0] + 20


def test_an_empty_instance_keeps_its_colour_for_the_others() -> None:
    three = views.stage([ball(x=-1), ball(), ball(x=1)], 64)
    two = views.stage([ball(x=-1), None, ball(x=1)], 64)
    assert np.array_equal(two.colours, three.colours[[0, 2]])
    assert (views.stage([None], 64).view(0.0) == 255).all()


def test_colours_of_instances_are_different() -> None:
    colours = views.instance_colours(32)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 9 * np.eye(32)
    assert apart.min() > 0.01


# -- files -----------------------------------------------------------------------------------------


def test_a_turntable_turns_once_for_ever(tmp_path: Path) -> None:
    scene = views.stage([ball(x=-0.5), ball(x=0.5, y=0.3)], 64)
    for name in ("a.gif", "b.gif"):
        views.write_turntable(tmp_path / name, scene, 5, 2.0)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (5, 0)  # type: ignore[attr-defined]
        for number, picture in enumerate(views.turntable(scene, 5)):
            gif.seek(number)
            assert gif.info["duration"] == 400
            frame = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(frame - picture).mean() < 2


def test_turntables_are_gifs() -> None:
    with pytest.raises(ConfigError, match=r"ffmpeg -i a\.gif -pix_fmt yuv420p a\.mp4"):
        views.check_turntable_path("a.mp4")
    with pytest.raises(ConfigError, match=r"name it a\.gif$"):
        views.check_turntable_path("a.png")


def test_a_sheet_shows_picture_instances_and_two_views() -> None:
    rgb = np.full((40, 60, 3), 30, np.uint8)
    seg = np.zeros((40, 60), np.uint8)
    seg[:20, :30], seg[20:, 30:] = 7, 9
    pictures = split(rgb, seg_map(seg))
    sheet = views.scene_sheet(pictures, [ball(x=-1), ball(x=1)], 96)
    assert sheet.shape[1] > 4 * 96
    # The picture fills two thirds of its square, and a half of that is tinted in the second panel.
    dark = (sheet == 30).all(-1).sum() / 96**2
    assert dark == pytest.approx(2 / 3 + 1 / 3, abs=0.05)
