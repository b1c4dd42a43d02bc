"""The official SAM 2 training loss, and a whole training step's loss with correction clicks.

For N objects with M predicted masks each, logits x [N, M, H, W], target t [N, H, W] in {0, 1},
p = sigmoid(x), predicted score s [N, M] and K objects in the step:

    focal(n, m) = mean over pixels of  a_t (1 - p_t)^2 bce(x, t) / K
                  with p_t = p t + (1 - p)(1 - t),  a_t = 0.25 t + 0.75 (1 - t)
    dice(n, m)  = (1 - (2 sum(p t) + 1) / (sum p + sum t + 1)) / K
    iou(n, m)   = |s - IoU(x > 0, t)| / K
    class(n)    = bce(object score, t is not empty) / K

    m* = argmin over m of 20 focal + dice
    loss = sum over n of  20 focal(n, m*) + dice(n, m*) + mean over m of iou(n, m) + class(n)

An object with an empty target contributes its class term only. The clicks of one object are
decoded one after the other and the losses of all decodings are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_lora.config import Config
from sam2_lora.model import Decoded, Features, decode, encode, encode_pictures
from sam2_lora.prompts import random_correction

if TYPE_CHECKING:
    from transformers import Sam2Model

LOGIT_LIMIT = 32.0  # a returned mask prompt is clamped to +-32, as the official predictor does


@dataclass(frozen=True)
class Rule:
    """Weights and variants of the official loss; the defaults are the official fine-tuning's."""

    mask: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    classes: float = 1.0
    all_scores: bool = True  # train the scores of all masks, not only of the best one
    l1_scores: bool = True  # |s - IoU|, else its square
    object_scores: bool = True  # class term on; empty targets then train nothing else
    class_alpha: float = -1.0  # below 0: no class weighting
    class_gamma: float = 0.0


LEGACY = Rule(mask=1.0, dice=0.0, iou=0.05, classes=0.0)


class Terms(NamedTuple):
    """The four unweighted parts of the loss, 0-dim float32 tensors."""

    mask: Tensor
    dice: Tensor
    iou: Tensor
    classes: Tensor

    def total(self, rule: Rule) -> Tensor:
        """The weighted sum."""
        return (
            rule.mask * self.mask
            + rule.dice * self.dice
            + rule.iou * self.iou
            + rule.classes * self.classes
        )


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every pixel; `targets` of 0 and 1 broadcast against `logits`."""
    targets = targets.to(logits.dtype).expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if gamma != 0:
        p = torch.sigmoid(logits)
        loss = loss * (1 - (p * targets + (1 - p) * (1 - targets))) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft Dice loss [N, M] of logits [N, M, H, W] against targets that broadcast to them."""
    p = torch.sigmoid(logits).flatten(2)
    t = targets.to(logits.dtype).expand_as(logits).flatten(2)
    return 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)


def mask_iou(masks: Tensor, targets: Tensor) -> Tensor:
    """IoU [N, M] of boolean masks [N, M, H, W] and targets that broadcast; 0 if both are empty."""
    union = (masks | targets).flatten(2).sum(-1)
    return (masks & targets).flatten(2).sum(-1) / union.clamp(min=1)


