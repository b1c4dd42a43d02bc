"""Segmentation scores, exact over a data set, and the evaluation of a network.

For one mask: tp, fp, fn count pixels at original resolution, and

    IoU = tp / (tp + fp + fn)    Dice = F1 = 2 tp / (2 tp + fp + fn)
    precision = tp / (tp + fp)   recall = tp / (tp + fn)

A prediction and a target that are both empty score 1, exactly one of them empty 0. A data set's
figure is the mean over its objects; "pooled" figures come from the summed counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_core.training.inference import autocast, evaluating
from sam2_lora.automatic import UPSCALED_VALUES, Grid, segment_features
from sam2_lora.config import Config
from sam2_lora.image import to_model_boxes, to_model_points, upscale_logits
from sam2_lora.losses import LOGIT_LIMIT, best_masks
from sam2_lora.model import Features, decode, encode_pictures, image_size
from sam2_lora.prompts import box_of, center_click, center_correction

if TYPE_CHECKING:
    from transformers import Sam2Model

    from lora_core.frozen import FrozenImages
    from lora_core.pictures.masks import Object
    from sam2_lora.data import EvalSet

IOU_LEVELS = (50, 75, 90, 95)  # per cent
CLICKS = (3, 5)  # correction clicks after which masks are scored
OBJECTS_AT_ONCE = 32
# On pictures without objects: coarser than for a user, since only "anything at all?" is asked.
EMPTY_GRID = Grid(points_per_side=8)

# -- counting ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts per mask, so that every figure is exact and does not depend on the batch size."""

    counts: list[tuple[int, int, int]] = field(default_factory=list)  # tp, fp, fn
    labels: list[str] = field(default_factory=list)

    def add(self, masks: Tensor, targets: Tensor, labels: Sequence[str] | None = None) -> None:
        """Count boolean masks against boolean targets, both [N, H, W]."""
        tp = (masks & targets).flatten(1).sum(1)
        fp = masks.flatten(1).sum(1) - tp
        fn = targets.flatten(1).sum(1) - tp
        self.add_counts(torch.stack([tp, fp, fn], 1).tolist(), labels)

    def add_counts(
        self, counts: Iterable[Sequence[int]], labels: Sequence[str] | None = None
    ) -> None:
        """Take (tp, fp, fn) that were counted elsewhere."""
        new = [(int(tp), int(fp), int(fn)) for tp, fp, fn in counts]
        self.counts += new
        self.labels += labels if labels is not None else [""] * len(new)

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """IoU, Dice, precision, recall and F1 of every mask, in the order in which they came."""
        tp, fp, fn = np.array(self.counts, dtype=np.int64).reshape(-1, 3).T
        precision, recall = _ratio(tp, tp + fp, fn), _ratio(tp, tp + fn, fp)
        return {
            "iou": _ratio(tp, tp + fp + fn),
            "dice": _ratio(2 * tp, 2 * tp + fp + fn),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        }

    def summary(self) -> dict[str, float]:
        """Means over the masks, shares that reach an IoU, and pooled figures; NaN without masks."""
        scores = self.scores()
        figures = {name: mean(values) for name, values in scores.items()}
        for level in IOU_LEVELS:
            figures[f"iou_ge_{level}"] = mean(scores["iou"] >= level / 100)
        tp, fp, fn = (sum(count[k] for count in self.counts) for k in range(3))
        pooled = Tally([(tp, fp, fn)] if self.counts else []).scores()
        return figures | {f"pooled_{name}": mean(pooled[name]) for name in ("iou", "dice")}

    def class_iou(self) -> dict[str, float]:
        """Mean IoU of the masks of each class."""
        iou = self.scores()["iou"]
        labels = np.array(self.labels)
        return {name: mean(iou[labels == name]) for name in sorted(set(self.labels))}


def _ratio(
    part: NDArray[np.int64], whole: NDArray[np.int64], other: NDArray[np.int64] | int = 0
) -> NDArray[np.float64]:
    """part / whole; where `whole` is 0: 1 if `other` is 0 too, else 0."""
    empty = np.broadcast_to(np.asarray(other) == 0, whole.shape).astype(np.float64)
    return np.divide(part, whole, out=empty.copy(), where=whole > 0)


def mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    """The mean with a correctly rounded sum; NaN of nothing."""
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan


def iou_above_probability(
    probabilities: NDArray[np.float32], targets: NDArray[np.bool_], level: float
) -> float:
    """What the earlier evaluation script called IoU@level; kept to compare with its tables.

    Mean IoU of "probability > level" [N, H, W] with 1e-8 added to the union: an empty prediction of
    an empty target scores 0. The usual IoU@level is `iou_ge_*`.
    """
    tally = Tally()
    tally.add(torch.from_numpy(probabilities > level), torch.from_numpy(targets))
    counts = np.array(tally.counts, dtype=np.float64)
    return mean(counts[:, 0] / (counts.sum(1) + 1e-8))


# -- running the network -------------------------------------------------------------------------


