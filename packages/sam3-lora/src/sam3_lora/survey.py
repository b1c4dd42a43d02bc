"""What the COCO files of a run hold: records, phrases and counts, and what is wrong with them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL

from lora_core.errors import ConfigError, DataError, near, one_line
from lora_core.pictures import survey
from lora_core.pictures.coco import CocoFile
from lora_core.pictures.reading import Reading
from lora_core.pictures.survey import Look, Surveyed, digest_of
from lora_core.report import plural
from lora_core.settings.types import shown
from lora_core.validate import REPORT, Bad
from sam3_lora.coco import Split, read_split
from sam3_lora.config import Config, Dataset
from sam3_lora.queries import absent, unused_prompts, usable
from sam3_lora.records import Instance, Record

NAMES = {"valid": "val", "val": "valid"}  # of the validation folder: exporters differ

Parts = dict[str, Split]  # by split: "train" and, if there is one, "val"


# -- reading ---------------------------------------------------------------------------------------


def read_parts(cfg: Config) -> tuple[Parts, list[Bad], Reading]:
    """The splits, the pictures that are known to be bad, and notes.

    Raises:
        DataError: something is wrong with the data set as a whole; all of it together.
        ConfigError: `dataset.prompts` names a category that no file has.
    """
    root = data_root(cfg.dataset)
    total = Reading(root)
    parts: Parts = {}
    bad: list[Bad] = []
    for name, (folder, file) in places(cfg.dataset).items():
        reading = Reading(folder, cfg.dataset.follow_links, links_flag="--dataset.follow_links")
        with total.collecting():
            if not folder.is_dir():
                flag = f"--dataset.{name}_img_folder"
                raise DataError(f"{flag} {folder.absolute()}: no such folder")
            parts[name] = read_split(CocoFile(file, (folder,)), reading, cfg.dataset)
        total.add(reading)
        bad += [Bad(name, *pair) for pair in reading.bad]
    total.stop_if_wrong()
    used = {key for split in parts.values() for key in split.phrases.prompts}
    if unused := unused_prompts(cfg.dataset, used):
        known = [str(key) for split in parts.values() for key in split.phrases.by_category]
        known += [phrase for split in parts.values() for phrase in split.phrases.numbers]
        raise ConfigError(
            f"--dataset.prompts: no category {', '.join(map(shown, unused))}; "
            f"{near(unused[0], known) or 'the phrases are ' + ', '.join(known)[:200]}"
        )
    return parts, bad, total


def places(settings: Dataset) -> dict[str, tuple[Path, Path]]:
    """Folder and annotation file of each split, whether they exist or not.

    The validation folder may be called valid or val. Where it is not set, it need not exist.
    """
    found = {"train": (Path(settings.train_img_folder), Path(settings.train_ann_file))}
    if settings.val_img_folder is None or settings.val_ann_file is None:
        return found
    folder, file = _either(settings.val_img_folder), _either(settings.val_ann_file)
    left_alone = (settings.val_img_folder, settings.val_ann_file) == (
        Dataset.val_img_folder,
        Dataset.val_ann_file,
    )
    if folder.exists() or file.exists() or not left_alone:
        found["val"] = (folder, file)
    return found


def _either(text: str) -> Path:
    """The path, or that with val for valid (or valid for val) in it, whichever exists."""
    path = Path(text)
    other = Path(*(NAMES.get(part, part) for part in path.parts))
    return other if not path.exists() and other.exists() else path


def data_root(settings: Dataset) -> Path:
    """The folder of the data set, for messages: the common one of its pictures."""
    folders = [folder.absolute() for folder, _ in places(settings).values()]
    common = Path(os.path.commonpath(folders)) if len({f.anchor for f in folders}) == 1 else None
    return folders[0] if common is None or common == Path(common.anchor) else common


# -- looking at every picture ----------------------------------------------------------------------


def look(record: Record) -> dict[str, Any]:
    """Decode a picture and all that is annotated on it, wholly; give facts about it.

    {"objects": {phrase: count}, "crowds": count, "masks": objects with a mask, "filled": objects
    whose mask is empty, "nothing": annotations that cover nothing, "apart": indices of the entries
    whose mask and box lie apart}; crowds are counted apart.

    Raises:
        DataError: anything cannot be decoded, or does not fit; a line for each.
    """
    problems: list[str] = []
    every: list[tuple[int, Instance | None]] = []
    try:
        record.pixels()
    except DataError as error:
        problems.append(str(error))
    try:
        every = record.decoded_entries()
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    instances = [one for _, one in every if one is not None]
    objects = [one for one in instances if not one.crowd]
    return {
        "objects": Counter(one.phrase for one in objects),
        "crowds": len(instances) - len(objects),
        "masks": sum(one.mask is not None for one in objects),
        "filled": sum(one.filled for one in objects),
        "nothing": len(every) - len(instances),
        "apart": [number for number, one in every if one is not None and one.lies_apart],
    }


def identity(record: Record) -> str:
    """Digest of what is annotated on a picture, wherever the data lies: 32 hexadecimal digits."""
    entries = [
        [
            one.phrase,
            one.box,
            one.shape_size,
            one.crowd,
            *([one.shape.kind, one.shape.data] if one.shape else []),
        ]
        for one in record.entries
    ]
    return digest_of(record.size, record.absent, sorted(record.partial), *entries)


LOOK: Look[Record] = Look(
    at=look,
    kind=f"sam3 record 2 PIL {PIL.__version__}",
    files=lambda record: [record.image],
    identity=identity,
)


def settled(parts: Parts, known: list[Bad], cfg: Config) -> tuple[Surveyed, list[Bad]]:
    """Facts of the good pictures, and those that are left out.

    Raises:
        DataError: there are bad ones, and they may not be left out.
    """
    report = None if cfg.dry_run else Path(cfg.logging.log_dir) / REPORT
    root = data_root(cfg.dataset)
    rules = survey.Rules(root, cfg.on_bad_sample, cfg.max_bad_fraction, report)
    records = {name: split.records for name, split in parts.items()}
    return survey.settled(records, known, LOOK, rules)


# -- counts ----------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What was found in the pictures of one split."""

    pictures: int = 0
    empty: int = 0  # pictures without any object
    objects: Counter[str] = field(default_factory=Counter)  # per phrase
    crowds: int = 0  # regions of many objects, left out
    masks: int = 0  # objects whose mask is known
    filled: int = 0  # objects with an empty mask, which is replaced by their box
    nothing: int = 0  # annotations that cover nothing, left out
    apart: str = ""  # what is said of annotations whose mask and box lie apart
    crowded: int = 0  # queries with too many objects, left out in training
    absent: int = 0  # queries for what is not there, in one epoch


