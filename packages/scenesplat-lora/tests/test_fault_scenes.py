"""What is wrong with scenes is said before weights load, all at once, as people can use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faulty_scenes as faulty
import numpy as np
import pytest
import tiny_scenes

from lora_core.errors import DataError
from lora_core.testing.no_device import no_device
from scenesplat_lora.scenes.files import read_scene
from scenesplat_lora.transforms.geometry import center_shift

ROWS = faulty.ROWS


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scenes.write_base(tmp_path_factory.mktemp("base") / "base.pth")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return faulty.write_data(tmp_path / "data")


def room(data: Path) -> Path:
    return data / "train" / "room_0"


def problem(base: Path, data: Path, **given: Any) -> str:
    """The one line about a data set with one bad scene, before a device or weights are touched."""
    with no_device(), pytest.raises(DataError) as caught:
        faulty.loaded(base, data, data.parent / "run", **given)
    title, line, remedy = str(caught.value).splitlines()
    assert title == f"{data}: 1 problem"
    assert "--on_bad_sample skip" in remedy
    assert line.startswith(f"{room(data)}: ")
    return line.removeprefix(f"{room(data)}: ")


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.fault("P16")
@pytest.mark.parametrize(
    "name", ["coord", "color", "opacity", "quat", "scale", "segment", "lang_feat"]
)
def test_arrays_of_different_length_are_shown_with_all_lengths(
    capsys: Any, base: Path, data: Path, name: str
) -> None:
    faulty.change(room(data), **{name: lambda array: array[:-1]})
    line = problem(base, data)
    assert line.startswith("all files must have as many rows: ")
    assert f"{name} [{ROWS - 1}" in line
    assert line.count(f"[{ROWS}") == 8


@pytest.mark.fault("P17", "D01")
@pytest.mark.parametrize("name", ["coord", "color", "opacity", "quat", "scale", "lang_feat"])
def test_a_missing_array_is_named(capsys: Any, base: Path, data: Path, name: str) -> None:
    faulty.change(room(data), **{name: None})
    assert problem(base, data) == f"misses {name}.npy"


@pytest.mark.fault("P17", "D01")
def test_all_missing_arrays_of_all_scenes_are_said_together(
    capsys: Any, base: Path, data: Path
) -> None:
    faulty.change(room(data), coord=None, quat=None)
    faulty.change(data / "val" / "room_0", lang_feat=None)
    message = faulty.refused(capsys, base, data, data.parent / "run")
    assert f"{data}: 2 problems" in message
    assert f"{room(data)}: misses coord.npy, quat.npy" in message
    assert f"{data / 'val' / 'room_0'}: misses lang_feat.npy" in message


@pytest.mark.fault("P18")
def test_a_scene_without_points_is_refused(capsys: Any, base: Path, data: Path) -> None:
    names = [path.stem for path in room(data).glob("*.npy")]
    faulty.change(room(data), **{name: lambda array: array[:0] for name in names})
    assert problem(base, data) == "holds no points"


@pytest.mark.fault("P20")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["coord", "color", "opacity", "quat", "scale"])
def test_values_that_are_not_finite_are_named_with_their_attribute_and_counted(
    capsys: Any, base: Path, data: Path, name: str, value: float
) -> None:
    def broken(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[3:6, 0] = value
        return array

    faulty.change(room(data), **{name: broken})
    assert problem(base, data) == f"{name}: 3 of {ROWS} rows hold NaN or infinity"


@pytest.mark.fault("P20")
def test_features_that_are_not_finite_matter_where_they_are_learned(
    capsys: Any, base: Path, data: Path
) -> None:
    mask = np.load(room(data) / "valid_feat_mask.npy")

    def broken(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        array[np.flatnonzero(rows)[:2], 1] = np.nan
        return array

    faulty.change(room(data), lang_feat=lambda array: broken(array, ~mask))
    assert not faulty.loaded(base, data, data.parent / "run").bad
    faulty.change(room(data), lang_feat=lambda array: broken(array, mask))
    line = problem(base, data)
    assert line == "lang_feat: 2 rows marked valid hold NaN, infinity or more than 10000"


# -- ranges ----------------------------------------------------------------------------------------


@pytest.mark.fault("P21")
@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"quat": np.eye(ROWS, 4)}, "quat: 56 of 60 rows are zero: not a rotation (w, x, y, z)"),
        ({"scale": np.full((ROWS, 3), -4.5)}, "scale: -4.5..-4.5, expected metres above 0: are "
         "these logarithms? apply exp"),
        ({"opacity": np.linspace(-7, 5, ROWS)}, "opacity: -7..5, expected 0..1: are these logits? "
         "apply a sigmoid"),
        ({"opacity": np.linspace(0, 255, ROWS)}, "opacity: 0..255, expected 0..1: divide by 255"),
        ({"color": np.linspace(-1, 1, 3 * ROWS).reshape(-1, 3)}, "color: -1..1, expected 0..255 "
         "(0.5 + 0.2821 f_dc, times 255)"),
    ],
    ids=["zero quaternions", "logarithms", "logits", "opacity of 255", "harmonics"],
)  # fmt: skip
def test_values_in_other_units_are_refused_with_their_range(
    capsys: Any, base: Path, data: Path, arrays: dict[str, Any], expected: str
) -> None:
    faulty.change(room(data), **arrays)
    assert problem(base, data) == expected


@pytest.mark.fault("P21")
def test_quaternions_and_colours_are_brought_into_range_and_counted_once(
    base: Path, data: Path
) -> None:
    for split, name in (("train", "room_0"), ("train", "room_1"), ("val", "room_0")):
        faulty.change(
            data / split / name,
            quat=lambda array: array * np.float32(-3),
            color=lambda array: array / np.float32(255),
            scale=lambda array: array * 1000,
        )
    text = str(faulty.loaded(base, data, data.parent / "run"))
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    assert len(notes) == 4  # one per kind, however many scenes
    places = [f"{place} (60 of 60)" for place in ("train/room_0", "train/room_1", "val/room_0")]
    assert f"note: quaternions were brought to length 1: {', '.join(places)}" in notes
    assert f"note: quaternions with w < 0 were negated: {', '.join(places)}" in notes
    assert any("taken as 0..1 and multiplied by 255: train/room_0 (0" in n for n in notes)
    assert any("scales above 1 m were cut, are they metres?" in n for n in notes)
    scene = read_scene(room(data))
    np.testing.assert_allclose(np.linalg.norm(scene["quat"], axis=1), 1, atol=1e-6)
    assert 200 < scene["color"].max() <= 255


@pytest.mark.fault("P21")
def test_many_scenes_with_one_repair_are_counted_in_one_line(base: Path, tmp_path: Path) -> None:
    root = tiny_scenes.write_scenes(tmp_path / "data", train=4, val=1, rows=20)
    for number in range(4):
        faulty.change(root / "train" / f"room_{number}", quat=lambda array: array * 2)
    text = str(faulty.loaded(base, root, tmp_path / "run"))
    assert "to length 1: 4 scenes, such as train/room_0 (20 of 20)" in text


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.fault("P22")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_scene_of_too_many_cells_is_refused_with_the_grid_that_works(
    capsys: Any, base: Path, data: Path, axis: int
) -> None:
    def stretched(coord: np.ndarray) -> np.ndarray:
        coord[7, axis] += 4000
        return coord

    faulty.change(room(data), coord=stretched)
    transform = '[{"type": "GridSample", "grid_size": 0.05}, {"type": "ToTensor"}, ' + (
        '{"type": "Collect", "keys": ["grid_coord", "coord", "segment", "lang_feat", '
        '"valid_feat_mask"]}]'
    )
    line = problem(base, data, data__train__transform=transform)
    assert "at most 65536 are possible" in line
    least = line.rpartition("grid_size >= ")[2]
    assert not faulty.loaded(
        base, data, data.parent / "run",
        data__train__transform=transform.replace("0.05", least),
    ).bad  # fmt: skip


@pytest.mark.fault("P22")
def test_a_scene_that_only_some_epochs_could_augment_is_refused_at_the_start(
    capsys: Any, base: Path, data: Path
) -> None:
    coord = np.random.default_rng(0).random((ROWS, 3)) * [90, 90, 20]
    faulty.change(room(data), coord=coord)  # as it lies it fits, turned by 45 degrees it would not
    line = problem(base, data)
    assert line.startswith("ElasticDistortion: ")
    assert "cut the scene into chunks" in line


@pytest.mark.fault("P22")
@pytest.mark.parametrize("size", ["0", "-0.02", ".nan", ".inf", "1e-9"])
def test_an_impossible_grid_size_is_refused(capsys: Any, base: Path, data: Path, size: str) -> None:
    message = faulty.refused(capsys, base, data, data.parent / "run", data__grid_size=size)
    assert "data.grid_size" in message


@pytest.mark.fault("P22")
@pytest.mark.parametrize("size", ["0", "-0.02", "NaN", "Infinity"])
def test_an_impossible_grid_size_in_a_list_of_transforms_is_refused(
    capsys: Any, base: Path, data: Path, size: str
) -> None:
    transform = f'[{{"type": "GridSample", "grid_size": {size}}}]'
    given = {"data__train__transform": transform}
    message = faulty.refused(capsys, base, data, data.parent / "run", **given)
    assert "data.train.transform" in message
    assert "grid_size" in message


@pytest.mark.fault("P23")
def test_negative_coordinates_are_shifted_before_they_are_quantised(base: Path, data: Path) -> None:
    coord = np.load(room(data) / "coord.npy")
    before = faulty.loaded(base, data, data.parent / "run").train[0]
    faulty.change(room(data), coord=coord - 64)
    after = faulty.loaded(base, data, data.parent / "run").train[0]
    assert int(after["grid_coord"].min()) == 0
    assert abs(len(after["coord"]) - len(before["coord"])) <= 3  # other borders of cells


@pytest.mark.fault("P23")
@pytest.mark.parametrize("form", [np.float64, np.float32])
def test_coordinates_of_maps_are_moved_to_the_origin_without_loss(
    base: Path, data: Path, form: Any
) -> None:
    rng = np.random.default_rng(0)
    steps = 2.0**-10 if form is np.float64 else 1.0  # what the file's format holds at 5.4e6 m
    local = np.round(rng.random((ROWS, 3)) * [8, 8, 3] / steps) * steps
    origin = np.array([691_000.0, 5_335_000.0, 516.0])
    faulty.change(room(data), coord=(local + origin).astype(form))
    np.save(room(data) / "pc_coord.npy", (local[:10] + origin).astype(form))
    np.save(room(data) / "pc_segment.npy", np.zeros(10, int))
    notes: list[str] = []
    scene = read_scene(room(data), wanted=("pc",), notes=notes)
    np.testing.assert_array_equal(scene["coord"] - scene["coord"][0], local - local[0])
    np.testing.assert_array_equal(scene["pc_coord"], scene["coord"][:10])  # both moved alike
    (note,) = (note for note in notes if "far from the origin" in note)
    assert "by -69100" in note
    assert ("float32 has rounded them to 0.5 m" in note) == (form is np.float32)
    text = str(faulty.loaded(base, data, data.parent / "run"))
    assert "note: coordinates far from the origin, as maps have them, were moved" in text
    centred = center_shift(scene, rng)["coord"]
    assert np.abs(centred).max() < 10


@pytest.mark.fault("P39")
def test_a_scene_that_is_hardly_a_voxel_or_too_large_is_asked_for_its_unit(
    base: Path, data: Path
) -> None:
    coord = np.load(room(data) / "coord.npy")
    faulty.change(room(data), coord=coord / 10)  # in decametres
    text = str(faulty.loaded(base, data, data.parent / "run"))
    assert "hardly larger than a voxel of 0.05 m, are its coordinates metres?" in text
    faulty.change(room(data), coord=coord * 1e5)
    with pytest.raises(DataError, match=r"cut the scene into chunks.*are its coordinates metres"):
        faulty.loaded(base, data, data.parent / "run")


# -- labels and features ---------------------------------------------------------------------------


@pytest.mark.fault("P25")
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.full(ROWS, 5), "segment: label 5, but there are 5 classes (0 is first)"),
        (np.full(ROWS, -100), "segment: -100..-100, expected class numbers, or -1 for none"),
        (np.full(ROWS, 2**40), f"segment: {2**40}..{2**40}, expected class numbers"),
        (np.zeros(ROWS), "segment: float64, expected whole numbers; -1 where there is no label"),
        (np.zeros((ROWS, 2), int), "segment: shape [60, 2], expected one label per row"),
    ],
    ids=["above the classes", "negative", "huge", "floats", "two columns"],
)
def test_labels_that_are_no_classes_are_refused(
    capsys: Any, base: Path, data: Path, tmp_path: Path, labels: np.ndarray, expected: str
) -> None:
    texts = tiny_scenes.write_texts(tmp_path / "texts.npz")
    faulty.change(room(data), segment=labels)
    assert faulty.refused(
        capsys, base, data, tmp_path / "run", data__text_embeddings=texts
    ).splitlines()[1].startswith(f"{room(data)}: {expected}")  # fmt: skip


@pytest.mark.fault("P25")
def test_scenes_without_any_label_or_feature_are_left_out_and_said(
    capsys: Any, base: Path, data: Path
) -> None:
    faulty.change(room(data), valid_feat_mask=np.zeros(ROWS, bool))
    splits = faulty.loaded(base, data, data.parent / "run")
    assert [record.key for record in splits.train.records] == ["train/room_1"]
    assert "note: 1 scene of train with nothing to learn from are left out" in str(splits)
    faulty.change(data / "train" / "room_1", valid_feat_mask=np.zeros(ROWS, bool))
    message = faulty.refused(capsys, base, data, data.parent / "run")
    assert "no scene of train has rows with language features" in message


@pytest.mark.fault("P27")
def test_features_of_norm_0_are_masked_and_counted(base: Path, data: Path) -> None:
    valid = np.flatnonzero(np.load(room(data) / "valid_feat_mask.npy"))

    def emptied(array: np.ndarray) -> np.ndarray:
        array[valid[:5]] = 0
        return array

    faulty.change(room(data), lang_feat=emptied)
    splits = faulty.loaded(base, data, data.parent / "run", data__grid_size=1e-4)
    note = f"features of norm 0 are not learned: train/room_0 (5 of {len(valid)} rows marked valid)"
    assert note in str(splits)
    assert splits.facts["train", "train/room_0"]["valid"] == len(valid) - 5
    (sample,) = splits.val or ()
    assert not sample["valid_feat_mask"][(sample["lang_feat"] == 0).all(dim=1)].any()


@pytest.mark.fault("P26")
def test_texts_of_another_width_are_refused_with_both(
    capsys: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "texts.npz"
    np.savez(path, names=np.array(["wall", "floor"]), embeddings=np.eye(2, 7, dtype=np.float32))
    message = faulty.refused(capsys, base, data, tmp_path / "run", data__text_embeddings=path)
    assert "width 7" in message
    assert f"features {tiny_scenes.WIDTH}" in message
    np.savez(path, names=np.array(["wall"]), embeddings=np.eye(2, 12, dtype=np.float32))
    message = faulty.refused(capsys, base, data, tmp_path / "run", data__text_embeddings=path)
    assert f"{path}: 1 class names for 2 embeddings" in message


# -- what a run asks of scenes ---------------------------------------------------------------------


@pytest.mark.fault("P38")
def test_normals_that_transforms_ask_for_must_be_there(capsys: Any, base: Path, data: Path) -> None:
    keys = ["coord", "grid_coord", "segment", "lang_feat", "valid_feat_mask", "normal"]
    transform = str(
        [{"type": "GridSample"}, {"type": "ToTensor"}, {"type": "Collect", "keys": keys}]
    )
    faulty.change(room(data), normal=None)
    given = {"data__train__transform": transform.replace("'", '"')}
    assert problem(base, data, **given) == "misses normal.npy"


@pytest.mark.fault("P38")
def test_transforms_that_give_the_network_other_channels_are_refused(
    capsys: Any, base: Path, data: Path
) -> None:
    keys = '"keys": ["coord", "grid_coord", "segment", "lang_feat", "valid_feat_mask"]'
    feat = '"feat_keys": ["color", "opacity", "quat", "scale", "normal"]'
    transform = (
        f'[{{"type": "GridSample"}}, {{"type": "ToTensor"}}, {{"type": "Collect", {keys}, {feat}}}]'
    )
    message = faulty.refused(
        capsys, base, data, data.parent / "run", data__train__transform=transform
    )
    assert "feat_keys of Collect give 14 channels, the network takes 11" in message


@pytest.mark.fault("P39")
def test_scenes_prepared_for_other_voxels_or_another_layout_are_told(
    base: Path, data: Path
) -> None:
    from scenesplat_lora import prepare

    flags = ["chunk", "--data_root", str(data), "--split", "train", "--chunk_minimum_size", "1"]
    prepare.main([*flags, "--grid_size", "0.06", "--layout", "matterport"])
    split = "train_grid6.0cm_chunk6x6_stride3x3"
    text = str(faulty.loaded(base, data, data.parent / "run", data__train__split=split))
    assert (
        f"{split}: its chunks hold one Gaussian per 0.06 m cell, coarser than the voxels of" in text
    )
    assert "cut with --layout matterport, this run reads --data.layout generic" in text
    given = {"data__train__split": split, "data__grid_size": 0.06, "data__layout": "matterport"}
    assert "chunks" not in str(faulty.loaded(base, data, data.parent / "run", **given))
    (data / split / "manifest_chunk.json").write_text('{"scenes": [1, {"settings": 3}]}')
    assert "chunks" not in str(faulty.loaded(base, data, data.parent / "run", **given))


@pytest.mark.fault("D10")
def test_a_scene_of_both_splits_is_told(base: Path, data: Path) -> None:
    faulty.change(data / "val" / "room_0", coord=np.load(room(data) / "coord.npy"))
    text = str(faulty.loaded(base, data, data.parent / "run"))
    assert "note: 1 scene of val in train too, so that its scores flatter: val/room_0" in text


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ('[{"type": "GridSample", "grid_size": "two"}]', "transform[0]: GridSample fails"),
        ('[{"type": "RandomScale", "scale": 3}]', "transform[0]: RandomScale fails"),
        ('[{"type": "RandomJitter", "sigma": null}]', "transform[0]: RandomJitter fails"),
        ('[{"type": "RandomFlip", "p": "often"}]', "transform[0]: RandomFlip fails"),
        ('[{"type": "RandomRotate", "axis": "w"}]', "axis is 'w'"),
        ('[{"type": "ElasticDistortion", "distortion_params": [[0, 1]]}]', "transform[0]: Elastic"),
        ('[{"type": "SphereCrop", "point_max": 0}]', "point_max"),
        ('[{"type": "ToTensor"}]', "samples have no feat, grid_coord, offset: end with"),
    ],
)
def test_transforms_that_cannot_work_are_refused_before_data_is_read(
    capsys: Any, base: Path, data: Path, transform: str, expected: str
) -> None:
    message = faulty.refused(
        capsys, base, data, data.parent / "run", data__train__transform=transform
    )
    assert expected in message
