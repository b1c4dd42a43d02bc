"""`sam2-lora evaluate`: IoU and Dice of a base model, and of an adapter on it.

Prints a table with the base beside the adapter, appends one row per model to `evaluation.csv`,
writes all figures to `<exp_id>.json`, and overlays of some pictures.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError
from lora_core.guards import unnamed
from lora_core.preflight import writable
from sam2_lora.config import Config, DataFormat, MaskKind, ObjectRule
from sam2_lora.evaluation_files import COLUMNS as COLUMNS
from sam2_lora.evaluation_files import csv_rows, write
from sam2_lora.model_options import ModelOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sam2_lora.data import EvalRecord, EvalSet
    from sam2_lora.predictor import Predictor

TABLE = {
    "iou": "IoU 1 click", "dice": "Dice", "box_iou": "IoU box", "click3_iou": "+3 clicks",
    "click5_iou": "+5 clicks", "iou_ge_50": ">=0.50", "iou_ge_75": ">=0.75", "iou_ge_90": ">=0.90",
    "iou_ge_95": ">=0.95", "precision": "precision", "recall": "recall",
}  # fmt: skip
CAPTIONS = {"base": "base", "lora": "LoRA", "model": "model"}
TIMED_PICTURES = 20
NAME_BYTES = 100  # of each half of an overlay's file name, of at most 255 in all


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `sam2-lora evaluate`."""

    data_root: str = option(Config.data_root, "As in training: the folder of the splits.", "data")
    split: Literal["test", "val"] = option("test", "Which pictures to score.", "data")
    max_images: int = option(0, "Score a fixed subset of this many pictures; 0 is all.", "data")
    data_format: DataFormat = option("auto", "As in training.", "data")
    mask_kind: MaskKind = option("auto", "As in training.", "data")
    objects: ObjectRule = option("auto", "As in training.", "data")
    min_object_area: int = option(Config.min_object_area, "As in training.", "data")
    val_fraction: float = option(
        Config.val_fraction, "As in training, for data without a validation split.", "data"
    )
    on_bad_sample: Literal["stop", "skip"] = option("stop", "As in training.", "data")
    max_bad_fraction: float = option(Config.max_bad_fraction, "As in training.", "data")
    follow_links: bool = option(Config.follow_links, "As in training.", "data")
    compare_base: bool = option(True, "With --adapter: score the base model too.", "output")
    examples: int = option(8, "Overlays of so many pictures: base, LoRA, truth.", "output")
    exp_id: str | None = option(
        None, "Name of this evaluation; default: the adapter's or model's.", "output"
    )
    output_dir: str = option(
        "evaluation", "Folder for evaluation.csv, the JSON and overlays.", "output"
    )

    def __post_init__(self) -> None:
        for name in ("examples", "max_images"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} is {getattr(self, name)}: it must not be negative")
        if empty := list(unnamed(self, ["adapter"])):
            raise ConfigError("\n".join(empty))
        self.config()  # raises what training would raise

    def config(self) -> Config:
        """The settings that reading the data needs."""
        return Config(
            checkpoint=self.checkpoint,
            data_root=self.data_root,
            data_format=self.data_format,
            mask_kind=self.mask_kind,
            objects=self.objects,
            min_object_area=self.min_object_area,
            val_fraction=self.val_fraction,
            on_bad_sample=self.on_bad_sample,
            max_bad_fraction=self.max_bad_fraction,
            follow_links=self.follow_links,
            output_dir=self.output_dir,
            image_size=self.image_size or "1024",
            precision=self.precision,
            device=self.device,
        )

    @property
    def name(self) -> str:
        """The evaluation's name, fit for a file."""
        given = self.exp_id or Path(self.adapter or self.checkpoint).stem
        name = re.sub(r"[^\w.+-]+", "_", given).strip("._")
        return name.encode()[:NAME_BYTES].decode(errors="ignore") or "evaluation"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the process exit code."""
    options = parse(Options, argv, prog="sam2-lora evaluate", description="Score a model on masks.")
    writable(options.output_dir, "--output_dir")

    from lora_core.report import say

    pictures = load_pictures(options)
    predictor = options.predictor()
    figures = score(predictor, pictures, options)
    say("\n".join([report(figures), *(f"note: {note}" for note in pictures.notes)]))
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, figures, csv_rows(predictor, figures, options), options)
    if options.examples:
        write_examples(folder, predictor, pictures, options)
    say(f"evaluation.csv, {options.name}.json and overlays -> {folder.absolute()}")
    return 0


def load_pictures(options: Options) -> EvalSet:
    """The pictures to score.

    Raises:
        DataError: faults in the data, or no such split.
    """
    from sam2_lora.data import EvalSet, load_split
    from sam2_lora.survey import subset

    pictures = load_split(options.config(), options.split)
    if pictures is None:
        other = "val" if options.split == "test" else "test"
        root = Path(options.data_root).absolute()
        raise DataError(f"{root} has no {options.split} split: try --split {other}")
    if options.max_images:
        chosen = subset(pictures.records, options.max_images)
        return EvalSet(chosen, options.config(), pictures.notes)
    return pictures


def score(predictor: Predictor, pictures: EvalSet, options: Options) -> dict[str, dict[str, float]]:
    """Figures of each model: "base" and "lora", or "model" when there is no adapter."""
    from sam2_lora.metrics import evaluate

    figures = {}
    for name in _models(options):
        with _only(predictor, name):
            figures[name] = evaluate(predictor.model, pictures, options.config())
            figures[name]["seconds_per_picture"] = seconds_per_picture(predictor, pictures)
    return figures


def _models(options: Options) -> list[str]:
    if not options.adapter:
        return ["model"]
    return ["base", "lora"] if options.compare_base else ["lora"]


@contextmanager
def _only(predictor: Predictor, name: str) -> Iterator[None]:
    """The adapter is off inside for the base."""
    from lora_core.injection import adapters_off

    if name != "base":
        yield
        return
    with adapters_off(predictor.model):
        yield


def seconds_per_picture(predictor: Predictor, pictures: EvalSet) -> float:
    """Wall time to encode one picture and segment its objects from a click each.

    Mean over the first pictures after one that warms up; NaN with fewer than two.
    """
    from sam2_lora.prompts import center_click

    times = []
    for record in islice(pictures, TIMED_PICTURES + 1):
        clicks = [[center_click(item.mask).xy] for item in record.objects]
        start = time.perf_counter()
        predictor.set_image(record.rgb)
        if clicks:
            predictor.predict(points=clicks)
        times.append(time.perf_counter() - start)
    return sum(times[1:]) / len(times[1:]) if len(times) > 1 else math.nan


def report(figures: dict[str, dict[str, float]]) -> str:
    """The table for people, with the filled box as the row that needs no model at all."""
    from lora_core.report import plural, table

    first = next(iter(figures.values()))
    boxes = [f"{first['filled_box_iou']:.4f}" if key == "box_iou" else "" for key in TABLE]
    rows = [["filled box", *boxes]]
    for name, values in figures.items():
        rows.append([CAPTIONS[name], *(f"{values[key]:.4f}" for key in TABLE)])
    lines = [table(["", *TABLE.values()], rows)]
    objects = plural(round(first["objects"]), "object")
    lines.append(f"{objects} in {plural(round(first['images']), 'picture')}")
    if first["empty_images"]:
        alarms = ", ".join(
            f"{values['false_positive_images']:.0f} ({CAPTIONS[name]})"
            for name, values in figures.items()
        )
        lines.append(
            f"without objects: {plural(round(first['empty_images']), 'picture')}; the automatic "
            f"grid finds some in {alarms}"
        )
    if text := worse(figures):
        lines.append(text)
    for name, values in figures.items():
        classes = {key: value for key, value in values.items() if key.startswith("class_iou/")}
        if classes:
            text = "  ".join(
                f"{key.partition('/')[2]} {value:.4f}" for key, value in classes.items()
            )
            lines.append(f"IoU per class, {CAPTIONS[name]}: {text}")
    return "\n".join(lines)


def worse(figures: dict[str, dict[str, float]]) -> str:
    """A warning where the adapter did harm; "" where it did not, or without both figures."""
    if not {"base", "lora"} <= figures.keys():
        return ""
    loss = figures["base"]["iou"] - figures["lora"]["iou"]
    if not loss > 0:
        return ""
    return f"warning: with the adapter the IoU is {loss:.4f} lower than the base's"


# -- overlays ------------------------------------------------------------------------------------


def write_examples(folder: Path, predictor: Predictor, pictures: EvalSet, options: Options) -> None:
    """Overlays of the first pictures that hold objects."""
    from lora_core.pictures.overlay import save

    taken: set[str] = set()
    for record in islice((record for record in pictures if record.objects), options.examples):
        sheet = compare(predictor, record, [CAPTIONS[name] for name in _models(options)])
        save(folder / f"{options.name}_{_slug(record.key, taken)}.png", sheet)


def _slug(key: str, taken: set[str]) -> str:
    """A picture's key as the end of a file name, and another one for each picture.

    Args:
        key: path below the data, of any length and with any letters.
        taken: the names given so far; this one is added.
    """
    text = re.sub(r"[^\w+-]+", "_", str(Path(key).with_suffix("")))
    stem = text.encode()[-NAME_BYTES:].decode(errors="ignore")
    found, number = stem, 1
    while found.casefold() in taken:
        number += 1
        found = f"{stem}_{number}"
    taken.add(found.casefold())
    return found


def compare(predictor: Predictor, record: EvalRecord, models: Sequence[str]) -> NDArray[np.uint8]:
    """Panels of one picture: each model's masks from one click per object, and the truth.

    Args:
        predictor: the network.
        record: a picture with at least one object.
        models: captions in order; "base" switches the adapter off.

    Returns:
        uint8 [H, W, 3].
    """
    import numpy as np
    import torch

    from lora_core.pictures.overlay import draw, panels
    from sam2_lora.metrics import Tally
    from sam2_lora.prompts import center_click

    truth = np.stack([item.mask for item in record.objects])
    clicks = [center_click(mask).xy for mask in truth]
    sheets = []
    for name in models:
        with _only(predictor, name):
            predictor.set_image(record.rgb)
            masks = predictor.predict(points=[[xy] for xy in clicks]).masks
        tally = Tally()
        tally.add(torch.from_numpy(masks), torch.from_numpy(truth))
        caption = f"{name}: IoU {tally.summary()['iou']:.2f}"
        sheets.append((caption, draw(record.rgb, masks, points=clicks)))
    return panels([*sheets, ("truth", draw(record.rgb, truth))], record.key)
