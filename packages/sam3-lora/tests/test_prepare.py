"""`sam3-lora prepare`: every form of data comes to a folder that training reads, or is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from lora_core.config import parse
from lora_core.errors import ConfigError, DataError
from lora_core.pictures.encodings import decode_counts
from lora_core.testing.refusals import files_limited_to
from sam3_lora.config import Config, Dataset, Training
from sam3_lora.data import Splits, load
from sam3_lora.formats.xml_file import MAX_DEPTH, read_xml
from sam3_lora.prepare import MARK, Options, main, prepare
from sam3_lora.records import Record

SIZE = (40, 80)  # height, width
NAMES = ["rust", "dent"]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "data"


# -- data sets of every form -----------------------------------------------------------------------


def picture(path: Path, seed: int = 0, **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **save)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def yolo(root: Path, labels: dict[str, str], names: str = "names: [rust, dent]\n") -> Path:
    """images/ and labels/; a label of "-" is no file."""
    text(root / "data.yaml", names)
    for number, (name, label) in enumerate(labels.items()):
        picture(root / "images" / f"{name}.png", number)
        if label != "-":
            text(root / "labels" / f"{name}.txt", label)
    return root


def thing(name: str = "rust", box: object = (11, 6, 40, 30), more: str = "") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)  # type: ignore[call-overload]
    inner = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{more}<bndbox>{inner}</bndbox></object>"


def xml(name: str, *things: str, size: tuple[int, int] = SIZE) -> str:
    return (
        f"<annotation>\n<filename>{name}</filename>\n<size><width>{size[1]}</width>"
        f"<height>{size[0]}</height><depth>3</depth></size>\n" + "\n".join(things) + "</annotation>"
    )


def voc(root: Path, annotations: dict[str, str], sets: dict[str, str] | None = None) -> Path:
    for number, (name, content) in enumerate(annotations.items()):
        picture(root / "JPEGImages" / f"{name}.jpg", number)
        text(root / "Annotations" / f"{name}.xml", content)
    for name, content in (sets or {}).items():
        text(root / "ImageSets" / "Main" / f"{name}.txt", content)
    return root


def masks(root: Path, values: dict[str, np.ndarray]) -> Path:
    for number, (name, mask) in enumerate(values.items()):
        picture(root / "images" / f"{name}.jpg", number)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    return root


def spots(*values: int) -> np.ndarray:
    """A mask with a spot of 10 x 10 pixels for each value, side by side."""
    mask = np.zeros(SIZE, dtype=np.uint8)
    for number, value in enumerate(values):
        mask[10:20, 5 + 15 * number : 15 + 15 * number] = value
    return mask


def coco(root: Path, pictures: int = 6, folder: str = "images", **image: Any) -> dict[str, Any]:
    """A COCO file with a box in each picture; the pictures' records get `image`, too."""
    content: dict[str, Any] = {
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": SIZE[0], "width": SIZE[1]} | image
            for k in range(pictures)
        ],
        "annotations": [
            {"id": k + 1, "image_id": k, "category_id": 7 + k % 2, "bbox": [10, 5, 30, 25]}
            for k in range(pictures)
        ],
        "categories": [{"id": 7 + k, "name": name} for k, name in enumerate(NAMES)],
    }
    for k in range(pictures):
        picture(root / folder / f"{k}.png", k)
    return content


def options(source: Path, output: Path, **changes: Any) -> Options:
    return Options(source=str(source), output=str(output), **changes)


def prepared(source: Path, output: Path, **changes: Any) -> Splits:
    """What training reads of the output."""
    prepare(options(source, output, **changes))
    return training(output)


def training(output: Path) -> Splits:
    folders = {}
    for split, name in (("train", "train"), ("val", "valid")):
        there = split == "train" or (output / name).exists()
        folders[f"{split}_img_folder"] = str(output / name) if there else None
        file = output / name / "_annotations.coco.json"
        folders[f"{split}_ann_file"] = str(file) if there else None
    return load(Config(dataset=Dataset(**folders, resolution="84"), training=Training()))


def records(splits: Splits) -> dict[str, Record]:
    every = [*splits.train.records, *(splits.val.records if splits.val else [])]
    return {Path(record.key).stem: record for record in every}


def boxes(record: Record) -> list[tuple[str, tuple[float, ...]]]:
    return [(entry.phrase, entry.box) for entry in record.entries if entry.box]


def file_of(output: Path, split: str = "train") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / split / "_annotations.coco.json").read_text())
    return content


def refused(source: Path, output: Path, **changes: Any) -> str:
    """The message with which the command stops; nothing is left of it."""
    with pytest.raises((DataError, ConfigError)) as caught:
        prepare(options(source, output, **changes))
    left = {path.name for path in output.parent.iterdir()} - {"source", "cache"}
    assert not left
    return str(caught.value)