def upscale(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [N, M, h, w] at (height, width), bilinear, in float32."""
    if logits.shape[-2:] == size:
        return logits.float()
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """One mask or score per object: values [N, M, ...] at index [N] -> [N, 1, ...]."""
    return values[torch.arange(len(index), device=index.device), index][:, None]


def official_terms(
    masks: Tensor,
    scores: Tensor,
    object_scores: Tensor,
    targets: Tensor,
    num_objects: float,
    rule: Rule | None = None,
) -> Terms:
    """The official loss of one decoding.

    Only the chosen mask's pixels are kept for the backward pass: a third of the memory of
    differentiating all of them, and the same gradient, since the others' is zero.

    Args:
        masks: logits [N, M, h, w]; scaled up to the targets' size.
        scores: predicted IoU [N, M].
        object_scores: logits [N, 1].
        targets: [N, H, W] of 0 and 1.
        num_objects: the K of the module's formulas.
        rule: variant of the loss; None is the official fine-tuning's.
    """
    rule = rule or Rule()
    size = (targets.shape[-2], targets.shape[-1])
    targets = targets[:, None] > 0
    present = targets.flatten(1).any(1, keepdim=True)
    weight = (present if rule.object_scores else torch.ones_like(present)).float()
    with torch.no_grad():
        full = upscale(masks, size)
        true_iou = mask_iou(full > 0, targets)
        focal, dice = focal_loss(full, targets).mean((-2, -1)), dice_loss(full, targets)
        best = (rule.mask * focal + rule.dice * dice).argmin(1)
        del full
    chosen = upscale(pick(masks, best), size)
    difference = scores.float() - true_iou
    score_loss = difference.abs() if rule.l1_scores else difference.square()
    score_loss = score_loss.mean(1, keepdim=True) if rule.all_scores else pick(score_loss, best)
    class_loss = object_scores.float().new_zeros(())
    if rule.object_scores:
        class_loss = focal_loss(object_scores.float(), present, rule.class_alpha, rule.class_gamma)
    return Terms(
        mask=(focal_loss(chosen, targets).mean((-2, -1)) * weight).sum() / num_objects,
        dice=(dice_loss(chosen, targets) * weight).sum() / num_objects,
        iou=(score_loss * weight).sum() / num_objects,
        classes=class_loss.sum() / num_objects,
    )


def legacy_terms(
    masks: Tensor, scores: Tensor, object_scores: Tensor, targets: Tensor, num_objects: float
) -> Terms:
    """Loss of the earlier script, for comparison; to be weighted by `LEGACY`.

    BCE of mask 0 at the decoder's resolution against the nearest-resized target, and
    |s_0 - IoU_0|; an object without foreground contributes nothing. Shapes as in `official_terms`.
    """
    small = F.interpolate(targets[:, None].float(), size=masks.shape[-2:], mode="nearest")
    present = (targets.flatten(1) > 0).any(1, keepdim=True).float()
    first = masks[:, :1].float()
    bce = F.binary_cross_entropy_with_logits(first, small, reduction="none").mean((-2, -1))
    score_loss = (scores[:, :1].float() - mask_iou(first.detach() > 0, small > 0)).abs()
    return Terms(
        mask=(bce * present).sum() / num_objects,
        dice=bce.new_zeros(()),
        iou=(score_loss * present).sum() / num_objects,
        classes=0 * object_scores.float().sum(),  # keeps the head in the graph, as DDP wants it
    )


def loss(model: Sam2Model, batch: dict[str, Any], cfg: Config) -> tuple[Tensor, dict[str, float]]:
    """Loss of one training batch, with gradient through encoder and decoder.

    Args:
        model: the network, adapted or not.
        batch: as `data.collate` makes it; "features" (`forward.Features` as a dict) or
            "pixel_values" (see `forward.encode`) may stand in for "images".
        cfg: `loss`, `correction_clicks`.

    Returns:
        The scalar and its parts: the unweighted terms, and IoU and Dice (0..1) of the masks that a
        user would get, as the mean over the objects that have a target; without any such object
        these two are left out.
    """
    features = _features(model, batch)
    legacy = cfg.loss == "legacy"
    rule = LEGACY if legacy else Rule()
    num_objects = max(object_count(batch), 1)
    # A generator for each picture: clicks do not depend on what else is in the batch.
    rngs = [np.random.default_rng(seed) for seed in batch["seed"]]
    steps: list[Terms] = []
    overlaps: list[Tensor] = []
    for bucket in batch["buckets"]:
        targets = bucket["targets"]
        for decoded in _decodings(model, features, bucket, cfg, rngs):
            terms_of = legacy_terms if legacy else official_terms
            steps.append(terms_of(*decoded, targets, num_objects))
        overlaps.append(_overlap(decoded, targets))
    terms = Terms(*(torch.stack(part).sum() for part in zip(*steps, strict=True)))
    return terms.total(rule), _parts(terms, torch.cat(overlaps))


def _features(model: Sam2Model, batch: dict[str, Any]) -> Features:
    if "features" in batch:
        return Features(**batch["features"])
    if "pixel_values" in batch:
        return encode(model, batch["pixel_values"])
    return encode_pictures(model, batch["images"])


def object_count(batch: dict[str, Any]) -> int:
    """K: the objects of the batch. The trainer weighs batches and processes by it."""
    return sum(len(bucket["targets"]) for bucket in batch["buckets"])


def _decodings(
    model: Sam2Model,
    features: Features,
    bucket: dict[str, Tensor],
    cfg: Config,
    rngs: Sequence[np.random.Generator],
) -> Iterator[Decoded]:
    """Decode a bucket's first prompts, then once more after each correction click.

    As in official training, three masks are predicted for a single click and one mask for a box or
    for several clicks. (The legacy loss always looked at the first of three.)
    """
    points, labels, boxes = bucket.get("points"), bucket.get("labels"), bucket.get("boxes")
    ambiguous = boxes is None and points is not None and points.shape[1] == 1
    decoded = decode(
        model, features, bucket["image"], points=points, labels=labels, boxes=boxes,
        multimask=ambiguous or cfg.loss == "legacy",
    )  # fmt: skip
    yield decoded
    for _ in range(cfg.correction_clicks):
        logits = best_masks(decoded).detach()
        of_object = [rngs[row] for row in bucket["image"].tolist()]
        points, labels = _append_clicks(points, labels, logits, bucket["targets"], of_object)
        decoded = decode(
            model, features, bucket["image"], points=points, labels=labels, boxes=boxes,
            mask_input=logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT), multimask=cfg.loss == "legacy",
        )  # fmt: skip
        yield decoded


def best_masks(decoded: Decoded) -> Tensor:
    """The mask logits [N, 1, h, w] with the highest predicted IoU."""
    return pick(decoded.masks, decoded.iou.argmax(1))


def _append_clicks(
    points: Tensor | None,
    labels: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    rngs: Sequence[np.random.Generator],
) -> tuple[Tensor, Tensor]:
    """One more random click per object, in the region where mask and target disagree."""
    masks = (upscale(logits, (targets.shape[-2], targets.shape[-1]))[:, 0] > 0).cpu().numpy()
    objects = zip(masks, targets.cpu().numpy() > 0, rngs, strict=True)
    clicks = [random_correction(mask, target, rng) for mask, target, rng in objects]
    xy = torch.tensor([[click.xy] for click in clicks], dtype=torch.float32)
    label = torch.tensor([[click.label] for click in clicks])
    xy, label = xy.to(targets.device), label.to(targets.device)
    if points is None or labels is None:
        return xy, label
    return torch.cat([points, xy], 1), torch.cat([labels, label], 1)


def _overlap(decoded: Decoded, targets: Tensor) -> Tensor:
    """Pixels [N, 2] in intersection and union of best mask and target, where there is a target."""
    with torch.no_grad():
        masks = upscale(best_masks(decoded), (targets.shape[-2], targets.shape[-1]))[:, 0] > 0
        truth = targets > 0
        intersection, union = (masks & truth), (masks | truth)
        counts = torch.stack([intersection.flatten(1).sum(1), union.flatten(1).sum(1)], 1)
        return counts[truth.flatten(1).any(1)]


def _parts(terms: Terms, overlap: Tensor) -> dict[str, float]:
    """Numbers for the log, fetched from the device at once."""
    intersection, union = overlap.double().unbind(1)
    iou = intersection / union.clamp(min=1)
    values = torch.stack(
        [*(term.detach().double() for term in terms), iou.mean(), (2 * iou / (1 + iou)).mean()]
    )
    names = ("loss_mask", "loss_dice", "loss_iou", "loss_class", "iou", "dice")
    parts = dict(zip(names, values.tolist(), strict=True))
    if not len(overlap):
        del parts["iou"], parts["dice"]
    return parts
