"""Reading pictures and masks of data sets, by rules that are the same in every package:

- JPEG, PNG, WebP, BMP, TIFF and GIF, recognised by content, at most `MAX_PIXELS` and `MAX_BYTES`;
  of several frames or pages the first. Nothing else is opened: other decoders start programs
  (EPS) or follow links (SVG).
- The EXIF orientation is applied, as every viewer does: sizes, masks and coordinates mean the
  upright picture.
- Transparent pictures are laid over white; CMYK becomes RGB; 16-bit values are scaled to 8 bits,
  not clipped; floating point is taken as 0..1.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lora_core.data_file import open_regular
from lora_core.errors import DataError, listing, one_line

MAX_PIXELS = 150_000_000  # a Sentinel-2 tile has 121 million
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # JPEG includes MPO, stereo pictures
# Suffix -> what a file of that name holds.
SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP",
    ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF",
}  # fmt: skip
# How the files begin; of BMP also what is always zero, for two letters alone may be text.
BEGINNINGS = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "BMP": re.compile(rb"BM....\0{4}", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "GIF": re.compile(rb"GIF8"),
}
MAX_BYTES = 2**31  # of a picture's file: 150 million pixels of 4 channels of 16 bits, and some
MAX_FRAMES = 1000
NAME_LIMIT, ENDING = 255, 12  # bytes of a file's name, and of what results add: _overlay.png
_SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that swap width and height
# The ways in which decoders say that a file is damaged; hostile headers lead their code anywhere.
DAMAGED = (
    OSError, SyntaxError, EOFError, ValueError, LookupError, ArithmeticError, TypeError,
    AttributeError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip


Picture = Image.Image | NDArray[np.uint8]


class TooLarge(Exception):
    """More pixels than are decoded."""


class Header(NamedTuple):
    """What a picture's header says."""

    size: tuple[int, int]  # (height, width) of the upright picture
    stored: tuple[int, int]  # (height, width) before the EXIF orientation is applied
    turned: bool  # by the EXIF orientation
    several: bool  # frames or pages, of which the first is used


# -- files -----------------------------------------------------------------------------------------


def find_images(names: Sequence[str], result: str, flag: str = "--images") -> list[Path]:
    """Pictures named by a flag directly, or lying in folders that it names, each once.

    Args:
        result: the end of the name of what is written for each, `_overlay.png`.
        flag: for messages.

    Raises:
        DataError: nothing there, a name too long for results, or two pictures whose results would
            get the same name; all problems together.
    """
    images: dict[Path, Path] = {}  # absolute -> as it was given
    problems = []
    for name in names:
        path = Path(name)
        if not path.exists():
            problems.append(f"{flag}: nothing at {one_line(path.absolute())}")
            continue
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not inside:
            suffixes = " ".join(sorted(SUFFIXES))
            problems.append(f"{flag}: no pictures ({suffixes}) in {one_line(path.absolute())}")
        for image in inside:
            images.setdefault(Path(os.path.abspath(image)), image)
    by_stem: dict[str, Path] = {}
    for image in images.values():
        other = by_stem.setdefault(image.stem, image)
        if other is not image:
            problems.append(
                f"{one_line(other)} and {one_line(image)} would both write "
                f"{one_line(image.stem)}{result}: rename one"
            )
        if len(os.fsencode(image.stem)) + ENDING > NAME_LIMIT:
            problems.append(
                f"{one_line(image)}: its results would have names of more than {NAME_LIMIT} bytes: "
                "rename it"
            )
    if problems:
        raise DataError(listing(problems))
    return list(images.values())


def read_image(path: Path) -> NDArray[np.uint8]:
    """The upright picture as RGB, uint8 [H, W, 3].

    Raises:
        DataError: no such file, not a picture, damaged, or too large.
    """
    with open_picture(path) as picture:
        return rgb_of(picture, one_line(path))


def rgb_of(picture: Picture, name: str = "image") -> NDArray[np.uint8]:
    """A picture in memory as upright RGB, uint8 [H, W, 3], by the module's rules.

    Args:
        picture: a PIL picture of any mode, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        name: for messages.

    Raises:
        DataError: other values or shapes.
    """
    picture = _of_array(picture, name) if not isinstance(picture, Image.Image) else picture
    picture = _upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = Image.fromarray(_to_8_bit(np.asarray(picture), name))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _of_array(values: NDArray, name: str) -> Image.Image:
    array = np.asarray(values)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(
            f"{name}: an array of {array.dtype} {list(array.shape)}, expected uint8 [H, W, 3]"
        )
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise DataError(
            f"{name}: uint8 {list(array.shape)}, expected [H, W, 3]: channels come last"
        )
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _to_8_bit(values: NDArray, name: str) -> NDArray[np.uint8]:
    """16-bit integers, or floats of 0..1, to 0..255, rounded."""
    limit = 1.0 if values.dtype.kind == "f" else 65535.0
    if not ((values >= 0) & (values <= limit)).all():  # false for NaN too
        raise DataError(
            f"{name}: values from {values.min():g} to {values.max():g}, expected 0 to {limit:g}; "
            "convert the picture to 8 bits"
        )
    return np.round(values * (255.0 / limit)).astype(np.uint8)