ALL = {"val_fraction": 0.0}
BOX = "0 0.5 0.5 0.25 0.5\n"


# -- YOLO ------------------------------------------------------------------------------------------


def test_yolo_boxes_and_outlines_mean_shares_of_the_picture(source: Path, output: Path) -> None:
    labels = {"a": f"{BOX}1 0.125 0.25 0.5 0.25 0.5 0.75 0.125 0.75\n", "b": "", "c": "-"}
    splits = prepared(yolo(source, labels), output, **ALL)
    found = records(splits)
    assert boxes(found["a"]) == [("rust", (30, 10, 50, 30)), ("dent", (10, 10, 40, 30))]
    assert not found["b"].entries
    assert not found["c"].entries
    mask = found["a"].instances()[0][1].mask
    assert mask is not None
    assert (mask.origin, mask.crop.shape, mask.area) == ((10, 10), (20, 30), 600)
    content = file_of(output)
    assert [c["name"] for c in content["categories"]] == NAMES
    assert [c["id"] for c in content["categories"]] == [1, 2]
    assert [a["area"] for a in content["annotations"]] == [400, 600]
    assert "not_exhaustive_category_ids" not in content["images"][0]
    assert splits.train.phrases == NAMES


def test_yolo_data_yaml_may_name_folders_lists_and_classes_by_index(
    source: Path, output: Path
) -> None:
    yolo(source, {"train/a": BOX, "train/b": BOX, "val/c": BOX}, "names: {0: rust, 3: on}\n")
    text(source / "data.yaml", "path: ../elsewhere\ntrain: train.txt\nval: ../images/val\nnc: 2\n"
         "names: {0: rust, 3: on}\n")  # fmt: skip
    text(source / "train.txt", "./images/train/a.png\nimages/train/b.png\n\n")
    text(source / "labels/val/c.txt", "3.0 .5 .5 .25 5e-1")
    splits = prepared(source, output)
    assert splits.val is not None
    assert [r.key for r in splits.train.records] == ["a.png", "b.png"]
    assert [r.key for r in splits.val.records] == ["c.png"]
    assert splits.val.records[0].entries[0].phrase == "on"
    assert [c["id"] for c in file_of(output, "valid")["categories"]] == [1, 4]


def test_yolo_works_without_data_yaml_if_classes_txt_names_the_classes(
    source: Path, output: Path
) -> None:
    yolo(source, {"a": BOX})
    (source / "data.yaml").unlink()
    text(source / "classes.txt", "rust\ndent\n")
    assert prepared(source, output, **ALL).train.phrases == NAMES


def test_key_points_behind_boxes_are_passed_over(source: Path, output: Path) -> None:
    yolo(source, {"a": "0 .5 .5 .25 .5 9 9 2 9 9 2\n"}, "names: [rust]\nkpt_shape: [2, 3]\n")
    found = records(prepared(source, output, **ALL))
    assert boxes(found["a"]) == [("rust", (30, 10, 50, 30))]


def test_boxes_are_cut_dropped_and_counted(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"{BOX}{BOX}0 0 0 0.5 0.5\n1 .5 .5 0 .5\n1 1 1 .5 .5\n"
    found = records(prepared(yolo(source, {"a": lines}), output, **ALL))
    assert [box for _, box in boxes(found["a"])] == [
        (30, 10, 50, 30),
        (0, 0, 20, 10),
        (60, 30, 80, 40),
    ]
    said = capsys.readouterr().out
    assert "note: boxes that leave their picture, cut: 2" in said
    assert "note: boxes without width or height, left out: 1" in said
    assert "note: objects that stand twice in their picture, left out: 1" in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2 .5 .5 .1 .1", "class '2': data.yaml has 2 classes, 0 rust, 1 dent"),
        ("-1 .5 .5 .1 .1", "class '-1': data.yaml has 2 classes"),
        ("rusty .5 .5 .1 .1", "did you mean 'rust'?"),
        ("9" * 5000 + " .5 .5 .1 .1", "has 2 classes"),
        ("0 nan .5 .1 .1", "the number 'nan': expected a finite number"),
        ("0 .5 inf .1 .1", "the number 'inf': expected a finite number"),
        ("0 1e999 .5 .1 .1", "the number '1e999': expected a finite number"),
        ("0 " + "9" * 9999 + " .5 .1 .1", "expected a finite number"),
        ("0 .5 .5 1_0 .1", "the number '1_0': expected a finite number"),
        ("0 40 20 20 20", "40: expected shares of the picture, 0 to 1; are these pixels?"),
        ("0 .5 .5 .1", "4 numbers, expected class cx cy width height"),
        ("0 .5 .5 .1 .1 .9", "6 numbers: are they predictions"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "8 numbers, expected class"),
        ("0 .5 .5 -.1 .1", "a width or height below 0"),
        ("0 1.5 1.5 .1 .1", "lies outside of the picture of 80 x 40"),
    ],
)
def test_a_bad_yolo_line_is_named_with_its_file_and_number(
    source: Path, output: Path, line: str, reason: str
) -> None:
    yolo(source, {"a": f"{BOX}\n{line}\n", "b": BOX})
    said = refused(source, output, **ALL)
    assert f"{source}/labels/a.txt:3: " in said
    assert reason in said
    assert len(said) < 700
    kept = prepared(source, output, on_bad_sample="skip", max_bad_fraction=0.5, **ALL)
    assert list(records(kept)) == ["b"]
    assert json.loads((output / "bad_samples.jsonl").read_text())["sample"] == "images/a.png"


