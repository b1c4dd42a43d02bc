"""What a data set holds: its splits, objects and counts, and what is wrong with it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import PIL

from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.pictures import survey
from lora_core.pictures.files import SUFFIXES, read_image
from lora_core.pictures.masks import Object, components, union
from lora_core.pictures.reading import Reading
from lora_core.pictures.survey import Facts, Surveyed, digest_of
from lora_core.report import plural
from lora_core.validate import REPORT, Bad
from sam2_lora.config import Config
from sam2_lora.formats import SPLITS, find, read
from sam2_lora.records import Record

Parts = dict[str, list[Record]]  # by split: "train", "val", "test"


class Found(NamedTuple):
    """The objects of a picture."""

    kept: list[Object]
    small: list[Object]  # fewer pixels than --min_object_area: neither learned nor scored
    nothing: int = 0  # annotations that cover no pixel, such as outlines in shares of the picture


def objects_of(record: Record, cfg: Config) -> Found:
    """Decode a record's masks and make objects of them by `cfg.objects` and `cfg.min_object_area`.

    Raises:
        DataError: a mask cannot be decoded.
    """
    items, nothing = record.decoded()
    rule = cfg.objects
    if rule == "auto":
        rule = "components" if record.merged else "annotations"
    if rule == "components":
        items = [part for item in items for part in components(item)]
    elif rule == "union":
        items = union(items)
    kept = [item for item in items if item.area >= cfg.min_object_area]
    return Found(kept, [item for item in items if item.area < cfg.min_object_area], nothing)


@dataclass
class Counts:
    """What was found in the pictures of one split."""

    pictures: int = 0
    empty: int = 0  # pictures without any annotation
    small: int = 0  # objects left out, those without a pixel among them
    nothing: int = 0  # objects without a pixel
    objects: Counter[str] = field(default_factory=Counter)  # per class


def count(facts: Iterable[Facts]) -> Counts:
    """Add up what is known of pictures."""
    counts = Counts()
    for known in facts:
        counts.pictures += 1
        counts.empty += not known["objects"] and not known["small"]
        counts.small += known["small"]
        counts.nothing += known["nothing"]
        counts.objects.update(known["objects"])
    return counts


# -- looking at every picture ----------------------------------------------------------------------


def look(record: Record, cfg: Config) -> dict[str, Any]:
    """Decode a picture and all that is annotated on it, wholly; give facts about it:
    {"objects": {class: count}, "small": count, "nothing": count}.

    Raises:
        DataError: anything cannot be decoded, or does not fit; a line for each.
    """
    problems: list[str] = []
    found = Found([], [])
    try:
        record.check_size(read_image(record.image))
    except DataError as error:
        problems.append(str(error))
    try:
        found = objects_of(record, cfg)
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return {
        "objects": Counter(item.label for item in found.kept),
        "small": len(found.small) + found.nothing,
        "nothing": found.nothing,
    }


def looking(cfg: Config) -> survey.Look[Record]:
    """How records are looked at with these settings."""
    return survey.Look(
        at=lambda record: look(record, cfg),
        kind=f"sam2 record 4 {cfg.objects} {cfg.min_object_area} PIL {PIL.__version__}",
        files=files_of,
        identity=identity,
    )


def look_at(parts: Mapping[str, Sequence[Record]], cfg: Config) -> tuple[Surveyed, list[Bad]]:
    """Facts of every good record, and the bad ones."""
    return survey.look_at(parts, looking(cfg), Path(cfg.data_root))


# -- stopping, or going on with the rest -----------------------------------------------------------


def settled(parts: Parts, known: list[Bad], cfg: Config) -> tuple[Surveyed, list[Bad]]:
    """Facts of the good pictures, and those that are left out.

    Raises:
        DataError: there are bad ones, and they may not be left out.
    """
    report = None if cfg.dry_run else Path(cfg.output_dir) / REPORT
    rules = survey.Rules(Path(cfg.data_root), cfg.on_bad_sample, cfg.max_bad_fraction, report)
    return survey.settled(parts, known, looking(cfg), rules)


def counted(parts: Parts, facts: Surveyed, cfg: Config, reading: Reading) -> dict[str, Counts]:
    """Counts of each split of what was read.

    Raises:
        DataError: a split without pictures or without objects.
    """
    root = Path(cfg.data_root).absolute()
    counts = {
        split: count(facts[split, record.key] for record in records)
        for split, records in parts.items()
    }
    for name, part in counts.items():
        if not part.pictures:
            raise DataError(f"{root}: no pictures in the {name} split: add some")
        if not part.objects and name != "test":
            where = f"the {plural(part.pictures, 'picture')} of the {name} split"
            advice = ["add pictures with objects to it"]
            if part.small > part.nothing:
                advice.append("lower --min_object_area")
            if reading.cut and any(other.objects for other in counts.values()):
                advice.append("set another --val_fraction")
            lines = [f"{root}: no objects in {where}{_without(part, cfg)}: {', or '.join(advice)}"]
            lines += [f"note: {one_line(note)}" for note in reading.said()]
            raise DataError(listing(lines, 5))
    return counts


def _without(part: Counts, cfg: Config) -> str:
    """Which annotations of a split are no objects, in brackets."""
    small = part.small - part.nothing
    found = []
    if small:
        found.append(f"{small} smaller than --min_object_area {cfg.min_object_area}")
    if part.nothing:
        found.append(
            f"{part.nothing} without a single pixel, as outlines in shares of the picture are"
        )
    return f" ({', '.join(found)})" if found else ""


# -- identity --------------------------------------------------------------------------------------


def identity(record: Record) -> str:
    """Digest of what is annotated on a picture, wherever the data lies: 32 hexadecimal digits.

    It covers the picture's size and its annotations as they were read, not the content of files.
    """
    shapes = [[shape.kind, shape.label, shape.data] for shape in record.shapes]
    return digest_of([*record.size, record.mask_kind, record.merged], *shapes)


def files_of(record: Record) -> list[Path]:
    """The picture, and the mask file if there is one."""
    return [path for path in (record.image, record.mask) if path]


# -- splits ----------------------------------------------------------------------------------------


def read_parts(cfg: Config, wanted: Sequence[str]) -> tuple[Parts, list[Bad], Reading]:
    """Records of the wanted splits, those that are known to be bad, and notes.

    Raises:
        DataError: no data, or something wrong with the data set as a whole.
        ConfigError: `cfg.dataset_size` names a subset that does not exist.
    """
    root = Path(cfg.data_root)
    kind, sources = find(root, cfg.data_format)
    if cfg.dataset_size != "full":
        sources["train"] = _subset_folder(cfg, kind)
    whole = "train" if "train" in sources else "all"
    if "train" in wanted and whole not in sources:
        names = " or ".join(SPLITS["train"])
        raise DataError(f"{root.absolute()}: the training split ({names}) is missing")
    to_split = "val" in wanted and "val" not in sources
    to_read = {*wanted, whole} if to_split or "train" in wanted else set(wanted)
    parts: Parts = {}
    bad: list[Bad] = []
    total = Reading(root)
    for name in sorted(to_read & sources.keys()):
        reading = read(sources[name], kind, root, cfg.mask_kind, cfg.follow_links)
        total.add(reading)
        parts[name] = reading.records  # bad ones too: what else is wrong with them is to be said
        bad += [Bad("train" if name == "all" else name, *pair) for pair in reading.bad]
    total.stop_if_wrong()
    if to_split and whole in parts:
        parts["train"], parts["val"] = split_by_name(parts.pop(whole), cfg.val_fraction)
        total.cut = True
        bad = _on_their_sides(bad, parts, cfg.val_fraction)
    elif whole == "all" and whole in parts:
        parts["train"] = parts.pop(whole)
    if cfg.max_val_images and "val" in parts:
        parts["val"] = subset(parts["val"], cfg.max_val_images)
    return {name: parts[name] for name in SPLITS if name in parts}, bad, total


def _subset_folder(cfg: Config, kind: str) -> Path:
    folder = Path(cfg.data_root) / "subsets" / f"{cfg.dataset_size}_subset"
    if kind != "severstal" or not folder.is_dir():
        raise ConfigError(
            f"--dataset_size {cfg.dataset_size}: {folder.absolute()}: no such folder; "
            "`sam2-lora prepare` makes the Severstal splits with their subsets"
        )
    return folder


def rank(record: Record) -> float:
    """A number in [0, 1) from a picture's file name: the same on every machine and in every run."""
    return _rank_of_name(record.image.name)


