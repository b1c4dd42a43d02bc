"""Conversations that were looked at, and which of them are kept out of training."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isaac_lora.conversations.pictures import read_picture
from isaac_lora.conversations.records import Conversation
from isaac_lora.conversations.samples import Sample, outline
from isaac_lora.pictures.content import KnownPicture, Picture, content_digest
from isaac_lora.pictures.target_size import PictureRules, patch_grid, token_grid
from lora_core.errors import DataError
from lora_core.pictures.survey import digest_of
from lora_core.settings.types import shown
from lora_core.training.loading import retried

if TYPE_CHECKING:
    from isaac_lora.processing import IsaacProcessor

FEWEST_FOR_VALIDATION = 10  # conversations from which some are kept out of training


@dataclass(frozen=True)
class Example:
    """A conversation that was looked at, and is good.

    Attributes:
        conversation: as it is trained: cut, if it was too long.
        folder: what relative paths of its pictures start from; None: the working directory.
        tokens, image_tokens, label_tokens: places of its sequence, those of pictures, and those
            that are learned.
        sizes: (height, width) of each picture. contents: see `content_digest`.
    """

    conversation: Conversation
    folder: Path | None
    tokens: int
    image_tokens: int
    label_tokens: int
    sizes: tuple[tuple[int, int], ...]
    contents: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name, unique in its file."""
        return self.conversation.key

    @property
    def content(self) -> str:
        """Digest of what is said and shown in it."""
        return digest_of(list(self.conversation.turns), list(self.contents))

    def outline(self, processor: IsaacProcessor) -> Sample:
        """Its sequence without patches; see `outline`."""
        return outline(self.conversation, self.sizes, processor)

    def pictures(self, rules: PictureRules) -> list[KnownPicture]:
        """Its pictures, in the order of their places; each is decoded when it is read."""
        found = []
        images = self.conversation.images
        for source, size, content in zip(images, self.sizes, self.contents, strict=True):
            name = f"{shown(self.key)}: image {shown(source[:60])}"
            grid = token_grid(patch_grid(*size, rules), rules)
            read = partial(_read_again, source, self.folder, content, name)
            found.append(KnownPicture(name, content, grid, read))
        return found


def _read_again(source: str, folder: Path | None, content: str, name: str) -> Picture:
    """A picture that was looked at before.

    Raises:
        DataError: it cannot be read any more, after some attempts; or it is another one now.
    """
    picture: Picture = retried(lambda: read_picture(source, folder))
    if content_digest(picture) != content:
        raise DataError(
            f"{name}: its pixels have changed since the run began: bring the old file back, or "
            "start a new run"
        )
    return picture


# -- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Conversations that are loaded together: one, or several that are packed.

    Attributes:
        examples: in their order in the row.
    """

    examples: tuple[Example, ...]

    @property
    def key(self) -> str:
        """Their names, for messages."""
        more = len(self.examples) - 1
        return self.examples[0].key + (f" and {more} more" if more else "")

    @property
    def tokens(self) -> int:
        """Places of the row."""
        return sum(example.tokens for example in self.examples)


def single_rows(examples: Sequence[Example]) -> list[Row]:
    """Each conversation in a row of its own."""
    return [Row((example,)) for example in examples]


def packed_rows(
    examples: Sequence[Example], most: int, seed: int, open_rows: int = 32
) -> list[Row]:
    """Conversations in rows of at most `most` places, each once, in an order by the seed.

    Each goes into the fullest open row that it fits into. If there is none, a new row is opened,
    and of more than `open_rows` the fullest is closed. A longer conversation is alone.
    """
    order = np.random.default_rng([seed % 2**32, len(examples)]).permutation(len(examples))
    done, opened = list[list[Example]](), list[list[Example]]()
    used: list[int] = []  # places of each open row
    for example in (examples[index] for index in order):
        fitting = [n for n, places in enumerate(used) if places + example.tokens <= most]
        if fitting:
            row = max(fitting, key=used.__getitem__)
            opened[row].append(example)
            used[row] += example.tokens
            continue
        opened.append([example])
        used.append(example.tokens)
        if len(opened) > open_rows:
            fullest = max(range(len(used)), key=used.__getitem__)
            done.append(opened.pop(fullest))
            used.pop(fullest)
    return [Row(tuple(row)) for row in [*done, *opened]]


# -- validation ------------------------------------------------------------------------------------


def divided(
    records: Sequence[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations for training and for validation; those about one picture stay together.

    By the digests of the first pictures' names, or of the conversations' own names where they have
    no picture: more conversations leave most of those that were kept out where they are.
    """
    count = int(share * len(records)) if len(records) >= FEWEST_FOR_VALIDATION else 0
    groups = defaultdict[str, list[Conversation]](list)
    for record in records:
        groups[record.images[0] if record.images else record.key].append(record)
    kept_out = set[int]()
    for name in sorted(groups, key=_digest):
        if len(kept_out) + len(groups[name]) <= count:
            kept_out |= {record.index for record in groups[name]}
    train = [record for record in records if record.index not in kept_out]
    return train, [record for record in records if record.index in kept_out]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
