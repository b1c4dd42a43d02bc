"""Which samples each process takes, and what each batch counts in the gradient.

With these shares an update is the same one, up to rounding, for any number of processes and
accumulated batches that make up the same global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from lora_core.distributed import sum_over_ranks
from lora_core.training.schedule import EpochSampler


class RankBatches(Sampler[list[int]]):
    """The batches of one process, such that all together see the order as one process would.

    A batch of all processes is a run of `batch_size * world` places in the order, and each takes
    its part. The last one of an epoch may be smaller and is divided evenly; a process that nothing
    is left for gets a sample that does not count, so that all take the same number of steps.

    Args:
        order: the indices of an epoch.
        batch_size: samples per process.
        rank, world: this process and their number.
        drop_last: leave a smaller last batch out.
    """

    def __init__(
        self, order: EpochSampler, batch_size: int, rank: int, world: int, drop_last: bool = False
    ) -> None:
        self.order, self.batch_size, self.rank, self.world = order, batch_size, rank, world
        self.drop_last = drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size * self.world)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.order)
        for batch in range(len(self)):
            first = batch * self.batch_size * self.world
            start = first + sum(self.samples(batch, rank) for rank in range(self.rank))
            # Of the same batch: another sample might use parameters that this update leaves alone.
            yield indices[start : start + self.samples(batch)] or [indices[first]]

    def samples(self, batch: int, rank: int | None = None) -> int:
        """How many samples of a process, by default this one, count in its batch of this number."""
        share, more = divmod(self.samples_of_all(batch), self.world)
        return share + ((self.rank if rank is None else rank) < more)

    def samples_of_all(self, batch: int) -> int:
        """How many samples of all processes count in the batch of this number."""
        size = self.batch_size * self.world
        return min(len(self.order) - batch * size, size)


class Shares:
    """Weights that make the gradient of an update the mean over all items of all processes.

    DDP and transformers take the plain mean over processes and micro-batches, which would give
    the samples of a smaller batch, or the items of a batch with few of them, more weight.

    Args:
        order: of an epoch.
        args: transformers' TrainingArguments.
        count: `batch -> items` that the loss of a batch is the mean over; None: its samples.
    """

    def __init__(
        self, order: EpochSampler, args: Any, count: Callable[[Any], float] | None
    ) -> None:
        self.batches = RankBatches(
            order,
            args.per_device_train_batch_size,
            args.process_index,
            args.world_size,
            args.dataloader_drop_last,
        )
        self.accumulation, self.count = args.gradient_accumulation_steps, count
        self._items: list[float] = []  # of the micro-batches of an update that are still to come
        self._mean = 1.0  # items per micro-batch of all processes

    def begin(self, update: int, batches: Sequence[Any], device: torch.device) -> None:
        """Count the items of an update, given by its number since the beginning of the run."""
        per_epoch = math.ceil(len(self.batches) / self.accumulation)
        first = update % per_epoch * self.accumulation
        places = range(first, first + len(batches))
        samples = [self.batches.samples(place) for place in places]
        if self.count is None:
            self._items = [float(n) for n in samples]
            total = float(sum(self.batches.samples_of_all(place) for place in places))
        else:
            pairs = zip(batches, samples, strict=True)
            self._items = [float(self.count(batch)) if n else 0.0 for batch, n in pairs]
            total = sum_over_ranks(sum(self._items), device)
        self._mean = max(total, 1e-30) / (self.batches.world * len(batches))

    def next(self) -> tuple[float, float]:
        """Items of the next micro-batch, and the weight of its loss; (1, 1) outside of updates."""
        if not self._items:
            return 1.0, 1.0
        items = self._items.pop(0)
        return items, items / self._mean
