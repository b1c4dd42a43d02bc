"""What the network gives and what it is trained towards: plain values between model and losses.

B counts queries, pairs of an image and a phrase; Q object queries of the decoder; N target objects
of all queries together. Boxes are (cx, cy, w, h) as shares of the image's sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Detections:
    """The object queries of one decoder layer.

    Attributes:
        logits: f32 [B, Q], before the presence of the phrase is taken into account.
        boxes: f32 [B, Q, 4].
        masks: logits [B, Q, h, w]; only of the last layer, and only if masks are computed.
    """

    logits: Tensor
    boxes: Tensor
    masks: Tensor | None = None


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
