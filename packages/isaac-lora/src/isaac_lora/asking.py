"""Answers of a model to questions, many at a time, as it would give them one by one.

    answers(model, processor, questions_of(example), max_new_tokens=64, batch_size=8)

Prompts of similar length go together, padded on the left, the longest first, so that too little
memory shows at once. Answers are greedy: the likeliest token each time, whatever the settings of
generation in the model's folder say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from isaac_lora.answers.tags import without_thought
from isaac_lora.conversations.template import END
from isaac_lora.frozen_features import FrozenFeatures
from isaac_lora.prompts import Question, prompts
from lora_core.errors import NumericError
from lora_core.training.inference import evaluating

if TYPE_CHECKING:
    from isaac_lora.kept_answers import KeptAnswers
    from isaac_lora.network.isaac import IsaacForConditionalGeneration
    from isaac_lora.processing import IsaacProcessor

MAX_NEW_TOKENS = 256
BATCH_SIZE = 8


class Said(NamedTuple):
    """An answer.

    Attributes:
        text: without the thinking block in front of it, and without control tokens.
        ended: the model ended it; False: it was cut.
    """

    text: str
    ended: bool


def answers(
    model: IsaacForConditionalGeneration,
    processor: IsaacProcessor,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    features: FrozenFeatures | None = None,
) -> list[str]:
    """The answers alone; see `asked`."""
    found = asked(
        model,
        processor,
        questions,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        features=features,
    )
    return [said.text for said in found]


def asked(
    model: IsaacForConditionalGeneration,
    processor: IsaacProcessor,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    features: FrozenFeatures | None = None,
    kept: KeptAnswers | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> list[Said]:
    """Ask a model, without dropout; afterwards it is in the mode that it was in.

    Args:
        max_new_tokens: of an answer, at most.
        features: what gives the vision features and the depth of pictures; None: the model's own.
        kept: answers that are there already, and where new ones are kept; None: nowhere.
        done: is told how many questions are answered.

    Returns:
        an answer for each question, in their order.

    Raises:
        DataError: a picture that cannot be read any more, or a model with depth and none to give.
        NumericError: NaN or infinite logits, features or depth.
    """
    features = features_of_model(model) if features is None else features
    lengths = [len(question.outline(processor)) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: -lengths[index])
    found = dict[int, Said]()
    with evaluating(model), _greedy(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            chosen = [questions[index] for index in batch]
            ask = partial(_answered, model, processor, chosen, max_new_tokens, features)
            said = kept.of(chosen, ask) if kept else ask()
            found |= zip(batch, said, strict=True)
            done(len(found))
    return [found[index] for index in range(len(questions))]


def features_of_model(model: IsaacForConditionalGeneration) -> FrozenFeatures:
    """What makes the inputs of a model as it was loaded, with its depth or without."""
    config = model.config
    depths = None if model.depth is None else model.depth.to(model.device)
    return FrozenFeatures(None, depths, config.depth_alpha, config.hidden_size)


def _answered(
    model: IsaacForConditionalGeneration,
    processor: IsaacProcessor,
    questions: Sequence[Question],
    max_new_tokens: int,
    features: FrozenFeatures,
) -> Iterator[Said]:
    """Answer one batch."""
    tokenizer = processor.tokenizer
    batch = features.inputs(
        prompts(questions, processor, vision=features.vision, depth=features.depth)
    )
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    ends = end_tokens(model, processor)
    names = [question.key for question in questions]
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([RefuseNaN(names)]),
    )
    for row in out[:, inputs["input_ids"].shape[1] :].tolist():
        text = tokenizer.decode(row, skip_special_tokens=True)
        yield Said(without_thought(text).strip(), any(token in ends for token in row))


def end_tokens(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> list[int]:
    """The tokens that end an answer: the template's, and those of the model's configuration."""
    configured = model.config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    own = int(processor.tokenizer.convert_tokens_to_ids(END))
    return list(dict.fromkeys([own, *(token for token in more if token is not None)]))


@contextmanager
def _greedy(model: IsaacForConditionalGeneration) -> Iterator[None]:
    """Without the settings of the model's folder, such as temperatures and penalties, inside."""
    before: Any = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class RefuseNaN(LogitsProcessor):
    """Refuses logits from which no answer follows; the largest of NaNs would be the first token.

    Args:
        names: of the questions, for the message.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Give the logits as they are.

        Raises:
            NumericError: NaN, or infinite on the upper side.
        """
        # A sum over the vocabulary could overflow; the maximum carries NaN and inf as they are.
        wrong = (~scores.amax(-1).isfinite()).nonzero().flatten().tolist()
        if wrong:
            raise NumericError(
                f"{self.names[wrong[0]]}: the model gives NaN or infinite logits: use bf16 or fp32 "
                "in place of fp16; if that does not help, weights or adapter are damaged"
            )
        return scores
