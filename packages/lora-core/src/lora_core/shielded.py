"""Call a function on many inputs in processes that may die: decoders of files nobody vouches for.

A native decoder can crash, hang, or take all memory. Here that costs a worker process and one
input, which gets a reason instead of a value; the run goes on. Workers answer in JSON, so that a
decoder that was taken over cannot hand an object to the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from lora_core.errors import DataError, UserError

# Elsewhere the function is called in this process: without a shield, with the same outcome.
CAN_FORK = sys.platform == "linux"
AT_ONCE = 16  # inputs that a worker is given in one message
MOST_WORKERS = 32
MOST_BYTES = 2**24  # of one answer
# Signals by which a decoder ends itself. Others come from outside: the input may be innocent.
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}


class Limits(NamedTuple):
    """What one input may take."""

    seconds: float = 60.0
    memory: int = 4 * 2**30  # bytes, beyond what the process has at its start


LIMITS = Limits()


class Outcome(NamedTuple):
    """What the function gave for one input, or why it gave nothing."""

    value: Any = None  # plain values, as JSON has them
    problem: str = ""


def each(
    function: Callable[[int], Any],
    count: int,
    *,
    name: Callable[[int], str] = "input {}".format,
    limits: Limits | None = None,
    workers: int | None = None,
    worth: int = 8,
) -> Generator[tuple[int, Outcome], None, None]:
    """Yield (index, outcome) of `function(index)` for each index below `count`, as they come.

    A worker inherits this process as it is (fork), so the function may be a closure; it must
    neither touch CUDA nor start threads. Close the generator to end the workers at once.

    Args:
        function: gives plain values. A `UserError` that it raises is the outcome's problem.
        name: of an input, for problems that the function cannot report itself.
        limits: for each input; default: `LIMITS`.
        workers: processes at most; default: one per CPU that this process may use.
        worth: inputs that are worth one more worker; 1 where each takes seconds.

    Raises:
        RuntimeError: the function raised something else, which is a fault of the program.
        DataError: no process can be started.
    """
    limits = limits or LIMITS
    if not CAN_FORK:
        yield from ((index, _attempt(function, index, name, limits)) for index in range(count))
        return
    most = min(workers or len(os.sched_getaffinity(0)), MOST_WORKERS, -(-count // worth))
    crew = _Crew(function, name, limits, most)
    crew.todo.extend(range(count))
    try:
        while crew.hire():
            yield from crew.answers()
    finally:
        for worker in crew.workers:
            worker.end()


def _attempt(
    function: Callable[[int], Any], index: int, name: Callable[[int], str], limits: Limits
) -> Outcome:
    try:
        return Outcome(function(index))
    except UserError as error:
        return Outcome(problem=str(error))
    except MemoryError:
        size = f"{limits.memory / 2**30:.3g} GB"
        return Outcome(problem=f"{name(index)}: needs more than {size} of memory to be decoded")


class _Worker:
    """A process and the inputs that it was given and has not answered, oldest first."""

    def __init__(self, crew: _Crew) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, its_end = context.Pipe()
        foreign = [self.connection, *(worker.connection for worker in crew.workers)]
        self.process = context.Process(
            target=_work, args=(crew.function, crew.name, crew.limits, its_end, foreign)
        )
        self.process.daemon = True
        self.process.start()
        its_end.close()
        self.waiting: deque[int] = deque()
        self.waited = 0.0  # seconds for the oldest one

    def end(self) -> int:
        """Kill it; gives the exit code, which is that of an earlier death if it was dead."""
        self.process.kill()
        self.process.join(5)  # a process that waits for a dead network disk cannot be killed
        self.connection.close()
        return self.process.exitcode or 0


class _Crew:
    """The workers, and what is still to be done."""

    def __init__(
        self,
        function: Callable[[int], Any],
        name: Callable[[int], str],
        limits: Limits,
        size: int,
    ) -> None:
        self.function, self.name, self.limits = function, name, limits
        self.size = size
        self.workers: list[_Worker] = []
        self.todo: deque[int] = deque()
        self.lost: set[int] = set()  # inputs whose worker was killed from outside, once
        self.looked = time.monotonic()

    def hire(self) -> bool:
        """Give workers something to do, and start or end some; tell whether any is at work."""
        for worker in self.workers:
            if not worker.waiting:
                self._feed(worker)
        while self.todo and len(self.workers) < self.size:
            try:
                worker = _Worker(self)
            except OSError as error:
                if not self.workers:
                    raise DataError(
                        f"no process can be started to check the data: {error.strerror}"
                    ) from error
                break
            self.workers.append(worker)
            self._feed(worker)
        idle = [worker for worker in self.workers if not worker.waiting]
        for worker in idle:
            worker.end()
            self.workers.remove(worker)
        return bool(self.workers)

    def _feed(self, worker: _Worker) -> None:
        if not self.todo:
            return
        share = min(AT_ONCE, -(-len(self.todo) // (4 * self.size)))
        worker.waiting.extend(self.todo.popleft() for _ in range(share))
        worker.waited = 0.0
        with contextlib.suppress(OSError):  # it is dead already, and is found to be so
            worker.connection.send_bytes(json.dumps(list(worker.waiting)).encode())

    def answers(self) -> Iterator[tuple[int, Outcome]]:
        """Wait a moment for answers, deaths, and inputs that take too long."""
        ready = wait([worker.connection for worker in self.workers], timeout=0.25)
        now = time.monotonic()
        # A command that was stopped (Ctrl-Z) or a machine that slept has not been decoding.
        passed, self.looked = min(now - self.looked, 1.0), now
        for worker in list(self.workers):
            if worker.connection in ready:
                worker.waited = 0.0
                try:
                    answer = json.loads(worker.connection.recv_bytes(MOST_BYTES))
                except (EOFError, OSError, ValueError):  # ended, or ended in mid-answer
                    yield from self._bury(worker)
                    continue
                if "bug" in answer:
                    raise RuntimeError(f"{self.name(worker.waiting[0])}: {answer['bug']}")
                yield worker.waiting.popleft(), Outcome(**answer)
            else:
                worker.waited += passed
                if worker.waited > self.limits.seconds:
                    yield from self._bury(worker, too_slow=True)

    def _bury(self, worker: _Worker, too_slow: bool = False) -> Iterator[tuple[int, Outcome]]:
        """Blame the input that a dead or hanging worker was at; the others are done anew."""
        self.workers.remove(worker)
        code = worker.end()
        if not worker.waiting:
            return
        index = worker.waiting.popleft()
        self.todo.extendleft(reversed(worker.waiting))
        if too_slow:
            reason = f"takes longer than {self.limits.seconds:g} s to be decoded"
        elif -code in CRASHES:
            reason = f"its decoder crashes ({signal.Signals(-code).name})"
        elif index not in self.lost:
            self.lost.add(index)
            self.todo.append(index)
            return
        elif code < 0:
            reason = (
                f"the process that decoded it was killed twice ({signal.Signals(-code).name}), "
                "most likely because memory ran out"
            )
        else:
            reason = f"the process that decoded it ended twice (status {code})"
        yield index, Outcome(problem=f"{self.name(index)}: {reason}")


# -- in the worker ---------------------------------------------------------------------------------


def _work(
    function: Callable[[int], Any],
    name: Callable[[int], str],
    limits: Limits,
    connection: Connection,
    foreign: Sequence[Connection],
) -> None:
    """Answer until the run closes its end, which also happens when it dies."""
    for other in foreign:
        other.close()  # with a copy of it here, its worker would never hear of that
    _settle_in(limits)
    with contextlib.suppress(EOFError, OSError):
        while True:
            for index in json.loads(connection.recv_bytes()):
                try:
                    answer: dict[str, Any] = _attempt(function, index, name, limits)._asdict()
                except Exception:
                    answer = {"bug": traceback.format_exc()}
                connection.send_bytes(json.dumps(answer).encode())
    os._exit(0)


def _settle_in(limits: Limits) -> None:
    """Leave Ctrl-C to the run; be silent, single-threaded and of bounded size."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # native decoders write warnings there
        os.dup2(nowhere, descriptor)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: waiting for them hangs
    _limit_memory(limits.memory)


def _limit_memory(extra: int) -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):  # without /proc, or a stricter limit
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
