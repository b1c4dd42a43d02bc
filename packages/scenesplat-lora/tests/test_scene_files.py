"""Scenes on disk: read as documented, refused with everything that is wrong, written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_scenes import made_scene

from lora_core.errors import DataError
from lora_core.npy_file import read_array
from scenesplat_lora.language.text_embeddings import read_text_embeddings
from scenesplat_lora.scenes.facts import scene_facts
from scenesplat_lora.scenes.files import list_scenes, read_scene, write_scene
from scenesplat_lora.scenes.values import LAYOUTS, Layout
from scenesplat_lora.transforms import compose, training_transforms

ALL = ("normal", "lang_feat", "segment")


def saved(folder: Path, **changes: Any) -> Path:
    """A scene's folder with some arrays changed, or without those that are None."""
    write_scene(folder, made_scene(40))
    for name, array in changes.items():
        (folder / f"{name}.npy").unlink(missing_ok=True)
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    return folder


def test_a_scene_is_read_as_it_was_written(tmp_path: Path) -> None:
    scene = made_scene(40)
    found = read_scene(saved(tmp_path / "room_1"), Layout(), ALL)
    assert found["name"] == "room_1"
    for name, array in scene.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_allclose(found[name], array, atol=1e-7)
    assert isinstance(found["lang_feat"], np.memmap)


def test_five_files_are_enough_to_look_at_a_scene(tmp_path: Path) -> None:
    names = ("normal", "segment", "instance", "lang_feat", "valid_feat_mask")
    found = read_scene(saved(tmp_path / "a", **dict.fromkeys(names)))
    assert (found["segment"] == -1).all()
    assert found["segment"].dtype == found["instance"].dtype == np.int32
    assert found["opacity"].shape == (40, 1)
    assert "lang_feat" not in found


def test_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    np.save(folder / "extra.npy", np.zeros(3))
    assert len(read_scene(folder)["coord"]) == 40


def test_without_a_mask_rows_with_a_feature_are_usable(tmp_path: Path) -> None:
    found = read_scene(saved(tmp_path / "a", valid_feat_mask=None), wanted=["lang_feat"])
    assert found["valid_feat_mask"].tolist() == [row % 4 != 0 for row in range(40)]


@pytest.mark.parametrize(
    ("layout", "low", "high"), [("generic", 1e-4, 1.0), ("scannet", 0.0, 1.5), ("kitti360", 0, 0.5)]
)
def test_scales_are_clipped_as_each_data_set_does(
    tmp_path: Path, layout: str, low: float, high: float
) -> None:
    scale = np.zeros((40, 3), np.float32)
    scale[0] = 5
    found = read_scene(saved(tmp_path / "a", scale=scale), LAYOUTS[layout])["scale"]
    assert found.min() == np.float32(low)
    assert found.max() == np.float32(high)


def test_labels_are_taken_from_the_file_and_column_of_the_data_set(tmp_path: Path) -> None:
    both = np.stack([np.arange(40), np.zeros(40)], axis=1).astype(np.int64)
    folder = saved(tmp_path / "a", segment=both, segment20=np.full((40, 1), 7, np.uint8))
    assert read_scene(folder, LAYOUTS["scannetpp"])["segment"].tolist() == list(range(40))
    assert read_scene(folder, LAYOUTS["scannet"])["segment"].tolist() == [7] * 40
    with pytest.raises(DataError, match=r"segment: shape \[40, 2\]"):
        read_scene(folder, LAYOUTS["matterport"])


def test_a_labelled_cloud_has_its_own_rows(tmp_path: Path) -> None:
    cloud = {"pc_coord": np.zeros((9, 3)), "pc_segment20": np.arange(9)}
    folder = saved(tmp_path / "a", **cloud)
    found = read_scene(folder, LAYOUTS["scannet"], ["pc"])
    assert found["pc_segment"].tolist() == list(range(9))
    assert found["pc_coord"].dtype == np.float32
    assert "pc_coord" not in read_scene(folder, LAYOUTS["scannet"])


