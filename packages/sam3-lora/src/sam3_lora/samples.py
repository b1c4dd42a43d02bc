"""What a picture becomes: its queries in the model's input, batches of them, and COCO's truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_core.frozen import Picture
from lora_core.pictures.masks import Size
from sam3_lora.queries import Query
from sam3_lora.records import Box, Instance, run_lengths
from sam3_lora.tokenizer import Tokenizer
from sam3_lora.transforms import Placement, place_boxes, place_mask

VISUAL = "visual"  # what the official model is asked where an example box says what is meant
PADDING = -10  # label of an example box that is none


# -- training --------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """One query of a sample: a phrase and its N objects in the model's input."""

    phrase: str
    boxes: Tensor  # f32 [N, 4], (cx, cy, w, h) as shares of the input's sides
    masks: Tensor | None  # uint8 [N, H, W]; None: masks are not trained
    has_mask: Tensor  # bool [N]
    exemplar: Tensor | None = None  # f32 [4], a box that is shown instead of the phrase


class Sample(NamedTuple):
    """One picture with its queries."""

    key: str
    pixels: Picture  # of `place_picture`, uint8 [H, W, 3]; or of `TrainSet.frozen`
    queries: list[Asked]


def in_input(
    query: Query,
    size: Size,
    place: Placement,
    masks: bool,
    example: Box | None = None,
) -> Asked:
    """A query's objects where they are in the model's input.

    An object whose mask vanishes there is trained as a box: as an empty mask it would teach that
    there is nothing.

    Args:
        size: (height, width) of the picture.
        masks: whether masks are trained.
        example: (x0, y0, x1, y1) in the picture, shown instead of the phrase.
    """
    objects = [one for one in query.instances if not one.crowd]
    targets = None
    has_mask = torch.zeros(len(objects), dtype=torch.bool)
    if masks:
        planes = np.zeros((len(objects), *place.size), dtype=np.uint8)
        for number, one in enumerate(objects):
            if one.mask is not None:
                planes[number] = place_mask(one.mask, place)
        targets = torch.from_numpy(planes)
        has_mask = targets.flatten(1).any(1) if objects else has_mask
    return Asked(
        phrase=query.phrase,
        boxes=place_boxes([one.box for one in objects], size, place),
        masks=targets,
        has_mask=has_mask,
        exemplar=None if example is None else place_boxes([example], size, place)[0],
    )


def collate(samples: Sequence[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """Samples to one batch of I pictures, P different phrases and B queries.

    Returns:
        keys: B names, "picture: phrase". pictures: I names.
        images: I pictures, uint8 [H, W, 3]; with a cache, what it gave for each.
        phrases: P texts.
        input_ids, attention_mask: i64 [P, 32].
        image_ids, text_ids: i64 [B], the picture and phrase of each query.
        exemplars: f32 [B, 1, 4] and exemplar_labels: i64 [B, 1], 1 or -10 for none; only if there
            are any.
        targets: the fields of `Targets`; masks only if they are trained.
    """
    rows = [(image, query) for image, one in enumerate(samples) for query in one.queries]
    texts = [query.phrase if query.exemplar is None else VISUAL for _, query in rows]
    phrases = list(dict.fromkeys(texts))
    input_ids, attention_mask = tokenizer(phrases)
    batch: dict[str, Any] = {
        "keys": [f"{samples[image].key}: {query.phrase}" for image, query in rows],
        "pictures": [sample.key for sample in samples],
        "phrases": phrases,
        "images": [sample.pixels for sample in samples],
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_ids": torch.tensor([image for image, _ in rows], dtype=torch.int64),
        "text_ids": torch.tensor([phrases.index(text) for text in texts], dtype=torch.int64),
        "targets": _targets([query for _, query in rows]),
    }
    shown = [query.exemplar for _, query in rows]
    if any(box is not None for box in shown):
        boxes = [torch.zeros(4) if box is None else box for box in shown]
        labels = [PADDING if box is None else 1 for box in shown]
        batch["exemplars"] = torch.stack(boxes)[:, None]
        batch["exemplar_labels"] = torch.tensor(labels)[:, None]
    return batch


def _targets(queries: Sequence[Asked]) -> dict[str, Tensor]:
    """The fields of `outputs.Targets`, objects packed query after query."""
    masks = [query.masks for query in queries if query.masks is not None]
    targets = {
        "boxes": torch.cat([query.boxes for query in queries]),
        "counts": torch.tensor([len(query.boxes) for query in queries], dtype=torch.int64),
    }
    if masks:
        targets["masks"] = torch.cat(masks)
        targets["has_mask"] = torch.cat([query.has_mask for query in queries])
    return targets


# -- validation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalRecord:
    """A picture, what is to be found in it, and what it is asked for in vain.

    Attributes:
        key: the picture's name. image: its file. image_id: its number in results.
        pixels: of `place_picture`, uint8 [H, W, 3]; or of `ValSet.frozen`.
        size: (height, width) of the picture in its file.
        phrases: what it is asked; categories: the number of each in results.
        truth: of each phrase COCO annotations in pixels of the file: bbox [x, y, width, height],
            area, iscrowd, and segmentation, run lengths or None where no mask is known or asked.
        exhaustive: of each phrase, whether all of its objects are annotated.
    """

    key: str
    image: Path
    image_id: int
    pixels: Picture
    size: Size
    phrases: list[str]
    categories: list[int]
    truth: list[list[dict[str, Any]]]
    exhaustive: list[bool]


def annotation(instance: Instance, masks: bool) -> dict[str, Any]:
    """An object as COCO has it; its area is that of the mask, or else of the box."""
    x0, y0, x1, y1 = instance.box
    mask = instance.mask if masks else None
    return {
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(mask.area if mask else (x1 - x0) * (y1 - y0)),
        "iscrowd": int(instance.crowd),
        "segmentation": run_lengths(mask) if mask else None,
    }
