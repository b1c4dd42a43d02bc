"""`prepare import`: labels of ScanNet, ScanNet++ and Matterport3D as they are distributed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import raw_folders as raw

from lora_core.errors import ConfigError, DataError
from scenesplat_lora import prepare
from scenesplat_lora.prepare_ply import main as prepare_ply
from scenesplat_lora.raw.matterport import of_vertices
from scenesplat_lora.raw.scannet import NYU40_OF_20, classes_of
from scenesplat_lora.raw.scannetpp import class_numbers
from scenesplat_lora.scenes.files import list_scenes, read_scene
from scenesplat_lora.scenes.ply import read_gaussians
from scenesplat_lora.scenes.values import LAYOUTS

A, B = "scene0000_00", "scene0011_01"


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def words(root: Path, dataset: str, *more: str, splats: bool = True) -> list[str]:
    found = ["import", "--dataset", dataset, "--source", str(root / "raw")]
    found += ["--splats", str(root / "splats")] if splats else []
    return [*found, "--output", str(root / "data"), *more]


@pytest.fixture
def scannet(tmp_path: Path) -> Path:
    raw.write_scannet(tmp_path / "raw", A, B)
    for seed, name in enumerate((A, B)):
        raw.write_splat(tmp_path / "splats" / name / "point_cloud.ply", seed)
    return tmp_path


# -- ScanNet ---------------------------------------------------------------------------------------


def test_scannet_becomes_scenes_with_the_labels_of_the_nearest_vertices(scannet: Path) -> None:
    assert prepare.main(words(scannet, "scannet")) == 0
    assert [folder.name for folder in list_scenes(scannet / "data", "train")] == [A, B]
    scene = read_scene(scannet / "data" / "train" / A, LAYOUTS["scannet"], ["pc", "segment"])
    x = scene["pc_coord"][:, 0]
    assert np.array_equal(scene["pc_coord"], raw.floor())
    assert np.array_equal(scene["pc_segment"], np.select([x < 1.1, x < 2.1], [1, 19], -1))

    coord = scene["coord"]
    assert np.array_equal(
        coord, read_gaussians(scannet / "splats" / A / "point_cloud.ply")["coord"]
    )
    known = raw.floor()[scene["pc_segment"] >= 0]
    apart = np.linalg.norm(coord[:, None] - known[None], axis=2)
    labels = scene["pc_segment"][scene["pc_segment"] >= 0][apart.argmin(1)]
    assert np.array_equal(scene["segment"], np.where(apart.min(1) <= 0.1, labels, -1))
    assert 30 < (scene["segment"] == 1).sum() < 270
    assert (scene["segment"][::10] == -1).all()  # in the air
    near, far = coord[:, 0] < 0.45, scene["segment"] == 19
    assert set(scene["instance"][near & (scene["segment"] >= 0)]) == {0}
    assert set(scene["instance"][far]) == {1}
    facts = json.loads((scannet / "data/train/manifest_import.json").read_text())["scenes"][A]
    labelled = int((scene["segment"] >= 0).sum())
    assert facts["made"] == {"rows": 300, "labelled": labelled, "points": 144}


def test_the_20_classes_are_numbered_in_the_order_of_the_benchmark() -> None:
    labels = classes_of(np.arange(41), NYU40_OF_20)
    assert labels[[1, 12, 14, 39]].tolist() == [0, 11, 12, 19]
    assert labels[[0, 13, 15, 22, 40]].tolist() == [-1] * 5
    assert sorted(labels[labels >= 0]) == list(range(20))


def test_scans_without_labels_become_scenes_without(
    scannet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scannet / "raw" / "scans" / B).rename(scannet / "raw" / "scans_test")
    test = scannet / "raw" / "scans_test" / B
    raw.write_mesh(test / f"{B}_vh_clean_2.ply", raw.floor(), raw.triangles())
    prepare.main(words(scannet, "scannet"))
    names = {path.name for path in (scannet / "data" / "train" / B).iterdir()}
    assert names == {f"{name}.npy" for name in ("coord", "color", "opacity", "scale", "quat")}
    assert f"1 scene without a labelled vertex: {B}" in capsys.readouterr().out


def test_a_list_chooses_scenes_and_unknown_names_are_told(scannet: Path) -> None:
    listed = scannet / "val.txt"
    listed.write_text(f"{B}\r\n\r\n")
    prepare.main(words(scannet, "scannet", "--scenes", str(listed), "--split", "val"))
    assert [folder.name for folder in list_scenes(scannet / "data", "val")] == [B]
    listed.write_text(f"{A}\nscene0011_02\nscene9999_00\n")
    with pytest.raises(DataError, match=rf"(?s)no scan scene0011_02.*'{B}'.*no scan scene9999_00"):
        prepare.main(words(scannet, "scannet", "--scenes", str(listed)))
    listed.write_text(f"{A}\n{B}\n")
    (scannet / "splats" / A / "point_cloud.ply").unlink()
    with pytest.raises(DataError, match=f"no splat of {A}$"):
        prepare.main(words(scannet, "scannet", "--scenes", str(listed)))


def test_splats_and_scans_without_partner_are_left_out_aloud(
    scannet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scannet / "splats" / A).rename(scannet / "splats" / "garden")
    prepare.main(words(scannet, "scannet"))
    said = capsys.readouterr().out
    assert "1 splat of no scan left out: garden" in said
    assert f"1 scan without splat left out: {A}" in said
    (scannet / "splats" / B).rename(scannet / "splats" / "kitchen")
    with pytest.raises(DataError, match=f"there are garden, kitchen, expected {A}, {B}"):
        prepare.main(words(scannet, "scannet"))


def test_a_splat_in_another_frame_is_refused_and_the_others_are_made(scannet: Path) -> None:
    raw.write_splat(scannet / "splats" / A / "point_cloud.ply", shift=5.0)
    message = rf"0 of 300 Gaussians are within 0.1 m of a labelled vertex of {A}"
    with pytest.raises(DataError, match=message):
        prepare.main(words(scannet, "scannet"))
    assert [folder.name for folder in list_scenes(scannet / "data", "train")] == [B]


def test_without_splats_the_cloud_is_written_into_scenes_that_are_there(scannet: Path) -> None:
    with pytest.raises(DataError, match=f"no scene folders {A}, {B}: give --splats"):
        prepare.main(words(scannet, "scannet", splats=False))
    prepare_ply(["--source", str(scannet / "splats"), "--output", str(scannet / "data")])
    before = tree(scannet / "data" / "train" / A)
    prepare.main(words(scannet, "scannet", splats=False))
    folder = scannet / "data" / "train" / A
    added = {name for name in tree(folder) if name not in before}
    assert added == {"pc_coord.npy", "pc_segment20.npy"}
    assert {name: data for name, data in tree(folder).items() if name in before} == before
    scene = read_scene(folder, LAYOUTS["scannet"], ["pc"])
    assert (scene["pc_segment"] >= 0).sum() == 132


def test_shards_in_any_order_and_a_second_run_give_the_same_files(scannet: Path) -> None:
    one = words(scannet, "scannet")
    prepare.main([*one, "--output", str(scannet / "one")])
    for shard in ("1", "0"):
        prepare.main([*one, "--num_shards", "2", "--shard_id", shard])
    assert tree(scannet / "one") == tree(scannet / "data")
    when = (scannet / "data" / "train" / A / "coord.npy").stat().st_mtime_ns
    prepare.main(one)
    assert (scannet / "data" / "train" / A / "coord.npy").stat().st_mtime_ns == when
    with pytest.raises(DataError, match=r"prepared with other settings.*--overwrite"):
        prepare.main([*one, "--max_distance", "0.2"])


# -- ScanNet++ -------------------------------------------------------------------------------------


def test_scannetpp_has_the_smallest_object_of_a_vertex_first(tmp_path: Path) -> None:
    raw.write_scannetpp(tmp_path / "raw", "036bce3393")
    raw.write_splat(tmp_path / "splats" / "036bce3393.ply")
    prepare.main(words(tmp_path, "scannetpp"))
    folder = tmp_path / "data" / "train" / "036bce3393"
    cloud = np.load(folder / "pc_segment.npy")
    assert cloud[0].tolist() == [3, 2, 1]  # mug, table, floor; dust is mapped to None
    assert cloud[12].tolist() == [2, 1, -1]
    assert cloud[-1].tolist() == [1, -1, -1]
    assert np.load(folder / "segment.npy").shape == (300, 3)
    scene = read_scene(folder, LAYOUTS["scannetpp"], ["pc", "segment"])
    assert set(scene["pc_segment"]) == {1, 2, 3}
    labelled = scene["segment"] >= 0
    number = {1: 0, 2: 1, 3: 2}  # objects in the order of the annotation
    assert {
        (s, i) for s, i in zip(scene["segment"], scene["instance"], strict=True) if s > 0
    } == set(number.items())
    assert (scene["instance"][~labelled] == -1).all()


def test_a_list_of_classes_counts_names_as_they_are(tmp_path: Path) -> None:
    raw.write_scannetpp(tmp_path / "raw", "a")
    raw.write_splat(tmp_path / "splats" / "a.ply")
    classes = tmp_path / "mine.txt"
    classes.write_text("\ufeffdust\nREMOVE\nfloor\n", "utf-8")
    prepare.main(words(tmp_path, "scannetpp", "--classes", str(classes)))
    cloud = np.load(tmp_path / "data" / "train" / "a" / "pc_segment.npy")
    assert cloud[0].tolist() == [0, 1, 2]
    assert cloud[20].tolist() == [2, -1, -1]


def test_the_map_of_the_benchmark_renames_keeps_and_leaves_out() -> None:
    rows = [("couch", "sofa"), ("sofa", ""), ("dirt", "None"), ("lamp", "None"), ("x", "y")]
    assert class_numbers(["sofa", "lamp"], rows) == {"sofa": 0, "couch": 0}


# -- Matterport3D ----------------------------------------------------------------------------------


def test_matterport_regions_become_scenes_and_a_house_stands_for_its_regions(
    tmp_path: Path,
) -> None:
    raw.write_matterport(tmp_path / "raw", "17DRP5sb8fy", "5LpN3gDmAk7")
    raw.write_splat(tmp_path / "splats" / "17DRP5sb8fy_00.ply", 0)
    raw.write_splat(tmp_path / "splats" / "17DRP5sb8fy_01" / "ply" / "point_cloud_29999.ply", 1)
    listed = tmp_path / "scenes_train.txt"
    listed.write_text("17DRP5sb8fy\n")
    prepare.main(words(tmp_path, "matterport", "--scenes", str(listed)))
    names = [folder.name for folder in list_scenes(tmp_path / "data", "train")]
    assert names == ["17DRP5sb8fy_00", "17DRP5sb8fy_01"]
    folder = tmp_path / "data" / "train" / "17DRP5sb8fy_00"
    scene = read_scene(folder, LAYOUTS["matterport"], ["pc", "segment"])
    x = scene["pc_coord"][:, 0]
    # Categories: none at both ends, then the floor (1), then the ceiling (20).
    assert scene["pc_segment"][x < 0.3].tolist() == [-1] * 24
    assert set(scene["pc_segment"][(x > 0.7) & (x < 1.3)]) == {1}
    assert set(scene["pc_segment"][(x > 1.5) & (x < 1.7)]) == {20}
    assert set(scene["pc_segment"][x > 2.1]) == {-1}
    assert set(scene["instance"][scene["segment"] == 1]) == {0}
    assert set(scene["instance"][scene["segment"] == 20]) == {1}


def test_a_vertex_has_the_most_frequent_number_of_its_faces() -> None:
    triangles = np.array([[0, 1, 2], [0, 1, 3], [0, 3, 2], [4, 4, 4]])
    assert of_vertices(triangles, np.array([5, 5, -1, 7]), 6).tolist() == [5, 5, -1, -1, 7, -1]
    assert of_vertices(triangles[:0], np.zeros(0, int), 2).tolist() == [-1, -1]


# -- damage ----------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: raw.write_json(f / f"{A}.aggregation.json", []), "expected a list `segGroups`"),
        (
            lambda f: change(f / f"{A}.aggregation.json", '"label": "floor"', '"label": 3'),
            r"segGroups\[0\]: expected an object with a text `label`",
        ),
        (
            lambda f: change(f / f"{A}.aggregation.json", "[0, 7, 14]", "[0, 7.5]"),
            r"segGroups\[0\].segments: expected whole numbers",
        ),
        (
            lambda f: raw.write_json(
                f / f"{A}_vh_clean_2.0.010000.segs.json", {"segIndices": [1, 2]}
            ),
            "segIndices has 2 entries, the mesh 144 vertices",
        ),
        (
            lambda f: raw.write_mesh(
                f / f"{A}_vh_clean_2.labels.ply", raw.floor(), raw.triangles()
            ),
            "no property `label`",
        ),
        (
            lambda f: raw.write_mesh(
                f / f"{A}_vh_clean_2.labels.ply", raw.floor() * np.nan, raw.triangles()
            ),
            "144 vertices hold NaN",
        ),
    ],
)
def test_damaged_annotations_are_told_and_the_other_scans_are_made(
    scannet: Path, damage: Damage, message: str
) -> None:
    damage(scannet / "raw" / "scans" / A)
    with pytest.raises(DataError, match=f"{A}.*{message}"):
        prepare.main(words(scannet, "scannet"))
    assert [folder.name for folder in list_scenes(scannet / "data", "train")] == [B]


def test_faces_and_categories_outside_their_tables_are_told(tmp_path: Path) -> None:
    raw.write_matterport(tmp_path / "raw", "h", regions=1)
    raw.write_splat(tmp_path / "splats" / "h_00.ply")
    mesh = tmp_path / "raw/v1/scans/h/region_segmentations/region0.ply"
    faces = raw.triangles()
    category = np.full(len(faces), 5, "i4")
    raw.write_mesh(mesh, raw.floor(), faces + 9, category_id=category)
    with pytest.raises(
        DataError, match=r"(?s)category 5, but the table ends at 4.*outside 0 \.\.\. 143"
    ):
        prepare.main(words(tmp_path, "matterport"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "scannet", "--classes", "a"], "--classes is for scannetpp"),
        (["--dataset", "scannet", "--label_map", "a"], "labels of scannet need none"),
        (["--dataset", "matterport", "--max_distance", "0"], "metres above 0"),
        (["--dataset", "matterport", "--split", "../x"], "name of one folder"),
        (["--dataset", "kitti"], "--dataset"),
    ],
)
def test_settings_that_cannot_work_are_refused(more: list[str], message: str) -> None:
    with pytest.raises((ConfigError, SystemExit), match=message):
        prepare.main(["import", "--source", "raw", *more])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("scannet", "no scans of scannet; expected scans/scene0000_00"),
        ("scannetpp", "top100.txt: no such file: give --classes"),
        ("matterport", "no metadata/category_mapping.tsv: give --label_map"),
    ],
)
def test_a_folder_of_something_else_is_told(tmp_path: Path, dataset: str, message: str) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match=message):
        prepare.main(words(tmp_path, dataset))
