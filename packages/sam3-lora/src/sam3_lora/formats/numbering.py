"""Which number a class has in the files that are written."""

from __future__ import annotations

from collections.abc import Mapping

from sam3_lora.formats.annotated import Part


def numbered(parts: Mapping[str, Part]) -> dict[str, int]:
    """Class -> its number in all files: its own where that is free, else the next."""
    numbers: dict[str, int] = {}
    taken: set[int] = set()
    wanted = [pair for part in parts.values() for pair in part.numbers.items()]
    for name, number in wanted:
        if name not in numbers and number not in taken:
            numbers[name] = number
            taken.add(number)
    for name, _ in wanted:
        if name not in numbers:
            numbers[name] = max(taken, default=0) + 1
            taken.add(numbers[name])
    return numbers
