"""Conversations of a JSON file, read and checked; nothing of their pictures but the names.

A file is a list of records, or one record per line (JSON Lines):

    {"id": "ex_1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "What is this? <image>"}, {"from": "gpt", "value": "A car."}]}

- Roles, in any case: human and user, gpt and assistant, system. Turns come in any order; every
  assistant turn is learned, and there must be one, unless there are only questions to answer.
- `<image>` or `<IMAGE>` in a user or system turn is where a picture stands. Over all turns there
  are as many of them as pictures, and they take the pictures in order. In an answer it is an error.
- `image` or `images`: a text or a list of texts, each a path or `data:image/...;base64,...`.
- `id` may be missing; two records may not share one. Other keys are left alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from isaac_lora.conversations.record_file import read_values
from isaac_lora.json_words import in_json, kind
from lora_core.data_file import is_label, is_whole, not_finite
from lora_core.errors import DataError, near, one_line
from lora_core.pictures.reading import Reading
from lora_core.report import plural
from lora_core.settings.types import shown

IMAGE = "<image>"  # where a picture stands, in the turns of a `Conversation`
MARKER = re.compile("<image>|<IMAGE>")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
KNOWN = ("id", "conversations", "image", "images")


class Turn(NamedTuple):
    """What one side says.

    Attributes:
        role: user, assistant or system.
        text: with `IMAGE` where a picture stands.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """A record of the file.

    Attributes:
        index: in the file, from 0.
        name: its id, or "record 17".
        images: paths and data URIs, as they are written, in the order of the markers.
    """

    index: int
    name: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name, unique in its file."""
        return self.name


def read_conversations(
    path: str | Path, *, image_first: bool = False, answered: bool = True
) -> Reading:
    """Read a file's conversations; what is wrong with records is collected, not raised.

    Args:
        image_first: put the pictures of a record without any marker in front of its first user
            turn. Otherwise that is an error: nobody said where they stand.
        answered: every record must have an answer; False: one that only asks will do.

    Returns:
        `records` are the good ones as `Conversation`, `bad` the others with their reasons,
        `problems` what is wrong with the file as a whole (`stop_if_wrong()` raises it).

    Raises:
        DataError: the file is missing, is no JSON, or holds no list of records.
    """
    path = Path(path)
    reading = Reading(path)
    values = read_values(path)
    seen: Counter[str] = Counter()
    for index, value in enumerate(values):
        name = _name(value, index)
        seen[name] += 1
        with reading.collecting(place_of(path, index, name), sample=name):
            reading.records.append(_conversation(value, index, name, image_first, answered))
    if not values:
        reading.problems.append(f"{one_line(path)}: holds no conversations")
    reading.problems += [
        f"{one_line(path)}: {count} records have the id {shown(name)}: give each its own, or none"
        for name, count in seen.items()
        if count > 1
    ]
    return reading


def place_of(path: Path, index: int, name: str) -> str:
    """File and record for messages: "train.json: record 17 ('ex_17')"."""
    record = f"record {index}"
    return f"{one_line(path)}: {record}" + (f" ({shown(name)})" if name != record else "")


# -- records ---------------------------------------------------------------------------------------


def _name(value: Any, index: int) -> str:
    """The id of a record; "record 17" where it has none that could be one."""
    found = _id(value) if isinstance(value, dict) else None
    return f"record {index}" if found is None else found


def _id(value: dict[str, Any]) -> str | None:
    given = value.get("id")
    usable = is_whole(given) or (is_label(given) and bool(given))
    return str(given) if usable else None


def _conversation(
    value: Any, index: int, name: str, image_first: bool, answered: bool
) -> Conversation:
    """Read one record.

    Raises:
        DataError: all that is wrong with it, a line for each.
    """
    if not isinstance(value, dict):
        raise DataError(f"expected an object, not {kind(value)}")
    problems: list[str] = []
    try:
        if wrong := not_finite(value):
            problems.append(wrong)
    except RecursionError:
        raise DataError("nested too deeply") from None
    if value.get("id") is not None and _id(value) is None:
        problems.append(f"id is {in_json(value['id'])}: expected text or a whole number, or no id")
    turns = _turns(value, problems)
    if not problems and (wrong := _nothing_said(turns, answered)):
        problems.append(wrong)
    images = _images(value, problems)
    markers = sum(text.count(IMAGE) for _, text in turns)
    if image_first and images and not markers:
        turns = _with_images_first(turns, len(images))
        markers = sum(text.count(IMAGE) for _, text in turns)
    if not problems and markers != len(images):
        problems.append(_miscounted(markers, len(images), value))
    if problems:
        raise DataError("; ".join(problems))
    return Conversation(index, name, tuple(turns), tuple(images))


def _turns(value: dict[str, Any], problems: list[str]) -> list[Turn]:
    """The turns of a record; what is wrong with them is added to `problems`."""
    given = value.get("conversations")
    if not isinstance(given, list) or not given:
        hint = near("conversations", [key for key in value if key not in KNOWN])
        problems.append(
            ("no conversations" if given is None else f"conversations is {kind(given)}")
            + ": expected a list of turns"
            + (f"; {hint}" if hint and given is None else "")
        )
        return []
    turns = []
    for number, item in enumerate(given):
        place = f"conversations[{number}]"
        turn, wrong = _turn(item)
        if wrong:
            problems.append(f"{place}: {wrong}")
        elif turn is not None:
            turns.append(turn)
    return turns


def _nothing_said(turns: list[Turn], answered: bool) -> str:
    """What is wrong with the speakers of a record; "": nothing."""
    roles = {turn.role for turn in turns}
    if answered:
        missing = "no assistant turn (from gpt or assistant): it has no answer"
        return "" if "assistant" in roles else missing
    missing = "no user turn (from human or user): nothing is asked"
    return "" if "user" in roles else missing


def _turn(item: Any) -> tuple[Turn | None, str]:
    """A turn, or what is wrong with it."""
    if not isinstance(item, dict):
        return None, f"expected an object with from and value, not {kind(item)}"
    missing = [key for key in ("from", "value") if key not in item]
    if missing:
        return None, f"has no {' and no '.join(missing)}"
    speaker, text = item["from"], item["value"]
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        return None, f"from is {in_json(speaker)}: expected one of {', '.join(ROLES)}"
    if not isinstance(text, str):
        return None, f"value is {kind(text)}: expected text"
    if not is_label(text):
        return None, "value holds half of a character (a surrogate), which no text can hold"
    if role != "assistant":
        return Turn(role, MARKER.sub(IMAGE, text)), ""
    if MARKER.search(text):
        return None, f"an answer holds {IMAGE}: pictures stand in user turns; take it out"
    if not text.strip():
        return None, "an empty answer: nothing could be learned"
    return Turn(role, text), ""


def _images(value: dict[str, Any], problems: list[str]) -> list[str]:
    """The pictures that a record names; what is wrong with them is added to `problems`."""
    given = {key: value[key] for key in ("image", "images") if value.get(key) is not None}
    if len(given) > 1:
        problems.append("both image and images: expected one of them")
        return []
    for key, content in given.items():
        sources = content if isinstance(content, list) else [content]
        wrong = [
            f"{key}{f'[{number}]' if isinstance(content, list) else ''} is {_said(source)}: "
            "expected a path or data:image/...;base64,..."
            for number, source in enumerate(sources)
            if not isinstance(source, str) or not source.strip()
        ]
        problems += wrong
        return [] if wrong else list(sources)
    return []


def _with_images_first(turns: list[Turn], count: int) -> list[Turn]:
    """`turns` with `count` markers, each on a line of its own, before the first user turn."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    user = Turn("user", f"{IMAGE}\n" * count + turns[first].text)
    return [*turns[:first], user, *turns[first + 1 :]]


def _miscounted(markers: int, images: int, value: dict[str, Any]) -> str:
    hint = ""
    spellings = sorted(set(re.findall("(?i)<image>", json.dumps(value["conversations"]))))
    if other := [word for word in spellings if not MARKER.fullmatch(word)]:
        hint = f"; write {other[0]} as {IMAGE}"
    elif images and not markers:
        hint = f"; put {IMAGE} into a user turn where the picture stands"
    elif not images:
        guess = near("image", [key for key in value if key not in KNOWN])
        hint = f"; {guess}" if guess else "; name its file in image"
    return (
        f"{plural(markers, f'{IMAGE} marker')} in the turns, but {plural(images, 'image')}: "
        f"expected equal numbers{hint}"
    )


def _said(value: Any) -> str:
    return "empty" if isinstance(value, str) else kind(value)
