"""Arrays in .npy files come back as they were; a file that lies costs neither memory nor trust."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_core.errors import DataError
from lora_core.npy_file import read_array

VALUES = np.arange(12).reshape(3, 4)


def saved(folder: Path, values: Any) -> Path:
    np.save(folder / "a.npy", values, allow_pickle=True)
    return folder / "a.npy"


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        VALUES.astype(">f8"),
        np.asfortranarray(VALUES.astype(np.float16)),
        VALUES.astype(np.uint8),
        VALUES > 3,
        np.zeros((0, 3), np.float32),
        np.float32(1.5),
    ],
    ids=["big endian", "fortran", "uint8", "bool", "empty", "a scalar"],
)
def test_arrays_come_back_as_they_were(tmp_path: Path, values: NDArray[Any], mapped: bool) -> None:
    found = read_array(saved(tmp_path, values), mapped)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("values", "kinds", "message"),
    [
        (np.array({"points": VALUES}), "biuf", "holds Python objects"),
        (np.array(["a"]), "biuf", "holds <U1, expected numbers"),
        (VALUES > 3, "iuf", "holds bool, expected numbers"),
        (np.zeros((1, 1, 1, 1)), "biuf", "not a shape"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(
    tmp_path: Path, values: Any, kinds: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"a.npy: .*{message}"):
        read_array(saved(tmp_path, values), kinds=kinds)


def test_a_header_that_promises_terabytes_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1200))
    with pytest.raises(DataError, match=r"promises float32 \[1000000000000, 3\], .* but 1200"):
        read_array(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "its header has no end"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "it has version 9, expected 1 or 2"),
    ],
)
def test_what_is_no_npy_file_is_said_to_be_what_it_is(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.npy: not a .npy file: {reason}"):
        read_array(path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(DataError, match="not a regular file"):
        read_array(tmp_path / "a.npy")
