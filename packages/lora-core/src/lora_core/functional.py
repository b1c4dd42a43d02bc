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

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core import dropout
from lora_core.branch import Branch, compute_dtype
from lora_core.compiled_linear import compiled_linear
from lora_core.fast_dora import MergedDora
from lora_core.fast_linear import LoraLinear, pays
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
    "Rows",
    "as_matrix",
    "compute_dtype",
    "delta",
    "dora",
    "dora_layer",
    "dora_linear",
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
    "without_autocast",
]

# As `fast_linear.MERGED_FROM`; in steps DoRA takes more passes over y than LoRA.
DORA_MERGED_FROM = 2.0

Base = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_double_backward: ContextVar[bool] = ContextVar("double_backward", default=False)


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

    A compiler cannot trace a generator; a Linear is one operation for it, see `compiled_linear`.
    """
    return torch.compiler.is_compiling() or x.is_meta or _double_backward.get()


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
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return compiled_linear(x, weight, bias, branches)
    if needs_plain_form(x):
        return lora_linear_plain(x, weight, bias, branches)
    seeds = [branch.mask_seed() if branch.dropout else 0 for branch in branches]
    factors = [factor for branch in branches for factor in (branch.A, branch.B)]
    y: Tensor = LoraLinear.apply(x, weight, bias, branches, seeds, *factors)
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


def dora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch, ratio: Tensor
) -> Tensor:
    """`dora_layer` of a Linear: x (.., di), ratio m / n (do) -> (.., do).

    Computed with one weight where there are many rows, see `fast_dora`; in steps at the start, when
    every ratio is 1 and no bit of y may differ from the base's.
    """
    one_dtype = compute_dtype(x, weight) == x.dtype == branch.A.dtype
    if (
        one_dtype
        and not weight.requires_grad
        and not needs_plain_form(x)
        and pays(x, weight, x.dtype, DORA_MERGED_FROM)
        and bool((ratio != 1).any())
    ):
        y: Tensor = MergedDora.apply(x, weight, bias, branch.A, branch.B, ratio, branch)
        return y
    return dora_layer(x, weight, bias, branch, ratio, F.linear, lora_linear)


def dora_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch: Branch,
    ratio: Tensor,
    base: Base,
    adapted: Callable[[Tensor, Tensor, Tensor | None, Sequence[Branch]], Tensor],
) -> Tensor:
    """A layer with DoRA in steps; `base` and `adapted` compute it without and with LoRA.

    With dropout the base sees the clean x: it is `base(x - D(x))` beside DoRA of D(x).
    """
    rest, p = None, branch.dropout
    if p and x.is_floating_point():
        dropped = _dropped(x, branch)
        rest, x = base(x - dropped, weight, None), dropped
    column = (-1, *[1] * (weight.dim() - 2))  # how a value per output unit broadcasts over y
    y = adapted(x, weight, bias, [Branch(branch.A, branch.B, branch.scale)])
    return dora(y, None if bias is None else bias.view(column), ratio.view(column), rest)


def _dropped(x: Tensor, branch: Branch) -> Tensor:
    if needs_plain_form(x):
        return dropout.plain_dropout(x, branch.dropout)
    return dropout.seeded_dropout(x, branch.dropout, branch.mask_seed())


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
