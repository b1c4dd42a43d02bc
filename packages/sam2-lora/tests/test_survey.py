"""The survey of a data set: each split has its own faults, and what it promised stays true."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import DataError
from lora_core.pictures.files import read_mask
from lora_core.training import loading
from sam2_lora import evaluation_files, prepare
from sam2_lora.config import Config
from sam2_lora.data import load, load_split
from sam2_lora.evaluate import COLUMNS, Options

SIZE = (12, 16)  # height, width
OUTLINE = [[1, 1, 8, 1, 8, 8, 1, 8]]
OPEN_ENDED = [[1, 2, 3]]  # known to be bad when it is read
TOO_SHORT = {"size": list(SIZE), "counts": [1, 2]}  # found to be bad when it is decoded
HELD_OUT = 0  # of eight pictures, one that `split_by_name` takes for validation


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save_pictures(folder: Path, count: int = 8) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def image(number: int, **changed: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", **changed}


def annotation(identity: int, picture: int, **changed: Any) -> dict[str, Any]:
    content = {"id": identity, "image_id": picture, "category_id": 1, "segmentation": OUTLINE}
    return {**content, **changed}


def write_coco(path: Path, numbers: range, *more: dict[str, Any], name: Any = "rust") -> None:
    """A COCO file of pictures with an annotation each, and further annotations."""
    content = {
        "images": [image(number) for number in numbers],
        "annotations": [*(annotation(number, number) for number in numbers), *more],
        "categories": [{"id": 1, "name": name}],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def config(root: Path, **settings: Any) -> Config:
    return Config(data_root=str(root), image_size="64", min_object_area=1, **settings)


SKIP = {"on_bad_sample": "skip", "max_bad_fraction": 0.9}


@pytest.mark.parametrize("segmentation", [OPEN_ENDED, TOO_SHORT])
def test_a_bad_annotation_of_a_held_out_picture_is_no_less_bad_in_evaluation(
    tmp_path: Path, segmentation: Any
) -> None:
    """Without it the picture would be scored against half of its truth."""
    save_pictures(tmp_path / "images")
    bad = annotation(99, HELD_OUT, segmentation=segmentation)
    write_coco(tmp_path / "annotations.json", range(8), bad)
    with pytest.raises(DataError, match=r"annotations\.json: annotation 99: (.|\n)*on_bad_sample"):
        load_split(config(tmp_path), "val")
    pictures = load_split(config(tmp_path, **SKIP), "val")
    assert pictures is not None
    assert f"images/{HELD_OUT}.png" not in [record.key for record in pictures.records]
    assert any("1 bad sample of val left out" in note for note in pictures.notes)
    (bad_one,) = load(config(tmp_path, **SKIP)).bad
    assert bad_one.split == "val"


def test_an_unreadable_picture_belongs_to_the_split_of_its_name(tmp_path: Path) -> None:
    save_pictures(tmp_path / "images")
    write_coco(tmp_path / "annotations.json", range(8))
    (tmp_path / "images" / f"{HELD_OUT}.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{HELD_OUT}\.png: the file is empty"):
        load_split(config(tmp_path), "val")


@pytest.mark.parametrize("segmentation", [OPEN_ENDED, TOO_SHORT])
def test_a_picture_of_two_splits_can_be_bad_in_one(tmp_path: Path, segmentation: Any) -> None:
    save_pictures(tmp_path / "images")
    bad = annotation(99, 5, segmentation=segmentation)
    write_coco(tmp_path / "annotations" / "instances_train.json", range(6), bad)
    write_coco(tmp_path / "annotations" / "instances_val.json", range(5, 8))
    splits = load(config(tmp_path, **SKIP))
    assert [record.key for record in splits.train.records] == [f"images/{n}.png" for n in range(5)]
    assert len(splits.val) == 3
    assert [(one.split, one.sample) for one in splits.bad] == [("train", "images/5.png")]


def test_a_picture_of_two_splits_is_counted_in_each(tmp_path: Path) -> None:
    save_pictures(tmp_path / "images")
    more = [annotation(number, 5) for number in range(50, 54)]
    write_coco(tmp_path / "annotations" / "instances_train.json", range(6))
    write_coco(tmp_path / "annotations" / "instances_val.json", range(5, 8), *more)
    splits = load(config(tmp_path))
    found = {name: counts.objects.total() for name, counts in splits.counts.items()}
    assert found == {"train": 6, "val": 7}
    assert splits.train.counts == [1] * 6


def test_a_picture_of_another_size_than_surveyed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its annotations would lie beside what they mean."""
    monkeypatch.setattr(loading, "PAUSES", ())
    save_pictures(tmp_path / "images")
    write_coco(tmp_path / "annotations.json", range(8))
    splits = load(config(tmp_path))
    for path in (tmp_path / "images").iterdir():
        Image.new("RGB", (40, 12)).save(path)
    for part in (splits.train, splits.val):
        with pytest.raises(DataError, match=r"\.png: 40 x 12 .*expected 16 x 12"):
            part[0]


