"""Pictures of conversations: paths, data URIs, modes and faults."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from isaac_texts import noise, write_picture
from PIL import Image

from isaac_lora.conversations.pictures import picture_size, read_picture
from lora_core.errors import DataError
from lora_core.pictures.files import rgb_of
from lora_core.testing import hostile


def uri(path: Path, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def in_memory(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_relative_absolute_and_inline_pictures_are_the_same(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png")
    for source in ("a.png", str(path), uri(path)):
        assert picture_size(source, tmp_path) == (23, 31)
        assert np.array_equal(read_picture(source, tmp_path), noise(23, 31))


def test_relative_paths_start_at_the_working_directory_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_picture(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert picture_size("a.png") == (23, 31)
    with pytest.raises(DataError, match=f"{tmp_path}/b.png: set --image_folder"):
        picture_size("b.png")
    with pytest.raises(DataError, match=r"b\.png: fix the path"):
        picture_size("b.png", tmp_path)


@pytest.mark.parametrize("line", ["", "\n"])
def test_base64_may_be_broken_into_lines(tmp_path: Path, line: str) -> None:
    head, _, text = uri(write_picture(tmp_path / "a.png")).partition(",")
    broken = line.join(text[i : i + 76] for i in range(0, len(text), 76))
    assert picture_size(f"{head},{broken}") == (23, 31)


@pytest.mark.fault("D03")
def test_the_orientation_is_applied_everywhere(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    path = tmp_path / "a.png"
    Image.fromarray(noise(4, 9)).save(path, exif=exif)
    with Image.open(path) as opened:
        in_hand = rgb_of(opened)
    for made in (read_picture(str(path)), read_picture(uri(path)), in_hand):
        assert made.shape == (9, 4, 3)
        assert np.array_equal(made, np.rot90(noise(4, 9), -1))
    assert picture_size(uri(path)) == picture_size(str(path)) == (9, 4)


@pytest.mark.fault("D04")
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_is_the_same_rgb_from_file_uri_and_memory(tmp_path: Path, mode: str) -> None:
    kind = "tiff" if mode == "CMYK" else "png"
    if mode == "I;16":
        picture = Image.fromarray(noise(5, 6)[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(noise(5, 6)).convert(mode)
        if mode in ("LA", "RGBA"):
            picture.putalpha(Image.fromarray(noise(5, 6, 1)[..., 0]))
    path = tmp_path / f"a.{kind}"
    picture.save(path)
    wanted = read_picture(str(path))
    assert np.array_equal(read_picture(in_memory(picture, kind)), wanted)
    assert np.array_equal(rgb_of(picture), wanted)
    if mode == "I;16":
        assert np.array_equal(wanted[..., 0], noise(5, 6)[..., 0])  # scaled, not clipped


def test_arrays_of_pixels_are_taken_as_they_are() -> None:
    grey = noise(3, 4)[..., :1]
    assert np.array_equal(rgb_of(noise(3, 4)), noise(3, 4))
    assert np.array_equal(rgb_of(grey), np.repeat(grey, 3, 2))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 4, 4), np.float32), "array of float32"),
        (np.zeros((3, 8, 9), np.uint8), "channels come last"),
        (np.zeros(3, np.uint8), "expected uint8"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rgb_of(array)


@pytest.mark.fault("D38")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data:image/png;base64,@@@@", "not base64"),
        ("data:image/png;base64,", "the picture is empty"),
        ("data:image/png;base64,aGVsbG8=", "no picture in a format that is read"),
        ("data:text/plain;base64,aGVsbG8=", "expected data:image"),
        ("data:image/png,abc", "expected data:image"),
        ("https://example.com/a.png", "download it"),
        ("file:///etc/passwd", "expected a path, not a URL"),
        ("a\0.png", "no file can have this name"),
        ("\ud800.png", "no file can have this name"),
        ("a" * 5000, "no file can have this name"),
    ],
)
def test_sources_that_are_none_say_why(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as told:
        picture_size(source)
    assert len(str(told.value)) < 400


@pytest.mark.fault("H15", "H16")
def test_relative_paths_stay_in_the_image_folder(tmp_path: Path) -> None:
    folder, other = tmp_path / "images", tmp_path / "images_of_others"
    (folder / "part").mkdir(parents=True)
    other.mkdir()
    secret = write_picture(other / "a.png")
    write_picture(folder / "a.png")
    (folder / "link.png").symlink_to(secret)
    (folder / "away").symlink_to(other)
    (folder / "near").symlink_to(folder / "part")
    (tmp_path / "entry").symlink_to(folder)
    for name in ("../images_of_others/a.png", "part/../../images_of_others/a.png", "link.png",
                 "away/a.png", "near/../../images_of_others/a.png"):  # fmt: skip
        for look in (picture_size, read_picture):
            with pytest.raises(DataError, match=r"leads out of .*/images: write its"):
                look(name, folder)
    for name in ("part/../a.png", "near/../a.png", str(folder / "link.png"), str(secret)):
        assert picture_size(name, tmp_path / "entry") == (23, 31)


@pytest.mark.fault("H15")
@pytest.mark.parametrize("name", hostile.ESCAPES)
def test_no_path_of_an_attacker_reads_anything(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / "images"
    folder.mkdir(parents=True)
    write_picture(tmp_path / "a" / "b.png")
    with pytest.raises(DataError):
        picture_size(name, folder)


@pytest.mark.fault("D02", "D07")
def test_files_that_are_no_pictures_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "folder.png").mkdir()
    hostile.fifo(tmp_path / "pipe.png")
    write_picture(tmp_path / "a.png").rename(tmp_path / "other.jpg")
    said = {
        "empty.png": "empty", "page.jpg": "HTML", "folder.png": "not a regular file",
        "pipe.png": "not a regular file", "other.jpg": "holds a picture in PNG format",
    }  # fmt: skip
    for name, reason in said.items():
        with pytest.raises(DataError, match=reason):
            picture_size(name, tmp_path)


@pytest.mark.fault("D38")
def test_a_uri_that_holds_another_format_than_it_says_is_refused(tmp_path: Path) -> None:
    source = uri(write_picture(tmp_path / "a.png"), "jpeg")
    with pytest.raises(DataError, match="says image/jpeg, but holds PNG"):
        read_picture(source)


@pytest.mark.fault("D06", "D38")
def test_bombs_are_refused_by_their_headers(tmp_path: Path) -> None:
    path = hostile.png_that_claims(tmp_path / "a.png", 50_000, 50_000)
    for source in (str(path), uri(path)):
        with pytest.raises(DataError, match="million"):
            picture_size(source)


@pytest.mark.fault("D02")
def test_a_truncated_picture_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 40, 40)
    path.write_bytes(path.read_bytes()[:-900])
    for source in (str(path), uri(path)):
        with pytest.raises(DataError, match=r"cannot be read|truncated"):
            read_picture(source)
