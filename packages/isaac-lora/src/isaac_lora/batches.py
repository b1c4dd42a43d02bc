"""Samples as a batch: padded side by side, or packed one behind the other.

Both give the same logits at real places, and the same sum of losses, as each sample alone. All
pictures of a batch lie in one list, in the order of their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from isaac_lora.conversations.samples import IGNORED, Sample
from isaac_lora.network.positions import mrope_position_ids
from lora_core.errors import DataError
from lora_core.training.schedule import EpochSampler

Side = Literal["left", "right"]
Batch = dict[str, Any]


def collate_padded(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    pixel_shuffle_scale: int,
    padding_side: Side = "right",
) -> Batch:
    """One row per sample, padded to the longest, L.

    Args:
        pad_id: what stands at padding in `input_ids`.
        padding_side: left for prompts of `generate`, which goes on at the end of a row.

    Returns:
        `input_ids`, `labels`, `attention_mask` i64 [B, L], `image_mask` bool [B, L],
        `position_ids` i64 [B, L, 3]; with pictures `grids` i64 [pictures, 2], `patches` uint8
        [N, 3 p²] where they are loaded, and `pictures`, a list of uint8 [H, W, 3], where kept.

    Raises:
        DataError: no samples, or a side of another name.
    """
    if not samples:
        raise DataError("a batch of no samples")
    if padding_side not in ("left", "right"):
        raise DataError(f"padding_side is {padding_side!r}: expected left or right")
    longest = max(len(sample) for sample in samples)

    def rows(values: Sequence[Tensor], filling: int | bool) -> Tensor:
        rows = values[0].new_full((len(values), longest), filling)
        for row, value in zip(rows, values, strict=True):
            row[_real(len(value), longest, padding_side)] = value
        return rows

    attention_mask = rows([torch.ones_like(sample.input_ids) for sample in samples], 0)
    image_mask = rows([sample.image_mask for sample in samples], False)
    images = _pictures(samples)
    return {
        "input_ids": rows([sample.input_ids for sample in samples], pad_id),
        "attention_mask": attention_mask,
        "position_ids": mrope_position_ids(
            image_mask, images.get("grids"), pixel_shuffle_scale, attention_mask
        ),
        "image_mask": image_mask,
        "labels": rows([_without_first(sample.labels) for sample in samples], IGNORED),
        **images,
    }


def collate_packed(samples: Sequence[Sample], *, pixel_shuffle_scale: int) -> Batch:
    """All samples in one row of L places; each sees itself alone, from position 0.

    Returns:
        As `collate_padded` with B = 1, but in place of `attention_mask` there is `document_ids`
        i64 [1, L], the number of the sample that a place belongs to.

    Raises:
        DataError: no samples.
    """
    if not samples:
        raise DataError("a batch of no samples")
    lengths = torch.tensor([len(sample) for sample in samples])
    document_ids = torch.repeat_interleave(torch.arange(len(samples)), lengths)[None]
    image_mask = torch.cat([sample.image_mask for sample in samples])[None]
    images = _pictures(samples)
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
        "document_ids": document_ids,
        "position_ids": mrope_position_ids(
            image_mask, images.get("grids"), pixel_shuffle_scale, document_ids=document_ids
        ),
        "image_mask": image_mask,
        "labels": torch.cat([_without_first(sample.labels) for sample in samples])[None],
        **images,
    }


def num_label_tokens(batch: Batch) -> int:
    """Labels of a batch that predictions are compared with, over which its loss is the mean."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _real(length: int, longest: int, side: Side) -> slice:
    return slice(longest - length, None) if side == "left" else slice(length)


def _without_first(labels: Tensor) -> Tensor:
    """Labels of a sample but for its first place, which neither padding nor another may predict."""
    labels = labels.clone()
    labels[:1] = IGNORED
    return labels


def _pictures(samples: Sequence[Sample]) -> Batch:
    """The pictures of all samples in order; nothing where there are none."""
    grids = torch.cat([sample.grids for sample in samples])
    if len(grids) == 0:
        return {}
    batch: Batch = {"grids": grids}
    loaded = [sample for sample in samples if len(sample.grids)]
    if all(sample.patches is not None for sample in loaded):
        batch["patches"] = torch.cat([s.patches for s in loaded if s.patches is not None])
    if pictures := [picture for sample in samples for picture in sample.pictures]:
        batch["pictures"] = pictures
    return batch


# -- which samples go together ---------------------------------------------------------------------


class OrderByLength(EpochSampler):
    """All indices in an order in which the samples of a batch are of similar length.

    As `EpochSampler` a function of (seed, epoch) alone. The one batch that is smaller stands last.

    Args:
        lengths: places of each sample. batch_size: samples of all processes.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.batch_size = list(lengths), batch_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed % 2**32, self.epoch])
        batches = batches_by_length(self.lengths, self.batch_size, rng)
        for batch in sorted(batches, key=lambda batch: len(batch) < self.batch_size):
            yield from batch


def batches_by_length(
    lengths: Sequence[int],
    batch_size: int,
    rng: np.random.Generator,
    *,
    most_places: int | None = None,
    chunk: int = 50,
) -> list[list[int]]:
    """Indices of samples in batches of similar length, in random order, each sample once.

    Samples are shuffled, cut into chunks of `chunk` batches, and sorted within a chunk, so that a
    batch has little padding and an epoch is still random.

    Args:
        lengths: places of each sample.
        most_places: bound of a padded batch, rows times the longest; a longer sample is alone.
    """
    order = rng.permutation(len(lengths))
    size = max(1, batch_size * chunk)
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        part = sorted(order[start : start + size].tolist(), key=lambda index: -lengths[index])
        batches += _bounded(part, lengths, batch_size, most_places)
    return [batches[index] for index in rng.permutation(len(batches))]


def _bounded(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, most_places: int | None
) -> Iterator[list[int]]:
    """Cut samples, the longest first, into batches."""
    batch: list[int] = []
    for index in order:
        longest = lengths[batch[0]] if batch else 0
        full = len(batch) == batch_size
        if batch and (full or (most_places and (len(batch) + 1) * longest > most_places)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
