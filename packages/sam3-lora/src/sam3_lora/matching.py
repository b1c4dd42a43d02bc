"""Which object query answers for which target: the two matchers of SAM 3's training.

K decoder layers, B phrases in images, Q object queries each, N targets of all phrases, packed.
Every phrase is matched by itself; a phrase without targets has no pairs.

One to one (Hungarian algorithm, as DETR, Carion et al. 2020), minimising the sum over pairs of

    5 |b_q - b_t|_1 + 2 C(z_q) - 2 GIoU(b_q, b_t)
    C(z) = -0.25 (1 - p)^2 log p + 0.75 p^2 log(1 - p),   p = sigmoid(z)

One to many (DAC, for the second half of the queries): with S = 0.3 p + 0.7 IoU query q answers for
target t if S_qt is above both 0.4 and the (1 - 4/Q) quantile of S over the queries: the best four.
A query may then answer for several targets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.errors import ConfigError, DataError, listing
from sam3_lora.outputs import Targets

CLASS_ALPHA = 0.25  # of C; its gamma is 2
TINY_AREA = 1e-12  # of an image: smaller unions are not divided by
OUT_OF_REACH = 1e9  # cost instead of NaN and infinity, which the assignment refuses
TARGETS_AT_ONCE = 512  # bounds the memory of all pairwise costs
BOX_ROUNDING = 1e-3  # of a side: by so much a target may stick out of its image


@dataclass(frozen=True)
class MatchSettings:
    """Constants of both matchers; the defaults are the official fine-tuning's.

    Attributes:
        cost_class, cost_bbox, cost_giou: weights of the one-to-one cost.
        o2m_alpha: share of the score in S, that of the IoU is the rest.
        o2m_threshold: S of a pair must be above it.
        o2m_topk: queries per target.
    """

    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    o2m_alpha: float = 0.3
    o2m_threshold: float = 0.4
    o2m_topk: int = 4

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} is {getattr(self, field.name)!r}: it must be a number, 0 or more"
            for field in fields(self)
            if not 0 <= getattr(self, field.name) < float("inf")
        ]
        if self.o2m_topk < 1:
            problems.append(f"o2m_topk is {self.o2m_topk!r}: it must be at least 1")
        if problems:
            raise ConfigError(listing(problems))


@dataclass(frozen=True)
class Match:
    """The pairs of all layers, and what is known of the targets, as numpy arrays on the CPU.

    Pairs are sorted by layer; within one by target, those of one to many by (query, target).

    Attributes:
        layer, batch, query, target: i64 [P]; `target` counts the packed targets.
        labels: bool [P], False if a later pair of the same query decides on its score's label.
        sizes: pairs of every layer, K numbers.
        counts: i64 [B], targets of every phrase.
        present: bool [B], whether a phrase has a target with an area.
        has_mask: bool [N].
    """

    layer: np.ndarray
    batch: np.ndarray
    query: np.ndarray
    target: np.ndarray
    labels: np.ndarray
    sizes: list[int]
    counts: np.ndarray
    present: np.ndarray
    has_mask: np.ndarray

    def with_mask(self, layer: int) -> np.ndarray:
        """Numbers of the pairs of a layer whose target's mask is known."""
        return np.flatnonzero((self.layer == layer) & self.has_mask[self.target])


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    settings: MatchSettings,
    *,
    one_to_many_last: bool,
) -> Match:
    """Match the queries of all layers with the targets; the device is waited for once.

    Predictions that are not finite are matched as the worst of all, without complaint.

    Args:
        logits: f32 [K, B, Q].
        boxes: f32 [K, B, Q, 4], cxcywh in 0..1.
        targets: boxes and counts are read.
        settings: constants.
        one_to_many_last: match the last layer one to many, not one to one.

    Raises:
        DataError: target boxes that are no shares of the image.
        ValueError: counts that do not fit the boxes.
    """
    layers, batch_size, _ = logits.shape
    one_to_one = layers - one_to_many_last
    with torch.no_grad():
        owner = owners(targets)
        pairwise = [
            costs(logits[:one_to_one], boxes[:one_to_one], targets.boxes, owner, settings),
            assigned(logits[one_to_one:], boxes[one_to_one:], targets.boxes, owner, settings),
        ]  # together f32 [K, N, Q]
        values = torch.cat(pairwise).cpu().numpy()
    counts, present, has_mask = read_targets(targets, batch_size)
    found = [hungarian(k, values[k], counts) for k in range(one_to_one)]
    found += [several(k, values[k] > 0, counts) for k in range(one_to_one, layers)]
    layer, batch, query, target, labels = np.concatenate(found, axis=1)
    sizes = [pairs.shape[1] for pairs in found]
    return Match(layer, batch, query, target, labels.astype(bool), sizes, counts, present, has_mask)


