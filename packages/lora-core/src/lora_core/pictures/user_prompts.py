"""Prompts that a user gives for pictures: a JSON file by picture names, and what lies outside.

A package brings its own prompts, made from an entry of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_core.errors import DataError, listing, near, one_line
from lora_core.settings.types import shown

LIMIT = 1e9  # pixels: no picture is as large

P = TypeVar("P")


def read_entries(
    path: Path, images: Sequence[Path], parse: Callable[[Any, str], list[P]], form: str
) -> tuple[dict[Path, list[P]], list[str]]:
    """The prompts of each picture that a JSON file {"a.jpg": an entry} names.

    Args:
        parse: (entry, where) -> prompts, or DataError that begins with `where`.
        form: what the file should be, for the message.

    Returns:
        them, those of faulty entries empty; and all problems, a line each.

    Raises:
        DataError: no JSON object.
    """
    from lora_core.data_file import read_json

    content, where = read_json(path), one_line(path)
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected an object {form}")
    by_name = {image.name: image for image in images}
    prompts: dict[Path, list[P]] = {}
    problems = []
    for name, entry in content.items():
        if name not in by_name:
            hint = near(name, by_name) or f"there is {one_line(next(iter(by_name)))}"
            problems.append(f"{where}: no picture {shown(name)} among --images; {hint}")
            continue
        prompts[by_name[name]] = []
        try:
            prompts[by_name[name]] = parse(entry, f"{where}: {shown(name)}")
        except DataError as error:
            problems.append(str(error))
    return prompts, problems


def are_coordinates(values: Any, count: int) -> bool:
    """Whether it is a list of so many finite numbers of pixels."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and abs(v) < LIMIT for v in values)  # false for NaN too
    )


def refuse_outside(
    prompts: Mapping[Path, Sequence[P]], outside: Callable[[P, tuple[int, int]], Iterable[str]]
) -> None:
    """Compare prompts with the sizes of their pictures, of which only headers are read.

    Args:
        outside: (prompt, (H, W)) -> what lies outside, as "1,2 lies outside the picture".

    Raises:
        DataError: what is no picture, and what lies outside of one; all together.
    """
    from lora_core.pictures.files import read_size  # imports PIL: wrong flags need not wait

    problems = []
    for image, given in prompts.items():
        try:
            height, width = read_size(image)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{one_line(image.name)}: {what} of {width} x {height} pixels"
            for prompt in given
            for what in outside(prompt, (height, width))
        ]
    if problems:
        raise DataError(listing(problems))
