"""A conversation as one text, and where in it are the pictures and what the model learns.

The checkpoint's own chat template writes the text, in transformers' sandbox, once. It has ChatML's
form; Qwen3's puts an empty thinking block into the last answer:

    <|im_start|>user\\n<image>What is near?<|im_end|>\\n
    <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nThe cup.<|im_end|>\\n

so that the text of some turns is not the beginning of the text of more: answers are found in the
whole. While the template works, control tokens in the turns stand as single private characters;
what looks like a control token afterwards was written by the template, and no turn can forge one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from isaac_lora.conversations.records import IMAGE, Turn
from lora_core.errors import CheckpointError, DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
ANSWER = f"{START}assistant\n"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PRIVATE = range(0xF0000, 0xFFFFE)  # characters that stand for control tokens


class Span(NamedTuple):
    """Characters [start, end)."""

    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A conversation's text.

    Attributes:
        text: as the template writes it, with what the turns say.
        controls: of the special tokens that the template wrote; others are plain text.
        images: of each place of a picture.
        trained: of each answer with its end token, `<|im_end|>`.
    """

    text: str
    controls: tuple[Span, ...]
    images: tuple[Span, ...]
    trained: tuple[Span, ...]


def render(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision_token: str = IMAGE,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> Rendered:
    """Write a conversation as text.

    Args:
        vision_token: what stands in the text where a picture is.
        add_generation_prompt: end with the beginning of an answer.
        enable_thinking: False: with the prompt, the template writes the empty thinking block that
            the model would write first. None: as the template does by itself.

    Raises:
        CheckpointError: the template has another form, or loses pictures.
        DataError: the template refuses these turns.
    """
    shield = Shield.make(tokenizer, vision_token, [text for _, text in turns])
    messages = [
        {"role": role, "content": vision_token.join(map(shield.hide, text.split(IMAGE)))}
        if role != "assistant"
        else {"role": role, "content": shield.hide(text)}
        for role, text in turns
    ]
    thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    hidden = _apply(
        messages, tokenizer, {"add_generation_prompt": add_generation_prompt} | thinking
    )
    rendered = _located(hidden, shield, vision_token)
    answers = sum(role == "assistant" for role, _ in turns)
    markers = sum(text.count(IMAGE) for role, text in turns if role != "assistant")
    _check_form(rendered, answers, markers, tokenizer)
    return rendered


def render_text(
    text: str, tokenizer: PreTrainedTokenizerBase, *, vision_token: str = IMAGE
) -> Rendered:
    """A text as it is, such as one that a chat template has written: its control tokens count."""
    return _located(text, Shield.make(tokenizer, vision_token, []), vision_token)


def _apply(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, how: dict) -> str:
    """What the template writes.

    Raises:
        DataError: it refuses, or breaks.
    """
    from jinja2.exceptions import TemplateError

    template = None if tokenizer.chat_template else CHATML
    broken = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **how
        )
    except (*broken, RecursionError, MemoryError) as error:
        said = one_line(error)[:200] or type(error).__name__
        raise DataError(f"the model's chat template refuses this conversation: {said}") from None
    return str(text)


# -- control tokens --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shield:
    """Private characters for the control tokens that turns may contain.

    Attributes:
        stand_in: control token or vision token -> its character.
        controls: finds one of them.
    """

    stand_in: dict[str, str]
    controls: re.Pattern[str]

    @classmethod
    def make(
        cls, tokenizer: PreTrainedTokenizerBase, vision_token: str, texts: Sequence[str]
    ) -> Shield:
        """A shield for `texts`, by characters that are in none of them.

        Raises:
            DataError: the texts use up the private characters.
        """
        names = control_names(tokenizer, vision_token)
        used = {ord(c) for text in texts for c in text if ord(c) in PRIVATE}
        free = (chr(code) for code in PRIVATE if code not in used)
        stand_in = dict(zip(names, free, strict=False))
        if len(stand_in) < len(names):
            raise DataError("its text uses all of Unicode's private characters U+F0000 to U+FFFFD")
        return cls(stand_in, re.compile("|".join(map(re.escape, names))))

    def hide(self, text: str) -> str:
        """`text` with a private character for each control token."""
        return self.controls.sub(lambda match: self.stand_in[match[0]], text)

    def show(self, text: str) -> str:
        """What `hide` was given."""
        return text.translate({ord(c): name for name, c in self.stand_in.items()})


def control_names(tokenizer: PreTrainedTokenizerBase, vision_token: str) -> list[str]:
    """The special tokens and the vision token, longest first: a long one may contain another."""
    tokens = tokenizer.added_tokens_decoder.values()
    names = {vision_token} | {token.content for token in tokens if token.special}
    return sorted(names, key=lambda name: (-len(name), name))


def _located(hidden: str, shield: Shield, vision_token: str) -> Rendered:
    """Find control tokens, pictures and answers, and put back what the shield hides."""
    parts, controls, images, trained = [], [], [], []
    place, answer = 0, -1  # in the text; where an answer has begun
    pieces = re.split(f"({shield.controls.pattern})", hidden)
    for number, piece in enumerate(pieces):
        text = piece if number % 2 else shield.show(piece)
        span = Span(place, place + len(text))
        if number % 2 and piece == vision_token:
            images.append(span)
        elif number % 2:
            controls.append(span)
            if piece == START and pieces[number + 1].startswith("assistant\n"):
                answer = place + len(ANSWER)
            elif piece == END and answer >= 0:
                trained.append(Span(answer, span.end))
                answer = -1
        parts.append(text)
        place = span.end
    return Rendered("".join(parts), tuple(controls), tuple(images), tuple(trained))


def _check_form(
    rendered: Rendered, answers: int, markers: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Require that the template has written every answer and every picture.

    Raises:
        CheckpointError: it has not.
    """
    where = f"chat template of {one_line(tokenizer.name_or_path or 'the tokenizer')}"
    if len(rendered.trained) != answers:
        raise CheckpointError(
            f"{where}: writes {len(rendered.trained)} of {answers} answers in the form "
            f"{ANSWER!r} ... {END!r}, by which they are found; use the template of Isaac (Qwen3)"
        )
    if len(rendered.images) != markers:
        raise CheckpointError(
            f"{where}: writes {len(rendered.images)} of {markers} places of pictures; use the "
            "template of Isaac (Qwen3), which writes what a turn says as it is"
        )
