"""Several scenes as one batch: a flat list of rows, and where each scene ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import DataError, listing
from scenesplat_lora.scenes.scene import DeferredRows

if TYPE_CHECKING:
    from torch import Tensor


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of samples with the same entries.

    Returns:
        For each entry the samples' tensors or deferred rows one after the other, as a tensor;
        cumulative sums for names with `offset` in them, i64 [B]; numbers as a tensor [B]; anything
        else as a list.

    Raises:
        DataError: no samples, an empty one, other entries, or widths that differ.
    """
    _check_same(samples)
    return {name: _joined(name, [sample[name] for sample in samples]) for name in samples[0]}


def _joined(name: str, values: list[Any]) -> Any:
    import torch

    if all(isinstance(value, DeferredRows) and value.dtype == values[0].dtype for value in values):
        return _gathered(values)
    values = [torch.from_numpy(np.array(v)) if isinstance(v, DeferredRows) else v for v in values]
    first = values[0]
    if isinstance(first, torch.Tensor):
        joined = torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values])
        return joined.cumsum(0) if "offset" in name else joined
    if isinstance(first, (int, float)):
        return torch.tensor(values)
    return values


def _gathered(parts: Sequence[DeferredRows]) -> Tensor:
    """All rows [sum of N, D], copied once, from where they lie to where they stay."""
    import torch

    ends = np.cumsum([len(part) for part in parts])
    # Memory of numpy: it asks for large pages, without which 200 MB cost 100 ms of page faults.
    rows = np.empty((ends[-1], *parts[0].shape[1:]), parts[0].dtype)
    for part, end in zip(parts, ends, strict=True):
        part.into(rows[end - len(part) : end])
    return torch.from_numpy(rows)


def _check_same(samples: Sequence[dict[str, Any]]) -> None:
    if not samples:
        raise DataError("a batch needs at least one scene")
    problems = []
    for number, sample in enumerate(samples):
        name = str(sample.get("name", f"sample {number}"))
        different = sorted(set(sample) ^ set(samples[0]))
        if different:
            problems.append(f"{name}: {', '.join(different)} only here or only in the first scene")
        for key, value in sample.items():
            shape, expected = _width(value), _width(samples[0].get(key))
            if shape != expected and key not in different:
                problems.append(f"{name}: {key} has rows of shape {shape}, not {expected}")
            if "offset" in key and int(value.sum()) == 0:
                problems.append(f"{name}: no rows are left of this scene")
    if problems:
        raise DataError(listing(problems))


def _width(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape[1:]) if hasattr(value, "shape") else None


def mixed_offset(offset: Tensor) -> Tensor:
    """Neighbouring scenes as one (Mix3D): of i64 [B] every second end, and always the last.

    Two scenes become one; of three the first two do. Their voxels may coincide.
    """
    import torch

    return torch.cat([offset[1:-1:2], offset[-1:]])


def collate_mixed(
    samples: Sequence[dict[str, Any]], rng: np.random.Generator, mix_prob: float = 0.8
) -> dict[str, Any]:
    """`collate`, then with probability `mix_prob` neighbours as one; takes one draw from `rng`."""
    batch = collate(samples)
    if rng.random() < mix_prob and "offset" in batch:
        batch["offset"] = mixed_offset(batch["offset"])
    return batch
