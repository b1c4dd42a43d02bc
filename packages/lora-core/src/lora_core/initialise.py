"""Initial values of the adapter pairs, each a function of a seed and nothing else.

A pair starts so that the adapted layer equals the base: B = 0 (embeddings: A = 0), or, for PiSSA
and OLoRA, with an initial pair that is subtracted again.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def module_seed(seed: int, path: str) -> int:
    """The seed of one layer: adding a target does not change the initial values of the others."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def kaiming_A(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in = elements of one row (PEFT's default)."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


def gaussian_A(
    shape: tuple[int, ...], r: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A ~ N(0, 1/r^2) (PEFT's "gaussian")."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=dtype).normal_(0, 1 / r, generator=generator)


def normal_B(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """B ~ N(0, 1) of an embedding, whose A is zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=dtype).normal_(generator=generator)


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The r principal directions of the weight, as a pair with `scale * B A` = that part of it.

    `W = U S V^T`, `B = U_r sqrt(S_r / s)`, `A = sqrt(S_r / s) V_r^T` (arXiv 2404.02948).
    weight (do, di) -> A (r, di), B (do, r).
    """
    U, S, Vt = torch.linalg.svd(_wide(weight), full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root


def olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A pair from the reduced QR of the weight: `B = Q_r`, `A = R_r` (arXiv 2406.01775).

    As in PEFT the scale stays outside: the part that moves into the adapter is `scale * B A`.
    """
    Q, R = torch.linalg.qr(_wide(weight))
    return R[:r].contiguous(), Q[:, :r].contiguous()


def _wide(weight: Tensor) -> Tensor:
    """The weight in a dtype that the decompositions exist for."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
