"""From the network's outputs to objects in the original image: scores, boxes, masks, COCO records.

    score = sigma(logit) * sigma(presence)

Masks are logits resized bilinearly to the original size and then compared with 0, as the official
code does; to resize probabilities and cut at 0.5 moves the outlines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora_core.errors import NumericError
from sam3_lora.outputs import Outputs

UPSCALED_VALUES = 2**26  # float32 logits held at original size at a time: 256 MB

Rle = dict[str, Any]  # COCO's run lengths: {"size": [H, W], "counts": str}


@dataclass
class Found:
    """The objects found for one query, in the order of the network's object queries.

    Attributes:
        scores: f32 [n], 0..1.
        boxes: f32 [n, 4], (x0, y0, x1, y1) in pixels of the original image; not cut at its border.
        size: (H, W) of the original image.
        mask_logits: [n, h, w] as the network gave them; None if masks are not computed. What
            becomes of them at the original size: `full_masks` and `encode_masks`.
    """

    scores: Tensor
    boxes: Tensor
    size: tuple[int, int]
    mask_logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, index: Tensor) -> Found:
        """The objects at these positions [k], or where a boolean [n] is true."""
        index = index.to(self.scores.device)
        masks = None if self.mask_logits is None else self.mask_logits[index]
        return Found(self.scores[index], self.boxes[index], self.size, masks)


# -- scores and boxes ----------------------------------------------------------------------------


def object_scores(outputs: Outputs) -> Tensor:
    """Scores f32 [B, Q] of the last layer.

    Raises:
        NumericError: NaN or infinite logits.
    """
    logits = outputs.one_to_one[-1].logits.float()
    presence = outputs.presence[-1].float()
    if not (torch.isfinite(logits).all() and torch.isfinite(presence).all()):
        raise NumericError(
            "the network's scores are NaN or infinite: check the adapter and the checkpoint, or "
            "compute in float32 (--precision fp32)"
        )
    return logits.sigmoid() * presence.sigmoid()[:, None]


def pixel_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [n, 4] from (cx, cy, w, h) in shares of the sides to (x0, y0, x1, y1) in pixels."""
    center, half = boxes.float().split(2, dim=-1)
    half = half / 2
    height, width = size
    scale = boxes.new_tensor([width, height, width, height], dtype=torch.float32)
    return torch.cat([center - half, center + half], -1) * scale


@torch.no_grad()
def detections(
    outputs: Outputs,
    sizes: Sequence[tuple[int, int]],
    threshold: float | None,
    limit: int | None = None,
) -> list[Found]:
    """The objects of every query.

    Args:
        outputs: of a forward pass with B queries.
        sizes: (H, W) of the original image of each query, B of them.
        threshold: keep scores above it; None keeps all, as an evaluation needs.
        limit: keep so many of the best per query.

    Raises:
        NumericError: NaN or infinite logits.
    """
    scores, last = object_scores(outputs), outputs.one_to_one[-1]
    found = []
    for query, (row, size) in enumerate(zip(scores, sizes, strict=True)):
        kept = torch.ones_like(row, dtype=torch.bool) if threshold is None else row > threshold
        masks = None if last.masks is None else last.masks[query]
        objects = Found(row, pixel_boxes(last.boxes[query], size), size, masks).select(kept)
        found.append(objects if limit is None else keep_best([objects], limit)[0])
    return found


def keep_best(found: Sequence[Found], limit: int, above: float = float("inf")) -> list[Found]:
    """The `limit` best objects over all queries of one image, and all with scores >= `above`.

    COCO's mAP takes the 100 best of an image over all its categories, cgF1 all from 0.5 on: what
    neither needs is dropped here, before masks are brought to the original size. Of equal scores
    the first ones stay. The order within a query is kept.
    """
    if not found:
        return []
    scores = torch.cat([objects.scores for objects in found])
    kept = scores >= above
    kept[scores.argsort(descending=True, stable=True)[:limit]] = True
    parts = kept.split([len(objects) for objects in found])
    return [objects.select(part) for objects, part in zip(found, parts, strict=True)]


# -- masks ---------------------------------------------------------------------------------------


def mask_chunks(logits: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Masks bool [k, H, W] of logits [n, h, w], as many at a time as `UPSCALED_VALUES` allows."""
    for chunk in logits.split(max(1, UPSCALED_VALUES // (size[0] * size[1]))):
        # float32: bfloat16 has 8 bits, and the outline would move.
        full = F.interpolate(
            chunk[:, None].float(), size=size, mode="bilinear", align_corners=False
        )
        yield full[:, 0] > 0


@torch.no_grad()
def full_masks(found: Found) -> Tensor:
    """Masks bool [n, H, W] at the original size, n = 0 included.

    Raises:
        ValueError: the masks were not computed.
    """
    logits = _logits(found)
    if not len(found):
        return torch.zeros((0, *found.size), dtype=torch.bool, device=logits.device)
    return torch.cat(list(mask_chunks(logits, found.size)))


@torch.no_grad()
def encode_masks(found: Found) -> list[Rle]:
    """COCO run lengths of the masks at the original size; `full_masks` without its memory.

    Raises:
        ValueError: the masks were not computed.
    """
    rles: list[Rle] = []
    for masks in mask_chunks(_logits(found), found.size) if len(found) else ():
        rles += encode(masks)
    return rles


def encode(masks: Tensor) -> list[Rle]:
    """COCO run lengths, with `counts` as text fit for JSON, of masks bool [n, H, W]."""
    from pycocotools import mask as coco_mask

    # pycocotools reads [H, W, n] down the columns, which is [n, W, H] along the rows.
    columns = masks.transpose(1, 2).contiguous().to("cpu", torch.uint8).numpy().transpose(2, 1, 0)
    return [
        {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        for rle in coco_mask.encode(columns)
    ]


def _logits(found: Found) -> Tensor:
    if found.mask_logits is None:
        raise ValueError("no masks were computed: call forward(..., masks=True)")
    return found.mask_logits


def mask_iou(rles: Sequence[Rle]) -> NDArray[np.float64]:
    """IoU [n, n] of every pair of masks, in pixels; 0 where both are empty."""
    from pycocotools import mask as coco_mask

    if not rles:
        return np.zeros((0, 0))
    return np.asarray(coco_mask.iou(list(rles), list(rles), [0] * len(rles)), dtype=np.float64)


def suppress(scores: Tensor, rles: Sequence[Rle], threshold: float) -> Tensor:
    """Mask NMS: which objects stay, bool [n].

    From the best score down, an object goes if its mask has an IoU above `threshold` with one that
    stays. Optional at prediction, never part of the evaluation.
    """
    iou = mask_iou(rles)
    kept = np.zeros(len(rles), dtype=bool)
    for index in scores.argsort(descending=True, stable=True).tolist():
        kept[index] = not (iou[index, kept] > threshold).any()
    return torch.from_numpy(kept)


# -- records -------------------------------------------------------------------------------------


def coco_records(
    found: Found, image_id: int, category_id: int, rles: Sequence[Rle] | None = None
) -> list[dict[str, Any]]:
    """COCO results: image_id, category_id, score, bbox (x, y, width, height) and segmentation.

    Args:
        rles: the objects' masks if they have been encoded already.
    """
    if rles is None and found.mask_logits is not None:
        rles = encode_masks(found)
    corners = found.boxes.double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    records: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_id, "score": score, "bbox": box}
        for score, box in zip(found.scores.tolist(), boxes, strict=True)
    ]
    if rles is not None:
        for record, rle in zip(records, rles, strict=True):
            record["segmentation"] = rle
    return records
