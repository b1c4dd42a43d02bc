"""Dropout whose mask is drawn again in the backward pass instead of being kept.

`D(x)` sets an element to zero with probability p and divides the others by q = 1 - p. A mask is a
function of a seed, so neither the mask nor the dropped copy of x outlives the block of rows that
is being worked on: the adapter branch keeps x itself, which others keep alive anyway, and one
integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_threshold_backward = torch.ops.aten.threshold_backward.default
_threshold_backward_in = torch.ops.aten.threshold_backward.grad_input

CPU_BLOCK = 1 << 17  # elements per block and thread: mask and rows stay in its core's cache
CPU_ROWS = 128  # at least, as products of fewer rows are slow
DEVICE_BLOCK = 1 << 25  # elements per block elsewhere: few launches, bounded transient memory


def draw_seed() -> int:
    """A seed from the default CPU generator.

    `torch.manual_seed` fixes it, and activation checkpointing, which restores that generator,
    draws the same one again.
    """
    return int(torch.randint(2**62, (), device="cpu").item())


def keep_count(p: float) -> int:
    """K of the keep probability K / 65536 that 16 random bits can give, nearest to 1 - p."""
    return min(max(round((1 - p) * 65536), 1), 65535)


def keep_probability(p: float) -> float:
    """The exact q of the masks made for p; survivors are divided by it."""
    return keep_count(p) / 65536


def has_values() -> bool:
    """Whether tensors that are made here do: within `FakeTensorMode` nothing is computed."""
    # Looking for that mode takes as long as a small layer; no other way leads there.
    return not is_in_torch_dispatch_mode() or detect_fake_mode() is None


def random_bits(
    seed: int, rows: int, columns: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Give the random bits of a (rows, columns) mask as (rows of the block, int16 (n, columns)).

    The same arguments give the same bits. Sixteen of them decide about one element: drawing words
    of 64 and reading them as int16 costs a quarter of drawing for each element.
    """
    # Without values each operation takes equally long.
    real_cpu = device.type == "cpu" and has_values()
    own = (CPU_BLOCK * torch.get_num_threads(), CPU_ROWS)
    block, fewest = own if real_cpu else (DEVICE_BLOCK, 1)
    # Whole words in each block, so that bits do not depend on its size.
    step = -(-max(fewest, block // max(1, columns)) // 4) * 4
    draw = draw_rows(seed, columns, device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), draw(stop - start)


def draw_rows(seed: int, columns: int, device: torch.device) -> Callable[[int], Tensor]:
    """Draws the bits of so many rows more, int16 (n, columns); n is a multiple of 4 until the last.

    The same seed and columns give the same bits; on the CPU however many rows are drawn at a time,
    elsewhere in the same steps.
    """
    if device.type == "cpu" and has_values():
        return _rows_of_numpy(seed, columns)
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(rows: int) -> Tensor:
        count = rows * columns
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
        # Without the explicit lower end torch leaves the sign bit of every word zero.
        words.random_(-(2**63), None, generator=generator)
        return words.view(torch.int16)[:count].view(rows, columns)

    return draw


def _rows_of_numpy(seed: int, columns: int) -> Callable[[int], Tensor]:
    """`draw_rows` on the CPU, where SFC64 takes half the time of torch's generator."""
    generator = np.random.SFC64(_Seed(seed))  # type: ignore[arg-type]  # numpy's notes allow it

    def draw(rows: int) -> Tensor:
        count = rows * columns
        bits = generator.random_raw((count + 3) // 4).view(np.int16)[:count]
        return torch.from_numpy(bits.reshape(rows, columns))

    return draw


class _Seed(ISeedSequence):
    """A whole number as the three words of SFC64's state, as its author seeds it from one word.

    The generator throws its first twelve words away. numpy's own way of seeding takes as long as
    a small layer's products.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray[Any, Any]:
        return np.array([self._seed] * n_words, dtype)


def threshold(p: float) -> int:
    """t of the mask `M = bits > t`, which keeps K of the 65536 values that 16 bits have."""
    return 32767 - keep_count(p)


def in_one_pass(t: Tensor) -> bool:
    """Whether t is masked by `threshold_backward`: on the CPU.

    Multiplying by a bool mask there costs three passes, one of them to turn it into numbers.
    """
    return t.device.type == "cpu"


def as_factors(bits: Tensor, dtype: torch.dtype, p: float, room: Tensor | None = None) -> Tensor:
    """Random bits in the form in which `kept` takes them for x of this dtype.

    Args:
        room: an earlier result of the same shape that may be overwritten.
    """
    if not in_one_pass(bits):
        return torch.gt(bits, threshold(p), out=room)
    if dtype.itemsize == 2:
        return bits
    return bits.to(dtype) if room is None else room.copy_(bits)


def kept(x: Tensor, factors: Tensor, p: float, room: Tensor | None = None) -> Tensor:
    """`M x`, not divided by q; x and `as_factors` of one shape.

    In one pass `threshold_backward(x, bits, t)` is x where bits > t, else 0. It needs both in one
    type; 16-bit floats are therefore read as integers, of which 0 is 0.0 too.

    Args:
        room: what the result is written into, which x may be; None: a new tensor.
    """
    if not in_one_pass(x):
        return torch.mul(x, factors, out=room)
    if x.element_size() == 2:
        whole = None if room is None else room.view(torch.int16)
        return _where_above(x.view(torch.int16), factors, p, whole).view(x.dtype)
    return _where_above(x, factors, p, room)


def _where_above(x: Tensor, bits: Tensor, p: float, room: Tensor | None) -> Tensor:
    if room is None:
        return _threshold_backward(x, bits, threshold(p))
    return _threshold_backward_in(x, bits, threshold(p), grad_input=room)


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return _dropped(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _dropped(g, ctx.p, ctx.seed), None, None


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    columns = x.shape[-1] if x.dim() else 1
    flat = x.reshape(-1, columns) if columns else x.reshape(0, 1)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for rows, bits in random_bits(seed, flat.shape[0], flat.shape[1], x.device):
        factors = as_factors(bits, x.dtype, p)
        torch.div(kept(flat[rows], factors, p), keep_probability(p), out=out[rows])
    return out.view(x.shape)


def seeded_dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """`D(x)`, keeping only the seed for the backward pass."""
    out: Tensor = _SeededDropout.apply(x, p, seed)
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, A: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x, A)
        return run(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            h = ctx.run(*inputs)
        grads = iter(torch.autograd.grad(h, [t for t in inputs if t.requires_grad], g))
        return (None, *(next(grads) if need else None for need in needed))


def recomputed(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, A: Tensor) -> Tensor:
    """`run(x, A)`, run once more in the backward pass instead of keeping what it makes of x.

    For r-wide work on a dropped x: cheap next to the base layer, and x is alive anyway.
    """
    h: Tensor = _Recomputed.apply(run, x, A)
    return h


def drop_columns(A: Tensor, p: float, groups: int = 1) -> Tensor:
    """A (G r, c, ..) with whole input channels set to zero with probability p, others over q.

    What is left of input dropout where only the weight can be changed: the expectation is A, and
    all rows of the input of one call share the mask.
    """
    keep = torch.rand(groups, 1, A.shape[1], device=A.device) >= p
    keep = keep.expand(groups, A.shape[0] // groups, A.shape[1]).reshape(A.shape[:2])
    return A * (keep.to(A.dtype) / (1 - p)).view(*A.shape[:2], *[1] * (A.dim() - 2))


def plain_dropout(x: Tensor, p: float) -> Tensor:
    """`D(x)` by torch, for graphs that a compiler or a second derivative has to see through."""
    return F.dropout(x, p) if p else x
