"""The input of an adapted layer, made again in the backward pass instead of kept for it.

The gradient of A needs the layer's input x. Where x comes from a normalisation or an activation,
autograd keeps what that was computed from, for its own backward pass: from this x is made again, in
about the time of one element-wise operation, and need not be kept beside it. Frozen factors, other
dtypes, rows that were picked out, views and permutations in between are followed: RMSNorm is such a
chain.

The graph is read through `_saved_*` and `_raw_saved_*` of its nodes, which torch's notes on
autograd describe, and their `_input_metadata`. What hooks have taken, as activation checkpointing
and offloading do, is left alone: reading it may compute or copy it, or is allowed only once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Recipe = Callable[[], Tensor]
Unpack = Callable[[Any], Tensor]


def recipe(x: Tensor) -> Recipe | None:
    """How x can be made again until the operation that made it has run backward; None: keep x.

    The same values as x, those behind a LayerNorm but for rounding (its kernel may order the same
    products and sums in another way).
    """
    return _recipe(x.grad_fn, x.shape)


def only_looks(unpack: Unpack) -> Unpack:
    """Mark the unpack function of hooks on saved tensors that give every tensor as it was."""
    unpack.only_looks = True  # type: ignore[attr-defined]
    return unpack


def _recipe(node: Any, shape: torch.Size) -> Recipe | None:
    """How the output of a node, in its shape, is made again."""
    known = _OPERATIONS.get(node.name()) if node is not None else None
    return None if known is None else known(node, shape)


def _can_read(node: Any, *names: str) -> bool:
    """Whether the node keeps these tensors as they are."""
    for name in names:
        # An older torch does not say whether there are hooks.
        hook = getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", _can_read)
        if hook is not None and not getattr(hook, "only_looks", False):
            return False
    return True


def _layer_norm(node: Any, shape: torch.Size) -> Recipe | None:
    if not _can_read(node, "input", "result1", "result2", "weight", "bias"):
        return None
    if node._saved_result2.dtype == torch.bfloat16:  # the CPU may round the statistics
        return None

    def make() -> Tensor:
        x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
        weight, bias = node._saved_weight, node._saved_bias
        y = (x - mean).mul_(rstd)
        if weight is not None:
            y = y.mul_(weight)
        if bias is not None:
            y = y.add_(bias)
        return y.to(x.dtype)

    return make


def _gelu(node: Any, shape: torch.Size) -> Recipe | None:
    if not _can_read(node, "self"):
        return None
    return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)


def _silu(node: Any, shape: torch.Size) -> Recipe | None:
    return (lambda: F.silu(node._saved_self)) if _can_read(node, "self") else None


def _product(node: Any, shape: torch.Size) -> Recipe | None:
    """Of two tensors, as in gated MLPs and RMSNorm; autograd keeps one if the other is trained."""
    one, other = _factor(node, "self", 0), _factor(node, "other", 1)
    return None if one is None or other is None else lambda: one() * other()


def _factor(node: Any, name: str, place: int) -> Recipe | None:
    """One of the tensors of a product: kept, or made again from what comes before it."""
    if not _can_read(node, name):
        return None
    if isinstance(getattr(node, f"_saved_{name}"), Tensor):
        return lambda: getattr(node, f"_saved_{name}")
    before, output = node.next_functions[place]
    if before is None:
        return None
    return _recipe(before, torch.Size(before._input_metadata[output].shape))


def _rows(node: Any, shape: torch.Size) -> Recipe | None:
    source = _recipe(node.next_functions[0][0], torch.Size(node._saved_self_sym_sizes))
    if source is None or not _can_read(node, "index"):
        return None
    return lambda: source().index_select(_axis(node._saved_dim), node._saved_index)


def _permutation(node: Any, shape: torch.Size) -> Recipe | None:
    dims = [_axis(dim) for dim in node._saved_dims]
    before = [0] * len(dims)
    for after, dim in enumerate(dims):
        before[dim] = shape[after]
    source = _recipe(node.next_functions[0][0], torch.Size(before))
    return None if source is None else lambda: source().permute(dims)


def _view(node: Any, shape: torch.Size) -> Recipe | None:
    source = _recipe(node.next_functions[0][0], torch.Size(node._saved_self_sym_sizes))
    return None if source is None else lambda: source().reshape(shape)


def _padding(node: Any, shape: torch.Size) -> Recipe | None:
    """Windows are often padded by nothing; what others are filled with, the graph does not say."""
    return None if any(node._saved_pad) else _copy(node, shape)


def _copy(node: Any, shape: torch.Size) -> Recipe | None:
    return _recipe(node.next_functions[0][0], shape)


def _cast(node: Any, shape: torch.Size) -> Recipe | None:
    """In another dtype on the same device; it has to be the dtype of this place in the graph."""
    before, output = node.next_functions[0]
    source = _recipe(before, shape)
    after = node._input_metadata[0]
    if source is None or after.device != before._input_metadata[output].device:
        return None
    return lambda: source().to(after.dtype)


def _axis(dim: int) -> int:
    """Negative axes are kept as numbers without sign."""
    return dim - 2**64 if dim >= 2**63 else dim


_OPERATIONS: dict[str, Callable[[Any, torch.Size], Recipe | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _product,
    "IndexSelectBackward0": _rows,
    "PermuteBackward0": _permutation,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "CloneBackward0": _copy,
    "ToCopyBackward0": _cast,
    "ConstantPadNdBackward0": _padding,
}