def test_all_problems_are_told_together_the_first_twenty_and_the_total(
    source: Path, output: Path
) -> None:
    lines = "\n".join(f"7 {k / 100} .5 .1 .1" for k in range(10, 40))
    yolo(source, {"a": lines, "b": "x"})
    text(source / "labels" / "gone.txt", BOX)
    said = refused(source, output, **ALL).splitlines()
    assert said[0] == f"{source}: 32 problems"
    assert len(said) == 23
    assert said[-2] == "... and 12 more"


def test_labels_without_a_picture_and_listed_pictures_that_are_missing_are_reported(
    source: Path, output: Path
) -> None:
    yolo(source, {"a": BOX}, "names: [rust]\ntrain: list.txt\n")
    text(source / "labels" / "gone.txt", BOX)
    text(source / "list.txt", "images/a.png\nimages/b.png\n../../etc/passwd.png\n/etc/x.png\n")
    said = refused(source, output, **ALL)
    assert f"{source}/labels/gone.txt: no picture gone in {source}/images" in said
    assert f"{source}/images/b.png: no such file" in said
    assert f"{source}/list.txt:3: file name '../../etc/passwd.png': must be a path below" in said
    assert f"{source}/list.txt:4: file name '/etc/x.png': must be a path below" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("names: !!python/object/apply:os.system [ls]\n", "tag"),
        ("names: [rust\n", "line 2"),
        ("names: 3\n", "names: 3, expected a list, or index: name"),
        ("names: []\n", "expected a list"),
        ("names: [rust, null]\n", "class 1 is None, expected a name"),
        ("names: {a: rust}\n", "the index 'a', expected 0, 1, 2"),
        ("names: {0: rust, 0: dent}\n", "stands twice"),
        ("names: [rust]\nnc: 2\n", "1 names, but nc says 2 classes"),
        ("train: images\n", 'no "names"'),
        ("names: [rust]\ntrain: /etc\n", "train: '/etc', expected a path below"),
        ("names: [rust]\ntrain: images/../../..\n", "expected a path below"),
        ("names: [rust]\ntrain: {a: b}\n", "expected a path below"),
        ("names: [rust]\ntrain: missing\n", "missing: no such file or folder"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
         "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
         "e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nnames: [*e,*e,*e,*e,*e,*e]\n", "more than 100000"),
    ],
)  # fmt: skip
def test_a_data_yaml_that_means_nothing_is_refused(
    source: Path, output: Path, content: str, reason: str
) -> None:
    said = refused(yolo(source, {"a": BOX}, content), output)
    assert "data.yaml" in said or "missing" in said
    assert reason in said


def test_pictures_without_any_labels_are_no_data_set(source: Path, output: Path) -> None:
    said = refused(yolo(source, {"a": "-", "b": "-"}), output)
    assert f"{source}/labels/a.txt: no such file, nor labels of any of 2 pictures" in said


# -- Pascal VOC ------------------------------------------------------------------------------------


