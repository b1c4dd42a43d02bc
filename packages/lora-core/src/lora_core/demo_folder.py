"""What the packages' demos share: a folder that they may empty again, the words of a command."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from lora_core.errors import ConfigError, one_line

MARK = ".demo"  # a file in every folder that a demo made, with the name of its program


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


def words(settings: Mapping[str, object]) -> list[str]:
    """Settings as the words of a command: `{"seed": 0}` gives `["--seed", "0"]`."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def typed(argv: list[str]) -> str:
    """A command as one would type it."""
    return shlex.join(argv)
