"""The command line of `isaac-lora train` as people have it from scripts on transformers.

Fields of `TrainingArguments` that cannot be chosen are taken where they say what holds anyway, and
refused with the reason where they do not; other names of settings get the one that counts. So does
`--trainer.NAME`, which other programs of this family have for `--NAME`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isaac_lora.config import Config
from isaac_lora.training_flags import ALIASES, BARE, FIXED, Fixed
from lora_core.config import parse
from lora_core.errors import ConfigError, listing
from lora_core.settings import file as config_file
from lora_core.settings.file import ConfigFile
from lora_core.settings.types import shown

SECTION = "trainer"
_FLAG = re.compile(r"--?[A-Za-z_]")  # and not -1 or -.5


@contextmanager
def settled(argv: Sequence[str], kind: type[Config] = Config) -> Iterator[list[str]]:
    """The words with settings of `kind` alone, for `lora_core.config.parse`.

    Files that hold others are replaced by temporary copies without.

    Raises:
        ConfigError: fields that cannot be chosen, and then whatever else is wrong with the words.
    """
    with tempfile.TemporaryDirectory(prefix="isaac-settings-") as folder:
        problems: list[str] = []
        copies: dict[str, str] = {}
        words = list(_flat(list(argv), Path(folder), copies, problems))
        try:
            if problems:
                raise ConfigError(listing([*problems, *_other_problems(words, kind)]))
            yield words
        except ConfigError as error:
            text = str(error)
            for copy, path in copies.items():
                text = text.replace(copy, path)
            raise ConfigError(text) from None


def _other_problems(words: Sequence[str], kind: type[Config]) -> Iterator[str]:
    try:
        parse(kind, words, prog="isaac-lora train")
    except ConfigError as error:
        yield str(error)


# -- words -----------------------------------------------------------------------------------------


def _flat(
    words: list[str], folder: Path, copies: dict[str, str], problems: list[str]
) -> Iterator[str]:
    """Yield the words that are left.

    Args:
        folder: for copies of files. copies: gets copy -> file. problems: gets what is wrong.
    """
    if words and re.search(r"\.(json|ya?ml)$", words[0], re.IGNORECASE) and words[0][0] != "-":
        words = ["--config", *words]
    while words:
        word = words.pop(0)
        if not _FLAG.match(word):
            yield word
            continue
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        values = [text] if equals else []
        while not equals and words and not _FLAG.match(words[0]):
            values.append(words.pop(0))
        if name in ("config", "config_file"):
            yield from [
                "--config",
                *(_flat_copy(path, folder, copies, problems) for path in values),
            ]
            continue
        own = own_name(name)
        if name == BARE and not values:
            yield word
        elif own in FIXED:
            problems += refusals(f"--{name}", _given(values), FIXED[own])
        elif equals:
            yield f"--{own}={text}"
        else:
            yield from (f"--{own}" if own != name else word, *values)


def own_name(name: str) -> str:
    """The name by which a setting is known here."""
    name = name.removeprefix(f"{SECTION}.")
    return ALIASES.get(name, name)


def _given(values: Sequence[str]) -> Any:
    """The value that words mean; without any, true."""
    if not values:
        return True
    text = " ".join(values)
    return None if text.lower() == "none" else config_file.value(text)


def refusals(place: str, value: Any, fixed: Fixed) -> Iterator[str]:
    """Yield a line if a value is none of those that hold anyway."""
    if not any(_same(value, held) for held in fixed.holds):
        yield f"{place} {shown(value)} cannot be set: {fixed.why}"


def _same(value: Any, held: Any) -> bool:
    """Whether they are equal; 0 is not False here."""
    return isinstance(value, bool) == isinstance(held, bool) and bool(value == held)


# -- files -----------------------------------------------------------------------------------------


def _flat_copy(path: str, folder: Path, copies: dict[str, str], problems: list[str]) -> str:
    """The file itself, or where it holds more than settings of `Config` a copy without."""
    file = config_file.read(path)
    if not any(own_name(name) in FIXED or _renamed(name) for name in file.values):
        return path
    copy = folder / f"settings{len(copies)}.json"
    copy.write_text(_on_their_lines(_settings(file, file.values, "", problems)), "utf-8")
    copies[str(copy)] = path
    return str(copy)


def _on_their_lines(settings: Mapping[str, tuple[int, Any]]) -> str:
    """JSON in which each setting stands on its line of the original, for messages about it."""
    text, line = "{", 1
    for number, (name, (wanted, value)) in enumerate(
        sorted(settings.items(), key=lambda item: item[1][0])
    ):
        text += ", " * (number > 0) + "\n" * (wanted - line)
        text += f"{json.dumps(name)}: {json.dumps(value)}"
        line = max(line, wanted)
    return text + "}\n"


def _renamed(name: str) -> bool:
    return name == SECTION or own_name(name) != name


def _settings(
    file: ConfigFile, values: Mapping[str, Any], above: str, problems: list[str]
) -> dict[str, tuple[int, Any]]:
    """(line, value) of each setting of a file, or of a section in it, by the name that counts."""
    found: dict[str, tuple[int, Any]] = {}
    for name, value in values.items():
        key, own = above + name, own_name(name)
        if own in FIXED:
            problems += refusals(f"{file.place(key)}: {key}", value, FIXED[own])
            continue
        inside = {own: (file.lines.get(key, 1), value)}
        if name == SECTION and isinstance(value, Mapping):
            inside = _settings(file, value, f"{name}.", problems)
        problems += [f"{file.place(key)}: {one} stands twice" for one in inside if one in found]
        found |= inside
    return found
