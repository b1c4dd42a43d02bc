"""What `--dry_run` prints after the settings and the data have been checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.disk import disk_table
from lora_core.memory import estimate, memory_table
from lora_core.report import say
from lora_core.validate import cache_folder

if TYPE_CHECKING:
    from torch import Tensor, nn


def precisions(precision: str, device: str) -> list[str]:
    """The precisions that a run may train in, found without asking a GPU."""
    if precision != "auto":
        return [precision]
    return ["fp32"] if device == "cpu" else ["bf16", "fp32"]


def report(
    network: nn.Module,
    loss: Callable[[nn.Module, Any], tuple[Tensor, Any]],
    batch: Any,
    columns: Sequence[str],
    files: Mapping[str, int],
    folder: str | Path,
) -> None:
    """Print the memory of a step and the files of a run. Writes no file and touches no GPU.

    Args:
        network: adapted, on the meta device; it cannot be used afterwards.
        loss: as for `LoraTrainer`.
        batch: the largest one of the run, on the CPU.
        columns: the precisions to estimate for.
        files: kind -> bytes at most, and the folder where they go.
    """
    network.train()
    estimates = {name: estimate(network, loss, batch, name) for name in columns}
    say(f"\n{memory_table(estimates)}")
    say("on a GPU add about 1 GB for CUDA and its libraries")
    say(f"\n{disk_table(files, folder)}")
    known = f"; which files are good is remembered in {cache_folder()}" if cache_folder() else ""
    say(f"\ndry run: settings and data are fine. No weights were read, no results written{known}")
