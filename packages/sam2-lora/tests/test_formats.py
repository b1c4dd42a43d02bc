"""Data sets on disk: what is read, what is refused, and that all faults are said at once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import DataError
from lora_core.pictures.encodings import encode_bitmap, encode_runs
from lora_core.pictures.masks import trim
from lora_core.pictures.reading import Reading
from sam2_lora.config import Config, MaskKind
from sam2_lora.data import load
from sam2_lora.formats import find, read
from sam2_lora.survey import look_at

SIZE = (20, 50)


def picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def mask_of(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def object_of(mask: np.ndarray, label: str = "rust"):
    return trim(mask, (0, 0), mask.shape, label)


def reading(root: Path, data_format: str = "auto", mask_kind: MaskKind = "auto") -> Reading:
    """All splits as one reading."""
    kind, sources = find(root, data_format)
    total = Reading(root)
    for source in sources.values():
        part = read(source, kind, root, mask_kind)
        total.records += part.good()
        total.add(part)
    return total


def wrong(found: Reading) -> list[str]:
    """All problems, of the whole and of samples."""
    return [*found.problems, *(reason for _, reason in found.bad)]


def stop(found: Reading) -> None:
    if problems := wrong(found):
        raise DataError("\n".join(problems))


def keys(found: Reading) -> list[str]:
    return [record.key for record in found.records]


# -- Supervisely -----------------------------------------------------------------------------------


def bitmap(mask: np.ndarray, label: str = "rust") -> dict:
    data, origin = encode_bitmap(object_of(mask))
    content = {"data": data, "origin": list(origin)}
    return {"geometryType": "bitmap", "classTitle": label, "bitmap": content}


def annotate(split: Path, name: str, objects: list, size: object = SIZE) -> None:
    (split / "ann").mkdir(parents=True, exist_ok=True)
    content: dict = {"objects": objects}
    if size is not None:
        content["size"] = {"height": size[0], "width": size[1]}
    (split / "ann" / f"{name}.json").write_text(json.dumps(content))


def test_supervisely_splits_are_read_in_order(tmp_path: Path) -> None:
    for split in ("val_split", "train_split"):
        for name in ("b.jpg", "a.jpg"):
            picture(tmp_path / split / "img" / name)
            annotate(tmp_path / split, name, [bitmap(mask_of(3, 4, 9, 8))])
    kind, sources = find(tmp_path)
    assert kind == "severstal"
    assert sorted(sources) == ["train", "val"]
    found = read(sources["train"], kind, tmp_path)
    assert keys(found) == ["train_split/img/a.jpg", "train_split/img/b.jpg"]
    (item,) = found.records[0].objects
    assert item.label == "rust"
    assert (item.mask == mask_of(3, 4, 9, 8)).all()


def test_the_golden_annotation_is_read_with_all_its_geometries(tmp_path: Path) -> None:
    case = Path(__file__).parent / "goldens" / "severstal"
    for name in ("0a1b2c3d4.jpg", "empty.jpg"):
        picture(tmp_path / "img" / name, (256, 1600))
        (tmp_path / "ann").mkdir(exist_ok=True)
        shutil.copy(case / f"{name}.json", tmp_path / "ann")
    full, empty = reading(tmp_path).records
    labels = [item.label for item in full.objects]
    assert labels == [f"defect_{k}" for k in (1, 2, 1, 2, 3, 3, 1)]
    assert empty.objects == []


def test_only_pairs_are_used_and_the_rest_is_counted(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    picture(tmp_path / "img" / "alone.jpg")
    annotate(tmp_path, "a.jpg", [])
    annotate(tmp_path, "gone.jpg", [])
    annotate(tmp_path, "lost.jpg", [])
    found = reading(tmp_path)
    assert keys(found) == ["img/a.jpg"]
    assert wrong(found) == []
    assert sorted(found.notes.values()) == [1, 2]


def test_geometries_that_are_no_area_are_counted_in_one_note(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    line = {"geometryType": "line", "classTitle": "x", "points": {"exterior": [[1, 2], [3, 4]]}}
    annotate(tmp_path, "a.jpg", [line, line, bitmap(mask_of(1, 1, 5, 5))])
    found = reading(tmp_path)
    assert len(found.records[0].objects) == 1
    assert list(found.notes.items()) == [
        ("objects left out, of geometry 'line', which is not read", 2)
    ]


def test_a_geometry_written_otherwise_is_no_geometry_to_leave_out(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    ring = {"exterior": [[1, 2], [3, 4], [5, 1]], "interior": []}
    annotate(tmp_path, "a.jpg", [{"geometryType": "Polygon", "classTitle": "x", "points": ring}])
    (line,) = wrong(reading(tmp_path))
    assert line.endswith("object 1: geometryType 'Polygon', did you mean 'polygon'?")


def test_rectangles_include_their_corners_and_end_at_the_border(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    for corners in ([[40, 15], [70, 30]], [[70, 30], [40, 15]]):
        points = {"exterior": corners, "interior": []}
        box = {"geometryType": "rectangle", "classTitle": "x", "points": points}
        annotate(tmp_path, "a.jpg", [box])
        (item,) = reading(tmp_path).records[0].objects
        assert (item.mask == mask_of(40, 15, 50, 20)).all()


@pytest.mark.parametrize("corners", [[[60, 3], [70, 9]], [[-9, -9], [-5, -2]]])
def test_rectangles_outside_are_empty(tmp_path: Path, corners: list) -> None:
    picture(tmp_path / "img" / "a.jpg")
    box = {"geometryType": "rectangle", "classTitle": "x", "points": {"exterior": corners}}
    annotate(tmp_path, "a.jpg", [box])
    found = reading(tmp_path)
    assert wrong(found) == []
    assert found.records[0].objects == []


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "expected an object"),
        ({"geometryType": "bitmap"}, "classTitle None"),
        ({"classTitle": "x"}, "geometryType None"),
        ({"classTitle": "x", "geometryType": "bitmap"}, "data is missing"),
        (
            {"classTitle": "x", "geometryType": "bitmap", "bitmap": {"data": "", "origin": [1]}},
            r"origin \[1\], expected two whole numbers",
        ),
        ({"classTitle": "x", "geometryType": "polygon"}, "points.exterior is missing"),
        (
            {"classTitle": "x", "geometryType": "rectangle", "points": {"exterior": [[1, 2]]}},
            "expected two corners",
        ),
        (
            {
                "classTitle": "x",
                "geometryType": "rectangle",
                "points": {"exterior": [[1, 2], [3, float("nan")]]},
            },
            "is nan, expected a finite number",
        ),
        (
            {
                "classTitle": "x",
                "geometryType": "polygon",
                "points": {"exterior": [[1, 2], [3, 4], [5, 9]], "interior": 3},
            },
            "points.interior '3', expected a list",
        ),
    ],
)
def test_bad_supervisely_objects_are_named(tmp_path: Path, item: object, reason: str) -> None:
    picture(tmp_path / "img" / "a.jpg")
    annotate(tmp_path, "a.jpg", [bitmap(mask_of(0, 0, 3, 3)), item])
    found = reading(tmp_path)
    assert len(wrong(found)) == 1
    with pytest.raises(DataError, match=rf"a\.jpg\.json: (object 2: .*|objects\[1\].*){reason}"):
        raise DataError(wrong(found)[0])
    assert found.records == []  # not with the other object alone


@pytest.mark.fault("D11")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "a.jpg.json:1:1: not JSON"),
        (b'{"objects": [', "a.jpg.json:1:14: not JSON"),
        (b'{"objects": []}\n{"objects": []}', "a.jpg.json:2:1: .*JSON Lines"),
        (b"[]", 'the list "objects"'),
        (b'{"objects": null}', 'the list "objects"'),
        (b'{"objects": [], "size": {"height": 20}}', "expected height and width"),
        ("{}".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_annotation_files_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    picture(tmp_path / "img" / "a.jpg")
    annotate(tmp_path, "a.jpg", [])
    (tmp_path / "ann" / "a.jpg.json").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        stop(reading(tmp_path))


@pytest.mark.fault("D11")
def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    annotate(tmp_path, "a.jpg", [])
    (tmp_path / "ann" / "a.jpg.json").write_bytes(b'\xef\xbb\xbf{"objects": []}')
    assert keys(reading(tmp_path)) == ["img/a.jpg"]


@pytest.mark.fault("D03")
def test_sizes_must_agree_and_likely_reasons_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.jpg")
    annotate(tmp_path, "a.jpg", [], size=(50, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "img" / "b.jpg", exif=exif)
    annotate(tmp_path, "b.jpg", [], size=SIZE)
    picture(tmp_path / "img" / "c.jpg", exif=exif)
    annotate(tmp_path, "c.jpg", [], size=(50, 20))
    found = reading(tmp_path)
    assert keys(found) == ["img/c.jpg"]
    assert found.records[0].size == (50, 20)
    swapped, turned = wrong(found)
    assert "20 x 50 pixels (width x height), but 50 x 20 in the picture" in swapped
    assert "width and height seem to be swapped" in swapped
    assert "EXIF orientation" in turned


@pytest.mark.fault("D01", "D02")
def test_faults_are_reported_together_with_their_number(tmp_path: Path) -> None:
    for number in range(25):
        annotate(tmp_path, f"{number:02}.jpg", [])
        (tmp_path / "img").mkdir(exist_ok=True)
        (tmp_path / "img" / f"{number:02}.jpg").write_bytes(b"")
    (tmp_path / "train").mkdir()
    for name in ("img", "ann"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    with pytest.raises(DataError) as caught:
        load(Config(data_root=str(tmp_path), image_size="64"))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: 25 problems"
    assert lines[1].endswith("00.jpg: the file is empty")
    assert lines[21] == "... and 5 more"
    assert lines[22:] == [
        "mend or remove them, or leave the 25 samples out with --on_bad_sample skip"
    ]


@pytest.mark.fault("H16")
def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    outside = picture(tmp_path / "secret.jpg")
    picture(tmp_path / "data" / "img" / "a.jpg")
    (tmp_path / "data" / "img" / "b.jpg").symlink_to(outside)
    (tmp_path / "data" / "img" / "c.jpg").symlink_to("a.jpg")
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        annotate(tmp_path / "data", name, [])
    found = reading(tmp_path / "data")
    assert keys(found) == ["img/a.jpg", "img/c.jpg"]
    assert len(wrong(found)) == 1
    assert "b.jpg: a link that leads out of" in wrong(found)[0]


def test_a_linked_folder_is_fine(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.jpg")
    annotate(tmp_path / "data", "a.jpg", [])
    (tmp_path / "data" / "img").symlink_to(tmp_path / "elsewhere")
    assert keys(reading(tmp_path / "data")) == ["img/a.jpg"]


# -- Kaggle ----------------------------------------------------------------------------------------


def kaggle(root: Path, rows: list[str], names: list[str]) -> None:
    for name in names:
        picture(root / "train_images" / name)
    (root / "train.csv").write_text("\n".join(rows) + "\n")


RUNS = encode_runs(object_of(mask_of(2, 3, 8, 9)))


def test_both_kaggle_forms_are_read_alike(tmp_path: Path) -> None:
    new = ["ImageId,ClassId,EncodedPixels", f"b.jpg,3,{RUNS}", "b.jpg,1,5 2"]
    old = [
        "ImageId_ClassId,EncodedPixels",
        "a.jpg_1,",
        f"b.jpg_3,{RUNS}",
        "b.jpg_1,5 2",
        "b.jpg_2,",
    ]
    kaggle(tmp_path / "new", new, ["a.jpg", "b.jpg"])
    kaggle(tmp_path / "old", old, ["a.jpg", "b.jpg"])
    for root in (tmp_path / "new", tmp_path / "old"):
        without, with_ = reading(root).records
        assert without.key == "train_images/a.jpg"
        assert without.objects == []
        assert [item.label for item in with_.objects] == ["defect_3", "defect_1"]
        assert (with_.objects[0].mask == mask_of(2, 3, 8, 9)).all()
        assert with_.merged


@pytest.mark.fault("D13", "D16")
def test_bad_kaggle_rows_are_named_by_number(tmp_path: Path) -> None:
    rows = [
        "ImageId,ClassId,EncodedPixels",
        "a.jpg,1,1 2",
        "b.jpg,1,1 2",
        "a.jpg,1",
        "a.jpg,1,1 2",
        ",1,3 4",
    ]
    kaggle(tmp_path, rows, ["a.jpg"])
    problems = wrong(reading(tmp_path))
    assert len(problems) == 4
    for problem, text in zip(
        problems,
        [
            "row 5: repeats row 2",
            "row 3: no picture 'b.jpg'",
            "row 4: the picture's name",
            "row 6: the",
        ],
        strict=True,
    ):
        assert text in problem


def test_run_lengths_are_checked_with_their_row(tmp_path: Path) -> None:
    kaggle(tmp_path, ["ImageId,ClassId,EncodedPixels", "a.jpg,1,999 9"], ["a.jpg"])
    (record,) = reading(tmp_path).records
    with pytest.raises(
        DataError, match=r"train\.csv: row 2: run lengths: the run at 999 goes past"
    ):
        _ = record.objects


def test_another_header_is_shown(tmp_path: Path) -> None:
    kaggle(tmp_path, ["image,rle"], ["a.jpg"])
    with pytest.raises(DataError, match="row 1 is 'image,rle', expected ImageId,ClassId"):
        stop(reading(tmp_path))


# -- pictures and masks ----------------------------------------------------------------------------


def folders(root: Path, masks: dict[str, np.ndarray], suffix: str = ".png") -> None:
    (root / "masks").mkdir(parents=True, exist_ok=True)
    for stem, values in masks.items():
        picture(root / "images" / f"{stem}.jpg", values.shape)
        Image.fromarray(values).save(root / "masks" / f"{stem}{suffix}")


def test_evidently_binary_masks_need_no_kind(tmp_path: Path) -> None:
    values = mask_of(1, 2, 5, 6).astype(np.uint8)
    folders(tmp_path, {"a": values, "b": values * 255, "empty": values * 0, "full": values * 0 + 1})
    records = reading(tmp_path).records
    assert [record.key for record in records] == [
        f"images/{stem}.jpg" for stem in ("a", "b", "empty", "full")
    ]
    assert [len(record.objects) for record in records] == [1, 1, 0, 1]
    assert (records[1].objects[0].mask == mask_of(1, 2, 5, 6)).all()


def test_masks_of_unsaid_kind_are_one_problem_and_damaged_ones_as_many_as_there_are(
    tmp_path: Path,
) -> None:
    values = mask_of(1, 2, 5, 6) * np.uint8(2) + mask_of(9, 9, 12, 12) * np.uint8(5)
    folders(tmp_path / "unsaid", dict.fromkeys("abc", values))
    found = reading(tmp_path / "unsaid")
    assert (len(found.problems), found.records) == (1, [])
    folders(tmp_path / "cut", {name: mask_of(1, 2, 5, 6) * np.uint8(255) for name in "abc"})
    for name in "ab":
        mask = tmp_path / "cut" / "masks" / f"{name}.png"
        mask.write_bytes(mask.read_bytes()[:-30])
    found = reading(tmp_path / "cut")
    _, bad = look_at({"train": found.records}, Config(data_root=str(tmp_path / "cut")))
    assert len([*wrong(found), *bad]) == 2


@pytest.mark.fault("D26")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("instances", ["object", "object"]), ("labels", ["class_2", "class_5"])],
)
def test_other_masks_need_their_kind_said(tmp_path: Path, kind: MaskKind, expected: list) -> None:
    values = mask_of(1, 2, 5, 6) * np.uint8(2) + mask_of(9, 9, 12, 12) * np.uint8(5)
    folders(tmp_path, {"a": values})
    with pytest.raises(DataError, match=r"a\.png: mask values 0, 2, 5, .*--mask_kind instances"):
        stop(reading(tmp_path))
    (record,) = reading(tmp_path, mask_kind=kind).records
    assert [item.label for item in record.objects] == expected
    assert record.merged == (kind == "labels")


@pytest.mark.fault("D26")
def test_jpeg_masks_are_refused(tmp_path: Path) -> None:
    noisy = mask_of(1, 2, 30, 16).astype(np.uint8) * 255
    folders(tmp_path, {"a": noisy}, ".jpg")
    for kind in ("auto", "binary"):
        with pytest.raises(DataError, match="JPEG masks must be thresholded"):
            _ = [record.objects for record in reading_or_raise(tmp_path, kind)]


def reading_or_raise(root: Path, kind: MaskKind) -> list:
    found = reading(root, mask_kind=kind)
    stop(found)
    return found.records


@pytest.mark.fault("D25")
def test_missing_other_and_wrongly_sized_masks_are_all_named(tmp_path: Path) -> None:
    values = mask_of(1, 2, 5, 6).astype(np.uint8)
    folders(tmp_path, {"good": values, "small": values, "left_01": values})
    Image.fromarray(values[:10]).save(tmp_path / "masks" / "small.png")
    (tmp_path / "masks" / "left_01.png").rename(tmp_path / "masks" / "left_1.png")
    found = reading(tmp_path)
    assert keys(found) == ["images/good.jpg"]
    missing, size, unused = wrong(found)
    assert "left_01.jpg: no mask left_01.png" in missing
    assert "did you mean 'left_1'?" in missing
    assert "small.png: 50 x 10 pixels" in size
    assert "left_1.png: no picture left_1" in unused


@pytest.mark.fault("D13")
def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    folders(tmp_path, {"a": mask_of(1, 2, 5, 6).astype(np.uint8)})
    picture(tmp_path / "images" / "a.png")
    assert any("a.jpg has the same name" in problem for problem in wrong(reading(tmp_path)))


def test_other_files_are_counted(tmp_path: Path) -> None:
    folders(tmp_path, {"a": mask_of(1, 2, 5, 6).astype(np.uint8)})
    (tmp_path / "images" / "notes.txt").write_text("x")
    (tmp_path / "images" / ".DS_Store").write_text("x")
    (tmp_path / "images" / "more").mkdir()
    found = reading(tmp_path)
    assert wrong(found) == []
    assert found.said() == [
        f"folders in {tmp_path / 'images'}, which are not looked into: 1",
        f"files in {tmp_path / 'images'} that are no pictures: 1",
    ]


# -- which format ----------------------------------------------------------------------------------


def test_a_missing_root_names_the_path_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/none: no such folder: name that of your data"):
        find(tmp_path / "none")


@pytest.mark.fault("C20")
def test_a_file_in_place_of_the_folder_is_called_a_file(tmp_path: Path) -> None:
    file = tmp_path / "instances.json"
    file.write_text("{}")
    with pytest.raises(DataError, match=f"{file}: a file, expected the folder .* {tmp_path}$"):
        find(file)


def test_an_unknown_layout_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set found; expected one of\n  severstal:"):
        find(tmp_path)


def test_two_formats_ask_for_one(tmp_path: Path) -> None:
    folders(tmp_path, {"a": mask_of(1, 2, 5, 6).astype(np.uint8)})
    kaggle(tmp_path, ["ImageId,ClassId,EncodedPixels"], ["a.jpg"])
    with pytest.raises(DataError, match="looks like kaggle and folders; say which"):
        find(tmp_path)
    assert find(tmp_path, "folders")[0] == "folders"


@pytest.mark.fault("D28")
@pytest.mark.parametrize(("have", "miss"), [("img", "ann"), ("ann", "img")])
def test_half_a_split_is_named(tmp_path: Path, have: str, miss: str) -> None:
    (tmp_path / "train_split" / have).mkdir(parents=True)
    with pytest.raises(DataError, match=f"train_split/{miss}: no such folder"):
        stop(reading(tmp_path))


@pytest.mark.fault("R33")
def test_records_can_be_sent_to_worker_processes(tmp_path: Path) -> None:
    import pickle

    kaggle(tmp_path, ["ImageId,ClassId,EncodedPixels", f"a.jpg,3,{RUNS}"], ["a.jpg"])
    (record,) = reading(tmp_path).records
    (item,) = pickle.loads(pickle.dumps(record)).objects
    assert (item.mask == mask_of(2, 3, 8, 9)).all()
