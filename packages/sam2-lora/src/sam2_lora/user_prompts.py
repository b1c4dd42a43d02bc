"""Clicks and boxes that a user gives: as flags, or for many pictures in a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError, DataError, listing
from lora_core.pictures.user_prompts import are_coordinates, read_entries, refuse_outside
from lora_core.settings.types import shown


@dataclass(frozen=True)
class Prompt:
    """What points at one object: clicks, a box, or both, in the picture's pixels."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()  # 1 or 0, one per click
    box: tuple[float, float, float, float] | None = None

    def outside(self, size: tuple[int, int]) -> list[tuple[float, float]]:
        """Clicks and corners (x, y) that lie beyond a picture of `size` (H, W)."""
        corners = [self.box[:2], self.box[2:]] if self.box else []
        return [
            (x, y)
            for x, y in (*self.points, *corners)
            if not (0 <= x <= size[1] and 0 <= y <= size[0])
        ]


def read_prompts(
    images: Sequence[Path],
    points: Sequence[str] = (),
    labels: Sequence[int] = (),
    boxes: Sequence[str] = (),
    file: str | None = None,
) -> dict[Path, list[Prompt]]:
    """The prompts of each picture, one per object; an empty list means the automatic grid.

    Args:
        images: the pictures.
        points, labels, boxes: the flags `x,y`, `1` or `0`, `x0,y0,x1,y1`, for every picture: all
            points are clicks on one object, each box is an object.
        file: instead of the flags, JSON {"a.jpg": an entry as `parse_entry` takes it}.

    Raises:
        ConfigError: flags that cannot be read as prompts.
        DataError: faults of the file; or files that are no pictures and prompts outside of their
            picture; each time all of them together.
    """
    if file is not None:
        prompts = _read_file(Path(file), images)
    else:
        prompts = dict.fromkeys(images, _from_flags(points, labels, boxes))
    refuse_outside(prompts, _outside)
    return prompts


def _from_flags(points: Sequence[str], labels: Sequence[int], boxes: Sequence[str]) -> list[Prompt]:
    """The prompts that flags mean.

    Raises:
        ConfigError: all faults of single values together, else what does not go together.
    """
    entry: dict[str, Any] = {"labels": list(labels)}
    problems = [
        f"--labels {shown(sign)}: a label is 1 (on the object) or 0 (beside it)"
        for sign in labels
        if sign not in (0, 1)
    ]
    for name, texts, form in (("points", points, "x,y"), ("boxes", boxes, "x0,y0,x1,y1")):
        entry[name] = [_numbers(text) for text in texts]
        problems += [
            f"--{name} {shown(text)}: expected {form} in pixels, without spaces"
            for text, values in zip(texts, entry[name], strict=True)
            if len(values) != form.count(",") + 1
        ]
    if problems:
        raise ConfigError(listing(problems))
    try:
        return parse_entry(entry, "--points, --labels, --boxes")
    except DataError as error:
        raise ConfigError(str(error)) from None


def _numbers(text: str) -> list[float]:
    """The numbers between commas; none where one is no number."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        return []


def _read_file(path: Path, images: Sequence[Path]) -> dict[Path, list[Prompt]]:
    """The prompts of a JSON file; a picture that it does not name has none.

    Raises:
        DataError: all problems of the file.
    """
    prompts, problems = read_entries(path, images, parse_entry, '{"a.jpg": {"points": ...}}')
    if problems:
        raise DataError(listing(problems))
    return {image: prompts.get(image, []) for image in images}


def parse_entry(entry: Any, where: str) -> list[Prompt]:
    """One picture's prompts: {"points", "labels", "boxes"} -> one `Prompt` per object.

    A list of clicks is one object, a list of such lists several; each box is an object, the clicks
    and the box in the same place belong to the same object.

    Raises:
        DataError: what does not fit, starting with `where`.
    """
    if not isinstance(entry, dict) or not set(entry) <= {"points", "labels", "boxes"}:
        raise DataError(f'{where}: expected {{"points": ..., "labels": ..., "boxes": ...}}')
    points = _per_object(entry.get("points") or [], 2)
    labels = _per_object(entry.get("labels") or [], 1) or [[1] * len(clicks) for clicks in points]
    boxes = _per_object(entry.get("boxes") or [], 1)
    flat = [(v, 2) for clicks in points for v in clicks] + [(box, 4) for box in boxes]
    if not all(are_coordinates(value, count) for value, count in flat):
        raise DataError(f"{where}: a point is [x, y] and a box is [x0, y0, x1, y1], finite numbers")
    if [len(signs) for signs in labels] != [len(clicks) for clicks in points]:
        raise DataError(f"{where}: one label for each point, in the same nesting")
    if any(sign not in (0, 1) for signs in labels for sign in signs):
        raise DataError(f"{where}: a label is 1 (on the object) or 0 (beside it)")
    if any(x0 >= x1 or y0 >= y1 for x0, y0, x1, y1 in boxes):
        raise DataError(f"{where}: a box is [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    if points and boxes and len(points) != len(boxes):
        raise DataError(f"{where}: {len(points)} object(s) with points, but {len(boxes)} box(es)")
    return [
        Prompt(
            points=tuple((float(x), float(y)) for x, y in points[k]) if points else (),
            labels=tuple(int(sign) for sign in labels[k]) if points else (),
            box=tuple(float(v) for v in boxes[k]) if boxes else None,  # type: ignore[arg-type]
        )
        for k in range(max(len(points), len(boxes)))
    ]


def _per_object(values: Any, depth: int) -> list[list[Any]]:
    """Lists per object: a list that is one object's own is wrapped once more."""
    if not isinstance(values, list):
        return [[values]]  # no list at all: the caller's checks report it
    inner: Any = values
    for _ in range(depth):
        inner = inner[0] if isinstance(inner, list) and inner else None
    nested = isinstance(inner, list) and all(isinstance(value, list) for value in values)
    return values if nested else [values] if values else []


def _outside(prompt: Prompt, size: tuple[int, int]) -> list[str]:
    return [f"{x:g},{y:g} lies outside the picture" for x, y in prompt.outside(size)]
