"""`sam3-lora evaluate`: scores of a base model on COCO annotations, and of an adapter on it.

Prints a table with the base beside the adapter, finds the best threshold of each, and writes
`evaluation.json` and overlays of some pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing, one_line
from lora_core.guards import count_problem
from lora_core.preflight import writable
from sam3_lora.config import Config, Dataset, Logging
from sam3_lora.model_options import ModelOptions

if TYPE_CHECKING:
    from sam3_lora.calibration import Calibration
    from sam3_lora.data import EvalRecord, ValSet
    from sam3_lora.evaluation_data import Pictures
    from sam3_lora.predictor import Predictor

RESULTS = "evaluation.json"
AS_IN_TRAINING = "As --dataset.{} in training."


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `sam3-lora evaluate`."""

    img_folder: str = option(MISSING, "Folder of the pictures.", "data")
    ann_file: str | None = option(
        None, "Their COCO JSON; default: _annotations.coco.json in the folder.", "data"
    )
    masks: bool | None = option(
        None, "Score masks beside boxes; default: if any are annotated.", "data"
    )
    max_images: int = option(0, "Score a fixed subset of this many pictures; 0: all.", "data")
    max_negatives: int = option(
        Dataset.max_val_negatives,
        "Absent phrases asked for per picture; as --dataset.max_val_negatives in training.",
        "data",
    )
    prompts: list[str] = option([], AS_IN_TRAINING.format("prompts"), "data")
    phrase: str = option(Dataset.phrase, AS_IN_TRAINING.format("phrase"), "data")
    clean_names: bool = option(Dataset.clean_names, AS_IN_TRAINING.format("clean_names"), "data")
    keep_placeholder_category: bool = option(
        Dataset.keep_placeholder_category,
        AS_IN_TRAINING.format("keep_placeholder_category"),
        "data",
    )
    keep_crowd: bool = option(Dataset.keep_crowd, AS_IN_TRAINING.format("keep_crowd"), "data")
    follow_links: bool = option(Dataset.follow_links, AS_IN_TRAINING.format("follow_links"), "data")
    on_bad_sample: Literal["stop", "skip"] = option("stop", "As in training.", "data")
    max_bad_fraction: float = option(Config.max_bad_fraction, "As in training.", "data")
    compare_base: bool = option(True, "With --adapter: score the base model too.", "output")
    absent_images: int = option(
        50,
        "Pictures, at most 50, that are asked for 50 concepts which are hardly there: how often "
        "something is found; 0: none.",
        "output",
    )
    examples: int = option(8, "Overlays of so many pictures: base, LoRA, truth.", "output")
    output: str = option("evaluation", "Folder for evaluation.json and overlays.", "output")
    overwrite: bool = option(False, "Replace an evaluation that is there.", "output")

    def __post_init__(self) -> None:
        problems = [
            text
            for name in ("max_images", "absent_images", "examples", "max_negatives")
            for text in count_problem(self, name, 0)
        ]
        if self.absent_images > 50:
            problems.append(f"--absent_images is {self.absent_images}: it must be at most 50")
        try:
            self.input_size()
            self.config()  # raises what training would raise
        except ConfigError as error:
            problems.append(str(error).replace("--dataset.", "--"))
        if problems:
            raise ConfigError(listing(problems))

    def config(self) -> Config:
        """The settings that reading the data needs; the pictures are its validation split."""
        file = self.ann_file or str(Path(self.img_folder) / "_annotations.coco.json")
        data = Dataset(
            train_img_folder=self.img_folder,
            train_ann_file=file,
            val_img_folder=self.img_folder,
            val_ann_file=file,
            max_val_negatives=self.max_negatives,
            phrase=self.phrase,
            prompts=self.prompts,
            clean_names=self.clean_names,
            keep_placeholder_category=self.keep_placeholder_category,
            keep_crowd=self.keep_crowd,
            follow_links=self.follow_links,
        )
        return Config(
            dataset=data,
            on_bad_sample=self.on_bad_sample,
            max_bad_fraction=self.max_bad_fraction,
            logging=Logging(log_dir=self.output),
        )

    @property
    def models(self) -> list[str]:
        """Captions of what is scored: base and LoRA, or one model."""
        if not self.adapter:
            return ["model"]
        return ["base", "LoRA"] if self.compare_base else ["LoRA"]


