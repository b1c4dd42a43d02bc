"""`manifest.json`, written last into a checkpoint: what belongs to it, and whether it is whole."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_core.adapters.origin import versions
from lora_core.checkpoint.state import from_json, pack, to_json, unpack
from lora_core.errors import CheckpointError, listing, printable
from lora_core.report import say
from lora_core.tensor_file import sync_folder

FORMAT = 2
MANIFEST = "manifest.json"
LIMIT = 64 * 2**20  # bytes of a manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")
_whole: set[tuple[Any, ...]] = set()  # stamps of the folders that were found whole


class Damaged(CheckpointError):
    """A checkpoint whose files are not those that were saved."""


def write(folder: Path, step: int, record: Mapping[str, Any]) -> None:
    """Flush every file in `folder` to the disk, then write the manifest over them, flushed too.

    Args:
        record: what else it says, with plain values: config, fingerprints, world.
    """
    files = {name: _describe(folder / name) for name in sorted(_names(folder))}
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))
    packed, store = pack(dict(record))
    if store:
        raise CheckpointError(f"a manifest holds no tensors, but {', '.join(store)} is one")
    content = {"format": FORMAT, "step": step, "versions": _versions(), **packed, "files": files}
    content["sha256"] = _digest(content)
    with open(folder / MANIFEST, "xb") as file:
        file.write(to_json(content, indent=1))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read(folder: Path) -> dict[str, Any]:
    """Read and check a manifest, not the files it lists.

    Raises:
        Damaged: it is missing or not as it was written.
        CheckpointError: it is of a later format, or lists files outside of the folder.
    """
    file = folder / MANIFEST
    try:
        if file.is_symlink():
            raise ValueError("a link")
        if file.stat().st_size > LIMIT:
            raise ValueError(f"larger than {LIMIT:,} bytes")
        packed = from_json(file.read_bytes())
        if not isinstance(packed, dict) or type(packed.get("format")) is not int:
            raise ValueError("without a format")
        if packed["format"] > FORMAT:
            raise CheckpointError(
                f"{folder.absolute()} was written by format {packed['format']}, this program reads "
                f"up to {FORMAT}: update lora-core"
            )
        if packed.pop("sha256", None) != _digest(packed):
            raise ValueError("changed after it was written")
        content = unpack(packed, {})
        _check(content)
    except FileNotFoundError:
        raise Damaged(f"{folder.absolute()} is incomplete: it has no {MANIFEST}") from None
    except OSError as error:
        raise Damaged(f"cannot read {file.absolute()}: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{file.absolute()} is damaged: {error}") from error
    for name in content["files"]:
        _check_name(folder, name)
    return {"versions": {}, "config": {}, "fingerprints": {}, "world": {}, **content}


def _check(content: dict[str, Any]) -> None:
    if type(content["step"]) is not int or content["step"] < 0:
        raise ValueError(f"step is {content['step']!r}")
    for name, entry in content["files"].items():
        valid = isinstance(name, str) and type(entry["size"]) is int
        if not valid or not _SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"the entry of {name!r} has no size or no sha256")


def _check_name(folder: Path, name: str) -> None:
    """Files of a checkpoint lie below its folder: no way up, no absolute path, no drive."""
    if re.search(r"[\\:\0]", name) or {"", ".", ".."} & {*name.split("/")}:
        raise CheckpointError(
            f"{folder.absolute() / MANIFEST} lists {name!r}, which is outside of the checkpoint: "
            "do not use this checkpoint"
        )


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with size and sha256 in the manifest, and give the manifest.

    A folder that was found whole is not read again while its files keep inode and change time.

    Raises:
        Damaged: the message has every file that is missing or changed.
        CheckpointError: as `read`.
    """
    content = read(folder)
    stamp = _stamp(folder, content)
    if stamp in _whole:
        return content
    problems = [
        f"{name} {problem}"
        for name, entry in content["files"].items()
        if (problem := _problem(folder, name, entry))
    ]
    if problems:
        raise Damaged(f"{folder.absolute()} is damaged: {_some(problems)}")
    if strange := foreign(folder, content):
        say(f"{folder.absolute()} holds files that are not of it: {_some(strange)}")
    _whole.add(stamp)
    return content


def _some(items: list[str]) -> str:
    return printable(listing(items, 4).replace("\n", ", "))


def trust(folder: Path) -> None:
    """Note that this process has just written a folder: no need to read it again."""
    _whole.add(_stamp(folder, read(folder)))


def foreign(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """Files and links in a folder that its manifest does not know."""
    return sorted({*_names(folder)} - {MANIFEST, *content["files"]})


def _names(folder: Path) -> Iterator[str]:
    """Everything in a folder but the folders, as a/b/c; links are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder).as_posix()


@functools.cache
def _versions() -> dict[str, str]:
    """Of the packages; looking them up takes longer than writing a small checkpoint."""
    return versions()


def _describe(path: Path) -> dict[str, Any]:
    """Flush a file to the disk and give what the manifest says about it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": sha256}


def _problem(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
    """What is wrong with a file, or ""."""
    path = folder / name
    try:
        if path.resolve() != folder.resolve() / name:
            return "is a link"
        if not path.is_file():
            return "is no file" if path.exists() else "is missing"
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size:,} bytes instead of {entry['size']:,}"
        with open(path, "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if same else "is not what was saved: its sha256 differs"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(dict(sorted(content.items())))).hexdigest()


def _stamp(folder: Path, content: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a folder from a changed one without reading it: nobody can set a change time."""
    found = []
    for name in (MANIFEST, *content["files"]):
        try:
            status = (folder / name).stat()
        except OSError:
            return (object(),)  # like no other
        found.append((status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns))
    return (folder.absolute(), *foreign(folder, content), *found)
