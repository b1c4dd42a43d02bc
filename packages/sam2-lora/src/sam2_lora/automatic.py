"""Segment everything: the good masks of a grid of clicks; large pictures in overlapping tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_core.pictures.masks import trim
from sam2_lora.image import upscale_logits
from sam2_lora.model import Features, decode, encode_pictures, image_size

if TYPE_CHECKING:
    from transformers import Sam2Model

STABILITY_OFFSET = 1.0  # logits; the mask is compared at thresholds +1 and -1, as the official code
UPSCALED_VALUES = 2**26  # float32 logits held at original resolution at a time: 256 MB


@dataclass(frozen=True)
class Grid:
    """What the automatic grid tries and keeps. Thresholds are the official generator's."""

    points_per_side: int = 32  # about this number squared in all, evenly spread over the picture
    points_per_batch: int = 64
    min_score: float = 0.8  # predicted IoU
    min_stability: float = 0.95  # IoU of the masks at logit > 1 and logit > -1
    min_object_score: float = 0.0  # logit: below, the model says that there is no object
    max_box_iou: float = 0.7  # non-maximum suppression
    max_overlap: float = 0.5  # share of a mask that better masks may cover already
    min_area: int = 16  # original pixels
    max_area: float = 0.95  # share of the picture: more is the background
    tile_overlap: float = 0.25  # share of a tile's side
    tile_agreement: float = (
        0.5  # IoU inside the common strip that makes two tiles' masks one object
    )


