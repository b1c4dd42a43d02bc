"""The adapted Linear with its own backward pass, in the cheaper of two ways.

- *low-rank*: `y = x W^T + b`, then `s h B^T` is added in place, as `dh A` is to dx.
- *merged*: with many rows and no dropout, `y = x W'^T + b` and `dx = g W'` with `W' = W + s B A`,
  which is built in both passes and not kept: no more passes over y and dx. h is made again.

Both keep x at most, or what it can be made from again, and give the same numbers but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_core import dropout, remade
from lora_core.branch import Branch, compute_dtype
from lora_core.weights import blocks, without_autocast

# Rows per di do / (di + do), which weighs the passes that are saved against those over W. Measured
# on CPUs (docs/benchmarks.md); other devices take the low-rank way.
MERGED_FROM = 8.0
# Ranks from which products with wide matrices are fastest as they are written. Below, the CPU takes
# up to six times as long as for the transposed product.
DOWN_FROM, UP_FROM = 16, 64
BLOCK, ROWS = 1 << 19, 256  # elements of g at a time for each thread, and rows at least
EXACT = (torch.float32, torch.float64)  # a narrower W' would round small updates away


@dataclass(frozen=True)
class Call:
    """What one call computes, beside its tensors.

    Attributes:
        branches, seeds: the adapters and the seeds of their masks.
        dtype: of the computation. merged: which of the two ways.
    """

    branches: Sequence[Branch]
    seeds: Sequence[int]
    dtype: torch.dtype
    merged: bool


@dataclass(frozen=True)
class Needs:
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
        ctx.call = Call(
            branches,
            seeds,
            dtype := compute_dtype(x, weight),
            # It makes h again from x, which is kept only where A trains.
            all(needs_factor[::2]) and merges(_as_rows(x, dtype), weight, branches),
        )
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        y, saved_h = forward(ctx.call, x, weight, bias, factors)
        ctx.remake_x = remade.recipe(x) if ctx.needs.input else None
        for i, branch in enumerate(branches):
            # Making h again, too, is one narrow product, but with dropout also the mask's work.
            spared = ctx.remake_x is not None and not branch.dropout
            if spared or not needs_factor[2 * i + 1]:
                saved_h[i] = None
        keeps_x = ctx.needs.input and ctx.remake_x is None
        ctx.save_for_backward(x if keeps_x else None, weight, *factors, *saved_h)
        # torch makes y of three and more axes as a view, and autograd refuses to change a view that
        # a custom function returns in place, as `nn.ReLU(inplace=True)` behind the layer would.
        return torch.ops.aten._unsafe_view(y, y.shape)

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
        dx = None if dx is None else dx.to(ctx.x_dtype)
        return dx, dW, None if db is None else db.to(ctx.bias_dtype), None, None, *grads


def merges(x: Tensor, weight: Tensor, branches: Sequence[Branch]) -> bool:
    """Whether *merged* is the cheapest way for x (N, di), in the dtype of the computation."""
    dropped = any(branch.dropout for branch in branches)
    return not dropped and pays(x, weight, MERGED_FROM)


def pays(x: Tensor, weight: Tensor, least: float) -> bool:
    """Whether x (N, di) has `least` rows per di do / (di + do), where that counts."""
    di, do = x.shape[1], weight.shape[0]
    here = x.device.type == "cpu" and x.dtype in EXACT
    return here and x.shape[0] * (di + do) >= least * di * do


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """y (.., do), and h (N, k r) of each branch where it is computed."""
    saved_h: list[Tensor | None] = [None] * len(call.branches)
    if call.merged:
        merged = _merged_weight(weight, call.branches, factors, call.dtype)
        return F.linear(x, merged, bias).contiguous(), saved_h
    y = F.linear(x, weight, bias).contiguous()
    x_rows, y_rows = _as_rows(x, call.dtype), y.view(-1, y.shape[-1])
    for i, (branch, seed) in enumerate(zip(call.branches, call.seeds, strict=True)):
        h = saved_h[i] = _down(x_rows, factors[2 * i].to(call.dtype), branch, seed)
        B = factors[2 * i + 1].to(call.dtype)
        for h_part, out, b_rows in blocks(branch.rows, B.shape[1], y.shape[-1]):
            y_rows[:, out].addmm_(h[:, h_part], B[b_rows].t(), alpha=branch.scale)
    return y, saved_h


def backward(
    call: Call,
    needs: Needs,
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    factors: Sequence[Tensor],
    saved_h: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of x, W, b and the factors, for g (.., do) and x (.., di).

    With `dh = s g B`:  dB = s g^T h,  dA = dh^T D(x),  dx = g W + D'(dh A),  db = sum g, where D'
    is the mask of D over q. Sums are made in place in buffers of this function, never in x or g,
    which others may still read.
    """
    g_rows = _as_rows(g, call.dtype)
    x_rows = None if x is None else _as_rows(x, call.dtype)
    dx = g_rows @ _base_weight(call, weight, factors) if needs.x else None
    grads = _factor_gradients(call, needs, g_rows, x_rows, dx, factors, saved_h)
    dW = g_rows.t() @ x_rows if needs.weight and x_rows is not None else None
    db = g_rows.sum(0) if needs.bias else None
    dx = None if dx is None else dx.view(*g.shape[:-1], weight.shape[1])
    return [dx, _like(dW, weight), db, *grads]


