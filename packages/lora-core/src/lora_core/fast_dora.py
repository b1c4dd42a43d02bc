"""DoRA of a Linear with many rows: one product with one weight, in both directions.

    u = D(x) V^T,  V = W + s B A,    y = (m/n) u + b + (x - D(x)) W^T

The last term is there with dropout only: what is dropped reaches the frozen layer. V is built in
both passes and not kept. x, or what it can be made from again, and u are: the gradient of m is a
sum over g u. With few rows, in half precision and on other devices the layer is computed in steps,
see `functional.dora_linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_core import dropout, remade
from lora_core.branch import Branch
from lora_core.weights import without_autocast

BLOCK = 1 << 16  # elements whose products are summed at a time: they stay in the cache of one core


class MergedDora(torch.autograd.Function):
    """x (.., di), A (r, di), B (do, r), ratio m/n (do) -> (.., do).

    With `R = diag(m/n)`:  dx = D'(g R V) + g W - D'(g W),  dB = s R g^T (D(x) A^T),
    dA = s (g R B)^T D(x),  d(m/n) = sum over rows of g u,  db = sum of g.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        ratio: Tensor,
        branch: Branch,
    ) -> Tensor:
        ctx.scale, ctx.p, ctx.x_shape = branch.scale, branch.dropout, x.shape
        ctx.seed = branch.mask_seed() if branch.dropout else 0
        dropped = _dropped(ctx, x)
        u = dropped @ _adapted(weight, A, B, ctx.scale).t()
        if ctx.p:
            y = F.linear(x - dropped, weight, bias).addcmul_(u, ratio)
        else:
            y = u * ratio if bias is None else torch.addcmul(bias, u, ratio)
        _, _, _, needs_A, needs_B, needs_ratio, _ = ctx.needs_input_grad
        ctx.remake_x = remade.recipe(x)
        keeps_x = ctx.remake_x is None and (needs_A or needs_B)
        ctx.save_for_backward(
            x if keeps_x else None, weight, A, B, ratio, u if needs_ratio else None
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(g.device):
            return _backward(ctx, g)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, A, B, ratio, u = ctx.saved_tensors
    needs_x, _, needs_bias, needs_A, needs_B, needs_ratio, _ = ctx.needs_input_grad
    g, column = _rows(g), ratio[:, None]
    dx = dA = dB = None
    if needs_x:
        dx = _input_gradient(ctx, g, weight, _adapted(weight, A, B, ctx.scale).mul_(column))
    if needs_A or needs_B:
        x = _rows(_dropped(ctx, x if ctx.remake_x is None else ctx.remake_x()))
    if needs_A:  # narrow matrices first: on the CPU several times faster
        dA = torch.mm((B * column).t(), g.t()).mul_(ctx.scale) @ x
    if needs_B:
        dB = ((x @ A.t()).t() @ g).t().mul(column).mul_(ctx.scale)
    dratio = sum_of_products(g, _rows(u)) if needs_ratio else None
    return dx, None, g.sum(0) if needs_bias else None, dA, dB, dratio, None


def _adapted(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """V, a new tensor (do, di)."""
    return torch.addmm(weight, B, A, alpha=scale)


def _dropped(ctx: Any, x: Tensor) -> Tensor:
    """D(x), with the same mask each time."""
    return dropout.seeded_dropout(x, ctx.p, ctx.seed) if ctx.p else x


def _input_gradient(ctx: Any, g: Tensor, weight: Tensor, RV: Tensor) -> Tensor:
    """dx, in the shape of x."""
    if not ctx.p:
        return (g @ RV).view(ctx.x_shape)
    through = dropout.seeded_dropout(g @ RV.sub_(weight), ctx.p, ctx.seed)
    return through.addmm_(g, weight).view(ctx.x_shape)


def sum_of_products(one: Tensor, other: Tensor) -> Tensor:
    """`sum_n one_no other_no` of two (N, do): (do), without an array of their size."""
    total = one.new_zeros(one.shape[1])
    for rows in _blocks(one):
        total += (one[rows] * other[rows]).sum(0)
    return total


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
