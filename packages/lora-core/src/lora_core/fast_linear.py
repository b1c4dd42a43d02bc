"""The adapted Linear with its own backward pass, in the cheaper of two ways.

- *low-rank*: `y = x W^T + b`, then `s h B^T` is added in place, as `dh A` is to dx.
- *merged*: with many rows and no dropout, `y = x W'^T + b` and `dx = g W'` with `W' = W + s B A`,
  which is built in both passes and not kept: no more passes over y and dx.

The low-rank products are taken in blocks of rows, see `row_blocks`. Kept are x at most, or what it
can be made from again, and h if that is not made again, too. Both ways give the same numbers but
for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_core import remade, row_blocks
from lora_core.branch import Branch, compute_dtype, in_dtype
from lora_core.weights import blocks, without_autocast

_unsafe_view = torch.ops.aten._unsafe_view.default

# Rows per di do / (di + do), which weighs the passes that are saved against those over W. Measured
# on CPUs (docs/benchmarks.md); other devices take the low-rank way.
MERGED_FROM = 8.0


class Call(NamedTuple):
    """What one call computes, beside its tensors.

    Attributes:
        branches, seeds: the adapters and the seeds of their masks.
        dtype: of the computation.
        merged: which of the two ways.
        keeps_h: whether each h, of D(x) and A^T, is kept for the backward pass, or made again.
    """

    branches: Sequence[Branch]
    seeds: Sequence[int]
    dtype: torch.dtype
    merged: bool
    keeps_h: bool


class Needs(NamedTuple):
    """Whose gradients are asked for; factors are A and B of each branch in turn."""

    x: bool
    weight: bool
    bias: bool
    factors: Sequence[bool]

    @property
    def input(self) -> bool:
        """Whether x is needed for them."""
        return self.weight or any(self.factors[::2])


class LoraLinear(torch.autograd.Function):
    """`functional.lora_linear`; factors are A and B of each branch in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        branches: Sequence[Branch],
        seeds: Sequence[int],
        *factors: Tensor,
    ) -> Tensor:
        needs_x, needs_weight, needs_bias, _, _, *needs_factor = ctx.needs_input_grad
        ctx.needs = Needs(needs_x, needs_weight, needs_bias, needs_factor)
        ctx.remake_x = remade.recipe(x) if ctx.needs.input else None
        ctx.call = plan(x, weight, branches, seeds, needs_factor, ctx.remake_x is not None)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        y, hs = forward(ctx.call, x, weight, bias, factors)
        keeps_x = ctx.needs.input and ctx.remake_x is None
        ctx.save_for_backward(x if keeps_x else None, weight, *factors, *hs)
        # torch makes y of three and more axes as a view, and autograd refuses to change a view that
        # a custom function returns in place, as `nn.ReLU(inplace=True)` behind the layer would.
        return _unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        if ctx.remake_x is not None:
            x = ctx.remake_x()
        count = len(ctx.needs.factors)
        # Everything has its dtype already; a caller's autocast must not change it half-way.
        with without_autocast(g.device):
            dx, dW, db, *grads = backward(
                ctx.call, ctx.needs, g, x, weight, rest[:count], rest[count:]
            )
        dx = None if dx is None else in_dtype(dx, ctx.x_dtype)
        return dx, dW, None if db is None else db.to(ctx.bias_dtype), None, None, *grads


def plan(
    x: Tensor,
    weight: Tensor,
    branches: Sequence[Branch],
    seeds: Sequence[int],
    needs_factor: Sequence[bool],
    remade_x: bool,
) -> Call:
    """How to compute `functional.lora_linear`, where these factors ask for gradients.

    Args:
        remade_x: whether x is made again in the backward pass.
    """
    dtype = compute_dtype(x, weight)
    dropped = any(branch.dropout for branch in branches)
    # It makes h again from x, which is kept only where A trains.
    merged = all(needs_factor[::2]) and not dropped and pays(x, weight, dtype, MERGED_FROM)
    # Where x is made again, h is one narrow product more, but with dropout also the mask's work.
    spares_h = merged or (remade_x and not dropped)
    return Call(branches, seeds, dtype, merged, any(needs_factor[1::2]) and not spares_h)