def test_a_coco_file_without_split_beside_one_of_training_is_not_passed_over(
    tmp_path: Path,
) -> None:
    save_pictures(tmp_path / "images")
    write_coco(tmp_path / "annotations" / "instances_train.json", range(4))
    write_coco(tmp_path / "annotations" / "instances_more.json", range(4, 8))
    with pytest.raises(DataError, match=r"instances_more\.json: the name says no split"):
        load(config(tmp_path))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"iscrowd": "1"}, "iscrowd '1', expected 0 or 1"),
        ({"iscrowd": 2}, "iscrowd 2, expected 0 or 1"),
        ({"image_id": "x" * 10**6}, r"image_id 'x{79}\.\.\. is not among the images"),
    ],
)
def test_strange_fields_of_annotations_are_quoted(
    tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    save_pictures(tmp_path / "images")
    write_coco(tmp_path / "annotations.json", range(8), annotation(99, 3, **changed))
    with pytest.raises(DataError, match=f"annotation 99: {reason}"):
        load(config(tmp_path))


@pytest.mark.parametrize("name", [None, {"a": 1}, "\ud800"])
def test_a_category_needs_a_name_that_can_be_written(tmp_path: Path, name: Any) -> None:
    save_pictures(tmp_path / "images")
    write_coco(tmp_path / "annotations.json", range(8), name=name)
    with pytest.raises(DataError, match=r"annotations\.json: category 1: name .*, expected text"):
        load(config(tmp_path))


def kaggle(root: Path, *rows: str) -> Path:
    save_pictures(root / "train_images")
    lines = ["ImageId,ClassId,EncodedPixels", *rows, *(f"{n}.png,1,1 3" for n in range(1, 8))]
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("row", ["0.png,1,1 3,9", "0.png,,1 3"])
def test_a_bad_kaggle_row_takes_its_picture_along(tmp_path: Path, row: str) -> None:
    """Else the picture would be taken for one without that defect."""
    splits = load(config(kaggle(tmp_path, row), **SKIP))
    assert [one.sample for one in splits.bad] == ["train_images/0.png"]
    records = [*splits.train.records, *splits.val.records]
    assert sorted(record.image.name for record in records) == [f"{n}.png" for n in range(1, 8)]


@pytest.mark.parametrize(
    ("rows", "line"), [(['0.png,1,"1 3'], 9), (['0.png,1,"1 3', '0.png,2,"'], 3)]
)
def test_a_quote_that_swallows_kaggle_rows_stops(
    tmp_path: Path, rows: list[str], line: int
) -> None:
    with pytest.raises(DataError, match=rf"train\.csv: row {line}: .*every quote its partner"):
        load(config(kaggle(tmp_path, *rows), **SKIP))


@pytest.mark.parametrize(("index", "value"), [(0, 255), (1, 0)])
def test_a_mask_of_one_colour_means_what_its_palette_says(
    tmp_path: Path, index: int, value: int
) -> None:
    picture = Image.new("P", (4, 3), index)
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") == value).all()


def test_rows_are_added_to_a_table_that_a_spreadsheet_has_saved(tmp_path: Path) -> None:
    table = tmp_path / "evaluation.csv"
    earlier = ",".join(COLUMNS).encode() + b"\r\n" + "Schäden".encode("latin-1")
    table.write_bytes(earlier)
    row = dict.fromkeys(COLUMNS, "") | {"exp_id": "new"}
    evaluation_files.write(tmp_path, {}, [row], Options(exp_id="new"))
    assert table.read_bytes().startswith(earlier + b"\n")
    with table.open(newline="", encoding="latin-1") as file:
        assert [line["exp_id"] for line in csv.DictReader(file)] == ["Schäden", "new"]


def nothing_learnt(root: Path, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(config(root, **settings))
    return str(caught.value).splitlines()


@pytest.mark.fault("D19", "D20", "D27")
def test_outlines_in_shares_of_the_picture_or_without_area_are_counted(tmp_path: Path) -> None:
    """Eight numbers of 0..1 are an outline as good as any: it covers no pixel's centre."""
    save_pictures(tmp_path / "images")
    shares = annotation(90, 1, segmentation=[[0.1, 0.1, 0.4, 0.1, 0.4, 0.4]])
    line = annotation(91, 1, segmentation=[[2, 2, 8, 2, 5, 2]])
    write_coco(tmp_path / "annotations.json", range(8), shares, line)
    splits = load(config(tmp_path))
    train = splits.counts["train"]
    assert (train.small, train.nothing, train.empty) == (2, 2, 0)
    assert "too small" in str(splits)


@pytest.mark.fault("D19", "D20", "D27")
def test_a_split_without_objects_says_what_was_left_out_and_what_helps(tmp_path: Path) -> None:
    images, path = tmp_path / "images", tmp_path / "annotations.json"
    save_pictures(images)

    def write(**changed: Any) -> None:
        content = {
            "images": [image(number) for number in range(8)],
            "annotations": [annotation(number, number, **changed) for number in range(8)],
            "categories": [{"id": 1, "name": "rust"}],
        }
        path.write_text(json.dumps(content))

    write(iscrowd=1)
    title, note = nothing_learnt(tmp_path)
    start, end = f"{tmp_path}: no objects in the ", ": add pictures with objects to it"
    assert title == f"{start}6 pictures of the train split{end}"
    assert note == "note: crowd annotations left out: 8"
    write(segmentation=[[0.1, 0.1, 0.4, 0.1, 0.4, 0.4]])
    (title,) = nothing_learnt(tmp_path)
    without = "6 without a single pixel, as outlines in shares of the picture are"
    assert title == f"{start}6 pictures of the train split ({without}){end}"
    write()
    settings = config(tmp_path)
    settings.min_object_area = 99
    with pytest.raises(DataError) as caught:
        load(settings)
    assert str(caught.value) == (
        f"{start}6 pictures of the train split (6 smaller than --min_object_area 99){end}, "
        "or lower --min_object_area"
    )
    write()
    held_out = [int(record.image.stem) for record in load(config(tmp_path)).val.records]
    content = json.loads(path.read_text())
    content["annotations"] = [
        one for one in content["annotations"] if one["image_id"] not in held_out
    ]
    path.write_text(json.dumps(content))
    (title,) = nothing_learnt(tmp_path)
    assert title == f"{start}2 pictures of the val split{end}, or set another --val_fraction"


def test_prepare_does_not_replace_a_file(tmp_path: Path) -> None:
    output = tmp_path / "made"
    output.write_text("mine")
    options = prepare.Options(source=str(tmp_path), output=str(output), overwrite=True)
    with pytest.raises(DataError, match="made is a file"):
        prepare.prepare(options)
    assert output.read_text() == "mine"


def test_prepare_names_the_picture_that_went_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path / "data" / "images")
    write_coco(tmp_path / "data" / "annotations.json", range(8))
    write = prepare.write_tree

    def late(folder: Path, parts: Any, options: prepare.Options) -> dict[str, int]:
        (tmp_path / "data" / "images" / "3.png").unlink()
        return write(folder, parts, options)

    monkeypatch.setattr(prepare, "write_tree", late)
    options = prepare.Options(source=str(tmp_path / "data"), output=str(tmp_path / "made"))
    with pytest.raises(DataError, match=r"made: cannot be written: .*3\.png: No such file"):
        prepare.prepare(options)
    assert not (tmp_path / "made").exists()