def read_mask(path: Path) -> NDArray[np.integer]:
    """The values of a mask file, upright, integers [H, W]: never scaled, never thresholded.

    A palette of colours is read by its indices, a palette of black and white as 0 and 255. RGB is
    taken if it shows greys only.

    Raises:
        DataError: as `read_image`; colours, transparency or fractions, whose meaning nobody said.
    """
    with open_picture(path) as opened:
        picture = _upright(opened)
        if picture.mode == "P" and _black_and_white(picture):
            picture = picture.convert("L")
        values = np.array(picture)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.ndim == 3:
        bands = {"LA": 1, "RGB": 3, "RGBA": 3}.get(picture.mode)
        opaque = picture.mode == "RGB" or (values[..., -1] == 255).all()
        if bands is None or not opaque or (values[..., 1:bands] != values[..., :1]).any():
            raise DataError(
                f"{one_line(path)}: a mask in mode {picture.mode} with colours or transparency; "
                "save it as one channel of 0 and 255, of object ids, or of class indices"
            )
        values = values[..., 0]
    if values.dtype.kind not in "ui":
        raise DataError(
            f"{one_line(path)}: a mask of fractions ({values.dtype}); save it as whole numbers"
        )
    return values


def _black_and_white(picture: Image.Image) -> bool:
    """Whether a palette's colours, not their indices, are what a mask means by it.

    The whole palette counts: a mask that is all foreground shows one colour of the two.
    """
    palette = np.array(picture.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    used = palette[np.unique(np.asarray(picture)).clip(max=len(palette) - 1)]
    known, shown = ({tuple(colour) for colour in some.tolist()} for some in (palette, used))
    return shown <= {(0, 0, 0), (255, 255, 255)} <= known


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header.

    Raises:
        DataError: no such file, not a picture, or too large.
    """
    with open_picture(path) as picture:
        return upright_size(picture)


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(height, width) after the EXIF orientation is applied."""
    width, height = picture.size
    return (width, height) if orientation(picture) in _SIDEWAYS else (height, width)


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if it is anything else, as viewers have it."""
    # PIL decodes a whole PNG in search of what may stand behind its pixels.
    exif = Image.Image.getexif(picture) if _ends_with_pixels(picture) else picture.getexif()
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(picture: Image.Image) -> Image.Image:
    """The picture by its EXIF orientation; itself, where PIL would copy what is upright."""
    picture.load()  # some formats know mode and orientation only then
    return picture if orientation(picture) == 1 else ImageOps.exif_transpose(picture)


def _ends_with_pixels(picture: Image.Image) -> bool:
    """Whether a PNG that is not decoded yet is known to hold nothing behind its pixels."""
    file = getattr(picture, "fp", None)
    if picture.format != "PNG" or file is None:
        return False
    place, seen = file.tell(), b""
    file.seek(8)  # behind the signature; then length, kind, content and checksum of each chunk
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if seen == b"IDAT" != kind:
            seen = kind
            break
        seen = kind
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)
    return seen == b"IEND"


def read_header(path: Path) -> Header:
    """Sizes of a picture and whether it may belong to a data set, from its header.

    Raises:
        DataError: as `read_size`; a name that says another format; too many frames.
    """
    with open_picture(path) as picture:
        found = "JPEG" if picture.format == "MPO" else str(picture.format)
        if SUFFIXES.get(path.suffix.lower(), found) != found:
            raise DataError(f"{one_line(path)}: holds a picture in {found} format: name it so")
        several = found != "JPEG" and getattr(picture, "is_animated", False)
        size, turned = upright_size(picture), orientation(picture) != 1
        if several and _has_frame(picture, MAX_FRAMES):
            raise DataError(
                f"{one_line(path)}: more than {MAX_FRAMES} frames or pages; save the first alone"
            )
        return Header(size, (picture.height, picture.width), turned, several)


def _has_frame(picture: Image.Image, number: int) -> bool:
    try:
        picture.seek(number)
    except EOFError:
        return False
    return True


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture's header; nothing is decoded before its size is known to be within bounds.

    Raises:
        DataError: no such file, not a picture, damaged, or too large.
    """
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decoders: we have our own bound, and errors tell
            length = os.fstat(file.fileno()).st_size
            if length > MAX_BYTES:
                raise TooLarge(f"{length / 1e9:.1f} GB are more than {MAX_BYTES / 1e9:.1f}")
            with open_bounded(file) as picture:
                yield picture
    except DataError:
        raise
    except TooLarge as error:
        raise DataError(f"{one_line(path)}: {error}; cut the picture into tiles") from None
    except Image.DecompressionBombError:  # of a later frame
        raise DataError(f"{one_line(path)}: holds a frame of more pixels than are read") from None
    except UnidentifiedImageError:
        raise DataError(f"{one_line(path)}: {_what_is(path)}") from None
    except DAMAGED as error:
        raise DataError(f"{one_line(path)}: cannot be read: {said_by(error)}") from None


def said_by(error: BaseException) -> str:
    """A decoder's complaint, without the path that it may repeat."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "MAX_TEXT_CHUNK" in str(error):
        return "a text or colour profile in it unpacks to more than is read"
    plain = (OSError, SyntaxError, EOFError, ValueError, zlib.error)  # the others speak of code
    spoken = isinstance(error, plain) and not isinstance(error, UnicodeError)
    return (str(error) if spoken else "") or "it is damaged"


def open_bounded(file: BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read a picture's header.

    Raises:
        TooLarge: it announces more than `MAX_PIXELS`.
        Exception: one of `DAMAGED`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=formats)
    except Image.DecompressionBombError:
        raise TooLarge(f"more than {MAX_PIXELS // 10**6} million pixels") from None
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        raise TooLarge(
            f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS // 10**6} million"
        )
    return picture


def _what_is(path: Path) -> str:
    """Why a file is no picture, from its first bytes."""
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the picture: run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page, not a picture"
    for kind, begin in BEGINNINGS.items():
        if begin.match(head):
            return f"a {kind} file whose header is damaged"
    return "not a picture in a format that is read (JPEG, PNG, WebP, BMP, TIFF, GIF)"
