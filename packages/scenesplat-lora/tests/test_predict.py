"""`predict`: labels, coloured points and a picture of every scene."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import use_fixtures as made
from PIL import Image

from lora_core.errors import ConfigError, DataError
from scenesplat_lora import predict
from scenesplat_lora.picture import class_colours, label_colours, render, shown
from scenesplat_lora.ply import read_vertices, write_gaussians
from scenesplat_lora.scene_files import read_scene
from scenesplat_lora.scene_sources import find_sources


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    made.write_rooms(tmp_path / "data")
    words = made.write_model(tmp_path)
    return [*words, *made.GRIDS, "--output", str(tmp_path / "out")]


def test_every_scene_gets_labels_points_and_a_picture(tmp_path: Path, flags: list[str]) -> None:
    splat = tmp_path / "office" / "point_cloud" / "iteration_7000" / "point_cloud.ply"
    splat.parent.mkdir(parents=True)
    write_gaussians(splat, read_scene(tmp_path / "data" / "val" / "room0"))
    scenes = [str(tmp_path / "data"), str(tmp_path / "office")]
    assert predict.main([*flags, "--scenes", *scenes]) == 0
    out = tmp_path / "out"
    names = ["office", "room0", "room1"]
    for name in names:
        labels = np.load(out / name / "labels.npy")
        points = read_vertices(out / name / "labels.ply")
        assert (labels.shape, labels.dtype) == ((400,), np.int32)
        rgb = np.stack([points[c] for c in ("red", "green", "blue")], axis=1)
        assert np.array_equal(rgb, label_colours(labels, len(made.CLASSES)))
        assert Image.open(out / name / "picture.png").size[0] > 900
    told = json.loads((out / "predictions.json").read_text())
    assert told["classes"] == list(made.CLASSES)
    assert [sum(told["scenes"][name].values()) for name in names] == [400] * 3
    assert np.array_equal(
        np.load(out / "office" / "labels.npy") >= 0, np.ones(400, bool)
    )  # a .ply alone has no mask of rows that may vote


def test_a_damaged_scene_does_not_stop_the_others(tmp_path: Path, flags: list[str]) -> None:
    np.save(tmp_path / "data" / "val" / "room0" / "quat.npy", np.zeros((400, 4)))
    with pytest.raises(DataError, match=r"room0.*quat"):
        predict.main([*flags, "--scenes", str(tmp_path / "data")])
    assert (tmp_path / "out" / "room1" / "labels.npy").exists()
    assert list(json.loads((tmp_path / "out" / "predictions.json").read_text())["scenes"]) == [
        "room1"
    ]


def test_results_stay_and_foreign_folders_always_do(tmp_path: Path, flags: list[str]) -> None:
    words = [*flags, "--scenes", str(tmp_path / "data" / "val" / "room0")]
    assert predict.main(words) == 0
    with pytest.raises(ConfigError, match="--overwrite"):
        predict.main(words)
    assert predict.main([*words, "--overwrite"]) == 0
    foreign = [*flags, "--scenes", str(tmp_path / "data"), "--output", str(tmp_path / "data/val")]
    with pytest.raises(ConfigError, match=r"room0 is there already: choose another folder$"):
        predict.main([*foreign, "--overwrite"])


def test_scenes_of_one_name_are_refused(tmp_path: Path) -> None:
    made.write_rooms(tmp_path / "a", 1)
    made.write_rooms(tmp_path / "b", 1)
    with pytest.raises(DataError, match="2 scenes would be called room0"):
        find_sources([tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        find_sources([tmp_path / "nowhere"])


# -- the picture -----------------------------------------------------------------------------------


def test_the_nearer_disc_covers_the_farther() -> None:
    coord = np.array([[0, 0, 0], [0, 0, 1], [-1, -1, 0], [1, 1, 0]], np.float32)
    color = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 0], [0, 0, 0]], np.float32)
    for rows in (np.arange(4), np.arange(4)[::-1]):
        picture = render(coord[rows], color[rows], np.full(4, 0.1), elevation=90, width=101)
        middle = picture[picture.shape[0] // 2, 50]
        assert middle.tolist() == [0, 255, 0]  # seen from above


def test_up_in_the_scene_is_up_in_the_picture() -> None:
    wall = np.stack([np.linspace(0, 1, 50), np.zeros(50), np.linspace(0, 1, 50)], axis=1)
    color = np.linspace(0, 200, 50)[:, None].repeat(3, axis=1)
    picture = render(wall.astype(np.float32), color, np.full(50, 0.01), elevation=0, width=60)
    dark = picture[..., 0] < 255
    rows, columns = np.nonzero(dark)
    assert picture.shape[0] == pytest.approx(60, abs=2)
    assert rows[columns < 20].mean() > rows[columns > 40].mean()  # x = 0 is low, and at the left


def test_ceilings_and_faint_gaussians_are_not_drawn() -> None:
    z = np.repeat([0.0, 1.0, 2.5], 10)
    scene = {
        "coord": np.stack([np.zeros(30), np.zeros(30), z], axis=1),
        "opacity": np.tile([0.9, 0.01], 15)[:, None],
    }
    assert np.array_equal(shown(scene, 0.8), (z < 2) & (scene["opacity"][:, 0] > 0.5))


def test_classes_have_different_colours() -> None:
    colours = class_colours(100).astype(int)
    assert len(np.unique(colours, axis=0)) == 100
    few = class_colours(12).astype(int)
    apart = np.abs(few[:, None] - few[None]).sum(-1) + 1000 * np.eye(12)
    assert apart.min() > 30
    assert label_colours(np.array([-1]), 3).tolist() == [[200, 200, 200]]
