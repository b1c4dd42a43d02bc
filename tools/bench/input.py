"""How fast training samples are made: per core, by parts, and with worker processes.

    OMP_NUM_THREADS=1 python tools/bench/input.py --json docs/benchmarks/input.json
    OMP_NUM_THREADS=1 python tools/bench/input.py sam2 isaac --samples 40

Data sets of real sizes are made in a temporary folder (see `input_data.py`), and each package's own
training set gives samples of them, one thread, files in the page cache. `decode` is reading and
decoding files; `resize` brings pictures and masks to the network's size, or picks one Gaussian of
each voxel; `targets` is the rest: prompts, augmentation, texts, noise; `collate` is a sample's
share of making a batch. Milliseconds are of the process' own CPU time, medians over the samples
for the whole and means for the parts.

`floats` is no part of a sample: bytes become what the network reads (sam2 resizes them, too) in the
process that trains, on its device; here on this core.

A training of B samples per step whose step takes S seconds is fed by B * ms / 1000 / S cores:
`core seconds per step` is that number for S = 1.

The second table runs the trainer's own data loader with 0, 1 and 2 worker processes: samples per
second of time that passes (of a machine that does nothing else: compare CPU milliseconds, those of
all processes together, where it does), and seconds until the first batch of the first epoch, which
starts the workers, and of later ones. What workers add is the way of a batch through shared memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from input_data import MAKERS, Source, sources
from results import Table, publish

from lora_core.training.loading import Watched, data_loader
from lora_core.training.schedule import EpochSampler
from lora_core.training.shares import RankBatches

PARTS = ("decode", "resize", "targets", "collate")


# -- one core --------------------------------------------------------------------------------------


class Clock:
    """CPU seconds by part; what a part calls of another part counts there alone."""

    def __init__(self) -> None:
        self.seconds = Counter[str]()
        self._inside = 0.0  # seconds of parts inside of the one that runs

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `part`."""

        def run(*args: Any, **settings: Any) -> Any:
            outside, self._inside = self._inside, 0.0
            start = time.process_time()
            try:
                return function(*args, **settings)
            finally:
                took = time.process_time() - start
                self.seconds[part] += took - self._inside
                self._inside = outside + took

        return run

    @contextmanager
    def at(self, source: Source) -> Iterator[None]:
        """Time the parts of a source's samples."""
        before = []
        for part in ("decode", "resize"):
            for place, name in getattr(source, part):
                before.append((place, name, vars(place)[name]))
                setattr(place, name, self.timed(part, vars(place)[name]))
        if steps := source.facts.get("steps"):
            before.append((source.train, "steps", source.train.steps))
            source.train.steps = self._one_after_the_other(steps)
        try:
            yield
        finally:
            for place, name, function in before:
                setattr(place, name, function)

    def _one_after_the_other(self, steps: Sequence[tuple[Any, str]]) -> Callable[..., Any]:
        timed = [self.timed(part, step) if part else step for step, part in steps]

        def run(sample: Any, rng: Any) -> Any:
            for step in timed:
                sample = step(sample, rng)
            return sample

        return run


