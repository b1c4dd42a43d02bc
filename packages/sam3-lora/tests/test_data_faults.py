"""What is wrong with a COCO data set is said before weights load, all at once, as people can use
it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from lora_core import shielded
from lora_core.errors import DataError
from lora_core.testing import coco as faulty
from lora_core.testing import corrupt, hostile
from lora_core.testing.no_device import no_device
from lora_core.training import loading
from sam3_lora.config import Config, Dataset, Logging, Training
from sam3_lora.data import Splits, fingerprint, load

SIZE = (40, 90)  # height, width
SQUARE = [10, 5, 40, 5, 40, 30, 10, 30]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def noise(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))


def coco(folder: Path, pictures: int = 4, seed: int = 0) -> dict[str, Any]:
    """A COCO data set of one annotation per picture; gives the content of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": "rust"}, {"id": 2, "name": "dent"}]
    for number in range(pictures):
        noise(seed + number).save(folder / f"{number}.png")
        content["images"].append(
            {"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
        )
        content["annotations"].append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [10, 5, 30, 25],
                "segmentation": [list(SQUARE)],
            }
        )
    save(folder, content)
    return content


def file_of(folder: Path) -> Path:
    return folder / "_annotations.coco.json"


def save(folder: Path, content: dict[str, Any]) -> None:
    file_of(folder).write_text(json.dumps(content))


def config(train: Path, val: Path | None = None, masks: bool = True, **settings: Any) -> Config:
    own = {key: settings.pop(key) for key in list(settings) if hasattr(Dataset, key)}
    return Config(
        dataset=Dataset(
            train_img_folder=str(train),
            train_ann_file=str(file_of(train)),
            val_img_folder=str(val) if val else None,
            val_ann_file=str(file_of(val)) if val else None,
            **{"resolution": "84", **own},
        ),
        training=Training(enable_segmentation=masks),
        logging=Logging(log_dir=str(train.parent / "logs")),
        **settings,
    )


SKIP: dict[str, Any] = {"on_bad_sample": "skip", "max_bad_fraction": 0.9}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return tmp_path / "data" / "train"


def stopped(train: Path, val: Path | None = None, **settings: Any) -> str:
    """The message with which the data stops a run, before anything touches a device."""
    with no_device(), pytest.raises(DataError) as caught:
        load(config(train, val, **settings))
    return str(caught.value)


def problem_and_rest(train: Path, **settings: Any) -> tuple[str, Splits]:
    """As `stopped`, for data of which one sample is bad: the one line about it, and the others."""
    title, line, remedy = stopped(train, **settings).splitlines()
    assert title == f"{train}: 1 problem"
    assert remedy == "mend or remove it, or leave it out with --on_bad_sample skip"
    splits = load(config(train, **SKIP, **settings))
    assert len({one.sample for one in splits.bad}) == 1
    assert splits.bad[0].reason == line
    return line, splits


def problem(train: Path, **settings: Any) -> str:
    return problem_and_rest(train, **settings)[0]


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.fault("D01")
def test_all_missing_pictures_are_listed_at_once(train: Path) -> None:
    coco(train, pictures=30)
    for number in range(25):
        (train / f"{number}.png").unlink()
    lines = stopped(train).splitlines()
    assert lines[0] == f"{train}: 25 problems"
    assert lines[1] == f"{file_of(train)}: image 0: {train}/0.png: no such file"
    assert len(lines) == 23
    assert lines[21] == "... and 5 more"
    assert lines[22].endswith("leave the 25 samples out with --on_bad_sample skip")


@pytest.mark.fault("D01")
def test_a_folder_that_does_not_exist_is_said_once(train: Path, tmp_path: Path) -> None:
    text = stopped(train, tmp_path / "none")
    assert f"--dataset.train_img_folder {train}: no such folder" in text
    assert f"--dataset.val_img_folder {tmp_path}/none: no such folder" in text
    coco(train)
    file_of(train).unlink()
    assert f"{file_of(train)}: no such file" in stopped(train)


