"""The mathematics of LoRA, free of module classes.

Notation: x (N, di) is the input as rows, W (do, di) the frozen weight, b (do) its bias,
A (r, di) and B (do, r) the adapter pair, s its scale, D element-wise dropout, g (N, do) the
gradient that arrives at the output. The adapted layer computes

    y = x W^T + b + s (D(x) A^T) B^T .

Every function works in the base's dtype, or in autocast's where that is on: A and B, which are
small, are cast to it, x is never cast up. Gradients come back in the parameter's own dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_core import dropout, remade
from lora_core.weights import (
    Rows,
    as_matrix,
    blocks,
    delta,
    dora_ratio,
    over_weight,
    weight_norm,
    without_autocast,
)

__all__ = [
    "Branch",
    "as_matrix",
    "compute_dtype",
    "delta",
    "dora",
    "dora_ratio",
    "double_differentiable",
    "lora_conv",
    "lora_embedding",
    "lora_linear",
    "lora_linear_plain",
    "needs_plain_form",
    "over_weight",
    "scaling",
    "weight_norm",
]

_double_backward: ContextVar[bool] = ContextVar("double_backward", default=False)


@dataclass(frozen=True)
class Branch:
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


def scaling(r: int, alpha: float, use_rslora: bool = False) -> float:
    """`s = alpha / r`, rank-stabilised `alpha / sqrt(r)` (arXiv 2312.03732)."""
    return alpha / r**0.5 if use_rslora else alpha / r


@contextlib.contextmanager
def double_differentiable() -> Iterator[None]:
    """Within the block, forward passes can be differentiated twice, at the memory cost of autograd.

    The fast functions store intermediates, so that a second derivative through them would be
    wrong; they raise instead. The transforms of `torch.func` (vmap, grad) need this block too.
    """
    token = _double_backward.set(True)
    try:
        yield
    finally:
        _double_backward.reset(token)


def needs_plain_form(x: Tensor) -> bool:
    """Whether only ordinary autograd operations will do: compilers, meta tensors, 2nd derivatives.

    A compiler sees the whole graph and fuses for itself; it cannot trace a generator.
    """
    return torch.compiler.is_compiling() or x.is_meta or _double_backward.get()


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


# Linear


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]
) -> Tensor:
    """`y = x W^T + b + sum over branches of s (D(x) A^T) B^T`, x (.., di) -> (.., do).

    With blocks, block j adds `s (D(x) A_j^T) B_j^T` to its own output columns. Kept for the
    backward pass: x (only if some A trains) and each `h = D(x) A^T` (only if its B trains), or
    neither where x can be made again, see `remade`.
    Differentiable once; see `double_differentiable`.
    """
    if not branches:
        return F.linear(x, weight, bias)
    if needs_plain_form(x):
        return lora_linear_plain(x, weight, bias, branches)
    seeds = [branch.mask_seed() if branch.dropout else 0 for branch in branches]
    factors = [factor for branch in branches for factor in (branch.A, branch.B)]
    y: Tensor = _LoraLinear.apply(x, weight, bias, branches, seeds, *factors)
    return y


def lora_linear_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]
) -> Tensor:
    """`lora_linear` by ordinary autograd operations: slower, the same numbers without dropout."""
    dtype = compute_dtype(x, weight)
    y = F.linear(x, weight, bias)
    for branch in branches:
        h = F.linear(dropout.plain_dropout(x, branch.dropout).to(dtype), branch.A.to(dtype))
        for h_part, out, b_rows in blocks(branch.rows, branch.B.shape[1], weight.shape[0]):
            update = branch.scale * F.linear(h[..., h_part], branch.B[b_rows].to(dtype))
            y = y + F.pad(update, (out.start, weight.shape[0] - out.stop))
    return y


class _LoraLinear(torch.autograd.Function):
    """`lora_linear` with its own backward pass.

    With `dh = s g B`:  dB = s g^T h,  dA = dh^T D(x),  dx = g W + D'(dh A),  db = sum g, where D'
    is the mask of D over q. Sums are made in place in buffers of this function, never in x or g,
    which others may still read.
    """

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
        dtype = compute_dtype(x, weight)
        y = F.linear(x, weight, bias).contiguous()
        x_rows, y_rows = _as_rows(x, dtype), y.view(-1, y.shape[-1])
        needs_x = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[5::2])
        ctx.remake_x = remade.recipe(x) if needs_x else None
        saved_h: list[Tensor | None] = []
        for i, (branch, seed) in enumerate(zip(branches, seeds, strict=True)):
            B = factors[2 * i + 1].to(dtype)
            h = _down(x_rows, factors[2 * i].to(dtype), branch, seed)
            for h_part, out, b_rows in blocks(branch.rows, branch.B.shape[1], weight.shape[0]):
                y_rows[:, out].addmm_(h[:, h_part], B[b_rows].t(), alpha=branch.scale)
            keeps_h = ctx.needs_input_grad[5 + 2 * i + 1] and ctx.remake_x is None
            saved_h.append(h if keeps_h else None)
        ctx.branches, ctx.seeds, ctx.dtype = branches, seeds, dtype
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        keeps_x = needs_x and ctx.remake_x is None
        ctx.save_for_backward(x if keeps_x else None, weight, *factors, *saved_h)
        # torch makes y of three and more axes as a view, and autograd refuses to change a view that
        # a custom function returns in place, as `nn.ReLU(inplace=True)` behind the layer would.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # Everything has its dtype already; a caller's autocast must not change it half-way.
        with without_autocast(g.device):
            return _lora_linear_backward(ctx, g)


def _lora_linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *rest = ctx.saved_tensors
    if ctx.remake_x is not None:
        x = ctx.remake_x()
    needs_x, needs_weight, needs_bias, _, _, *needs_factor = ctx.needs_input_grad
    factors, saved_h = rest[: len(needs_factor)], rest[len(needs_factor) :]
    g_rows = _as_rows(g, ctx.dtype)
    x_rows = None if x is None else _as_rows(x, ctx.dtype)
    dx = g_rows @ weight.to(ctx.dtype) if needs_x else None
    grads: list[Tensor | None] = []
    for i, (branch, seed) in enumerate(zip(ctx.branches, ctx.seeds, strict=True)):
        A, B = factors[2 * i], factors[2 * i + 1]
        needs_A, needs_B = needs_factor[2 * i : 2 * i + 2]
        dA = dB = None
        if needs_A or dx is not None:
            dh = _down_gradient(g_rows, B.to(ctx.dtype), branch)
            dA = _input_side(dh, x_rows if needs_A else None, A.to(ctx.dtype), dx, branch, seed)
        if needs_B:
            h: Tensor = saved_h[i]
            if h is None and x_rows is not None:  # made again, as x
                h = _down(x_rows, A.to(ctx.dtype), branch, seed)
            dB = _up_gradient(g_rows, h, branch)
        grads += [_like(dA, A), _like(dB, B)]
    dW = g_rows.t() @ x_rows if needs_weight and x_rows is not None else None
    db = g_rows.sum(0).to(ctx.bias_dtype) if needs_bias else None
    dx = None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype)
    return (dx, _like(dW, weight), db, None, None, *grads)


def _down(x: Tensor, A: Tensor, branch: Branch, seed: int) -> Tensor:
    """`h = D(x) A^T`: (N, di) -> (N, k r)."""
    if branch.dropout:
        return dropout.dropped_product(x, A, branch.dropout, seed)
    return x @ A.t()


def _down_gradient(g: Tensor, B: Tensor, branch: Branch) -> Tensor:
    """`dh = s g B`, block by block: g (N, do) -> (N, k r)."""
    dh = g.new_empty(branch.A.shape[0], g.shape[0])  # transposed, see `_up_gradient`
    for h_part, out, b_rows in blocks(branch.rows, branch.B.shape[1], g.shape[1]):
        torch.mm(B[b_rows].t(), g[:, out].t(), out=dh[h_part])
    return dh.mul_(branch.scale).t()


def _up_gradient(g: Tensor, h: Tensor, branch: Branch) -> Tensor:
    """`dB = s g^T h`, block by block: (rows_1 + .. + rows_k, r).

    Computed as (h^T g)^T: on the CPU the narrow matrix in front makes it several times faster.
    """
    parts = [
        (h[:, h_part].t() @ g[:, out]).t()
        for h_part, out, _ in blocks(branch.rows, branch.B.shape[1], g.shape[1])
    ]
    return torch.cat(parts).mul_(branch.scale)


def _input_side(
    dh: Tensor, x: Tensor | None, A: Tensor, dx: Tensor | None, branch: Branch, seed: int
) -> Tensor | None:
    """Add `D'(dh A)` to dx in place and give `dA = dh^T D(x)`; None where not asked for."""
    if branch.dropout:
        return dropout.dropped_product_backward(dh, x, A, dx, branch.dropout, seed)
    if dx is not None:
        dx.addmm_(dh, A)
    return None if x is None else dh.t() @ x


def _as_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).reshape(-1, t.shape[-1])


def _like(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)


# Convolution and embedding


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Branch],
    conv: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    groups: int = 1,
) -> Tensor:
    """`y = conv(x, W, b) + sum of s B conv(D(x), A)`.

    `conv(x, weight, bias)` is the base's own operation with its stride, padding, dilation, padding
    mode and G groups; A (G r, Cin / G, k..) is applied by it too, B (Cout, r, 1..) is point-wise.
    """
    dtype = compute_dtype(x, weight)
    y = conv(x, weight, bias)
    for branch in branches:
        h = _down_conv(x, branch.A.to(dtype), branch, lambda t, A: conv(t, A, None))
        y = y.add_(_pointwise(h, branch.B.to(dtype), groups), alpha=branch.scale)
    return y


def _down_conv(
    x: Tensor, A: Tensor, branch: Branch, conv: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`conv(D(x), A)`; with dropout run again in the backward pass, so that only x is kept."""
    if not branch.dropout:
        return conv(x, A)
    if needs_plain_form(x):
        return conv(dropout.plain_dropout(x, branch.dropout), A)
    p, seed = branch.dropout, branch.mask_seed()

    def run(t: Tensor, A: Tensor) -> Tensor:  # also called outside the forward's autocast
        return conv(dropout.seeded_dropout(t, p, seed).to(A.dtype), A)

    return dropout.recomputed(run, x, A)


