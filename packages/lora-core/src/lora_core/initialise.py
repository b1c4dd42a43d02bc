"""Initial values of the adapter pairs, each a function of a seed and nothing else.

A pair starts so that the adapted layer equals the base: B = 0 (embeddings: A = 0), or, for PiSSA
and OLoRA, with an initial pair that is subtracted again.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from lora_core.layers import AdapterSpec
from lora_core.weights import as_matrix, weight_norm


def module_seed(seed: int, path: str) -> int:
    """The seed of one layer: adding a target does not change the initial values of the others."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def pair(W: Tensor, spec: AdapterSpec, seed: int) -> tuple[Tensor, Tensor]:
    """A and B of one weight, on its device, in fp32 (fp64 for an fp64 weight)."""
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    shape_A, shape_B = pair_shapes(W, spec)
    if spec.has_initial:
        A, B = _decomposed(W, spec)
    elif spec.kind == "embedding":
        A, B = torch.zeros(shape_A, device="cpu"), normal_B(shape_B, seed)
    else:
        A = (
            gaussian_A(shape_A, spec.r, seed)
            if spec.init == "gaussian"
            else kaiming_A(shape_A, seed)
        )
        B = torch.zeros(shape_B, device="cpu")
    return tuple(t.to(W.device, dtype).contiguous() for t in (A, B))  # type: ignore[return-value]


def pair_shapes(W: Tensor, spec: AdapterSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a weight."""
    if spec.kind == "embedding":
        return (spec.r, W.shape[0]), (W.shape[1], spec.r)
    if spec.rows is not None:
        adapted = sum(stop - start for start, stop in spec.rows)
        return (len(spec.rows) * spec.r, W.shape[1]), (adapted, spec.r)
    do, inputs = W.shape[0], W.shape[1]
    if spec.kind == "conv_transpose":
        do, inputs = W.shape[1] * spec.groups, W.shape[0] // spec.groups
    kernel = W.shape[2:]
    point = [1] * len(kernel) if spec.kind in ("conv", "conv_transpose") else []
    return (spec.groups * spec.r, inputs, *kernel), (do, spec.r, *point)


def magnitude(W: Tensor, A: Tensor, B: Tensor, spec: AdapterSpec) -> Tensor:
    """DoRA's m at the start: the norms of W, by the very sums that the forward pass will do."""
    matrix = as_matrix(W.detach().to(A.dtype), spec.groups, spec.transposed)
    norm = weight_norm(matrix, A, B, spec.scale, spec.groups)
    if spec.kind in ("conv", "conv_transpose"):
        return norm.view(1, -1, *[1] * (W.dim() - 2))
    return norm


def kaiming_A(shape: tuple[int, ...], seed: int) -> Tensor:
    """A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in = elements of one row (PEFT's default)."""
    bound = 1 / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=_generator(seed))


def gaussian_A(shape: tuple[int, ...], r: int, seed: int) -> Tensor:
    """A ~ N(0, 1/r^2) (PEFT's "gaussian")."""
    return torch.empty(shape, device="cpu").normal_(0, 1 / r, generator=_generator(seed))


def normal_B(shape: tuple[int, ...], seed: int) -> Tensor:
    """B ~ N(0, 1) of an embedding, whose A is zero."""
    return torch.empty(shape, device="cpu").normal_(generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    """On the CPU whatever the default device is: the same values everywhere."""
    return torch.Generator(device="cpu").manual_seed(seed)


def _decomposed(W: Tensor, spec: AdapterSpec) -> tuple[Tensor, Tensor]:
    """PiSSA's or OLoRA's pair, for each slice of its own rows."""
    downs, ups = [], []
    for start, stop in spec.rows or ((0, W.shape[0]),):
        part = W[start:stop]
        A, B = pissa(part, spec.r, spec.scale) if spec.init == "pissa" else olora(part, spec.r)
        downs.append(A)
        ups.append(B)
    return torch.cat(downs), torch.cat(ups)


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