def test_voc_boxes_count_pixels_from_one_and_include_the_last(source: Path, output: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    whole = thing(box=(1, 1, SIZE[1], SIZE[0]), more=part)
    voc(source, {"a": xml("a.jpg", whole, thing("dent")), "b": xml("b.jpg"),
                 "c": xml("c.jpg", thing(box=(10.5, 5.0, 40, 30)))})  # fmt: skip
    found = records(prepared(source, output, **ALL))
    assert boxes(found["a"]) == [("rust", (0, 0, 80, 40)), ("dent", (10, 5, 40, 30))]
    assert boxes(found["c"]) == [("rust", (10.5, 5, 40, 30))]
    assert not found["b"].entries


def test_voc_splits_of_image_sets_are_kept(source: Path, output: Path) -> None:
    voc(
        source,
        {name: xml(f"{name}.jpg", thing(name)) for name in ("a", "b", "c", "d", "e f")},
        {"trainval": "a\nb  1\nc -1\ne f\n", "val": "c\n", "test": "d\n"},
    )
    splits = prepared(source, output)
    assert splits.val is not None
    assert [r.key for r in splits.train.records] == ["a.jpg", "b.jpg", "e f.jpg"]
    assert [r.key for r in splits.val.records] == ["c.jpg"]
    assert [p.name for p in sorted((output / "test").iterdir())] == [
        "_annotations.coco.json",
        "d.jpg",
    ]
    assert [c["name"] for c in file_of(output)["categories"]] == ["a", "b", "c", "d", "e f"]
    assert file_of(output)["categories"] == file_of(output, "valid")["categories"]


def test_xml_beside_the_pictures_is_read_as_roboflow_writes_it(source: Path, output: Path) -> None:
    for folder, name in (("train", "a"), ("valid", "b")):
        picture(source / folder / f"{name}.jpg")
        text(source / folder / f"{name}.xml", xml(f"{name}.jpg", thing(
            more="<polygon><x1>1</x1><y1>1</y1><x2>41</x2><y2>1</y2><x3>41</x3><y3>21</y3></polygon>"
        )))  # fmt: skip
    splits = prepared(source, output)
    assert splits.val is not None
    assert boxes(splits.val.records[0]) == [("rust", (0.5, 0.5, 40.5, 20.5))]
    assert splits.train.records[0].instances()[0][0].mask is not None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>',
         "a.xml:1: a document type (<!DOCTYPE ...>), which is not read"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><annotation/>', "a document type"),
        ("<annotation>&a;</annotation>", "a.xml:1:"),
        ("<annotation>", "a.xml:1:13: not XML"),
        ("", "not XML"),
        ("<html/>", "<html>, expected <annotation>"),
        ("<annotation>" + "<a>" * MAX_DEPTH, "nested too deeply"),
        ('<?xml version="1.0" encoding="x-unknown"?><annotation/>', "encoding"),
        (xml("a.jpg", thing(box=(1, 1, 1e999, 5))), "<xmax> 'inf': expected a finite number"),
        (xml("a.jpg", thing(box=("nan", 1, 3, 5))), "<xmin> 'nan'"),
        (xml("a.jpg", thing(box=(1, 1, "9" * 400, 5))), "expected a finite number"),
        (xml("a.jpg", thing(box=(30, 1, 3, 5))), "its end is before it"),
        (xml("a.jpg", thing(box=(200, 1, 210, 5))), "lies outside of the picture"),
        (xml("a.jpg", thing(name=" ")), "object 1: it has no <name>"),
        (xml("a.jpg", "<object><name>rust</name></object>"), "it has no <bndbox>"),
        (xml("a.jpg", thing(more="<bndbox><xmin>1</xmin></bndbox>")), "2 times <bndbox>"),
        (xml("a.jpg", "<object><name>r</name><bndbox><xmin>1</xmin></bndbox></object>"),
         "<bndbox> holds 'xmin': expected xmin, ymin, xmax, ymax, each once"),
        (xml("a.jpg", thing(), size=(40, 90)), "<size> says: 90 x 40 pixels"),
        (xml("b.jpg", thing()), "which is meant?"),
    ],
)  # fmt: skip
def test_a_bad_xml_file_is_named_with_what_was_expected(
    source: Path, output: Path, content: str, reason: str
) -> None:
    voc(source, {"a": content, "b": xml("b.jpg", thing())})
    if "which" in reason:
        (source / "Annotations" / "b.xml").unlink()
    said = refused(source, output, **ALL)
    assert f"{source}/Annotations/a.xml" in said
    assert reason in said
    assert len(said) < 700


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", "must be a path below"),
        ("/etc/passwd", "must be a path below"),
        ("C:\\x\\b.jpg", "must be a path below"),
        ("gone.jpg", "JPEGImages/gone.jpg: no such picture"),
        ("", "JPEGImages/b: no such picture"),
    ],
)
def test_voc_pictures_are_looked_for_below_the_source_alone(
    source: Path, output: Path, name: str, reason: str
) -> None:
    picture(source / "secret.jpg")
    voc(source, {"a": xml("a.jpg", thing())})
    text(source / "Annotations" / "b.xml", xml(name, thing()))
    said = refused(source, output, **ALL)
    assert f"{source}/Annotations/b.xml: " in said
    assert reason in said


def test_voc_files_of_another_name_say_which_picture_they_are_about(
    source: Path, output: Path
) -> None:
    voc(source, {name: xml(f"{name}.jpg", thing(name)) for name in "ab"})
    for name, new in (("a", "x"), ("b", "y")):
        (source / "Annotations" / f"{name}.xml").rename(source / "Annotations" / f"{new}.xml")
    text(source / "Annotations" / "y.xml", xml("b", thing("b")))
    found = records(prepared(source, output, **ALL))
    assert {name: boxes(record)[0][0] for name, record in found.items()} == {"a": "a", "b": "b"}


