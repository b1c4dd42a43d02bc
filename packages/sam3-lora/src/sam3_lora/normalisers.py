"""What the loss of SAM 3 divides by, counted over all pictures of an update.

The loss is no mean over pictures: its terms divide by the queries B, the objects n, or the queries
with masks R, and the whole is multiplied by the root of B. To be the same for any number of
processes and accumulated batches it must know the sums of all of them. The official training knows
those of n, as the mean over its processes, and takes B and R of each alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisers:
    """Counts of an update, and the weight of one of its batches.

    Attributes:
        queries: B, pairs of an image and a phrase.
        objects: n, targets of all of them.
        masked: R, queries with an object whose mask is known and not empty; None: as many as the
            batch itself has.
        share: factor of a batch's sums such that the mean over all batches is the whole: their
            number, or 0 for a batch that does not count.
    """

    queries: float
    objects: float
    masked: float | None = None
    share: float = 1.0


def counted(batch: dict[str, Any], masks: bool) -> dict[str, float]:
    """Count a collated batch, for `LoraTrainer(count=...)`; the names are those of `Normalisers`.

    Args:
        masks: they are trained, so that R is needed.
    """
    targets = batch["targets"]
    found = {"queries": float(len(targets["counts"])), "objects": float(len(targets["boxes"]))}
    if masks:
        of = (targets["counts"], targets.get("masks"), targets.get("has_mask"))
        found["masked"] = float(masked_queries(*of))
    return found


def masked_queries(counts: Tensor, masks: Tensor | None, known: Tensor | None) -> int:
    """R of a batch: queries of whose objects at least one has a known mask that is not empty."""
    if masks is None or len(masks) == 0:
        return 0
    filled = masks.flatten(1).any(1).bool()  # any of uint8 is uint8
    if known is not None:
        filled = filled & known.to(filled.device).bool()
    query = torch.repeat_interleave(counts.to(filled.device))
    return int(query[filled].unique().numel())
