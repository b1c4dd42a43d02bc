"""Folders of a run: where a checkpoint is made, gets its name, and goes; whose a folder is.

Nothing is deleted but what this program made, which a mark or a manifest inside must show, and
links are never followed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_core.checkpoint.manifest_file import MANIFEST, foreign, read
from lora_core.errors import CheckpointError
from lora_core.report import say
from lora_core.run_lock import hold
from lora_core.tensor_file import sync_folder

MARK = ".lora-core"  # in a folder that a save works in, locked by the process that saves
NEW, OLD = "new", "old"  # in there: the checkpoint that is made, and the one it replaces

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
# Of a save (tmp) or of a deletion (gone) that goes on or was interrupted.
LEFT = re.compile(rf"\.(?P<final>{NAME.pattern})\.[0-9]+\.[0-9a-f]{{8}}\.(?P<kind>tmp|gone)")


def folder(run: str | Path, step: int) -> Path:
    """Name the checkpoint of `step` in the folder of a run."""
    return Path(run) / f"checkpoint-{step}"


@contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """A private folder beside `final`, which says that it is ours and who works in it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    space = hidden(final, "tmp")
    space.mkdir(mode=0o700)
    try:
        with hold(space / MARK):
            try:
                yield space
            finally:
                empty(space, MARK)
    finally:
        with suppress(OSError):
            space.rmdir()


def hidden(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}.{kind}")


def publish(new: Path, final: Path, old: Path) -> None:
    """Put `new` in the place of `final`, which goes to `old`, or aside if it is not ours."""
    if os.path.lexists(final):
        if is_ours(final):
            os.rename(final, old)
        else:
            say(f"{final.absolute()} is not what this program saves: now {aside(final)}")
    try:
        os.rename(new, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    sync_folder(final.parent)


def aside(path: Path) -> str:
    """Rename a folder, or a link, to a name under which nothing looks for it; gives that."""
    number = 1
    while os.path.lexists(place := path.with_name(f"{path.name}.kept-{number}")):
        number += 1
    os.rename(path, place)
    return place.name


def is_ours(path: Path) -> bool:
    """Whether a folder holds what this program wrote there, whole or not, and nothing else."""
    if path.is_symlink() or not (path / MANIFEST).is_file():
        return False
    try:
        content = read(path)
    except CheckpointError:
        return False
    return path == folder(path.parent, content["step"]) and not foreign(path, content)


def delete(gone: Path) -> None:
    """Delete a checkpoint; its manifest, which shows that it is ours, goes last."""
    if (gone / MANIFEST).is_file():
        empty(gone, MANIFEST)
        (gone / MANIFEST).unlink()
    gone.rmdir()


def empty(space: Path, mark: str) -> None:
    for path in space.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != mark:
            path.unlink()
