"""One adapter as plain pairs in PEFT's layout, and back.

A file knows one pair (A, B) per weight. Fused slices become one exactly: the A_j are stacked, the
B_j stand on a block diagonal of a zero matrix, and rank and alpha are multiplied so that the scale
stays (`AdapterSpec.file_rank`). PiSSA's and OLoRA's initial pair is appended to each block:
`s (B A - B0 A0) = s [B, -B0] [A; A0]`.

Keys behind the module's path: `lora_A.weight`, `lora_B.weight`, `lora_B.bias`, of embeddings
`lora_embedding_A`, `lora_embedding_B`, with DoRA `lora_magnitude_vector`; of an attention layer
with separate weights, which PEFT does not know, `lora_A.q_proj_weight` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lora_core.errors import CheckpointError
from lora_core.weights import Rows, blocks

if TYPE_CHECKING:
    from lora_core.layers import LoraLayer

__all__ = [
    "Pair",
    "Rows",
    "assignments",
    "compact_rows",
    "expand_rows",
    "plain_pair",
    "split_pair",
    "tensors_of",
]

Pair: TypeAlias = tuple[Tensor, Tensor]


def plain_pair(A: Tensor, B: Tensor, initial: Pair | None, rows: Rows | None, do: int) -> Pair:
    """One plain pair that computes the same: A (K, di), B (do, K), K the rank in the file.

    A (k r, di) and B (rows_1 + .. + rows_k, r) hold the k blocks at the output rows `rows`;
    `initial` is subtracted.
    """
    r, downs = B.shape[1], []
    width = r * (1 if initial is None else 2)
    full_B = B.new_zeros(do, width * len(rows or (0,)))
    for j, (of_A, out, of_B) in enumerate(blocks(rows, r, do)):
        ups = [B[of_B]]
        downs.append(A[of_A])
        if initial is not None:
            ups.append(-initial[1][of_B])
            downs.append(initial[0][of_A])
        full_B[out, j * width : (j + 1) * width] = torch.cat(ups, 1)
    return torch.cat(downs), full_B


def split_pair(
    A: Tensor, B: Tensor, r: int, rows: Rows | None, has_initial: bool
) -> tuple[Pair, Pair | None]:
    """The inverse of `plain_pair`: the trained pair and the initial one.

    Raises:
        CheckpointError: B has entries outside the blocks, so it is another adapter.
    """
    width = r * (2 if has_initial else 1)
    spans = [(out, columns) for columns, out, _ in blocks(rows, width, B.shape[0])]
    outside = B.clone()
    for span in spans:
        outside[span] = 0
    if outside.count_nonzero():
        raise CheckpointError(
            "lora_B has values outside the rows of the slices: the adapter in the file was trained "
            "on other slices, or on the whole weight"
        )
    downs = A.view(len(spans), width, *A.shape[1:])
    ups = [B[span] for span in spans]
    trained = downs[:, :r].flatten(0, 1), torch.cat([up[:, :r] for up in ups])
    if not has_initial:
        return trained, None
    return trained, (downs[:, r:].flatten(0, 1), -torch.cat([up[:, r:] for up in ups]))


def expand_rows(compact: Tensor, rows: Rows | None, do: int) -> Tensor:
    """A vector over the adapted rows as one over all rows (do), zero elsewhere."""
    if rows is None:
        return compact
    index = torch.cat([torch.arange(a, b, device=compact.device) for a, b in rows])
    return compact.new_zeros(do).index_copy(0, index, compact)


def compact_rows(full: Tensor, rows: Rows | None) -> Tensor:
    """The inverse of `expand_rows`.

    Raises:
        CheckpointError: values outside the adapted rows.
    """
    if rows is None:
        return full
    outside = full.clone()
    for start, stop in rows:
        outside[start:stop] = 0
    if outside.count_nonzero():
        raise CheckpointError("lora_B.bias has values outside the rows of the slices")
    return torch.cat([full[start:stop] for start, stop in rows])


def tensors_of(layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
    """Copies of one adapter's tensors: key behind the module's path -> tensor."""
    tensors: dict[str, Tensor] = {}
    spec = layer.lora_adapters[adapter]
    for name in spec.weight_names:
        A, B = layer.lora_factors(adapter, name)
        initial, do = layer.lora_initial(adapter, name), layer.lora_raw(name).shape[0]
        if spec.rows is not None or initial is not None:
            A, B = plain_pair(A, B, initial, spec.rows, do)
        key_A, key_B = _pair_keys(layer, adapter, name)
        tensors[key_A], tensors[key_B] = A, B
        if spec.lora_bias:
            tensors["lora_B.bias"] = expand_rows(layer.lora_b_bias(adapter), spec.rows, do)
    if spec.use_dora:
        tensors["lora_magnitude_vector"] = layer.lora_magnitude(adapter)
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def assignments(
    layer: LoraLayer, adapter: str, tensors: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the layer, its new value) for each tensor in the layout of files.

    Raises:
        CheckpointError: other keys or shapes than `tensors_of` gives, or values outside the slices.
    """
    _check(tensors, {key: tuple(t.shape) for key, t in tensors_of(layer, adapter).items()})
    spec = layer.lora_adapters[adapter]
    found: list[tuple[Tensor, Tensor]] = []
    for name in spec.weight_names:
        key_A, key_B = _pair_keys(layer, adapter, name)
        values, first = (tensors[key_A], tensors[key_B]), None
        initial = layer.lora_initial(adapter, name)
        if spec.rows is not None or initial is not None:
            values, first = split_pair(*values, spec.r, spec.rows, initial is not None)
        found += zip(layer.lora_factors(adapter, name), values, strict=True)
        if initial is not None and first is not None:
            found += zip(initial, first, strict=True)
    if spec.lora_bias:
        bias = compact_rows(tensors["lora_B.bias"], spec.rows)
        found.append((layer.lora_b_bias(adapter), bias))
    if spec.use_dora:
        found.append((layer.lora_magnitude(adapter), tensors["lora_magnitude_vector"]))
    return found


def _pair_keys(layer: LoraLayer, adapter: str, weight_name: str) -> tuple[str, str]:
    spec = layer.lora_adapters[adapter]
    if spec.kind == "embedding":
        return "lora_embedding_A", "lora_embedding_B"
    name = spec.factor_name(weight_name)
    return f"lora_A.{name}", f"lora_B.{name}"


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    if expected.keys() != tensors.keys():
        raise CheckpointError(f"expected the keys {sorted(expected)}, found {sorted(tensors)}")
    for key, shape in expected.items():
        found = tuple(tensors[key].shape)
        if found != shape:
            raise CheckpointError(f"{key} has shape {found}, this layer needs {shape}")
