"""What is found in a package's pictures: facts, bad ones, doubles, and the data's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from lora_core.errors import DataError
from lora_core.pictures.survey import (
    Look,
    Rules,
    digest_of,
    doubles,
    fingerprint,
    left_out,
    look_at,
    remarks,
    settled,
    without,
)
from lora_core.validate import Bad


class Picture(NamedTuple):
    key: str
    image: Path
    label: str = ""


def look(record: Picture) -> dict[str, Any]:
    text = record.image.read_text()
    if "bad" in text:
        raise DataError(f"{record.image}: it is bad")
    return {"length": len(text)}


LOOK = Look(look, "test 1", lambda record: [record.image], lambda record: digest_of(record.label))


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures(folder: Path, *texts: str) -> list[Picture]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.png").write_text(text)
    return [Picture(f"{number}.png", folder / f"{number}.png") for number in range(len(texts))]


def test_splits_have_their_own_facts_and_faults(tmp_path: Path) -> None:
    parts = {
        "train": pictures(tmp_path / "a", "one", "bad"),
        "val": pictures(tmp_path / "b", "three"),
    }
    facts, bad = look_at(parts, LOOK, tmp_path)
    assert facts == {("train", "0.png"): {"length": 3}, ("val", "0.png"): {"length": 5}}
    assert bad == [Bad("train", "1.png", f"{tmp_path}/a/1.png: it is bad")]


def test_bad_pictures_stop_or_are_left_out(tmp_path: Path) -> None:
    parts = {"train": pictures(tmp_path / "data", "one", "bad", "three")}
    known = [Bad("train", "2.png", "file: annotation 7 is bad")]
    root = tmp_path / "data"
    with pytest.raises(DataError, match=r"2 problems\n.*annotation 7 is bad\n.*1\.png: it is bad"):
        settled(parts, known, LOOK, Rules(root, "stop", 0.9, None))
    with pytest.raises(DataError, match=r"2 of 3 samples are bad"):
        settled(parts, known, LOOK, Rules(root, "skip", 0.5, None))
    facts, bad = settled(parts, known, LOOK, Rules(root, "skip", 0.9, None))
    assert [record.key for record in without(parts, bad, facts, root)["train"]] == ["0.png"]
    assert left_out(bad) == [
        "2 bad samples of train left out, the first: file: annotation 7 is bad"
    ]


def test_pictures_that_the_first_process_does_not_see_are_named(tmp_path: Path) -> None:
    parts = {"train": pictures(tmp_path / "data", "one", "two")}
    facts, bad = look_at({"train": parts["train"][:1]}, LOOK, tmp_path)
    with pytest.raises(DataError, match=r"1 differ, such as 1\.png; all machines need the same"):
        without(parts, bad, facts, tmp_path)


def test_doubles_are_found_by_content(tmp_path: Path) -> None:
    train = pictures(tmp_path / "a", "same", "x" * 5000 + "1", "short")
    val = pictures(tmp_path / "b", "other", "same", "x" * 5000 + "2", "x" * 5000 + "1")
    assert doubles(val, train) == ["1.png", "3.png"]
    assert remarks({"train": train, "val": val}) == [
        "2 pictures of val in train too, so that its scores flatter: 1.png, 3.png"
    ]
    val[1].image.unlink()
    assert doubles(val, train) == ["3.png"]
    assert remarks({"train": train}) == []


def test_the_fingerprint_follows_the_data_and_not_its_place(tmp_path: Path) -> None:
    one, two = (pictures(tmp_path / name, "one", "two") for name in "ab")
    first = fingerprint({"train": one}, LOOK)
    assert first == fingerprint({"train": two}, LOOK)
    assert first != fingerprint({"val": one}, LOOK)
    assert first != fingerprint({"train": one[::-1]}, LOOK)
    assert first != fingerprint({"train": [one[0]._replace(label="rust"), one[1]]}, LOOK)
    one[1].image.write_text("longer")
    assert first != fingerprint({"train": one}, LOOK)
    one[1].image.unlink()
    with pytest.raises(DataError, match=r"1\.png: No such file"):
        fingerprint({"train": one}, LOOK)


def test_digests_keep_types_and_lengths_apart() -> None:
    values = [
        [1, 2], [[1], 2], [1, [2]], ["1", 2], [12], "12", (1, 2, 3), np.array([1, 2]),
        np.array([[1, 2]]), np.array([1, 2], dtype=np.int8), list(range(40)), None, "",
    ]  # fmt: skip
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of([1, 2]) == digest_of((1, 2)), "JSON has no tuples"
    assert digest_of(1, 2) != digest_of(12)
