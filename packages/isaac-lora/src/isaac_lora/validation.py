"""What a run measures while it trains: the loss of the validation answers, and answers themselves.

    measure, draw = evaluation(cfg, splits.val, processor, features, log)

The loss is over all tokens of all answers of the validation set, each weighing the same. Of the
questions a fixed part is answered by the model as it is, and the answers are scored; some of them
are shown beside their pictures in TensorBoard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from isaac_lora import data
from isaac_lora.answers.scoring import figures, score
from isaac_lora.asking import answers
from isaac_lora.config import Config
from isaac_lora.examples import Example, single_rows
from isaac_lora.prompts import Question, questions_of
from lora_core.errors import NumericError
from lora_core.report import RunLog
from lora_core.training.inference import evaluating

if TYPE_CHECKING:
    from isaac_lora.answers.tags import Size
    from isaac_lora.frozen_features import FrozenFeatures
    from isaac_lora.processing import IsaacProcessor

PICTURES = 4  # in TensorBoard for each validation
SHOWN = ("loss", "exact_match", "anls", "box_iou", "pointing_accuracy")
Measure = Callable[[Any], dict[str, float]]
Draw = Callable[[int], None]


def evaluation(
    cfg: Config,
    conversations: Sequence[Example],
    processor: IsaacProcessor,
    features: FrozenFeatures,
    log: RunLog | None = None,
) -> tuple[Measure | None, Draw | None]:
    """What `LoraTrainer` calls as `evaluate` and as `draw`; None without conversations.

    `measure(network)` gives the figure that best follows first, `minus_loss`.

    Args:
        features: where the vision features and the depth of pictures come from.
        log: where pictures go.
    """
    if not conversations:
        return None, None
    validation = Validation(cfg, conversations, processor, features, log)
    return validation.measure, validation.draw


class Validation:
    """The validation set, and what the model said about it last."""

    def __init__(
        self,
        cfg: Config,
        conversations: Sequence[Example],
        processor: IsaacProcessor,
        features: FrozenFeatures,
        log: RunLog | None = None,
    ) -> None:
        self.cfg, self.processor, self.features, self.log = cfg, processor, features, log
        self.conversations = list(conversations)
        every = [question for one in conversations for question in questions_of(one)]
        self.questions = spread(every, cfg.eval_generate_samples)
        self.said: list[str] = []  # of the latest measurement
        self.before: list[str] = []  # of the one before training

    def measure(self, network: Any) -> dict[str, float]:
        """The figures of the network as it is.

        Raises:
            NumericError: a loss that is not finite.
        """
        loss = token_loss(
            network,
            self.conversations,
            self.processor,
            batch_size=self.cfg.per_device_eval_batch_size,
            features=self.features,
        )
        self.said = answers(
            network,
            self.processor,
            self.questions,
            max_new_tokens=self.cfg.eval_max_new_tokens,
            batch_size=self.cfg.per_device_eval_batch_size,
            features=self.features,
        )
        return {"minus_loss": -loss, "loss": loss, **scores(self.questions, self.said)}

    def draw(self, step: int) -> None:
        """Show answers of the latest measurement beside their pictures, and those of the base."""
        if step == 0:
            self.before = self.said
        if step == 0 or self.log is None or not self.log.shows_pictures:
            return
        from isaac_lora.answers.page import page_of

        for number, question in enumerate(self.questions[:PICTURES]):
            said = [("LoRA", self.said[number])]
            if self.before:
                said.insert(0, ("base", self.before[number]))
            self.log.picture(question.key, page_of(question, said, self.processor), step)


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` of the questions, from all over the set; the same ones each time."""
    count = min(count, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


# -- figures ---------------------------------------------------------------------------------------


@torch.no_grad()
def token_loss(
    model: Any,
    conversations: Sequence[Example],
    processor: IsaacProcessor,
    *,
    batch_size: int,
    features: FrozenFeatures,
    done: Callable[[int], object] = lambda count: None,
) -> float:
    """Mean cross entropy of all learned tokens of conversations, in nats; each weighs the same.

    Dropout does not act; afterwards the model is in the mode that it was in.

    Args:
        done: is told how many conversations are done.

    Raises:
        NumericError: it is not finite; names the first conversations for which it is not.
    """
    rows = sorted(single_rows(conversations), key=lambda row: -row.tokens)
    samples = data.TrainSet(rows, processor, vision=features.vision, depth=features.depth)
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        chosen = range(start, min(start + batch_size, len(rows)))
        batch = data.collate([samples[index] for index in chosen], processor)
        inputs = {name: value.to(model.device) for name, value in features.inputs(batch).items()}
        with evaluating(model):
            loss = float(model(**inputs, num_items_in_batch=1, use_cache=False).loss)
        if not math.isfinite(loss):
            raise NumericError(
                f"{', '.join(batch['keys'])}: the loss is not finite: use bf16 or fp32 in place "
                "of fp16; if that does not help, weights or adapter are damaged"
            )
        total += loss
        tokens += data.num_label_tokens(batch)
        done(chosen.stop)
    return total / max(tokens, 1)


def scores(questions: Sequence[Question], said: Sequence[str]) -> dict[str, float]:
    """The figures of `isaac_lora.answers.scoring` over answers; {} where there are none."""
    sums: Counter[str] = Counter()
    for question, answer in zip(questions, said, strict=True):
        sums.update(score_of(question, answer))
    return figures(sums)


def score_of(question: Question, answer: str) -> dict[str, float]:
    """Sums of one answer, see `isaac_lora.answers.scoring.score`."""
    return score(answer, question.answer or "", size_of(question))


def size_of(question: Question) -> Size:
    """(height, width) of the picture that tags mean: the last one before the answer."""
    from isaac_lora.answers.tags import SCALE

    sizes = question.sizes
    return sizes[-1] if sizes else (SCALE, SCALE)
