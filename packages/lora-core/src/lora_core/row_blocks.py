"""An adapted Linear's low-rank work on the CPU, in blocks of rows that stay in the cache.

Adapters do little arithmetic on much memory: taken over whole tensors, their products read and
write x, y, g and dx two to four times each. Here one block of rows after the other is loaded, and
all is done to it; its mask is drawn once for both D(x) and D'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from lora_core import dropout
from lora_core.branch import Branch
from lora_core.weights import blocks

ELEMENTS = (
    1 << 20
)  # of the widest tensor in a block, for each thread: fewer, and calls cost too much
ROWS = 128  # at least, as products of fewer rows are slow
NARROW = 1 << 20  # elements of W up to which its product with g belongs to the block
# Ranks from which products with wide matrices are fastest as they are written. Below, the CPU takes
# up to six times as long as for the transposed product, which a transposed result asks for.
DOWN_FROM, UP_FROM = 16, 64
EXACT = (torch.float32, torch.float64)  # blocks of narrower dtypes were not measured


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the work is done in blocks there."""
    return device.type == "cpu" and dtype in EXACT


def has_values() -> bool:
    """Whether tensors do: without, each operation takes equally long, and blocks have many."""
    return detect_fake_mode() is None


def empty_h(like: Tensor, rows: int, width: int) -> Tensor:
    """Room for an h (rows, width), laid out as its product is fastest."""
    if width < DOWN_FROM:
        return like.new_empty(width, rows).t()
    return like.new_empty(rows, width)


class Adapter:
    """One branch of a call, from block to block of rows.

    Args:
        branch, seed: its scale, blocks and dropout, and the seed of its mask.
        A, B: its factors in the dtype of the computation.
        needs_A, needs_B: whose gradients `backward` sums.

    Attributes:
        dA, dB: these sums, (k r, di) and (rows, r); None where not asked for.
    """

    def __init__(
        self,
        branch: Branch,
        seed: int,
        A: Tensor,
        B: Tensor,
        needs_A: bool,
        needs_B: bool,
    ) -> None:
        self.rows, self.p, self.A, self.B = branch.rows, branch.dropout, A, B
        self.scale = branch.scale  # of products of M x, which is D(x) q
        if self.p:
            self.scale /= dropout.keep_probability(self.p)
        self._memory = A.new_empty(2, 0, A.shape[1])
        self._draw = dropout.draw_rows(seed, A.shape[1], A.device)
        self.dA = torch.zeros_like(A) if needs_A else None
        self.dB: Tensor | None = None
        if needs_B:  # a transposed sum is of transposed products
            r, wide = B.shape[1], B.shape[1] >= UP_FROM
            self.dB = B.new_zeros(B.shape) if wide else B.new_zeros(r, len(B)).t()

    def add_to(self, y: Tensor, x: Tensor, h: Tensor | None) -> None:
        """`y += s D(x) A^T B^T` for y (n, do) and x (n, di); writes `M x A^T` into h (n, k r)."""
        h = self._down(self._kept(x, *self._room_and_bits(len(x))), h)
        for part, out, of_B in blocks(self.rows, self.B.shape[1], y.shape[1]):
            y[:, out].addmm_(h[:, part], self.B[of_B].t(), alpha=self.scale)

    def backward(self, g: Tensor, x: Tensor | None, h: Tensor | None, dx: Tensor | None) -> None:
        """Add this block's part to dA and dB, and `D'(s g B A)` to dx (n, di).

        Args:
            g: (n, do).
            x: (n, di); None where neither dA nor h needs it.
            h: `M x A^T` where it was kept.
            dx: None where nothing is to be added.
        """
        room, bits = self._room_and_bits(len(g))
        kept = None if x is None else self._kept(x, room, bits)
        if self.dB is not None:
            if h is None:
                assert kept is not None
                h = self._down(kept)
            for part, out, of_B in blocks(self.rows, self.B.shape[1], g.shape[1]):
                self.dB[of_B].addmm_(g[:, out].t(), h[:, part], alpha=self.scale)
        if self.dA is None and dx is None:
            return
        dh = empty_h(g, len(g), len(self.A))
        for part, out, of_B in blocks(self.rows, self.B.shape[1], g.shape[1]):
            torch.mm(g[:, out], self.B[of_B], out=dh[:, part])
        if self.dA is not None and kept is not None:
            self.dA.addmm_(dh.t(), kept, alpha=self.scale)
        if dx is not None and self.p:
            dx.add_(self._kept(torch.mm(dh, self.A, out=room), room, bits), alpha=self.scale)
        elif dx is not None:
            dx.addmm_(dh, self.A, alpha=self.scale)

    def _down(self, kept: Tensor, h: Tensor | None = None) -> Tensor:
        h = empty_h(kept, len(kept), len(self.A)) if h is None else h
        return torch.mm(kept, self.A.t(), out=h)

    def _room_and_bits(self, rows: int) -> tuple[Tensor, Tensor]:
        """Memory for M x, which stays in the cache from block to block, and the next rows' bits."""
        if not self.p:
            return self._memory, self._memory
        if self._memory.shape[1] < rows:
            self._memory = self.A.new_empty(2, rows, self.A.shape[1])
        room, bits = self._memory[:, :rows]
        return room, bits.copy_(self._draw(rows))

    def _kept(self, t: Tensor, room: Tensor, bits: Tensor) -> Tensor:
        """M t."""
        return dropout.keep_in(room, t, bits, self.p) if self.p else t


def forward(adapters: Sequence[Adapter], x: Tensor, y: Tensor, hs: Sequence[Tensor | None]) -> None:
    """Add what the adapters give for x (N, di) to y (N, do) in place; fill each h (N, k r)."""
    for rows in _row_blocks(x, y):
        for adapter, h in zip(adapters, hs, strict=True):
            adapter.add_to(y[rows], x[rows], _part(h, rows))


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
        add: whether dx has what the adapters give yet to be added.
    """
    dx = narrow = None
    if base is not None and base.numel() <= NARROW:
        dx, narrow = g.new_empty(len(g), base.shape[1]), base
    elif base is not None:
        dx = g @ base
    for rows in _row_blocks(g, adapters[0].A):
        if narrow is not None and dx is not None:
            torch.mm(g[rows], narrow, out=dx[rows])
        for adapter, h in zip(adapters, hs, strict=True):
            adapter.backward(
                g[rows], _part(x, rows), _part(h, rows), _part(dx, rows) if add else None
            )
    return dx


def _part(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]


def _row_blocks(rows: Tensor, other: Tensor) -> Iterator[slice]:
    """Of (N, ..), for a layer as wide as the wider of both."""
    widest = max(1, rows.shape[1], other.shape[1])
    step = max(ROWS, ELEMENTS * torch.get_num_threads() // widest)
    step = -(-step // 4) * 4  # as `dropout.draw_rows` wants it
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))
