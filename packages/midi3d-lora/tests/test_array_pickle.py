"""Pickled dictionaries of arrays are read, and nothing that a pickle names is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pickled_arrays import Hostile, pickled

from lora_core.errors import DataError
from midi3d_lora.scenes.array_pickle import read_array_dict

ARRAYS = {
    "surface_points": np.arange(12, dtype=np.float32).reshape(4, 3),
    "surface_normals": np.asfortranarray(np.arange(12.0).reshape(4, 3)).astype(">f4"),
    "labels": np.arange(4),
}


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_array_dict(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_the_arrays_as_numpy_would(tmp_path: Path, protocol: int) -> None:
    found = read_array_dict(pickled(tmp_path / "a.npy", ARRAYS, protocol))
    assert found.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        np.testing.assert_array_equal(found[name], values)


def test_what_numpy_saves_itself_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(ARRAYS), allow_pickle=True)
    found = read_array_dict(tmp_path / "a.npy")
    np.testing.assert_array_equal(found["labels"], ARRAYS["labels"])


@pytest.mark.fault("P05")
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_runs_programs_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    value = {**ARRAYS, "x": Hostile(tmp_path / "sprung")}
    assert "a call of posix mkdir" in problem(pickled(tmp_path / "a.npy", value, protocol))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "it is no dictionary"),
        ({"a": "text"}, "'a' is no array of numbers"),
        ({"a": np.array(["text"])}, "the type 'U4'"),
        ({1: ARRAYS["labels"]}, "a key that is no text"),
        ({"a": {"b": {1, 2}}}, "the instruction EMPTY_SET"),
    ],
)
def test_what_is_no_dictionary_of_arrays_is_refused(
    tmp_path: Path, value: Any, message: str
) -> None:
    assert message in problem(pickled(tmp_path / "a.npy", value))


@pytest.mark.parametrize("eighths", range(8))
def test_truncated_files_are_refused(tmp_path: Path, eighths: int) -> None:
    path = pickled(tmp_path / "a.npy", ARRAYS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * eighths // 8])
    problem(path)


def test_an_array_of_numbers_is_no_dictionary(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAYS["labels"])
    assert "holds int64 [4], expected one dictionary" in problem(tmp_path / "a.npy")
