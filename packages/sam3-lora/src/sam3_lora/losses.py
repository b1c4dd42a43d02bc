"""The official training loss of SAM 3: boxes, scores, presence, masks and the semantic map.

For B queries, pairs of an image and a phrase, n target objects of all of them, and pairs of an
object query (box b, score logit z, p = sigmoid(z)) with its target t from `matching`:

    loss_bbox = 1/n sum over pairs |b - b_t|_1
    loss_giou = 1/n sum over pairs (1 - GIoU(b, b_t))
    loss_ce   = 1/(B max(Q, 200)) sum over all object queries of
                keep (10 y BCE(z, u) + (1 - y) p^2 BCE(z, 0))
                y = 1 if matched, u = max(0.01, p^0.25 IoU^0.75) held constant
    presence_loss = 1/B sum 0.5 BCE(presence logit, keep),   keep = 1 if the phrase has a target
    loss_mask = 1/n sum over pairs, mean over pixels of a_t (1 - p_t)^2 BCE,   a = 0.25
    loss_dice = 1/n sum over pairs 1 - (2 sum(s m) + 1) / (sum s + sum m + 1)
    loss_semantic_seg, loss_semantic_dice: the same of the semantic map and the union of the
                targets' masks (a = 0.6), as the mean over the queries whose union is not empty

    loss = sqrt(B) (sum over decoder layers of (one to one + 2 one to many) + semantic)

each term times its weight. A phrase that is not in its image trains its presence only.
Masks count in the last layer; all is computed in float32. B, n and the count of unions are those
of all pictures of an update, if `normalisers` says them, else of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.errors import ConfigError, listing
from sam3_lora.mask_losses import compare
from sam3_lora.matching import Match, MatchSettings, match, overlaps
from sam3_lora.normalisers import Normalisers
from sam3_lora.outputs import Masks, Outputs, Targets

MASK_ALPHA, SEMANTIC_ALPHA = 0.25, 0.6  # weight of foreground pixels in the focal losses


@dataclass(frozen=True)
class LossSettings:
    """Weights and variants of the loss; the defaults are the official fine-tuning's.

    Attributes:
        bbox ... semantic_dice: weights of the terms, in the order of the module's formulas.
        o2m_weight: of the one-to-many half on top of these; 0 leaves it out.
        positive_weight: of matched queries in loss_ce.
        pad_queries: loss_ce is divided as if there were at least so many queries.
        scale_by_batch: the factor sqrt(B).
        masks: train masks and the semantic map; False: boxes only.
        mask_points: compare masks at so many points each (PointRend; 12544 is usual), which takes
            less time and memory than all pixels; 0: at all pixels, and so always in evaluation.
        mask_pixels: pixels of masks at full size that exist at once; bounds the memory.
        matching: constants of the matchers.
    """

    bbox: float = 5.0
    giou: float = 2.0
    ce: float = 20.0
    presence: float = 20.0
    mask: float = 200.0
    dice: float = 10.0
    semantic: float = 20.0
    semantic_dice: float = 30.0
    o2m_weight: float = 2.0
    positive_weight: float = 10.0
    pad_queries: int = 200
    scale_by_batch: bool = True
    masks: bool = True
    mask_points: int = 0
    mask_pixels: int = 2**23
    matching: MatchSettings = field(default_factory=MatchSettings)

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        problems = [
            f"{name} is {value!r}: it must be a number, 0 or more"
            for name, value in values.items()
            if isinstance(value, (int, float)) and not 0 <= value < math.inf
        ]
        if self.mask_pixels < 1:
            problems.append(f"mask_pixels is {self.mask_pixels!r}: it must be at least 1")
        if problems:
            raise ConfigError(listing(problems))

    def weights(self) -> dict[str, float]:
        """Weight of every term by its name."""
        return {
            "loss_bbox": self.bbox,
            "loss_giou": self.giou,
            "loss_ce": self.ce,
            "presence_loss": self.presence,
            "loss_mask": self.mask,
            "loss_dice": self.dice,
            "loss_semantic_seg": self.semantic,
            "loss_semantic_dice": self.semantic_dice,
        }


@dataclass(frozen=True)
class Layers:
    """The K predictions of the decoder: `first` layers one to one, then as many one to many.

    Attributes:
        logits: f32 [K, B, Q]. boxes: f32 [K, B, Q, 4].
        first: layers of the one-to-one half; the one-to-many half is empty in evaluation.
        factor: f32 [K], what the terms of a layer are multiplied by, 1 or the one-to-many weight.
    """

    logits: Tensor
    boxes: Tensor
    first: int
    factor: Tensor

    @property
    def has_second(self) -> bool:
        return len(self.logits) > self.first


def stacked(outputs: Outputs, settings: LossSettings) -> Layers:
    """All layers of both halves in one tensor each: the terms take the same kernels for all."""
    second = outputs.one_to_many if settings.o2m_weight > 0 else []
    both = [*outputs.one_to_one, *second]
    logits = torch.stack([layer.logits.float() for layer in both])
    factor = logits.new_ones(len(both))
    factor[len(outputs.one_to_one) :] = settings.o2m_weight
    boxes = torch.stack([layer.boxes.float() for layer in both])
    return Layers(logits, boxes, len(outputs.one_to_one), factor)


def loss(
    outputs: Outputs,
    targets: Targets,
    settings: LossSettings | None = None,
    sizes: Normalisers | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of one forward pass, and what it consists of.

    It is NaN if a score or box of any layer is not finite, matched or not.

    Args:
        outputs: of training (all layers, both halves) or of evaluation (the last layer only: the
            value is then several times smaller).
        targets: on the device of the outputs.
        settings: None: the official ones.
        sizes: of the whole update; None: it is this batch alone.

    Returns:
        The scalar, and for the log, without gradient: each term of the last layer, one to one,
        before its weight; "loss_aux" and "loss_o2m", what the earlier layers and the last layer's
        one-to-many half add to the bracket of the module's formula; "presence_accuracy", the share
        of phrases that the last layer rightly finds present or absent.

    Raises:
        DataError: target boxes that are no shares of the image.
        ValueError: masks are to be trained, but the outputs or the targets have none.
    """
    settings = settings or LossSettings()
    layers = stacked(outputs, settings)
    found = match(
        layers.logits, layers.boxes, targets, settings.matching, one_to_many_last=layers.has_second
    )
    sizes = sizes or Normalisers(len(found.counts), float(found.counts.sum()))
    values = terms(outputs, targets, settings, layers, found, sizes)
    weights = settings.weights()
    weighted = torch.stack([weights[name] * value for name, value in values.items()]).sum(0)  # [K]
    scale = math.sqrt(sizes.queries) if settings.scale_by_batch else 1.0
    # A query without a pair may be in no term at all: its NaN would go unnoticed.
    unnoticed = 0 * (layers.logits.detach().sum() + layers.boxes.detach().sum())
    total = scale * weighted.sum() + unnoticed

    last = layers.first - 1
    parts = {name: value.detach()[last] for name, value in values.items()}
    shares = weighted.detach()
    parts["loss_aux"] = shares[:last].sum() + shares[layers.first : -1].sum()
    if layers.has_second:
        parts["loss_o2m"] = shares[-1]
    said = outputs.presence[-1].detach() > 0
    present = torch.from_numpy(found.present).to(said.device)
    parts["presence_accuracy"] = (said == present).sum() * (sizes.share / sizes.queries)
    return total, parts