# -- overlaps and costs, on the device -------------------------------------------------------------


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes cxcywh [..., 4] that broadcast.

    Both are finite for boxes without area too, and so are their gradients.
    """
    ax0, ay0, ax1, ay1 = corners(a).unbind(-1)
    bx0, by0, bx1, by1 = corners(b).unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    inter = width * height
    union = ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter).clamp(min=TINY_AREA)
    hull_width = torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)
    hull_height = torch.maximum(ay1, by1) - torch.minimum(ay0, by0)
    hull = (hull_width * hull_height).clamp(min=TINY_AREA)
    iou = inter / union
    return iou, iou - (hull - union) / hull


def corners(boxes: Tensor) -> Tensor:
    """Boxes cxcywh [..., 4] as xyxy."""
    center, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat([center - half, center + half], -1)


def owners(targets: Targets) -> Tensor:
    """The phrase of every packed target, i64 [N]; in bounds even if the counts are wrong."""
    place = torch.arange(len(targets.boxes), device=targets.boxes.device)
    ends = targets.counts.to(place).cumsum(0)
    return torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)


def costs(
    logits: Tensor, boxes: Tensor, target_boxes: Tensor, owner: Tensor, settings: MatchSettings
) -> Tensor:
    """One-to-one cost f32 [K, N, Q] of each target with the queries of its phrase."""
    p = torch.sigmoid(logits)
    positive = -CLASS_ALPHA * (1 - p).square() * F.logsigmoid(logits)
    negative = -(1 - CLASS_ALPHA) * p.square() * F.logsigmoid(-logits)
    score_cost = positive - negative  # C, [K, B, Q]
    parts = []
    for rows, t in _parts(owner, target_boxes):
        b = boxes[:, rows]  # [K, n, Q, 4]
        _, giou = overlaps(b, t)
        parts.append(
            settings.cost_bbox * (b - t).abs().sum(-1)
            + settings.cost_class * score_cost[:, rows]
            - settings.cost_giou * giou
        )
    return torch.cat(parts, 1)


def assigned(
    logits: Tensor, boxes: Tensor, target_boxes: Tensor, owner: Tensor, settings: MatchSettings
) -> Tensor:
    """Whether a query answers for a target, one to many: f32 [K, N, Q] of 0 and 1."""
    p, parts = torch.sigmoid(logits), []
    for rows, t in _parts(owner, target_boxes):
        iou, _ = overlaps(boxes[:, rows], t)
        score = settings.o2m_alpha * p[:, rows] + (1 - settings.o2m_alpha) * iou  # S, [K, n, Q]
        bound = upper_quantile(score, settings.o2m_topk).clamp(min=settings.o2m_threshold)
        parts.append((score > bound).float())
    return torch.cat(parts, 1)


def upper_quantile(values: Tensor, k: int) -> Tensor:
    """The (1 - k/Q) quantile of [..., Q] along the last axis, [..., 1], linearly interpolated.

    At rank (1 - k/Q)(Q - 1) = (Q - 1 - k) + k/Q it lies between the largest values number k + 1 and
    k. Without more than k values all are above it: -inf.
    """
    queries = values.shape[-1]
    if queries <= k:
        return values.new_full((*values.shape[:-1], 1), float("-inf"))
    best = values.topk(k + 1, dim=-1).values
    return torch.lerp(best[..., k:], best[..., k - 1 : k], k / queries)


def _parts(owner: Tensor, target_boxes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Owners [n] and boxes f32 [n, 1, 4] of the targets, some at a time."""
    boxes = target_boxes.float()[:, None]
    return list(zip(owner.split(TARGETS_AT_ONCE), boxes.split(TARGETS_AT_ONCE), strict=True))