@pytest.mark.fault("D02")
@pytest.mark.parametrize(
    "damage", ["cut_after_1_of_8", "cut_after_7_of_8", "empty", "lfs_pointer", "text", "folder"]
)
def test_a_damaged_picture_is_named(train: Path, damage: str) -> None:
    content = coco(train)
    content["images"][2]["file_name"] = "2.jpg"
    save(train, content)
    picture = train / "2.jpg"
    noise(2).save(picture)
    corrupt.DAMAGE[damage](picture)
    line = problem(train)
    assert f"{picture}: " in line
    expected = {
        "empty": "the file is empty", "text": "not a picture in",
        "lfs_pointer": "run `git lfs pull`", "folder": "not a regular file",
    }  # fmt: skip
    assert expected.get(damage, "cannot be read: ") in line


@pytest.mark.fault("D02", "D49")
def test_a_picture_that_is_cut_off_is_found_by_decoding_it(train: Path) -> None:
    """Its header is whole."""
    content = coco(train)
    path = train / "2.jpg"
    noise(2).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    content["images"][2]["file_name"] = path.name
    save(train, content)
    line = problem(train)
    assert line.startswith(f"{path}: cannot be read: ")
    splits = load(config(train, **SKIP))
    assert [record.key for record in splits.train.records] == ["0.png", "1.png", "3.png"]
    assert f"1 bad sample of train left out, the first: {line}" in splits.notes


@pytest.mark.fault("D03")
def test_a_picture_that_exif_turns_must_be_annotated_upright(train: Path) -> None:
    content = coco(train)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(1).save(train / "1.png", exif=exif)
    line = problem(train)
    assert "image 1: it says: 90 x 40 pixels (width x height), but 40 x 90 in the picture" in line
    assert "EXIF orientation turns it" in line
    content["images"][1] |= {"height": SIZE[1], "width": SIZE[0]}
    save(train, content)
    assert load(config(train)).train.records[1].size == SIZE[::-1]


@pytest.mark.fault("D04", "D05")
def test_pictures_of_every_mode_and_shape_become_samples(train: Path) -> None:
    content = coco(train, pictures=6)
    content["annotations"] = content["annotations"][:1]
    pictures = [
        noise(0), noise(1, (1, 1)), noise(2, (1, 900)).convert("L"), noise(3, (900, 1)),
        Image.fromarray(np.full((33, 47), 25700, dtype=np.uint16)),
        Image.new("RGBA", (20, 30), (0, 0, 0, 0)),
    ]  # fmt: skip
    for number, picture in enumerate(pictures):
        picture.save(train / f"{number}.png")
        content["images"][number] |= {"height": picture.height, "width": picture.width}
    save(train, content)
    samples = load(config(train, enable_augmentation=False)).train
    pixels = [samples[number].pixels for number in range(6)]
    assert all(one.shape == (84, 84, 3) for one in pixels)
    assert pixels[4].unique().tolist() == [100]
    assert pixels[5].unique().tolist() == [255], "transparent pictures lie on white"


BOMBS = {
    "bomb.png": (hostile.png_bomb, "more than 150 million pixels"),
    "wide.jpg": (lambda path: hostile.jpeg_that_claims(path, 65500, 65500), "150 million pixels"),
    "pages.tif": (hostile.tiff_pages, "more than 1000 frames or pages"),
    "scans.jpg": (hostile.jpeg_of_many_scans, "takes longer than 1 s to be decoded"),
    "fifo.png": (hostile.fifo, "not a regular file"),
    "folder.png": (lambda path: path.mkdir(), "not a regular file"),
    "gone.png": (lambda path: path.symlink_to(path.parent / "none.png"), "no such file"),
    "zero.png": (lambda path: path.symlink_to("/dev/zero"), "--dataset.follow_links true"),
}


@pytest.mark.fault("D06", "D07", "H16", "H20")
@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_picture_is_named_and_harms_nobody(
    train: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shielded, "LIMITS", shielded.Limits(1.0, 2**29))
    content = coco(train)
    make, reason = BOMBS[name]
    make(train / name)
    content["images"][2] = {"id": 2, "file_name": name}
    save(train, content)
    line = problem(train)
    assert f"{train}/{name}: " in line
    assert reason in line