def terms(
    outputs: Outputs,
    targets: Targets,
    settings: LossSettings,
    layers: Layers,
    found: Match,
    sizes: Normalisers,
) -> dict[str, Tensor]:
    """Every term of every layer, f32 [K], before the weights; those of one to many times theirs.

    Terms that a layer does not have are 0 there.
    """
    device, n = layers.logits.device, max(sizes.objects, 1.0)
    keep = torch.from_numpy(found.present).to(device).float()
    pairs = paired(layers, targets, found)
    values = {
        "loss_bbox": per_layer(pairs.distance, found) / n,
        "loss_giou": per_layer(1 - pairs.giou, found) / n,
        "loss_ce": score_terms(layers, pairs, found, keep, settings) / sizes.queries,
        "presence_loss": presence_terms(outputs, keep, len(layers.logits)) / sizes.queries,
    }
    if settings.masks:
        values |= mask_terms(outputs, targets, settings, layers, found, sizes)
    factor = layers.factor * sizes.share
    return {name: value * factor for name, value in values.items()}


# -- boxes, scores, presence -----------------------------------------------------------------------


class Pairs(NamedTuple):
    """The matched queries and their targets on the device, all layers one after the other."""

    where: tuple[Tensor, Tensor, Tensor]  # layer, batch, query: i64 [P] each
    distance: Tensor  # |b - b_t|_1, f32 [P]
    iou: Tensor  # without gradient
    giou: Tensor


def paired(layers: Layers, targets: Targets, found: Match) -> Pairs:
    """Compare the boxes of all pairs."""
    arrays = (found.layer, found.batch, found.query, found.target)
    layer, batch, query, target = on_device(arrays, layers.boxes)
    b, t = layers.boxes[layer, batch, query], targets.boxes[target].float()
    iou, giou = overlaps(b, t)
    return Pairs((layer, batch, query), (b - t).abs().sum(-1), iou.detach(), giou)


def score_terms(
    layers: Layers, pairs: Pairs, found: Match, keep: Tensor, settings: LossSettings
) -> Tensor:
    """B times the score loss of all object queries whose phrase has a target; f32 [K]."""
    z, label = layers.logits, soft_labels(layers, pairs, found)
    positive = F.binary_cross_entropy_with_logits(z, label, reduction="none")
    negative = z.sigmoid().square() * F.softplus(z)  # BCE(z, 0) is softplus(z)
    value = torch.where(label > 0, settings.positive_weight * positive, negative)
    return (value * keep[:, None]).sum((1, 2)) / max(z.shape[2], settings.pad_queries)


