"""The adapted Linear as one operation for `torch.compile`.

A compiler would take `fast_linear` apart: it cannot trace seeded masks, and its own fusions of the
plain form are slower (docs/benchmarks.md). As operations that it does not look into, forward and
backward run as they do without it, and the graph has no break.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.branch import Branch
from lora_core.fast_linear import Call, Needs, backward, forward, plan
from lora_core.row_blocks import laid_out
from lora_core.weights import Rows


def compiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]
) -> Tensor:
    """`functional.lora_linear`, called while a compiler traces."""
    dropped = any(branch.dropout for branch in branches)
    factors = [factor for branch in branches for factor in (branch.A, branch.B)]
    trained = [torch.is_grad_enabled() and factor.requires_grad for factor in factors]
    call = plan(x, weight, branches, (), trained, remade_x=False)
    y: Tensor
    y, _ = torch.ops.lora_core.linear(
        x,
        weight,
        bias,
        factors,
        _seeds(branches) if dropped else None,
        [branch.scale for branch in branches],
        [branch.dropout for branch in branches],
        [number for branch in branches for number in _numbers(branch.rows)],
        call.dtype,
        call.merged,
        call.keeps_h,
    )
    return y


def _seeds(branches: Sequence[Branch]) -> Tensor:
    """Of the masks: drawn in the graph, so that each call has others."""
    drawn = torch.randint(2**62, (len(branches),), device="cpu")
    fixed = [-1 if branch.seed is None else branch.seed for branch in branches]
    if all(seed < 0 for seed in fixed):
        return drawn
    given = torch.tensor(fixed, device="cpu")
    return torch.where(given < 0, drawn, given)


def _numbers(rows: Rows | None) -> Iterator[int]:
    """Blocks as a list of whole numbers: how many, then start and stop of each."""
    yield len(rows or ())
    for block in rows or ():
        yield from block


def _call(
    factors: Sequence[Tensor],
    seeds: Tensor | None,
    scales: Sequence[float],
    dropouts: Sequence[float],
    rows: Sequence[int],
    dtype: torch.dtype,
    merged: bool,
    keeps_h: bool,
) -> Call:
    numbers, branches = iter(rows), []
    for A, B, scale, p in zip(factors[::2], factors[1::2], scales, dropouts, strict=True):
        found = tuple((next(numbers), next(numbers)) for _ in range(next(numbers)))
        branches.append(Branch(A, B, scale, found or None, p))
    given = [0] * len(branches) if seeds is None else seeds.tolist()
    return Call(branches, given, dtype, merged, keeps_h)


# -- forward ---------------------------------------------------------------------------------------


@torch.library.custom_op("lora_core::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    seeds: Tensor | None,
    scales: Sequence[float],
    dropouts: Sequence[float],
    rows: Sequence[int],
    dtype: torch.dtype,
    merged: bool,
    keeps_h: bool,
) -> tuple[Tensor, Tensor]:
    call = _call(factors, seeds, scales, dropouts, rows, dtype, merged, keeps_h)
    # Compiled code runs without autocast.
    given = None if bias is None else bias.to(dtype)
    y, h = forward(call, x.to(dtype), weight.to(dtype), given, factors)
    if not keeps_h:
        return y, y.new_empty(0)
    return y, torch.cat([part for part in h if part is not None], 1)


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    seeds: Tensor | None,
    scales: Sequence[float],
    dropouts: Sequence[float],
    rows: Sequence[int],
    dtype: torch.dtype,
    merged: bool,
    keeps_h: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    if not keeps_h:
        return y, y.new_empty(0)
    width = sum(A.shape[0] for A in factors[::2])
    return y, y.new_empty(math.prod(y.shape[:-1]), width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, factors, seeds, *ctx.words = inputs
    ctx.needs = [t is not None and t.requires_grad for t in (x, weight, bias, *factors)]
    needs_weight, needs_factor = ctx.needs[1], ctx.needs[3:]
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
    kept = needs_weight or any(needs_factor[::2])
    h = output[1] if any(needs_factor[1::2]) else None
    ctx.save_for_backward(x if kept else None, weight, seeds, h, *factors)


def _gradients(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, weight, seeds, h, *factors = ctx.saved_tensors
    found = torch.ops.lora_core.linear_backward(
        g, x, weight, h, factors, seeds, *ctx.words, ctx.needs
    )
    dx, dW, db, *grads = (
        grad if needed else None for grad, needed in zip(found, ctx.needs, strict=True)
    )
    dx = None if dx is None else dx.to(ctx.x_dtype)
    db = None if db is None else db.to(ctx.bias_dtype)
    return dx, dW, db, grads, *[None] * 7


torch.library.register_autograd("lora_core::linear", _gradients, setup_context=_setup)


# -- backward --------------------------------------------------------------------------------------


@torch.library.custom_op("lora_core::linear_backward", mutates_args=())
def _linear_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    h: Tensor | None,
    factors: Sequence[Tensor],
    seeds: Tensor | None,
    scales: Sequence[float],
    dropouts: Sequence[float],
    rows: Sequence[int],
    dtype: torch.dtype,
    merged: bool,
    keeps_h: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    call = _call(factors, seeds, scales, dropouts, rows, dtype, merged, keeps_h)
    hs: list[Tensor | None] = [None] * len(call.branches)
    if h is not None and keeps_h:
        for i, part in enumerate(h.split([len(A) for A in factors[::2]], 1)):
            hs[i] = laid_out(part)
    asked = Needs(needs[0], needs[1], needs[2], needs[3:])
    found = backward(call, asked, g, x, weight, factors, hs)
    return [g.new_empty(0) if grad is None else grad.contiguous() for grad in found]


@_linear_backward.register_fake
def _(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    h: Tensor | None,
    factors: Sequence[Tensor],
    seeds: Tensor | None,
    scales: Sequence[float],
    dropouts: Sequence[float],
    rows: Sequence[int],
    dtype: torch.dtype,
    merged: bool,
    keeps_h: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    dx = g.new_empty(*g.shape[:-1], weight.shape[1], dtype=dtype)
    db = g.new_empty(weight.shape[0], dtype=dtype)
    made = [dx, torch.empty_like(weight), db, *(torch.empty_like(factor) for factor in factors)]
    return [
        tensor if needed else g.new_empty(0) for tensor, needed in zip(made, needs, strict=True)
    ]
