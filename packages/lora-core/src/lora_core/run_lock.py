"""One process at a time in a folder: a lock file that names its holder and dies with it.

The system's own lock (flock) decides where the file system has one: it ends with its process,
whatever kills it, over NFS and between containers, too, where process numbers say nothing. Where
there is none, the process number in the file decides, and only on the same host.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.report import say

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: set[int] = set()  # file descriptors


class InUse(ConfigError):
    """Another process that is alive holds the lock; the message has process, host, and file."""


@contextmanager
def lock(run: str | Path) -> Iterator[None]:
    """Keep the folder of a run for this process until the block ends; it is made if missing.

    Processes that this one forks (the workers of a data loader) do not hold it: a lock never
    outlives the process that took it. What a dead process left is taken over, and said.

    Raises:
        ConfigError: another process writes there, or the file cannot be made.
    """
    path = Path(run) / LOCK
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = stack.enter_context(hold(path))
        except OSError as error:
            raise ConfigError(
                f"cannot lock {path.absolute()}: {error.strerror or error}. Choose an output "
                "folder that can be written"
            ) from error
        if before:
            say(f"{path.absolute()} was left by {before}, which has ended: taken over")
        yield


@contextmanager
def hold(path: Path) -> Iterator[str]:
    """Hold the lock file `path`, and delete it at the end; gives who left it behind, or "".

    Raises:
        InUse: a process that is alive holds it.
        OSError: the file cannot be made.
    """
    owner = os.getpid()
    handle, before = _take(path)
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps({"pid": owner, "host": socket.gethostname()}).encode())
        yield before
    finally:
        if os.getpid() == owner:  # not in a fork of it
            with suppress(OSError):  # its folder was deleted
                path.unlink()
            _close(handle)


def _take(path: Path) -> tuple[int, str]:
    """Open and lock `path`; gives its descriptor and who left it behind, or ""."""
    while True:
        existed = path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        _held.add(handle)
        try:
            before = _read(handle)
            if remedy := _refusal(handle, before, existed, path):
                who = _name(before) if before else "another process"
                raise InUse(f"{path.parent.absolute()} is being written by {who}: {remedy}")
            # Its last holder may have deleted the file between our opening and our locking it.
            if _is(handle, path):
                return handle, _name(before) if before else ""
        except BaseException:
            _close(handle)
            raise
        _close(handle)


def _refusal(handle: int, before: dict[str, Any], existed: bool, path: Path) -> str:
    """What to do if somebody holds the lock; "": this process has it now."""
    answer = flock(handle)
    if answer is not None:
        wait = f"wait for its end or choose another folder (lock: {path.absolute()})"
        return "" if answer else wait
    if not existed or (before.get("host") == socket.gethostname() and _is_dead(before.get("pid"))):
        return ""
    return f"wait for its end or choose another folder. If it has ended, delete {path.absolute()}"


def flock(handle: int) -> bool | None:
    """Take the system's lock on an open file: had, held by another, or None: there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return None
    return True


def _is_dead(pid: Any) -> bool:
    if os.name != "posix":  # there, signal 0 is not harmless
        return False
    try:
        os.kill(int(pid), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, TypeError, ValueError):
        return False
    return False


def _read(handle: int) -> dict[str, Any]:
    """What the holder wrote; {} if it had no time to."""
    try:
        content = json.loads(os.read(handle, 4096))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _let_go() -> None:
    """In a fork: its copy of a descriptor would keep the lock after the death of the holder."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