class Instance(NamedTuple):
    """One found object, its mask cut to its box."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1: original pixels, x1 and y1 exclusive
    crop: NDArray[np.bool_]  # [y1 - y0, x1 - x0]
    score: float  # predicted IoU, 0..1
    stability: float = math.nan  # 0..1; only the grid measures it

    def mask(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """The mask [H, W] in a picture of `size` (H, W)."""
        full = np.zeros(size, dtype=bool)
        x0, y0, x1, y1 = self.box
        full[y0:y1, x0:x1] = self.crop
        return full


class _Tile(NamedTuple):
    x0: int
    y0: int
    x1: int
    y1: int


def segment(
    model: Sam2Model,
    rgb: NDArray[np.uint8],
    grid: Grid | None = None,
    tile: int = 0,
) -> list[Instance]:
    """Find objects without prompts.

    Args:
        model: the network, in eval mode.
        rgb: uint8 [H, W, 3].
        grid: density and filters; None is the default.
        tile: pictures larger than this many pixels are cut into overlapping squares of this side;
            0 never cuts.

    Returns:
        Instances in the picture's pixels, best score first.
    """
    grid = grid or Grid()
    found = []
    tiles = list(_tiles((rgb.shape[0], rgb.shape[1]), tile, grid.tile_overlap))
    for part in tiles:
        view = np.ascontiguousarray(rgb[part.y0 : part.y1, part.x0 : part.x1])
        with torch.no_grad():
            features = encode_pictures(model, [view])
        found.append(segment_features(model, features, view.shape[:2], grid))
    merged = found[0] if len(tiles) == 1 else _join(tiles, found, grid.tile_agreement)
    return _drop_covered(merged, grid.max_overlap)


@torch.no_grad()
def segment_features(
    model: Sam2Model, features: Features, size: tuple[int, int], grid: Grid
) -> list[Instance]:
    """The grid's masks of one encoded picture of original `size` (H, W), best first.

    Score, stability and suppression are decided on the decoder's own small masks; only what is left
    is scaled up.
    """
    logits, scores, stability = _candidates(model, features, size, grid)
    boxes = mask_boxes(logits > 0)
    kept = suppress(boxes, scores, grid.max_box_iou)
    logits, scores, stability = logits[kept], scores[kept], stability[kept]
    found = []
    chunk = max(1, UPSCALED_VALUES // (size[0] * size[1]))
    for start in range(0, len(logits), chunk):
        part = slice(start, start + chunk)
        masks = upscale_logits(logits[part, None].float(), size)[:, 0] > 0
        numbers = zip(
            masks.cpu().numpy(), scores[part].tolist(), stability[part].tolist(), strict=True
        )
        for mask, score, stable in numbers:
            area = int(mask.sum())
            if grid.min_area <= area <= grid.max_area * mask.size:
                found.append(instance_of(mask, score, stable))
    return _drop_covered(found, grid.max_overlap)


def _candidates(
    model: Sam2Model, features: Features, size: tuple[int, int], grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """What passes the filters: small logits [n, h, w] in float16, scores [n], stability [n]."""
    points = grid_points(image_size(model), size, grid.points_per_side)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for clicks in points.to(features.image_embed.device).split(grid.points_per_batch):
        image = torch.zeros(len(clicks), dtype=torch.long, device=clicks.device)
        labels = torch.ones((len(clicks), 1), dtype=torch.long, device=clicks.device)
        decoded = decode(
            model, features, image, points=clicks[:, None], labels=labels, multimask=True
        )
        logits, scores = decoded.masks.float().flatten(0, 1), decoded.iou.float().flatten()
        stability = stability_score(logits)
        present = (decoded.object_score.float() > grid.min_object_score).expand(
            -1, decoded.masks.shape[1]
        )
        good = (scores >= grid.min_score) & (stability >= grid.min_stability) & present.flatten()
        kept.append((logits[good].half(), scores[good], stability[good]))
    with torch.autocast(clicks.device.type, enabled=False):  # it refuses to join half precision
        logits, scores, stability = (torch.cat(part) for part in zip(*kept, strict=True))
    return logits, scores, stability


def grid_points(model_size: tuple[int, int], size: tuple[int, int], per_side: int) -> Tensor:
    """About `per_side`^2 points (x, y) [n, 2] in model pixels, evenly spaced in the original."""
    aspect = (size[1] / size[0]) ** 0.5
    columns, rows = max(1, round(per_side * aspect)), max(1, round(per_side / aspect))
    x = (torch.arange(columns) + 0.5) / columns * model_size[1]
    y = (torch.arange(rows) + 0.5) / rows * model_size[0]
    return torch.cartesian_prod(y, x).flip(1)


def stability_score(logits: Tensor) -> Tensor:
    """IoU [n] of the masks [n, h, w] at a higher and a lower threshold; an empty mask has 0."""
    high = (logits > STABILITY_OFFSET).flatten(1).sum(1)
    low = (logits > -STABILITY_OFFSET).flatten(1).sum(1)
    return high / low.clamp(min=1)


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes [n, 4] (x0, y0, x1, y1; ends exclusive) of boolean masks [n, h, w]; 0 if empty."""
    ends = []
    for axis in (1, 2):  # any over rows gives the columns, and the other way round
        line = masks.any(axis)
        first = line.float().argmax(1)
        last = line.shape[1] - line.flip(1).float().argmax(1)
        ends.append((first, last))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], 1) * masks.flatten(1).any(1, keepdim=True)


def suppress(boxes: Tensor, scores: Tensor, max_iou: float) -> Tensor:
    """Greedy non-maximum suppression: indices of the boxes that stay, best first.

    A box goes when its IoU with a better one that stays is above `max_iou`.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].double()
    x0, y0, x1, y1 = boxes.unbind(1)
    area = (x1 - x0) * (y1 - y0)
    width = torch.minimum(x1[:, None], x1) - torch.maximum(x0[:, None], x0)
    height = torch.minimum(y1[:, None], y1) - torch.maximum(y0[:, None], y0)
    common = width.clamp(min=0) * height.clamp(min=0)
    clash = (common / (area[:, None] + area - common).clamp(min=1) > max_iou).cpu().numpy()
    stays = np.ones(len(boxes), dtype=bool)
    for index in range(len(boxes)):
        if stays[index]:
            stays[index + 1 :] &= ~clash[index, index + 1 :]
    return order[torch.from_numpy(stays).to(order.device)]


def instance_of(mask: NDArray[np.bool_], score: float, stability: float = math.nan) -> Instance:
    """Cut a mask [H, W] to its box; an empty mask has the empty box at the corner."""
    item = trim(mask, (0, 0), (mask.shape[0], mask.shape[1]), "")
    (x, y), (height, width) = item.origin, item.crop.shape
    return Instance((x, y, x + width, y + height), item.crop.copy(), score, stability)


def _drop_covered(instances: Sequence[Instance], max_overlap: float) -> list[Instance]:
    """Best first; an instance goes when better ones cover more than this share of its area."""
    kept: list[Instance] = []
    for instance in sorted(instances, key=lambda item: -item.score):
        seen = np.zeros_like(instance.crop)
        for other in kept:
            window = _common(instance.box, other.box)
            if window is not None:
                seen[_view(window, instance)] |= other.crop[_view(window, other)]
        if (seen & instance.crop).sum() <= max_overlap * instance.crop.sum():
            kept.append(instance)
    return kept


def _common(a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int, int] | None:
    """The rectangle that two rectangles share."""
    x0, y0, x1, y1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _view(window: tuple[int, int, int, int], instance: Instance) -> tuple[slice, slice]:
    """The part of an instance's crop that shows `window`."""
    x0, y0, x1, y1 = window
    left, top = instance.box[:2]
    return slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)