@pytest.mark.fault("D08")
def test_a_picture_that_comes_back_is_used_and_another_never_stands_for_it(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco(train)
    samples = load(config(train)).train
    before, path = samples[1].pixels, samples.records[1].image
    away = path.with_name("away")
    path.rename(away)
    monkeypatch.setattr(loading.time, "sleep", lambda seconds: away.rename(path))
    assert (samples[1].pixels == before).all()
    path.unlink()
    monkeypatch.setattr(loading, "PAUSES", (0.01,))
    monkeypatch.setattr(loading.time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"1\.png: no such file\nit was good when the run began"):
        samples[1]


# -- data sets -------------------------------------------------------------------------------------


@pytest.mark.fault("D09", "D28")
def test_a_data_set_without_pictures_or_objects_stops_the_run(train: Path) -> None:
    content = coco(train)
    save(train, content | {"images": [], "annotations": []})
    assert f"{file_of(train)}: no pictures in the train split" in stopped(train)
    save(train, content | {"annotations": []})
    assert f"{file_of(train)}: no objects in the 4 pictures of the train split" in stopped(train)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    save(train, content)
    assert "no objects in the 4 pictures of the train split" in stopped(train)


@pytest.mark.fault("D09")
def test_all_splits_without_objects_are_named(train: Path) -> None:
    coco(train)
    valid = train.parent / "valid"
    content = coco(valid, seed=50)
    save(valid, content | {"annotations": []})
    save(train, content | {"annotations": []})
    text = stopped(train, valid)
    for name, folder in (("train", train), ("val", valid)):
        assert f"{file_of(folder)}: no objects in the 4 pictures of the {name} split" in text


@pytest.mark.fault("D09")
def test_one_picture_is_a_data_set(train: Path) -> None:
    coco(train, pictures=1)
    assert len(load(config(train)).train) == 1


@pytest.mark.fault("D10")
def test_pictures_in_two_splits_are_counted_and_named(train: Path) -> None:
    coco(train)
    valid = train.parent / "valid"
    coco(valid, seed=2)
    text = str(load(config(train, valid)))
    note = "note: 2 pictures of val in train too, so that its scores flatter: 0.png, 1.png\n"
    assert note in f"{text}\n"


# -- annotation files ------------------------------------------------------------------------------


@pytest.mark.fault("D11")
@pytest.mark.parametrize("kind", faulty.ENCODINGS)
def test_an_annotation_file_that_is_no_json_is_named_with_its_place(train: Path, kind: str) -> None:
    coco(train)
    encode, reason = faulty.ENCODINGS[kind]
    file_of(train).write_bytes(encode(file_of(train).read_text()))
    with pytest.raises(DataError, match=f"{file_of(train)}.*{reason}"):
        raise DataError(stopped(train))


@pytest.mark.fault("D11")
def test_a_byte_order_mark_and_windows_line_ends_are_fine(train: Path) -> None:
    text = json.dumps(coco(train), indent=1).replace("\n", "\r\n")
    file_of(train).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(load(config(train)).train) == 4


@pytest.mark.fault("D12")
@pytest.mark.parametrize(
    ("where", "value"), [("bbox", "NaN"), ("segmentation", "Infinity"), ("image", "-Infinity")]
)
def test_numbers_that_json_does_not_have_are_named_with_record_and_field(
    train: Path, value: str, where: str
) -> None:
    content = coco(train)
    text, complaint = faulty.not_finite(content, where, value)
    file_of(train).write_text(text)
    assert problem(train) == f"{file_of(train)}: {complaint}"


@pytest.mark.fault("D13")
@pytest.mark.parametrize("kind", faulty.DOUBLES)
def test_ids_and_files_that_stand_twice_are_listed(train: Path, kind: str) -> None:
    content, path = coco(train), file_of(train)
    complaint = faulty.doubled(content, kind)
    save(train, content)
    text = stopped(train)
    assert f"{path}: {complaint}" in text
    assert text == stopped(train, **SKIP), "not to be left out"


@pytest.mark.fault("D14", "D17")
def test_images_without_ids_classes_or_annotations_are_read(train: Path) -> None:
    content = coco(train, pictures=6)
    for image in content["images"]:
        image["image_id"] = image.pop("id")
    for annotation in content["annotations"]:
        del annotation["category_id"]
    del content["categories"], content["annotations"][5:]
    save(train, content)
    splits = load(config(train, phrase="rust patch"))
    assert splits.phrases == ("rust patch",)
    assert (splits.counts["train"].pictures, splits.counts["train"].empty) == (6, 1)
    assert [len(query.boxes) for query in splits.train[5].queries] == [0], "a true negative"


@pytest.mark.fault("D14")
def test_categories_that_nobody_named_are_refused(train: Path) -> None:
    content = coco(train)
    content["annotations"][1]["category_id"] = 2
    del content["categories"]
    save(train, content)
    assert f"{file_of(train)}: annotations of categories 1, 2, but no list" in stopped(train)
    save(train, content | {"categories": [{"id": 1, "name": "rust"}, {"id": 2}]})
    assert f"{file_of(train)}: category 2 has no name" in stopped(train)


@pytest.mark.fault("D15")
@pytest.mark.parametrize("name", ["images", "annotations"])
@pytest.mark.parametrize("value", [..., None, {}, "x", 3])
def test_a_coco_file_without_its_lists_stops_the_run(train: Path, name: str, value: Any) -> None:
    content = coco(train)
    content[name] = value
    if value is ...:
        del content[name]
    save(train, content)
    assert f'{file_of(train)}: "{name}" is missing or not a list' in stopped(train)


ANNOTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown image": ({"image_id": 99}, "image_id 99 is not among the images"),
    "image id is a fraction": ({"image_id": 2.0}, "image_id 2.0 is not among the images"),
    "unknown category": ({"category_id": 7}, "category_id 7 is not among the categories"),
    "no category": ({"category_id": None}, "category_id None is not among the categories"),
    "crowd of 2": ({"iscrowd": 2}, "iscrowd 2, expected 0 or 1"),
    "no box, no mask": ({"bbox": None, "segmentation": None}, "neither bbox nor segmentation"),
    "3 numbers": ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3]: expected the numbers [x, y, width, height"),
    "5 numbers": ({"bbox": [1, 2, 3, 4, 5]}, "expected the numbers [x, y, width, height]"),
    "words": ({"bbox": ["1", "2", "3", "4"]}, "expected the numbers [x, y, width, height]"),
    "truths": ({"bbox": [True, True, True, True]}, "expected the numbers [x, y, width, height]"),
    "a mapping": ({"bbox": {"x": 1}}, "expected the numbers [x, y, width, height]"),
    "negative": ({"bbox": [20, 20, -5, 5]}, "bbox [20, 20, -5, 5]: a width or height below 0"),
    "outside": ({"bbox": [90, 5, 10, 10]}, "it lies outside of the picture of 90 x 40"),
    "above": ({"bbox": [5, -20, 10, 10]}, "it lies outside of the picture of 90 x 40"),
    "huge": ({"bbox": [10**400, 1, 1, 1]}, "it lies outside of the picture of 90 x 40"),
    "huge fraction": ({"bbox": [1.5, 1, 10**400, 1]}, "it lies outside of the picture"),
    "a zero too much": ({"bbox": [1, 1, 1e12, 1]}, "it lies outside of the picture of 90 x 40"),
    "2 numbers": ({"segmentation": [[1, 2]]}, "polygon: 2 numbers"),
    "4 numbers": ({"segmentation": [[1, 2, 3, 4]]}, "polygon: 4 numbers"),
    "5 in a ring": ({"segmentation": [[1, 2, 3, 4, 5]]}, "polygon: 5 numbers"),
    "7 numbers": ({"segmentation": [SQUARE[:7]]}, "polygon: 7 numbers"),
    "empty ring": ({"segmentation": [[]]}, "polygon: 0 numbers"),
    "one bad ring": ({"segmentation": [SQUARE, [1, 2, 3]]}, "polygon: 3 numbers"),
    "text": ({"segmentation": [["1"] * 6]}, "polygon: expected numbers"),
    "a sentence": ({"segmentation": "rust"}, "it has no segmentation"),
    "far outside": ({"segmentation": [[1, 2, 3, 4, 5, 1e12]]}, "coordinate 1e+12 is not near"),
    "1e999": ({"segmentation": [[1, 2, 3, 4, 5, 1e308 * 10]]}, "is inf, expected a finite"),
    "too short": ({"segmentation": {"size": [40, 90], "counts": [796]}}, "sum to 796"),
    "too long": ({"segmentation": {"size": [40, 90], "counts": [9999]}}, "sum to 9999"),
    "count below 0": ({"segmentation": {"size": [40, 90], "counts": [-1, 3601]}}, "count -1"),
    "swapped": ({"segmentation": {"size": [90, 40], "counts": [3600]}}, "width are swapped"),
    "huge size": ({"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}}, "[40, 90]"),
    "size 0": ({"segmentation": {"size": [0, 90], "counts": [0]}}, "[40, 90]"),
    "size is text": ({"segmentation": {"size": ["40", "90"], "counts": [3600]}}, "[40, 90]"),
    "no size": ({"segmentation": {"counts": [3600]}}, "[40, 90]"),
    "no counts": ({"segmentation": {"size": [40, 90]}}, "counts are missing"),
    "damaged": ({"segmentation": {"size": [40, 90], "counts": "~~"}}, "string is damaged"),
    "no text": ({"segmentation": {"size": [40, 90], "counts": "\ud800"}}, "string is damaged"),
    "short text": ({"segmentation": {"size": [40, 90], "counts": "P3"}}, "sum to"),
    "other size, short": ({"segmentation": {"size": [20, 45], "counts": [899]}}, "sum to 899"),
}


@pytest.mark.fault("D16", "D18", "D20", "D21", "D22", "D23", "D24", "H22", "H23")
@pytest.mark.parametrize("name", ANNOTATIONS)
def test_a_bad_annotation_is_named_and_the_others_keep_their_phrase(train: Path, name: str) -> None:
    content = coco(train)
    changes, reason = ANNOTATIONS[name]
    content["categories"] += [{"id": number, "name": f"class {number}"} for number in (3, 4)]
    for number in (1, 3):
        content["annotations"][number]["category_id"] = number + 1
    content["annotations"][2] |= changes
    save(train, content)
    line, rest = problem_and_rest(train)
    assert line.startswith(f"{file_of(train)}: annotation 2: ")
    assert reason in line
    kept = {
        record.key: [one.phrase for one in record.instances()[0]] for record in rest.train.records
    }
    expected = {"0.png": ["rust"], "1.png": ["dent"], "3.png": ["class 4"]}
    unknown = "is not among the images" in reason
    assert kept == expected | ({"2.png": []} if unknown else {})


@pytest.mark.fault("D12", "D23")
def test_all_that_is_wrong_with_one_picture_is_said_at_once(train: Path) -> None:
    content = coco(train)
    first, more = content["annotations"][1], dict(content["annotations"][1], id=77)
    first["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]
    more["segmentation"] = {"size": list(SIZE), "counts": [-5, 5 + SIZE[0] * SIZE[1]]}
    content["annotations"] += [more, dict(more, id=78, bbox=[1, 2])]
    content["images"][1]["file_name"] = "1.jpg"
    save(train, content)
    noise(1).save(train / "1.jpg")
    (train / "1.jpg").write_bytes((train / "1.jpg").read_bytes()[:-500])
    text = stopped(train)
    assert text.startswith(f"{train}: 4 problems\n")
    assert "annotation 1: segmentation[0][2] is nan" in text
    assert "annotation 77: run lengths: count -5" in text
    assert "annotation 78: bbox [1, 2]: expected" in text
    assert "1.jpg: cannot be read" in text


# -- what is repaired, with a count ----------------------------------------------------------------


def changed(train: Path, **changes: Any) -> Splits:
    """The data set with these changes of annotation 0."""
    content = coco(train)
    content["annotations"][0] |= changes
    content["annotations"][0] = {
        key: value for key, value in content["annotations"][0].items() if value is not ...
    }
    save(train, content)
    return load(config(train))


def first_object(splits: Splits) -> Any:
    (found,), _ = splits.train.records[0].instances()
    return found


@pytest.mark.fault("D18")
def test_a_box_that_leaves_its_picture_is_cut_as_corners_and_counted(train: Path) -> None:
    splits = changed(train, bbox=[-4, 20, 14, 100])
    assert first_object(splits).box == (0, 20, 10, 40)
    assert "boxes that leave their picture, cut: 1" in splits.notes
    rounded = changed(train, bbox=[80, 20, 10.6, 20.4])
    assert first_object(rounded).box == (80, 20, 90, 40)
    assert not any("leave their picture" in note for note in rounded.notes)


@pytest.mark.fault("D18")
@pytest.mark.parametrize("bbox", [[5, 5, 0, 9], [5, 5, 9, 0], [5, 5, 0, 0], [5, 5, 1e-30, 9]])
def test_a_box_without_width_or_height_is_left_out_and_counted(train: Path, bbox: list) -> None:
    splits = changed(train, bbox=bbox)
    assert splits.train.records[0].instances() == ([], 0)
    assert "boxes without width or height, left out: 1" in splits.notes
    assert [query.phrase for query in splits.train[0].queries] == ["rust", "dent"]


@pytest.mark.fault("D18")
def test_corners_instead_of_widths_are_suspected(train: Path) -> None:
    content = coco(train, pictures=6)
    for number, annotation in enumerate(content["annotations"]):
        annotation["bbox"] = [10 * number, 5, 10 * number + 40, 30]
    save(train, content)
    text = stopped(train)
    assert "3 of 6 boxes leave their picture as [x, y, width, height], and all would fit as" in text
    del content["images"][:3], content["annotations"][:3]
    save(train, content)
    assert any("are they x0, y0, x1, y1?" in note for note in load(config(train)).notes)
    assert "are these corners" not in stopped_by(train, [95, 30, 99, 36])
    assert "are these corners" not in stopped_by(train, [50, 30, -2, 5])


def stopped_by(train: Path, bbox: list) -> str:
    content = coco(train)
    content["annotations"][0]["bbox"] = bbox
    save(train, content)
    return problem(train)


@pytest.mark.fault("D19")
@pytest.mark.parametrize("area", [..., 0, -5, 1e9, "large", None])
def test_the_area_is_computed_anew(train: Path, area: Any) -> None:
    changed(train, area=area)
    splits = load(config(train, train))
    assert splits.val is not None
    assert splits.val[0].truth[0][0]["area"] == 750


@pytest.mark.fault("D19")
@pytest.mark.parametrize("segmentation", [..., None, [], {}])
def test_an_annotation_without_a_mask_is_kept_as_a_box(train: Path, segmentation: Any) -> None:
    splits = changed(train, segmentation=segmentation)
    query = splits.train[0].queries[0]
    assert len(query.boxes) == 1
    assert query.has_mask.tolist() == [False]
    assert "train: 1 objects without a mask: trained as boxes" in splits.notes
    assert not any("without a mask" in note for note in load(config(train, masks=False)).notes)


@pytest.mark.fault("D19")
def test_masks_cannot_be_trained_without_any(train: Path) -> None:
    content = coco(train)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    save(train, content)
    text = stopped(train)
    assert f"{file_of(train)}: none of the 4 objects of the train split has a mask" in text
    assert "--training.enable_segmentation false" in text
    assert len(load(config(train, masks=False)).train) == 4


@pytest.mark.fault("D19")
@pytest.mark.parametrize("bbox", [..., None, []])
def test_a_missing_box_is_that_of_the_mask(train: Path, bbox: Any) -> None:
    splits = changed(train, bbox=bbox)
    assert first_object(splits).box == (10, 5, 40, 30)
    boxes_alone = load(config(train, masks=False, enable_augmentation=False)).train
    assert boxes_alone[0].queries[0].boxes[0].tolist() == pytest.approx(
        [25 / 90, 17.5 / 40, 30 / 90, 25 / 40]
    )


@pytest.mark.fault("D18")
@pytest.mark.parametrize("masks", [True, False])
def test_masks_that_lie_apart_from_their_boxes_are_counted_with_the_first(
    train: Path, masks: bool
) -> None:
    """As in files that mean (y, x) in one of the two: nothing is refused."""
    content = coco(train)
    for number in (1, 3):
        content["annotations"][number]["bbox"] = [50, 2, 25, 30]
    content["annotations"][2]["bbox"] = [41, 5, 5, 5]  # a rounded pixel beside the mask
    save(train, content)
    splits = load(config(train, masks=masks))
    (note,) = [note for note in splits.notes if "do not overlap" in note]
    assert note == (
        "train: 2 annotations whose mask and bbox do not overlap (are x and y swapped in one of "
        f"them?), the first: {file_of(train)}: annotation 1"
    )
    assert len(splits.train) == 4
    assert not any("do not overlap" in note for note in changed(train).notes)


EMPTY = {"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}


@pytest.mark.fault("D19")
def test_an_empty_mask_is_replaced_by_the_filled_box_and_counted(train: Path) -> None:
    splits = changed(train, segmentation=EMPTY, bbox=[10.5, 5.5, 4, 3])
    mask = first_object(splits).mask.mask
    assert mask[5:9, 10:15].all()
    assert mask.sum() == 20
    assert "train: 1 empty masks replaced by their filled boxes" in splits.notes


@pytest.mark.fault("D19")
def test_an_empty_mask_without_a_box_is_left_out_and_counted(train: Path) -> None:
    splits = changed(train, segmentation=EMPTY, bbox=...)
    assert splits.train.records[0].instances() == ([], 1)
    assert "train: 1 annotations that cover nothing left out" in splits.notes


@pytest.mark.fault("D19")
def test_crowds_are_left_out_of_training_or_taken_as_objects(train: Path) -> None:
    splits = changed(train, iscrowd=1)
    assert [query.phrase for query in splits.train[0].queries] == ["dent"]
    assert "train: 1 crowd regions left out (--dataset.keep_crowd)" in splits.notes
    kept = load(config(train, keep_crowd=True)).train[0].queries
    assert [(query.phrase, len(query.boxes)) for query in kept] == [("rust", 1), ("dent", 0)]


OUTLINES = {
    "crossing": [[10, 5, 40, 30, 40, 5, 10, 30]],
    "leaves the picture": [[-20, -9, 40, 5, 120, 60]],
    "nested too deep": [[SQUARE]],
    "not in a list": SQUARE,
    "pairs": [[[10, 5], [40, 5], [40, 30], [10, 30]]],
    "closed": [[*SQUARE, 10, 5]],
    "two parts": [[10, 5, 20, 5, 20, 30], [30, 5, 40, 5, 40, 30]],
}


@pytest.mark.fault("D20")
@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_that_can_be_understood_are_fine(train: Path, name: str) -> None:
    item = first_object(changed(train, segmentation=OUTLINES[name])).mask
    assert item.area > 100
    if name in {"nested too deep", "not in a list", "pairs", "closed"}:
        assert item.mask[5:30, 10:40].all()
        assert item.area == 750


@pytest.mark.fault("D23")
@pytest.mark.parametrize("text", [False, True])
def test_run_lengths_may_be_a_list_or_text(train: Path, text: bool) -> None:
    runs: dict[str, Any] = {"size": list(SIZE), "counts": [405, *[25, 15] * 29, 25, 2010]}
    if text:
        packed = coco_mask.frPyObjects(runs, *SIZE)
        runs["counts"] = packed["counts"].decode()
    item = first_object(changed(train, segmentation=runs)).mask
    assert (item.area, item.origin) == (750, (10, 5))


@pytest.mark.fault("D23")
def test_run_lengths_of_another_size_are_resized_and_counted(train: Path) -> None:
    half = {"size": [20, 45], "counts": [102, *[13, 7] * 14, 13, 505]}
    splits = changed(train, segmentation=half)
    assert "masks written for another size than their picture's, resized: 1" in splits.notes
    item = first_object(splits).mask
    assert item.size == SIZE
    assert (item.area, item.origin) == (30 * 26, (10, 4))


# -- leaving out -----------------------------------------------------------------------------------


@pytest.mark.fault("D47")
def test_too_many_bad_pictures_stop_the_run_with_the_path_of_their_list(train: Path) -> None:
    coco(train, pictures=10)
    for number in (1, 2):
        (train / f"{number}.png").write_bytes(b"")
    text = stopped(train, on_bad_sample="skip", max_bad_fraction=0.1)
    assert "train: 2 of 10 samples are bad, more than --max_bad_fraction 0.1 allows" in text
    report = train.parent / "logs" / "bad_samples.jsonl"
    assert str(report) in text
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(row["split"], row["sample"]) for row in rows] == [
        ("train", "1.png"),
        ("train", "2.png"),
    ]
    assert len(load(config(train, on_bad_sample="skip", max_bad_fraction=0.2)).train) == 8


@pytest.mark.fault("D48", "D49")
def test_the_same_pictures_are_left_out_each_time_and_none_stands_for_another(train: Path) -> None:
    coco(train, pictures=6)
    (train / "2.png").write_bytes(b"")
    one, two = load(config(train, **SKIP)), load(config(train, **SKIP))
    assert fingerprint(one) == fingerprint(two)
    keys = [one.train[index].key for index in range(len(one.train))]
    assert keys == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert [(bad.split, bad.sample) for bad in one.bad] == [("train", "2.png")]


@pytest.mark.fault("D48")
def test_all_ranks_leave_out_the_same(train: Path) -> None:
    """The first looks, and the others take its word."""
    coco(train)
    (train / "2.png").write_bytes(b"")
    found: list[tuple[list[str], str]] = []
    first: list[Any] = []

    def share(make: Callable[[], Any]) -> Any:
        if not first:
            first.append(make())
        return first[0]

    for _ in range(2):
        splits = load(config(train, **SKIP), share)
        found.append(([record.key for record in splits.train.records], fingerprint(splits)))
    assert found[0] == found[1]
    shutil.copy(train / "0.png", train / "9.png")
    content = json.loads(file_of(train).read_text())
    content["images"].append({"id": 9, "file_name": "9.png"})
    save(train, content)
    with pytest.raises(DataError, match=r"1 differ, such as 9\.png; all machines need the same"):
        load(config(train, **SKIP), share)


@pytest.mark.fault("D43")
def test_what_was_looked_at_is_not_looked_at_again(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco(train)
    load(config(train))
    with monkeypatch.context() as patch:
        patch.setattr("sam3_lora.records.read_image", None)
        assert len(load(config(train)).train) == 4
    noise(77).save(train / "1.png")
    (train / "1.png").write_bytes((train / "1.png").read_bytes()[:-2000])
    assert "1.png: cannot be read" in stopped(train)


@pytest.mark.fault("H15")
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "http://x/y"])
def test_a_file_name_that_leaves_the_folder_is_named(train: Path, name: str) -> None:
    content = coco(train)
    content["images"][1]["file_name"] = name
    save(train, content)
    assert f"image 1: file name '{name}': must be a path below {train}" in problem(train)


@pytest.mark.fault("H32")
def test_names_from_the_data_cannot_forge_output(train: Path) -> None:
    content = coco(train)
    content["categories"][0]["name"] = "rust\x1b[2J\nnote: all is well"
    save(train, content)
    text = str(load(config(train)))
    assert "\x1b" not in text
    assert "\nnote: all is well" not in text
