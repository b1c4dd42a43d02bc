"""What the network gives and what it is trained towards: plain values between model and losses.

B counts queries, pairs of an image and a phrase; Q object queries of the decoder; N target objects
of all queries together. Boxes are (cx, cy, w, h) as shares of the image's sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Masks:
    """Mask logits of B x Q objects, computed only for those that are asked for.

        logits[b, q] = <embeddings[b, q], pixels[b]>

    All of them, with their gradient, would be the largest tensors of a training step, of which the
    loss needs the few objects that are matched.

    Attributes:
        embeddings: [B, Q, C].
        pixels: [B, C, h, w].
    """

    embeddings: Tensor
    pixels: Tensor

    def __getitem__(self, index: int | tuple[Tensor, Tensor]) -> Tensor:
        """`masks[b]`: [Q, h, w]; `masks[batch, query]` with i64 [P] each: [P, h, w]."""
        if not isinstance(index, tuple):
            return self._of(index, self.embeddings[index])
        batch, query = index
        order = batch.argsort(stable=True)
        counts = np.bincount(batch.cpu().numpy(), minlength=len(self.pixels)).tolist()
        groups = self.embeddings[batch[order], query[order]].split(counts)
        drawn = torch.cat([self._of(b, group) for b, group in enumerate(groups)])
        return drawn[order.argsort()]

    def _of(self, query: int, embeddings: Tensor) -> Tensor:
        pixels = self.pixels[query]
        return (embeddings @ pixels.flatten(1)).unflatten(1, pixels.shape[1:])

    def half(self, part: slice) -> Masks:
        """Those of a part of the object queries."""
        return Masks(self.embeddings[:, part], self.pixels)

    def all(self) -> Tensor:
        """[B, Q, h, w]."""
        return torch.stack([self[b] for b in range(len(self.pixels))])


@dataclass
class Detections:
    """The object queries of one decoder layer.

    Attributes:
        logits: f32 [B, Q], before the presence of the phrase is taken into account.
        boxes: f32 [B, Q, 4].
        masks: logits [B, Q, h, w], or `Masks`, which gives those that it is indexed with; only of
            the last layer, and only if masks are computed.
    """

    logits: Tensor
    boxes: Tensor
    masks: Masks | Tensor | None = None


@dataclass
class Outputs:
    """One forward pass; the last entry of each list is the final layer.

    Attributes:
        one_to_one: of every decoder layer in training, of the last one in evaluation.
        one_to_many: the second half of the queries (DAC), in training; else empty.
        presence: logit that the phrase is in the image at all, [B], per layer as `one_to_one`.
        semantic: logits [B, 1, h, w] of the union of all objects; only if masks are computed.
    """

    one_to_one: list[Detections]
    one_to_many: list[Detections]
    presence: list[Tensor]
    semantic: Tensor | None = None


@dataclass
class Targets:
    """The objects of a batch, packed query after query.

    Attributes:
        boxes: f32 [N, 4].
        counts: i64 [B], objects per query; 0 for a phrase that is not in its image.
        masks: bool or uint8 [N, H, W], or None where no masks are trained.
        has_mask: bool [N], whether the object's mask is known; None: all are.
    """

    boxes: Tensor
    counts: Tensor
    masks: Tensor | None = None
    has_mask: Tensor | None = None
