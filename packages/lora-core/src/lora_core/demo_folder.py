"""What the packages' demos share: settings, a folder to be emptied again, threads, commands."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_core.config import MAX_FLOAT, option, parse
from lora_core.errors import ConfigError, listing, one_line
from lora_core.guards import count_problem
from lora_core.preflight import writable
from lora_core.report import duration, say

MARK = ".demo"  # a file in every folder that a demo made, with the name of its program
COLUMNS = 100  # of a command on the screen


@dataclass
class Demo:
    """Settings that all demos have; a package adds its own, `seed` and what has to be 1 or more.

    Raises:
        ConfigError: whole numbers below that, or a learning rate that is not finite and above 0.
    """

    output: str = option("demo_run", "Folder for the data, the run and the pictures.", "output")
    overwrite: bool = option(False, "Replace the results of an earlier demo.", "output")
    learning_rate: float = option(1e-3, "Peak learning rate.", "training")

    def __post_init__(self) -> None:
        whole = [name for name, value in vars(self).items() if type(value) is int]
        wrong = [
            line for name in whole for line in count_problem(self, name, 0 if name == "seed" else 1)
        ]
        if not 0 < self.learning_rate <= MAX_FLOAT:
            rate = f"--learning_rate is {self.learning_rate}"
            wrong.append(f"{rate}: it must be a finite number above 0")
        if wrong:
            raise ConfigError(listing(wrong))


D = TypeVar("D", bound=Demo)


def main(
    program: str, kind: type[D], run: Callable[[D, Path], None], argv: Sequence[str] | None
) -> int:
    """Run `<program> demo` with these words; returns the exit code.

    Args:
        kind: the demo's settings.
        run: all stages, in an empty folder.

    Raises:
        UserError: the output exists.
    """
    about = "Base, LoRA, merged: all the way."
    options = parse(kind, argv or [], prog=f"{program} demo", description=about)
    began = time.monotonic()
    writable(options.output, "--output")
    run(options, empty_folder(Path(options.output), program, options.overwrite))
    say(f"\ndone in {duration(time.monotonic() - began)}")
    return 0


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: those of tiny networks would only wait for each other.

    Two took twice the CPU time, and many times as long beside other programs.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