def test_one_picture_is_not_annotated_twice(source: Path, output: Path) -> None:
    voc(source, {"a": xml("a.jpg", thing())})
    text(source / "Annotations" / "b.xml", xml("a.jpg", thing()))
    assert "b.xml: a.jpg is annotated by a.xml already" in refused(source, output, **ALL)


def test_a_name_in_a_set_needs_its_xml_file(source: Path, output: Path) -> None:
    voc(source, {"a": xml("a.jpg", thing())}, {"train": "a\nmissing\n../../x\n"})
    said = refused(source, output)
    assert "train.txt: line 2: " in said
    assert "missing.xml: no such file" in said
    assert "train.txt: line 3: file name '../../x.xml': must be a path below" in said


def test_xml_is_read_without_what_can_refer_or_grow(tmp_path: Path) -> None:
    root = read_xml(text(tmp_path / "a.xml", "<a><b> x &lt; y </b><b/><c>1</c></a>"))
    assert [child.text for child in root.all("b")] == [" x < y ", ""]
    assert root.word("c") == "1"
    with pytest.raises(DataError, match="2 times <b>"):
        root.one("b")
    with pytest.raises(DataError, match="more than 8 MB of XML"):
        read_xml(text(tmp_path / "b.xml", "<a>" + " " * 2**23 + "</a>"))
    os.mkfifo(tmp_path / "pipe.xml")
    with pytest.raises(DataError, match="not a regular file"):
        read_xml(tmp_path / "pipe.xml")


# -- masks -----------------------------------------------------------------------------------------


def test_each_part_of_a_black_and_white_mask_is_an_object(source: Path, output: Path) -> None:
    masks(source, {"a": spots(255, 255), "b": spots()})
    found = records(prepared(source, output, names=["rust"], **ALL))
    assert boxes(found["a"]) == [("rust", (5, 10, 15, 20)), ("rust", (20, 10, 30, 20))]
    assert not found["b"].entries
    again = np.zeros(SIZE, dtype=bool)
    for instance in found["a"].instances()[0]:
        assert instance.mask is not None
        again |= instance.mask.mask
    np.testing.assert_array_equal(again, spots(255, 255) > 0)


