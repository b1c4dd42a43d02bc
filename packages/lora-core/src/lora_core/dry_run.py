"""What `--dry_run` prints after the settings and the data have been checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.disk import disk_table
from lora_core.memory import Estimate, estimate, memory_table, size
from lora_core.report import say, table
from lora_core.validate import cache_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_core.last_blocks import Stack

SLOW = 20.0  # seconds of one core: an estimate that takes longer is not made a second time
DEVICES = {"auto": "on a GPU or CPU", "cuda": "on a GPU", "cpu": "on a CPU"}


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
    device: str = "auto",
    stack: Stack | None = None,
) -> None:
    """Print the memory of a step and the files of a run. Writes no file and touches no GPU.

    Where it is known in seconds, also what a step takes with adapters in fewer blocks.

    Args:
        network: adapted, on the meta device; it cannot be used afterwards.
        loss: as for `LoraTrainer`.
        batch: the largest one of the run, on the CPU.
        columns: the precisions to estimate for.
        files: kind -> bytes at most, and the folder where they go.
        device: auto, cuda or cpu, as it was asked for.
        stack: the blocks of which fewer may be adapted.
    """
    network.train()
    estimates, seconds = {}, 0.0
    for name in columns:
        begin = time.process_time()
        estimates[name] = estimate(network, loss, batch, name)
        seconds = max(seconds, time.process_time() - begin)
    say(f"\n{memory_table(estimates, DEVICES.get(device, device))}")
    if device != "cpu":
        say("on a GPU add about 1 GB for CUDA and its libraries")
    if stack is not None and (counts := stack.fewer(network)):
        if seconds > SLOW:
            say(f"with {stack.setting} {counts[0]} --dry_run says what fewer adapted blocks take")
        else:
            say(f"\n{_fewer_blocks(network, loss, batch, stack, counts, columns[0], estimates)}")
    say(f"\n{disk_table(files, folder)}")
    known = f"; which files are good is remembered in {cache_folder()}" if cache_folder() else ""
    say(f"\ndry run: settings and data are fine. No weights were read, no results written{known}")


def _fewer_blocks(
    network: nn.Module,
    loss: Callable[[nn.Module, Any], tuple[Tensor, Any]],
    batch: Any,
    stack: Stack,
    counts: Sequence[int],
    precision: str,
    estimates: Mapping[str, Estimate],
) -> str:
    """A table of what a step takes with adapters in the last blocks alone.

    Args:
        counts: numbers of blocks to try, falling: the network loses the adapters of the others.
        estimates: precision -> for the network as it is.
    """
    found = {f"{stack.adapted(network)}, as set": estimates[precision]}
    for count in counts:
        stack.keep_last(network, count)
        found[str(count)] = estimate(network, loss, batch, precision)
    rows = [
        [count, size(e.adapters), size(e.activations), size(e.total)] for count, e in found.items()
    ]
    return table([f"{stack.setting}, {precision}", "adapters", "activations", "together"], rows)
