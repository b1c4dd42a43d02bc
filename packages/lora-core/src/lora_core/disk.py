"""What a run will write, and whether the disk has room for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.errors import ConfigError
from lora_core.memory import ADAM_MOMENTS, adapter_bytes, size
from lora_core.report import table

if TYPE_CHECKING:
    from torch import nn

SMALL_FILES = 200_000  # bytes of the JSON files in a checkpoint: settings, random states, counters


def checkpoint_bytes(network: nn.Module) -> int:
    """Bytes of one training checkpoint: the adapter for PEFT, and it again with the moments."""
    return (2 + ADAM_MOMENTS) * adapter_bytes(network) + SMALL_FILES


def free_space(folder: str | Path) -> int:
    """Free bytes where a folder is, or will be made."""
    place = Path(folder).absolute()
    while not os.path.exists(place):  # Path.exists raises where it may not look
        place = place.parent
    return shutil.disk_usage(place).free


def disk_table(parts: Mapping[str, int], folder: str | Path) -> str:
    """What a run writes, part by part, beside the free space."""
    rows = [[name, size(count)] for name, count in parts.items()]
    rows.append(["together", size(sum(parts.values()))])
    room = f"free at {Path(folder).absolute()}: {size(free_space(folder))}"
    return f"{table(['files of the run', 'at most'], rows)}\n{room}"


def check_space(parts: Mapping[str, int], folder: str | Path, written: int = 0) -> None:
    """Insist on room for what a run will write.

    Args:
        parts: name -> bytes, at the time when most is there.
        folder: where it goes; it need not exist yet.
        written: bytes of it that are there already, from before a resume.

    Raises:
        ConfigError: too little free space, with the parts.
    """
    needed, free = sum(parts.values()) - written, free_space(folder)
    if needed <= free:
        return
    each = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    raise ConfigError(
        f"{Path(folder).absolute()}: {size(free)} free, but the run will write up to "
        f"{size(needed)} ({each}): make room, choose another folder, or keep fewer files"
    )


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files in a folder, links not followed; 0 if there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another process deletes its temporary files
                total += os.lstat(os.path.join(place, name)).st_size
    return total
