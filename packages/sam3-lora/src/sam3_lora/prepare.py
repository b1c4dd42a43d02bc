"""`sam3-lora prepare`: a data set in another form becomes the folder that training reads.

    <output>/{train,valid,test}/ with pictures and _annotations.coco.json

Splits of the data set are kept. Without validation pictures, those become some whose names' hashes
say so: a picture never changes sides, whatever is added later. The folder appears complete or not
at all.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.data_file import new_tree
from lora_core.errors import ConfigError, DataError, printable
from lora_core.preflight import writable
from lora_core.prepared_folder import MARK, check_output
from lora_core.report import plural, say, table
from lora_core.validate import REPORT, Bad, samples, stop_or_skip, write_report

if TYPE_CHECKING:
    from lora_core.pictures.survey import Surveyed
    from sam3_lora.formats.annotated import Part

TEXT = "Turn a YOLO, Pascal VOC, LVIS, COCO or mask data set into the folder that training reads."
SPLITTABLE = ("yolo", "voc", "masks")  # whose splits share their classes


@dataclass
class Options:
    """Settings of `sam3-lora prepare`."""

    source: str = option(MISSING, "Folder of the data set.", "data")
    output: str = option("data", "Folder that is made.", "data")
    format: Literal["auto", "yolo", "voc", "lvis", "masks", "coco"] = option(
        "auto", "Form of the data set; auto: what its files say.", "data"
    )
    mask_kind: Literal["auto", "binary", "instances", "labels"] = option(
        "auto",
        "What the values of mask files mean: 0 and one other, a number per object, or a number "
        "per class; auto takes what is plainly black and white as binary.",
        "data",
    )
    names: list[str] = option(
        [],
        "What mask files show, in words: one name, or value=name for each class of label masks.",
        "data",
    )
    val_fraction: float = option(
        0.1, "Share of pictures for validation, if the data set has none; 0: none.", "splits"
    )
    seed: int = option(0, "Another seed chooses other validation pictures.", "splits")
    copy: bool = option(
        False, "Copy the pictures; without --link this is done in any case.", "output"
    )
    link: bool = option(
        False,
        "Hard-link the pictures instead: no room is needed, and a change in one place is one in "
        "the other. On another disk they are copied.",
        "output",
    )
    overwrite: bool = option(False, "Replace the output folder, if it was made here.", "output")
    on_bad_sample: Literal["stop", "skip"] = option(
        "stop", "skip: leave bad pictures out and list them in bad_samples.jsonl.", "data"
    )
    max_bad_fraction: float = option(
        0.01, "With skip: stop when more than this share of a split is bad.", "data"
    )
    follow_links: bool = option(False, "Read files that links lead to outside of it.", "data")

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:  # which NaN is not
            raise ConfigError(f"--val_fraction is {self.val_fraction}: it must be 0 <= share < 1")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(
                f"--max_bad_fraction is {self.max_bad_fraction}: it must be 0 <= share < 1"
            )
        if self.copy and self.link:
            raise ConfigError("--copy and --link: give one of them")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam3-lora prepare` with these words; returns the exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="sam3-lora prepare", description=TEXT)
    output = Path(options.output).absolute()
    writable(output.parent, "--output")
    rows = prepare(options)
    say(table(("folder", "pictures", "empty", "objects", "with mask", "classes"), rows))
    say(f"-> {printable(output)}")
    if output != Path(Options.output).absolute():
        say(f"train on it: sam3-lora train {_flags(output, rows)}")
    return 0


def _flags(output: Path, rows: Sequence[tuple[object, ...]]) -> str:
    """The flags with which training finds a folder that is not called data."""
    from lora_core.pictures.coco import ROBOFLOW

    words = []
    made = {row[0] for row in rows}
    for split, name in (("train", "train"), ("val", "valid")):
        folder = output / name if name in made else None
        file = folder / ROBOFLOW if folder else None
        words += [f"--dataset.{split}_img_folder", shlex.quote(str(folder or "null"))]
        words += [f"--dataset.{split}_ann_file", shlex.quote(str(file or "null"))]
    return printable(" ".join(words))


def prepare(options: Options) -> list[tuple[object, ...]]:
    """Write the folder; returns for each split its name, pictures, pictures without objects,
    objects, objects with a mask, and classes.

    Raises:
        DataError: no data, faults in it (all together), or an output that must not be replaced.
    """
    from sam3_lora.formats.numbering import numbered

    output = Path(options.output).absolute()
    refuse_foreign(output, options)
    found = read_all(options)
    sides, numbers = divided(found, options), numbered(found.parts)
    rows = [_row(split, part, found) for split, part in sides.items()]
    with new_tree(output) as tree:
        _write_tree(tree, sides, numbers, found, options)
        refuse_foreign(output, options)  # again: writing takes its time
    return rows


def refuse_foreign(output: Path, options: Options) -> None:
    """Never delete what was not made here.

    Raises:
        DataError: there is something at the output that must not be replaced.
    """
    from sam3_lora.layout import FOLDERS, strangers

    check_output(output, options.source, FOLDERS.values(), options.overwrite, strangers)


# -- reading ---------------------------------------------------------------------------------------


@dataclass
class Found:
    """What the source holds.

    Attributes:
        parts: by the source's own splits; "all" without any.
        facts: of every good picture, by split and key.
    """

    form: str
    parts: dict[str, Part]
    facts: Surveyed
    bad: list[Bad]
    file_names: dict[str, dict[Path, str]]  # by split

    def origin(self, split: str) -> str:
        """The split of the source that the pictures of a split of the output come from."""
        return next(name for name in (split, "train", "all") if name in self.parts)


def read_all(options: Options) -> Found:
    """Read the source and look at every picture and annotation; notes are said.

    Raises:
        DataError: no data, or faults in it.
    """
    from lora_core.pictures.reading import Reading
    from lora_core.pictures.survey import look_at
    from sam3_lora.formats import find, read
    from sam3_lora.layout import check_name, file_names
    from sam3_lora.survey import LOOK, note_on_apart

    root = Path(options.source)
    form, sources = find(root, options.format)
    total = Reading(root)
    parts: dict[str, Part] = {}
    bad: list[Bad] = []
    notes: list[str] = []
    names = {}
    for split, source in sources.items():
        reading = Reading(root, options.follow_links)
        part = read(source, form, reading, options.mask_kind, tuple(options.names))
        names[split] = file_names(part.records)
        for record in part.records:
            with reading.collecting(sample=record.key):
                check_name(names[split][record.image])
        total.add(reading)
        notes += part.notes
        bad += [Bad(split, *pair) for pair in reading.bad]
        wrong = {sample for sample, _ in reading.bad}
        parts[split] = part._replace(records=[r for r in part.records if r.key not in wrong])
    total.problems = list(dict.fromkeys(total.problems))  # splits may share folders
    total.stop_if_wrong()
    facts, found = look_at({split: part.records for split, part in parts.items()}, LOOK, root)
    bad += found
    good = {
        split: part._replace(records=[r for r in part.records if (split, r.key) in facts])
        for split, part in parts.items()
    }
    _stop_or_skip(bad, good, options)
    apart = [note_on_apart(split, part.records, facts) for split, part in good.items()]
    for note in [*notes, *total.said(), *filter(None, apart)]:
        say(printable(f"note: {note}"))
    return Found(form, _with_all_classes(good, form), facts, bad, names)


def _stop_or_skip(bad: Sequence[Bad], good: Mapping[str, Part], options: Options) -> None:
    output = Path(options.output).absolute()
    report = output.with_name(f"{output.name}.{REPORT}")
    counts = {split: len(part.records) for split, part in good.items()}
    root = Path(options.source)
    stop_or_skip(bad, counts, options.on_bad_sample, options.max_bad_fraction, root, report)
    if not any(counts.values()):
        raise DataError(f"{root.absolute()}: no pictures")


def _with_all_classes(parts: Mapping[str, Part], form: str) -> dict[str, Part]:
    """Splits that were annotated for the same classes have all of them, those of COCO files their
    own: what nobody looked for is not known to be absent."""
    if form not in SPLITTABLE:
        return dict(parts)
    from sam3_lora.formats.numbering import numbered

    every = numbered(parts)
    if form == "voc":  # whose splits numbered what each of them has
        every = {name: number for number, name in enumerate(sorted(every), start=1)}
    return {split: part._replace(numbers=every) for split, part in parts.items()}


# -- splits ----------------------------------------------------------------------------------------


def divided(found: Found, options: Options) -> dict[str, Part]:
    """Parts by "train", "val" and "test": the source's own, and a share of train for validation.

    Raises:
        DataError: a split that training refuses, because it has no pictures or objects.
    """
    from lora_core.pictures.division import split_by_name
    from lora_core.pictures.survey import remarks

    sides = dict(found.parts)
    if "all" in sides:
        sides["train"] = sides.pop("all")
    if "train" in sides and "val" not in sides and options.val_fraction:
        part = sides["train"]
        train, val, note = split_by_name(part.records, options.val_fraction, options.seed)
        sides["train"] = part._replace(records=train)
        if val:
            sides["val"] = part._replace(records=val)
        if note:
            say(f"note: {note}")
    sides = {split: sides[split] for split in ("train", "val", "test") if split in sides}
    for split in ("train", "val"):
        if split == "train" or split in sides:
            _check_usable(split, sides.get(split), options)
    for note in remarks({split: part.records for split, part in sides.items()}):
        say(printable(f"note: {note}"))
    return sides


def _check_usable(split: str, part: Part | None, options: Options) -> None:
    """Insist on what training insists on."""
    root = Path(options.source).absolute()
    if part is None or not part.records:
        raise DataError(f"{root}: no {split} pictures: add some")
    if not any(not entry.crowd for record in part.records for entry in record.entries):
        raise DataError(
            f"{root}: no objects in the {len(part.records)} {split} pictures, and training needs "
            "some: annotate more, or choose another --val_fraction or --seed"
        )


# -- writing ---------------------------------------------------------------------------------------


def _row(split: str, part: Part, found: Found) -> tuple[object, ...]:
    """A line of the table that is printed in the end."""
    from sam3_lora.layout import FOLDERS

    own = found.origin(split)
    facts = [found.facts[own, record.key] for record in part.records]
    counts = [sum(one["objects"].values()) for one in facts]
    masks = sum(one["masks"] for one in facts)
    return FOLDERS[split], len(counts), counts.count(0), sum(counts), masks, len(part.numbers)


def _write_tree(
    tree: Path,
    sides: Mapping[str, Part],
    numbers: Mapping[str, int],
    found: Found,
    options: Options,
) -> None:
    """Write all splits below a new folder.

    Raises:
        OSError: something cannot be written.
    """
    from sam3_lora.layout import FOLDERS, write_split

    tree.mkdir()
    copied = 0
    for split, part in sides.items():
        names = found.file_names[found.origin(split)]
        classes = {name: numbers[name] for name in part.numbers}
        copied += write_split(tree / FOLDERS[split], part.records, names, classes, options.link)
    if options.link and copied:
        say(f"note: {plural(copied, 'picture')} copied, which could not be linked")
    facts = {"format": found.form, "seed": options.seed, "val_fraction": options.val_fraction}
    (tree / MARK).write_text(json.dumps(facts) + "\n", encoding="ascii")
    if found.bad:
        write_report(tree / REPORT, found.bad)
        say(f"note: {len(samples(found.bad))} bad samples are left out: see {REPORT} in the output")
