"""What a user asks pictures for: phrases and example boxes, as flags or in a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError, DataError, UserError, listing, one_line
from lora_core.pictures.user_prompts import are_coordinates, read_entries, refuse_outside
from lora_core.settings.types import shown

FORM = '{"a.jpg": ["bolt", {"phrase": "nut", "boxes": [[x0, y0, x1, y1]], "labels": [1]}]}'

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in the picture's pixels


@dataclass(frozen=True)
class Prompt:
    """One question to a picture: a phrase, or boxes around examples, or both."""

    phrase: str
    boxes: tuple[Box, ...] = ()
    labels: tuple[int, ...] = ()  # of each box: 1 an example, 0 what is not meant

    def outside(self, size: tuple[int, int]) -> list[Box]:
        """The boxes that leave a picture of `size` (H, W)."""
        height, width = size
        return [
            box
            for box in self.boxes
            if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height)
        ]


def read_prompts(
    images: Sequence[Path],
    phrases: Sequence[str] = (),
    boxes: Sequence[str] = (),
    labels: Sequence[int] = (),
    file: str | None = None,
) -> dict[Path, list[Prompt]]:
    """What each picture is asked.

    Args:
        images: the pictures.
        phrases, boxes, labels: the flags, for every picture; a box is `x0,y0,x1,y1`.
        file: instead of the flags, JSON as `FORM` shows it.

    Raises:
        ConfigError: flags that cannot be read as prompts.
        DataError: faults of the file; or files that are no pictures and boxes outside of their
            picture; each time all of them together.
    """
    if file is None:
        prompts = dict.fromkeys(images, prompts_of_flags(phrases, boxes, labels))
    else:
        prompts = _read_file(Path(file), images)
    refuse_outside(prompts, _outside)
    return prompts


# -- flags ---------------------------------------------------------------------------------------


def prompts_of_flags(
    phrases: Sequence[str], boxes: Sequence[str], labels: Sequence[int]
) -> list[Prompt]:
    """The questions of --phrases, --boxes and --labels.

    Raises:
        ConfigError: they cannot be understood, or do not go together.
    """
    if not phrases and not boxes:
        raise ConfigError('say what to look for: --phrases "bolt" "nut", or --boxes x0,y0,x1,y1')
    if len(phrases) > 1 and boxes:
        raise ConfigError(
            "--boxes with several --phrases: it is unclear to which phrase they belong. Ask for "
            "one phrase at a time, or write a --prompts FILE"
        )
    corners = [_corners(text) for text in boxes]
    if not boxes:
        if labels:
            raise ConfigError("--labels without --boxes: a label says what its box means")
        asked = [Prompt(_phrase(phrase)) for phrase in phrases]
    else:
        phrase = _phrase(phrases[0]) if phrases else ""
        asked = [_with_boxes(phrase, corners, labels, "--boxes, --labels")]
    _refuse_doubles(asked, "--phrases", ConfigError)
    return asked


def _corners(text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not _is_box(values):
        raise ConfigError(
            f"--boxes {shown(text)}: expected x0,y0,x1,y1 in pixels, without spaces, x0 < x1 and "
            "y0 < y1"
        )
    return values


# -- files ---------------------------------------------------------------------------------------


def _read_file(path: Path, images: Sequence[Path]) -> dict[Path, list[Prompt]]:
    """The prompts of a JSON file; every picture must have some.

    Raises:
        DataError: all problems of the file.
    """
    prompts, problems = read_entries(path, images, _entry, f"such as {FORM}")
    missing = [one_line(image.name) for image in images if image not in prompts]
    if missing:
        names = ", ".join(missing[:5])
        problems.append(
            f"{one_line(path)}: nothing is asked of {len(missing)} pictures, such as {names}"
        )
    if problems:
        raise DataError(listing(problems))
    return {image: prompts[image] for image in images}


def _entry(entry: Any, where: str) -> list[Prompt]:
    """The questions to one picture.

    Raises:
        DataError: what does not fit, starting with `where`.
    """
    if not isinstance(entry, list) or not entry:
        raise DataError(f"{where}: expected a list of phrases and objects, as in {FORM}")
    try:
        asked = [_question(item, where) for item in entry]
        _refuse_doubles(asked, where, DataError)
    except ConfigError as error:  # of the rules that flags have too
        raise DataError(f"{where}: {error}") from None
    return asked


def _question(item: Any, where: str) -> Prompt:
    if isinstance(item, str):
        return Prompt(_phrase(item))
    if not isinstance(item, dict) or not item or not set(item) <= {"phrase", "boxes", "labels"}:
        raise DataError(f"{where}: {shown(item)} is no phrase and no object as in {FORM}")
    phrase, boxes, labels = item.get("phrase", ""), item.get("boxes", []), item.get("labels", [])
    if not isinstance(phrase, str):
        raise DataError(f"{where}: phrase is {shown(phrase)}, expected text")
    if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
        raise DataError(f"{where}: boxes must be a list of [x0, y0, x1, y1], x0 < x1 and y0 < y1")
    if not isinstance(labels, list):
        raise DataError(f"{where}: labels must be a list of 1 and 0, one per box")
    if not boxes:
        return Prompt(_phrase(phrase))
    return _with_boxes(_phrase(phrase) if "phrase" in item else "", boxes, labels, where)


# -- what both have ------------------------------------------------------------------------------


def _phrase(text: str) -> str:
    """A phrase in single spaces.

    Raises:
        ConfigError: there is nothing in it that the tokenizer keeps.
    """
    from sam3_lora.tokenizer import clean

    if not clean(text):
        raise ConfigError(f"phrase {shown(text)} is empty: name what to look for, such as red car")
    return " ".join(text.split())


def _with_boxes(
    phrase: str, boxes: Sequence[Sequence[float]], labels: Sequence[Any], where: str
) -> Prompt:
    """A question with example boxes; without a phrase, they alone say what is meant.

    Raises:
        ConfigError: labels that do not fit the boxes.
    """
    from sam3_lora.samples import VISUAL

    labels = labels or [1] * len(boxes)
    if len(labels) != len(boxes):
        raise ConfigError(f"{where}: {len(labels)} labels for {len(boxes)} boxes: one for each")
    if any(type(label) is not int or label not in (0, 1) for label in labels):
        raise ConfigError(f"{where}: a label is 1 (an example) or 0 (not what is meant)")
    if not phrase and 1 not in labels:
        raise ConfigError(
            f"{where}: boxes of what is not meant need a phrase, or a box of what is (label 1)"
        )
    places = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in boxes)
    return Prompt(phrase or VISUAL, places, tuple(labels))


def _refuse_doubles(asked: Sequence[Prompt], where: str, kind: type[UserError]) -> None:
    from sam3_lora.tokenizer import clean

    seen: set[str] = set()
    for prompt in asked:
        words = clean(prompt.phrase)
        if words in seen:
            raise kind(
                f"{where}: {shown(prompt.phrase)} is asked for twice (case and spaces make no "
                "difference to the model): name it once"
            )
        seen.add(words)


def _is_box(values: Any) -> bool:
    return are_coordinates(values, 4) and values[0] < values[2] and values[1] < values[3]


def _outside(prompt: Prompt, size: tuple[int, int]) -> list[str]:
    texts = (",".join(f"{value:g}" for value in box) for box in prompt.outside(size))
    return [f"box {text} leaves the picture" for text in texts]
