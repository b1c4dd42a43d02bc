"""What a model has answered before its command was stopped: the same command goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from isaac_lora import official
from isaac_lora.asking import Said
from lora_core.kept_results import KeptResults, stamps
from lora_core.pictures.survey import digest_of
from lora_core.report import plural, say

if TYPE_CHECKING:
    from isaac_lora.processing import IsaacProcessor
    from isaac_lora.prompts import Question
    from isaac_lora.question_options import QuestionOptions


class KeptAnswers:
    """Answers and the loss of one model, batch by batch, so that resumed batches are the same.

    Args:
        results: where they are kept.
        who: name of the model, with its depth.
        follows_from: what all its answers follow from, beside the questions.
    """

    def __init__(self, results: KeptResults, who: str, follows_from: object) -> None:
        self._results, self._who, self._follows_from = results, who, follows_from
        self._reused = 0

    def of(self, questions: Sequence[Question], ask: Callable[[], Iterable[Said]]) -> list[Said]:
        """The answers to a batch of questions; asked for if they are not there."""
        batch = [(question.key, question.example.content) for question in questions]
        name = f"{self._who}/{digest_of(*(key for key, _ in batch))[:16]}"
        found = self._results.find(name, [self._follows_from, batch])
        if found is None:
            said = list(ask())
            self._results.keep(name, [self._follows_from, batch], said)
            return said
        self._reused += len(found)
        return [Said(text, ended) for text, ended in found]

    def loss(self, compute: Callable[[], float]) -> float:
        """The loss; computed if it is not there."""
        name = f"{self._who}/loss"
        found = self._results.find(name, self._follows_from)
        if found is None:
            found = compute()
            self._results.keep(name, self._follows_from, found)
        return float(found)

    def tell(self) -> None:
        """Say how many answers were there."""
        if self._reused:
            say(f"{self._who}: {plural(self._reused, 'answer')} from the command that was stopped")


def follows_from(
    options: QuestionOptions,
    processor: IsaacProcessor,
    contents: Sequence[str],
    model: str | None = None,
) -> list[Any]:
    """What answers follow from: the model, its adapter and settings, and how batches are made.

    Args:
        contents: of all conversations, for what is measured over all of them.
        model: folder of the model, if it is not the one of the options.
    """
    folder = official.find_model(model or options.model_path)
    files = [folder / official.SETTINGS, *official.find_weights(folder).files]
    if options.trained is not None:
        files.append(options.trained.path)
    return [
        options.said(),
        stamps(files),
        processor.fingerprint(),
        options.torch_device.type,
        options.batch_size,
        digest_of(list(contents)),  # once: they may be many, and this is compared in each batch
    ]
