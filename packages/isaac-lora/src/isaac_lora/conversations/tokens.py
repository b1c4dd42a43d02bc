"""Tokens of a rendered conversation, between its pictures, and which of them are learned."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from isaac_lora.conversations.template import Rendered, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Piece:
    """Tokens of the text before, between or behind pictures.

    Attributes:
        ids: of the tokens.
        learned: whether each lies wholly inside an answer.
    """

    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)


def encode(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Tokenise each text between pictures on its own: one piece more than there are pictures.

    The template's control tokens are themselves. What the turns say in between is encoded with
    `split_special_tokens`: `<|im_end|>` in a question is plain text. (Tokens that are added but
    not special, as `<think>`, are themselves wherever they stand.)
    """
    segments = _segments(rendered)
    texts = [rendered.text[s.start : s.end] for _, s, control in segments if not control]
    encoded = iter(_encoded(texts, tokenizer))
    pieces = [Piece() for _ in range(len(rendered.images) + 1)]
    for number, span, control in segments:
        if control:
            name = rendered.text[span.start : span.end]
            tokens = [(int(tokenizer.convert_tokens_to_ids(name)), span)]
        else:
            tokens = [
                (token, Span(span.start + start, span.start + end))
                for token, (start, end) in next(encoded)
            ]
        pieces[number].ids += [token for token, _ in tokens]
        pieces[number].learned += [_inside(place, rendered.trained) for _, place in tokens]
    return pieces


def _segments(rendered: Rendered) -> list[tuple[int, Span, bool]]:
    """Number of the piece, characters, whether it is a control token; none is empty."""
    marks = [(span, True) for span in rendered.controls]
    marks += [(span, False) for span in rendered.images]
    segments, place, piece = [], 0, 0
    for span, control in [*sorted(marks), (Span(len(rendered.text), len(rendered.text)), False)]:
        if place < span.start:
            segments.append((piece, Span(place, span.start), False))
        if control:
            segments.append((piece, span, True))
        else:
            piece += 1
        place = span.end
    return segments


def _encoded(
    texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[tuple[int, tuple[int, int]]]]:
    """Id and characters of each token of each text, which the tokenizer's parts see alone."""
    if not texts:
        return []
    found = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        split_special_tokens=True,
        verbose=False,
    )
    return [
        list(zip(ids, offsets, strict=True))
        for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _inside(token: Span, spans: tuple[Span, ...]) -> bool:
    """Whether a token lies in one of the spans, which ascend."""
    last = bisect_right(spans, token.start, key=lambda span: span.start) - 1
    return last >= 0 and token.end <= spans[last].end
