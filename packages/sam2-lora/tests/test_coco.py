import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import DataError
from lora_core.pictures.coco import find_coco
from lora_core.pictures.encodings import encode_counts
from lora_core.pictures.reading import Reading
from sam2_lora.config import Config
from sam2_lora.formats import SPLITS, find, read
from sam2_lora.survey import look_at

SIZE = (20, 50)  # height, width
SQUARE = [10, 5, 20, 5, 20, 9, 10, 9]


def square_mask() -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[5:9, 10:20] = True
    return mask


def content(segmentation: object = None, **changes: object) -> dict:
    """One picture, one category, one annotation; `changes` go to the annotation."""
    annotation = {
        "id": 7,
        "image_id": 1,
        "category_id": 3,
        "segmentation": [SQUARE] if segmentation is None else segmentation,
        "iscrowd": 0,
    }
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 3, "name": "rust"}],
        "annotations": [annotation | changes],
    }


def write(
    root: Path, value: object, name: str = "instances.json", pictures: str = "images"
) -> Path:
    for file in ("a.jpg", "b.jpg"):
        (root / pictures).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(root / pictures / file)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return root


def reading(root: Path) -> Reading:
    kind, sources = find(root)
    assert kind == "coco"
    (source,) = sources.values()
    return read(source, kind, root)


def wrong(found: Reading) -> list[str]:
    """All problems: of the whole, of samples, and of those that show in decoding."""
    _, bad = look_at({"train": found.records}, Config(data_root=str(found.root)))
    reasons = [*(reason for _, reason in found.bad), *(one.reason for one in bad)]
    return [*found.problems, *reasons]


def stop(found: Reading) -> None:
    if problems := wrong(found):
        raise DataError("\n".join(problems))


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        SQUARE,
        [[[10, 5], [20, 5], [20, 9], [10, 9]]],
        [[SQUARE]],
        {"size": list(SIZE), "counts": encode_counts(square_mask())},
        {"size": list(SIZE), "counts": "]64`000000000000000000cb0"},
    ],
    ids=["outline", "bare", "pairs", "deeper", "counts", "compressed"],
)
def test_every_form_of_a_mask_is_read(tmp_path: Path, segmentation: object) -> None:
    found = reading(write(tmp_path, content(segmentation)))
    assert wrong(found) == []
    (record,) = found.records
    assert record.key == "images/a.jpg"
    (item,) = record.objects
    assert item.label == "rust"
    assert (item.mask == square_mask()).all()


def test_pictures_without_annotations_are_kept(tmp_path: Path) -> None:
    value = content()
    value["images"].insert(0, {"id": 0, "file_name": "b.jpg"})
    records = reading(write(tmp_path, value)).records
    assert [(record.key, len(record.objects)) for record in records] == [
        ("images/a.jpg", 1),
        ("images/b.jpg", 0),
    ]


def test_ids_that_pandas_made_fractions_are_pointed_out(tmp_path: Path) -> None:
    """A column of a data frame with a gap in it is one of floats."""
    remedy = "write whole numbers"
    (line,) = wrong(reading(write(tmp_path / "a", content(image_id=1.0))))
    assert f"image_id 1.0 is not among the images; there is the number 1: {remedy}" in line
    (line,) = wrong(reading(write(tmp_path / "b", content(category_id=3.0))))
    assert f"category_id 3.0 is not among the categories; there is the number 3: {remedy}" in line
    (line,) = wrong(reading(write(tmp_path / "c", content(category_id=99.0))))
    assert line.endswith("category_id 99.0 is not among the categories")
    categories = content()
    categories["categories"][0]["id"] = 3.0
    (line,) = reading(write(tmp_path / "d", categories)).problems
    assert "category number 1 has the id 3.0, expected a whole number or text" in line


def test_crowds_are_left_out_and_counted(tmp_path: Path) -> None:
    found = reading(write(tmp_path, content({"counts": "?", "size": SIZE}, iscrowd=1)))
    assert wrong(found) == []
    assert found.records[0].objects == []
    assert found.notes == {"crowd annotations left out": 1}


