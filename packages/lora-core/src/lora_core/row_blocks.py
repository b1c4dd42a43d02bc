"""An adapted Linear's low-rank work on the CPU, in blocks of rows that stay in the cache.

Adapters do little arithmetic on much memory: taken over whole tensors, their products read and
write x, y, g and dx two to four times each. Here one block of rows after the other is loaded, and
all is done to it; its mask is drawn once for both D(x) and D'. A small layer is one block, and what
is not needed is not called: there a call takes longer than its work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
EXACT = (torch.float32, torch.float64)  # blocks of narrower dtypes were not measured


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the work is done in blocks there."""
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
        self.A, self.p, self.scale = A, branch.dropout, branch.scale
        self.needs_A, self.needs_B = needs_A, needs_B
        # Columns of h, columns of y, and B, of each block of a fused weight; None: all.
        self._parts: list[tuple[slice | None, slice | None, Tensor]] = [(None, None, B)]
        if branch.rows is not None:
            parts = blocks(branch.rows, B.shape[1], 0)
            self._parts = [(of_h, out, B[of_B]) for of_h, out, of_B in parts]
        self._dA: Tensor | None = None
        self._dB: list[Tensor | None] = [None] * len(self._parts)
        if self.p:
            self.scale /= dropout.keep_probability(self.p)  # of products of M x, which is q D(x)
            self._draw = dropout.draw_rows(seed, A.shape[1], A.device)
            self._room: Tensor | None = None  # as large as the first block, which is the largest

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y += s D(x) A^T B^T` for y (n, do) and x (n, di); gives `h = M x A^T` (n, k r)."""
        h = self._down(self._kept(x, *self._room_and_bits(len(x))) if self.p else x)
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
        if self.p:
            room, bits = self._room_and_bits(len(g))
            x = None if x is None else self._kept(x, room, bits)
        if self.needs_B:
            if h is None:
                assert x is not None
                h = self._down(x)
            for i, (of_h, out, B) in enumerate(self._parts):
                wide, narrow = _columns(g, out), _columns(h, of_h)
                if B.shape[1] < UP_FROM:
                    self._dB[i] = _sum(self._dB[i], narrow.t(), wide)
                else:
                    self._dB[i] = _sum(self._dB[i], wide.t(), narrow)
        if not self.needs_A and dx is None:
            return
        dh = self._down_gradient(g)
        if self.needs_A:
            assert x is not None
            self._dA = _sum(self._dA, dh.t(), x)
        if dx is None:
            return
        if self.p:
            dx.add_(self._kept(torch.mm(dh, self.A, out=room), room, bits), alpha=self.scale)
        else:
            dx.addmm_(dh, self.A, alpha=self.scale)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dA (k r, di) and dB (rows, r) of all blocks of rows; None where not asked for."""
        dA = dB = None
        if self.needs_A:
            dA = torch.zeros_like(self.A) if self._dA is None else self._dA.mul_(self.scale)
        if self.needs_B:
            sums = [
                torch.zeros_like(B) if dB is None else dB.t() if B.shape[1] < UP_FROM else dB
                for (_, _, B), dB in zip(self._parts, self._dB, strict=True)
            ]
            dB = _joined(sums, 0).mul_(self.scale)
        return dA, dB

    def _down(self, kept: Tensor) -> Tensor:
        """`h = M x A^T`."""
        if len(self.A) < DOWN_FROM:
            return (self.A @ kept.t()).t()
        return kept @ self.A.t()

    def _down_gradient(self, g: Tensor) -> Tensor:
        """`g B`, not scaled: (n, do) -> (n, k r)."""
        parts = [(_columns(g, out), B) for _, out, B in self._parts]
        if len(self.A) < DOWN_FROM:
            return _joined([B.t() @ part.t() for part, B in parts], 0).t()
        return _joined([part @ B for part, B in parts], 1)

    def _room_and_bits(self, rows: int) -> tuple[Tensor, Tensor]:
        """Memory for M x, which stays in the cache from block to block, and the next rows' bits."""
        if self._room is None:
            self._room, self._bits = (self.A.new_empty(rows, self.A.shape[1]) for _ in range(2))
        room, bits = self._room, self._bits
        if len(room) != rows:
            room, bits = room[:rows], bits[:rows]
        return room, bits.copy_(self._draw(rows))

    def _kept(self, t: Tensor, room: Tensor, bits: Tensor) -> Tensor:
        """M t, in the room."""
        return dropout.keep_in(room, t, bits, self.p)


def forward(
    adapters: Sequence[Adapter], x: Tensor, y: Tensor, *, keep: bool
) -> list[Tensor | None]:
    """Add what the adapters give for x (N, di) to y (N, do) in place; gives each h (N, k r).

    Without `keep` None in its place: the parts of h end with their blocks.
    """
    made: list[list[Tensor]] = [[] for _ in adapters]
    for rows in _row_blocks(x, y):
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
    return h.t().contiguous().t() if h.shape[1] < DOWN_FROM else h


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
    dx = None
    in_blocks = base is not None and base.numel() <= NARROW
    if base is not None:
        dx = g.new_empty(len(g), base.shape[1]) if in_blocks else g @ base
    for rows in _row_blocks(g, adapters[0].A):
        g_part, x_part, dx_part = _rows(g, rows), _rows(x, rows), _rows(dx, rows)
        if in_blocks and base is not None:
            torch.mm(g_part, base, out=dx_part)
        for adapter, h in zip(adapters, hs, strict=True):
            adapter.backward(g_part, x_part, _rows(h, rows), dx_part if add else None)
    return dx


def _row_blocks(rows: Tensor, other: Tensor) -> Iterator[slice | None]:
    """Of (N, ..), for a layer as wide as the wider of both; None: all rows are one block."""
    widest = max(1, rows.shape[1], other.shape[1])
    step = max(ROWS, ELEMENTS * torch.get_num_threads() // widest)
    step = -(-step // 4) * 4  # as `dropout.draw_rows` wants it
    if len(rows) <= step:
        yield None
    else:
        for start in range(0, len(rows), step):
            yield slice(start, min(start + step, len(rows)))


def _rows(t: Any, rows: slice | None) -> Any:
    return t if t is None or rows is None else t[rows]


def _columns(t: Tensor, columns: slice | None) -> Tensor:
    return t if columns is None else t[:, columns]


def _sum(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if total is None else total.addmm_(a, b)


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)