@pytest.mark.parametrize("form", [">f4", "<f8", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_number_formats_and_orders_are_read(tmp_path: Path, form: str, order: Any) -> None:
    coord = np.asarray(made_scene(40)["coord"].astype(form), order=order)
    found = read_scene(saved(tmp_path / "a", coord=coord))["coord"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, coord.astype(np.float32))


WRONG = {
    "missing": ({"coord": None, "quat": None}, "misses coord.npy, quat.npy"),
    "lengths": ({"scale": np.ones((39, 3))}, r"as many rows: .*coord \[40, 3\].*scale \[39, 3\]"),
    "nan": ({"coord": np.full((40, 3), np.nan)}, "coord: 40 of 40 rows hold NaN or infinity"),
    "transposed": ({"coord": np.ones((3, 40))}, "as many rows"),
    "shape": ({"color": np.ones((40, 4))}, r"color: shape \[40, 4\], expected \[N, 3\]"),
    "zero quaternion": ({"quat": np.eye(40, 4)}, "quat: 36 of 40 rows are zero"),
    "logits": ({"opacity": np.linspace(-5, 5, 40)}, r"opacity: -5..5.*sigmoid"),
    "logarithms": ({"scale": np.full((40, 3), -4.0)}, "scale: -4..-4.*apply exp"),
    "colours": ({"color": np.full((40, 3), 300.0)}, "color: 300..300, expected 0..255"),
    "float labels": ({"segment": np.zeros(40)}, "segment: float64, expected whole numbers"),
    "labels": ({"segment": np.full(40, -2)}, "segment: -2..-2, expected class numbers"),
    "mask": ({"valid_feat_mask": np.arange(40)}, "valid_feat_mask: int64"),
    "empty": ({n: np.zeros((0, 3)) for n in made_scene(1)}, "holds no points"),
    "features": ({"lang_feat": np.ones(40)}, r"lang_feat: float64 \[40\]"),
    "objects": ({"coord": np.array([{}] * 40)}, r"coord.npy: holds Python objects"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_scene_is_said(tmp_path: Path, fault: str) -> None:
    changes, message = WRONG[fault]
    with pytest.raises(DataError, match=message) as error:
        read_scene(saved(tmp_path / "room_1", **changes), Layout(), ALL)
    assert all("room_1" in line for line in str(error.value).splitlines())


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.fault("H04")
def test_objects_in_arrays_are_never_unpickled(tmp_path: Path) -> None:
    sprung, texts = tmp_path / "sprung", tmp_path / "texts.npz"
    objects = np.array([Trap(sprung)] * 40, dtype=object)
    scene = saved(tmp_path / "room_1", coord=objects)
    np.savez(texts, names=objects, embeddings=objects)
    with pytest.raises(DataError, match="coord"):
        read_scene(scene)
    with pytest.raises(DataError, match=r"texts\.npz"):
        read_text_embeddings(texts)
    assert not sprung.exists()


def test_all_faults_of_a_scene_come_together(tmp_path: Path) -> None:
    changes = {
        "coord": np.full((40, 3), np.inf),
        "segment": np.zeros(40),
        "opacity": np.full(40, 2),
    }
    with pytest.raises(DataError) as error:
        read_scene(saved(tmp_path / "a", **changes))
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == [
        "coord",
        "opacity",
        "segment",
    ]


def test_repairs_by_rule_are_told(tmp_path: Path) -> None:
    quat = -2 * made_scene(40)["quat"]
    color = made_scene(40)["color"] / 255
    notes: list[str] = []
    found = read_scene(saved(tmp_path / "a", quat=quat, color=color), notes=notes)
    np.testing.assert_allclose(found["quat"], made_scene(40)["quat"], atol=1e-6)
    np.testing.assert_allclose(found["color"], made_scene(40)["color"], atol=1e-3)
    assert len(notes) == 3
    assert any("quaternions were brought to length 1: 40 of 40" in note for note in notes)


@pytest.mark.parametrize("damage", ["truncated", "grown", "not npy", "empty", "huge header"])
def test_a_damaged_file_is_refused_before_memory_is_taken(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "coord.npy"
    np.save(path, np.zeros((40, 3), np.float32))
    data = path.read_bytes()
    if damage == "huge header":
        data = data.replace(b"(40, 3), }" + b" " * 12, b"(4000000000000, 3), }" + b" ")
    changed = {"truncated": data[:-5], "grown": data + b"123", "not npy": b"<html>", "empty": b""}
    path.write_bytes(changed.get(damage, data))
    with pytest.raises(DataError, match=r"coord.npy: (not a .npy file|its header promises)"):
        read_array(path)


def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", coord=None)
    os.mkfifo(folder / "coord.npy")
    with pytest.raises(DataError, match="not a regular file"):
        read_scene(folder)


def test_features_stay_on_disk_until_rows_of_them_are_used(tmp_path: Path) -> None:
    scene = read_scene(saved(tmp_path / "a"), wanted=["lang_feat"])
    step = compose(training_transforms(point_max=30))
    batch = step(scene, np.random.default_rng(0))
    assert batch["lang_feat"].shape == (30, 6)
    expected = {tuple(row) for row in made_scene(40)["lang_feat"].astype(np.float32).tolist()}
    assert {tuple(row) for row in batch["lang_feat"].tolist()} <= expected


def test_facts_count_what_can_be_learned_from(tmp_path: Path) -> None:
    features = made_scene(40)["lang_feat"]
    features[1] = 0
    folder = saved(tmp_path / "a", lang_feat=features)
    facts = scene_facts(folder, wanted=["lang_feat"], classes=5, width=6)
    assert (facts["rows"], facts["valid"], facts["empty"]) == (40, 29, 1)
    assert facts["labelled"] == int((made_scene(40)["segment"] != -1).sum())


def test_facts_refuse_labels_features_and_widths_that_do_not_fit(tmp_path: Path) -> None:
    features = made_scene(40)["lang_feat"]
    features[0] = np.nan  # no usable row: nobody looks at it
    features[3, 2] = np.inf
    folder = saved(tmp_path / "a", lang_feat=features)
    with pytest.raises(DataError, match="lang_feat: width 6, expected 768"):
        scene_facts(folder, wanted=["lang_feat"], width=768)
    with pytest.raises(DataError) as error:
        scene_facts(folder, wanted=["lang_feat"], classes=3, width=6)
    text = str(error.value)
    assert "segment: label 4, but there are 3 classes" in text
    assert "lang_feat: 1 rows marked valid hold NaN, infinity or more than 10000" in text


def test_splits_are_listed_in_order_and_filtered(tmp_path: Path) -> None:
    for name in ("train/b_0", "train/a_1", "train/a_0", "test/c_0", "train/.b_9.77"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train" / "list.txt").write_text("no scene")
    found = list_scenes(tmp_path, ["train", "test"], filtered_scene=["a"])
    assert [path.name for path in found] == ["b_0", "c_0"]
    assert [path.name for path in list_scenes(tmp_path, "train")] == ["a_0", "a_1", "b_0"]
    with pytest.raises(DataError) as error:
        list_scenes(tmp_path, ["trian", "test"], filtered_scene=["c"])
    assert "did you mean 'train'" in str(error.value)
    assert "test: no folders of scenes are left" in str(error.value)


def test_a_scene_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    scene = made_scene(10) | {"lang_feat": np.array(["text"] * 10)}  # fails in the middle
    with pytest.raises(ValueError, match="text"):
        write_scene(tmp_path / "a", scene)
    assert list(tmp_path.iterdir()) == []
    write_scene(tmp_path / "a", made_scene(10))
    with pytest.raises(DataError, match="exists already"):
        write_scene(tmp_path / "a", made_scene(10))
