"""How deep a view sees into a scene of Gaussians: the depth at which half of the light is absorbed.

    covariance   S = M M^T with M = rotation diag(scale),  seen as  A S A^T with the rows
                 A = (du/dX, dv/dX, dx_3/dX)
    alpha        a = o c exp(-d^T C^-1 d / 2)  with C the part for (u, v) plus LOW_PASS, its
                 compensation c = sqrt(det before / det after), and d from the centre to the pixel
    depth        x_3 / (1 - S_zu C^-1 d / x_3): the Gaussian's own plane, in which 1 / depth is
                 linear (a wall is no staircase of discs)
    light        T = prod (1 - a), nearest first;  the depth of a pixel is that of the first
                 Gaussian behind which T <= 1/2

as in Kerbl et al. 2023, "3D Gaussian Splatting"; the compensation is that of Yu et al. 2024,
"Mip-Splatting", which a picture of few pixels needs. Memory is bounded: Gaussians are drawn in
blocks, nearest first, and pixels that are opaque already are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scenesplat_lora.posed.pinhole import STRAIGHT, View
from scenesplat_lora.scenes.scene import Scene

LOW_PASS = 0.3  # pixels^2; a Gaussian is at least about a pixel wide
LEAST_ALPHA = 0.02  # what absorbs less of a pixel is left out
MOST_ALPHA = 0.99
NEAR = 0.2  # metres before the camera, where a view begins, as in 3DGS
HALF = math.log(0.5)
SIDEWAYS = 1.3  # Gaussians farther outside of the picture are linearised at its border, as in 3DGS
FARTHER = 3.0  # a pixel's depth is at most so many times that of the Gaussian's centre, or its part
FRAGMENTS = 2_000_000  # pixels of Gaussians at once: about 300 MB


@dataclass(frozen=True)
class Splats:
    """A scene on a device.

    Attributes:
        coord: float32 [N, 3]. shape: M, float32 [N, 3, 3]. opacity: float32 [N].
    """

    coord: Tensor
    shape: Tensor
    opacity: Tensor


@dataclass(frozen=True)
class Depth:
    """What a view sees.

    Attributes:
        depth: float32 [h, w], metres along the viewing axis; infinite where nothing is opaque.
        front: int64 [h, w], the Gaussian there; -1: none.
        per_pixel: pixels of the image per pixel of `depth`.
    """

    depth: Tensor
    front: Tensor
    per_pixel: float


def splats(scene: Scene, device: torch.device | str = "cpu") -> Splats:
    """The Gaussians of a scene as `read_scene` gives it."""
    w, x, y, z = torch.from_numpy(np.ascontiguousarray(scene["quat"])).to(device).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    turn = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    coord, scale, opacity = (
        torch.from_numpy(np.ascontiguousarray(scene[name])).to(device)
        for name in ("coord", "scale", "opacity")
    )
    return Splats(coord.float(), turn * scale[:, None, :], opacity[:, 0].float())


def project(coord: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Points [N, 3] in the camera's frame [N, 3], and (u, v) [N, 2] in pixels, without a lens."""
    turn, shift = (
        torch.as_tensor(values, dtype=coord.dtype, device=coord.device)
        for values in (view.rotation, view.translation)
    )
    seen = coord @ turn.T + shift
    assert view.centre is not None
    focal, centre = (
        torch.tensor(v, dtype=coord.dtype, device=coord.device) for v in (view.focal, view.centre)
    )
    return seen, seen[:, :2] / seen[:, 2:].clamp_min(1e-6) * focal + centre


