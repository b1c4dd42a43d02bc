"""Which points of a surface become tokens: a random draw, thinned by farthest point sampling.

Eldar et al., "The farthest point strategy for progressive image sampling", and Qi et al.,
"PointNet++", section 3.2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OVERSAMPLING = 4  # points drawn for each one that is kept, as the official encoder


def draw_indices(num_points: int, count: int, seed: int | None) -> Tensor:
    """Draw `count` of `num_points` indices, int64; again and again the same ones only if too few.

    numpy's generator and not torch's: the official encoder's, so the same seed gives its points.
    `seed=None` draws others each time.
    """
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.choice(num_points, count, replace=count > num_points))


def farthest_points(xyz: Tensor, count: int) -> Tensor:
    """Choose `count` points of each row, each the farthest one from those before it.

        i_0 = 0,    i_k = argmax_j min_{l<k} |p_j - p_{i_l}|²

    The first maximum wins; a row with fewer than `count` different points repeats its first one.

    Args:
        xyz: [B, M, 3]; distances are taken in float32, as the official encoder takes them.
        count: at most M.

    Returns:
        int64 [B, count] indices into M, in the order of choice.
    """
    # One plane for each axis: contiguous passes, and no [B, M, 3] temporary.
    planes = xyz.float().permute(2, 0, 1).contiguous()  # [3, B, M]
    chosen = torch.zeros(xyz.shape[0], count, dtype=torch.int64, device=xyz.device)
    nearest = torch.full_like(planes[0], torch.inf)  # [B, M] squared distance to the chosen ones
    distance, square = torch.empty_like(nearest), torch.empty_like(nearest)
    for k in range(1, count):
        latest = chosen[:, k - 1 : k]  # [B, 1]
        distance.zero_()
        for plane in planes:
            torch.sub(plane, plane.gather(1, latest), out=square)
            distance += square.mul_(square)
        torch.minimum(nearest, distance, out=nearest)
        chosen[:, k] = nearest.argmax(dim=1)
    return chosen


def choose_query_points(surface: Tensor, num_tokens: int, seed: int | None) -> Tensor:
    """[B, M, C] surface points to the [B, num_tokens, C] that the encoder's tokens start from.

    One draw for the whole batch, as the official encoder: row r of a batch gets the points that it
    gets alone.
    """
    with torch.no_grad():
        drawn = draw_indices(surface.shape[1], OVERSAMPLING * num_tokens, seed).to(surface.device)
        candidates = surface[:, drawn]
        kept = farthest_points(candidates[..., :3], num_tokens)
    return candidates.gather(1, kept[..., None].expand(-1, -1, surface.shape[2]))
