"""What a picture is asked, and what categories are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_core.errors import DataError
from lora_core.pictures.coco import Coco
from sam3_lora.config import Dataset
from sam3_lora.queries import (
    Phrases,
    absent,
    asked,
    drawn,
    find_placeholder,
    fixed,
    name_phrases,
    spoken,
    unused_prompts,
)
from sam3_lora.records import Entry, Instance, Record

SIZE = (10, 10)
BOX = (1.0, 1.0, 4.0, 4.0)


def coco(*categories: dict[str, Any]) -> Coco:
    names = {item["id"]: str(item.get("name", item["id"])) for item in categories}
    return Coco({}, names, list(categories))


def phrases(*categories: dict[str, Any], used: tuple = (1, 2), **settings: Any) -> Phrases:
    return name_phrases(coco(*categories), set(used), Dataset(**settings), "x.json")


def record(*names: str, **changes: Any) -> Record:
    entries = tuple(Entry(name, BOX, None, SIZE, False) for name in names)
    return Record("a.png", Path("a.png"), 1, SIZE, entries, **changes)


def instance(phrase: str, crowd: bool = False) -> Instance:
    return Instance(phrase, BOX, None, crowd)


# -- phrases ---------------------------------------------------------------------------------------


def test_phrases_are_in_the_order_of_their_ids() -> None:
    found = phrases({"id": 10, "name": "c"}, {"id": 2, "name": "b"}, {"id": 1, "name": "a"})
    assert list(found.numbers.items()) == [("a", 1), ("b", 2), ("c", 10)]
    assert found.by_category == {1: "a", 2: "b", 10: "c"}


def test_ids_that_are_text_get_numbers() -> None:
    found = phrases({"id": "x", "name": "a"}, {"id": 7, "name": "b"})
    assert dict(found.numbers) == {"b": 1, "a": 2}


def test_categories_of_one_phrase_become_one_with_a_note() -> None:
    found = phrases(
        {"id": 3, "name": "rusty_bolt"}, {"id": 5, "name": "Rusty bolt"}, {"id": 9, "name": "nut"}
    )
    assert found.by_category == {3: "rusty bolt", 5: "rusty bolt", 9: "nut"}
    assert dict(found.numbers) == {"rusty bolt": 3, "nut": 9}
    assert found.notes == ["x.json: 2 categories are called 'rusty bolt': one phrase"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rusty_bolt-M8", "rusty bolt M8"), ("__a--b  c_", "a b c"), ("plain", "plain")],
)
def test_names_are_written_as_people_say_them(name: str, expected: str) -> None:
    assert spoken(name) == expected


def test_names_may_be_left_as_they_are() -> None:
    found = phrases({"id": 1, "name": "rusty_bolt-M8 "}, clean_names=False)
    assert list(found.numbers) == ["rusty_bolt-M8"]


ROBOFLOW = {"id": 0, "name": "things", "supercategory": "none"}
BOLT = {"id": 1, "name": "bolt", "supercategory": "things"}
NUT = {"id": 2, "name": "nut", "supercategory": "things"}


def test_only_an_unused_supercategory_of_all_others_is_a_placeholder() -> None:
    assert find_placeholder(coco(ROBOFLOW, BOLT, NUT), {1, 2}) == 0
    assert find_placeholder(coco(ROBOFLOW, BOLT, NUT), {0, 1}) is None, "it has annotations"
    other = NUT | {"supercategory": "steel"}
    assert find_placeholder(coco(ROBOFLOW, BOLT, other), {1, 2}) is None
    assert find_placeholder(coco(ROBOFLOW), set()) is None, "of no others"
    assert find_placeholder(coco(BOLT, NUT), set()) is None


def test_the_placeholder_is_dropped_with_a_note_unless_it_is_to_be_kept() -> None:
    found = phrases(ROBOFLOW, BOLT, NUT)
    assert list(found.numbers) == ["bolt", "nut"]
    assert 0 not in found.by_category
    (note,) = found.notes
    assert "'things' has no annotation" in note
    assert "--dataset.keep_placeholder_category" in note
    kept = phrases(ROBOFLOW, BOLT, NUT, keep_placeholder_category=True)
    assert list(kept.numbers) == ["things", "bolt", "nut"]
    assert kept.notes == []


def test_a_category_without_annotations_is_a_phrase_that_is_absent() -> None:
    assert list(phrases(BOLT, NUT, used=(1,)).numbers) == ["bolt", "nut"]


@pytest.mark.parametrize("used", [set(), {None}, {7}, {"x"}])
def test_without_categories_the_phrase_of_the_settings_is_asked(used: set) -> None:
    found = name_phrases(coco(), used, Dataset(phrase="rust"), "x.json")
    assert list(found.numbers) == ["rust"]
    assert all(found.by_category[category] == "rust" for category in used)


def test_several_categories_without_names_are_refused() -> None:
    with pytest.raises(DataError, match="annotations of categories 1, 2, but no list"):
        name_phrases(coco(), {1, 2}, Dataset(), "x.json")


@pytest.mark.parametrize("category", [{"id": 4}, {"id": 4, "name": ""}, {"id": 4, "name": "_-"}])
def test_a_category_without_a_name_is_refused_unless_a_prompt_gives_it(
    category: dict[str, Any],
) -> None:
    with pytest.raises(DataError, match=r"category 4 has no name .*--dataset\.prompts 4=phrase"):
        phrases(BOLT, category)
    assert list(phrases(BOLT, category, prompts=["4=gear"]).numbers) == ["bolt", "gear"]


def test_prompts_replace_names_by_id_or_name_and_unused_ones_are_told() -> None:
    settings = Dataset(prompts=["1=hexagon bolt", "nut=a  small_nut", "gear=wheel"])
    found = name_phrases(coco(BOLT, NUT), {1, 2}, settings, "x.json")
    assert dict(found.numbers) == {"hexagon bolt": 1, "a small_nut": 2}
    assert unused_prompts(settings, found.prompts) == ["gear"]


# -- queries ---------------------------------------------------------------------------------------


def test_phrases_without_an_annotation_are_absent() -> None:
    assert absent(record("b"), ["a", "b", "c"]) == ["a", "c"]
    assert absent(record(), ["a", "b"]) == ["a", "b"]


def test_where_absent_phrases_are_listed_no_others_are_known_to_be() -> None:
    assert absent(record("b", absent=("c", "b")), ["a", "b", "c"]) == ["c"]
    assert absent(record("b", absent=()), ["a", "b", "c"]) == []


def test_queries_hold_their_objects_in_the_order_of_the_phrases() -> None:
    found = asked([instance("b"), instance("a"), instance("b")], ["c"], ["c", "b", "a"])
    assert [(query.phrase, len(query.instances)) for query in found] == [
        ("c", 0),
        ("b", 2),
        ("a", 1),
    ]


def test_a_phrase_with_nothing_but_crowds_is_not_asked() -> None:
    """It is there, but nothing can be trained on it; and its region is not background."""
    crowd = instance("b", crowd=True)
    assert [query.phrase for query in asked([instance("a"), crowd], [], ["a", "b"])] == ["a"]
    found = asked([instance("b"), crowd], [], ["a", "b"])
    assert [(query.phrase, len(query.instances)) for query in found] == [("b", 2)]


@pytest.mark.parametrize(("most", "expected"), [(1, ["a"]), (2, ["a", "b"]), (None, ["a", "b"])])
def test_a_query_with_more_objects_than_allowed_is_not_asked(
    most: int | None, expected: list[str]
) -> None:
    found = asked([instance("a"), instance("b"), instance("b")], [], ["a", "b"], most)
    assert [query.phrase for query in found] == expected


def test_negatives_are_drawn_evenly_and_stay_in_order() -> None:
    names = [f"n{k}" for k in range(10)]
    generator = np.random.default_rng(0)
    counts = dict.fromkeys(names, 0)
    for _ in range(500):
        chosen = drawn(names, 3, generator)
        assert len(set(chosen)) == 3
        assert chosen == sorted(chosen)
        for name in chosen:
            counts[name] += 1
    assert all(100 < count < 200 for count in counts.values())
    assert drawn(names, 10, generator) == names
    assert drawn(names, 0, generator) == []


def test_fixed_negatives_depend_on_the_picture_alone() -> None:
    names = [f"n{k}" for k in range(30)]
    assert fixed(names, 5, "a.png") == fixed(names, 5, "a.png")
    assert len({tuple(fixed(names, 5, f"{k}.png")) for k in range(20)}) == 20