def _pointwise(h: Tensor, B: Tensor, groups: int) -> Tensor:
    conv = (F.conv1d, F.conv2d, F.conv3d)[B.dim() - 3]
    return conv(h, B, groups=groups)


def lora_embedding(
    base: Tensor,
    tokens: Tensor,
    branches: Sequence[Branch],
    lookup: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`y = E[t] + sum of s (A^T)[t] B^T`: base = E[t] (.., dim), A (r, V), B (dim, r).

    `lookup(tokens, table)` has the base's settings, so that a padding row has no gradient in A
    either. Tokens cannot be dropped: `dropout` is ignored, as in PEFT. Writes into `base`.
    """
    for branch in branches:
        h = lookup(tokens, branch.A.t()).to(base.dtype)
        base = base.add_(h @ branch.B.to(base.dtype).t(), alpha=branch.scale)
    return base


# DoRA


def dora(
    adapted: Tensor, bias: Tensor | None, ratio: Tensor, clean_minus_dropped: Tensor | None = None
) -> Tensor:
    """`y = (m / n) (x W^T + s x A^T B^T) + b` (arXiv 2402.09353).

    Args:
        adapted: the LoRA output with bias, of D(x) where there is dropout.
        bias: b in a shape that broadcasts over `adapted`.
        ratio: m / n, likewise; exactly 1 at the start, where y is `adapted` bit for bit.
        clean_minus_dropped: `(x - D(x)) W^T`; with it the base sees the clean x, as in PEFT:
            `y = x W^T + b + (m/n - 1) D(x) W^T + (m/n) s D(x) A^T B^T`.
    """
    directed = adapted if bias is None else adapted - bias.to(adapted.dtype)
    y = torch.addcmul(adapted, (ratio - 1).to(adapted.dtype), directed)
    return y if clean_minus_dropped is None else y + clean_minus_dropped