def evaluate(
    model: Sam2Model, val: EvalSet, cfg: Config, frozen: FrozenImages | None = None
) -> dict[str, float]:
    """Score the network on every object of a data set, at original resolution.

    Prompts are fixed by the truth (no random number is drawn): the pixel farthest from the object's
    border, its box, and clicks in the middle of the larger error. The encoder runs once per
    picture. Pictures without objects go through the automatic grid.

    Args:
        model: the network; comes back in the modes it had.
        val: `data.EvalSet`.
        cfg: `precision`.
        frozen: that of `val`, if it has one.

    Returns:
        Per object, from one point: "iou" (which `best` follows), "dice", "precision", "recall",
        "f1", "iou_ge_50/75/90/95" (share of objects), "pooled_iou", "pooled_dice" and, with two
        classes or more, "class_iou/NAME". "box_*" and "click3_*", "click5_*" (so many correction
        clicks after the point): IoU and Dice. "filled_box_*": what the box itself scores as a mask.
        "objects", "images", "empty_images", "false_positive_images": counts.
    """
    device = next(model.parameters()).device
    tallies = {
        name: Tally() for name in ("point", "box", *(f"click{n}" for n in CLICKS), "filled_box")
    }
    images = empty = false_positives = 0
    with evaluating(model), autocast(device, cfg.precision):
        for record in val:
            images += 1
            if frozen is None or record.item is None:
                features = encode_pictures(model, [record.rgb])
            else:
                features = Features(**frozen.features([record.item]))
            if not (record.objects or record.small):
                empty += 1
                size = (record.rgb.shape[0], record.rgb.shape[1])
                false_positives += bool(segment_features(model, features, size, EMPTY_GRID))
            for truth, labels in _chunks(record.objects):
                _score_objects(model, features, truth, labels, tallies)
    return {
        **_report(tallies),
        "objects": len(tallies["point"].counts),
        "images": images,
        "empty_images": empty,
        "false_positive_images": false_positives,
    }


def _report(tallies: dict[str, Tally]) -> dict[str, float]:
    figures = tallies["point"].summary()
    for name, tally in tallies.items():
        if name != "point":
            summary = tally.summary()
            figures |= {f"{name}_iou": summary["iou"], f"{name}_dice": summary["dice"]}
    classes = tallies["point"].class_iou()
    if len(classes) > 1:
        figures |= {f"class_iou/{name}": value for name, value in classes.items()}
    return figures


def _chunks(objects: Sequence[Object]) -> Iterator[tuple[NDArray[np.bool_], list[str]]]:
    """Masks [n, H, W] and labels of some objects at a time, so that memory stays bounded."""
    start = 0
    while start < len(objects):
        first = objects[start].mask
        count = min(OBJECTS_AT_ONCE, max(1, UPSCALED_VALUES // first.size))
        part = objects[start : start + count]
        yield np.stack([item.mask for item in part]), [item.label for item in part]
        start += count


def _score_objects(
    model: Sam2Model,
    features: Features,
    truth: NDArray[np.bool_],
    labels: list[str],
    tallies: dict[str, Tally],
) -> None:
    """Prompt each object of one picture in every way and count the pixels."""
    device = features.image_embed.device
    size, model_size = (truth.shape[1], truth.shape[2]), image_size(model)
    targets = torch.from_numpy(truth).to(device)
    image = torch.zeros(len(truth), dtype=torch.long, device=device)

    boxes = np.stack([box_of(mask) for mask in truth])
    tallies["filled_box"].add(torch.from_numpy(filled(boxes, size)).to(device), targets, labels)
    model_boxes = torch.as_tensor(to_model_boxes(boxes, size, model_size), device=device)
    decoded = decode(
        model, features, image, boxes=model_boxes.float(), multimask=False, stability=True
    )
    tallies["box"].add(upscale_logits(decoded.masks, size)[:, 0] > 0, targets, labels)

    for count, masks in enumerate(_click_rounds(model, features, truth)):
        if count == 0 or count in CLICKS:
            tallies[f"click{count}" if count else "point"].add(masks, targets, labels)


def _click_rounds(
    model: Sam2Model, features: Features, truth: NDArray[np.bool_]
) -> Iterator[Tensor]:
    """Masks [n, H, W] after the first click, then after each of the correction clicks."""
    device = features.image_embed.device
    size, model_size = (truth.shape[1], truth.shape[2]), image_size(model)
    points, labels = np.zeros((len(truth), 0, 2), np.float32), np.zeros((len(truth), 0), np.int64)
    clicks = [center_click(mask) for mask in truth]
    logits: Tensor | None = None
    for count in range(max(CLICKS) + 1):
        points = np.concatenate([points, np.array([[click.xy] for click in clicks])], 1)
        labels = np.concatenate([labels, np.array([[click.label] for click in clicks])], 1)
        xy = torch.as_tensor(to_model_points(points, size, model_size), device=device)
        decoded = decode(
            model,
            features,
            torch.zeros(len(truth), dtype=torch.long, device=device),
            points=xy.float(),
            labels=torch.as_tensor(labels, device=device),
            mask_input=None if logits is None else logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT),
            multimask=logits is None,
            stability=logits is not None,
        )
        logits = best_masks(decoded)
        masks = upscale_logits(logits, size)[:, 0] > 0
        yield masks
        if count < max(CLICKS):
            found = masks.cpu().numpy()
            clicks = [center_correction(a, b) for a, b in zip(found, truth, strict=True)]


def filled(boxes: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Boxes [N, 4] with inclusive corners (x0, y0, x1, y1) as masks [N, H, W]."""
    y, x = np.ogrid[: size[0], : size[1]]
    x0, y0, x1, y1 = (boxes[:, k, None, None] for k in range(4))
    return (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
