"""What a system refuses: room for files, the right to use them. POSIX only.

Three kinds of full disk, of which the first two need no rights:

    with files_limited_to(2000): ...   # EFBIG after a part of the bytes, whoever writes them
    with no_space_left(): ...          # ENOSPC when a file is flushed
    with small_disk(place, 2**20): ... # ENOSPC from a real file system; root on Linux only
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import SkipTest

NOBODY = 65534


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes, as a quota has it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_space_left() -> Iterator[None]:
    """Flushing fails for want of space, as where bytes get their place late (NFS, btrfs)."""

    def refuse(file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before, os.fsync = os.fsync, refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = before


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `place`, a new folder.

    Raises:
        unittest.SkipTest: this process may not mount one. Show without it, too, what it shows.
    """
    place.mkdir()
    options = f"size={size},mode=0755"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    can = sys.platform == "linux" and shutil.which("mount") is not None
    if not can or subprocess.run(mount, capture_output=True).returncode != 0:
        raise SkipTest("needs Linux and the right to mount a file system (CAP_SYS_ADMIN)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def in_child(work: Callable[[], int]) -> tuple[int, str]:
    """Exit status and stderr of `work` in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)  # nothing of pytest's is to be run here
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def as_nobody(work: Callable[[], int]) -> tuple[int, str]:
    """As `in_child`, as a user without rights: root, who is refused nothing, becomes nobody."""

    def weak() -> int:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return work()

    return in_child(weak)
