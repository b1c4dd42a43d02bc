"""Several processes, started by torchrun, train as one: they meet, act alike, and end together.

They trust each other and the network between them: whoever can reach their address can read the
weights and disturb the run.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lora_core import errors
from lora_core.distributed.meeting import (
    find_place,
    local_rank,
    meet,
    stay_on_this_machine,
    world_size,
)
from lora_core.distributed.watch import (
    Failure,
    Peer,
    RankError,
    Watch,
    describe,
    end_children,
    finishing,
)
from lora_core.errors import ConfigError, UserError

__all__ = [
    "RankError",
    "finishing",
    "first_rank_decides",
    "in_shares",
    "join",
    "local_rank",
    "sum_over_ranks",
    "together",
    "wait_for_first",
    "world_size",
]

T = TypeVar("T")

MEETING = 300.0  # seconds for all processes to come: importing torch on a slow disk takes minutes
TIMEOUT = 600.0  # seconds for one collective; long work of one rank is waited for in another way

_store: dist.Store | None = None  # where the processes met
_everyone: list[Peer] = []  # who has come, by rank
_watch: Watch | None = None  # within `together`
_broken = False  # a process has failed: no collective can be relied on any more
_generations, _turns = count(), count()


def join(device: torch.device, timeout: float | None = None, meeting: float = MEETING) -> None:
    """Meet the other processes of the run, once; nothing to do for a single one.

    Args:
        device: decides on the backend: nccl for cuda, else gloo.
        timeout: seconds that one collective may take; None: `TIMEOUT`.
        meeting: seconds to wait for the others.

    Raises:
        ConfigError: incomplete variables, a port in use, an address that nobody answers at, or
            processes that do not come.
    """
    if world_size() > 1:
        _find_others(device, meeting)
        _init_group(device, TIMEOUT if timeout is None else timeout)


def _find_others(device: torch.device, meeting: float = MEETING) -> None:
    global _store, _everyone
    if _store is None:
        place = find_place()
        if device.type != "cuda":
            stay_on_this_machine(place)
        _store, _everyone = meet(place, meeting)


@contextmanager
def together(device: torch.device, timeout: float | None = None) -> Iterator[None]:
    """Within the block all processes of the run live, or end within seconds.

    A process that fails tells the others, which raise `RankError` with its rank and message; one
    that is killed is missed. A process that is stuck in a collective by then is ended.

    Args:
        device, timeout: see `join`.

    Raises:
        ConfigError: see `join`.
        RankError: another process has failed or died.
    """
    global _watch, _broken
    if world_size() == 1 or _watch is not None:
        yield
        return
    _find_others(device)
    assert _store is not None
    place = find_place()
    region = dist.PrefixStore(f"region{next(_generations)}", _store)
    _watch = Watch(region, place.rank, _everyone, place.rank == 0 and not place.in_launcher)
    _watch.start()
    try:
        _init_group(device, TIMEOUT if timeout is None else timeout)
        yield
    except BaseException as error:
        _broken = True
        other = _blame(_watch, error)
        if other is None:
            raise
        raise other from error
    finally:
        _watch.leave()
        _watch = None


def _blame(watch: Watch, error: BaseException) -> RankError | None:
    """Tell the others of an error here, or find whose failure has caused it."""
    own = describe(error, watch.rank)
    torn = _is_torn(error)
    if torn:
        watch.silence = min(watch.silence, 4.0)
    if isinstance(error, RuntimeError):
        watch.failed.wait(7.0 if torn else 1.5)
    if torn and not watch.failure:
        own = Failure(
            watch.rank,
            2,
            f"rank {watch.rank} waited in vain in a collective operation ({own.message}). "
            f"{watch.places()}. Find out what kept them; ddp_timeout is the limit",
            lost=True,
        )
    failure = watch.publish(own)
    if failure.rank == watch.rank:
        return failure.error() if torn else None
    if isinstance(error, UserError):
        # All have found the same fault: one of them says it, and rank 0 in any case.
        error.told = failure.message == own.message and watch.rank != 0
        return None
    return failure.error() if isinstance(error, Exception) else None


def _is_torn(error: BaseException) -> bool:
    """Whether a collective raised this because a process is gone, or does not come.

    Of several collectives under way, gloo names itself in the one whose time is over; the others
    end with "Application timeout caused pair closure", and which one is seen first is chance.
    """
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("gloo", "nccl", "caused pair closure"))
    )


def first_rank_decides(make: Callable[[], T], device: torch.device) -> T:
    """Call `make` in the first process of a run only, and give its result to all of them.

    For what must not be done twice, such as making the folder of a run. However long it takes, the
    others wait for as long as the first process lives. A `UserError` is raised in all of them.
    """
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    with together(device):
        if dist.get_rank() == 0:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[1] = error
        wait_for_first()
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        outcome[1].told = dist.get_rank() != 0
        raise outcome[1]
    return outcome[0]


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Sum of the values that the processes give; exact for whole numbers below 2**53."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def in_shares(work: Callable[[slice], object], device: torch.device) -> None:
    """Do this process's share of some work, then wait until the others have done theirs.

    Args:
        work: is given every n-th place of what there is to do, with n processes.
    """
    work(slice(int(os.environ.get("RANK", "0")), None, world_size()))
    sum_over_ranks(0.0, device)


def wait_for_first() -> None:
    """Wait until the first process comes here, for as long as it lives; it does not wait.

    A collective would bound the time: this lets rank 0 evaluate or write for hours.

    Raises:
        RankError: a process has failed meanwhile.
    """
    if world_size() == 1:
        return
    assert _store is not None, "within `together` only"
    turn = f"turn{next(_turns)}"
    if dist.get_rank() == 0:
        _store.set(turn, "")
        return
    pause = 0.002
    while not _store.check([turn]):
        if _watch is not None and _watch.failure is not None:
            raise _watch.failure.error()
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


# -- the process group -----------------------------------------------------------------------------


def _init_group(device: torch.device, timeout: float) -> None:
    if dist.is_initialized():
        return
    place, backend = find_place(), "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    assert _store is not None
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", _store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        raise ConfigError(
            f"the processes met at {place.address}, but {backend} cannot connect them: "
            f"{str(error).splitlines()[0]}. Name the right network device, "
            f"{backend.upper()}_SOCKET_IFNAME=eth0 for example"
        ) from error


@atexit.register
def _leave_group() -> None:
    """End the process group before the interpreter ends.

    gloo's threads can outlive even the group and then abort the interpreter (SIGABRT, one run of
    25), so a command that is through leaves at once with its own status.
    """
    if not dist.is_initialized():
        return
    end_children()
    at_once = dist.get_backend() == "gloo" or _broken
    if not _broken:
        dist.destroy_process_group()
    if at_once and errors.last_status is not None:
        with contextlib.suppress(OSError, ValueError):  # a reader that has left
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(errors.last_status)
