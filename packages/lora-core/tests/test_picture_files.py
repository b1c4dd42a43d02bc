import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from lora_core.errors import DataError
from lora_core.pictures.files import (
    MAX_PIXELS,
    open_picture,
    orientation,
    read_header,
    read_image,
    read_mask,
    read_size,
    said_by,
)

SIDEWAYS = 6  # EXIF: the camera was turned; viewers turn the picture clockwise


# -- modes -----------------------------------------------------------------------------------------


def saved(tmp_path: Path, picture: Image.Image, name: str = "x.png", **options: object) -> Path:
    picture.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.fault("D04")
def test_greys_of_every_depth_become_the_same_rgb(tmp_path: Path) -> None:
    grey = np.array([[0, 128, 255]], dtype=np.uint8)
    expected = np.repeat(grey[..., None], 3, axis=2)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    floats = Image.fromarray((grey / 255).astype(np.float32))
    assert (read_image(saved(tmp_path, Image.fromarray(grey))) == expected).all()
    assert (read_image(saved(tmp_path, deep)) == expected).all()
    assert (read_image(saved(tmp_path, floats, "x.tif")) == expected).all()
    bits = Image.fromarray(grey > 200)
    assert read_image(saved(tmp_path, bits))[0, :, 0].tolist() == [0, 0, 255]


def test_floats_outside_0_to_1_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((2, 2), 300, dtype=np.float32)), "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: values from 300 to 300, expected 0 to 1"):
        read_image(path)


@pytest.mark.fault("D04")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
    picture.putpixel((1, 0), (10, 10, 10, 0))
    if mode == "PA":
        path = saved(tmp_path, picture.quantize(4))
    else:
        path = saved(tmp_path, picture.convert(mode))
    assert read_image(path)[0].tolist() == [[10, 10, 10], [255, 255, 255]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "x.jpg")
    assert (read_image(path) == 255).all()


@pytest.mark.fault("D04")
def test_the_first_frame_of_several_is_read(tmp_path: Path) -> None:
    first, second = Image.new("L", (3, 2), 50), Image.new("L", (3, 2), 200)
    path = saved(tmp_path, first, "x.tif", save_all=True, append_images=[second])
    assert (read_image(path) == 50).all()


@pytest.mark.fault("D03")
def test_exif_orientation_turns_picture_mask_and_size_alike(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    path = saved(tmp_path, Image.fromarray(values), exif=exif)
    assert read_size(path) == (3, 2)
    assert (read_image(path)[..., 0] == np.rot90(values, -1)).all()
    assert (read_mask(path) == np.rot90(values, -1)).all()


# -- masks -----------------------------------------------------------------------------------------


def chunks_of(path: Path) -> list[bytes]:
    """The chunks of a PNG, each with length, kind and checksum."""
    data, found = path.read_bytes()[8:], []
    while data:
        end = 12 + int.from_bytes(data[:4], "big")
        found.append(data[:end])
        data = data[end:]
    return found


def png_with(path: Path, chunks: list[bytes]) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp", "a.gif"])
def test_pictures_are_read_as_by_pil_with_all_its_copies(
    tmp_path: Path, name: str, orientation: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(noise).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as picture:
        slow = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    quick = read_image(tmp_path / name)
    np.testing.assert_array_equal(quick, slow)
    assert quick.flags.writeable


@pytest.mark.fault("D03")
@pytest.mark.parametrize("kind", ["eXIf", "XMP"])
def test_an_orientation_behind_the_pixels_of_a_png_turns_it(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = saved(tmp_path, Image.fromarray(noise), exif=exif)
    assert read_size(path) == (200, 300)
    before = chunks_of(path)
    assert [one[4:8] for one in before].count(b"IDAT") > 1, "of several chunks"
    (turn,) = [one for one in before if one[4:8] == b"eXIf"]
    plain = [one for one in before if one[4:8] != b"eXIf"]
    if kind == "XMP":
        turn = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    png_with(path, [*plain[:-1], turn, plain[-1]])
    assert read_size(path) == (200, 300)
    assert read_header(path).turned
    assert read_image(path).shape == (200, 300, 3)
    png_with(path, plain)
    assert read_size(path) == (300, 200)


def test_the_header_of_a_usual_png_is_read_without_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise))
    loads = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda self: loads.append(1) or load(self))
    assert read_header(path).size == (300, 200)
    assert loads == []
    with open_picture(path) as picture:
        orientation(picture)
        assert (np.asarray(picture) == noise).all(), "reading went on where it was"