def _rank_of_name(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_name(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Training and validation records: a picture is validated if the hash of its name says so.

    A picture never changes sides when others are added. Both sides get one at least; a single
    picture is on both.

    Args:
        share: of the pictures, for validation.
    """
    chosen = {record.key for record in records if rank(record) < share}
    by_rank = sorted(records, key=rank)
    if not chosen:
        chosen = {record.key for record in by_rank[:1]}
    elif len(chosen) == len(records):
        chosen -= {by_rank[-1].key}
    held_out = [record for record in records if record.key in chosen]
    rest = [record for record in records if record.key not in chosen]
    return rest or held_out, held_out or rest


def _on_their_sides(bad: Sequence[Bad], parts: Parts, share: float) -> list[Bad]:
    """Bad samples of a training split that `split_by_name` has divided: those of its validation
    part are named so, also pictures that could not even become records."""
    sides = {record.key: side for side in ("train", "val") for record in parts[side]}

    def side(sample: str) -> str:
        path = PurePath(sample)
        held_out = path.suffix.lower() in SUFFIXES and _rank_of_name(path.name) < share
        return sides.get(sample, "val" if held_out else "train")

    return [one._replace(split=side(one.sample)) if one.split == "train" else one for one in bad]


def subset(records: Sequence[Record], count: int) -> list[Record]:
    """The `count` records whose names rank first, in their order; smaller subsets lie in larger."""
    chosen = {record.key for record in sorted(records, key=rank)[:count]}
    return [record for record in records if record.key in chosen]
