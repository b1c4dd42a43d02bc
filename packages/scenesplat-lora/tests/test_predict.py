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
from scenesplat_lora.picture import label_colours
from scenesplat_lora.scenes.files import read_scene
from scenesplat_lora.scenes.ply import read_vertices, write_gaussians
from scenesplat_lora.scenes.sources import find_sources


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
