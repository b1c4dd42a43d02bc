"""The settings of `find-lr`, which a package puts before those of its training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_core.config import MAX_FLOAT
from lora_core.guards import count_problem, unnamed
from lora_core.settings import option


@dataclass
class Ramp:
    """What find-lr needs besides the settings of a training: `class Options(Ramp, Config)`."""

    ramp_from: float = option(1e-5, "Learning rate of the first update.", "ramp")
    ramp_to: float = option(1.0, "Learning rate of the last update.", "ramp")
    ramp_steps: int = option(100, "Updates; it ends earlier when the loss diverges.", "ramp")
    ramp_dir: str = option("find_lr", "find_lr.csv and find_lr.png go here.", "ramp")


def ramp_problems(options: Any, training: str) -> Iterator[str]:
    """Yield what cannot work of `Ramp`, each as one line.

    Args:
        options: a `Ramp` and the `Config` of a package.
        training: the command that trains, such as `sam2-lora train`.
    """
    yield from unnamed(options, ["ramp_dir"])
    yield from count_problem(options, "ramp_steps", 10)
    low, high = options.ramp_from, options.ramp_to
    if not 0 < low < high <= MAX_FLOAT:
        yield f"--ramp_from {low}, --ramp_to {high}: above 0, and rising"
    if options.dry_run:
        yield f"--dry_run belongs to `{training}`: find-lr trains"
    if options.resume:
        yield f"--resume belongs to `{training}`: a ramp always starts anew"
