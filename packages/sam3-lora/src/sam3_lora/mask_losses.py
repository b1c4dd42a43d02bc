"""Mask logits against target masks at full size, without keeping full-size tensors.

For logits scaled up to the size of the mask m, s = sigmoid of them, one value per pair:

    focal = mean over pixels of a_t (1 - p_t)^2 BCE,   p_t = s m + (1 - s)(1 - m),
            a_t = a m + (1 - a)(1 - m)
    dice  = 1 - (2 sum(s m) + 1) / (sum s + sum m + 1)

A pair at 1008 x 1008 takes about ten float tensors of a million pixels, and a batch has hundreds
of pairs. So the pairs are taken a few at a time, and the backward pass computes each lot again: the
values and gradients are those of all at once.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OVERSAMPLE, IMPORTANT = 3, 0.75  # of PointRend: candidates per point, share of uncertain points


def compare(
    logits: Tensor,
    masks: Tensor,
    target: Tensor,
    *,
    alpha: float,
    points: int = 0,
    pixels: int = 2**23,
) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss, f32 [P] each, of every pair of logits and mask.

    Args:
        logits: [P, h, w], of any floating dtype.
        masks: [N, H, W], bool or uint8; more than 0 is foreground.
        target: i64 [P], the mask of each pair.
        alpha: weight a of foreground pixels.
        points: compare at so many points of each pair, see `at_points`; 0: at all pixels.
        pixels: full-size pixels at once.
    """
    if not len(target):
        empty = logits.float().sum((1, 2))  # [0], in the graph: the heads get zero gradients
        return empty, empty
    lot = max(1, pixels // (masks.shape[1] * masks.shape[2]))
    again = partial(checkpoint, at_pixels, use_reentrant=False, preserve_rng_state=False)
    values = []
    for some, rows in zip(logits.split(lot), target.split(lot), strict=True):
        if points:
            values.append(at_points(some, masks[rows], alpha, points))
        else:
            values.append(again(some, masks, rows, alpha))
    focal, dice = (torch.cat(column) for column in zip(*values, strict=True))
    return focal, dice


def at_pixels(logits: Tensor, masks: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """As `compare`, of all pairs at once: the plain form."""
    size = (masks.shape[1], masks.shape[2])
    x = logits.float()[:, None]
    if logits.shape[1:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    m = (masks[target] > 0).float()
    return focal_and_dice(x.flatten(1), m.flatten(1), alpha)


def focal_and_dice(x: Tensor, m: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss [P] of logits x and targets m in 0..1, f32 [P, pixels] each."""
    s = torch.sigmoid(x)
    bce = F.binary_cross_entropy_with_logits(x, m, reduction="none")
    p_t = s * m + (1 - s) * (1 - m)
    a_t = alpha * m + (1 - alpha) * (1 - m)
    focal = (a_t * (1 - p_t).square() * bce).mean(1)
    dice = 1 - (2 * (s * m).sum(1) + 1) / (s.sum(1) + m.sum(1) + 1)
    return focal, dice


# -- points ----------------------------------------------------------------------------------------


def at_points(logits: Tensor, masks: Tensor, alpha: float, points: int) -> tuple[Tensor, Tensor]:
    """Both losses at points drawn anew each time, most of them where the logits are uncertain.

    PointRend (Kirillov et al. 2020), as in Mask2Former: cheaper than all pixels, but another
    objective, which looks at the objects' borders.

    Args:
        logits: [P, h, w].
        masks: [P, H, W], bool or uint8, one for each of the logits.
        alpha: weight of foreground points.
        points: per pair.
    """
    xy = uncertain_points(logits.detach().float(), points)
    x = sample(logits.float(), xy)
    with torch.no_grad():
        m = sample((masks > 0).float(), xy)
    return focal_and_dice(x, m, alpha)


def uncertain_points(logits: Tensor, points: int) -> Tensor:
    """Points f32 [P, points, 2] as (x, y) in 0..1 where logits [P, h, w] are near 0, and others."""
    count = len(logits)
    candidates = torch.rand((count, OVERSAMPLE * points, 2), device=logits.device)
    important = int(IMPORTANT * points)
    nearest = sample(logits, candidates).abs().topk(important, dim=1, largest=False).indices
    chosen = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    others = torch.rand((count, points - important, 2), device=logits.device)
    return torch.cat([chosen, others], 1)


def sample(values: Tensor, xy: Tensor) -> Tensor:
    """Bilinear samples [P, points] of f32 [P, h, w] at (x, y) in 0..1 of the image's sides.

    Outside of the outer pixels' centres their values go on, as in scaling up.
    """
    grid = (2 * xy - 1)[:, None]  # [P, 1, points, 2]
    found = F.grid_sample(values[:, None], grid, padding_mode="border", align_corners=False)
    return found[:, 0, 0]
