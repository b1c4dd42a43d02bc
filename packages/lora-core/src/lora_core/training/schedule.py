"""What a run does when: the order of its samples, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

FLOOR = 0.01  # of the peak learning rate, where the cosine ends


class EpochSampler(Sampler[int]):
    """All indices in an order that is a function of (seed, epoch) alone.

    Another order is a subclass with its own `__iter__`, see `LoraTrainer(order=...)`. It may look
    at nothing but seed, epoch and what it was made with: a resumed run asks for it again.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed % 2**32, self.epoch])
        yield from generator.permutation(self.size).tolist()


def lr_factor(update: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate in update 0 ... total - 1.

    (update + 1) / warmup, then FLOOR + (1 - FLOOR) (1 + cos(pi t)) / 2 with t from 0 at the
    peak to 1 in the last update.
    """
    if update + 1 < warmup:
        return (update + 1) / warmup
    peak = max(warmup - 1, 0)
    t = min((update - peak) / max(total - 1 - peak, 1), 1.0)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * t)) / 2
