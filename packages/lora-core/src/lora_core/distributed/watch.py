"""Knows of every process of a run whether it is alive, so that none waits for one that is gone.

A collective that waits for a dead process cannot be interrupted from Python, and the time limit of
a process group must be longer than the slowest step. So a thread of each process posts a sign of
life in the store where the processes met, and looks for those of the others. Whoever fails leaves
its last words there first. The thread ends a process that does not get away by itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.distributed import Store

from lora_core.errors import UserError, printable

POLL = 0.5  # seconds between two looks
SILENCE = 60.0  # without a sign of life a process counts as lost; native code may keep the GIL
GRACE = 5.0  # for the main thread, to leave by itself after another process has failed


class RankError(UserError):
    """Another process of the run has failed or died; the exit status is the one of that process."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Failure:
    """The first failure of a run: the guilty rank, its exit status, and its message."""

    rank: int
    status: int
    message: str
    lost: bool = False  # it could not say so itself

    def error(self) -> RankError:
        """What the other ranks raise."""
        said = self.message if self.lost else f"rank {self.rank} stopped the run: {self.message}"
        return RankError(said, self.status)


@dataclass
class Peer:
    """A process of the run: where it runs, and when it was last heard of."""

    rank: int
    pid: int
    host: str
    space: str  # processes with the same one see each other's numbers
    at: str = "?"  # which line its main thread is at
    beat: int = 0
    heard: float = 0.0

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {printable(self.host)})"


def this_process(rank: int) -> Peer:
    """What the others need to know of this process, to look for it."""
    return Peer(rank, os.getpid(), socket.gethostname(), _process_space())


class Watch:
    """Watches the other processes from `start` until `leave`.

    Args:
        store: where the processes meet; used by this thread and shortly by the main one.
        rank: of this process.
        everyone: all processes of the run, this one included.
        hosts_store: the others lose the store when this process ends, so it leaves last.
    """

    def __init__(
        self, store: Store, rank: int, everyone: Sequence[Peer], hosts_store: bool
    ) -> None:
        self.store, self.rank, self.hosts_store = store, rank, hosts_store
        self._own = replace(everyone[rank])
        self._peers = {peer.rank: replace(peer) for peer in everyone if peer.rank != rank}
        self._others = list(self._peers)  # `_peers` forgets those who have left
        self.failure: Failure | None = None
        self.failed = threading.Event()
        self.silence = SILENCE
        self._heard = 0.0
        self._away = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._post()
        self._thread.start()

    def leave(self) -> None:
        """Watch no longer, and be missed by nobody."""
        with suppress(RuntimeError):  # the store has gone before
            self.store.set(f"left/{self.rank}", "")
            if self.hosts_store:
                self._wait_for_others()
        self._away.set()
        self._thread.join()

    def publish(self, failure: Failure) -> Failure:
        """Tell the others, unless one was faster; gives the failure that counts."""
        try:
            known = self.store.compare_set("failure", "", json.dumps(asdict(failure)))
            failure = Failure(**json.loads(known))
        except RuntimeError:
            pass  # no store any more: they know
        self.failure = self.failure or failure
        self.failed.set()
        return self.failure

    def places(self) -> str:
        """Say at which line the others are, as far as they are heard of."""
        with suppress(RuntimeError):  # the store has gone
            self._hear(time.monotonic())
        peers = [self._peers[rank] for rank in sorted(self._peers)]
        return "; ".join(f"rank {peer.rank} is at {printable(peer.at)}" for peer in peers[:8])

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._away.wait(POLL) and not self.failure:
                self._post()
                self._look()
        except RuntimeError as error:
            self._store_lost(error)
        if self.failure:
            own = self.failure.rank == self.rank  # then the main thread is on its way out
            if not self._away.wait(SILENCE if own else GRACE):
                _end(self.rank, self.failure)

    def _post(self) -> None:
        """Give a sign of life, with what the others need to know of this process."""
        self._own.beat, self._own.at = self._own.beat + 1, _place()
        self.store.set(f"rank/{self.rank}", json.dumps(asdict(self._own)))

    def _look(self) -> None:
        if self.store.check(["failure"]):
            self.publish(Failure(self.rank, 1, ""))  # which gives the one that is there
            return
        now = time.monotonic()
        if now - self._heard > min(self.silence / 10, 5):
            self._heard = now
            self._hear(now)
        for peer in list(self._peers.values()):
            gone = peer.space == self._own.space and not _is_alive(peer.pid)
            silent = peer.beat > 0 and now - peer.heard > self.silence
            if (gone or silent) and not self._has_left(peer.rank):
                what = "was killed or crashed" if gone else f"is silent for {self.silence:.0f} s"
                self.publish(_lost(peer, what))
                return

    def _hear(self, now: float) -> None:
        """Take the signs of life of all who have come."""
        for rank, known in list(self._peers.items()):
            if self.store.check([f"rank/{rank}"]):
                seen = Peer(**json.loads(self.store.get(f"rank/{rank}")))
                if known.beat != seen.beat:
                    self._peers[rank] = replace(seen, heard=now)

    def _has_left(self, rank: int) -> bool:
        if not self.store.check([f"left/{rank}"]):
            return False
        self._peers.pop(rank, None)
        return True

    def _store_lost(self, error: RuntimeError) -> None:
        """The store lives in rank 0 or its launcher: without it rank 0 is gone as well."""
        reason = str(error).splitlines()[0]
        what = f"ended, as the connection to it did ({reason})"
        self.publish(_lost(self._peers.get(0, self._own), what))

    def _wait_for_others(self) -> None:
        """Wait until every process has left; after a failure until they have heard of it."""
        failed: float | None = None
        while failed is None or time.monotonic() - failed < 3 * POLL:
            if self.failure and failed is None:
                failed = time.monotonic()
            lost = self.failure.rank if self.failure and self.failure.lost else None
            if all(self.store.check([f"left/{rank}"]) for rank in self._others if rank != lost):
                return
            time.sleep(0.05)