def bent(pixel: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Where the lens has what a pinhole has at (u, v) [N, 2], and whether it shows it, bool [N]."""
    assert view.centre is not None
    k1, k2, p1, p2, k3 = view.bend
    focal, centre = (
        torch.tensor(pair, dtype=pixel.dtype, device=pixel.device)
        for pair in (view.focal, view.centre)
    )
    a, b = ((pixel - centre) / focal).unbind(1)
    s = a * a + b * b
    g = 1 + s * (k1 + s * (k2 + s * k3))
    ab = torch.stack(
        [
            a * g + 2 * p1 * a * b + p2 * (s + 2 * a * a),
            b * g + p1 * (s + 2 * b * b) + 2 * p2 * a * b,
        ],
        dim=1,
    )
    return ab * focal + centre, s < view.reach()


def depth_map(scene: Splats, view: View, side: int) -> Depth:
    """How deep a view sees, in a picture whose longer side has at most `side` pixels.

    The picture is that of a pinhole with the view's focal lengths and size.
    """
    assert view.size is not None
    per_pixel = max(max(view.size) / side, 1.0)
    height, width = (math.ceil(length / per_pixel) for length in view.size)
    drawn = _footprints(scene, view, per_pixel, (height, width))
    light = torch.zeros(height * width, dtype=torch.float64, device=scene.coord.device)  # log T
    depth = torch.full((height * width,), math.inf, device=scene.coord.device)
    front = torch.full((height * width,), -1, dtype=torch.long, device=scene.coord.device)
    for block in drawn.blocks():
        _absorb(*drawn.fragments(block, light, width), light, depth, front)
        if bool((light <= HALF).all()):
            break
    return Depth(depth.reshape(height, width), front.reshape(height, width), per_pixel)


def visible(scene: Splats, view: View, seen: Depth, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which Gaussians a view sees, and in which pixel of its image.

    Those whose centre is inside the image, in front of the camera, and not behind the scene's depth
    by more than `tolerance` metres plus one pixel of the map of depths. With a lens: inside the
    image of the pinhole too.

    Returns:
        rows int64 [n], ascending, and (row, column) of the image int64 [n, 2].
    """
    assert view.size is not None
    points, pixel = project(scene.coord, view)
    height, width = view.size
    border = torch.tensor([width, height], device=pixel.device)
    near = points[:, 2] > NEAR
    rows = (near & ((pixel >= 0) & (pixel < border)).all(dim=1)).nonzero().flatten()
    if view.bend != STRAIGHT:
        shown, seen_by_lens = bent(pixel[rows], view)
        kept = seen_by_lens & ((shown >= 0) & (shown < border)).all(dim=1)
        rows, shown = rows[kept], shown[kept]
    else:
        shown = pixel[rows]
    depth = points[rows, 2]
    column, row = (pixel[rows] / seen.per_pixel).long().unbind(1)
    slack = tolerance + depth * (seen.per_pixel / min(view.focal))
    chosen = depth <= seen.depth[row, column] + slack
    return rows[chosen], shown[chosen].flip(1).long()


# -- drawing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Footprints:
    """Gaussians that a picture shows, nearest first.

    Attributes:
        number: int64 [n], rows of the scene. centre: float32 [n, 2], pixels (x, y).
        depth: float32 [n]. slope: float32 [n, 2], metres per pixel.
        precision: float32 [n, 3], C^-1 as xx, xy, yy. alpha: float32 [n], o c.
        corner: int64 [n, 2], first pixel. extent: int64 [n, 2], pixels across and down.
    """

    number: Tensor
    centre: Tensor
    depth: Tensor
    slope: Tensor
    precision: Tensor
    alpha: Tensor
    corner: Tensor
    extent: Tensor

    def blocks(self) -> Iterator[slice]:
        """Ranges of Gaussians with at most about FRAGMENTS pixels."""
        ends = self.extent.prod(dim=1).cumsum(0)
        begin = 0
        while begin < len(ends):
            drawn = int(ends[begin - 1]) if begin else 0
            end = int(torch.searchsorted(ends, drawn + FRAGMENTS, right=True))
            end = max(end, begin + 1)
            yield slice(begin, end)
            begin = end

    def fragments(
        self, block: slice, light: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels that a block's Gaussians cover, but for those that are opaque already.

        Returns:
            pixel int64 [f] ascending, in each pixel nearest first; log(1 - a) float64 [f]; depth
            float32 [f]; number of the Gaussian int64 [f].
        """
        extent = self.extent[block]
        count = extent.prod(dim=1)
        own = torch.repeat_interleave(count)  # which Gaussian of the block
        first = (count.cumsum(0) - count)[own]
        place = torch.arange(len(own), device=own.device) - first
        across = extent[own, 0]
        xy = self.corner[block][own] + torch.stack([place % across, place // across], dim=1)
        open_ = light[xy[:, 1] * width + xy[:, 0]] > HALF
        own, xy = own[open_], xy[open_]
        offset = xy + 0.5 - self.centre[block][own]
        x, y = offset.unbind(1)
        xx, cross, yy = self.precision[block][own].unbind(1)
        power = -0.5 * (xx * x * x + yy * y * y) - cross * x * y
        alpha = (self.alpha[block][own] * power.exp()).clamp_max(MOST_ALPHA)
        kept = alpha >= LEAST_ALPHA
        own, xy, alpha, offset = own[kept], xy[kept], alpha[kept], offset[kept]
        centre = self.depth[block][own]
        nearer = (self.slope[block][own] * offset).sum(dim=1) / centre
        depth = centre / (1 - nearer).clamp(1 / FARTHER, FARTHER)
        pixel, order = torch.sort(xy[:, 1] * width + xy[:, 0], stable=True)
        lost = torch.log1p(-alpha.double())
        return pixel, lost[order], depth[order], self.number[block][own[order]]


def _absorb(
    pixel: Tensor, lost: Tensor, near: Tensor, number: Tensor, light: Tensor, depth: Tensor,
    front: Tensor,
) -> None:  # fmt: skip
    """Let fragments absorb light; where it falls to a half, depth and front are found."""
    if not len(pixel):
        return
    starts = torch.ones_like(pixel, dtype=torch.bool)
    starts[1:] = pixel[1:] != pixel[:-1]
    ends = starts.roll(-1)
    total = lost.cumsum(0)
    before = (total - lost)[starts][starts.cumsum(0) - 1]
    left = light[pixel] + total - before
    dark = left <= HALF
    at, first = pixel[dark], torch.ones_like(pixel[dark], dtype=torch.bool)
    first[1:] = at[1:] != at[:-1]
    depth[at[first]] = near[dark][first]
    front[at[first]] = number[dark][first]
    light[pixel[ends]] = left[ends]


def _footprints(scene: Splats, view: View, per_pixel: float, size: tuple[int, int]) -> _Footprints:
    """Where the Gaussians of a scene lie in a picture of `size` (height, width)."""
    points, pixel = project(scene.coord, view)
    height, width = size
    number = _may_show(scene, points, pixel, view, per_pixel).nonzero().flatten()
    number = number[torch.argsort(points[number, 2], stable=True)]
    points, centre, opacity = points[number], pixel[number] / per_pixel, scene.opacity[number]
    seen = _seen_covariance(scene.shape[number], points, view, per_pixel, size)
    flat = seen[:, :2, :2].double()  # discs seen from the edge: differences of large numbers
    cross, before = flat[:, 0, 1], torch.linalg.det(flat).clamp_min(0)
    xx, yy = flat[:, 0, 0] + LOW_PASS, flat[:, 1, 1] + LOW_PASS
    after = xx * yy - cross**2
    precision = (torch.stack([yy, -cross, xx], dim=1) / after[:, None]).float()
    alpha = opacity * (before / after).sqrt().float()
    slope = torch.stack(
        [
            seen[:, 2, 0] * precision[:, 0] + seen[:, 2, 1] * precision[:, 1],
            seen[:, 2, 0] * precision[:, 1] + seen[:, 2, 1] * precision[:, 2],
        ],
        dim=1,
    )
    reach = (2 * (alpha / LEAST_ALPHA).clamp_min(1).log()).sqrt()
    half = reach[:, None] * torch.stack([xx, yy], dim=1).sqrt().float()
    most = torch.tensor([width, height], device=centre.device)
    low = (centre - half).floor().clamp_min(0).minimum(most.float()).long()
    high = ((centre + half).ceil().clamp_min(0)).minimum(most.float()).long()
    shown = (alpha > LEAST_ALPHA) & (high > low).all(dim=1)
    parts = (number, centre, points[:, 2], slope, precision, alpha, low, high - low)
    return _Footprints(*(part[shown] for part in parts))


def _may_show(scene: Splats, points: Tensor, pixel: Tensor, view: View, per_pixel: float) -> Tensor:
    """Gaussians that are in front and not surely outside of the image, bool [N].

    Args:
        pixel: (u, v) in pixels of the image, as `project` gives it with `points`.
    """
    assert view.size is not None
    size = torch.tensor([view.size[1], view.size[0]], device=pixel.device)
    largest = scene.shape.norm(dim=1).amax(dim=1)  # the columns of M are as long as the scales
    ratio = SIDEWAYS * max(view.size) / min(view.focal)
    spread = largest * math.hypot(1, ratio) * max(view.focal) / points[:, 2].clamp_min(NEAR)
    sigmas = math.sqrt(2 * math.log(1 / LEAST_ALPHA))
    margin = sigmas * (spread + math.sqrt(LOW_PASS) * per_pixel)[:, None]
    inside = ((pixel > -margin) & (pixel < size + margin)).all(dim=1)
    return inside & (points[:, 2] > NEAR) & (scene.opacity > LEAST_ALPHA)


def _seen_covariance(
    shape: Tensor, points: Tensor, view: View, per_pixel: float, size: tuple[int, int]
) -> Tensor:
    """Covariance of (u, v, x_3) of Gaussians, in pixels of the picture and metres: [n, 3, 3]."""
    assert view.centre is not None
    depth = points[:, 2]
    rows = torch.zeros_like(shape)
    for axis, length in ((0, size[1]), (1, size[0])):
        focal, centre = view.focal[axis] / per_pixel, view.centre[axis] / per_pixel
        low, high = -SIDEWAYS * centre / focal, SIDEWAYS * (length - centre) / focal
        ratio = (points[:, axis] / depth).clamp(min(low, 0), max(high, 0))
        rows[:, axis, axis] = focal / depth
        rows[:, axis, 2] = -focal * ratio / depth
    rows[:, 2, 2] = 1
    turn = torch.as_tensor(view.rotation, dtype=shape.dtype, device=shape.device)
    seen = rows @ (turn @ shape)
    return seen @ seen.transpose(1, 2)