def counted(
    good: Mapping[str, Sequence[Record]], parts: Parts, facts: Surveyed, cfg: Config
) -> dict[str, Counts]:
    """Counts of each split.

    Raises:
        DataError: one without pictures or objects; or without masks, if they are to be trained.
    """
    counts, problems = {}, []
    for name, split in parts.items():
        counts[name] = _counted(name, good[name], split, facts, cfg)
        if problem := _problem(name, counts[name], cfg):
            problems.append(problem)
    if problems:
        raise DataError("\n".join(problems))
    return counts


def _counted(
    name: str, records: Sequence[Record], split: Split, facts: Surveyed, cfg: Config
) -> Counts:
    counts = Counts()
    settings, phrases = cfg.dataset, list(split.phrases.numbers)
    most = settings.max_negatives if name == "train" else settings.max_val_negatives
    for record in records:
        known = facts[name, record.key]
        objects = known["objects"]
        counts.absent += min(most, len(absent(record, phrases)))
        counts.pictures += 1
        counts.empty += not objects
        counts.objects.update(objects)
        counts.crowded += len(objects) - len(usable(objects, settings.max_ann_per_img))
        for what in ("crowds", "masks", "filled", "nothing"):
            setattr(counts, what, getattr(counts, what) + known[what])
    counts.apart = note_on_apart(name, records, facts)
    return counts


def note_on_apart(name: str, records: Sequence[Record], facts: Surveyed) -> str:
    """How many masks of a split lie apart from their boxes, and the first of them; or ""."""
    apart = [(record, number) for record in records for number in facts[name, record.key]["apart"]]
    if not apart:
        return ""
    record, number = apart[0]
    shape = record.entries[number].shape
    where = shape.where if shape else one_line(record.image)
    return (
        f"{name}: {plural(len(apart), 'annotation')} whose mask and bbox do not overlap (are x and "
        f"y swapped in one of them?), the first: {where}"
    )


def _problem(name: str, counts: Counts, cfg: Config) -> str:
    """Why nothing can be done with a split, or ""."""
    file = one_line(places(cfg.dataset)[name][1].absolute())
    if not counts.pictures:
        return f"{file}: no pictures in the {name} split: add some"
    if not counts.objects:
        return (
            f"{file}: no objects in the {counts.pictures} pictures of the {name} split: does "
            '"annotations" belong to these images?'
        )
    if cfg.training.enable_segmentation and not counts.masks:
        return (
            f"{file}: none of the {counts.objects.total()} objects of the {name} split has a mask: "
            "add segmentations, or train boxes alone with --training.enable_segmentation false"
        )
    return ""


def notes_on(counts: Mapping[str, Counts], cfg: Config) -> list[str]:
    """What was passed over or repaired in decoding, a line for each kind and split."""
    most = cfg.dataset.max_ann_per_img
    lines = []
    for name, part in counts.items():
        said: list[tuple[int, str]] = [
            (part.crowds, "crowd regions left out (--dataset.keep_crowd)"),
            (part.filled, "empty masks replaced by their filled boxes"),
            (part.nothing, "annotations that cover nothing left out"),
        ]
        if name == "train":
            said.append(
                (
                    part.crowded,
                    f"queries with more than {most} objects left out (--dataset.max_ann_per_img)",
                )
            )
        if cfg.training.enable_segmentation:
            missing = part.objects.total() - part.masks
            said.append((missing, "objects without a mask: trained as boxes"))
        lines += [f"{name}: {count} {what}" for count, what in said if count]
        lines += [part.apart] if part.apart else []
    return lines


def trainable(
    records: Sequence[Record], split: Split, facts: Surveyed, cfg: Config
) -> list[Record]:
    """The training records of which something can be asked."""
    settings, phrases = cfg.dataset, list(split.phrases.numbers)
    return [
        record
        for record in records
        if usable(facts["train", record.key]["objects"], settings.max_ann_per_img)
        or (settings.max_negatives and absent(record, phrases))
    ]
