"""Pictures with mask files of the same name: images/x.jpg and masks/x.png.

binary     0 and one other value; each connected part is an object
instances  one number for each object
labels     one number for each class; each connected part is an object
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import PIL

from lora_core.errors import ConfigError, DataError, one_line
from lora_core.pictures.encodings import Shape
from lora_core.pictures.files import read_mask
from lora_core.pictures.masks import (
    Object,
    UnclearKind,
    binary_object,
    components,
    objects_by_value,
)
from lora_core.pictures.reading import Reading, key_of, pictures_in
from lora_core.settings.types import shown
from lora_core.validate import validate
from sam3_lora.formats.annotated import SPLITS, Part, by_stem
from sam3_lora.records import Entry, Record, box_of, run_lengths

MaskKind = Literal["auto", "binary", "instances", "labels"]
OBJECT = "object"  # the name of what has none
MAX_OBJECTS = 5000  # in one mask: more are noise


def find(root: Path) -> dict[str, Path]:
    """Folders that hold images/ and masks/, by split; "all": the root itself."""
    found = {
        split: root / name
        for split, names in SPLITS.items()
        for name in reversed(names)
        if (root / name / "images").is_dir() and (root / name / "masks").is_dir()
    }
    whole = (root / "images").is_dir() and (root / "masks").is_dir()
    return found or ({"all": root} if whole else {})


class Pair(NamedTuple):
    """A picture and its mask."""

    key: str
    picture: Path
    mask: Path


def read(folder: Path, kind: MaskKind, names: tuple[str, ...], reading: Reading) -> Part:
    """The records of images/ and masks/; problems are collected.

    Raises:
        DataError: it has to be said what the masks' values mean.
        ConfigError: `names` does not suit the masks.
    """
    labels = named(names, kind)
    pictures = by_stem(pictures_in(folder / "images", reading).values(), reading)
    masks = by_stem(pictures_in(folder / "masks", reading).values(), reading)
    reading.measure([*pictures.values(), *masks.values()])
    pairs = _pairs(folder, pictures, masks, reading)
    outcomes = validate(
        pairs,
        partial(_objects, kind=kind),
        kind=f"sam3 mask file 1 {kind} PIL {PIL.__version__}",
        root=reading.root,
        files=lambda pair: [pair.mask],
        name=lambda pair: str(pair.mask),
        what="masks",
    )
    unclear = [outcome.value for outcome in outcomes if isinstance(outcome.value, str)]
    if unclear:  # one problem for all
        more = f" (and {len(unclear) - 1} other masks)" if unclear[1:] else ""
        raise UnclearKind(f"{unclear[0]}{more}")
    seen: dict[int, str] = {}
    for pair, outcome in zip(pairs, outcomes, strict=True):
        with reading.collecting(sample=pair.key):
            if outcome.problem:
                raise DataError(outcome.problem)
            size = reading.size_of(pair.picture, reading.size_of(pair.mask), one_line(pair.mask))
            entries = []
            for value, box, counts in outcome.value:
                phrase = seen[value] = _label(labels, value, kind, pair.mask)
                shape = Shape("counts", counts, "", one_line(pair.mask))
                entries.append(Entry(phrase, tuple(box), shape, size, False))
            reading.records.append(Record(pair.key, pair.picture, 0, size, tuple(entries)))
    every = {1: labels[0]} if kind != "labels" else labels or seen
    if kind == "labels" and not labels and seen:
        reading.notes[
            "classes without a name, called class_N: no phrase that the model knows; name them "
            "with --names 1=rust 2=dent"
        ] += len(seen)
    numbers: dict[str, int] = {}
    for value, name in sorted(every.items()):
        numbers.setdefault(name, value)
    return Part(reading.records, numbers)


def _pairs(
    folder: Path, pictures: dict[str, Path], masks: dict[str, Path], reading: Reading
) -> list[Pair]:
    """Pictures with their masks; either without the other is reported."""
    refused = {Path(sample).stem for sample, _ in reading.bad}  # one of a pair is: that is said
    pairs = []
    for stem, picture in pictures.items():
        key = key_of(picture, reading.root)
        if stem in masks:
            pairs.append(Pair(key, picture, masks[stem]))
        elif stem not in refused:
            hint = reading.hint(stem, masks)
            text = f"{one_line(picture)}: no mask {one_line(stem)}.png in {folder / 'masks'}{hint}"
            reading.bad.append((key, text))
    for stem, mask in masks.items():
        if stem not in pictures and stem not in refused:
            text = f"{one_line(mask)}: no picture {one_line(stem)} in {folder / 'images'}"
            reading.bad.append((key_of(mask, reading.root), text))
    return pairs


def named(names: tuple[str, ...], kind: MaskKind) -> dict[int, str]:
    """Value of a mask -> the name of its class; {0: name} of masks with one class.

    Raises:
        ConfigError: anything but value=name for label masks, and one name for others.
    """
    if kind != "labels":
        if len(names) > 1 or any(not name.strip() for name in names):
            raise ConfigError(
                "--names: masks of one class have one name, such as --names rust; "
                "--mask_kind labels takes several, as 1=rust"
            )
        return {0: names[0].strip() if names else OBJECT}
    found: dict[int, str] = {}
    for item in names:
        value, _, name = item.partition("=")
        if not re.fullmatch("[1-9][0-9]{0,4}", value) or not name.strip():
            raise ConfigError(f"--names {shown(item)}: expected value=name, such as 1=rust")
        if int(value) in found:
            raise ConfigError(f"--names: the value {value} stands twice")
        found[int(value)] = name.strip()
    return found


def _label(labels: Mapping[int, str], value: int, kind: MaskKind, mask: Path) -> str:
    if kind != "labels":
        return labels[0]
    if labels and value not in labels:
        known = ", ".join(map(str, labels))
        raise DataError(f"{one_line(mask)}: the value {value} has no name; --names has {known}")
    return labels.get(value, f"class_{value}")


def _objects(pair: Pair, kind: MaskKind) -> list[Any] | str:
    """[value of its class, box, run lengths] of each object; or why `kind` has to be said.

    Raises:
        DataError: the mask cannot be read, or does not mean anything.
    """
    values = read_mask(pair.mask)
    try:
        if kind in ("auto", "binary"):
            found = binary_object(values, kind == "auto", "class_1")
        else:
            found = objects_by_value(values, kind == "labels")
    except UnclearKind as error:
        if kind == "auto":
            return f"{one_line(pair.mask)}: {error}"
        raise DataError(f"{one_line(pair.mask)}: {error}") from None
    except DataError as error:
        raise DataError(f"{one_line(pair.mask)}: {error}") from None
    if kind != "instances":
        found = [part for item in found for part in components(item)]
    if len(found) > MAX_OBJECTS:
        raise DataError(
            f"{one_line(pair.mask)}: {len(found)} objects, more than {MAX_OBJECTS}: is it noise, "
            "or another kind of mask? --mask_kind says which"
        )
    return [[_value(item), box_of(item), _counts(item)] for item in found]


def _value(item: Object) -> int:
    return int(item.label.removeprefix("class_")) if item.label.startswith("class_") else 1


def _counts(item: Object) -> str:
    counts: bytes = run_lengths(item)["counts"]
    return counts.decode("ascii")
