"""Kill a process at each of its file operations, one after the other, and look at what is left.

    def save():
        checkpoint.save(run, 2, state, fill)

    def look(n):
        assert checkpoint.load(checkpoint.latest(run))["step"] in (1, 2)

    kill_points(save, look, prepare=lambda: fresh_copy(run))

The process is a fork of this one, so that nothing is imported anew: use one torch thread. Counted
is what changes the disk, if Python does it: making, opening for writing, writing, flushing,
renaming, changing and deleting files and folders. A write is killed in its middle: half of it is on
the disk. Libraries that write from C or Rust by themselves are not seen.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from typing import Any

_VERBS = ("chmod", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate")
CHANGES = {f"os.{verb}" for verb in _VERBS}  # as audit events
SECONDS = 120  # until a child counts as hanging

_open, _write, _fsync = open, os.write, os.fsync  # before they are wrapped


def kill_points(
    action: Callable[[], object],
    check: Callable[[int], object],
    prepare: Callable[[], object] = lambda: None,
    limit: int = 2000,
    at: Iterable[int] | None = None,
) -> int:
    """Run `action` in a child that dies by SIGKILL at its n-th file operation, for every n.

    Args:
        check: called with n after each death, and once more after a run that came to its end;
            raises AssertionError if what it finds must not be.
        prepare: called before each run: puts the files back.
        limit: operations after which something must be wrong.
        at: only these n, in their order, for actions of many seconds; see `changes_of_names`.

    Returns:
        The number of points of death: of operations, unless `at` says which of them.

    Raises:
        AssertionError: `action` failed, with its traceback; or nothing was counted; or `check`.
    """
    done = 0
    for n in range(1, limit) if at is None else at:
        prepare()
        killed = _run(action, n)
        check(n)
        if not killed:
            assert n > 1, "the action does nothing to any file"
            return done
        done += 1
    if at is None:
        raise AssertionError(f"more than {limit} file operations")
    return done


def operations(action: Callable[[], object]) -> list[tuple[str, str]]:
    """Run `action` in a child, and list its file operations as (kind, path)."""
    with tempfile.TemporaryFile() as log:
        _run(action, sys.maxsize, log.fileno())
        log.seek(0)
        lines = log.read().decode("utf-8", "surrogateescape").splitlines()
    pairs = [line.split("\t", 1) for line in lines]
    return [(kind, path) for kind, path in pairs]


def changes_of_names(done: Iterable[tuple[str, str]]) -> list[int]:
    """Where to kill so that every set of whole files that an action passes through is seen.

    Args:
        done: from `operations`. Between two changes of names only files that no name says to be
            whole grow: there one point, in the middle of a write, is enough.

    Returns:
        Numbers of operations, from 1: those that change a name, and the last write before each.
    """
    found, written = [], 0
    for n, (kind, _) in enumerate(done, 1):
        if kind == "write":
            written = n
        elif kind in ("rename", "remove", "rmdir", "link", "symlink"):
            found += [written, n] if written else [n]
            written = 0
    return found + [written] * (written > 0)


def _run(action: Callable[[], object], deadly: int, log: int | None = None) -> bool:
    """Whether a child that calls `action` was killed at its operation of number `deadly`."""
    with tempfile.TemporaryFile() as report:
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _child(action, deadly, log, report.fileno())
        _, status = os.waitpid(child, 0)
        report.seek(0)
        text = report.read().decode()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, f"the action failed before operation {deadly}:\n{text}"
    return False


def _child(action: Callable[[], object], deadly: int, log: int | None, report: int) -> None:
    status = 1
    try:
        signal.alarm(SECONDS)
        counter = _Counter(deadly, log)
        counter.install()
        action()
        status = 0
    except BaseException:
        _write(report, traceback.format_exc().encode())
    finally:
        os._exit(status)  # nothing of pytest's is to be run here


class _Counter:
    """Counts operations, and kills its own process at one of them.

    Attributes:
        left: operations until death.
        log: descriptor of a file that gets a line for each operation.
    """

    def __init__(self, deadly: int, log: int | None) -> None:
        self.left, self.log = deadly, log

    def install(self) -> None:
        """Watch this process until its end: what Python reports by itself, and what it does not."""
        sys.addaudithook(self.audit)
        os.fsync = self.fsync  # type: ignore[assignment]
        os.write = self.write
        builtins.open = io.open = self.open

    def is_deadly(self, kind: str, path: Any) -> bool:
        """Note an operation that is about to begin; tells whether it is the last one."""
        if self.log is not None:
            _write(self.log, f"{kind}\t{os.fsdecode(path)}\n".encode("utf-8", "surrogateescape"))
        self.left -= 1
        return self.left == 0

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        counted = event in CHANGES
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            flags = args[2] if isinstance(args[2], int) else 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            counted = bool(writes) and not _is_special(args[0])
        if counted and self.is_deadly(event.removeprefix("os."), _path(args[0])):
            _die()

    def fsync(self, file: Any) -> None:
        handle = file if isinstance(file, int) else file.fileno()
        if self.is_deadly("fsync", _path(handle)):
            _die()
        _fsync(handle)

    def write(self, handle: int, data: Any) -> int:
        """Write, but only the first half if it is the last thing that this process does."""
        if stat.S_ISREG(os.fstat(handle).st_mode) and self.is_deadly("write", _path(handle)):
            half = memoryview(data).cast("B")
            _write(handle, half[: len(half) // 2])
            _die()
        return _write(handle, data)

    def open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """As `open`, but what is written goes through `write`."""
        if not set("wax+") & set(mode):
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.counter = self
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)


class _Raw(io.FileIO):
    counter: _Counter

    def write(self, data: Any) -> int:
        return self.counter.write(self.fileno(), data)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _path(file: Any) -> Any:
    """The path of an open file, where the system tells."""
    link = f"/proc/self/fd/{file}"
    return os.readlink(link) if isinstance(file, int) and os.path.lexists(link) else str(file)


def _is_special(path: Any) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # it will be made
        return False
