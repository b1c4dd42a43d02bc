"""Several processes on this machine, as torchrun starts them, forked from the test itself.

Forking spares each process the seconds of importing torch. It must come before the test's own
process joins a group, and with one torch thread.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_core import errors
from lora_core.distributed.watch import end_children


@dataclass(frozen=True)
class Ended:
    """How one process has ended.

    Attributes:
        status: its exit status; negative: the signal that killed it.
        output: what it wrote to stdout and stderr.
        seconds: how long it ran.
        left_behind: processes it had started that lived on for more than `patience` seconds.
        in_time: False: it was still running at the time limit, and was killed.
    """

    rank: int
    status: int
    output: str
    seconds: float
    left_behind: tuple[int, ...]
    in_time: bool


def run(
    target: Callable[[int], int | None],
    world: int = 2,
    *,
    limit: float = 60.0,
    timeout: float = 15.0,
    patience: float = 8.0,
    env: Mapping[str, str] | None = None,
    envs: Mapping[int, Mapping[str, str]] | None = None,
) -> list[Ended]:
    """Call `target(rank)` in `world` processes, as commands, and wait until all have ended.

    Args:
        target: its result is the exit status, and a `UserError` ends it as it ends a command.
        limit: seconds after which all that still run are killed.
        timeout: seconds for one collective.
        patience: seconds for the processes that a rank has started to end after it.
        env: further variables of all ranks; envs: of single ones.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(world):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(env or {}),
                **((envs or {}).get(rank, {})),
            }
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _child(target, rank, variables, Path(folder, str(rank)), timeout)
            pids.append(pid)
        return _wait(pids, Path(folder), limit, patience)


def free_port() -> int:
    """A TCP port of the loopback device that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def members(group: int) -> tuple[int, ...]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            state, _, pgrp = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                found.append(int(path.name))
    return tuple(found)


def _child(
    target: Callable[[int], int | None],
    rank: int,
    variables: Mapping[str, str],
    output: Path,
    timeout: float,
) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        faulthandler.enable(sys.stderr)
        os.environ.update(variables)
        from lora_core import distributed

        distributed.TIMEOUT = timeout
        status = errors.run(lambda _: target(rank), [])
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        end_children()
        os._exit(status)  # gloo's threads may abort the interpreter's teardown


def _wait(pids: list[int], folder: Path, limit: float, patience: float) -> list[Ended]:
    began = time.monotonic()
    ended: dict[int, Ended] = {}
    late: set[int] = set()
    while len(ended) < len(pids):
        for rank, pid in enumerate(pids):
            if rank in ended:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            seconds = time.monotonic() - began
            left = _left_behind(pid, patience)
            output = (folder / str(rank)).read_text(encoding="utf-8", errors="replace")
            code = os.waitstatus_to_exitcode(status)
            ended[rank] = Ended(rank, code, output, seconds, left, rank not in late)
        if time.monotonic() - began > limit and not late:
            late = set(range(len(pids))) - set(ended)
            for rank in late:
                _kill(pids[rank])
        time.sleep(0.02)
    return [ended[rank] for rank in range(len(pids))]


def _left_behind(group: int, patience: float) -> tuple[int, ...]:
    deadline = time.monotonic() + patience
    while (left := members(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _kill(group)
    return left


def _kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
