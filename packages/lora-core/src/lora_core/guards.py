"""The settings that keep a run from losing work, the same in every package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from lora_core.errors import ConfigError, listing
from lora_core.settings import option
from lora_core.settings.types import shown

GROUP = "guards"
LARGEST = 2**31 - 1  # of a count: what every library takes
MOST = {"seed": 2**32 - 1, "num_workers": 1024, "lora_rank": 65536}


@dataclass
class Guards:
    """What a training run does when something is wrong; a package's `Config` inherits it.

    Raises:
        ConfigError: a value that cannot work.
    """

    on_bad_sample: Literal["stop", "skip"] = option(
        "stop",
        "A sample that cannot be used stops the run before it begins; skip: it is left out and "
        "listed with its reason in bad_samples.jsonl.",
        GROUP,
    )
    max_bad_fraction: float = option(
        0.01, "With skip: the run stops when more than this share of a split is bad.", GROUP
    )
    skip_nonfinite: bool = option(
        False,
        "Drop an update whose loss or gradient is not finite instead of stopping.",
        GROUP,
    )
    max_nonfinite: int = option(10, "Updates that --skip_nonfinite may drop in one run.", GROUP)
    auto_batch: bool = option(
        False,
        "When memory runs out at the start, halve the batch and double the accumulation.",
        GROUP,
    )
    keep_last: int = option(2, "Training checkpoints kept, besides that of the best.", GROUP)
    shard_base: bool = option(
        False,
        "With several processes: each keeps only its part of the frozen base's large blocks in "
        "memory (FSDP2); slower, for a base that is too large for one device.",
        "processes",
    )
    dry_run: bool = option(
        False,
        "Check settings and data, print parameters, memory and disk use, and write nothing.",
        GROUP,
    )

    def __post_init__(self) -> None:
        found = list(self.problems())
        if found:
            raise ConfigError(listing(found))

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line; a package's `Config` adds its own."""
        if not 0 <= self.max_bad_fraction < 1:  # which NaN is not
            yield f"--max_bad_fraction is {self.max_bad_fraction}: it must be 0 <= share < 1"
        for name in ("max_nonfinite", "keep_last"):
            yield from count_problem(self, name, 1)


def count_problem(config: object, name: str, least: int) -> Iterator[str]:
    """Yield what is wrong with a whole number that counts something, if anything is."""
    value, most = getattr(config, name), MOST.get(name, LARGEST)
    if value < least:
        yield f"--{name} is {shown(value)}: it must be at least {least}"
    elif value > most:
        yield f"--{name} is {shown(value)}: it must be at most {most}"


def unnamed(settings: object, names: Iterable[str]) -> Iterator[str]:
    """Yield a line for each path that is the empty text, as an unset variable of a shell gives it.

    It would mean the current folder, or that nothing was given.
    """
    for name in names:
        if getattr(settings, name) == "":
            yield f"--{name} is empty: give a path (. is the current folder), or leave it out"
