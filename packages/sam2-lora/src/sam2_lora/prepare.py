"""`sam2-lora prepare`: any data set that is read, written as the Severstal split layout.

    <output>/{train,val,test}_split/img/x.jpg and ann/x.jpg.json
    <output>/subsets/{500,1000,2000}_subset/{img,ann}/

Splits follow from the pictures' names, so every run and every machine makes the same. The tree
appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option, parse
from lora_core.data_file import new_tree
from lora_core.errors import ConfigError, DataError, one_line, printable
from lora_core.guards import unnamed
from lora_core.preflight import writable
from lora_core.report import plural, say, table
from lora_core.validate import REPORT, Bad, samples, stop_or_skip, write_report
from sam2_lora.config import Config, DataFormat, MaskKind, ObjectRule

if TYPE_CHECKING:
    from sam2_lora.records import Record

TEXT = "Bring a data set into the Severstal split layout."


@dataclass
class Options:
    """Settings of `sam2-lora prepare`."""

    source: str = field(
        metadata={
            "help": "Folder of the data: Kaggle's train.csv + train_images/, a COCO json, "
            "images/ + masks/, or Supervisely.",
            "group": "data",
        }
    )
    output: str = option(Config.data_root, "Folder that is made.", "data")
    data_format: DataFormat = option("auto", "As in training.", "data")
    mask_kind: MaskKind = option("auto", "As in training.", "data")
    objects: ObjectRule = option("auto", "What becomes one object: as in training.", "data")
    test_share: float = option(
        0.16, "Share of pictures for the test split, if the data is not split yet.", "splits"
    )
    val_share: float = option(
        0.1, "Share of pictures for validation, if the data has none yet.", "splits"
    )
    subsets: list[int] = field(
        default_factory=lambda: [500, 1000, 2000],
        metadata={
            "help": "Sizes of the training subsets; each lies in the larger ones.",
            "group": "splits",
        },
    )
    on_bad_sample: Literal["stop", "skip"] = option(
        Config.on_bad_sample,
        "As in training; skip: listed in the output's bad_samples.jsonl.",
        "data",
    )
    max_bad_fraction: float = option(Config.max_bad_fraction, "As in training.", "data")
    follow_links: bool = option(Config.follow_links, "As in training.", "data")
    overwrite: bool = option(False, "Replace the output folder if it exists.", "data")

    def __post_init__(self) -> None:
        if empty := list(unnamed(self, ("source", "output"))):
            raise ConfigError("\n".join(empty))
        if not 0 < self.val_share < 1:
            raise ConfigError(f"--val_share is {self.val_share}: it must be between 0 and 1")
        if not 0 <= self.test_share < 1 - self.val_share:
            raise ConfigError(
                f"--test_share is {self.test_share}: with --val_share {self.val_share} it must be "
                "0 or more and leave pictures for training"
            )
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(
                f"--max_bad_fraction is {self.max_bad_fraction}: it must be 0 <= share < 1"
            )
        if any(count < 1 for count in self.subsets):
            raise ConfigError(f"--subsets is {self.subsets}: sizes must be at least 1")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the process exit code."""
    options = parse(Options, argv, prog="sam2-lora prepare", description=TEXT)
    writable(options.output, "--output")

    output = Path(options.output)
    made = prepare(options)
    say(table(("folder", "pictures"), sorted(made.items())))
    for size in options.subsets:
        if f"subsets/{size}_subset" not in made:
            say(f"note: no subset of {size}: the training split is not larger")
    say(f"-> {output.absolute()}")
    return 0


def prepare(options: Options) -> dict[str, int]:
    """Write the tree; returns the number of pictures in each of its folders.

    Raises:
        DataError: no data, faults in it, or an output folder that exists.
    """
    output = Path(options.output).absolute()
    _check_output(output, options)
    parts, bad, notes = read_parts(options)
    for note in notes:
        say(printable(f"note: {note}"))
    with new_tree(output) as tree:
        made = write_tree(tree, parts, options)
        if bad:
            write_report(tree / REPORT, bad)
            left_out = plural(len(samples(bad)), "bad sample")
            say(f"note: {left_out} left out: see {output / REPORT}")
    return made


def _check_output(output: Path, options: Options) -> None:
    """Never delete what was not made here.

    Raises:
        DataError: the folder exists, or a file of its name, and must not be replaced.
    """
    if not output.exists():
        return
    if not options.overwrite:
        raise DataError(f"{output} exists: add --overwrite, or choose another --output")
    if not output.is_dir():
        raise DataError(f"{output} is a file, which is not replaced: choose another --output")
    if Path(options.source).resolve().is_relative_to(output.resolve()):
        raise DataError(f"{output} holds the --source: choose another --output")
    known = {"train_split", "val_split", "test_split", "subsets", REPORT}
    strange = sorted({path.name for path in output.iterdir()} - known)
    if strange:
        raise DataError(f"{output} holds {strange[0]!r}, which is not replaced: remove it first")