def _tiles(size: tuple[int, int], side: int, overlap: float) -> Iterator[_Tile]:
    """Squares that cover the picture, evenly placed, overlapping by at least the given share."""
    rows, columns = (_starts(length, side, overlap) for length in size)
    for y in rows:
        for x in columns:
            yield _Tile(x, y, min(x + side, size[1]) if side else size[1],
                        min(y + side, size[0]) if side else size[0])  # fmt: skip


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if not 0 < side < length:
        return [0]
    count = int(np.ceil((length - side) / (side * (1 - overlap)))) + 1
    return [round(index * (length - side) / (count - 1)) for index in range(count)]


def _join(
    tiles: Sequence[_Tile], found: Sequence[Sequence[Instance]], agreement: float
) -> list[Instance]:
    """Bring the tiles' instances into the picture's pixels; those that agree become one.

    Two masks of different tiles are one object when, inside the strip that both tiles saw, their
    IoU reaches `agreement`. So an object cut by a tile's edge is put together again, and one that
    lies wholly in the strip is counted once.
    """
    items = [
        (tile, _moved(instance, tile))
        for tile, own in zip(tiles, found, strict=True)
        for instance in own
    ]
    parent = list(range(len(items)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for i, (tile_i, one) in enumerate(items):
        for j, (tile_j, other) in enumerate(items[:i]):
            strip = _common(tile_i, tile_j) if tile_i != tile_j else None
            if strip is not None and _agreement(one, other, strip) >= agreement:
                parent[root(i)] = root(j)
    groups: dict[int, list[Instance]] = {}
    for index, (_, instance) in enumerate(items):
        groups.setdefault(root(index), []).append(instance)
    return [_union(group) for group in groups.values()]


def _moved(instance: Instance, tile: _Tile) -> Instance:
    x0, y0, x1, y1 = instance.box
    box = (x0 + tile.x0, y0 + tile.y0, x1 + tile.x0, y1 + tile.y0)
    return instance._replace(box=box)


def _agreement(a: Instance, b: Instance, strip: tuple[int, int, int, int]) -> float:
    """IoU of two masks inside a strip; 0 when either has nothing there."""
    window = _common(a.box, b.box)
    window = _common(window, strip) if window else None
    if window is None:
        return 0.0
    common = int((a.crop[_view(window, a)] & b.crop[_view(window, b)]).sum())
    inside = (_common(a.box, strip), _common(b.box, strip))
    areas = [
        int(item.crop[_view(part, item)].sum())
        for item, part in zip((a, b), inside, strict=True)
        if part
    ]
    return common / max(1, sum(areas) - common)


def _union(group: Sequence[Instance]) -> Instance:
    """One instance from several; score and stability of the largest part."""
    if len(group) == 1:
        return group[0]
    boxes = np.array([instance.box for instance in group])
    x0, y0, x1, y1 = (int(v) for v in (*boxes[:, :2].min(0), *boxes[:, 2:].max(0)))
    crop = np.zeros((y1 - y0, x1 - x0), dtype=bool)
    for instance in group:
        left, top, right, bottom = instance.box
        crop[top - y0 : bottom - y0, left - x0 : right - x0] |= instance.crop
    largest = max(group, key=lambda instance: int(instance.crop.sum()))
    return Instance((x0, y0, x1, y1), crop, largest.score, largest.stability)
