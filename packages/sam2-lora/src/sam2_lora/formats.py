"""Data sets on disk: which format lies there, and its pictures and annotations as records.

    severstal   <split>/img/x.jpg with <split>/ann/x.jpg.json (Supervisely)
    kaggle      train.csv with train_images/: see `kaggle`
    folders     [<split>/]images/x.jpg with [<split>/]masks/x.png
    coco        see `coco`

Everything is read in sorted order. Problems of one pass are collected and reported together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lora_core.data_file import is_label, is_whole, read_json
from lora_core.errors import DataError, one_line
from lora_core.pictures.coco import CocoFile, find_coco
from lora_core.pictures.encodings import Shape, ring_of
from lora_core.pictures.masks import Size, UnclearKind
from lora_core.pictures.reading import Reading, key_of, pictures_in
from lora_core.settings.types import shown
from lora_core.validate import validate
from sam2_lora.coco import read_coco
from sam2_lora.config import MaskKind
from sam2_lora.kaggle import read_kaggle
from sam2_lora.records import Record

SPLITS = {
    "train": ("train_split", "train"),
    "val": ("val_split", "val", "valid", "validation"),
    "test": ("test_split", "test"),
}
FORMATS = ("severstal", "kaggle", "folders", "coco")
LAYOUTS = """expected one of
  severstal: train_split/img/x.jpg and train_split/ann/x.jpg.json, also val_split, test_split
  kaggle:    train.csv and train_images/
  folders:   images/x.jpg and masks/x.png, or both below train/, val/, test/
  coco:      train/_annotations.coco.json beside its pictures, also valid, test;
             or annotations/instances_train.json; or one JSON and images/"""
GEOMETRIES = ("bitmap", "rectangle", "polygon")  # of Supervisely, that are read
KIND_SAMPLE = 64  # masks that are looked at to tell whether a set is evidently binary

Source: TypeAlias = Path | CocoFile


# -- which format, which splits --------------------------------------------------------------------


def find(root: Path, data_format: str = "auto") -> tuple[str, dict[str, Source]]:
    """The format of the data below `root`, and where each split ("train", "val", "test") lies.

    A data set that is not split has the one entry "all".

    Raises:
        DataError: no data, data in several formats, or folders that may not be read.
    """
    names = FORMATS if data_format == "auto" else (data_format,)
    try:
        if not root.exists():
            raise DataError(
                f"{root.absolute()}: no such folder: name that of your data. `sam2-lora prepare` "
                "makes the Severstal layout, `sam2-lora demo` a data set to try"
            )
        if not root.is_dir():
            raise DataError(
                f"{root.absolute()}: a file, expected the folder of a data set: perhaps "
                f"{root.absolute().parent}"
            )
        found = {name: sources for name in names if (sources := _FIND[name](root))}
    except OSError as error:
        place = one_line(Path(error.filename).absolute())
        raise DataError(f"{place}: cannot be read: {error.strerror}") from None
    if not found:
        raise DataError(f"{root.absolute()}: no data set found; {LAYOUTS}")
    if len(found) > 1:
        choice = " and ".join(found)
        raise DataError(f"{root.absolute()}: looks like {choice}; say which with --data_format")
    return found.popitem()


def _find_pairs(root: Path, first: str, second: str) -> dict[str, Source]:
    """Folders that hold the two subfolders, or one of them: the other is then missed by name."""
    known = {
        split: root / name
        for split, names in SPLITS.items()
        for name in reversed(names)
        if (root / name / first).is_dir() or (root / name / second).is_dir()
    }
    if not known and (root / second).is_dir():
        known["all"] = root
    return dict(known)


def _find_severstal(root: Path) -> dict[str, Source]:
    return _find_pairs(root, "img", "ann")


def _find_folders(root: Path) -> dict[str, Source]:
    return _find_pairs(root, "images", "masks")


def _find_kaggle(root: Path) -> dict[str, Source]:
    return {"all": root} if (root / "train.csv").is_file() else {}


def _find_coco(root: Path) -> dict[str, Source]:
    return dict(find_coco(root, SPLITS))


_FIND: dict[str, Callable[[Path], dict[str, Source]]] = {
    "severstal": _find_severstal,
    "kaggle": _find_kaggle,
    "folders": _find_folders,
    "coco": _find_coco,
}


def read(
    source: Source,
    data_format: str,
    root: Path,
    mask_kind: MaskKind = "auto",
    follow_links: bool = False,
) -> Reading:
    """Records of one split, sorted by key, with all problems and notes.

    Args:
        source: from `find`, as `data_format`.
        root: records' keys are paths below it.
        mask_kind: what values of mask files mean.
        follow_links: read files outside of the data set that links in it lead to.
    """
    reading = Reading(root, follow_links)
    with reading.collecting():
        if isinstance(source, CocoFile):
            read_coco(source, reading)
        elif data_format == "severstal":
            _read_severstal(source, reading)
        elif data_format == "kaggle":
            read_kaggle(source, reading)
        else:
            _read_folders(source, mask_kind, reading)
    return reading


# -- Supervisely -----------------------------------------------------------------------------------


def _read_severstal(folder: Path, reading: Reading) -> None:
    """Pairs of picture and annotation; either without the other is passed over and counted."""
    pictures = pictures_in(folder / "img", reading)
    if not (folder / "ann").is_dir():
        raise DataError(f"{(folder / 'ann').absolute()}: no such folder")
    annotations = {path.name[: -len(".json")]: path for path in (folder / "ann").glob("*.json")}
    reading.measure(picture for name, picture in pictures.items() if name in annotations)
    for name, picture in pictures.items():
        if name not in annotations:
            reading.notes[f"pictures in {folder / 'img'} without annotation file, left out"] += 1
            continue
        key = key_of(picture, reading.root)
        with reading.collecting(sample=key):
            annotation = annotations.pop(name)
            reading.stay_inside(annotation, folder / "ann")
            size, shapes = _read_supervisely(annotation, picture, key, reading)
            reading.records.append(Record(key, picture, size, shapes))
    unpaired = len(annotations.keys() - pictures.keys())
    if unpaired:
        reading.notes[f"files in {folder / 'ann'} without picture, left out"] += unpaired


def _read_supervisely(
    path: Path, picture: Path, key: str, reading: Reading
) -> tuple[Size, tuple[Shape, ...]]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise DataError(f'{one_line(path)}: expected an object with the list "objects"')
    stated = content.get("size")
    declared = None
    if stated is not None:
        if not isinstance(stated, dict) or not all(
            is_whole(stated.get(side)) for side in ("height", "width")
        ):
            raise DataError(f"{one_line(path)}: size {shown(stated)}, expected height and width")
        declared = (stated["height"], stated["width"])
    size = reading.size_of(picture, declared, one_line(path))
    shapes = []
    for number, item in enumerate(content["objects"], start=1):
        where = f"{one_line(path)}: object {number}"
        with reading.collecting(where, key):
            shape = _supervisely_shape(item, size, where)
            if shape is not None:
                shapes.append(shape)
                continue
            kind = item["geometryType"]
            reading.notes[f"objects left out, of geometry {shown(kind)}, which is not read"] += 1
    return size, tuple(shapes)


def _supervisely_shape(item: Any, size: Size, where: str) -> Shape | None:
    """One object of a Supervisely annotation; None for a geometry that is not taken."""
    if not isinstance(item, dict):
        raise DataError("expected an object")
    label = item.get("classTitle")
    if not is_label(label):
        raise DataError(f"classTitle {shown(label)}, expected text")
    kind = item.get("geometryType")
    if not isinstance(kind, str):
        raise DataError(f"geometryType {shown(kind)}, expected text")
    if kind == "bitmap":
        bitmap = item.get("bitmap")
        if not isinstance(bitmap, dict) or not isinstance(bitmap.get("data"), str):
            raise DataError("bitmap: data is missing")
        x, y = _corner(bitmap.get("origin"))
        return Shape("bitmap", (bitmap["data"], (x, y)), label, where)
    if kind not in GEOMETRIES:
        if kind.lower() in GEOMETRIES:
            raise DataError(f"geometryType {shown(kind)}, did you mean {kind.lower()!r}?")
        return None
    points = item.get("points")
    points = points if isinstance(points, dict) else {}
    exterior = points.get("exterior")
    if not isinstance(exterior, list):
        raise DataError(f"{kind}: points.exterior is missing")
    if kind == "rectangle":
        return Shape("rectangle", _rectangle(exterior, size), label, where)
    interior = points.get("interior") or []
    if not isinstance(interior, list):
        raise DataError(f"polygon: points.interior {str(interior)[:80]!r}, expected a list")
    # Supervisely's vertices are pixels: they mean the pixels' centres.
    rings = [ring_of(ring, size) + 0.5 for ring in (exterior, *interior)]
    return Shape("polygon", rings, label, where)


def _corner(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_whole, value)):
        raise DataError(f"bitmap: origin {shown(value)}, expected two whole numbers [x, y]")
    return value[0], value[1]


def _rectangle(exterior: list[Any], size: Size) -> tuple[int, int, int, int]:
    """First and last pixel (x0, y0, x1, y1) from two opposite corners, cut at the border."""
    try:
        corners = np.array(exterior, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        corners = np.empty(0)
    if corners.shape != (2, 2) or not np.isfinite(corners).all():
        raise DataError(f"rectangle: exterior {shown(exterior)}, expected two corners [x, y]")
    limit = np.array([size[1], size[0]])
    low = np.clip(np.round(corners.min(0)), 0, limit).astype(int).tolist()
    high = np.clip(np.round(corners.max(0)), -1, limit - 1).astype(int).tolist()
    return low[0], low[1], max(high[0], low[0] - 1), max(high[1], low[1] - 1)


# -- pictures and mask files -----------------------------------------------------------------------


def _read_folders(folder: Path, mask_kind: MaskKind, reading: Reading) -> None:
    """images/ and masks/ with files of the same name; their suffixes may differ."""
    pictures = _by_stem(pictures_in(folder / "images", reading), reading)
    masks = _by_stem(pictures_in(folder / "masks", reading), reading)
    refused = {Path(sample).stem for sample, _ in reading.bad}  # one of a pair is: that is said
    reading.measure([*pictures.values(), *masks.values()])
    for stem, picture in pictures.items():
        key = key_of(picture, reading.root)
        with reading.collecting(sample=key):
            if stem in refused:
                continue
            if stem not in masks:
                hint = reading.hint(stem, masks)
                raise DataError(
                    f"{one_line(picture)}: no mask {one_line(stem)}.png in {folder / 'masks'}{hint}"
                )
            mask = masks[stem]
            size = reading.size_of(picture, reading.size_of(mask), one_line(mask))
            merged = mask_kind != "instances"
            reading.records.append(Record(key, picture, size, (), mask, mask_kind, merged))
    reading.bad += [
        (
            key_of(mask, reading.root),
            f"{one_line(mask)}: no picture {one_line(stem)} in {folder / 'images'}",
        )
        for stem, mask in masks.items()
        if stem not in pictures and stem not in refused
    ]
    if mask_kind == "auto":
        _look_at_kind(reading)


def _by_stem(files: dict[str, Path], reading: Reading) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files.values():
        other = found.setdefault(path.stem, path)
        if other != path:
            reading.problems.append(
                f"{one_line(path)}: {one_line(other.name)} has the same name; keep one of them"
            )
    return found


def _look_at_kind(reading: Reading) -> None:
    """Look at some masks; if one is not evidently background and foreground, drop all of them:
    one problem says it, not one for each mask.

    Raises:
        DataError: the kind of the masks has to be said.
    """
    chosen = reading.records[:: max(1, len(reading.records) // KIND_SAMPLE)]
    outcomes = validate(
        chosen,
        _unclear,
        kind="sam2 kind of mask 1",
        root=reading.root,
        files=lambda record: [record.mask] if record.mask else [],
        what="kinds of masks",
    )
    for outcome in outcomes:
        if outcome.value:
            reading.records.clear()
            raise UnclearKind(outcome.value)


def _unclear(record: Record) -> str:
    """Why the meaning of a mask has to be said, or ""."""
    try:
        record.objects  # noqa: B018 - decoding raises
    except UnclearKind as error:
        return str(error)
    return ""  # a damaged mask raises: it is reported with all others that are