@dataclass
class Result:
    """What was measured of one model.

    Attributes:
        figures: by name, as in training, and `absent_FPR`.
        categories: AP of each phrase, of masks ("segm") and boxes ("bbox").
        calibration: its best threshold, by masks where they are scored.
        notes: what to know about the figures.
    """

    figures: dict[str, float]
    categories: dict[str, dict[str, float]]
    calibration: Calibration | None
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the process exit code."""
    options = parse(
        Options, argv, prog="sam3-lora evaluate", description="Score a model on COCO annotations."
    )
    pictures = ready(options)

    from lora_core.report import say
    from lora_core.validate import REPORT, write_report
    from sam3_lora.evaluation_report import report, write
    from sam3_lora.model import image_size

    predictor = options.predictor()
    val = pictures.set_for(image_size(predictor.model))
    pictures.notes += notes_on(predictor, pictures, options)
    results = {name: measured(predictor, name, val, pictures, options) for name in options.models}
    say(report(results, pictures))
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    if pictures.bad:
        write_report(folder / REPORT, pictures.bad)
    write(folder / RESULTS, results, pictures, options, image_size(predictor.model))
    write_examples(folder, predictor, val, options)
    say(f"{RESULTS}{' and overlays' * bool(options.examples)} -> {folder.absolute()}")
    return 0


# -- before any weight is read -------------------------------------------------------------------


def ready(options: Options) -> Pictures:
    """The pictures to score; refuses what can be known before the weights are read.

    Raises:
        ConfigError: libraries, folders or a device that cannot work, or an evaluation that is
            there.
        DataError: faults in the data.
        CheckpointError: no such base or adapter, as far as headers tell.
    """
    from lora_core.preflight import check_all
    from sam3_lora.evaluation_data import load_pictures

    check_all(
        lambda: writable(options.output, "--output"),
        lambda: refuse_results(options),
        options.check_device,
        options.glance,
    )
    return load_pictures(options)


def refuse_results(options: Options) -> None:
    """An earlier evaluation stays.

    Raises:
        ConfigError: there is one.
    """
    file = Path(options.output) / RESULTS
    if file.exists() and not options.overwrite:
        raise ConfigError(
            f"--output: {one_line(file.absolute())} is there already: choose another folder, or "
            "add --overwrite"
        )


# -- measuring -----------------------------------------------------------------------------------


def notes_on(predictor: Predictor, pictures: Pictures, options: Options) -> list[str]:
    """What to know about the phrases before trusting figures."""
    from lora_core.report import plural
    from sam3_lora.data import notes_on_length

    notes = notes_on_length(pictures.phrases, predictor.words)
    trained = trained_phrases(options)
    new = [phrase for phrase in pictures.phrases if trained and phrase not in trained]
    if new:
        names = ", ".join(one_line(phrase) for phrase in new[:5])
        count = plural(len(new), "phrase")
        notes.append(f"{count} that the adapter was not trained on, such as {names}")
    return notes


def trained_phrases(options: Options) -> list[str]:
    """The phrases that the adapter says it was trained on."""
    if not options.adapter:
        return []
    from lora_core.adapters.read import read_adapter

    phrases = read_adapter(Path(options.adapter)).metadata.get("phrases")
    return [one for one in phrases if isinstance(one, str)] if isinstance(phrases, list) else []


def measured(
    predictor: Predictor, name: str, val: ValSet, pictures: Pictures, options: Options
) -> Result:
    """Score one model; the adapter is off for the base."""
    from lora_core.training.inference import autocast, evaluating
    from sam3_lora.calibration import calibrate
    from sam3_lora.metrics import cgf1_notes
    from sam3_lora.predictor import only
    from sam3_lora.scoring import ABSENT, EncodedPhrases, false_positives, score

    model = predictor.model
    with (
        only(predictor, name),
        evaluating(model),
        autocast(predictor.device, predictor.precision),
    ):
        wanted = [*pictures.phrases, *(ABSENT if options.absent_images else ())]
        phrases = EncodedPhrases(model, predictor.words, wanted)
        scores = score(model, told(val, len(val), f"{name}: pictures"), phrases, pictures.masks)
        figures = scores.figures()
        if options.absent_images:
            count = min(len(val), options.absent_images)
            asked = told(islice(val, count), count, f"{name}: absent concepts")
            known = [*pictures.phrases, *trained_phrases(options)]
            figures["absent_FPR"] = false_positives(model, phrases, asked, known)
    kind, precision = next(iter(scores.precision.items()))
    numbers = {number: phrase for phrase, number in pictures.split.phrases.numbers.items()}
    categories: dict[str, dict[str, float]] = {
        of: {numbers[number]: value for number, value in one.per_category().items()}
        for of, one in scores.precision.items()
    }
    notes = cgf1_notes(scores.cgf1[kind].summary())
    if precision.skipped:
        notes.append(f"masks: {precision.skipped} queries with objects without a mask left out")
    return Result(figures, categories, calibrate(precision.matches()), notes)


def told(records: Iterable[EvalRecord], count: int, what: str) -> Iterator[EvalRecord]:
    """Pass records on, and show how far it is."""
    from lora_core.report import Progress

    progress = Progress(count)
    progress.figures = {"scoring": what}
    try:
        for number, record in enumerate(records, start=1):
            yield record
            progress.update(number)
    finally:
        progress.close()


def write_examples(folder: Path, predictor: Predictor, val: ValSet, options: Options) -> None:
    """Overlays of the first pictures that hold objects: each model, and the truth."""
    from lora_core.pictures.overlay import save
    from sam3_lora.overlays import example

    with_objects = (record for record in val if any(record.truth))
    for number, record in enumerate(islice(with_objects, options.examples), start=1):
        stem = re.sub(r"[^\w+-]+", "_", str(Path(record.key).with_suffix("")))[-100:]
        sheet = example(predictor, record, options.models)
        save(folder / f"example_{number}_{stem}.png", sheet)
