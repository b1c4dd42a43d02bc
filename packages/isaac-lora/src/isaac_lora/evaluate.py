"""`isaac-lora evaluate`: how good answers are on conversations that have them, base beside LoRA.

Prints a table, and writes `evaluation.json`, `answers.csv`, and pages of some questions. The depth
of another picture, a constant depth, or none in place of the picture's own shows how much of what
an adapter can do comes from depth. Answers are kept as they come: a stopped evaluation goes on.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from isaac_lora.predict import file_names, refuse_results
from isaac_lora.question_options import QuestionOptions
from lora_core.config import option, parse
from lora_core.errors import ConfigError
from lora_core.guards import count_problem, unnamed

if TYPE_CHECKING:
    from isaac_lora.asking import Said
    from isaac_lora.depth.controls import DepthSource
    from isaac_lora.examples import Example
    from isaac_lora.kept_answers import KeptAnswers
    from isaac_lora.network.isaac import IsaacForConditionalGeneration
    from isaac_lora.processing import IsaacProcessor
    from isaac_lora.prompts import Question
    from lora_core.kept_results import KeptResults

RESULTS = "evaluation.json"
ANSWERS = "answers.csv"
EXAMPLE = "example_"  # begins the names of pages
TEXT = "Score answers on conversations: base, LoRA, and LoRA with the wrong depth."
MERGED = "merged"  # name of --merged_model
CONTROLS = ("shuffled_depth", "constant_depth", "without_depth")


@dataclass(kw_only=True)
class Options(QuestionOptions):
    """Settings of `isaac-lora evaluate`."""

    data_path: str | None = option(MISSING, "Conversations with answers, as for training.", "data")
    max_questions: int = option(
        0, "Answer only so many questions, from all over the data; 0: all. The loss is of all.",
        "data",
    )  # fmt: skip
    compare_base: bool = option(True, "With --adapter: score the base model too.", "scores")
    merged_model: str | None = option(
        None, "Folder of a merged model, which is scored besides.", "scores"
    )
    shuffled_depth: bool = option(
        False, "Score once more with the depth of another picture.", "scores"
    )
    constant_depth: bool = option(
        False, "Score once more with the same depth everywhere.", "scores"
    )
    without_depth: bool = option(False, "Score once more without depth.", "scores")
    examples: int = option(8, "Pages of so many questions: all answers.", "output")
    output: str = option("evaluation", f"Folder for {RESULTS}, {ANSWERS} and pages.", "output")

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = super().problems() + list(unnamed(self, ("merged_model",)))
        for name in ("max_questions", "examples"):
            found += count_problem(self, name, 0)
        return found

    @property
    def controls(self) -> list[str]:
        """The controls that are asked for."""
        return [name for name in CONTROLS if getattr(self, name)]

    def check_controls(self) -> None:
        """Refuse controls where there is nothing to compare with.

        Raises:
            ConfigError: no depth is used.
        """
        if self.controls and self.depths is None:
            raise ConfigError(
                f"--{self.controls[0]} compares with depth, but no depth is used here: give an "
                "adapter that was trained with it, or --use_depth True"
            )

    def check_merged(self) -> None:
        """Look at the headers of --merged_model, and at the depth that it was trained with.

        Raises:
            CheckpointError: no model there, or of another depth.
        """
        if self.merged_model is None:
            return
        from isaac_lora import official
        from isaac_lora.depth.settings import check_adapter

        folder = official.find_model(self.merged_model)
        official.check_folder(folder)
        check_adapter(folder, self.depth_settings)


class Result(NamedTuple):
    """What was measured of one model.

    Attributes:
        figures: by name, as in training: `loss`, and those of the answers.
        said: the answers to all questions.
    """

    figures: dict[str, float]
    said: list[Said]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="isaac-lora evaluate", description=TEXT)
    processor, examples = ready(options)

    from lora_core.kept_results import UNFINISHED, KeptResults
    from lora_core.report import plural, say

    questions = chosen(examples, options)
    depths = sources(examples, processor, options)
    kept = KeptResults(Path(options.output) / UNFINISHED)
    with depths_kept(options):
        results = score_models(processor, examples, questions, depths, options, kept)
    found = notes(results, options)
    say(report(results, len(questions)))
    for note in found:
        say(f"note: {note}")
    write(options, processor, questions, results, found)
    kept.remove()
    pages = plural(min(options.examples, len(questions)), "page")
    say(f"{RESULTS}, {ANSWERS}, {pages} {EXAMPLE}*.png -> {Path(options.output).absolute()}")
    return 0


# -- before any weight of Isaac is read ------------------------------------------------------------


def ready(options: Options) -> tuple[IsaacProcessor, list[Example]]:
    """The conversations; refuses what can be known before the weights are read.

    Raises:
        ConfigError: folders, depth or a device that cannot work, or an evaluation that is there.
        DataError: faults in the conversations.
        CheckpointError: no such model or adapter, as far as headers tell.
    """
    from lora_core.preflight import check_all

    check_all(
        lambda: refuse_results(options, RESULTS),
        options.check_device,
        options.glance,
    )
    check_all(options.check_merged, options.check_controls)
    processor = options.processor()
    return processor, options.conversations(processor, answered=True)


def chosen(examples: Sequence[Example], options: Options) -> list[Question]:
    """The questions that are answered."""
    from isaac_lora.prompts import questions_of
    from isaac_lora.validation import spread

    questions = [question for example in examples for question in questions_of(example)]
    return spread(questions, options.max_questions or len(questions))


@contextmanager
def depths_kept(options: Options) -> Iterator[None]:
    """Depth is computed once per picture inside: it is needed for the loss, the answers, and again
    by each control."""
    depths = options.depths
    if depths is None or depths.cache is not None:
        yield
        return
    from isaac_lora.model_options import CACHE_BYTES
    from lora_core.cache import FeatureCache

    with TemporaryDirectory(prefix="isaac-depth-") as folder:
        depths.cache = FeatureCache(Path(folder), CACHE_BYTES)
        yield
        depths.cache = None


# -- measuring -------------------------------------------------------------------------------------


def score_models(
    processor: IsaacProcessor,
    examples: Sequence[Example],
    questions: Sequence[Question],
    depths: Mapping[str, DepthSource | None],
    options: Options,
    kept: KeptResults,
) -> dict[str, Result]:
    """The results of all models by their names, the base's first.

    Args:
        depths: see `sources`.
        kept: what was found before, and where results are kept.
    """
    from isaac_lora.kept_answers import KeptAnswers, follows_from
    from lora_core import adapters_off

    contents = [example.content for example in examples]

    def of(model: Any, name: str, depth: DepthSource | None) -> Result:
        folder = options.merged_model if name == MERGED else None
        facts = follows_from(options, processor, contents, folder)
        answers = KeptAnswers(kept, name, facts)
        return measured(name, model, depth, processor, examples, questions, options, answers)

    results: dict[str, Result] = {}
    model = options.load()
    if options.adapter and options.compare_base:
        with adapters_off(model):
            results["base"] = of(model, "base", None)
    for name, depth in depths.items():
        results[name] = of(model, name, depth)
    if options.merged_model is not None:
        del model  # before the next one is read
        merged = options.load(options.merged_model, adapter=False)
        results[MERGED] = of(merged, MERGED, options.depths)
    return results


def sources(
    examples: Sequence[Example], processor: IsaacProcessor, options: Options
) -> dict[str, DepthSource | None]:
    """Name of the model -> the depth that it gets: its own, then the controls.

    Raises:
        DataError: there is no other picture whose depth could be taken.
    """
    from isaac_lora.depth.controls import ConstantDepth, ShuffledDepth

    name, depths = "LoRA" if options.adapter else "model", options.depths
    found: dict[str, DepthSource | None] = {name: depths}
    if depths is None:
        return found
    if options.shuffled_depth:
        pictures = [picture for one in examples for picture in one.pictures(processor.rules)]
        found[f"{name}, shuffled depth"] = ShuffledDepth(depths, pictures)
    if options.constant_depth:
        found[f"{name}, constant depth"] = ConstantDepth(depths)
    if options.without_depth:
        found[f"{name}, without depth"] = None
    return found


def measured(
    name: str,
    model: IsaacForConditionalGeneration,
    depth: DepthSource | None,
    processor: IsaacProcessor,
    examples: Sequence[Example],
    questions: Sequence[Question],
    options: Options,
    kept: KeptAnswers,
) -> Result:
    """Score one model as it is, with this depth."""
    from isaac_lora.asking import asked
    from isaac_lora.validation import scores, token_loss
    from lora_core.training.inference import autocast, evaluating

    features, size = options.features(model, depth), options.batch_size
    with evaluating(model), autocast(options.torch_device, options.precision):
        with told(f"{name}: loss", len(examples)) as done:
            loss = kept.loss(
                lambda: token_loss(
                    model, examples, processor, batch_size=size, features=features, done=done
                )
            )
        with told(f"{name}: answers", len(questions)) as done:
            said = asked(
                model,
                processor,
                questions,
                max_new_tokens=options.max_new_tokens,
                batch_size=size,
                features=features,
                kept=kept,
                done=done,
            )
    kept.tell()
    found = scores(questions, [one.text for one in said])
    return Result({"loss": loss, **found}, said)


@contextmanager
def told(what: str, count: int) -> Iterator[Callable[[int], None]]:
    """Show how far it is."""
    from lora_core.report import Progress

    with Progress(count) as progress:
        progress.figures = {"scoring": what}
        yield progress.update


# -- telling ---------------------------------------------------------------------------------------


def report(results: Mapping[str, Result], count: int) -> str:
    """All figures, a column for each model."""
    from lora_core.report import figure, plural, table

    names = dict.fromkeys(name for one in results.values() for name in one.figures)
    rows = [
        (
            name,
            *(
                figure(one.figures[name]) if name in one.figures else "-"
                for one in results.values()
            ),
        )
        for name in names
    ]
    return table((plural(count, "question"), *results), rows)


def notes(results: Mapping[str, Result], options: Options) -> list[str]:
    """What to know about the figures."""
    from isaac_lora.predict import notes as notes_on

    return notes_on({name: one.said for name, one in results.items()}, options)


def write(
    options: Options,
    processor: IsaacProcessor,
    questions: Sequence[Question],
    results: Mapping[str, Result],
    found: Sequence[str],
) -> None:
    """Write pages and answers, and `evaluation.json` as the last file.

    Raises:
        CheckpointError: the disk refuses.
    """
    from isaac_lora.answers.page import page_of
    from isaac_lora.validation import spread
    from lora_core.pictures.overlay import save
    from lora_core.tensor_file import atomic_write, write_json

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set(map(id, spread(questions, options.examples)))
    for number, (question, name) in enumerate(zip(questions, file_names(questions), strict=True)):
        if id(question) in drawn:
            said = [(who, one.said[number].text) for who, one in results.items()]
            save(folder / f"{EXAMPLE}{name}.png", page_of(question, said, processor))
    with atomic_write(folder / ANSWERS) as file:
        file.write(answers_table(questions, results).encode("utf-8"))
    content = {
        "settings": {**asdict(options), **options.said()},
        "questions": len(questions),
        "models": {name: one.figures for name, one in results.items()},
        "notes": list(found),
    }
    write_json(folder / RESULTS, content)


def answers_table(questions: Sequence[Question], results: Mapping[str, Result]) -> str:
    """Questions, true answers and those of all models as CSV, a line for each question."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id", "question", "truth", *results])
    for number, question in enumerate(questions):
        said = [one.said[number].text for one in results.values()]
        writer.writerow([question.key, question.text, question.answer, *said])
    return text.getvalue()
