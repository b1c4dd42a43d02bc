"""Scene folders are read as documented; everything wrong with them is told in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import DataError
from midi3d_lora.scenes.scene_folders import (
    SceneSettings,
    TrainingScene,
    list_scenes,
    look_at,
    read_scene,
    remarks,
    scene_facts,
)

SIZE = 64
SETTINGS = SceneSettings(image_size=SIZE, num_points=128)


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ball(centre: float = 0.0) -> np.ndarray:
    normals = np.random.default_rng(0).normal(size=(200, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return np.concatenate([0.3 * normals + [centre, 0, 0], normals], axis=1).astype(np.float32)


def seg_of(*labels: int, size: int = SIZE) -> np.ndarray:
    """Vertical stripes of the labels; the upper half is background."""
    seg = np.zeros((size, size), np.uint8)
    for k, stripe in enumerate(np.array_split(np.arange(size), len(labels))):
        seg[size // 2 :, stripe] = labels[k]
    return seg


def scene_at(folder: Path, labels: tuple[int, ...] = (3, 200), **changes: Any) -> Path:
    """A scene's folder; changes by stem, None leaves a file out."""
    folder.mkdir(parents=True)
    rgb = np.random.default_rng(1).integers(0, 200, (SIZE, SIZE, 3), dtype=np.uint8)
    files: dict[str, Any] = {"rgb": rgb, "scene_rgb": rgb, "seg": seg_of(*labels)}
    files["surface"] = np.concatenate(
        [
            np.c_[ball(min(0.1, 0.6 / len(labels)) * k), np.full(200, label)]
            for k, label in enumerate(labels)
        ]
    )
    for name, array in (files | changes).items():
        if array is None:
            continue
        if name == "surface":
            np.save(folder / "surface.npy", array)
        else:
            Image.fromarray(array).save(folder / f"{name}.png")
    return folder


def read(folder: Path) -> TrainingScene:
    scene_facts(folder, SETTINGS)
    return read_scene(folder, SETTINGS, np.random.default_rng(0))


def problem(folder: Path, settings: SceneSettings = SETTINGS) -> str:
    with pytest.raises(DataError) as caught:
        scene_facts(folder, settings)
    return str(caught.value)


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.fault("D41")
def test_instances_have_their_own_picture_mask_and_points_whatever_their_labels(
    tmp_path: Path,
) -> None:
    scene = read(scene_at(tmp_path / "a", (3, 200, 9)))
    assert (scene.name, len(scene), len(scene.pictures)) == ("a", 3, 3)
    assert scene.pictures.seg.labels == (3, 9, 200)
    rgb = np.asarray(Image.open(tmp_path / "a" / "rgb.png"))
    seg = np.asarray(Image.open(tmp_path / "a" / "seg.png"))
    for k, label in enumerate((3, 9, 200)):
        own = seg == label
        np.testing.assert_array_equal(scene.pictures.mask(k) > 0, own)
        np.testing.assert_array_equal(scene.pictures.instance(k)[own], rgb[own])
        assert (scene.pictures.instance(k)[~own] == 255).all()
        centre = 0.1 * (3, 200, 9).index(label)
        middle = scene.surfaces[k].points.astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(middle, [centre, 0, 0], atol=0.06)
    assert scene.surfaces[0].joined().shape == (128, 6)


def test_an_undivided_cloud_gets_the_union_of_the_masks(tmp_path: Path) -> None:
    folder = scene_at(tmp_path / "a", surface=ball())
    scene = read(folder)
    assert len(scene) == len(scene.pictures) == 1
    np.testing.assert_array_equal(scene.pictures.mask(0) > 0, seg_of(3, 200) > 0)
    facts = scene_facts(folder, SETTINGS)
    assert facts["labels"] == [[3, 200]]
    assert facts["notes"][0].startswith("one cloud for several instances")


@pytest.mark.fault("D41")
def test_a_map_that_is_all_one_instance_is_one(tmp_path: Path) -> None:
    whole = np.full((SIZE, SIZE), 7, np.uint8)
    scene = read(scene_at(tmp_path / "a", seg=whole, surface=ball()))
    assert (scene.pictures.mask(0) > 0).all()


@pytest.mark.fault("D40")
def test_pictures_of_other_sizes_are_brought_to_one_and_that_is_said(tmp_path: Path) -> None:
    photo = np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8)
    folder = scene_at(tmp_path / "a", scene_rgb=photo, seg=seg_of(3, 200, size=4 * SIZE))
    scene = read(folder)
    np.testing.assert_array_equal(scene.pictures.mask(1) > 0, seg_of(3, 200) == 200)
    assert scene.pictures.scene.shape == (SIZE, SIZE, 3)
    assert scene_facts(folder, SETTINGS)["notes"][:3] == [
        "seg.png brought to the size of rgb.png: 256 x 256",
        "scene_rgb.png brought to 64 x 64 pixels: 128 x 128",
        "seg.png brought to the size of scene_rgb.png: 256 x 256",
    ]