def read_parts(options: Options) -> tuple[dict[str, list[Record]], list[Bad], list[str]]:
    """Records of "train", "val" and "test", bad ones, and notes; splits of the data are kept.

    Raises:
        DataError: no data, or faults in it.
    """
    from lora_core.pictures.reading import Reading
    from sam2_lora.formats import find, read
    from sam2_lora.survey import look_at, split_by_name

    root = Path(options.source)
    kind, sources = find(root, options.data_format)
    total = Reading(root)
    parts, bad = {}, []
    for name, source in sources.items():
        reading = read(source, kind, root, options.mask_kind, options.follow_links)
        total.add(reading)
        parts[name] = reading.good()
        bad += [Bad(name, *pair) for pair in reading.bad]
    total.stop_if_wrong()
    facts, found = look_at(parts, _settings(options))
    bad += found
    parts = {
        name: [record for record in records if (name, record.key) in facts]
        for name, records in parts.items()
    }
    good = {name: len(records) for name, records in parts.items()}
    report = Path(options.output).with_name(f"{Path(options.output).name}.{REPORT}")
    stop_or_skip(bad, good, options.on_bad_sample, options.max_bad_fraction, root, report)
    if not any(parts.values()):
        raise DataError(f"{root.absolute()}: no pictures")
    if "all" in parts:
        parts["train"] = parts.pop("all")
        if options.test_share and "test" not in parts:
            parts["train"], parts["test"] = split_by_name(parts["train"], options.test_share)
    if "val" not in parts and "train" in parts:
        # The names that rank lowest are in the test split already.
        taken = options.test_share if "all" in sources and "test" not in sources else 0
        parts["train"], parts["val"] = split_by_name(parts["train"], taken + options.val_share)
    return parts, bad, total.said()


def _settings(options: Options) -> Config:
    """What of the settings of training matters here: objects of every size are kept."""
    return Config(data_root=options.source, objects=options.objects, min_object_area=0)


def write_tree(folder: Path, parts: dict[str, list[Record]], options: Options) -> dict[str, int]:
    """Write pictures and annotations of all splits; returns how many pictures each folder has.

    Raises:
        DataError: a mask cannot be decoded, or two pictures of a split have the same name.
    """
    from sam2_lora.survey import subset

    made = {}
    for name, records in parts.items():
        split = f"{name}_split"
        made[split] = len(records)
        for kind in ("img", "ann"):
            (folder / split / kind).mkdir(parents=True)
        for record in records:
            _write_pair(folder / split, record, options)
    train = parts.get("train", [])
    for size in options.subsets:
        if size >= len(train):
            continue
        name = f"subsets/{size}_subset"
        made[name] = size
        for kind, suffix in (("img", ""), ("ann", ".json")):
            (folder / name / kind).mkdir(parents=True)
            for record in subset(train, size):
                file = f"{kind}/{record.image.name}{suffix}"
                _link(folder / "train_split" / file, folder / name / file)
    return made


def _write_pair(split: Path, record: Record, options: Options) -> None:
    picture = split / "img" / record.image.name
    if picture.exists():
        raise DataError(
            f"{one_line(record.image)}: another picture of its split has the same name, and all go "
            "to one folder: rename one of them"
        )
    shutil.copyfile(record.image, picture)
    text = json.dumps(annotation(record, options), ensure_ascii=False)
    (split / "ann" / f"{picture.name}.json").write_text(text + "\n", encoding="utf-8")


def annotation(record: Record, options: Options) -> dict[str, Any]:
    """A record as Supervisely JSON: one bitmap for each object, also the smallest."""
    from lora_core.pictures.encodings import encode_bitmap
    from sam2_lora.survey import objects_of

    height, width = record.size
    objects = []
    for item in objects_of(record, _settings(options)).kept:
        data, origin = encode_bitmap(item)
        objects.append(
            {
                "geometryType": "bitmap",
                "classTitle": item.label,
                "tags": [],
                "bitmap": {"data": data, "origin": list(origin)},
            }
        )
    size = {"height": height, "width": width}
    return {"description": "", "tags": [], "size": size, "objects": objects}


def _link(existing: Path, new: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(existing, new)
    except OSError:
        shutil.copyfile(existing, new)
