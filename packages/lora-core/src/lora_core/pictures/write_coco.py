"""COCO annotations of pictures whose masks are at hand, as every package here reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_core.pictures.coco import ROBOFLOW
from lora_core.pictures.encodings import encode_counts
from lora_core.pictures.masks import Mask, Size


class Annotated(NamedTuple):
    """A picture of a split: its file name, its size (H, W), and (label, mask [H, W]) pairs."""

    name: str
    size: Size
    objects: Sequence[tuple[str, Mask]]


def write_coco(
    folder: Path, pictures: Sequence[Annotated], labels: Sequence[str] | None = None
) -> Path:
    """Write `_annotations.coco.json` beside the pictures; arguments as for `coco`."""
    path = folder / ROBOFLOW
    text = json.dumps(coco(pictures, labels), separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def coco(
    pictures: Sequence[Annotated], labels: Sequence[str] | None = None
) -> dict[str, list[Any]]:
    """Images, categories and annotations, each numbered from 1; masks as uncompressed run lengths.

    Args:
        labels: the categories in their order; None: those of the objects, sorted.
    """
    if labels is None:
        labels = sorted({label for picture in pictures for label, _ in picture.objects})
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, (height, width), objects) in enumerate(pictures, start=1):
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for label, mask in objects:
            found = _annotation(mask)
            head = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**head, "category_id": labels.index(label) + 1, **found})
    categories = [{"id": k, "name": label} for k, label in enumerate(labels, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def _annotation(mask: Mask) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    return {
        "segmentation": {"size": list(mask.shape), "counts": encode_counts(mask)},
        "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
        "area": len(rows),
        "iscrowd": 0,
    }
