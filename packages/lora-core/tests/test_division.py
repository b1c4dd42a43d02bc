"""Which pictures validate: the same in every run, whatever is added."""

from pathlib import Path
from typing import NamedTuple

import pytest

from lora_core.pictures.division import rank, split_by_name


class Picture(NamedTuple):
    key: str

    @property
    def image(self):
        return Path("somewhere") / self.key


def pictures(count, start=0):
    return [Picture(f"{number:03}.jpg") for number in range(start, start + count)]


def test_the_share_is_kept_and_copies_of_a_picture_stay_together():
    ranks = [rank(f"{k}.jpg", 0) for k in range(4000)]
    assert all(0 <= value < 1 for value in ranks)
    assert rank("a", 0) != rank("b", 0)  # names without a suffix
    assert abs(sum(value < 0.1 for value in ranks) / 4000 - 0.1) < 0.02
    original = rank("bolt_1_jpg.png", 0)
    for copy in ("0a1b2c3d4e5f60718293a4b5c6d7e8f9", "ffffffffffffffffffffffffffffffff"):
        assert rank(f"bolt_1_jpg.rf.{copy}.jpg", 0) == original
    assert rank("bolt_1_jpg.png", 1) != original


def test_ranks_are_those_of_every_earlier_version():
    """Others would move pictures of data sets that were prepared before to the other side."""
    assert rank("a.jpg", 0) == pytest.approx(0.08534, abs=1e-6)
    assert rank("b.png", 7) == pytest.approx(0.051194, abs=1e-6)


def test_a_picture_never_changes_sides_when_others_are_added():
    train, val, note = split_by_name(pictures(40), 0.3, seed=0)
    assert len(train) + len(val) == 40
    assert 5 < len(val) < 20
    assert train == sorted(train), "they stay in their order"
    assert note == ""
    more = split_by_name(pictures(80), 0.3, seed=0)
    assert set(train) <= set(more[0])
    assert set(val) <= set(more[1])
    assert set(split_by_name(pictures(40), 0.3, seed=1)[1]) != set(val)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_sides_get_a_picture_and_it_is_said(share):
    train, val, note = split_by_name(pictures(5), share, seed=0)
    assert sorted((len(train), len(val))) == [1, 4]
    assert f"of 5 pictures --val_fraction {share:g} leaves one side empty" in note
    assert split_by_name(list(reversed(pictures(5))), share, seed=0)[1] == val[::-1]


def test_a_single_picture_is_trained_on():
    one = pictures(1)
    train, val, note = split_by_name(one, 0.5, seed=0)
    assert (train, val) == (one, [])
    assert "none is left for validation" in note
