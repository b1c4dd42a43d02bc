"""The settings that keep a run from losing work, the same in every package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lora_core.errors import ConfigError
from lora_core.settings import option

GROUP = "guards"


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
    dry_run: bool = option(
        False,
        "Check settings and data, print parameters, memory and disk use, and write nothing.",
        GROUP,
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_bad_fraction) and 0 <= self.max_bad_fraction < 1):
            raise ConfigError(
                f"--max_bad_fraction is {self.max_bad_fraction}: it must be 0 <= share < 1"
            )
        for name in ("max_nonfinite", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: it must be at least 1")