@pytest.mark.fault("D40")
def test_a_wide_scene_is_extended_to_a_square_with_white(tmp_path: Path) -> None:
    rgb = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    seg = np.full((SIZE, 2 * SIZE), 5, np.uint8)
    folder = scene_at(tmp_path / "a", rgb=rgb, scene_rgb=rgb, seg=seg, surface=ball())
    pictures = read(folder).pictures
    assert (pictures.mask(0)[: SIZE // 2] > 0).all()
    assert not pictures.mask(0)[SIZE // 2 :].any()
    assert (pictures.scene[SIZE // 2 + 4 :] == 255).all()


@pytest.mark.fault("D40")
def test_pictures_of_other_proportions_than_the_map_are_refused(tmp_path: Path) -> None:
    rgb = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    text = problem(scene_at(tmp_path / "a", rgb=rgb))
    assert "rgb.png: 128 x 64 pixels, but seg.png has 64 x 64" in text


def test_an_instance_too_small_to_be_seen_is_left_out_with_its_points(tmp_path: Path) -> None:
    seg = seg_of(3)
    seg[0, 0] = 200
    folder = scene_at(tmp_path / "a", seg=seg)
    settings = SceneSettings(image_size=SIZE, num_points=128, smallest_share=0.001)
    assert scene_facts(folder, settings)["labels"] == [[3]]
    assert (
        "instances left out, too small to be seen: label 200"
        in (scene_facts(folder, settings)["notes"])
    )
    scene = read_scene(folder, settings, np.random.default_rng(0))
    assert len(scene) == len(scene.pictures) == 1


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.fault("D39")
def test_missing_files_are_listed(tmp_path: Path) -> None:
    folder = scene_at(tmp_path / "a", rgb=None, surface=None)
    assert problem(folder) == f"{folder}: misses rgb.png, surface.npy"


@pytest.mark.fault("D41")
def test_a_map_without_instances_is_refused(tmp_path: Path) -> None:
    text = problem(scene_at(tmp_path / "a", seg=np.zeros((SIZE, SIZE), np.uint8)))
    assert "seg.png: no instance" in text


@pytest.mark.fault("D41")
def test_a_map_saved_as_jpeg_is_refused_whatever_its_name(tmp_path: Path) -> None:
    folder = scene_at(tmp_path / "a")
    Image.fromarray(seg_of(3, 200)).save(folder / "seg.png", format="JPEG")
    assert "saved as JPEG" in problem(folder)


@pytest.mark.fault("D41", "P35")
def test_more_instances_than_allowed_are_refused_and_many_are_fine(tmp_path: Path) -> None:
    labels = tuple(range(1, 31))
    folder = scene_at(tmp_path / "a", labels)
    assert len(read(folder)) == 30
    settings = SceneSettings(image_size=SIZE, max_instances=8)
    assert "30 different values above background, expected at most 8" in problem(folder, settings)


@pytest.mark.fault("D42")
def test_labels_without_points_are_shown_beside_those_with(tmp_path: Path) -> None:
    folder = scene_at(tmp_path / "a", seg=seg_of(3, 200, 9))
    assert "column 7 has the labels 3, 200, but seg.png has 3, 9, 200" in problem(folder)


def test_all_problems_of_a_scene_are_told_together(tmp_path: Path) -> None:
    broken = np.c_[ball(), np.full(200, 3)]
    broken[:5, 0] = np.nan
    folder = scene_at(tmp_path / "a", (3,), scene_rgb=None, surface=broken)
    (folder / "rgb.png").write_bytes(b"<html>")
    lines = problem(folder).splitlines()
    assert lines[0] == f"{folder}: misses scene_rgb.png"
    assert lines[1] == f"{folder / 'rgb.png'}: an HTML or XML page, not a picture"
    assert "5 of 200 rows hold NaN or infinity" in lines[2]


# -- many scenes -----------------------------------------------------------------------------------


@pytest.mark.fault("D39")
def test_all_scenes_are_looked_at_and_each_says_what_is_wrong(tmp_path: Path) -> None:
    data = tmp_path / "data"
    scene_at(data / "scene_2")
    scene_at(data / "scene_1", rgb=None)
    scene_at(data / ".partial")
    (data / "notes").mkdir()
    folders = list_scenes(data)
    assert [folder.name for folder in folders] == ["scene_1", "scene_2"]
    first, second = look_at(folders, SETTINGS, data)
    assert first.problem == f"{data / 'scene_1'}: misses rgb.png"
    assert second.value["labels"] == [[3], [200]]
    assert second.value["points"] == [200, 200]
    lines = remarks({"scene_2": second.value})
    assert "surfaces of fewer than 8192 points, of which some are repeated: scene_2" in lines


def test_a_folder_without_scenes_is_refused_and_one_scene_is_recognised(tmp_path: Path) -> None:
    folder = scene_at(tmp_path / "data" / "a")
    with pytest.raises(DataError, match=r"one scene itself: give its parent, .*data"):
        list_scenes(folder)
    with pytest.raises(DataError, match="No such file"):
        list_scenes(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no scenes, expected folders with rgb\.png"):
        list_scenes(tmp_path / "empty")