def _lost(peer: Peer, what: str) -> Failure:
    return Failure(
        peer.rank,
        2,
        f"{peer.name} {what}. Its machine's log may say why (out of memory is the usual reason); "
        "continue from the last checkpoint with --resume",
        lost=True,
    )


def _place() -> str:
    """The line that the main thread is at, the innermost one outside of libraries."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    last = frame
    while frame is not None:
        path = frame.f_code.co_filename
        if "site-packages" not in path and not path.startswith((sys.base_prefix, "<")):
            last = frame
            break
        frame = frame.f_back
    if last is None:
        return "?"
    return f"{os.path.basename(last.f_code.co_filename)}:{last.f_lineno} ({last.f_code.co_name})"


def _process_space() -> str:
    """Which processes have numbers that mean the same here: of one container on one machine."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # shared with nobody


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _end(rank: int, failure: Failure) -> None:
    """Leave from within the thread: the main one is stuck where Python cannot reach it."""
    if _finishing.acquire(timeout=SILENCE):
        with suppress(OSError, ValueError):
            who = f"[rank {rank}] " if rank else ""
            sys.stderr.write(f"{who}error: {printable(failure.error())}\n")
            sys.stderr.flush()
            sys.stdout.flush()
    end_children()
    os._exit(failure.status or 1)


def end_children() -> None:
    """End the workers of this process, which would notice its end only seconds later."""
    for child in multiprocessing.active_children():
        child.kill()


_finishing = threading.RLock()


@contextmanager
def finishing() -> Iterator[None]:
    """What is done in here, such as writing a file, is finished although another process died."""
    with _finishing:
        yield


def describe(error: BaseException, rank: int) -> Failure:
    """What the others are told of an exception in this process."""
    status: Any = getattr(error, "exit_code", None)
    if isinstance(error, SystemExit):
        status = error.code
    elif isinstance(error, KeyboardInterrupt):
        status = 130
    plain = isinstance(error, (UserError, SystemExit))
    name = "" if plain else f"{type(error).__name__}: "
    message = f"{name}{error}".removesuffix(": ")
    return Failure(rank, status if isinstance(status, int) and status else 1, message)