@torch.no_grad()
def soft_labels(layers: Layers, pairs: Pairs, found: Match) -> Tensor:
    """u of the matched queries, f32 [K, B, Q]; 0 for the others."""
    p = layers.logits[pairs.where].sigmoid()
    value = (p**0.25 * pairs.iou**0.75).clamp(min=0.01)
    # Without doubled places: which of two values would be written last is not defined.
    (decides,) = on_device((np.flatnonzero(found.labels),), p)
    layer, batch, query = (index[decides] for index in pairs.where)
    labels = torch.zeros_like(layers.logits)
    labels[layer, batch, query] = value[decides]
    return labels


def presence_terms(outputs: Outputs, keep: Tensor, count: int) -> Tensor:
    """B times the presence loss of the one-to-one layers, f32 [K]."""
    z = torch.stack([presence.float() for presence in outputs.presence])  # [L, B]
    value = 0.5 * F.binary_cross_entropy_with_logits(z, keep.expand_as(z), reduction="none")
    return F.pad(value.sum(1), (0, count - len(z)))


def per_layer(values: Tensor, found: Match) -> Tensor:
    """Sums [K] of the values [P] of all pairs; in a fixed order, which index_add has not."""
    return torch.stack([part.sum() for part in values.split(found.sizes)])


def on_device(arrays: tuple[np.ndarray, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Arrays of equal length as tensors on the device of `like`, by one transfer."""
    return torch.from_numpy(np.stack(arrays)).to(like.device).unbind(0)


# -- masks -----------------------------------------------------------------------------------------


def mask_terms(
    outputs: Outputs,
    targets: Targets,
    settings: LossSettings,
    layers: Layers,
    found: Match,
    sizes: Normalisers,
) -> dict[str, Tensor]:
    """Mask losses of the last layers of both halves, and of the semantic map; f32 [K] each."""
    masks, n = target_masks(targets, layers.logits.device), max(sizes.objects, 1.0)
    final: dict[int, Masks | Tensor | None] = {layers.first - 1: outputs.one_to_one[-1].masks}
    if layers.has_second:
        final[len(layers.logits) - 1] = outputs.one_to_many[-1].masks
    focal, dice = {}, {}
    points = settings.mask_points if torch.is_grad_enabled() else 0
    for layer, logits in final.items():
        pairs = found.with_mask(layer)
        arrays = (found.batch[pairs], found.query[pairs], found.target[pairs])
        batch, query, target = on_device(arrays, masks)
        if logits is None:
            raise not_made("masks")
        each = compare(
            logits[batch, query], masks, target,
            alpha=MASK_ALPHA, points=points, pixels=settings.mask_pixels,
        )  # fmt: skip
        focal[layer], dice[layer] = (value.sum() / n for value in each)
    if outputs.semantic is None:
        raise not_made("semantic map")
    whole = semantic_terms(outputs.semantic, masks, found, settings, sizes.masked)
    return {
        "loss_mask": placed(focal, layers),
        "loss_dice": placed(dice, layers),
        "loss_semantic_seg": placed({layers.first - 1: whole[0]}, layers),
        "loss_semantic_dice": placed({layers.first - 1: whole[1]}, layers),
    }


def semantic_terms(
    semantic: Tensor, masks: Tensor, found: Match, settings: LossSettings, count: float | None
) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss of the semantic map, means over the phrases with a non-empty union.

    Args:
        count: of such phrases, if it is not that of the batch.
    """
    groups = np.split(np.arange(len(masks)), np.cumsum(found.counts)[:-1])
    known = [group[found.has_mask[group]] for group in groups]  # targets of every phrase
    phrases = [phrase for phrase, group in enumerate(known) if len(group)]
    logits = semantic[phrases, 0]  # [R, h, w]
    unions = masks.new_zeros((0, *masks.shape[1:]))
    if phrases:
        unions = torch.stack([masks[on_device((known[p],), masks)].amax(0) for p in phrases])
    every = torch.arange(len(phrases), device=masks.device)
    each = compare(logits, unions, every, alpha=SEMANTIC_ALPHA, pixels=settings.mask_pixels)
    filled = (unions > 0).flatten(1).any(1).float()
    over = (filled.sum() if count is None else count) + 1e-6
    focal, dice = ((value * filled).sum() / over for value in each)
    return focal, dice


def target_masks(targets: Targets, device: torch.device) -> Tensor:
    """The targets' masks [N, H, W]; without any target there need not be any.

    Raises:
        ValueError: they are missing.
    """
    count = len(targets.boxes)
    if targets.masks is None and count == 0:
        return torch.zeros((0, 1, 1), dtype=torch.uint8, device=device)
    if targets.masks is None or len(targets.masks) != count:
        given = "none" if targets.masks is None else f"{len(targets.masks)} masks"
        raise ValueError(
            f"masks are to be trained, but the {count} targets have {given}; without masks use "
            "LossSettings(masks=False)"
        )
    return targets.masks


def not_made(what: str) -> ValueError:
    return ValueError(f"masks are to be trained, but the network's outputs hold no {what}")


def placed(values: dict[int, Tensor], layers: Layers) -> Tensor:
    """Scalars at their layers, f32 [K], and 0 at the others."""
    nothing = layers.logits.new_zeros(())
    return torch.stack([values.get(layer, nothing) for layer in range(len(layers.logits))])
