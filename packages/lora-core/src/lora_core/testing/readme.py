"""The commands of a README, parsed by the programs they call."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_core.errors import UserError

LAUNCHERS = frozenset({"python", "python3", "torchrun", "accelerate"})
_BLOCK = re.compile(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


@dataclass
class Command:
    """One command of a README: the program and the words behind it."""

    program: str
    argv: list[str] = field(default_factory=list)


def readme_commands(readme: str | Path, programs: Sequence[str]) -> list[Command]:
    """Every use of these programs in the README's bash blocks.

    Args:
        programs: console names (`sam2-lora`), scripts (`train_lora.py`), modules (`sam2_lora`,
            as `python -m` takes it). Launchers and `NAME=value` before them are skipped.
    """
    found = []
    for block in _BLOCK.findall(Path(readme).read_text("utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            for part in _split(words):
                command = _command(part, programs)
                if command:
                    found.append(command)
    return found


def _split(words: list[str]) -> Iterator[list[str]]:
    """Cut a line at the shell's separators."""
    part: list[str] = []
    for word in words:
        if word in {"&&", "||", "|", "&", ";"}:
            yield part
            part = []
        elif word.endswith(";"):
            yield [*part, word[:-1]]
            part = []
        else:
            part.append(word)
    yield part


def _command(words: list[str], programs: Sequence[str]) -> Command | None:
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:
        return None
    if words[0] in programs:
        return Command(words[0], words[1:])
    if Path(words[0]).name not in LAUNCHERS:
        return None
    for i, word in enumerate(words[1:], 1):
        script = Path(word).name if word.endswith(".py") else word if words[i - 1] == "-m" else ""
        if script in programs:
            return Command(script, words[i + 1 :])
    return None


def check_commands(
    readme: str | Path, parsers: Mapping[str, Callable[[list[str]], object]]
) -> list[Command]:
    """Parse each command of the README with the program's real parser; give what was checked.

    Args:
        parsers: program -> a function that parses its argv and raises for a bad one.

    Raises:
        AssertionError: naming every command that is refused, or that no program is ever used.
    """
    commands = readme_commands(readme, list(parsers))
    assert commands, f"{readme} uses none of {sorted(parsers)} in a bash block"
    refused = []
    for command in commands:
        try:
            parsers[command.program](command.argv)
        except UserError as error:
            refused.append(f"{command.program} {shlex.join(command.argv)}: {error}")
        except SystemExit as stop:  # argparse's way to end `--help`, or to refuse
            if stop.code:
                refused.append(f"{command.program} {shlex.join(command.argv)}: exit {stop.code}")
    assert not refused, "\n".join([f"{readme}:", *refused])
    return commands