def test_ids_of_another_type_are_pointed_out(tmp_path: Path) -> None:
    """Exporters write ids as text in one list and as numbers in another."""
    number = content(image_id="1", category_id="3")
    (line,) = wrong(reading(write(tmp_path / "a", number)))
    assert "image_id '1' is not among the images; there is the number 1: write both" in line
    (line,) = wrong(reading(write(tmp_path / "b", content(category_id="3"))))
    assert "category_id '3' is not among the categories; there is the number 3" in line
    text = content()
    text["images"][0]["id"] = "1"
    (line,) = wrong(reading(write(tmp_path / "c", text)))
    assert "image_id 1 is not among the images; there is the text '1': write both" in line
    (line,) = wrong(reading(write(tmp_path / "d", content(image_id="2"))))
    assert line.endswith("image_id '2' is not among the images")


@pytest.mark.fault("C03", "D13")
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"images": [], "images": []}', "images"),
        ('{"images": [], "annotations": [{"id": 1, "bbox": [], "id": 2}]}', "id"),
        ('{"info": {"a\\u001b[2J": 1, "a\\u001b[2J": 1}}', r"a\x1b[2J"),
    ],
)
def test_a_key_that_stands_twice_in_an_object_is_refused(
    tmp_path: Path, text: str, key: str
) -> None:
    """Python would keep the last and lose the pictures of the first without a word."""
    (line,) = wrong(reading(write(tmp_path, text)))
    assert line == f"{tmp_path / 'instances.json'}: the key '{key}' stands twice in one object"


def test_without_categories_everything_is_an_object(tmp_path: Path) -> None:
    value = content()
    del value["categories"], value["annotations"][0]["category_id"]
    value["images"][0]["image_id"] = value["images"][0].pop("id")
    (record,) = reading(write(tmp_path, value)).records
    assert record.objects[0].label == "object"


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "it has no segmentation: masks are needed, a bbox is not enough"),
        ([[1, 2, 3, 4]], "4 numbers"),
        ([[1, 2, 3, 4, 5]], "5 numbers"),
        ([SQUARE, []], "0 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], r"segmentation.0..5. is nan"),
        ([[1, 2, 3, 4, 5, 1e12]], "coordinate 1e.12"),
        ({"size": [50, 20], "counts": [1000]}, r"size \[50, 20\].*swapped"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, "expected .20, 50."),
        ({"size": ["20", "50"], "counts": [1000]}, "expected .20, 50."),
        ({"size": [20, 50], "counts": [796]}, "sum to 796"),
        ({"size": [20, 50], "counts": [1001]}, "sum to 1001"),
        ({"size": [20, 50], "counts": [-1, 1001]}, "count -1"),
        ({"size": [20, 50]}, "counts are missing"),
        ("text", "it has no segmentation"),
    ],
)
def test_bad_masks_are_named_and_the_others_keep_their_class(
    tmp_path: Path, segmentation: object, reason: str
) -> None:
    value = content(segmentation)
    value["categories"].append({"id": 4, "name": "dent"})
    value["annotations"].append(content(id=8, category_id=4)["annotations"][0])
    found = reading(write(tmp_path, value))
    (problem,) = wrong(found)
    with pytest.raises(DataError, match=rf"instances\.json: annotation 7: .*{reason}"):
        raise DataError(problem)
    (kept,) = [shape for shape in found.records[0].shapes if shape.where.endswith("8")]
    assert (kept.label, kept.decode(SIZE).label) == ("dent", "dent")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_id": 99}, "image_id 99 is not among the images"),
        ({"image_id": [1]}, "image_id .1. is not among"),
        ({"category_id": 99}, "category_id 99 is not among the categories"),
        ({"category_id": None}, "category_id None"),
    ],
)
def test_bad_references_are_named(tmp_path: Path, changes: dict, reason: str) -> None:
    with pytest.raises(DataError, match=f"annotation 7: {reason}"):
        stop(reading(write(tmp_path, content(**changes))))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"file_name": "../../etc/passwd"}, "must be a path below"),
        ({"file_name": "/etc/passwd"}, "must be a path below"),
        ({"file_name": "C:\\x.jpg"}, "must be a path below"),
        ({"file_name": "\\\\server\\share\\x.jpg"}, "must be a path below"),
        ({"file_name": "http://host/x.jpg"}, "must be a path below"),
        ({"file_name": "file:x.jpg"}, "must be a path below"),
        ({"file_name": "a\0.jpg"}, r"file name 'a.x00\.jpg': no file can have it"),
        ({"file_name": ""}, "file name '': no file can have it"),
        ({"file_name": "n" * 6000}, r"file name 'n{79}\.\.\.: no file can have it"),
        ({"file_name": None}, "expected text"),
        ({"file_name": "none.jpg"}, "none.jpg: no such file"),
        ({"id": 1.0}, "id is 1.0"),
        ({"id": None}, "id is None"),
        ({"id": True}, "id is True"),
        ({"height": 21}, "50 x 21 pixels .* but 50 x 20"),
        ({"height": 50, "width": 20}, "seem to be swapped"),
        ({"height": "20"}, "expected whole numbers"),
    ],
)
def test_bad_pictures_are_named(tmp_path: Path, image: dict, reason: str) -> None:
    value = content()
    value["images"][0] |= image
    with pytest.raises(DataError, match=rf"instances\.json: image .*{reason}"):
        stop(reading(write(tmp_path, value)))


