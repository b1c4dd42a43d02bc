"""An adapted Linear's low-rank work, in blocks of rows.

Adapters do little arithmetic on much memory: taken over whole tensors, their products read and
write x, y, g and dx two to four times each. On the CPU one block of rows after the other is loaded
into the cache, and all is done to it; its mask is drawn once for both D(x) and D'. Elsewhere blocks
are large and bound the memory of masks. A small layer is one block, and what is not needed is not
called: there a call takes longer than its work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core import dropout
from lora_core.branch import Branch
from lora_core.weights import blocks

ELEMENTS = 1 << 20  # of the widest tensor in a block, for each thread: fewer, and calls cost more
ROWS = 128  # at least, as products of fewer rows are slow
NARROW = 1 << 20  # elements of W up to which its product with g belongs to the block
# Ranks from which products with wide matrices are fastest as they are written. Below, the CPU takes
# up to six times as long as for the transposed product.
DOWN_FROM, UP_FROM = 16, 64
EXACT = (torch.float32, torch.float64)


def measured(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the ways of computing were compared there; elsewhere they are the plainest."""
    return device.type == "cpu" and dtype in EXACT


class Adapter:
    """One branch of a call, from block to block of rows.

    Args:
        branch, seed: its scale, blocks and dropout, and the seed of its mask.
        A, B: its factors in the dtype of the computation.
        needs_A, needs_B: whose gradients `backward` sums.
    """

    def __init__(
        self,
        branch: Branch,
        seed: int,
        A: Tensor,
        B: Tensor,
        needs_A: bool = False,
        needs_B: bool = False,
    ) -> None:
        self.A, self.scale, self.drops = A, branch.scale, branch.dropout > 0
        self.needs_A, self.needs_B = needs_A, needs_B
        # Columns of h, columns of y, and B, of each block of a fused weight; None: all.
        self._parts: list[tuple[slice | None, slice | None, Tensor]] = [(None, None, B)]
        if branch.rows is not None:
            parts = blocks(branch.rows, B.shape[1], 0)
            self._parts = [(of_h, out, B[of_B]) for of_h, out, of_B in parts]
        self._down_transposed = self._up_transposed = False
        if measured(A.device, A.dtype):
            self._down_transposed = A.shape[0] < DOWN_FROM
            self._up_transposed = B.shape[1] < UP_FROM
        self._dA: Tensor | None = None
        self._dB: list[Tensor | None] = [None] * len(self._parts)
        if self.drops:
            self._mask = _Mask(branch.dropout, seed, A)
            # Of products of M x, which is q D(x).
            self.scale /= dropout.keep_probability(branch.dropout)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y += s D(x) A^T B^T` for y (n, do) and x (n, di); gives `h = M x A^T` (n, k r)."""
        if self.drops:
            self._mask.go_on(x.shape[0])
            x = self._mask.kept(x)
        h = self._down(x)
        for of_h, out, B in self._parts:
            _columns(y, out).addmm_(_columns(h, of_h), B.t(), alpha=self.scale)
        return h

    def backward(self, g: Tensor, x: Tensor | None, h: Tensor | None, dx: Tensor | None) -> None:
        """Sum this block's part of dA and dB, and add `D'(s g B A)` to dx (n, di).

        Args:
            g: (n, do).
            x: (n, di); None where neither dA nor h needs it.
            h: `M x A^T` where it was kept.
            dx: None where nothing is to be added.
        """
        if self.drops:
            self._mask.go_on(g.shape[0])
            x = None if x is None else self._mask.kept(x)
        if self.needs_B:
            if h is None:
                assert x is not None
                h = self._down(x)
            for i, (of_h, out, B) in enumerate(self._parts):
                wide, narrow = _columns(g, out), _columns(h, of_h)
                if self._up_transposed:
                    self._dB[i] = self._sum(self._dB[i], narrow.t(), wide, B.t())
                else:
                    self._dB[i] = self._sum(self._dB[i], wide.t(), narrow, B)
        if not self.needs_A and dx is None:
            return
        dh = self._down_gradient(g)
        if self.needs_A:
            assert x is not None
            self._dA = self._sum(self._dA, dh.t(), x, self.A)
        if dx is None:
            return
        if self.drops:
            dx.add_(self._mask.kept_product(dh, self.A), alpha=self.scale)
        else:
            dx.addmm_(dh, self.A, alpha=self.scale)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dA (k r, di) and dB (rows, r) of all blocks of rows; None where not asked for."""
        if not self.needs_B:
            return self._dA, None
        sums = [dB.t() if self._up_transposed else dB for dB in self._dB if dB is not None]
        return self._dA, _joined(sums, 0)

    def _down(self, x: Tensor) -> Tensor:
        """`h = x A^T`."""
        if self._down_transposed:
            return torch.mm(self.A, x.t()).t()
        return torch.mm(x, self.A.t())

    def _down_gradient(self, g: Tensor) -> Tensor:
        """`g B`, not scaled: (n, do) -> (n, k r)."""
        parts = [(_columns(g, out), B) for _, out, B in self._parts]
        if self._down_transposed:
            return _joined([torch.mm(B.t(), part.t()) for part, B in parts], 0).t()
        return _joined([torch.mm(part, B) for part, B in parts], 1)

    def _sum(self, total: Tensor | None, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
        """`total + s a b`, in place in fp32 at least; without a total `s a b`, shaped as `like`."""
        if total is None:  # one call, which does not read `like`
            return torch.addmm(like, a, b, beta=0, alpha=self.scale)
        if a.dtype in EXACT:
            return total.addmm_(a, b, alpha=self.scale)
        return total.float().add_(torch.mm(a, b), alpha=self.scale)


class _Mask:
    """The mask M of one branch, from block to block of rows.

    Bits and results have memory of their own, which stays in the cache: that of the first block,
    the largest. What a method gives is overwritten by the next call.
    """

    def __init__(self, p: float, seed: int, A: Tensor) -> None:
        self._draw = dropout.draw_rows(seed, A.shape[1], A.device)
        self._p, self._dtype = p, A.dtype
        self._bits: Tensor | None = None
        self._room: Tensor | None = None

    def go_on(self, rows: int) -> None:
        """To the next rows."""
        room = None if self._bits is None else _first(self._bits, rows)
        self._bits = dropout.as_factors(self._draw(rows), self._dtype, self._p, room)

    def kept(self, t: Tensor) -> Tensor:
        """`M t` for t (n, di)."""
        return self._keep(t, self._room_of(t.shape[0]))

    def kept_product(self, a: Tensor, b: Tensor) -> Tensor:
        """`M (a b)` for a (n, r) and b (r, di)."""
        room = self._room_of(a.shape[0])
        product = torch.mm(a, b) if room is None else torch.mm(a, b, out=room)
        return self._keep(product, product)

    def _room_of(self, rows: int) -> Tensor | None:
        return None if self._room is None else _first(self._room, rows)

    def _keep(self, t: Tensor, room: Tensor | None) -> Tensor:
        assert self._bits is not None
        kept = dropout.kept(t, self._bits, self._p, room)
        if self._room is None:
            self._room = kept
        return kept


def forward(
    adapters: Sequence[Adapter], x: Tensor, y: Tensor, *, keep: bool
) -> list[Tensor | None]:
    """Add what the adapters give for x (N, di) to y (N, do) in place; gives each h (N, k r).

    Without `keep` None in its place: the parts of h end with their blocks.
    """
    made: list[list[Tensor]] = [[] for _ in adapters]
    for rows in _row_blocks(adapters, x, y):
        x_part, y_part = _rows(x, rows), _rows(y, rows)
        for adapter, parts in zip(adapters, made, strict=True):
            h = adapter.add_to(y_part, x_part)
            if keep:
                parts.append(h)
    if not keep:
        return [None] * len(made)
    return [parts[0] if len(parts) == 1 else laid_out(torch.cat(parts)) for parts in made]


def laid_out(h: Tensor) -> Tensor:
    """h (N, k r) in the memory layout in which blocks have it, so that sums are rounded alike."""
    if measured(h.device, h.dtype) and h.shape[1] < DOWN_FROM:
        return h.t().contiguous().t()
    return h


def backward(
    adapters: Sequence[Adapter],
    g: Tensor,
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    base: Tensor | None,
    *,
    add: bool,
) -> Tensor | None:
    """Sum the adapters' gradients for g (N, do), and give dx (N, di).

    Args:
        x: (N, di); None where no adapter needs it.
        hs: of each adapter, where kept.
        base: what g is multiplied with for dx, (do, di); None: no dx.
        add: whether what the adapters give has yet to be added to that.
    """
    steps = _row_blocks(adapters, g, adapters[0].A)
    dx = None
    in_blocks = base is not None and base.numel() <= NARROW and len(steps) > 1
    if base is not None:
        dx = g.new_empty(g.shape[0], base.shape[1]) if in_blocks else torch.mm(g, base)
    for rows in steps:
        g_part, x_part, dx_part = _rows(g, rows), _rows(x, rows), _rows(dx, rows)
        if in_blocks and base is not None:
            torch.mm(g_part, base, out=dx_part)
        for adapter, h in zip(adapters, hs, strict=True):
            adapter.backward(g_part, x_part, _rows(h, rows), dx_part if add else None)
    return dx


def _row_blocks(adapters: Sequence[Adapter], rows: Tensor, other: Tensor) -> Sequence[slice | None]:
    """Of (N, ..), for a layer as wide as the wider of both; None: all rows are one block."""
    if not measured(rows.device, rows.dtype) and not any(adapter.drops for adapter in adapters):
        return (None,)
    count, widest = rows.shape[0], max(1, rows.shape[1], other.shape[1])
    fewest, elements = 1, dropout.DEVICE_BLOCK
    # Without values each operation takes equally long.
    if rows.device.type == "cpu" and dropout.has_values():
        fewest, elements = ROWS, ELEMENTS * torch.get_num_threads()
    step = max(fewest, elements // widest)
    step = -(-step // 4) * 4  # as `dropout.draw_rows` wants it
    if count <= step:
        return (None,)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _rows(t: Any, rows: slice | None) -> Any:
    return t if t is None or rows is None else t[rows]


def _first(t: Tensor, rows: int) -> Tensor:
    return t if t.shape[0] == rows else t[:rows]


def _columns(t: Tensor, columns: slice | None) -> Tensor:
    return t if columns is None else t[:, columns]


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)
