"""RoIAlign: features of boxes at a fixed size, in plain torch and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def roi_align(features: Tensor, boxes: Tensor, image_ids: Tensor, bins: int = 7) -> Tensor:
    """Mean of bilinear samples in `bins` x `bins` parts of each box (Mask R-CNN, section 3).

    A bin of the box is sampled at n x n' points, n = ceil(side / bins) along each axis. Both the
    bilinear weight and the mean are products of one factor per axis, so that

        out[m, c] = Y_m F[c] X_m^T ,   Y_m (bins, H), X_m (bins, W).

    The rules are those of torchvision's compiled operator at spatial scale 1, `aligned=False`: no
    half-pixel shift, sides of at least 1, samples more than one cell outside count 0, samples less
    far outside are moved to the border.

    Args:
        features: [I, C, H, W].
        boxes: [M, 4] corners (x0, y0, x1, y1) in cells of the map; no gradient flows into them.
        image_ids: i64 [M], the row of `features` in which each box lies.

    Returns:
        [M, C, bins, bins] in the dtype of `features`, computed in float32 at least.
    """
    height, width = features.shape[-2:]
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    x0, y0, x1, y1 = boxes.detach().float().unbind(-1)
    rows = _weights(y0, y1, height, bins).to(wide.dtype)
    columns = _weights(x0, x1, width, bins).to(wide.dtype)
    pooled = wide.new_zeros(len(boxes), features.shape[1], bins, bins)
    with torch.autocast(features.device.type, enabled=False):
        for image, cells in enumerate(wide):  # a copy of the map for each box would be large
            here = (image_ids == image).nonzero()[:, 0]
            if len(here):
                sums = torch.einsum("mph,chw,mqw->mcpq", rows[here], cells, columns[here])
                pooled = pooled.index_copy(0, here, sums)
    return pooled.to(features.dtype)


def _weights(start: Tensor, end: Tensor, cells: int, bins: int) -> Tensor:
    """Share of each cell in each bin along one axis: f32 [M, bins, cells]."""
    side = (end - start).clamp(min=1)
    count = (side / bins).ceil()  # samples per bin, [M]
    most = int(count.max()) if len(count) else 1
    sample = torch.arange(most, device=side.device)
    step = (sample + 0.5) / count[:, None]  # [M, most], in bins
    part = torch.arange(bins, device=side.device)[:, None]
    at = start[:, None, None] + (part + step[:, None]) * (side / bins)[:, None, None]
    counts = (sample < count[:, None])[:, None] & (at >= -1) & (at <= cells)
    cell = torch.arange(cells, device=side.device)
    hat = (1 - (at.clamp(0, cells - 1)[..., None] - cell).abs()).clamp(min=0)
    return (hat * counts[..., None]).sum(2) / count[:, None, None]
