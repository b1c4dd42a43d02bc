"""When memory runs out: numbers, what helps, and trying the largest batch first."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_core.errors import ConfigError
from lora_core.memory import ADAM_MOMENTS, adapter_bytes, size
from lora_core.report import say
from lora_core.training.checks import check_trainable, undone
from lora_core.training.loss import Loss, LossModule, batch_loss

_REQUEST = re.compile(r"(?:ried|rying) to allocate ([\d.]+ ?\w+)")
# How libraries say it where torch does not.
_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)


def largest_tensor(batch: Any) -> str:
    """Describe a batch by the shape of its largest tensor."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    shape = max((tuple(t.shape) for t in tensors), key=lambda s: torch.Size(s).numel(), default=())
    return f"a batch with a tensor of {'x'.join(map(str, shape)) or 'no size'}"


@dataclass(frozen=True)
class Advice:
    """What a package knows about the memory that its batches take.

    Attributes:
        remedies: what makes a step smaller, as flags to add, the best first.
        describe: batch -> what is in it: how many pictures of which size, and their names.
    """

    remedies: Sequence[str] = ()
    describe: Callable[[Any], str] = largest_tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explained(
    network: nn.Module, where: Callable[[], str], advice: Advice | None = None
) -> Iterator[None]:
    """Say what to do when memory runs out inside.

    Args:
        where: phase, step and batch at that moment, in words.

    Raises:
        ConfigError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(explain(error, where(), network, advice or Advice())) from error


def explain(error: BaseException, where: str, network: nn.Module, advice: Advice) -> str:
    """The message: where it happened and how much was missing, what helps, what does not."""
    device = next(network.parameters()).device
    found = _REQUEST.search(str(error))
    asked = f"{found[1]} more were asked for, " if found else ""
    kept = (2 + ADAM_MOMENTS) * adapter_bytes(network)
    helps = "; ".join(f"{n}. {what}" for n, what in enumerate(advice.remedies, start=1))
    lines = [
        f"out of memory in {where}: {asked}{_room(device)}",
        f"what helps, best first: {helps}" if helps else "make the batch or its samples smaller",
        f"A lower rank does not: the adapters are only {size(kept)} with gradients and moments",
    ]
    return "\n".join(lines)


def _room(device: torch.device) -> str:
    """What is allocated and free on a device at this moment."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free += reserved - used  # what torch holds without using it
        return f"{size(used)} allocated, {size(free)} of {size(total)} free on {device}"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{size(free)} of {size(total)} free on the host"


# -- the largest batch first -----------------------------------------------------------------------


def trial(network: nn.Module, loss: Loss, batch: Any, precision: str = "fp32") -> None:
    """Run forward and backward pass on a batch; then all is as it was before, bit for bit.

    Weights, buffers, gradients, modes and random generators are put back. The optimizer's moments,
    which a first update makes, are allowed for.

    Args:
        network: on the device where it trains.
        loss: as for `LoraTrainer`.
        batch: on the CPU.
        precision: fp32, bf16 or fp16.
    """
    with undone(network):
        trained = [p for p in network.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in trained for _ in range(ADAM_MOMENTS)]
        batch_loss(LossModule(network, loss).train(), batch, precision).backward()
        del moments


def fit_batch(
    network: nn.Module,
    loss: Loss,
    make: Callable[[int], Any],
    batch_size: int,
    accumulation: int,
    *,
    precision: str = "fp32",
    auto: bool = False,
    advice: Advice | None = None,
    settings: tuple[str, str] = ("batch_size", "gradient_accumulation_steps"),
) -> tuple[int, int]:
    """Try the largest batch of a run before its first step: memory runs out now or never.

    Does nothing on the CPU, where the system ends a process that takes too much memory, unless
    `auto` asks for it. All processes of a run call it and agree.

    Args:
        make: number of samples -> a batch of the largest of them.
        auto: take a part of the batch and as many more accumulation steps when memory runs out.
        settings: what the package calls batch size and accumulation, for the message.

    Returns:
        batch size and accumulation steps; their product is as it was.

    Raises:
        ConfigError: memory runs out, with what helps.
    """
    advice = advice or Advice()
    if next(network.parameters()).device.type == "cpu" and not auto:
        return batch_size, accumulation
    check_trainable(network)
    wanted = batch_size
    while True:
        batch = make(batch_size)
        where = f"a trial of the largest batch before step 1 ({advice.describe(batch)})"
        failure = _failure(network, loss, batch, precision, where, advice)
        if not _any_process(failure is not None, network):
            break
        part = _smaller(batch_size)
        if not auto or part is None:
            raise ConfigError(failure or "out of memory in another process of the run")
        accumulation *= batch_size // part
        batch_size = part
    if batch_size < wanted:
        say(
            f"--auto_batch: memory holds {batch_size} of {wanted} samples, so "
            f"--{settings[0]} {batch_size} and --{settings[1]} {accumulation} "
            "make updates of as many samples"
        )
    return batch_size, accumulation


def _failure(
    network: nn.Module, loss: Loss, batch: Any, precision: str, where: str, advice: Advice
) -> str | None:
    """What is to be said if memory runs out in a trial."""
    try:
        trial(network, loss, batch, precision)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return explain(error, where, network, advice)
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return None


def _any_process(flag: bool, network: nn.Module) -> bool:
    """Whether the flag is up in any process of the run."""
    if not dist.is_initialized():
        return flag
    total = torch.tensor(float(flag), device=next(network.parameters()).device)
    dist.all_reduce(total)
    return bool(total > 0)


def _smaller(batch_size: int) -> int | None:
    """The next smaller batch of which a whole number makes the old one; a half if that is even."""
    return next((n for n in range(batch_size // 2, 0, -1) if batch_size % n == 0), None)