@pytest.mark.parametrize("last", [-1, -2, -14, 3000])
def test_a_png_that_is_cut_off_is_read_as_far_as_before(tmp_path: Path, last: int) -> None:
    """What does not end as it should is left to the decoder."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:last])
    with Image.open(path) as picture:
        try:
            expected = picture.getexif().get(ExifTags.Base.Orientation, 1)
        except (OSError, SyntaxError):
            expected = None
    if expected is None:
        with pytest.raises(DataError, match="cannot be read"):
            read_header(path)
    else:
        assert read_header(path).size == (300, 200)


def test_mask_values_are_not_touched(tmp_path: Path) -> None:
    small = np.array([[0, 1, 7, 254]], dtype=np.uint8)
    assert (read_mask(saved(tmp_path, Image.fromarray(small))) == small).all()
    large = np.array([[0, 300, 65535]], dtype=np.uint16)
    assert (read_mask(saved(tmp_path, Image.fromarray(large))) == large).all()
    rgb = np.repeat(small[..., None], 3, axis=2)
    assert (read_mask(saved(tmp_path, Image.fromarray(rgb))) == small).all()


def test_palettes_are_read_by_index_unless_black_and_white(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2]], dtype=np.uint8)
    picture = Image.fromarray(indices, mode="P")
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    assert (read_mask(saved(tmp_path, picture)) == indices).all()
    inverted = Image.fromarray(indices[:, :2], mode="P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    assert read_mask(saved(tmp_path, inverted)).tolist() == [[255, 0]]


def test_coloured_masks_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (2, 2), (255, 0, 0)))
    with pytest.raises(DataError, match="mode RGB with colours"):
        read_mask(path)


# -- what is no picture ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"GIMP something", "not a picture in a format"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.jpg: {reason}"):
        read_size(path)


@pytest.mark.fault("D02")
@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WebP"), (".bmp", "BMP"), (".tif", "TIFF"),
     (".gif", "GIF")],
)  # fmt: skip
def test_a_picture_with_a_damaged_header_is_called_damaged(
    tmp_path: Path, suffix: str, name: str
) -> None:
    """Its first bytes say what it is: the file is no file of another kind."""
    path = saved(tmp_path, Image.new("RGB", (8, 8)), f"x{suffix}")
    path.write_bytes(path.read_bytes()[:12].ljust(64, b"\0"))
    with pytest.raises(DataError) as caught:
        read_size(path)
    text = str(caught.value)
    assert f"{path}: a {name} file whose header is damaged" == text or "cannot be read" in text
    assert "not a picture in a format" not in text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SyntaxError("broken PNG file"), "broken PNG file"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (AttributeError("'NoneType' object has no attribute 'x'"), "it is damaged"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "it is damaged"),
        (ValueError("too large for PngImagePlugin.MAX_TEXT_CHUNK"), "a text or colour profile"),
        (ValueError(), "it is damaged"),
    ],
)
def test_a_decoders_complaint_is_told_without_names_of_code(error: Exception, text: str) -> None:
    assert said_by(error).startswith(text)
    assert type(error).__name__ not in said_by(error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        read_image(tmp_path / "none.png")


def test_a_cut_off_picture_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), "x.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    assert read_size(path) == (64, 64)
    with pytest.raises(DataError, match=r"x\.jpg: cannot be read"):
        read_image(path)


@pytest.mark.fault("D07")
def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(DataError, match="not a regular file"):
            read_size(tmp_path / name)


@pytest.mark.fault("D06", "H20")
def test_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 10
    path = saved(tmp_path, Image.new("1", (side, side)))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="more than 150 million"):
        read_image(path)


@pytest.mark.fault("H20")
def test_a_format_that_starts_programs_is_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (2, 2)), "x.eps")
    with pytest.raises(DataError, match="not a picture in a format"):
        read_size(path)
