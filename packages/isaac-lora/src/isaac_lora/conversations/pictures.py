"""Pictures of conversations: files and data URIs, as RGB by the same rules.

A source is a path, relative to the image folder or absolute, or `data:image/...;base64,...`. A
relative path stays in the folder, its links too. Sizes come from headers, so that the places of a
picture in the sequence are known before it is decoded.

The rules are those of `lora_core.pictures.files`: upright by the EXIF orientation, transparency
over white, 16 bits scaled to 8. (Isaac's own processor ignores the orientation; every viewer, and
every tool that draws boxes, shows the upright picture.)
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lora_core.errors import DataError, one_line
from lora_core.pictures.files import (
    DAMAGED,
    FORMATS,
    TooLarge,
    open_bounded,
    read_header,
    read_image,
    rgb_of,
    said_by,
    upright_size,
)
from lora_core.settings.types import shown

DATA_URI = re.compile(r"data:image/([\w.+-]+)((?:;[\w=.+-]+)*),", re.IGNORECASE)
# Subtype of the media type -> what PIL calls it.
SUBTYPES = {
    "jpeg": "JPEG", "jpg": "JPEG", "pjpeg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP",
    "tiff": "TIFF", "gif": "GIF",
}  # fmt: skip
MOST_BASE64 = 2**28  # characters of one data URI: 200 MB


def locate(source: str, folder: Path | None) -> Path | None:
    """The file that a source names; None for a data URI.

    Raises:
        DataError: a URL, a name that no file can have, or a relative path that leaves the folder.
    """
    if source[:5].lower() == "data:":
        return None
    if re.match("(?i)(https?|ftp|s3|gs)://", source):
        raise DataError(f"image {shown(source)}: nothing is fetched from the network; download it")
    if re.match("(?i)file:", source):
        raise DataError(f"image {shown(source)}: expected a path, not a URL: leave file:// out")
    try:
        known = "\0" not in source and len(os.fsencode(source)) < 4096
    except UnicodeEncodeError:  # half of a character, which JSON can write
        known = False
    if not known:
        raise DataError(f"image {shown(source)}: no file can have this name")
    if folder is not None and not Path(source).is_absolute() and not is_inside(folder, source):
        raise DataError(
            f"image {shown(source)}: leads out of {one_line(folder.absolute())}: write its "
            "absolute path, or set --image_folder to a folder that holds it"
        )
    return (folder or Path()) / source  # an absolute path stays what it is


def is_inside(folder: Path, name: str) -> bool:
    """Whether a path below a folder ends there, if `..` and links are followed."""
    path, parts = folder / name, Path(name).parts
    below = [path, *path.parents][: len(parts)]
    if ".." not in parts and not any(map(os.path.islink, below)):
        return True  # resolving every path would be slow
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def picture_size(source: str, folder: Path | None = None) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header.

    Raises:
        DataError: no such file, not a picture, too large, or a broken data URI.
    """
    path = locate(source, folder)
    if path is not None:
        return read_header(_existing(path, source, folder)).size
    with _open_data_uri(source) as picture:
        return upright_size(picture)


def read_picture(source: str, folder: Path | None = None) -> NDArray[np.uint8]:
    """The upright picture as RGB, uint8 [H, W, 3].

    Raises:
        DataError: as `picture_size`; or it is damaged.
    """
    path = locate(source, folder)
    if path is not None:
        return read_image(_existing(path, source, folder))
    with _open_data_uri(source) as picture:
        return rgb_of(picture, _uri_name(source))


def _existing(path: Path, source: str, folder: Path | None) -> Path:
    """`path`, if there is something.

    Raises:
        DataError: nothing is there; says where it was looked for, and what may help.
    """
    if os.path.lexists(path):
        return path
    remedy = "fix the path"
    if folder is None and not Path(source).is_absolute():
        remedy = "set --image_folder, or fix the path"
    raise DataError(f"image not found: {one_line(path.absolute())}: {remedy}")


# -- data URIs -------------------------------------------------------------------------------------


def _uri_name(source: str) -> str:
    return f"image {shown(source[:40] + ('...' if len(source) > 40 else ''))}"


def _bytes_of(source: str) -> tuple[bytes, str]:
    """The bytes of a data URI, and the subtype of the picture that it says it holds.

    Raises:
        DataError: no picture, not base64, or too long.
    """
    name = _uri_name(source)
    head = DATA_URI.match(source[:200])
    if head is None or not head[2].lower().endswith(";base64"):
        raise DataError(f"{name}: expected data:image/...;base64,...")
    if len(source) > MOST_BASE64:
        raise DataError(
            f"{name}: {len(source) / 1e6:.0f} million characters are more than "
            f"{MOST_BASE64 / 1e6:.0f}: store the picture as a file"
        )
    text = "".join(source[head.end() :].split())  # line ends are allowed in MIME
    try:
        return base64.b64decode(text, validate=True), head[1].lower()
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: not base64: {error}") from None


@contextmanager
def _open_data_uri(source: str) -> Iterator[Image.Image]:
    """Open the picture in a data URI; nothing is decoded before its size is known.

    Raises:
        DataError: broken base64, another format than it says, damaged, or too large.
    """
    name = _uri_name(source)
    data, subtype = _bytes_of(source)
    if not data:
        raise DataError(f"{name}: the picture is empty")
    try:
        with warnings.catch_warnings(), open_bounded(io.BytesIO(data), FORMATS) as picture:
            warnings.simplefilter("ignore")  # of decoders: errors tell what matters
            found = "JPEG" if picture.format == "MPO" else str(picture.format)
            if SUBTYPES.get(subtype, found) != found:
                raise DataError(f"{name}: says image/{subtype}, but holds {found}: say so")
            yield picture
    except DataError:
        raise
    except TooLarge as error:
        raise DataError(f"{name}: {error}; cut the picture into tiles") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise DataError(f"{name}: holds no picture in a format that is read ({formats})") from None
    except DAMAGED as error:
        raise DataError(f"{name}: cannot be read: {said_by(error)}") from None
