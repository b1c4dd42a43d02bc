"""Annotated pictures in other forms than ours: which one lies in a folder, and how it is read.

    yolo    data.yaml with names; images/ and labels/, or train/images and train/labels
    voc     Annotations/*.xml with JPEGImages/ and ImageSets/Main/; or .xml beside the pictures
    lvis    as coco, with neg_category_ids and not_exhaustive_category_ids
    masks   images/x.jpg and masks/x.png, or both below train/, valid/, test/
    coco    train/_annotations.coco.json, or annotations/instances_train.json, or one JSON

All of them come to the records that training uses, checked by the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.errors import DataError, one_line
from lora_core.pictures.coco import CocoFile, find_coco
from lora_core.pictures.reading import Reading
from sam3_lora.coco import read_split
from sam3_lora.config import Dataset
from sam3_lora.formats import mask_folders, voc, yolo
from sam3_lora.formats.annotated import SPLITS, Part

LAYOUTS = """expected one of
  yolo:  data.yaml with names, images/ and labels/ (or train/images and train/labels)
  voc:   Annotations/x.xml and JPEGImages/x.jpg, or .xml files beside the pictures
  lvis:  lvis_v1_train.json and train2017/
  masks: images/x.jpg and masks/x.png, or both below train/, valid/, test/
  coco:  train/_annotations.coco.json beside its pictures, annotations/instances_train.json, or
         one JSON and images/"""

Source = yolo.Place | voc.Place | Path | CocoFile


def find(root: Path, name: str = "auto") -> tuple[str, dict[str, Source]]:
    """The form of the data below `root`, and where each split ("train", "val", "test") lies.

    A data set that is not split has the one entry "all".

    Raises:
        DataError: no data, data in several forms, or a damaged description of it.
    """
    if not root.is_dir():
        raise DataError(f"--source {root.absolute()}: no such folder: name that of your data")
    names = list(_FIND) if name == "auto" else [name.replace("lvis", "coco")]
    try:
        found = {one: sources for one in names if (sources := _FIND[one](root))}
    except OSError as error:
        place = one_line(Path(error.filename or root).absolute())
        raise DataError(f"{place}: cannot be read: {error.strerror}") from None
    if not found:
        kind = "data set" if name == "auto" else f"{name} data set"
        raise DataError(f"{root.absolute()}: no {kind} found; {LAYOUTS}")
    if len(found) > 1:
        choice = " and ".join(found)
        raise DataError(f"{root.absolute()}: looks like {choice}; say which with --format")
    form, sources = found.popitem()
    named = any("lvis" in file.path.name.lower() for file in sources.values() if form == "coco")
    return "lvis" if name == "lvis" or (name == "auto" and named) else form, sources


def read(
    source: Source,
    name: str,
    reading: Reading,
    mask_kind: mask_folders.MaskKind = "auto",
    names: tuple[str, ...] = (),
) -> Part:
    """What one split holds; all problems and notes are collected in `reading`.

    Args:
        source: from `find`, as `name`.
        mask_kind, names: what the values of mask files mean, and what they are called.
    """
    try:
        if isinstance(source, yolo.Place):
            return yolo.read(source, reading)
        if isinstance(source, voc.Place):
            return voc.read(source, reading)
        if isinstance(source, CocoFile):
            return _read_coco(source, name, reading)
        return mask_folders.read(source, mask_kind, names, reading)
    except DataError as error:
        reading.problems.append(str(error))
    except OSError as error:  # a folder that may not be listed, or is gone
        place = one_line(error.filename or reading.root)
        reading.problems.append(f"{place}: cannot be read: {error.strerror}")
    return Part([], {})


def _read_coco(file: CocoFile, name: str, reading: Reading) -> Part:
    try:
        records, phrases = read_split(file, reading, Dataset(clean_names=False))
    except DataError as error:  # without a setting of training that this command has not
        raise DataError(re.sub(", or give --dataset.prompts .*", "", str(error))) from None
    if name == "lvis" and records and all(record.absent is None for record in records):
        raise DataError(
            f"{one_line(file.path)}: no image has neg_category_ids, without which most categories "
            "of LVIS would count as absent; is it plain COCO? Then say --format coco"
        )
    if name == "lvis":  # of a picture without the list nothing is known to be absent
        records = [replace(record, absent=record.absent or ()) for record in records]
    setting = " (--dataset.keep_placeholder_category)"
    notes = tuple(note.replace(setting, "") for note in phrases.notes)
    return Part(records, dict(phrases.numbers), notes)


def _find_coco(root: Path) -> dict[str, Any]:
    return dict(find_coco(root, SPLITS))


_FIND: dict[str, Callable[[Path], dict[str, Any]]] = {
    "yolo": yolo.find,
    "voc": voc.find,
    "masks": mask_folders.find,
    "coco": _find_coco,  # LVIS, too
}
