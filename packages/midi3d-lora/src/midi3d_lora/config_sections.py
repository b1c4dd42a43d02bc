"""Configuration files with sections, `training: {batch_size: 4}`, for a flat `Config`.

A section is any key that is no setting and holds a mapping; its name means nothing, what is in it
counts as if it stood at the top.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError, listing
from lora_core.settings import file as config_file
from lora_core.settings.file import ConfigFile
from midi3d_lora.config import Config


@contextmanager
def without_sections(argv: Sequence[str], settings: type = Config) -> Iterator[list[str]]:
    """The words with every file that has sections replaced by a temporary one without.

    Args:
        settings: the dataclass whose fields are no sections.

    Raises:
        ConfigError: a file that cannot be read, or a setting that stands twice in it.
    """
    with tempfile.TemporaryDirectory(prefix="midi3d-settings-") as folder:
        words: list[str] = []
        for number, word in enumerate(argv):
            match = re.fullmatch(r"--config(?:[-_]file)?=(.*)", word, re.DOTALL)
            given = match[1] if match else word
            after = bool(words) and words[-1] in ("--config", "--config_file", "--config-file")
            first = number == 0 and bool(re.search(r"\.(ya?ml|json)$", word))
            if not (match or after or first):
                words.append(word)
                continue
            flat = _flat_copy(given, Path(folder) / f"settings{number}.json", settings)
            words += ["--config", flat] if match or first else [flat]
        yield words


def _flat_copy(path: str, place: Path, settings: type) -> str:
    """The file itself, or where it has sections a copy without, at `place`."""
    file = config_file.read(path)
    names = {item.name for item in fields(settings)}
    if not any(_is_section(name, value, names) for name, value in file.values.items()):
        return path
    place.write_text(json.dumps(flattened(file, names)), "utf-8")
    return str(place)


def flattened(file: ConfigFile, names: Collection[str]) -> dict[str, Any]:
    """The settings of a file without its sections.

    Args:
        names: of the settings.

    Raises:
        ConfigError: a setting that stands twice, or unknown names in sections, with their lines.
    """
    found: dict[str, Any] = {}
    lines: dict[str, str] = {}
    problems: list[str] = []

    def take(values: Mapping[str, Any], above: str) -> None:
        for name, value in values.items():
            key = f"{above}{name}"
            if _is_section(name, value, names):
                take(value, f"{key}.")
            elif name in found:
                problems.append(f"{file.place(key)}: {name} stands twice, see {lines[name]}")
            else:
                found[name], lines[name] = value, file.place(key)
                if above and name not in names:
                    problems.append(f"{file.place(key)}: unknown setting {key}; see --help")

    take(file.values, "")
    if problems:
        raise ConfigError(listing(problems))
    return found


def _is_section(name: str, value: Any, names: Collection[str]) -> bool:
    return isinstance(value, Mapping) and name not in names
