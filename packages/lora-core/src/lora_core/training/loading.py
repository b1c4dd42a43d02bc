"""Loading samples: anew in every epoch, and what is done when good data cannot be read any more."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from lora_core.errors import DataError, UserError, one_line

PAUSES = (0.2, 1.0, 3.0)  # seconds before reading again: a network disk that comes back
MOST_WORKERS = 256

T = TypeVar("T")


class Record(Protocol):
    """What a training sample is made from."""

    @property
    def key(self) -> str:
        """Its name, for messages."""


R = TypeVar("R", bound=Record)


class EpochDataset(Dataset[T], Generic[R, T]):
    """Records as training samples: functions of (seed, epoch, index) alone.

    Workers and resuming do not change them. A package writes `__getitem__`, which draws all that is
    random from `rng(index)`.

    Attributes:
        records: what the samples are made from, in their order.
    """

    def __init__(self, records: Sequence[R], seed: int) -> None:
        self.records, self.seed = list(records), seed
        # Shared memory: workers that outlive an epoch must hear of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random choices the samples show."""
        self._epoch.fill_(epoch)

    def rng(self, index: int) -> np.random.Generator:
        """The generator of a sample in this epoch, at its beginning."""
        return np.random.default_rng([self.seed % 2**32, int(self._epoch), index])

    def name_of(self, index: int) -> str:
        """The record's name, for messages."""
        return self.records[index].key

    def __len__(self) -> int:
        return len(self.records)


# -- batches ---------------------------------------------------------------------------------------


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose workers may live through all epochs.

    The iterator of an epoch draws a number from torch's generator where workers are started. Drawn
    in every epoch, it leaves all later random numbers, such as dropout, where they are with other
    workers, without any, and in a resumed run.
    """

    def __iter__(self) -> Any:
        if getattr(self, "_iterator", None) is not None:
            torch.empty((), dtype=torch.int64).random_()
        return super().__iter__()


def data_loader(
    samples: Watched,
    batches: Sampler[list[int]] | Iterable[list[int]],
    collate: Callable[[list[Any]], Any],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    prefetch: int | None = None,
    start_method: str | None = None,
    worker_init: Callable[[int], None] | None = None,
) -> EpochLoader:
    """The batches of an epoch, each time it is iterated over, after `samples.set_epoch`.

    Workers are started once: that takes a good part of a second, and with the start methods that
    import everything anew some seconds. Each computes with one thread.

    Args:
        batches: indices of each batch of an epoch, asked for when it begins.
        workers: processes that make batches; 0: this one does.
        pin_memory: give batches in memory that a GPU copies from while it computes.
        prefetch: batches that each worker has ready; None: 2.
        start_method: fork, spawn or forkserver; None: fork where it is safe to, on Linux.
        worker_init: called as `(number)` in each worker.
    """
    if workers and start_method is None and sys.platform == "linux":
        start_method = "fork"  # what Python 3.14 takes instead imports everything in every worker
    return EpochLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch,
        multiprocessing_context=start_method,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,
    )


# -- data that was good when the run began ---------------------------------------------------------


def retried(read: Callable[[], T], pauses: Sequence[float] | None = None) -> T:
    """Call `read`, and again after each pause (default: `PAUSES`) while it raises DataError.

    Raises:
        DataError: the last one, with what that means for data that was validated.
    """
    pauses = PAUSES if pauses is None else pauses
    for pause in pauses:
        try:
            return read()
        except DataError:
            time.sleep(pause)
    try:
        return read()
    except DataError as error:
        raise DataError(
            f"{error}\nit was good when the run began and was tried {len(pauses) + 1} times: "
            "bring the file back, then continue with --resume"
        ) from error


class Watched(Dataset[Any]):
    """A data set that notes which sample each process is loading, to name it if one dies.

    What `set_epoch` says in the main process is said to the workers' copies of the data set too.

    Args:
        samples: the data set; its `name_of(index)`, if any, gives a sample's name.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        # Shared with the workers: (process id, index of the sample) of each, and the epoch.
        self.at = torch.full((MOST_WORKERS, 2), -1, dtype=torch.int64).share_memory_()
        self._epoch = torch.full((), -1, dtype=torch.int64).share_memory_()
        self._told = -1  # the epoch that this process' copy of the data set knows of

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        if worker is not None:
            self.at[worker.id % MOST_WORKERS] = torch.tensor([os.getpid(), index])
            if self._told != int(self._epoch):
                self._tell()
        return self.samples[index]

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set, here and in all workers; none of them may be loading samples."""
        self._epoch.fill_(epoch)
        self._tell()

    def _tell(self) -> None:
        self._told = int(self._epoch)
        if hasattr(self.samples, "set_epoch"):
            self.samples.set_epoch(self._told)

    def name_at(self, process: int) -> str:
        """The sample that a worker noted last, or "" if it noted none."""
        for known, index in self.at.tolist():
            if known == process:
                name_of = getattr(self.samples, "name_of", "number {}".format)
                return one_line(name_of(index))
        return ""

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn what a DataLoader raises inside into errors for people.

        A `UserError` of a worker loses the traceback that torch puts into its message. The death
        of a worker becomes a DataError with the worker, the sample and the likely cause.
        """
        try:
            yield
        except (RuntimeError, UserError) as error:
            told = self._explained(error)
            if told is error:
                raise
            # Cycles through tracebacks would leave the loader to the garbage collector, which ends
            # the loader's queues first: it then waits 5 s for each worker. The worker's own
            # traceback is in the text of `error`.
            error.__traceback__ = None
            try:
                raise told from error
            finally:
                del told

    def _explained(self, error: Exception) -> Exception:
        text = str(error)
        if isinstance(error, UserError) and "in DataLoader worker process" in text:
            name = re.escape(f"{type(error).__module__}.{type(error).__qualname__}")
            return type(error)(re.split(rf"^{name}: ", text, flags=re.MULTILINE)[-1].strip())
        chain = [error, error.__cause__, error.__context__]
        texts = [str(link) for link in chain if isinstance(link, RuntimeError)]
        dead = [found for link in texts if (found := _DEAD.match(link))]
        if not dead:
            return error
        process = int(dead[0]["process"])
        how = next((found["signal"] for found in dead if found["signal"]), "")
        sample = self.name_at(process)
        return DataError(
            f"loading: worker process {process} {_how(how)}"
            + (f" while it loaded sample {sample}" if sample else "")
            + f"\n{_remedy(how)}"
        )


_DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<process>\d+)[\d, ]*\) "
    r"(?:is killed by signal: (?P<signal>[^.]*)|exited unexpectedly)"
)


def _how(description: str) -> str:
    return f"was killed ({description.strip()})" if description else "ended unexpectedly"


def _remedy(description: str) -> str:
    """What to do, by how the C library describes the signal ("Killed", "Bus error")."""
    workers = "use fewer worker processes or"
    if description.strip() == signal.strsignal(signal.SIGBUS):
        return f"/dev/shm is too small, as in containers: {workers} start with --shm-size 8g"
    if description.strip() == signal.strsignal(signal.SIGSEGV):
        return "its decoder crashed: look at that sample"
    return f"most likely memory ran out: {workers} a smaller batch; then continue with --resume"
