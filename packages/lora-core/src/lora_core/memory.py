"""What a training step takes of memory, found without weights and without a GPU.

The step runs on tensors that have shapes but no values, on the CPU's code paths: what autograd
would keep is counted exactly, custom functions and activation checkpointing included. Whole numbers
that follow from the batch alone have their values, since shapes may depend on them. On a GPU a
few operations choose other types under autocast, and the libraries' own workspaces, fragmentation
and the CUDA context (together about 1 GB) come on top.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_core.remade import only_looks
from lora_core.report import table

T = TypeVar("T")
ADAM_MOMENTS = 2  # fp32 tensors that AdamW keeps of each trained parameter
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def size(count: float) -> str:
    """Write a number of bytes in powers of 1000: 512 B, 23.4 MB, 1.25 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:
            digits = 0 if count >= 99.95 * factor else 1 if count >= 9.995 * factor else 2
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count:.0f} B"


def saved_bytes(run: Callable[[], T], ignore: Iterable[Tensor] = ()) -> tuple[int, T]:
    """Bytes that a forward pass keeps for the backward pass, and the result of `run`.

    What lives no longer than the forward pass does not count, such as the input of checkpointed
    layers that need no gradient: the result has to hold the graph. Each storage counts once and
    whole; those of `ignore` (parameters, buffers) do not. Works with real tensors on any device and
    with those of `simulate`.
    """
    known = {tensor.untyped_storage()._cdata for tensor in ignore}
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved.add(one := _Saved(tensor))
        return one

    @only_looks
    def unpack(one: _Saved) -> Tensor:
        return one.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = run()
    storages = [one.tensor.untyped_storage() for one in saved]
    kept = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(count for key, count in kept.items() if key not in known), result


class _Saved:
    """A tensor for the backward pass; the graph alone holds it, and not the other way round.

    A result that an operation keeps would otherwise hold that operation, and both would stay
    where nothing uses them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


# -- a step without values -------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Bytes of one forward and backward pass."""

    saved: int  # kept between the two
    peak: int  # the most that existed at once, gradients of the parameters included


def simulate(
    network: nn.Module,
    loss: Callable[[nn.Module, Any], tuple[Tensor, Any]],
    batch: Any,
    precision: str = "fp32",
) -> Step:
    """Run `loss` and its backward pass on a network of the meta device, without any values.

    Args:
        network: built on the meta device; it cannot be used for anything else afterwards.
        loss: as for `LoraTrainer`. Where it reads the value of a prediction, it reads zeros; a
            boolean mask of predictions selects everything.
        batch: a real one, on the CPU. Its whole numbers are computed with.
        precision: fp32, or bf16 or fp16 under autocast.
    """
    ledger, dtype = _Ledger(), AUTOCAST.get(precision)
    with warnings.catch_warnings(), _mode_of(network):
        warnings.simplefilter("ignore")  # of reading addresses, where custom functions compare them
        if any(tensor.is_meta for tensor in network.state_dict().values()):
            network.to_empty(device="cpu")
        known = [*network.parameters(), *network.buffers()]
        ledger.known |= {tensor.untyped_storage()._cdata for tensor in known}  # views of them, too
        with ledger, _NoValues(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            saved, (value, _) = saved_bytes(lambda: loss(network, batch), known)
        with ledger:
            value.backward()
        network.zero_grad(set_to_none=True)
    return Step(saved, ledger.peak)


def _mode_of(network: nn.Module) -> FakeTensorMode:
    """The mode in which a network lost its values; a new one if it has not yet.

    Another mode would copy its weights in every operation, and count the copies as activations.
    """
    fakes = (tensor for tensor in network.parameters() if isinstance(tensor, FakeTensor))
    first = next(fakes, None)
    return FakeTensorMode(allow_non_fake_inputs=True) if first is None else first.fake_mode


class _Ledger(TorchDispatchMode):
    """Adds up the storages that operations make, until they die."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(), bool(), int(), float()
            return _value(args[0])
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _without_masks(args[1]), *args[2:])
        if _is_known(func, args, kwargs):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += count
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, count)

    def _forget(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.live -= count


class _NoValues(TorchFunctionMode):
    """Answers what reads memory directly, and so never becomes an operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            with unset_fake_temporarily():  # which would look at the batch's own tensors, too
                if isinstance(args[0], FakeTensor):
                    return func(torch.zeros(args[0].shape, dtype=args[0].dtype))
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _value(tensor: Tensor) -> Any:
    """The number in a tensor of one element if it is known, as those of the batch are; else 0."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    with unset_fake_temporarily():
        return (torch.zeros((), dtype=tensor.dtype) if known is None else known).item()


def _is_known(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation takes only whole numbers with values, or makes such of nothing."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors:
        return all(_is_whole(t) and not isinstance(t, FakeTensor) for t in tensors)
    return _is_whole(func(*args, **kwargs))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _without_masks(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as numbers of what they select; where that is not known, it is everything."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        elif isinstance(index, FakeTensor):
            found += [torch.empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        else:
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
    return found


# -- a whole run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device while a run trains; `str()` is a table."""

    weights: int  # of the frozen network, buffers included
    adapters: int  # everything that is trained
    gradients: int
    moments: int  # of AdamW
    activations: int  # kept for the backward pass
    workspace: int  # of single operations, at the highest point of the step

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(
    network: nn.Module,
    loss: Callable[[nn.Module, Any], tuple[Tensor, Any]],
    batch: Any,
    precision: str = "fp32",
) -> Estimate:
    """Estimate the memory of training, see `simulate` for the arguments."""
    trained = adapter_bytes(network)
    tensors = [*network.parameters(), *network.buffers()]
    step = simulate(network, loss, batch, precision)
    return Estimate(
        weights=_bytes(tensors) - trained,
        adapters=trained,
        gradients=trained,
        moments=ADAM_MOMENTS * trained,
        activations=step.saved,
        workspace=max(0, step.peak - step.saved - trained),
    )


def memory_table(columns: Mapping[str, Estimate], device: str = "") -> str:
    """Estimates side by side, such as one for each precision.

    Args:
        device: what they are for, as in "on a GPU".
    """
    names = [field.name for field in fields(Estimate)]
    rows = [[name, *(size(getattr(e, name)) for e in columns.values())] for name in names]
    rows.append(["together", *(size(e.total) for e in columns.values())])
    return table([f"memory of a step {device}".rstrip(), *columns], rows)


def adapter_bytes(network: nn.Module) -> int:
    """Bytes of everything that is trained."""
    return _bytes(p for p in network.parameters() if p.requires_grad)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those that share a storage once."""
    unique = {id(t) if t.is_meta else (t.untyped_storage()._cdata): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in unique.values())
