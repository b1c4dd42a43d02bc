"""One adapter of one weight, and the dtype in which it is computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_core import dropout
from lora_core.weights import Rows


class Branch(NamedTuple):
    """One adapter of one weight.

    Attributes:
        A: (r, di); for a weight with kernel or groups (G r, di / G, ..). Fused slices stack the
            A of their k blocks: (k r, di).
        B: (do, r); convolutions (do, r, 1, ..). Fused slices stack the rows of their blocks:
            (rows_1 + .. + rows_k, r).
        scale: s.
        rows: (start, stop) of the output rows of each block; None: one block, all rows.
        dropout: p of D.
        seed: fixes the mask; None: drawn from torch's default generator at each call.
    """

    A: Tensor
    B: Tensor
    scale: float
    rows: Rows | None = None
    dropout: float = 0.0
    seed: int | None = None

    def mask_seed(self) -> int:
        """The seed of this call's mask."""
        return dropout.draw_seed() if self.seed is None else self.seed


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """autocast's dtype where that is on for x's device, else the weight's; fp64 stays fp64."""
    device = x.device.type
    if (
        weight.dtype != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which in a small layer takes as long as a product even if nothing changes."""
    return t if t.dtype == dtype else t.to(dtype)
