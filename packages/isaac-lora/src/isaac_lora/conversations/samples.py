"""A conversation as one sequence: ids, labels, places of pictures, and the pictures' patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isaac_lora.conversations.pictures import read_picture
from isaac_lora.conversations.records import Conversation
from isaac_lora.conversations.template import render
from isaac_lora.conversations.tokens import Piece, encode
from isaac_lora.pictures.pixels import preprocess
from isaac_lora.pictures.target_size import Grid, PictureRules, patch_grid, token_grid
from lora_core.errors import DataError
from lora_core.report import plural

if TYPE_CHECKING:
    from isaac_lora.processing import IsaacProcessor

IGNORED = -100  # the label of what is not learned


@dataclass(frozen=True)
class Sample:
    """A sequence of L places, of which pictures take some.

    Attributes:
        input_ids: i64 [L]; at places of pictures an id that is never looked up.
        labels: i64 [L]: the id itself where it is learned, else -100.
        image_mask: bool [L]: places of pictures. Ids do not tell: a question may hold any token.
        grids: i64 [pictures, 2]: rows and columns of patches, before the shuffle.
        patches: uint8 [N, 3 p²] of all pictures in order; None: not loaded.
        pictures: uint8 [H, W, 3] each, as they were given; empty unless asked for.
        key: name of the conversation.
    """

    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    grids: Tensor
    patches: Tensor | None = None
    pictures: tuple[NDArray[np.uint8], ...] = ()
    key: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_label_tokens(self) -> int:
        """Labels that a prediction is compared with; nothing predicts the first place."""
        return int((self.labels[1:] != IGNORED).sum())


def assemble(
    pieces: Sequence[Piece],
    grids: Sequence[Grid],
    rules: PictureRules,
    image_id: int,
    key: str = "",
) -> Sample:
    """Join texts and pictures in turn: piece, picture, piece, ..., piece.

    A picture takes one place per cell of its shuffled grid, row by row.

    Args:
        image_id: the id that stands at places of pictures.

    Raises:
        DataError: the number of pictures is not that of the places for them.
    """
    places = len(pieces) - 1
    if places != len(grids):
        raise DataError(
            f"{plural(places, 'place')} for pictures in the text, but {plural(len(grids), 'image')}"
        )
    counts = [token_grid(grid, rules).cells for grid in grids]
    ids, labels, mask = list[int](), list[int](), list[bool]()
    for piece, count in zip(pieces, [*counts, 0], strict=True):
        ids += [*piece.ids, *[image_id] * count]
        learned = zip(piece.ids, piece.learned, strict=True)
        labels += [token if yes else IGNORED for token, yes in learned] + [IGNORED] * count
        mask += [False] * len(piece.ids) + [True] * count
    return Sample(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor([tuple(grid) for grid in grids], dtype=torch.int64).reshape(-1, 2),
        key=key,
    )


def with_pictures(
    sample: Sample,
    pictures: Sequence[NDArray[np.uint8]],
    rules: PictureRules,
    keep_pictures: bool = False,
) -> Sample:
    """`sample` with the patches of its pictures, and with these themselves if they are to be kept.

    Raises:
        DataError: a picture has another size than when the sample was assembled.
    """
    made = [preprocess(picture, rules) for picture in pictures]
    grids = [grid for _, grid in made]
    if [list(grid) for grid in grids] != sample.grids.tolist():
        raise DataError("a picture's size is not what it was when it was checked: start again")
    width = 3 * rules.patch_size**2
    patches = [p for p, _ in made] or [torch.empty(0, width, dtype=torch.uint8)]
    joined = torch.cat(patches) if len(patches) > 1 else patches[0]
    return replace(sample, patches=joined, pictures=tuple(pictures) if keep_pictures else ())


# -- records ---------------------------------------------------------------------------------------


def outline(
    conversation: Conversation, sizes: Sequence[tuple[int, int]], processor: IsaacProcessor
) -> Sample:
    """The sequence of a conversation whose pictures have these (height, width), without patches.

    Raises:
        DataError: a picture that is too large; a template that refuses the turns.
    """
    grids = [patch_grid(height, width, processor.rules) for height, width in sizes]
    rendered = render(conversation.turns, processor.tokenizer, vision_token=processor.vision_token)
    pieces = encode(rendered, processor.tokenizer)
    return assemble(pieces, grids, processor.rules, processor.image_id, conversation.key)


def load_sample(
    conversation: Conversation,
    processor: IsaacProcessor,
    folder: Path | None = None,
    keep_pictures: bool = False,
) -> Sample:
    """The sequence of a conversation with its patches.

    Args:
        folder: what relative paths of pictures start from; None: the working directory.
        keep_pictures: for depth, which is estimated from the whole picture.

    Raises:
        DataError: a picture that cannot be read.
    """
    pictures = [read_picture(source, folder) for source in conversation.images]
    sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    sample = outline(conversation, sizes, processor)
    return with_pictures(sample, pictures, processor.rules, keep_pictures)
