"""Which samples each process takes, and what each batch counts in the gradient.

With these shares an update is the same one, up to rounding, for any number of processes and
accumulated batches that make up the same global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from lora_core.distributed import sum_over_ranks
from lora_core.training.schedule import EpochSampler

Counts = float | Mapping[str, float]


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
        count: `batch -> items` that the loss of a batch is the mean over; None: its samples. Or
            several numbers by name, for a loss that divides by more than one of them: it finds
            their sums over the update in batch["update"], and with them "share", by which it
            multiplies what its own items add to the whole: the number of batches, or 0.
    """

    def __init__(
        self, order: EpochSampler, args: Any, count: Callable[[Any], Counts] | None
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
        self.nothing = False  # whether no batch of the update has an item to learn from

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
            counts: list[Any] = [self.count(batch) for batch in batches]
            if isinstance(counts[0], Mapping):
                self._tell(batches, counts, samples, device)
                return
            self._items = [float(of) if n else 0.0 for of, n in zip(counts, samples, strict=True)]
            total = sum_over_ranks(sum(self._items), device)
        self.nothing = total == 0
        self._mean = max(total, 1e-30) / (self.batches.world * len(batches))

    def _tell(
        self, batches: Sequence[Any], counts: list[Any], samples: list[int], device: torch.device
    ) -> None:
        """Write into every batch what the whole update counts; then all batches weigh the same."""
        own = [of for of, n in zip(counts, samples, strict=True) if n]
        sums = {name: sum_over_ranks(sum(of[name] for of in own), device) for name in counts[0]}
        number = float(self.batches.world * len(batches))
        for batch, n in zip(batches, samples, strict=True):
            batch["update"] = {**sums, "share": number if n else 0.0}
        self._items, self._mean = [1.0] * len(batches), 1.0

    def next(self) -> tuple[float, float]:
        """Items of the next micro-batch, and the weight of its loss; (1, 1) outside of updates."""
        if not self._items:
            return 1.0, 1.0
        items = self._items.pop(0)
        return items, items / self._mean
