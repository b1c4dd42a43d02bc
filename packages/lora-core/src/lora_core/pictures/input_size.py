"""The size of a network's input as people write it: `1024`, or `256x1600` for height and width."""

from __future__ import annotations

import re

from lora_core.errors import ConfigError
from lora_core.settings.types import shown


def parse_size(
    text: str, setting: str, *, multiple: int, largest: int, such_as: str
) -> tuple[int, int]:
    """Read (height, width) in pixels.

    Args:
        setting: the flag, for messages. such_as: sizes that work, for messages.
        multiple: what each side must be one of. largest: what no side may exceed.

    Raises:
        ConfigError: anything else, with the nearest size that works.
    """
    text = str(text)
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,15}", side) for side in sides):
        raise ConfigError(f"{setting} {shown(text)}: expected {such_as}")
    numbers = [int(side) for side in sides]
    if max(numbers) > largest:
        raise ConfigError(f"{setting} {text}: a side is at most {largest} pixels")
    if any(number < multiple or number % multiple for number in numbers):
        nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in numbers)
        raise ConfigError(f"{setting} {text}: not multiples of {multiple}; try {nearest}")
    return numbers[0], numbers[-1]
