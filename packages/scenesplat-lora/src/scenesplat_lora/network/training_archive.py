"""What the official trainer saves with `torch.save`, read without running anything in it.

`best_metric_value` is a NumPy scalar there, which a load of weights alone refuses. Nothing of NumPy
is allowed instead: stand-ins of our own take the place of its functions, and know plain numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_core.tensor_file import read_torch

_FORMATS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}


class _DType:
    """Stands for `numpy.dtype`: its code, such as "f8"."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and structure: numbers have the usual ones."""


def _scalar(dtype: _DType, data: bytes) -> float | int | bool:
    """Stands for NumPy's `scalar`, which makes a number of its bytes."""
    number: float | int | bool = struct.unpack(_FORMATS[dtype.code], data)[0]
    return number


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_DType, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),  # since NumPy 2
]


def read_archive(path: Path, device: str = "cpu") -> Any:
    """Read a file of `torch.save`; NumPy numbers become Python's.

    Args:
        device: "cpu", or "meta": tensors without values.

    Raises:
        CheckpointError: as `lora_core.tensor_file.read_torch`.
    """
    with torch.serialization.safe_globals(_STAND_INS):
        return read_torch(path, device=device)