def test_doubled_ids_and_pictures_are_named(tmp_path: Path) -> None:
    value = content()
    value["images"] += [{"id": 1, "file_name": "b.jpg"}, {"id": 2, "file_name": "a.jpg"}]
    problems = reading(write(tmp_path, value)).problems
    assert "image ids that stand twice: 1" in problems[0]
    assert "image 2: a.jpg is image 1 already" in problems[1]
    value = content()
    value["categories"] *= 2
    with pytest.raises(DataError, match="category id 3 stands twice"):
        stop(reading(write(tmp_path, value)))


@pytest.mark.parametrize("name", ["images", "annotations"])
@pytest.mark.parametrize("bad", [None, {}, "x"])
def test_missing_lists_are_named(tmp_path: Path, name: str, bad: object) -> None:
    with pytest.raises(DataError, match=f'"{name}" is missing or not a list'):
        stop(reading(write(tmp_path, content() | {name: bad})))


def test_a_file_that_is_no_coco_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an object with images"):
        stop(reading(write(tmp_path, "[]")))


# -- where it lies ---------------------------------------------------------------------------------


def test_roboflow_exports_are_found(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path, content(), f"{split}/_annotations.coco.json", split)
    kind, sources = find(tmp_path)
    assert kind == "coco"
    assert sorted(sources) == ["test", "train", "val"]
    (record,) = read(sources["val"], kind, tmp_path).records
    assert record.key == "valid/a.jpg"


@pytest.mark.parametrize("pictures", ["train2017", "images/train2017", "images", "."])
def test_the_official_layout_is_found(tmp_path: Path, pictures: str) -> None:
    write(tmp_path, content(), "annotations/instances_train2017.json", pictures)
    write(tmp_path, "{}", "annotations/captions_train2017.json", pictures)
    found = find_coco(tmp_path, SPLITS)
    assert list(found) == ["train"]
    (record,) = read(found["train"], "coco", tmp_path).records
    assert record.image == tmp_path / pictures / "a.jpg"


def test_pictures_in_subfolders_are_found(tmp_path: Path) -> None:
    write(tmp_path, content(), pictures="images/deep")
    value = content()
    value["images"][0]["file_name"] = "deep\\a.jpg"
    (record,) = reading(write(tmp_path, value, pictures="images/deep")).records
    assert record.key == "images/deep/a.jpg"


def test_several_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, content(), "one.json")
    write(tmp_path, content(), "two.json")
    with pytest.raises(DataError, match=r"one\.json and two\.json both look like split 'all'"):
        find(tmp_path)