def on_one_core(source: Source, count: int) -> list[object]:
    """A row of the first table."""
    source.train[0]  # libraries are imported, memory is there
    whole = list(_seconds(source, count))
    clock = Clock()
    with clock.at(source):
        total = sum(_seconds(source, count))
    collated = list(_collating(source, max(1, count // source.batch_size)))
    parts = {name: clock.seconds[name] / count for name in ("decode", "resize")}
    parts["targets"] = total / count - sum(parts.values())
    parts["collate"] = statistics.median(collated)
    floats = statistics.median(_making_floats(source, max(1, count // source.batch_size)))
    sample = statistics.median(whole) + parts["collate"]
    return [
        source.package, source.name, 1000 * sample, 1 / sample,
        *(1000 * parts[name] for name in PARTS), 1000 * floats,
        source.batch_size, source.batch_size * sample,
    ]  # fmt: skip


def _seconds(source: Source, count: int) -> Iterator[float]:
    """CPU seconds of each of `count` samples, epoch after epoch."""
    for number in range(count):
        source.train.set_epoch(number // len(source.train))
        start = time.process_time()
        source.train[number % len(source.train)]
        yield time.process_time() - start


def _making_floats(source: Source, count: int) -> Iterator[float]:
    """CPU seconds of making a batch's floats, per sample; 0 where it has them."""
    batch = source.collate([source.train[k % len(source.train)] for k in range(source.batch_size)])
    for _ in range(count + 1):
        start = time.process_time()
        if source.floats is not None:
            source.floats(batch)
        yield (time.process_time() - start) / source.batch_size


def _collating(source: Source, count: int) -> Iterator[float]:
    """CPU seconds of making batches, per sample."""
    samples = [source.train[k % len(source.train)] for k in range(source.batch_size)]
    for _ in range(count + 1):
        start = time.process_time()
        source.collate(samples)
        yield (time.process_time() - start) / source.batch_size


# -- worker processes ------------------------------------------------------------------------------


class Again(EpochSampler):
    """Numbers of a small data set over and over, so that an epoch is long enough to be timed."""

    def __init__(self, samples: int, size: int) -> None:
        super().__init__(size, seed=0)
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        return (index % self.samples for index in super().__iter__())


def loader_of(source: Source, workers: int, batches: int) -> Any:
    """The trainer's data loader over an epoch of so many batches."""
    order = Again(len(source.train), batches * source.batch_size)
    taken = RankBatches(order, source.batch_size, 0, 1)
    return data_loader(Watched(source.train), taken, source.collate, workers=workers)


def with_workers(source: Source, workers: int, batches: int) -> list[object]:
    """A row of the second table, of three epochs."""
    loader, first, rates, cpu = loader_of(source, workers, batches), [], [], []
    for epoch in range(3):
        loader.dataset.set_epoch(epoch)
        began, used = time.perf_counter(), cpu_seconds()
        iterator = iter(loader)
        next(iterator)
        first.append(time.perf_counter() - began)
        count = source.batch_size * (1 + sum(1 for _ in iterator))
        rates.append(count / (time.perf_counter() - began))
        cpu.append((cpu_seconds() - used) / count)
    # The first epoch starts the workers.
    return [
        source.package, source.name, workers, statistics.median(rates[1:]),
        1000 * statistics.median(cpu[1:]), first[0], statistics.median(first[1:]),
    ]  # fmt: skip


def cpu_seconds() -> float:
    """Of this process and of its workers since they began; Linux."""
    found = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", choices=[[], *MAKERS], help="default: all")
    parser.add_argument("--samples", type=int, default=24, help="of each kind that are timed")
    parser.add_argument("--files", type=int, default=16, help="of each kind that are made")
    parser.add_argument("--batches", type=int, default=16, help="with workers; 0: no such table")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # What the packages remember of files that they have looked at does not outlive them.
        os.environ["XDG_CACHE_HOME"] = folder
        made = sources(Path(folder), args.files, args.packages or list(MAKERS))
        header = [
            "package", "sample", "ms per sample and core", "samples/s and core",
            *(f"{name} ms" for name in (*PARTS, "floats")), "batch", "core seconds per step",
        ]  # fmt: skip
        tables = {"one core": Table(header, [on_one_core(one, args.samples) for one in made])}
        if args.batches:
            header = [
                "package", "sample", "workers", "samples/s", "CPU ms per sample", "first batch s",
                "of later epochs",
            ]  # fmt: skip
            rows = [with_workers(one, w, args.batches) for one in made for w in (0, 1, 2)]
            tables["workers"] = Table(header, rows)
    publish(tables, args.json)


if __name__ == "__main__":
    main()
