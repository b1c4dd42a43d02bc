"""How good a tiny base is on scenes that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam3_base.batches import Phrases, as_arrays, make_batch
from sam3_lora import network, postprocess
from sam3_lora.demo_base import scenes
from sam3_lora.matching import overlaps
from sam3_lora.metrics import CgF1, Kind, Unit, false_positive_rate
from sam3_lora.outputs import Outputs, Targets

if TYPE_CHECKING:
    from transformers import Sam3Model

VALIDATION_SEED = 1  # of the scenes that the log's figures are measured on


@torch.no_grad()
def score(
    model: Sam3Model,
    phrases: Phrases,
    pictures: Iterable[scenes.Scene],
    device: torch.device,
    *,
    masks: bool,
    asked: int = 12,
    threshold: float = 0.5,
) -> dict[str, float]:
    """F1 at IoU 0.5 over boxes (and masks), false-fire rate and presence accuracy.

    Each scene is asked for 12 phrases, every second of them absent.
    """
    model.eval()
    kinds: tuple[Kind, ...] = ("bbox", "segm") if masks else ("bbox",)
    scores = {kind: CgF1(kind) for kind in kinds}
    absent, right, best_iou = [], [], []
    for number, scene in enumerate(pictures):
        rng = np.random.default_rng((VALIDATION_SEED, number, 2))
        arrays = as_arrays(scene, asked, rng)
        items = {name: torch.from_numpy(np.asarray(value))[None] for name, value in arrays.items()}
        batch = make_batch(items, phrases, device)
        del batch["exemplars"]  # phrases alone
        out = network.forward(model, batch, masks=masks, one_to_many=False)
        presence = out.presence[-1].cpu() > 0
        best = postprocess.object_scores(out).amax(1).cpu()
        truth = batch["targets"].counts.cpu() > 0
        right += (presence == truth).tolist()
        absent += best[~truth].tolist()
        for unit in units(out, scene, arrays["text"], masks, threshold):
            for value in scores.values():
                value.add(unit)
        best_iou += best_overlaps(out, batch["targets"])
    figures = {"presence": float(np.mean(right)), "false_fire": false_positive_rate(absent)}
    for kind, value in scores.items():
        summary = value.summary()
        figures |= {f"{kind}_F1@50": summary["F1@0.5"], f"{kind}_cgF1": summary["cgF1"]}
        figures[f"{kind}_recall@50"] = summary["recall@0.5"]
    figures["best_iou"] = float(np.mean(best_iou))
    return {name: round(value, 3) for name, value in figures.items()}


def units(
    out: Outputs, scene: scenes.Scene, text: NDArray, masks: bool, threshold: float
) -> Iterator[Unit]:
    """Each query's answers and truth, in pixels."""
    sizes = [scene.image.shape[:2]] * len(text)
    for found, p in zip(postprocess.detections(out, sizes, threshold), text, strict=True):
        rles = postprocess.encode_masks(found) if masks else None
        truth = []
        for index in scene.answers(scenes.PHRASES[p]):
            x0, y0, x1, y1 = scene.things[index].corners
            one: dict[str, Any] = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            if masks:
                drawn = torch.from_numpy(scene.things[index].mask)[None]
                one["segmentation"] = postprocess.encode(drawn)[0]
            truth.append(one)
        yield Unit(int(p), truth, postprocess.coco_records(found, 0, int(p), rles))


def best_overlaps(out: Outputs, targets: Targets) -> list[float]:
    """Of each target the IoU of the nearest box of its query, whatever its score."""
    owner = torch.repeat_interleave(
        torch.arange(len(targets.counts), device=targets.counts.device), targets.counts
    )
    if not len(owner):
        return []
    iou, _ = overlaps(out.one_to_one[-1].boxes[owner], targets.boxes[:, None])
    return iou.amax(1).tolist()


def validation(count: int) -> Iterator[scenes.Scene]:
    """Scenes for the log; the card's come from `scenes.held_out`."""
    return (scenes.scene((VALIDATION_SEED, i, 0)) for i in range(count))
