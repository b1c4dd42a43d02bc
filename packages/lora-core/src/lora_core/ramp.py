"""The settings of `find-lr`, which a package puts before those of its training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lora_core.config import MAX_FLOAT
from lora_core.guards import Guards, count_problem, unnamed
from lora_core.settings import option


@dataclass
class Ramp(Guards):
    """What find-lr needs besides the settings of a training, before the `Config` that has these.

        @dataclass
        class Options(Ramp, Config):
            train_command = "sam2-lora train"

    Attributes:
        train_command: the command that trains with this `Config`.
    """

    train_command: ClassVar[str]

    ramp_from: float = option(1e-5, "Learning rate of the first update.", "ramp")
    ramp_to: float = option(1.0, "Learning rate of the last update.", "ramp")
    ramp_steps: int = option(100, "Updates; it ends earlier when the loss diverges.", "ramp")
    ramp_dir: str = option("find_lr", "find_lr.csv and find_lr.png go here.", "ramp")

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line: of the `Config`, then of the ramp."""
        yield from super().problems()
        yield from unnamed(self, ["ramp_dir"])
        yield from count_problem(self, "ramp_steps", 10)
        low, high = self.ramp_from, self.ramp_to
        if not 0 < low < high <= MAX_FLOAT:
            yield f"--ramp_from {low}, --ramp_to {high}: above 0, and rising"
        if self.dry_run:
            yield f"--dry_run belongs to `{self.train_command}`: find-lr trains"
        names = [name for name in ("resume", "resume_from_checkpoint") if getattr(self, name, None)]
        for name in names[:1]:  # two words for the same
            yield f"--{name} belongs to `{self.train_command}`: a ramp always starts anew"