def pays(x: Tensor, weight: Tensor, dtype: torch.dtype, least: float) -> bool:
    """Whether x (.., di) has `least` rows per di do / (di + do), where that counts."""
    do, di = weight.shape
    rows = x.numel() // max(1, di)
    return row_blocks.measured(x.device, dtype) and rows * (di + do) >= least * di * do


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """y (.., do), and h (N, k r) of each branch if it is to be kept, as `backward` wants it."""
    hs: list[Tensor | None] = [None] * len(call.branches)
    if call.merged:
        W = _merged_weight(weight, call.branches, factors, call.dtype)
        return F.linear(x, W, bias).contiguous(), hs
    y = F.linear(x, weight, bias).contiguous()
    x_rows, y_rows = _as_rows(x, call.dtype), y if y.dim() == 2 else y.view(-1, y.shape[-1])
    return y, row_blocks.forward(_adapters(call, factors), x_rows, y_rows, keep=call.keeps_h)


def backward(
    call: Call,
    needs: Needs,
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    factors: Sequence[Tensor],
    hs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of x, W, b and the factors, for g (.., do) and x (.., di).

    With `dh = s g B`:  dB = s g^T h,  dA = dh^T D(x),  dx = g W + D'(dh A),  db = sum g, where D'
    is the mask of D over q. Sums are made in place in buffers of this function, never in x or g,
    which others may still read.
    """
    g_rows = _as_rows(g, call.dtype)
    x_rows = None if x is None else _as_rows(x, call.dtype)
    base = _base_weight(call, weight, factors) if needs.x else None
    adapters = _adapters(call, factors, needs)
    dx = row_blocks.backward(adapters, g_rows, x_rows, hs, base, add=not call.merged)
    grads = [grad for adapter in adapters for grad in adapter.gradients()]
    grads = [_like(grad, factor) for grad, factor in zip(grads, factors, strict=True)]
    dW = g_rows.t() @ x_rows if needs.weight and x_rows is not None else None
    db = g_rows.sum(0) if needs.bias else None
    if dx is not None and g.dim() != 2:
        dx = dx.view(*g.shape[:-1], weight.shape[1])
    return [dx, _like(dW, weight), db, *grads]


def _adapters(
    call: Call, factors: Sequence[Tensor], needs: Needs | None = None
) -> list[row_blocks.Adapter]:
    asked = [False] * len(factors) if needs is None else needs.factors
    adapters = []
    for i, (branch, seed) in enumerate(zip(call.branches, call.seeds, strict=True)):
        A, B = in_dtype(factors[2 * i], call.dtype), in_dtype(factors[2 * i + 1], call.dtype)
        adapters.append(row_blocks.Adapter(branch, seed, A, B, asked[2 * i], asked[2 * i + 1]))
    return adapters


def _base_weight(call: Call, weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """What g is multiplied with for dx: W, or W' where that is all of dx."""
    if call.merged:
        return _merged_weight(weight, call.branches, factors, call.dtype)
    return in_dtype(weight, call.dtype)


def _merged_weight(
    weight: Tensor, branches: Sequence[Branch], factors: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """`W' = W + sum of s B A`, a new tensor (do, di)."""
    merged = weight.to(dtype, copy=True)
    for branch, A, B in zip(branches, factors[::2], factors[1::2], strict=True):
        for of_A, out, of_B in blocks(branch.rows, B.shape[1], weight.shape[0]):
            merged[out].addmm_(B[of_B].to(dtype), A[of_A].to(dtype), alpha=branch.scale)
    return merged


def _as_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    t = in_dtype(t, dtype)
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _like(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if grad is None else in_dtype(grad, parameter.dtype).contiguous()
