"""Values of JSON files in messages, as JSON has them: null and true, not Python's None and True.

What is shown of a value is short: the files are those of users, and may hold anything.
"""

from __future__ import annotations

import json
from typing import Any

from lora_core.settings.types import shown


def in_json(value: Any) -> str:
    """A value: null, true and false in JSON's words, others quoted, at most 80 characters."""
    plain = value is None or isinstance(value, bool)
    return json.dumps(value) if plain else shown(value)


def kind(value: Any) -> str:
    """What a value is, "a list" or "text"; of a number, null, true and false the value itself."""
    if value is None or isinstance(value, bool | int | float):
        return in_json(value)
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return "an object" if isinstance(value, dict) else "text"