def _base_weight(call: Call, weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """What g is multiplied with for dx: W, or W' where that is all of dx."""
    if call.merged:
        return _merged_weight(weight, call.branches, factors, call.dtype)
    return weight.to(call.dtype)


def _factor_gradients(
    call: Call,
    needs: Needs,
    g: Tensor,
    x: Tensor | None,
    dx: Tensor | None,
    factors: Sequence[Tensor],
    saved_h: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """dA and dB of each branch in turn; adds to dx, unless that came from W'."""
    rest = None if call.merged else dx
    grads: list[Tensor | None] = []
    for i, (branch, seed) in enumerate(zip(call.branches, call.seeds, strict=True)):
        A, B = factors[2 * i], factors[2 * i + 1]
        needs_A, needs_B = needs.factors[2 * i : 2 * i + 2]
        B_, h = B.to(call.dtype), saved_h[i]
        if needs_B and h is None:
            assert x is not None
            h = _down(x, A.to(call.dtype), branch, seed)
        needs_dh = needs_A or rest is not None
        dh, dB = _output_side(g, h if needs_B else None, B_ if needs_dh else None, branch)
        dA = None
        if dh is not None:
            dA = _input_side(dh, x if needs_A else None, A.to(call.dtype), rest, branch, seed)
        grads += [_like(dA, A), _like(dB, B)]
    return grads


# -- the parts -------------------------------------------------------------------------------------


def _down(x: Tensor, A: Tensor, branch: Branch, seed: int) -> Tensor:
    """`h = D(x) A^T`: (N, di) -> (N, k r)."""
    if branch.dropout:
        return dropout.dropped_product(x, A, branch.dropout, seed)
    return x @ A.t()


def _output_side(
    g: Tensor, h: Tensor | None, B: Tensor | None, branch: Branch
) -> tuple[Tensor | None, Tensor | None]:
    """dh and dB, each if B or h is given.

    On the CPU g (N, do) is read once for both, in blocks of rows that stay in the cache.
    """
    step = max(ROWS, BLOCK * torch.get_num_threads() // max(1, g.shape[1]))
    blocked = g.device.type == "cpu" and g.dtype in EXACT and detect_fake_mode() is None
    if h is None or B is None or not blocked or len(g) <= step:
        dh = None if B is None else _down_gradient(g, B, branch)
        return dh, None if h is None else _up_gradient(g, h, branch)
    parts, dB = [], B.new_zeros(B.shape)
    for start in range(0, len(g), step):
        rows = slice(start, start + step)
        parts.append(_down_gradient(g[rows], B, branch))
        dB += _up_gradient(g[rows], h[rows], branch)
    return torch.cat(parts), dB


def _down_gradient(g: Tensor, B: Tensor, branch: Branch) -> Tensor:
    """`dh = s g B`, block by block: g (N, do) -> (N, k r)."""
    parts = [
        g[:, out] @ B[b_rows] if B.shape[1] >= DOWN_FROM else (B[b_rows].t() @ g[:, out].t()).t()
        for _, out, b_rows in blocks(branch.rows, B.shape[1], g.shape[1])
    ]
    return _joined(parts, 1).mul_(branch.scale)


def _up_gradient(g: Tensor, h: Tensor, branch: Branch) -> Tensor:
    """`dB = s g^T h`, block by block: (rows_1 + .. + rows_k, r)."""
    r, parts = branch.B.shape[1], []
    for h_part, out, _ in blocks(branch.rows, r, g.shape[1]):
        if r >= UP_FROM:
            parts.append((g[:, out].t() @ h[:, h_part]).mul_(branch.scale))
        else:
            parts.append((h[:, h_part].t() @ g[:, out]).mul_(branch.scale).t())
    return _joined(parts, 0).contiguous()


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _input_side(
    dh: Tensor, x: Tensor | None, A: Tensor, dx: Tensor | None, branch: Branch, seed: int
) -> Tensor | None:
    """Add `D'(dh A)` to dx in place and give `dA = dh^T D(x)`; None where not asked for."""
    if branch.dropout:
        return dropout.dropped_product_backward(dh, x, A, dx, branch.dropout, seed)
    if dx is not None:
        dx.addmm_(dh, A)
    return None if x is None else dh.t() @ x


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
    return t.to(dtype).reshape(-1, t.shape[-1])


def _like(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)
