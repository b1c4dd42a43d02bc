"""What the benchmarks measure: time and peak memory, and tables of them.

torch is imported only where it is needed: `page.py` runs without it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that `run` takes, and its result.

    On the CPU with one thread the process' own time, which other programs on the machine disturb
    least; with several threads the time that passes. On CUDA the time between two events.
    """
    import torch

    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        result = run()
        return clock() - start, result
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    result = run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000, result


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each variant in each round: they take turns, in another order every time.

    A round before the first one warms up and does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for number in range(rounds + 1):
        for name in order:
            taken, _ = timed(variants[name], device)
            if number:
                seconds[name].append(taken)
        order = [*order[1:], order[0]]
    return seconds


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of the ratio in each."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most bytes that tensors made by `run` have at one time, beyond those there before it.

    On the CPU from the allocator's own events: exact, and free of what the process keeps of freed
    arrays.
    """
    import torch

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; numbers have two decimals, none from 100 on, three below 0.1."""
    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    """The text of one entry."""
    if isinstance(value, float):
        decimals = 0 if abs(value) >= 100 else 2 if abs(value) >= 0.1 or value == 0 else 3
        return f"{value:.{decimals}f}"
    return str(value)
