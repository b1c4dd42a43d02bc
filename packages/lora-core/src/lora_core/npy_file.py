"""Arrays of numbers in .npy files that nobody vouches for: no pickle, no memory for promises."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import open_regular
from lora_core.errors import DataError, one_line

MAX_HEADER = 10_000  # bytes, as numpy has it; 128 are usual
MAX_AXES = 3
HEADERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}


def read_array(path: str | Path, mapped: bool = False, kinds: str = "biuf") -> NDArray[Any]:
    """The array in a .npy file, of any byte order.

    Args:
        mapped: its numbers are read from disk when they are used.
        kinds: of numbers that are expected, by numpy's letters; b is true and false.

    Raises:
        DataError: missing, not .npy, Python objects or other kinds of numbers, or a header that
            promises more or less than the file holds. No memory is taken for what is not there.
        OSError: it cannot be opened.
    """
    path = Path(path)
    with open_regular(path) as file:
        shape, fortran, dtype = read_header(file, one_line(path))
        if dtype.hasobject:
            raise DataError(
                f"{one_line(path)}: holds Python objects (a pickle, which could run programs), "
                "expected numbers"
            )
        if dtype.kind not in kinds:
            raise DataError(f"{one_line(path)}: holds {dtype}, expected numbers")
        begin, count = file.tell(), math.prod(shape)
        held = os.fstat(file.fileno()).st_size - begin
        if held != count * dtype.itemsize:
            raise DataError(
                f"{one_line(path)}: its header promises {dtype} {list(shape)}, "
                f"{count * dtype.itemsize} bytes, but {held} follow: copied incompletely?"
            )
        if not count:  # an empty file cannot be mapped
            return np.empty([min(length, 4096) for length in shape], dtype)
        order: Any = "F" if fortran else "C"
        if mapped:
            return np.memmap(file, dtype, mode="r", offset=begin, shape=shape, order=order)
        return np.fromfile(file, dtype, count).reshape(shape, order=order)


def holds_objects(path: str | Path) -> bool:
    """Whether a .npy file holds Python objects (a pickle) and no numbers.

    Raises:
        DataError, OSError: as `read_array`.
    """
    with open_regular(Path(path)) as file:
        return read_header(file, one_line(path))[2].hasobject


def read_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of a .npy file; leaves it at the first byte of the data.

    Args:
        name: of the file, for messages.

    Raises:
        DataError: not .npy, or no shape of an array of numbers.
    """
    begin = file.read(32)
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)[0]
        if version not in HEADERS:
            raise ValueError(f"it has version {version}, expected 1 or 2")
        if version == 2 and int.from_bytes(begin[8:12], "little") > MAX_HEADER:
            raise ValueError("its header has no end")  # numpy would read all of it first
        shape, fortran, dtype = HEADERS[version](file)
    except (ValueError, EOFError) as error:
        raise DataError(f"{name}: not a .npy file: {_reason(begin, error)}") from None
    if len(shape) > MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise DataError(f"{name}: its header promises {list(shape)} numbers: not a shape")
    return shape, fortran, dtype


def _reason(begin: bytes, error: Exception) -> str:
    if not begin:
        return "the file is empty"
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the file itself, `git lfs pull`"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page: download the file itself"
    return one_line(str(error).partition("\n")[0])[:120]
