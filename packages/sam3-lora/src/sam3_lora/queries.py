"""What a picture is asked: one query for each phrase that is in it, and for some that are not.

A query without objects teaches that the phrase is absent. Only phrases of which the annotation file
says so are asked for in vain: general words might well be in the picture.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from lora_core.data_file import is_whole
from lora_core.errors import DataError, listing, one_line
from lora_core.pictures.coco import Coco
from lora_core.settings.types import shown
from sam3_lora.config import Dataset
from sam3_lora.records import Instance, Record
from sam3_lora.tokenizer import clean

# -- phrases ---------------------------------------------------------------------------------------


class Phrases(NamedTuple):
    """What the categories of a file are called.

    Attributes:
        by_category: id -> phrase; the id None: of annotations without one, in a file without any.
        numbers: phrase -> the number that stands for it in results, in the order of the ids: the
            lowest id of its categories where all are whole numbers, else 1, 2, ...
        notes: what was merged or left out.
        prompts: the settings `dataset.prompts` that were used.
    """

    by_category: Mapping[object, str]
    numbers: Mapping[str, int]
    notes: list[str]
    prompts: frozenset[str]


def name_phrases(coco: Coco, used: Set[object], settings: Dataset, where: str) -> Phrases:
    """The phrases of a COCO file.

    Categories with the same phrase become one: as two, each would teach that the other's objects
    are none. Phrases are the same if the tokenizer makes the same of them ("Bolt", "bolt").

    Args:
        used: ids of categories that annotations have.
        where: the file, for messages.

    Raises:
        DataError: a category that nothing can be asked for.
    """
    if not coco.names:
        return _without_categories(used, settings, where)
    placeholder = None if settings.keep_placeholder_category else find_placeholder(coco, used)
    prompts = _prompts(settings)
    nameless = {item["id"] for item in coco.categories if not item.get("name")}
    by_category: dict[object, str] = {}
    written: dict[str, list[str]] = {}  # what the tokenizer sees -> the phrases, one per category
    problems, taken = [], set()
    for identity in sorted(coco.names, key=lambda one: (isinstance(one, str), one)):
        if identity == placeholder:
            continue
        name, number = coco.names[identity], str(identity)
        prompt = next((key for key in (number, name) if key in prompts), None)
        if prompt is not None:
            taken.add(prompt)
            phrase = prompts[prompt]
        elif identity in nameless:
            phrase = ""
        else:
            phrase = spoken(name) if settings.clean_names else name.strip()
        if not clean(phrase):
            problems.append(
                f"{where}: category {shown(identity)} has no name that can be asked for: name it, "
                f"or give --dataset.prompts {one_line(number)}=phrase"
            )
            continue
        written.setdefault(clean(phrase), []).append(phrase)
        by_category[identity] = written[clean(phrase)][0]
    if problems:
        raise DataError(listing(problems))
    notes = _placeholder_note(coco, placeholder, where) + [
        f"{where}: {len(same)} categories are called {shown(same[0])}: one phrase"
        for same in written.values()
        if len(same) > 1
    ]
    return Phrases(by_category, _numbered(by_category), notes, frozenset(taken))


def _placeholder_note(coco: Coco, placeholder: object, where: str) -> list[str]:
    if placeholder is None:
        return []
    return [
        f"{where}: category {shown(coco.names[placeholder])} has no annotation and is the "
        "supercategory of the others, as in exports of Roboflow: it is not asked for "
        "(--dataset.keep_placeholder_category)"
    ]


def find_placeholder(coco: Coco, used: Set[object]) -> object:
    """Id of the category that Roboflow adds: without annotations, supercategory of all others."""
    above = {item["id"]: item.get("supercategory") for item in coco.categories}
    named = Counter(name for name in above.values() if isinstance(name, str))
    for identity, name in coco.names.items():
        others = named[name] - (above[identity] == name)
        if identity not in used and others == len(above) - 1 > 0:
            return identity
    return None


def spoken(name: str) -> str:
    """A name as people say it: "rusty_bolt-M8" is "rusty bolt M8"."""
    return " ".join(re.sub("[_-]", " ", name).split())


def _without_categories(used: Set[object], settings: Dataset, where: str) -> Phrases:
    if len(used) > 1:
        ids = ", ".join(sorted(map(shown, used))[:5])
        raise DataError(
            f"{where}: annotations of categories {ids}, but no list of categories says what they "
            'are called: add "categories": [{"id": ..., "name": ...}]'
        )
    one = dict.fromkeys(used or {None}, settings.phrase)
    return Phrases(one, _numbered(one), [], frozenset())


def _numbered(by_category: Mapping[object, str]) -> dict[str, int]:
    whole = [identity for identity in by_category if is_whole(identity)]
    numbers: dict[str, int] = {}
    for identity, phrase in by_category.items():
        number = identity if is_whole(identity) and len(whole) == len(by_category) else None
        numbers.setdefault(phrase, len(numbers) + 1 if number is None else number)
    return numbers


def _prompts(settings: Dataset) -> dict[str, str]:
    """Id or name of a category -> what to ask for instead."""
    pairs = (prompt.partition("=") for prompt in settings.prompts)
    return {category.strip(): " ".join(phrase.split()) for category, _, phrase in pairs}


def unused_prompts(settings: Dataset, used: Set[str]) -> list[str]:
    """The categories of `dataset.prompts` that no file has."""
    return [category for category in _prompts(settings) if category not in used]


# -- queries ---------------------------------------------------------------------------------------


class Query(NamedTuple):
    """One phrase that a picture is asked for, and its objects: none of an absent one."""

    phrase: str
    instances: list[Instance]


def absent(record: Record, phrases: Sequence[str]) -> list[str]:
    """The phrases that are known not to be in a picture, crowds included."""
    here = {entry.phrase for entry in record.entries}
    candidates = phrases if record.absent is None else record.absent
    return [phrase for phrase in candidates if phrase not in here]


def usable(counts: Mapping[str, int], most: int) -> list[str]:
    """The phrases with 1 to `most` objects.

    Official training leaves out what has more objects than object queries, too: a cut would teach
    that the others are background.
    """
    return [phrase for phrase, count in counts.items() if 0 < count <= most]


def asked(
    instances: Sequence[Instance],
    negatives: Sequence[str],
    phrases: Sequence[str],
    most: int | None = None,
) -> list[Query]:
    """Queries in the order of `phrases`: those with objects, and `negatives`.

    A phrase of which a picture has nothing but crowds is neither there nor absent.

    Args:
        most: objects that a query may have; None: any number.
    """
    objects: dict[str, list[Instance]] = {}
    for instance in instances:
        objects.setdefault(instance.phrase, []).append(instance)
    counts = Counter(one.phrase for one in instances if not one.crowd)
    chosen = {*usable(counts, len(instances) if most is None else most), *negatives}
    return [Query(one, objects.get(one, [])) for one in phrases if one in chosen]


def drawn(names: Sequence[str], most: int, rng: np.random.Generator) -> list[str]:
    """At most so many of them, in their order."""
    if len(names) <= most:
        return list(names)
    return [names[k] for k in sorted(rng.choice(len(names), most, replace=False))]


def fixed(names: Sequence[str], most: int, key: str) -> list[str]:
    """As `drawn`, but always the same of a picture: what epochs and runs are compared by."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return drawn(names, most, np.random.default_rng(int.from_bytes(digest)))
