"""What is wrong with a data set is said before training, all at once, as people can use it."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ImageFile
import pytest
from PIL import ExifTags, Image, ImageOps

from lora_core import shielded
from lora_core.distributed import first_rank_decides
from lora_core.errors import DataError
from lora_core.report import say
from lora_core.testing import coco as faulty
from lora_core.testing import corrupt, hostile, processes
from lora_core.testing.no_device import no_device
from lora_core.training import loading
from sam2_lora import demo, evaluate, losses, prepare, survey
from sam2_lora.config import Config
from sam2_lora.data import EvalSet, TrainSet, collate, fingerprint, load
from sam2_lora.metrics import Tally
from sam2_lora.train import main

SIZE = (40, 90)  # height, width


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def noise(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))


def mask(size: tuple[int, int] = SIZE, value: int = 255) -> Image.Image:
    values = np.zeros(size, np.uint8)
    values[size[0] // 4 : -(size[0] // 4) or None, size[1] // 3 : -(size[1] // 3) or None] = value
    return Image.fromarray(values)


def folders(tmp_path: Path, train: int = 4, val: int = 2) -> Path:
    """Pictures and masks; the name of a picture is its number."""
    root = tmp_path / "data"
    for number in range(train + val):
        split = root / ("train" if number < train else "val")
        for name in ("images", "masks"):
            (split / name).mkdir(parents=True, exist_ok=True)
        noise(number).save(split / "images" / f"{number}.png")
        mask().save(split / "masks" / f"{number}.png")
    return root


SQUARE = [10, 5, 40, 5, 40, 30, 10, 30]


def coco(tmp_path: Path, pictures: int = 4, name: str = "annotations.json") -> tuple[Path, dict]:
    """A COCO data set of one annotation per picture, and the content of its file."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1}]}
    content["categories"][0]["name"] = "rust"
    for number in range(pictures):
        noise(number).save(root / "images" / f"{number}.png")
        content["images"].append(
            {"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
        )
        content["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "segmentation": [list(SQUARE)]}
        )
    (root / name).write_text(json.dumps(content))
    return root, content


def config(root: Path, **changes: Any) -> Config:
    output = str(root.parent / "runs")
    return Config(**{"data_root": str(root), "image_size": "64", "output_dir": output} | changes)


def command(root: Path, **settings: object) -> list[str]:
    words: dict[str, object] = {
        "data_root": root,
        "checkpoint": demo.base_checkpoint(),
        "image_size": 64,
        "steps": 2,
        "eval_steps": 2,
        "num_workers": 0,
        "device": "cpu",
        "tensorboard": False,
        "output_dir": root.parent / "runs",
        "logs_dir": root.parent / "logs",
        **settings,
    }
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def stopped(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run `sam2-lora train` on data that stops it; gives its message."""

    def run(root: Path, **settings: object) -> str:
        capsys.readouterr()
        with no_device():
            assert main(command(root, **settings)) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert "Traceback" not in text
        assert not list(root.parent.glob("runs/sam2_*")), "no run was begun"
        return text

    return run


@pytest.fixture
def problem(stopped: Callable[..., str]) -> Callable[..., str]:
    """As `stopped`, for data of which one sample is bad: the one line about it."""

    def run(root: Path, **settings: object) -> str:
        text = stopped(root, **settings)
        title, line, remedy = text.removeprefix("error: ").splitlines()
        assert title == f"{root}: 1 problem"
        assert remedy == "mend or remove it, or leave it out with --on_bad_sample skip"
        splits = load(config(root, on_bad_sample="skip", max_bad_fraction=0.9, **settings))
        assert len({one.sample for one in splits.bad}) == 1
        assert splits.bad[0].reason == line
        return line

    return run


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.fault("D01")
def test_all_missing_pictures_are_listed_at_once(
    tmp_path: Path, stopped: Callable[..., str]
) -> None:
    root, _ = coco(tmp_path, pictures=30)
    for number in range(25):
        (root / "images" / f"{number}.png").unlink()
    lines = stopped(root).splitlines()
    assert lines[0] == f"error: {root}: 25 problems"
    assert lines[1] == f"{root}/annotations.json: image 0: {root}/images/0.png: no such file"
    assert len(lines) == 23
    assert lines[21] == "... and 5 more"
    assert lines[22].endswith("leave the 25 samples out with --on_bad_sample skip")


@pytest.mark.fault("D02")
@pytest.mark.parametrize("damage", corrupt.DAMAGE)
def test_a_damaged_picture_is_named_and_stops_the_run(
    tmp_path: Path, problem: Callable[..., str], damage: str
) -> None:
    root = folders(tmp_path)
    picture = root / "train" / "images" / "2.jpg"
    picture.with_suffix(".png").unlink()
    noise(2).save(picture)
    corrupt.DAMAGE[damage](picture)
    line = problem(root)
    assert line.startswith(f"{picture}: ")
    expected = {
        "empty": "the file is empty", "web_page": "an HTML or XML page", "text": "not a picture in",
        "lfs_pointer": "run `git lfs pull`", "folder": "not a regular file", "zeros": "not a pict",
    }  # fmt: skip
    assert expected.get(damage, "cannot be read: ") in line
    if damage.startswith(("cut_after_7", "last")):
        assert "truncated" in line


@pytest.mark.fault("D02")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"])
def test_a_picture_that_is_cut_off_anywhere_is_found_in_every_format(
    tmp_path: Path, suffix: str
) -> None:
    """Or nothing of it is lost: behind the pixels of PNG and GIF some bytes may be missing."""
    path = tmp_path / f"0{suffix}"
    noise(0).save(path)
    data, whole = path.read_bytes(), survey.read_image(path)
    record = survey.Record("0", path, SIZE)
    for cut in [*range(0, len(data), len(data) // 16), len(data) - 1]:
        path.write_bytes(data[:cut])
        with contextlib.suppress(DataError):
            survey.look(record, config(tmp_path))
            assert cut > len(data) - 24, "it was taken for whole"
            assert (survey.read_image(path) == whole).all()


@pytest.mark.fault("D02")
def test_a_name_that_says_another_format_is_named(
    tmp_path: Path, problem: Callable[..., str]
) -> None:
    root = folders(tmp_path)
    picture = root / "train" / "images" / "2.png"
    picture.rename(picture.with_suffix(".jpg"))
    assert problem(root) == (
        f"{picture.with_suffix('.jpg')}: holds a picture in PNG format: name it so"
    )


@pytest.mark.fault("D03")
def test_the_exif_orientation_turns_pictures_and_masks_by_one_rule(
    tmp_path: Path, problem: Callable[..., str]
) -> None:
    root, _ = coco(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(1).save(root / "images" / "1.png", exif=exif)
    line = problem(root)
    assert "annotations.json: image 1: it says: 90 x 40 pixels (width x height)" in line
    assert "but 40 x 90 in the picture" in line
    assert "EXIF orientation turns it" in line
    turned = folders(tmp_path / "turned")
    for name in ("images", "masks"):
        path = turned / "train" / name / "1.png"
        Image.open(path).save(path, exif=exif)
    splits = load(config(turned))
    assert [record.size for record in splits.train.records] == [SIZE, SIZE[::-1], SIZE, SIZE]
    (item,) = EvalSet(splits.train.records[1:2], config(turned))[0].objects
    upright = np.asarray(ImageOps.exif_transpose(Image.open(turned / "train/masks/1.png")))
    assert (item.mask == (upright > 0)).all()


def rgb_of(image: Image.Image, path: Path, **options: Any) -> list[int]:
    """The colour of a picture's first pixel as training sees it."""
    image.save(path, **options)
    record = survey.Record("x", path, (image.height, image.width))
    survey.look(record, config(path.parent))
    return EvalSet([record], config(path.parent))[0].rgb[0, 0].tolist()


@pytest.mark.fault("D04")
def test_every_mode_becomes_rgb_by_rule(tmp_path: Path) -> None:
    def plain(mode: str, colour: Any) -> Image.Image:
        return Image.new(mode, (4, 3), colour)

    png = tmp_path / "x.png"
    assert rgb_of(plain("L", 77), png) == [77, 77, 77]
    assert rgb_of(plain("LA", (77, 0)), png) == [255, 255, 255]
    assert rgb_of(plain("RGBA", (200, 100, 50, 255)), png) == [200, 100, 50]
    assert rgb_of(plain("RGBA", (0, 0, 0, 0)), png) == [255, 255, 255]
    assert rgb_of(plain("1", 1), png) == [255, 255, 255]
    palette = plain("P", 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert rgb_of(palette, png) == [10, 20, 30]
    assert rgb_of(palette, png, transparency=1) == [255, 255, 255]
    assert rgb_of(plain("PA", (1, 0)), tmp_path / "x.tif", compression="raw") == [255, 255, 255]
    deep = Image.fromarray(np.full((3, 4), 25700, dtype=np.uint16))
    assert rgb_of(deep, png) == [100, 100, 100], "scaled, not clipped"
    assert rgb_of(deep, tmp_path / "x.tif") == [100, 100, 100]
    assert rgb_of(plain("F", 0.4), tmp_path / "x.tif") == [102, 102, 102]
    assert rgb_of(plain("CMYK", (0, 0, 0, 0)), tmp_path / "x.jpg", quality=100) == [255, 255, 255]


@pytest.mark.fault("D04")
@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_of_several_frames_the_first_is_used_with_one_note(tmp_path: Path, suffix: str) -> None:
    root = folders(tmp_path)
    for number in (1, 2):
        path = root / "train" / "images" / f"{number}.png"
        path.unlink()
        frames = [Image.new("RGB", SIZE[::-1], colour) for colour in ("black", "white")]
        frames[0].save(path.with_suffix(suffix), save_all=True, append_images=frames[1:])
    splits = load(config(root))
    note = "pictures with several frames or pages, of which the first is used: 2"
    assert note in splits.notes
    assert str(splits).count(note) == 1
    assert EvalSet(splits.train.records, config(root))[1].rgb.max() == 0


@pytest.mark.fault("D05", "D09")
def test_pictures_of_any_shape_train(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        for number, size in enumerate([(1, 1), (1, 5000), (5000, 1), (33, 47)]):
            for name, image in (("images", noise(number, size)), ("masks", mask(size))):
                (root / split / name).mkdir(parents=True, exist_ok=True)
                image.save(root / split / name / f"{number}.png")
    argv = command(root, min_object_area=0, steps=4, eval_steps=4, correction_clicks=1)
    assert main(argv) == 0, capsys.readouterr().err


BOMBS = {
    "bomb.png": (hostile.png_bomb, "more than 150 million pixels"),
    "wide.png": (lambda path: hostile.png_that_claims(path, 2**31 - 1, 2**31 - 1), "150 million"),
    "thin.png": (lambda path: hostile.png_that_claims(path, 2**31 - 1, 1), "150 million pixels"),
    "wrap.png": (lambda path: hostile.png_that_claims(path, 2**16, 2**16), "150 million pixels"),
    "wide.jpg": (lambda path: hostile.jpeg_that_claims(path, 65500, 65500), "150 million pixels"),
    "text.png": (hostile.png_text_bomb, "unpacks to more than is read"),
    "icc.png": (hostile.png_profile_bomb, "unpacks to more than is read"),
    "pages.tif": (hostile.tiff_pages, "more than 1000 frames or pages"),
    "frames.gif": (hostile.gif_frames, "more than 1000 frames or pages"),
    "grows.gif": (lambda path: hostile.gif_frames(path, 2, 60000), "a frame of more pixels than"),
    "svg.png": (hostile.svg, "an HTML or XML page, not a picture"),
    "eps.png": (hostile.eps, "not a picture in a format that is read (JPEG, PNG, WebP, BMP"),
    "scans.jpg": (hostile.jpeg_of_many_scans, "takes longer than 1 s to be decoded"),
    "huge.png": (hostile.huge, "1099.5 GB are more than"),
    "fifo.png": (hostile.fifo, "not a regular file"),
    "folder.png": (lambda path: path.mkdir(), "not a regular file"),
    "gone.png": (lambda path: path.symlink_to(path.parent / "none.png"), "no such file"),
}


@pytest.mark.fault("D06", "D07", "H20", "H41", "H48")
@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_picture_is_named_and_harms_nobody(
    tmp_path: Path, problem: Callable[..., str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shielded, "LIMITS", shielded.Limits(1.0, 2**29))
    root, content = coco(tmp_path)
    make, reason = BOMBS[name]
    make(root / "images" / name)
    content["images"][2] = {"id": 2, "file_name": name}
    (root / "annotations.json").write_text(json.dumps(content))
    line = problem(root)
    assert f"{root}/images/{name}: " in line
    assert reason in line
    assert not Path("owned").exists()


@pytest.mark.fault("D07", "H16")
def test_links_are_followed_within_the_data_only_unless_allowed(
    tmp_path: Path, problem: Callable[..., str], stopped: Callable[..., str]
) -> None:
    root = folders(tmp_path)
    picture = root / "train" / "images" / "2.png"
    picture.rename(picture.with_name("real.png"))
    picture.with_name("real.png").rename(root / "train" / "real.png")
    picture.symlink_to("../real.png")
    assert "a link that leads out of" in problem(root), "of the folder of the pictures"
    picture.unlink()
    picture.symlink_to("1.png")
    assert len(load(config(root)).train) == 4
    for outside in ("/dev/zero", "/etc/passwd"):
        picture.unlink()
        picture.symlink_to(outside)
        line = problem(root)
        assert line.startswith(f"{picture}: a link that leads out of")
        assert "--follow_links true" in line
        reason = "not a regular file" if outside == "/dev/zero" else "not a picture"
        assert reason in stopped(root, follow_links="true")
    noise(2).save(tmp_path / "elsewhere.png")
    picture.unlink()
    picture.symlink_to(tmp_path / "elsewhere.png")
    assert len(load(config(root, follow_links=True)).train) == 4


@pytest.mark.fault("D08")
def test_a_picture_that_comes_back_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path)
    train = load(config(root)).train
    before = train[1].pixels
    path = train.records[1].image
    away = path.with_name("away")
    path.rename(away)

    def sleep(seconds: float) -> None:
        away.rename(path)

    monkeypatch.setattr(loading.time, "sleep", sleep)
    assert (train[1].pixels == before).all()


@pytest.mark.fault("D08", "D46", "R34")
@pytest.mark.parametrize(
    ("workers", "change"),
    [(0, "removed"), (0, "cut off"), (2, "removed"), (2, "cut off"), (2, "loader killed")],
)
def test_what_goes_wrong_with_a_picture_while_training_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, workers: int,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    root = folders(tmp_path)
    picture = root / "train" / "images" / "2.png"
    loss, read = losses.loss, survey.read_image

    def spoiled(*arguments: Any) -> Any:
        if change == "removed":
            picture.unlink(missing_ok=True)
        elif change == "cut off":
            picture.write_bytes(picture.read_bytes()[:200])
        return loss(*arguments)

    def killed(path: Path) -> Any:
        if path == picture and change == "loader killed":
            hostile.crash(9)
        return read(path)

    monkeypatch.setattr(losses, "loss", spoiled)
    monkeypatch.setattr("sam2_lora.data.read_image", killed)
    monkeypatch.setattr(loading, "PAUSES", (0.01, 0.01))
    assert main(command(root, num_workers=workers, steps=8, eval_steps=8)) == 2
    gc.collect()  # a command ends here; in a test the loop's frames are still held together
    deadline = time.monotonic() + 5
    while multiprocessing.active_children():
        assert time.monotonic() < deadline, "a loader lives on"
        time.sleep(0.05)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 3
    if change == "loader killed":
        assert "was killed (Killed) while it loaded sample train/images/2.png" in text
        assert "most likely memory ran out" in text
    else:
        assert f"error: {picture}: " in text
        assert "it was good when the run began and was tried 3 times" in text


@pytest.mark.fault("D46")
def test_a_picture_that_crashes_its_decoder_is_named(
    tmp_path: Path, problem: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folders(tmp_path)
    picture = root / "val" / "images" / "5.png"
    read = survey.read_image
    monkeypatch.setattr(
        survey, "read_image", lambda path: hostile.crash() if path == picture else read(path)
    )
    assert problem(root) == f"{picture}: its decoder crashes (SIGSEGV)"


@pytest.mark.fault("H21")
def test_cut_off_pictures_are_never_tolerated() -> None:
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is False
    for package in ("sam2-lora", "lora-core"):
        source = Path(__file__).parents[2] / package / "src"
        for path in source.rglob("*.py"):
            assert "LOAD_TRUNCATED_IMAGES" not in path.read_text("utf-8"), path


# -- data sets -------------------------------------------------------------------------------------


@pytest.mark.fault("D09", "D28")
def test_a_data_set_without_pictures_or_parts_stops_the_run(
    tmp_path: Path, stopped: Callable[..., str]
) -> None:
    root = tmp_path / "data"
    assert f"{root}: no such folder" in stopped(root)
    root.mkdir()
    assert f"{root}: no data set found; expected one of" in stopped(root)
    folders(tmp_path)
    for path in (root / "train" / "images").iterdir():
        path.unlink()
    shutil.rmtree(root / "train" / "masks")
    assert f"{root / 'train' / 'masks'}: no such folder" in stopped(root)
    (root / "train" / "masks").mkdir()
    assert f"{root}: no pictures in the train split" in stopped(root)
    shutil.rmtree(root / "train")
    assert f"{root}: the training split (train_split or train) is missing" in stopped(root)
    shutil.rmtree(root)
    root, content = coco(tmp_path)
    (root / "annotations.json").write_text(json.dumps(content | {"images": [], "annotations": []}))
    assert f"{root}: no pictures in the train split" in stopped(root)


@pytest.mark.fault("D09", "R09")
def test_one_picture_trains_in_batches_that_are_larger(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = folders(tmp_path, train=1, val=0)
    assert main(command(root, batch_size=4)) == 0
    assert "1 picture of val in train too" in capsys.readouterr().out
    drop = ["--trainer.dataloader_drop_last", "true"]
    assert main([*command(root, batch_size=4), *drop]) == 2
    assert "1 training samples make no batch, at least 4 are needed" in capsys.readouterr().err


@pytest.mark.fault("D10")
def test_pictures_in_two_splits_are_counted_and_named(tmp_path: Path) -> None:
    root = folders(tmp_path, train=6, val=3)
    for copy, original in ((7, 1), (8, 2)):
        shutil.copy(root / f"train/images/{original}.png", root / f"val/images/{copy}.png")
    text = str(load(config(root)))
    assert (
        "note: 2 pictures of val in train too, so that its scores flatter: "
        "val/images/7.png, val/images/8.png\n" in f"{text}\n"
    )


@pytest.mark.fault("D11")
@pytest.mark.parametrize("kind", faulty.ENCODINGS)
def test_an_annotation_file_that_is_no_json_is_named_with_its_place(
    tmp_path: Path, stopped: Callable[..., str], kind: str
) -> None:
    root, _ = coco(tmp_path)
    path = root / "annotations.json"
    encode, reason = faulty.ENCODINGS[kind]
    path.write_bytes(encode(path.read_text()))
    with pytest.raises(DataError, match=f"{path}.*{reason}"):
        raise DataError(stopped(root))


@pytest.mark.fault("D11")
def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    root, content = coco(tmp_path)
    text = json.dumps(content, indent=1).replace("\n", "\r\n")
    (root / "annotations.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert (
        sum(len(part.records) for part in (load(config(root)).train, load(config(root)).val)) == 4
    )


@pytest.mark.fault("H09")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hostile.json_nested, "nested too deeply"),
        (hostile.json_digits, "a number of thousands of digits"),
        (hostile.huge, "1099.5 GB of JSON are more than 2.1"),
        (hostile.fifo, "not a regular file"),
    ],
    ids=["nested", "digits", "huge", "fifo"],
)
def test_a_hostile_annotation_file_is_named(
    tmp_path: Path, stopped: Callable[..., str], make: Callable[[Path], Path], reason: str
) -> None:
    root, _ = coco(tmp_path)
    (root / "annotations.json").unlink()
    make(root / "annotations.json")
    assert f"{root}/annotations.json: " in stopped(root, data_format="coco")
    assert reason in stopped(root, data_format="coco")


@pytest.mark.fault("D12")
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("where", ["bbox", "segmentation", "image"])
def test_numbers_that_json_does_not_have_are_named_with_record_and_field(
    tmp_path: Path, problem: Callable[..., str], value: str, where: str
) -> None:
    root, content = coco(tmp_path)
    text, complaint = faulty.not_finite(content, where, value)
    (root / "annotations.json").write_text(text)
    assert problem(root) == f"{root}/annotations.json: {complaint}"


@pytest.mark.fault("D13")
@pytest.mark.parametrize("kind", faulty.DOUBLES)
def test_ids_and_files_that_stand_twice_are_listed(
    tmp_path: Path, stopped: Callable[..., str], kind: str
) -> None:
    root, content = coco(tmp_path)
    path = root / "annotations.json"
    complaint = faulty.doubled(content, kind)
    path.write_text(json.dumps(content))
    text = stopped(root)
    assert f"{path}: {complaint}" in text
    assert text == stopped(root, on_bad_sample="skip", max_bad_fraction=0.9), "not to be left out"


@pytest.mark.fault("D14", "D17")
def test_a_coco_file_of_images_without_ids_classes_or_annotations_is_read(tmp_path: Path) -> None:
    root, content = coco(tmp_path, pictures=6)
    for image in content["images"]:
        image["image_id"] = image.pop("id")
    for annotation in content["annotations"]:
        del annotation["category_id"]
    del content["categories"], content["annotations"][5:]
    (root / "annotations.json").write_text(json.dumps(content))
    splits = load(config(root))
    assert splits.classes == ("object",)
    assert sum(part.pictures for part in splits.counts.values()) == 6
    assert sum(part.empty for part in splits.counts.values()) == 1


ANNOTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown image": ({"image_id": 99}, "image_id 99 is not among the images"),
    "huge image id": ({"image_id": 2**63}, "is not among the images"),
    "image id is a fraction": ({"image_id": 2.0}, "image_id 2.0 is not among the images"),
    "unknown category": ({"category_id": 7}, "category_id 7 is not among the categories"),
    "null": ({"segmentation": None}, "it has no segmentation"),
    "nothing": ({"segmentation": []}, "it has no segmentation"),
    "2 numbers": ({"segmentation": [[1, 2]]}, "polygon: 2 numbers"),
    "4 numbers": ({"segmentation": [[1, 2, 3, 4]]}, "polygon: 4 numbers"),
    "5 numbers": ({"segmentation": [[1, 2, 3, 4, 5]]}, "polygon: 5 numbers"),
    "7 numbers": ({"segmentation": [SQUARE[:7]]}, "polygon: 7 numbers"),
    "text": ({"segmentation": [["1"] * 6]}, "polygon: expected numbers"),
    "far outside": ({"segmentation": [[1, 2, 3, 4, 5, 1e12]]}, "coordinate 1e+12 is not near"),
    "1e999": ({"segmentation": [[1, 2, 3, 4, 5, 1e308 * 10]]}, "is inf, expected a finite"),
    "too short": ({"segmentation": {"size": [40, 90], "counts": [796]}}, "sum to 796"),
    "too long": ({"segmentation": {"size": [40, 90], "counts": [9999]}}, "sum to 9999"),
    "negative": ({"segmentation": {"size": [40, 90], "counts": [-1, 3601]}}, "count -1"),
    "swapped": ({"segmentation": {"size": [90, 40], "counts": [3600]}}, "width are swapped"),
    "other size": ({"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}}, "[40, 90]"),
    "size is text": ({"segmentation": {"size": ["40", "90"], "counts": [3600]}}, "[40, 90]"),
    "damaged": ({"segmentation": {"size": [40, 90], "counts": "~~"}}, "string is damaged"),
    "no text": ({"segmentation": {"size": [40, 90], "counts": "\ud800"}}, "string is damaged"),
    "short text": ({"segmentation": {"size": [40, 90], "counts": "P3"}}, "sum to"),
}


@pytest.mark.fault("D16", "D19", "D20", "D21", "D22", "D23", "D24", "H22", "H23")
@pytest.mark.parametrize("name", ANNOTATIONS)
def test_a_bad_annotation_is_named_and_the_others_keep_their_class(
    tmp_path: Path, problem: Callable[..., str], name: str
) -> None:
    root, content = coco(tmp_path)
    changes, reason = ANNOTATIONS[name]
    content["categories"] += [{"id": number, "name": f"class {number}"} for number in (2, 3, 4)]
    for number in (1, 3):
        content["annotations"][number]["category_id"] = number + 1
    content["annotations"][2] |= changes
    (root / "annotations.json").write_text(json.dumps(content))
    line = problem(root)
    assert line.startswith(f"{root}/annotations.json: annotation 2: ")
    assert reason in line
    splits = load(config(root, on_bad_sample="skip", max_bad_fraction=0.9))
    kept = {
        record.key: [item.label for item in record.objects]
        for record in (*splits.train.records, *splits.val.records)
    }
    expected = {f"images/{k}.png": [f"class {k + 1}" if k else "rust"] for k in (0, 1, 3)}
    unknown = "is not among the images" in reason
    assert kept == expected | ({"images/2.png": []} if unknown else {})


@pytest.mark.fault("D12", "D23")
def test_all_that_is_wrong_with_one_picture_is_said_at_once(tmp_path: Path) -> None:
    root, content = coco(tmp_path)
    first, more = content["annotations"][1], dict(content["annotations"][1], id=77)
    first["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]
    more["segmentation"] = {"size": list(SIZE), "counts": [-5, 5 + SIZE[0] * SIZE[1]]}
    content["annotations"].append(more)
    (root / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"2 problems\n(.*\n)*.*leave it out") as caught:
        load(config(root))
    text = str(caught.value)
    assert "annotation 1: segmentation[0][2] is nan" in text
    assert "annotation 77: run lengths: count -5" in text


@pytest.mark.fault("D19", "D20")
def test_outlines_that_are_open_or_cross_or_leave_the_picture_and_crowds_are_fine(
    tmp_path: Path,
) -> None:
    root, content = coco(tmp_path)
    for number, segmentation in enumerate(
        [[[10, 5, 40, 30, 40, 5, 10, 30]], [[-20, -9, 40, 5, 120, 60]], [[SQUARE]], [SQUARE]]
    ):
        content["annotations"][number]["segmentation"] = segmentation
        content["annotations"][number] |= {"area": 0, "bbox": [5, 5, -1]}
    content["annotations"].append(
        {"id": 9, "image_id": 0, "category_id": 1, "iscrowd": 1, "segmentation": None}
    )
    (root / "annotations.json").write_text(json.dumps(content))
    splits = load(config(root))
    assert sum(part.objects.total() for part in splits.counts.values()) == 4
    assert "crowd annotations left out: 1" in splits.notes


@pytest.mark.fault("D15")
@pytest.mark.parametrize("name", ["images", "annotations"])
@pytest.mark.parametrize("value", [..., None, {}, "x", 3])
def test_a_coco_file_without_its_lists_stops_the_run(
    tmp_path: Path, stopped: Callable[..., str], name: str, value: Any
) -> None:
    root, content = coco(tmp_path)
    content[name] = value
    if value is ...:
        del content[name]
    (root / "annotations.json").write_text(json.dumps(content))
    assert f'{root}/annotations.json: "{name}" is missing or not a list' in stopped(root)


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.fault("D25")
@pytest.mark.parametrize("fault", ["missing", "size", "turned", "stem", "damaged", "unused"])
def test_a_mask_that_does_not_fit_its_picture_is_named(
    tmp_path: Path, stopped: Callable[..., str], fault: str
) -> None:
    root = folders(tmp_path)
    path = root / "train" / "masks" / "2.png"
    picture = root / "train" / "images" / "2.png"
    expected = [f"{picture}: no mask 2.png in {path.parent}"]
    if fault == "missing":
        path.unlink()
    elif fault == "size":
        mask((41, 90)).save(path)
        sizes = "90 x 41 pixels (width x height), but 90 x 40 in the picture"
        expected = [f"{path}: {sizes} {picture}"]
    elif fault == "turned":
        mask(SIZE[::-1]).save(path)
        expected = ["width and height seem to be swapped"]
    elif fault == "stem":
        path.rename(path.with_name("two.png"))
        expected.append(f"{path.with_name('two.png')}: no picture two in {picture.parent}")
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:60])
        expected = [f"{path}: cannot be read"]
    else:
        mask().save(path.with_name("9.png"))
        expected = [f"{path.with_name('9.png')}: no picture 9 in {picture.parent}"]
    text = stopped(root)
    assert all(line in text for line in expected)
    assert text.startswith(f"error: {root}: {len(expected)} problem")


@pytest.mark.fault("D25", "D26")
def test_masks_of_0_and_1_or_0_and_255_in_any_format_are_taken(tmp_path: Path) -> None:
    root = folders(tmp_path)
    masks = root / "train" / "masks"
    for number, (value, suffix) in enumerate([(1, ".bmp"), (255, ".tif"), (1, ".gif")]):
        (masks / f"{number}.png").unlink()
        mask(value=value).save(masks / f"{number}{suffix}")
    rgb = mask().convert("RGB")
    rgb.save(masks / "3.png")
    splits = load(config(root))
    truth = np.asarray(mask()) > 0
    for picture in EvalSet(splits.train.records, config(root)):
        (item,) = picture.objects
        assert (item.mask == truth).all()


@pytest.mark.fault("D26")
@pytest.mark.parametrize("kind", ["ids", "colours", "soft", "jpeg", "alpha", "palette"])
def test_masks_of_which_nobody_said_what_they_mean_stop_the_run(
    tmp_path: Path, stopped: Callable[..., str], kind: str
) -> None:
    root = folders(tmp_path)
    path = root / "train" / "masks" / "1.png"
    values = np.asarray(mask(value=1))
    if kind == "ids":
        Image.fromarray(values * 3 + values[:, ::-1]).save(path)
    elif kind == "colours":
        Image.fromarray(np.stack([values * 255, values, values], -1)).save(path)
    elif kind == "soft":
        mask().resize((45, 20), Image.Resampling.BILINEAR).resize(SIZE[::-1], 2).save(path)
    elif kind == "alpha":
        Image.fromarray(np.stack([values, values * 99], -1), "LA").save(path)
    elif kind == "palette":
        image = Image.fromarray(values * 2 + values[:, ::-1] * 0)
        image = image.convert("P")
        image.putdata((values * 2).ravel().tolist())
        image.putpalette([0, 0, 0, 9, 9, 9, 200, 10, 10])
        image.save(path)
    else:
        path.unlink()
        mask().save(path.with_suffix(".jpg"), quality=70)
    text = stopped(root)
    assert str(path.with_suffix("")) in text
    remedy = "one channel of 0 and 255" if kind in ("colours", "alpha") else "--mask_kind"
    assert remedy in text


@pytest.mark.fault("D27")
def test_pictures_with_nothing_or_everything_marked_are_counted_and_scored(tmp_path: Path) -> None:
    root = folders(tmp_path)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(root / "train" / "masks" / "0.png")
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(root / "train" / "masks" / "1.png")
    splits = load(config(root))
    train = splits.counts["train"]
    assert (train.pictures, train.empty, train.objects.total()) == (4, 1, 3)
    batch = collate([splits.train[index] for index in range(4)])
    shares = [float(target.float().mean()) for b in batch["buckets"] for target in b["targets"]]
    assert min(shares) == 0
    assert max(shares) == 1
    scores = Tally([(0, 0, 0)]).scores()
    assert scores["iou"] == scores["dice"] == 1.0


# -- names and text from the data ------------------------------------------------------------------


@pytest.mark.fault("H15")
@pytest.mark.parametrize("name", hostile.ESCAPES, ids=repr)
def test_a_file_name_that_leaves_the_folder_is_named(
    tmp_path: Path, problem: Callable[..., str], name: str
) -> None:
    root, content = coco(tmp_path)
    noise(2).save(tmp_path / "b.png")
    content["images"][2]["file_name"] = name
    (root / "annotations.json").write_text(json.dumps(content))
    line = problem(root)
    assert line.startswith(f"{root}/annotations.json: image 2: file name {name!r}: ")
    assert line.endswith((f"must be a path below {root / 'images'}", "no file can have it"))


@pytest.mark.fault("H32")
def test_names_from_the_data_cannot_forge_output(
    tmp_path: Path, stopped: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    root = folders(tmp_path)
    for name in ("images", "masks"):
        folder = root / "train" / name
        (folder / "2.png").rename(folder / hostile.CONTROL_NAME)
    undecodable = os.fsdecode(b"\xff\xfe.png")
    for name in ("images", "masks"):
        (root / "train" / name / "3.png").rename(root / "train" / name / undecodable)
    splits = load(config(root))
    fingerprint(splits)
    say(splits)
    assert "\x1b" not in capsys.readouterr().out
    picture = root / "train" / "images" / hostile.CONTROL_NAME
    picture.write_bytes(b"")
    text = stopped(root)
    assert len(text.splitlines()) == 3
    assert not set(text) & set("\x1b\x07\r")
    assert "a\\x1b[2J" in text
    (root / "train" / "masks" / hostile.CONTROL_NAME).unlink()
    assert len(stopped(root).splitlines()) == 3


@pytest.mark.fault("H32", "H47")
@pytest.mark.parametrize("text", [*hostile.TEMPLATES, hostile.CONTROL_NAME, "x" * 5000, ""])
def test_class_names_are_text_and_nothing_else(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture
) -> None:
    root, content = coco(tmp_path)
    content["categories"][0]["name"] = text
    (root / "annotations.json").write_text(json.dumps(content))
    splits = load(config(root))
    assert splits.classes == (text,)
    say(splits)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\r\u202e")
    assert max(map(len, out.splitlines())) < 200
    assert not Path("owned").exists()


@pytest.mark.fault("H40")
def test_what_a_data_set_points_to_elsewhere_is_not_fetched(tmp_path: Path) -> None:
    root, content = coco(tmp_path)
    content |= {
        "script": "http://localhost:1/run.py",
        "datasets": ["/etc"],
        "_target_": "os.system",
    }
    for image in content["images"]:
        image |= {"coco_url": "http://localhost:1/x.png", "flickr_url": "http://localhost:1/y.png"}
    (root / "annotations.json").write_text(json.dumps(content))
    with no_device():
        assert load(config(root)).counts["train"].pictures == 3


@pytest.mark.fault("P32")
def test_the_order_in_which_the_disk_lists_files_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folders(tmp_path, train=12)
    splits = load(config(root))
    keys = [record.key for record in splits.train.records]
    assert keys == sorted(keys)
    listed, scanned = os.listdir, os.scandir

    class Reversed:
        def __init__(self, path: Any) -> None:
            with scanned(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *reason: object) -> None: ...

    monkeypatch.setattr(os, "listdir", lambda path=".": listed(path)[::-1])
    monkeypatch.setattr(os, "scandir", Reversed)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        os.utime(path, (number, number))
    again = load(config(root))
    assert [record.key for record in again.train.records] == keys
    assert fingerprint(again) == fingerprint(splits)


# -- leaving out -----------------------------------------------------------------------------------


def spoil(root: Path, *numbers: int) -> None:
    for number in numbers:
        path = next(root.glob(f"*/images/{number}.png"))
        path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.fault("D47")
def test_too_many_bad_pictures_stop_the_run_with_the_path_of_their_list(
    tmp_path: Path, stopped: Callable[..., str]
) -> None:
    root = folders(tmp_path, train=8)
    spoil(root, 1, 2, 9)
    text = stopped(root, on_bad_sample="skip", max_bad_fraction=0.25)
    report = tmp_path / "runs" / "bad_samples.jsonl"
    assert text.startswith(
        "error: val: 1 of 2 samples are bad, more than --max_bad_fraction 0.25 allows\n"
    )
    assert text.splitlines()[-1] == f"all with their reasons: {report}"
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(row["split"], row["sample"]) for row in rows] == [
        ("train", "train/images/1.png"), ("train", "train/images/2.png"),
        ("val", "val/images/9.png"),
    ]  # fmt: skip
    assert all(row["reason"].startswith(f"{root}/{row['sample']}: ") for row in rows)


@pytest.mark.fault("D48", "D49")
def test_bad_pictures_that_are_left_out_are_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = folders(tmp_path, train=8)
    spoil(root, 1, 5)
    lists = []
    for number in range(2):
        skip = {"on_bad_sample": "skip", "max_bad_fraction": 0.25}
        output = tmp_path / f"runs{number}"
        assert main(command(root, output_dir=output, **skip)) == 0
        out = capsys.readouterr().out
        (run,) = output.glob("sam2_*")
        assert f"note: 2 bad samples of train left out, the first: {root}/train/images/1" in out
        assert f"left out: 2 bad samples, see {run}/bad_samples.jsonl" in out
        assert json.loads((run / "training_summary.json").read_text())["bad_samples"] == 2
        lists.append((run / "bad_samples.jsonl").read_text())
    assert lists[0] == lists[1]
    assert [json.loads(line)["sample"] for line in lists[0].splitlines()] == [
        "train/images/1.png", "train/images/5.png",
    ]  # fmt: skip
    train = load(config(root, on_bad_sample="skip", max_bad_fraction=0.25)).train
    assert [record.image.stem for record in train.records] == ["0", "2", "3", "4", "6", "7"]


@pytest.mark.fault("D48", "R20")
def test_all_ranks_stop_or_leave_out_the_same(tmp_path: Path) -> None:
    root = folders(tmp_path, train=8)
    spoil(root, 1, 5)
    other = tmp_path / "other" / "data"
    shutil.copytree(root, other)
    (other / "train" / "images" / "7.png").unlink()
    (other / "train" / "masks" / "7.png").unlink()

    def target(rank: int, place: Path, rule: str) -> int:
        import torch

        cfg = config(place, on_bad_sample=rule, max_bad_fraction=0.3)
        splits = load(cfg, lambda make: first_rank_decides(make, torch.device("cpu")))
        print([record.image.stem for record in splits.train.records], flush=True)
        return 0

    both = processes.run(lambda rank: target(rank, root, "skip"))
    assert [ended.status for ended in both] == [0, 0], both
    assert all("['0', '2', '3', '4', '6', '7']" in ended.output for ended in both)
    both = processes.run(lambda rank: target(rank, root, "stop"))
    assert [ended.status for ended in both] == [2, 2], both
    text = "".join(ended.output for ended in both)
    assert text.count(f"{root}: 2 problems") == 1, "one of them says it"
    assert "Traceback" not in text
    both = processes.run(lambda rank: target(rank, (root, other)[rank], "skip"))
    assert both[1].status == 2
    assert "all machines need the same data set" in both[1].output


def test_a_split_without_all_its_pictures_has_another_fingerprint(tmp_path: Path) -> None:
    root = folders(tmp_path, train=8)
    first = fingerprint(load(config(root)))
    moved = tmp_path / "moved" / "data"
    shutil.copytree(root, moved)
    assert fingerprint(load(config(moved))) == first
    Image.fromarray(np.asarray(mask()) // 255).save(moved / "train" / "masks" / "3.png")
    assert fingerprint(load(config(moved))) != first
    spoil(root, 1)
    skip = {"on_bad_sample": "skip", "max_bad_fraction": 0.25}
    assert fingerprint(load(config(root, **skip))) != first


@pytest.mark.fault("D47", "D49")
def test_prepare_leaves_out_what_training_would(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = folders(tmp_path, train=8)
    spoil(root, 1)
    options = {"source": str(root), "output": str(tmp_path / "out")}
    with pytest.raises(DataError, match=r"images/1.png: cannot be read(.|\n)*on_bad_sample skip"):
        prepare.prepare(prepare.Options(**options))
    assert not (tmp_path / "out").exists()
    made = prepare.prepare(prepare.Options(**options, on_bad_sample="skip", max_bad_fraction=0.2))
    assert made["train_split"] == 7
    assert "1 bad sample left out" in capsys.readouterr().out
    (line,) = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "train/images/1.png"
    assert len(load(config(tmp_path / "out")).train) == 7
    assert not list(tmp_path.glob(".out*")), "nothing half-finished is left"


@pytest.mark.fault("D49")
def test_an_evaluation_leaves_out_what_training_did(tmp_path: Path) -> None:
    root = folders(tmp_path, val=8)
    spoil(root, 5)
    words = {"data_root": str(root), "split": "val", "output_dir": str(tmp_path / "scores")}
    with pytest.raises(DataError, match=r"images/5.png: cannot be read(.|\n)*on_bad_sample skip"):
        evaluate.load_pictures(evaluate.Options(**words))
    words |= {"on_bad_sample": "skip"}
    with pytest.raises(DataError, match=f"reasons: {tmp_path}/scores/bad_samples.jsonl"):
        evaluate.load_pictures(evaluate.Options(**words))
    pictures = evaluate.load_pictures(evaluate.Options(**words, max_bad_fraction=0.2))
    assert len(pictures) == 7
    assert any("1 bad sample of val left out" in note for note in pictures.notes)


def test_a_sample_never_stands_for_another(tmp_path: Path) -> None:
    """A bad picture is not replaced by some other one: the data set is shorter."""
    root = folders(tmp_path, train=8)
    spoil(root, 3)
    train = load(config(root, on_bad_sample="skip", max_bad_fraction=0.25)).train
    assert len(train) == 7
    assert len({sample.key for sample in (train[index] for index in range(7))}) == 7
    assert isinstance(train, TrainSet)
