"""Results of a long command, each kept when it is found, so that a stopped command goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_core.tensor_file import write_json

UNFINISHED = "unfinished"  # folder beside results that are not written yet


class KeptResults:
    """Plain values by name, a JSON file each.

    A value is used again only for what it follows from: settings, models, data, as plain values of
    which a digest stands beside it.

    Args:
        folder: where the files are; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, follows_from: object) -> Any | None:
        """The value of this name; None: none is there, a damaged one, or of something else."""
        content = _read(self._path(name))
        if content is None or content["follows_from"] != _digest(follows_from):
            return None
        return content["result"]

    def keep(self, name: str, follows_from: object, result: object) -> None:
        """Keep a value.

        Raises:
            CheckpointError: the file cannot be written.
        """
        content = {"follows_from": _digest(follows_from), "result": result}
        write_json(self._path(name), content)

    def remove(self) -> None:
        """Delete what was kept, by whatever command, and folders that are empty then."""
        for path in self.folder.rglob("*.json"):
            if _read(path) is not None:
                path.unlink()
        folders = sorted(path for path in self.folder.rglob("*") if path.is_dir())
        for folder in [*reversed(folders), self.folder]:
            with suppress(OSError):  # there is something else in it, or it was never made
                folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a file; None: it is none of ours, or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and content.keys() == {"follows_from", "result"}
    return content if ours else None


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Place, length and time of change of files: what stands for their content in `follows_from`.

    Args:
        paths: files, and folders for all files directly in them.

    Raises:
        OSError: one is not there.
    """
    found = []
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
    for path in sorted(file for file in files if not file.is_dir()):
        status = path.stat()
        found.append((str(path.absolute()), status.st_size, status.st_mtime_ns))
    return found


def _digest(follows_from: object) -> str:
    text = json.dumps(follows_from, default=str).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()
