"""The picture of prepared scenes shows whether pictures, maps and points agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mesh_folders import write_rooms
from mesh_shapes import box

from lora_core.pictures.files import read_image
from lora_core.pictures.overlay import PALETTE
from midi3d_lora import prepare
from midi3d_lora.meshes.render import render
from midi3d_lora.scenes.dataset_preview import SIDE, drawn_points
from midi3d_lora.sources.prepare_meshes import Drawing, sample_mesh


def test_points_are_drawn_where_the_camera_sees_their_instance() -> None:
    meshes = [box((-0.9, -0.9, -0.5), (0.1, 0.9, 0)), box((-0.3, -0.5, 0.2), (0.9, 0.5, 0.9))]
    points = [sample_mesh(mesh, 6000, np.random.default_rng(0)) for mesh in meshes]
    drawn = drawn_points(points, 384)
    instances = render(meshes, 384).instances
    hues = np.array(PALETTE[:2]) / np.linalg.norm(PALETTE[:2], axis=1, keepdims=True)
    found = (drawn @ hues.T).argmax(axis=2) + 1
    found[(drawn == 255).all(axis=2)] = 0
    assert (found == instances).mean() > 0.95
    assert set(np.unique(found)) == {0, 1, 2}


def test_the_first_scenes_of_a_folder_are_drawn_below_each_other(tmp_path: Path) -> None:
    words = ["--input_dir", str(tmp_path / "raw"), "--output_dir", str(tmp_path / "out")]
    heights = []
    for count in (1, 9):
        write_rooms(tmp_path / "raw", count)
        prepare.main([*words, "--num_samples", "64", "--image_size", "16"])
        sheet = read_image(tmp_path / "out" / "dataset_preview.png")
        assert sheet.shape[1] > 3 * SIDE
        heights.append(sheet.shape[0])
    assert heights[1] == 8 * heights[0]


def test_drawing_settings_are_those_of_the_scenes() -> None:
    first = Drawing(42, 64, 16).rng("scene", 0).random(3)
    assert (first == Drawing(42, 64, 16).rng("scene", 0).random(3)).all()
    assert (first != Drawing(43, 64, 16).rng("scene", 0).random(3)).any()
