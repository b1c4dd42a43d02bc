"""`isaac-lora prepare coco`: boxes of COCO files become conversations that ask for them.

    <output>/train.json, val.json, test.json    one conversation for each picture

The pictures stay where they are: training finds them with `--image_folder <source>`. Splits of the
data set are kept. Without validation pictures, those become some whose names' hashes say so: a
picture never changes sides, whatever is added later. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option, parse
from lora_core.data_file import new_tree
from lora_core.errors import ConfigError, DataError, listing, one_line, printable
from lora_core.guards import unnamed
from lora_core.preflight import writable
from lora_core.prepared_folder import MARK, check_output
from lora_core.report import plural, say, table
from lora_core.validate import REPORT, Bad, samples, stop_or_skip, write_report

if TYPE_CHECKING:
    from isaac_lora.coco_boxes import Picture

TEXT = "Turn boxes of COCO files into conversations that ask for them."
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
LAYOUTS = """expected one of
  train/_annotations.coco.json and valid/_annotations.coco.json beside their pictures,
  annotations/instances_train.json and images/train/ (or train/),
  one .json, with the pictures in images/ or beside it"""
Parts = dict[str, list["Picture"]]  # by split


@dataclass(kw_only=True)
class Options:
    """Settings of `isaac-lora prepare coco`.

    Raises:
        ConfigError: values that cannot work, all of them.
    """

    source: str = option(MISSING, "Folder of the COCO data set.", "data")
    output: str = option("conversations", "Folder that is made.", "data")
    answer: Literal["box", "point"] = option(
        "box", "What an answer consists of: boxes, or the points in their middle.", "conversations"
    )
    question: str = option(
        "", "What is asked, {categories} for the names; empty: Perceptron's words.", "conversations"
    )
    ask_for: Literal["all", "present"] = option(
        "all",
        "Ask for all categories of the file, so that the answer says which are there, or for those "
        "that are in the picture; pictures without any are then left out.",
        "conversations",
    )
    nothing: str = option("None.", "The answer where nothing is there.", "conversations")
    val_fraction: float = option(
        0.1, "Share of pictures for validation, if the data set has none; 0: none.", "splits"
    )
    seed: int = option(0, "Another seed chooses other validation pictures.", "splits")
    overwrite: bool = option(False, "Replace the output folder, if it was made here.", "output")
    on_bad_sample: Literal["stop", "skip"] = option(
        "stop", "skip: leave bad pictures out and list them in bad_samples.jsonl.", "data"
    )
    max_bad_fraction: float = option(
        0.01, "With skip: stop when more than this share of a split is bad.", "data"
    )
    follow_links: bool = option(False, "Read files that links lead to outside of it.", "data")

    def __post_init__(self) -> None:
        problems = list(unnamed(self, ("source", "output")))
        for name in ("val_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, name) < 1:  # which NaN is not
                problems.append(f"--{name} is {getattr(self, name)}: it must be 0 <= share < 1")
        if not self.nothing.strip():
            problems.append("--nothing is empty: an empty answer cannot be learned")
        for name in ("question", "nothing"):
            if "<image>" in getattr(self, name).lower():
                problems.append(f"--{name} holds <image>: the picture is put in front of it")
        if problems:
            raise ConfigError(listing(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="isaac-lora prepare coco", description=TEXT)
    output = Path(options.output).absolute()
    writable(output.parent, f"--output {printable(options.output)}: its folder")
    rows = prepare(options)
    say(table(("file", "conversations", "without objects", "objects", "categories"), rows))
    made = {str(row[0]) for row in rows}
    words = ["--data_path", str(output / "train.json")]
    words += ["--val_data_path", str(output / "val.json")] if "val.json" in made else []
    words += ["--image_folder", str(Path(options.source).absolute())]
    say(printable(f"train on it: isaac-lora train {' '.join(map(shlex.quote, words))} ..."))
    return 0


def prepare(options: Options) -> list[tuple[object, ...]]:
    """Write the folder; returns for each file its name, conversations, those without objects,
    objects, and categories.

    Raises:
        DataError: no data, faults in it (all together), or an output that must not be replaced.
    """
    output = Path(options.output).absolute()
    refuse_foreign(output, options)
    parts, bad = read_all(options)
    sides = divided(parts, options)
    rows = [_row(split, pictures) for split, pictures in sides.items()]
    with new_tree(output) as tree:
        _write_tree(tree, sides, bad, options)
        refuse_foreign(output, options)  # again: writing takes its time
    return rows


def refuse_foreign(output: Path, options: Options) -> None:
    """Never delete what was not made here.

    Raises:
        DataError: there is something at the output that must not be replaced.
    """
    check_output(output, options.source, [f"{split}.json" for split in SPLITS], options.overwrite)


# -- reading ---------------------------------------------------------------------------------------


def read_all(options: Options) -> tuple[Parts, list[Bad]]:
    """The good pictures by split ("all": of no split), and the bad ones; notes are said.

    Raises:
        DataError: no data, or faults in it.
    """
    from isaac_lora.coco_boxes import read_boxes
    from lora_core.pictures.coco import find_coco
    from lora_core.pictures.reading import Reading

    root = Path(options.source)
    if not root.is_dir():
        raise DataError(
            f"--source {one_line(root.absolute())}: no such folder: name that of your data"
        )
    files = find_coco(root, SPLITS)
    if not files:
        raise DataError(f"{one_line(root.absolute())}: no COCO files found; {LAYOUTS}")
    total, parts, bad = Reading(root), Parts(), list[Bad]()
    for split, file in files.items():
        reading = Reading(root, options.follow_links)
        with reading.collecting():
            read_boxes(file, reading)
        total.add(reading)
        bad += [Bad(split, *pair) for pair in reading.bad]
        parts[split] = reading.good()
    total.problems = list(dict.fromkeys(total.problems))  # splits may share folders
    total.stop_if_wrong()
    if options.ask_for == "present":
        before = sum(map(len, parts.values()))
        parts = {split: [one for one in some if one.things] for split, some in parts.items()}
        if left_out := before - sum(map(len, parts.values())):
            total.notes["pictures without objects, left out (--ask_for present)"] = left_out
    for note in total.said():
        say(printable(f"note: {note}"))
    _stop_or_skip(bad, parts, options)
    return parts, bad


def _stop_or_skip(
    bad: Sequence[Bad], parts: Mapping[str, Sequence[Picture]], options: Options
) -> None:
    output, root = Path(options.output).absolute(), Path(options.source)
    report = output.with_name(f"{output.name}.{REPORT}")
    counts = {split: len(pictures) for split, pictures in parts.items()}
    stop_or_skip(bad, counts, options.on_bad_sample, options.max_bad_fraction, root, report)
    if not any(counts.values()):
        raise DataError(f"{one_line(root.absolute())}: no pictures to ask about")


# -- splits ----------------------------------------------------------------------------------------


def divided(parts: Parts, options: Options) -> Parts:
    """Pictures by "train", "val" and "test": the data set's own, and a share of train to validate.

    Raises:
        DataError: nothing to train on.
    """
    from lora_core.pictures.division import split_by_name
    from lora_core.pictures.survey import remarks

    sides = dict(parts)
    if "all" in sides:
        sides["train"] = sides.pop("all")
    if not any(picture.things for picture in sides.get("train", [])):
        raise DataError(
            f"{one_line(Path(options.source).absolute())}: no objects to train on: annotate some"
        )
    if "val" not in sides and options.val_fraction:
        sides["train"], val, note = split_by_name(
            sides["train"], options.val_fraction, options.seed
        )
        if val:
            sides["val"] = val
        if note:
            say(f"note: {note}")
    sides = {split: sides[split] for split in SPLITS if sides.get(split)}
    for note in remarks(sides):
        say(printable(f"note: {note}"))
    return sides


# -- writing ---------------------------------------------------------------------------------------


def conversation(picture: Picture, options: Options) -> dict[str, Any]:
    """The record of a picture: hint, picture and question from the user, the tags as the answer.

    Tags stand from top to bottom, then from left to right, as Perceptron's own examples do: one
    order, for what has no order could not be learned.
    """
    from isaac_lora.answers.questions import QUESTION, asking_for, question_turns
    from isaac_lora.answers.tags import from_pixels, write
    from isaac_lora.conversations.pictures import is_inside

    there = {thing.name for thing in picture.things}
    names = [name for name in picture.names if options.ask_for == "all" or name in there]
    question = asking_for(names, options.question or QUESTION)
    tags = []
    for name, (x0, y0, x1, y1) in picture.things:
        box = [(x0, y0), (x1, y1)]
        points = box if options.answer == "box" else [((x0 + x1) / 2, (y0 + y1) / 2)]
        tags.append(from_pixels(options.answer, points, picture.size, name))
    tags.sort(key=lambda tag: [(y, x) for x, y in tag.points])
    turns = [
        {"from": "human", "value": turn.text} for turn in question_turns(question, options.answer)
    ]
    answer = {"from": "gpt", "value": write(tags) or options.nothing}
    near = is_inside(Path(options.source), picture.key)  # training follows no link out of it
    image = picture.key if near else str(picture.image.absolute())
    return {"id": picture.key, "image": image, "conversations": [*turns, answer]}


def _row(split: str, pictures: Sequence[Picture]) -> tuple[object, ...]:
    """A line of the table that is printed in the end."""
    counts = [len(picture.things) for picture in pictures]
    names = {name for picture in pictures for name in picture.names}
    return f"{split}.json", len(counts), counts.count(0), sum(counts), len(names)


def _write_tree(tree: Path, sides: Parts, bad: Sequence[Bad], options: Options) -> None:
    """Write the files of all splits into a new folder.

    Raises:
        OSError: something cannot be written.
    """
    tree.mkdir()
    for split, pictures in sides.items():
        records = [conversation(picture, options) for picture in pictures]
        text = json.dumps(records, indent=1, ensure_ascii=False)
        (tree / f"{split}.json").write_text(text + "\n", encoding="utf-8")
    facts = {"answer": options.answer, "seed": options.seed, "val_fraction": options.val_fraction}
    (tree / MARK).write_text(json.dumps(facts) + "\n", encoding="ascii")
    if bad:
        write_report(tree / REPORT, bad)
        say(f"note: {plural(len(samples(bad)), 'bad sample')} left out: see {REPORT} in the output")
