"""What the packages' demos share: options, a folder that may be emptied again, shown commands."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lora_core.config import MAX_FLOAT
from lora_core.errors import ConfigError, listing, one_line
from lora_core.guards import count_problem
from lora_core.report import say

MARK = ".demo"  # a file in every folder that a demo made, with the name of its program
COLUMNS = 100  # of a command on the screen


class Trained(Protocol):
    """Options of a demo: at least the learning rate of its training."""

    learning_rate: float


def check_options(options: Trained, least: Mapping[str, int]) -> None:
    """Refuse options that cannot work.

    Args:
        least: the smallest allowed value of each option that is a whole number.

    Raises:
        ConfigError: numbers below that, or a learning rate that is not finite and above 0.
    """
    wrong = [line for name, value in least.items() for line in count_problem(options, name, value)]
    if not 0 < options.learning_rate <= MAX_FLOAT:
        rate = f"--learning_rate is {options.learning_rate}"
        wrong.append(f"{rate}: it must be a finite number above 0")
    if wrong:
        raise ConfigError(listing(wrong))


def empty_folder(folder: Path, program: str, overwrite: bool) -> Path:
    """Make the output folder of a demo; an earlier demo's is deleted if `overwrite` says so.

    Args:
        program: such as `sam2-lora`; a demo of another program is not deleted.

    Raises:
        ConfigError: there is something, and it is no such demo, or may not be replaced.
    """
    mark, content = folder / MARK, f"{program} demo\n"
    where = f"--output {one_line(folder.absolute())}"
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not (mark.is_file() and mark.read_text() == content):
            raise ConfigError(f"{where} exists and was not made by {program} demo")
        if not overwrite:
            raise ConfigError(f"{where} exists: add --overwrite")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(content)
    return folder


def run_verb(
    program: str, verb: str, run: Callable[[list[str]], object], settings: Mapping[str, object]
) -> None:
    """Show a command of a package as one would type it, and run it.

    Args:
        run: takes the words after the verb.
        settings: of the command, in the order in which they are shown.
    """
    argv = words(settings)
    say(f"\n{typed([program, verb, *argv])}\n")
    run(argv)


def words(settings: Mapping[str, object]) -> list[str]:
    """Settings as the words of a command: `{"seed": 0}` gives `["--seed", "0"]`."""
    found: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [f"--{name}", *map(str, values)]
    return found


def typed(argv: Sequence[str]) -> str:
    """A command as one would type it, in lines that a shell takes as one.

    An option and its first value stay together.
    """
    parts: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        if before.startswith("--") and not word.startswith("--"):
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < COLUMNS - 2:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}" if part.startswith("--") else f"        {part}")
    return " \\\n".join(lines)