# -- assignment, on the CPU ------------------------------------------------------------------------


def hungarian(layer: int, cost: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pairs with the least sum of costs, i64 [5, P]: layer, batch, query, target, label.

    Args:
        layer: is written into the pairs.
        cost: f32 [N, Q].
        counts: [B]; of more targets than queries only Q are matched.
    """
    from scipy.optimize import linear_sum_assignment

    cost = np.nan_to_num(cost, nan=OUT_OF_REACH, posinf=OUT_OF_REACH, neginf=OUT_OF_REACH)
    found, start = [np.zeros((5, 0), np.int64)], 0
    for batch, count in enumerate(counts.tolist()):
        if count:
            target, query = linear_sum_assignment(cost[start : start + count])
            same = np.ones_like(query)
            found.append(np.stack([layer * same, batch * same, query, start + target, same]))
            start += count
    return np.concatenate(found, axis=1)


def several(layer: int, chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The chosen pairs, bool [N, Q], in the order of (batch, query, target), as `hungarian`."""
    target, query = np.nonzero(chosen)
    batch = np.repeat(np.arange(len(counts)), counts)[target]
    order = np.lexsort((target, query, batch))
    batch, query, target = batch[order], query[order], target[order]
    last = np.ones_like(query)
    last[:-1] = (query[1:] != query[:-1]) | (batch[1:] != batch[:-1])
    return np.stack([np.full_like(query, layer), batch, query, target, last])


def read_targets(targets: Targets, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts i64 [B], presence bool [B] and known masks bool [N] of checked targets.

    Raises:
        DataError: boxes that are no shares of the image.
        ValueError: fields whose lengths do not fit each other.
    """
    boxes = targets.boxes.detach().float().cpu().numpy()
    counts = targets.counts.cpu().numpy().astype(np.int64)
    has_mask = np.ones(len(boxes), bool)
    if targets.has_mask is not None:
        has_mask = targets.has_mask.cpu().numpy() > 0
    if len(counts) != batch or counts.min(initial=0) < 0 or counts.sum() != len(boxes):
        raise ValueError(
            f"the targets' counts {counts.tolist()} do not divide {len(boxes)} boxes among "
            f"{batch} phrases"
        )
    if len(has_mask) != len(boxes):
        raise ValueError(f"has_mask has {len(has_mask)} entries for {len(boxes)} targets")
    check_boxes(boxes, counts)
    owner = np.repeat(np.arange(batch), counts)
    present = np.zeros(batch, bool)
    present[owner[(boxes[:, 2:] > 0).all(1)]] = True
    return counts, present, has_mask


def check_boxes(boxes: np.ndarray, counts: np.ndarray) -> None:
    """Refuse target boxes [N, 4] that are not cxcywh as shares of the image.

    Boxes in pixels, or xyxy taken for cxcywh, train without complaint and to no avail: the loss is
    in the tens of thousands, or merely never falls.

    Raises:
        DataError: the first such box and the number of them.
    """
    low = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes], 1).min(1, initial=0.0)
    high = np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes], 1).max(1, initial=0.0)
    wrong = np.flatnonzero(~((low >= -BOX_ROUNDING) & (high <= 1 + BOX_ROUNDING)))
    if not len(wrong):
        return
    first, worst = int(wrong[0]), boxes[wrong[0]]
    phrase = int(np.searchsorted(np.cumsum(counts), first, side="right"))
    if not np.isfinite(worst).all():
        cause = "it holds NaN or infinity"
    elif np.abs(worst).max() > 2:
        cause = "these look like pixels: divide x and w by the image's width, y and h by its height"
    else:
        cause = "it sticks out of the image: clip it there, and see that it is not xyxy"
    values = ", ".join(f"{value:g}" for value in worst)
    raise DataError(
        f"{len(wrong)} of {len(boxes)} target boxes are not (cx, cy, w, h) as shares of the "
        f"image's sides, 0 to 1; the first: target {first}, of phrase {phrase} of the batch, is "
        f"({values}); {cause}"
    )
