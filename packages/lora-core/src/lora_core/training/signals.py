"""Signals that end a run: SIGTERM of a batch system, Ctrl-C, a closed shell, a spot notice.

A command ends at once and cleanly (`stops_command`). A training notes the signal, finishes its
update and saves (`Signals`); what is ignored at the start, as under nohup, stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")

Handler = Callable[[int, FrameType | None], None]


class Stopped(SystemExit):
    """A signal ended the run: exit status 130 for SIGINT and 143 for the others."""

    def __init__(self, signum: int, message: str) -> None:
        self.status = 130 if signum == signal.SIGINT else 143
        super().__init__(self.status)
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


class Interrupted(BaseException):
    """A signal came inside `Signals.interruptible`."""


def name(signum: int) -> str:
    return signal.Signals(signum).name


@contextmanager
def _installed(handler: Handler, names: tuple[str, ...]) -> Iterator[None]:
    """Let `handler` answer these signals; Python allows that in the main thread only."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = [getattr(signal, name, None) for name in names]  # not all on Windows
        before = {number: signal.getsignal(number) for number in found if number is not None}
    own = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in own:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in own.items():
            signal.signal(number, old)


def _die(signum: int) -> None:
    """In a forked child that has inherited a handler: end as if there were none."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


@contextmanager
def stops_command() -> Iterator[None]:
    """Raise `Stopped` for SIGTERM, SIGHUP and SIGUSR1; Ctrl-C is Python's KeyboardInterrupt."""
    owner = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return _die(signum)
        raise Stopped(signum, f"stopped by {name(signum)}")

    with _installed(stop, NAMES[1:]):
        yield


class Signals:
    """Notes the signals that come inside `with Signals(...) as signals`.

    A SIGINT after another signal raises `Stopped` at once.

    Args:
        resume: for that message: how to continue from the last complete checkpoint.

    Attributes:
        received: number of the first signal, 0 before it.
    """

    def __init__(self, resume: str = "") -> None:
        self.resume = resume
        self.received = 0
        self._owner, self._may_interrupt = os.getpid(), False
        self._handlers = _installed(self._note, NAMES)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker before `shield_worker`, or another child
            return None if signum == signal.SIGINT else _die(signum)
        if self.received:
            if signum == signal.SIGINT:
                raise Stopped(
                    signum, f"stopped at once; complete checkpoints are as they were{self.resume}"
                )
            return None
        self.received = signum
        if os.environ.get("RANK", "0") == "0":
            again = "; Ctrl-C again leaves at once" if signum == signal.SIGINT else ""
            # Not by print, which is not reentrant.
            os.write(2, f"\n{name(signum)}: finishing this step and saving{again}\n".encode())
        if self._may_interrupt:
            self._may_interrupt = False
            raise Interrupted
        return None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` where a signal finds the code inside, or has come before."""
        self._may_interrupt = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._may_interrupt = False

    def __enter__(self) -> Signals:
        self._handlers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handlers.__exit__(*error)


def shield_worker(worker: int, *, init: Callable[[int], object] | None, leaving: Any) -> None:
    """Start a DataLoader worker that outlives signals to the whole process group.

    Ctrl-C, `timeout` and `scancel` reach every process; a worker that died of it would end the
    training before its step is done and saved.

    Args:
        worker: number of the worker.
        init: what else starts a worker.
        leaving: shared value that the main process sets when it ends its workers.
    """
    parent = os.getppid()

    def leave(signum: int, frame: FrameType | None) -> None:
        if leaving.value or os.getppid() != parent:
            os._exit(0)

    for each in NAMES:
        if hasattr(signal, each):
            signal.signal(getattr(signal, each), leave if each == "SIGTERM" else signal.SIG_IGN)
    if init is not None:
        init(worker)