def test_instances_and_labels_are_told_apart_by_what_is_said(source: Path, output: Path) -> None:
    masks(source, {"a": spots(1, 2, 1)})
    assert "say what they mean with --mask_kind" in refused(source, output, **ALL)
    found = records(prepared(source, output, mask_kind="instances", **ALL))
    assert boxes(found["a"]) == [("object", (5, 10, 45, 20)), ("object", (20, 10, 30, 20))]
    named = prepared(source, output.with_name("labels"), mask_kind="labels",
                     names=["2=dent", "1=rust", "3=hole"], **ALL)  # fmt: skip
    assert [phrase for phrase, _ in boxes(records(named)["a"])] == ["rust", "rust", "dent"]
    assert named.train.phrases == ["rust", "dent", "hole"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask_kind": "labels", "names": ["1=rust"]}, "the value 2 has no name; --names has 1"),
        ({"mask_kind": "labels", "names": ["rust"]}, "expected value=name, such as 1=rust"),
        ({"mask_kind": "labels", "names": ["0=rust"]}, "expected value=name, such as 1=rust"),
        ({"mask_kind": "instances", "names": ["a", "b"]}, "masks of one class have one name"),
        ({"mask_kind": "binary"}, "mask values 0, 1, 2, expected 0 and one other"),
    ],
)
def test_names_have_to_suit_the_masks(
    source: Path, output: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refused(masks(source, {"a": spots(1, 2)}), output, **changes)


def test_masks_and_pictures_come_in_pairs_of_one_size(source: Path, output: Path) -> None:
    masks(source, {"a": spots(255), "b": spots(255), "c": spots(255)[:30]})
    (source / "masks" / "b.png").rename(source / "masks" / "d.png")
    said = refused(source, output)
    assert "b.jpg: no mask b.png" in said
    assert "d.png: no picture d" in said
    assert "c.png: 80 x 30 pixels (width x height), but 80 x 40 in the picture" in said


# -- COCO and LVIS ---------------------------------------------------------------------------------


def test_coco_masks_crowds_and_numbers_of_classes_are_kept(source: Path, output: Path) -> None:
    content = coco(source)
    runs = {"size": list(SIZE), "counts": [400, 100, SIZE[0] * SIZE[1] - 500]}
    content["annotations"][0]["segmentation"] = runs
    del content["annotations"][0]["bbox"]
    content["annotations"][1]["segmentation"] = [[10, 5, 40, 5, 40, 30, 10, 30]]
    content["annotations"][2]["iscrowd"] = 1
    text(source / "instances.json", json.dumps(content))
    prepare(options(source, output, **ALL))
    made = file_of(output)
    assert {c["id"]: c["name"] for c in made["categories"]} == {7: "rust", 8: "dent"}
    first, second, third = made["annotations"][:3]
    assert first["segmentation"] == runs
    assert first["area"] == 100
    mask = decode_counts(runs["counts"], SIZE)  # type: ignore[arg-type]
    height, width = mask.crop.shape
    assert first["bbox"] == [*mask.origin, width, height]
    assert second["segmentation"] == content["annotations"][1]["segmentation"]
    assert third["iscrowd"] == 1
    assert len(records(training(output))) == 6


def test_splits_of_roboflow_are_kept_and_its_placeholder_goes(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "valid", "test"):
        content = coco(source, folder=name)
        for category in content["categories"]:
            category["supercategory"] = "project"
        content["categories"].insert(0, {"id": 0, "name": "project", "supercategory": "none"})
        text(source / name / "_annotations.coco.json", json.dumps(content))
    splits = prepared(source, output)
    assert {path.name for path in output.iterdir()} == {"train", "valid", "test", MARK}
    assert splits.phrases == tuple(NAMES)
    said = capsys.readouterr().out
    assert f"note: {source}/train/_annotations.coco.json: category 'project'" in said
    assert "--dataset" not in said.partition("train on it")[0]
    assert (output / "valid" / "3.png").read_bytes() == (source / "valid" / "3.png").read_bytes()


def test_one_class_has_one_number_in_all_files(source: Path, output: Path) -> None:
    for name, number in (("train", 1), ("val", 2)):
        content = coco(source, folder=name)
        content["categories"] = [{"id": number, "name": name}, {"id": 9, "name": "both"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = (number, 9)[annotation["category_id"] % 2]
        text(source / "annotations" / f"instances_{name}.json", json.dumps(content))
    prepare(options(source, output))
    numbers = {s: {c["name"]: c["id"] for c in file_of(output, s)["categories"]}
               for s in ("train", "valid")}  # fmt: skip
    assert numbers == {"train": {"train": 1, "both": 9}, "valid": {"val": 2, "both": 9}}


def test_lvis_says_what_is_absent_and_what_is_not_exhaustive(source: Path, output: Path) -> None:
    content = coco(source, folder="train2017", neg_category_ids=[7], not_exhaustive_category_ids=[])
    for item in content["images"]:
        item["coco_url"] = f"http://images.cocodataset.org/train2017/{item.pop('file_name')}"
    content["images"][0] |= {"neg_category_ids": [8], "not_exhaustive_category_ids": [7]}
    del content["images"][2]["neg_category_ids"]
    text(source / "lvis_v1_train.json", json.dumps(content))
    splits = prepared(source, output, **ALL)
    first, second = splits.train.records[:2]
    assert (first.absent, first.partial) == (("dent",), frozenset({"rust"}))
    assert (second.absent, second.partial) == (("rust",), frozenset())
    assert splits.train.records[2].absent == ()
    assert file_of(output)["images"][0]["neg_category_ids"] == [8]
    assert json.loads((output / MARK).read_text())["format"] == "lvis"


def test_masks_apart_from_their_boxes_are_noted(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = coco(source)
    assert "do not overlap" not in capsys.readouterr().out
    content["annotations"][0] |= {"bbox": [0, 0, 5, 5], "segmentation": [[30, 20, 40, 20, 40, 30]]}
    text(source / "a.json", json.dumps(content))
    prepared(source, output, **ALL)
    note = "1 annotation whose mask and bbox do not overlap"
    assert f"{note} (are x and y swapped in one of them?), the first: " in capsys.readouterr().out


def test_plain_coco_is_not_taken_for_lvis(source: Path, output: Path) -> None:
    text(source / "lvis_train.json", json.dumps(coco(source)))
    assert "no image has neg_category_ids" in refused(source, output, format="lvis")
    assert prepared(source, output, format="coco").phrases == tuple(NAMES)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda c: c["annotations"][0].update(bbox=[float("nan"), 1, 2, 3]), "bbox[0] is nan"),
        (lambda c: c["annotations"][0].update(category_id=99), "99 is not among the categories"),
        (lambda c: c["annotations"][0].update(image_id=99), "99 is not among the images"),
        (lambda c: c["annotations"][0].update(id=2), "ids that stand twice: 2"),
        (lambda c: c["annotations"][0].update(bbox=[1e300, 1, 2, 3]), "outside of the picture"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "4 numbers"),
        (lambda c: c["images"][0].update(file_name="../../x.png"), "must be a path below"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "no such file"),
        (lambda c: c["images"][0].update(file_name="1.png"), "1.png is image 0 already"),
        (lambda c: c["images"][0].update(height=41), "80 x 41 pixels"),
    ],
)
def test_a_bad_coco_record_is_named(
    source: Path, output: Path, spoil: Callable[[dict], None], reason: str
) -> None:
    content = coco(source)
    spoil(content)
    text(source / "a.json", json.dumps(content))
    assert reason in refused(source, output, **ALL)


# -- pictures --------------------------------------------------------------------------------------


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return picture(path, exif=exif)


def test_boxes_mean_the_upright_picture(source: Path, output: Path) -> None:
    yolo(source, {"a": "0 .25 .25 .5 .5\n"})
    (source / "images" / "a.png").unlink()
    turned(source / "images" / "a.jpg")
    record = records(prepared(source, output, **ALL))["a"]
    assert record.size == SIZE[::-1]
    assert boxes(record) == [("rust", (0, 0, SIZE[0] / 2, SIZE[1] / 2))]
    assert record.pixels().shape == (*SIZE[::-1], 3)


def test_annotations_of_the_picture_before_it_was_turned_are_refused(
    source: Path, output: Path
) -> None:
    voc(source, {"a": xml("a.jpg", thing())})
    turned(source / "JPEGImages" / "a.jpg")
    assert "EXIF orientation turns it" in refused(source, output, **ALL)


def test_damaged_pictures_and_links_to_the_outside_are_refused(
    source: Path, output: Path, tmp_path: Path
) -> None:
    yolo(source, dict.fromkeys("abc", BOX))
    whole = (source / "images" / "a.png").read_bytes()
    (source / "images" / "a.png").write_bytes(whole[: len(whole) // 2])
    (source / "images" / "b.png").unlink()
    elsewhere = picture(tmp_path / "cache" / "b.png")
    (source / "images" / "b.png").symlink_to(elsewhere)
    said = refused(source, output, **ALL)
    assert "a.png: cannot be read" in said
    assert "b.png: a link that leads out of" in said
    (source / "images" / "a.png").write_bytes(whole)
    assert set(records(prepared(source, output, follow_links=True, **ALL))) == set("abc")
    assert not (output / "train" / "b.png").is_symlink()


def test_pictures_of_one_name_in_several_folders_all_stay(source: Path, output: Path) -> None:
    yolo(source, {"left/0": BOX, "right/0": BOX})
    splits = prepared(source, output, **ALL)
    assert [r.key for r in splits.train.records] == ["left/0.png", "right/0.png"]


def test_a_name_that_coco_files_cannot_have_is_refused(source: Path, output: Path) -> None:
    yolo(source, {"a:b": BOX, "c": BOX})
    assert "a:b.png: a colon" in refused(source, output, **ALL)


def test_pictures_are_copied_or_linked(source: Path, output: Path) -> None:
    yolo(source, dict.fromkeys("ab", BOX))
    original = (source / "images" / "a.png").stat()
    prepare(options(source, output, **ALL))
    assert (output / "train" / "a.png").stat().st_ino != original.st_ino
    assert (output / "train" / "a.png").read_bytes() == (source / "images/a.png").read_bytes()
    prepare(options(source, output, link=True, overwrite=True, **ALL))
    assert (output / "train" / "a.png").stat().st_ino == original.st_ino


# -- splits ----------------------------------------------------------------------------------------


def sides(output: Path) -> dict[str, str]:
    return {
        item["file_name"]: split
        for split in ("train", "valid")
        for item in file_of(output, split)["images"]
    }


def test_a_picture_never_changes_sides(source: Path, output: Path) -> None:
    names = [f"{k:03}" for k in range(40)]
    yolo(source, dict.fromkeys(names[:25], BOX))
    prepare(options(source, output, val_fraction=0.3))
    before = sides(output)
    assert 3 <= sum(side == "valid" for side in before.values()) <= 12
    yolo(source, dict.fromkeys(names, BOX))
    prepare(options(source, output, val_fraction=0.3, overwrite=True))
    after = sides(output)
    assert len(after) == 40
    assert after.items() >= before.items()
    prepare(options(source, output, val_fraction=0.3, seed=1, overwrite=True))
    assert sides(output) != after


def test_every_run_makes_the_same_files(source: Path, output: Path) -> None:
    yolo(source, {str(k): BOX for k in range(20)})
    prepare(options(source, output))
    prepare(options(source, output.with_name("again")))
    trees = [
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (output, output.with_name("again"))
    ]
    assert trees[0] == trees[1]


def test_both_sides_get_a_picture_and_it_is_said(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yolo(source, {"a": BOX, "b": BOX})
    splits = prepared(source, output, val_fraction=0.001)
    assert splits.val is not None
    assert len(splits.val) == 1
    assert "it gets one, which may change sides" in capsys.readouterr().out


def test_a_side_without_objects_is_refused(source: Path, output: Path) -> None:
    assert "no objects in the 2 train pictures" in refused(
        yolo(source, {"a": "", "b": ""}), output, **ALL
    )


# -- the command -----------------------------------------------------------------------------------


def test_an_existing_folder_is_not_touched_without_being_asked(source: Path, output: Path) -> None:
    yolo(source, {"a": BOX})
    text(output / "thesis.txt", "x")
    for changes, reason in (
        ({}, "exists: add --overwrite"),
        ({"overwrite": True}, "holds 'thesis.txt', which is not replaced"),
    ):
        with pytest.raises(DataError, match=reason):
            prepare(options(source, output, **changes))
    assert (output / "thesis.txt").read_text() == "x"
    mine = text(source.parent / "mine" / "train" / "a.txt", "x")
    for place, reason in ((mine.parent.parent, "was not made by prepare"),
                          (source, "holds the --source")):  # fmt: skip
        with pytest.raises(DataError, match=reason):
            prepare(options(source, place, overwrite=True))
    assert mine.read_text() == "x"


def test_files_that_were_added_to_the_output_are_not_deleted(source: Path, output: Path) -> None:
    prepare(options(yolo(source, {"sub/a": BOX, "b": BOX}), output, **ALL))
    added = text(output / "train" / "sub" / "note.txt", "x")
    with pytest.raises(DataError, match=r"holds 'train/sub/note.txt', which is not replaced"):
        prepare(options(source, output, overwrite=True, **ALL))
    added.unlink()
    prepare(options(source, output, overwrite=True, **ALL))


def test_a_picture_never_takes_the_place_of_the_annotation_file(source: Path, output: Path) -> None:
    name = "_annotations.coco.json"
    content = coco(source)
    (source / "images" / "0.png").rename(source / "images" / name)
    before = (source / "images" / name).read_bytes()
    content["images"][0]["file_name"] = name
    text(source / "a.json", json.dumps(content))
    assert "a picture with the name of the annotation file" in refused(source, output, link=True)
    assert (source / "images" / name).read_bytes() == before


def test_too_many_bad_samples_stop_it_and_are_listed(source: Path, output: Path) -> None:
    yolo(source, {"a": BOX, "b": "x", "c": "y"})
    with pytest.raises(DataError, match="all: 2 of 3 samples are bad, more than"):
        prepare(options(source, output, on_bad_sample="skip", **ALL))
    report = output.with_name("data.bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in report] == ["images/b.png", "images/c.png"]
    assert not output.exists()


def test_a_failure_of_the_disk_leaves_nothing_behind(source: Path, output: Path) -> None:
    yolo(source, {"a": BOX})
    with files_limited_to(2000):
        said = refused(source, output, **ALL)
    assert "cannot be written" in said


def test_a_failed_replacement_keeps_the_old_folder(source: Path, output: Path) -> None:
    prepare(options(yolo(source, {"a": BOX}), output, **ALL))
    before = (output / "train" / "_annotations.coco.json").read_bytes()
    text(source / "labels" / "a.txt", "9 9 9")
    with pytest.raises(DataError, match="3 numbers"):
        prepare(options(source, output, overwrite=True, **ALL))
    assert (output / "train" / "_annotations.coco.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"val_fraction": 1.0}, "--val_fraction is 1.0"),
        ({"val_fraction": float("nan")}, "--val_fraction is nan"),
        ({"max_bad_fraction": -1.0}, "--max_bad_fraction is -1.0"),
        ({"copy": True, "link": True}, "--copy and --link"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        options(Path("a"), Path("b"), **changes)


def test_the_form_is_found_or_has_to_be_said(source: Path, output: Path) -> None:
    assert "no such folder" in refused(source, output)
    source.mkdir()
    assert "no data set found; expected one of" in refused(source, output)
    assert "no voc data set found" in refused(source, output, format="voc")
    yolo(source, {"a": BOX})
    voc(source, {"a": xml("a.jpg", thing())})
    assert "looks like yolo and voc; say which with --format" in refused(source, output)
    assert prepared(source, output, format="voc", **ALL).train.phrases == ["rust"]


def test_the_command_prints_what_it_made(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yolo(source, {str(k): BOX for k in range(12)})
    words = ["--source", str(source), "--output", str(output), "--val_fraction", "0.3", "--link"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"-> {output}"
    words = lines[-1].partition("sam3-lora train ")[2].split()
    cfg = parse(Config, words, prog="sam3-lora train")
    assert len(load(cfg).train) == len(file_of(output)["images"])
    assert any(line.split()[:1] == ["valid"] for line in lines)
