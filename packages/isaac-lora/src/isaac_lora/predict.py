"""`isaac-lora predict`: answers to questions about pictures, of the base beside those of LoRA.

For every question it writes `<name>_answers.png`, the pictures with the tags of the answers and the
words below them, and for all together `answers.json`. Answers are kept as they come: a stopped
command goes on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isaac_lora.conversations.records import IMAGE, MARKER, Conversation, Turn
from isaac_lora.question_options import QuestionOptions
from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.report import plural
from lora_core.settings.types import shown

if TYPE_CHECKING:
    from isaac_lora.answers.tags import Tag
    from isaac_lora.asking import Said
    from isaac_lora.examples import Example
    from isaac_lora.kept_answers import KeptAnswers
    from isaac_lora.network.isaac import IsaacForConditionalGeneration
    from isaac_lora.processing import IsaacProcessor
    from isaac_lora.prompts import Question

RESULTS = "answers.json"
PAGE = "_answers.png"
TEXT = "Answer questions about pictures."
TOLD = 20  # questions whose answers are printed
Answers = dict[str, list["Said"]]  # who answers -> an answer for each question


@dataclass(kw_only=True)
class Options(QuestionOptions):
    """Settings of `isaac-lora predict`."""

    image: list[str] = option([], "Pictures, or folders of pictures.", "input")
    question: list[str] = option(
        [],
        "Asked about each picture; with <image> in it, once for each, about all pictures together. "
        "Put <image> where your training data has it.",
        "input",
    )
    hint: Literal["point", "box", "polygon"] | None = option(
        None, "Ask for answers with these tags.", "input"
    )
    compare_base: bool = option(True, "With --adapter: the base's answers too.", "output")
    pages: bool = option(True, f"Pictures with the answers, <name>{PAGE}.", "output")

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = super().problems()
        if self.data_path is not None:
            found += [
                f"--data_path holds the questions: leave out --{name}"
                for name in ("image", "question", "hint")
                if getattr(self, name)
            ]
            return found
        if not self.question:
            found.append("--question is missing: what shall be answered? Or give --data_path")
        found += [
            f"--question {shown(text)}: it is empty" for text in self.question if not text.strip()
        ]
        marked = [bool(MARKER.search(text)) for text in self.question]
        if self.question and not self.image and (self.hint or any(marked)):
            found.append("--image is missing: the question is about a picture")
        return found

    @property
    def models(self) -> list[str]:
        """Who answers."""
        if not self.adapter:
            return ["model"]
        return ["base", "LoRA"] if self.compare_base else ["LoRA"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="isaac-lora predict", description=TEXT)
    processor, questions = ready(options)

    from isaac_lora.kept_answers import KeptAnswers, follows_from
    from lora_core.kept_results import UNFINISHED, KeptResults
    from lora_core.report import say

    model = options.load()
    kept = KeptResults(Path(options.output) / UNFINISHED)
    facts = follows_from(options, processor, [])
    said = {
        who: answers_of(who, model, processor, questions, options, KeptAnswers(kept, who, facts))
        for who in options.models
    }
    tell(questions, said)
    for note in notes(said, options):
        say(f"note: {note}")
    write(options, processor, questions, said)
    kept.remove()
    say(f"{plural(len(questions), 'question')} -> {Path(options.output).absolute()}")
    return 0


# -- before any weight of Isaac is read ------------------------------------------------------------


def ready(options: Options) -> tuple[IsaacProcessor, list[Question]]:
    """The questions; refuses what can be known before the weights are read.

    Raises:
        ConfigError: folders, depth or a device that cannot work, or results that are there.
        DataError: pictures or conversations that cannot be used.
        CheckpointError: no such model or adapter, as far as headers tell.
    """
    from isaac_lora.prompts import questions_of
    from lora_core.preflight import check_all

    check_all(
        lambda: refuse_results(options),
        options.check_device,
        options.glance,
    )
    processor = options.processor()
    if options.data_path is not None:
        examples = options.conversations(processor, answered=False)
    else:
        examples = examples_of_flags(options, processor)
    questions = [one for example in examples for one in questions_of(example, unanswered=True)]
    return processor, questions


def refuse_results(options: QuestionOptions, name: str = RESULTS) -> None:
    """Earlier results stay, and new ones can be written.

    Raises:
        ConfigError: there are some, or the folder cannot be written.
    """
    from lora_core.preflight import writable

    writable(options.output, "--output")  # first: into others nobody may look
    file = Path(options.output) / name
    if file.exists() and not options.overwrite:
        raise ConfigError(
            f"--output: {one_line(file.absolute())} is there already: choose another folder, or "
            "add --overwrite"
        )


def examples_of_flags(options: Options, processor: IsaacProcessor) -> list[Example]:
    """The questions of the command line as conversations, their pictures looked at wholly.

    Raises:
        DataError: pictures that cannot be used, or not as many as a question has places for.
    """
    from isaac_lora.conversations.survey import facts
    from isaac_lora.data_survey import example_of

    examples, problems = list["Example"](), list[str]()
    for record in records_of_flags(options, find_pictures(options)):
        try:
            found = facts(record, processor, None, options.max_seq_length, answered=False)
            examples.append(example_of(record, None, found))
        except DataError as error:
            problems += [f"{shown(record.name)}: {line}" for line in str(error).splitlines()]
    if problems:
        raise DataError(listing(list(dict.fromkeys(problems))))
    return examples


def find_pictures(options: Options) -> list[Path]:
    """The pictures of --image, and of folders in it.

    Raises:
        DataError: nothing there, or two whose results would have one name.
    """
    from lora_core.pictures.files import find_images

    return find_images(options.image, PAGE, "--image")


def records_of_flags(options: Options, pictures: Sequence[Path]) -> list[Conversation]:
    """One conversation for each question and picture, or for all pictures where it places them.

    Raises:
        DataError: another number of places for pictures than of pictures.
    """
    from isaac_lora.answers.questions import question_turns
    from isaac_lora.answers.tags import hint

    records, problems = list[Conversation](), list[str]()
    names = tuple(str(path) for path in pictures)

    def add(name: str, turns: tuple[Turn, ...], images: tuple[str, ...]) -> None:
        records.append(Conversation(len(records), name, turns, images))

    for number, text in enumerate(options.question, start=1):
        ending = f"_{number}" if len(options.question) > 1 else ""
        question = MARKER.sub(IMAGE, text)
        places = question.count(IMAGE)
        hints = (Turn("user", hint(options.hint)),) if options.hint else ()
        if places == 0 and not pictures:
            add(f"question{ending}", (Turn("user", question),), ())
        elif places == 0 or places == 1:
            asked = question_turns(question, options.hint)
            turns = (*hints, Turn("user", question)) if places else asked
            for path, name in zip(pictures, names, strict=True):
                add(path.stem + ending, turns, (name,))
        elif places == len(pictures):
            add(pictures[0].stem + ending, (*hints, Turn("user", question)), names)
        else:
            problems.append(
                f"--question {shown(text)}: {plural(places, f'{IMAGE} marker')}, but "
                f"{plural(len(pictures), 'picture')} in --image: expected equal numbers, "
                "or one marker for each picture by itself"
            )
    if problems:
        raise DataError(listing(problems))
    return records


# -- asking ----------------------------------------------------------------------------------------


def answers_of(
    who: str,
    model: IsaacForConditionalGeneration,
    processor: IsaacProcessor,
    questions: Sequence[Question],
    options: Options,
    kept: KeptAnswers,
) -> list[Said]:
    """The answers of one model; the base, as published, has neither the adapter nor depth."""
    from isaac_lora.asking import asked
    from lora_core import adapters_off
    from lora_core.report import Progress
    from lora_core.training.inference import autocast, evaluating

    def ask(depth: Any) -> list[Said]:
        with (
            evaluating(model),
            autocast(options.torch_device, options.precision),
            Progress(len(questions)) as progress,
        ):
            progress.figures = {"answering": who}
            return asked(
                model,
                processor,
                questions,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                features=options.features(model, depth),
                kept=kept,
                done=progress.update,
            )

    if who == "base":
        with adapters_off(model):
            said = ask(None)
    else:
        said = ask(options.depths)
    kept.tell()
    return said


def notes(said: Answers, options: QuestionOptions) -> list[str]:
    """What to know about the answers."""

    found = []
    if "base" in said and options.depths is not None:
        found.append("the base answers without depth, as it was published; LoRA with it")
    for who, answers in said.items():
        if cut := sum(not one.ended for one in answers):
            found.append(
                f"{who}: {plural(cut, 'answer')} of {len(answers)} cut at --max_new_tokens "
                f"{options.max_new_tokens}"
            )
    return found


# -- results ---------------------------------------------------------------------------------------


def tell(questions: Sequence[Question], said: Answers) -> None:
    """Print questions and answers, the first `TOLD` of them."""
    from lora_core.report import say

    for number, question in enumerate(questions[:TOLD]):
        say(f"{one_line(question.example.key)}: {one_line(question.line)}")
        for who, answers in said.items():
            say(f"  {who}: {one_line(answers[number].text).strip() or '(no words)'}")
        if question.answer is not None:
            say(f"  truth: {one_line(question.answer)}")
    if len(questions) > TOLD:
        say(f"... and {len(questions) - TOLD} more in {RESULTS}")


def write(
    options: Options,
    processor: IsaacProcessor,
    questions: Sequence[Question],
    said: Answers,
) -> None:
    """Write the pages, and `answers.json` as the last file.

    Raises:
        CheckpointError: the disk refuses.
    """
    from isaac_lora.answers.page import page_of
    from lora_core.pictures.overlay import save
    from lora_core.tensor_file import write_json

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (question, name) in enumerate(zip(questions, file_names(questions), strict=True)):
        answers = {who: all_of[number] for who, all_of in said.items()}
        record = content(question, answers)
        if options.pages:
            texts = [(who, one.text) for who, one in answers.items()]
            save(folder / f"{name}{PAGE}", page_of(question, texts, processor))
            record["page"] = f"{name}{PAGE}"
        records.append(record)
    write_json(folder / RESULTS, {"settings": options.said(), "questions": records})


def file_names(questions: Sequence[Question]) -> list[str]:
    """A name for each question's file: its conversation's, with a number where that is taken."""
    names, taken = list[str](), set[str]()
    for question in questions:
        stem = re.sub(r"[^\w+-]+", "_", question.example.key)[-100:]
        name, number = stem, 2
        while name.lower() in taken:  # some file systems do not tell A from a
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
        taken.add(name.lower())
    return names


def content(question: Question, answers: dict[str, Said]) -> dict[str, Any]:
    """What `answers.json` holds of a question; places of tags are in pixels of their picture."""
    from isaac_lora.answers.tags import parse

    record: dict[str, Any] = {
        "id": question.example.key,
        "turns": [list(turn) for turn in question.asked.turns],
        "images": [
            source[:40] + "..." if source[:5].lower() == "data:" else source
            for source in question.asked.images
        ],
        "truth": question.answer,
        "answers": {},
    }
    for who, said in answers.items():
        read = parse(said.text)
        record["answers"][who] = {
            "text": said.text,
            "words": read.words,
            "tags": [plain(tag, question.sizes) for tag in read.tags],
            "damaged_tags": list(read.damaged),
            "ended": said.ended,
        }
    return record


def plain(tag: Tag, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """A tag as JSON.

    Args:
        sizes: (height, width) of the pictures that it may be in.
    """
    from isaac_lora.answers.tags import to_pixels

    number = len(sizes) - 1 if tag.asset is None else tag.asset
    found: dict[str, Any] = {"kind": tag.kind, "mention": tag.mention, "image": number}
    if 0 <= number < len(sizes):
        points = to_pixels(tag.points, sizes[number])
        found["pixels"] = [[round(x, 2), round(y, 2)] for x, y in points]
    return found | {"thousandths": [list(point) for point in tag.points]}
