"""COCO JSON as records: every annotation but those of crowds is a mask.

"bbox" and "area" are not used; both follow from the mask.
"""

from __future__ import annotations

from lora_core.pictures import coco
from lora_core.pictures.coco import Annotation, CocoFile
from lora_core.pictures.encodings import Shape
from lora_core.pictures.reading import Reading
from sam2_lora.records import Record


def read_coco(file: CocoFile, reading: Reading) -> None:
    """Add the records of one COCO file, sorted by key; problems are collected.

    Raises:
        DataError: the file as a whole cannot be used.
    """
    shapes: dict[object, list[Shape]] = {}

    def take(annotation: Annotation) -> None:
        if annotation.crowd:
            reading.notes["crowd annotations left out"] += 1
            return
        segmentation = annotation.item.get("segmentation")
        shape = coco.shape_of(segmentation, annotation.size, annotation.label, annotation.where)
        shapes.setdefault(annotation.image, []).append(shape)

    content = coco.read_coco(file, reading, take)
    reading.records += [
        Record(picture.key, picture.path, picture.size, tuple(shapes.get(number, ())))
        for number, picture in content.pictures.items()
        if picture.size is not None
    ]
    reading.records.sort(key=lambda record: record.key)
