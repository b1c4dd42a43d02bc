"""Depth that is not the picture's own: what is left of the answers tells whether depth was used.

    ShuffledDepth(depths, pictures)    that of another picture
    ConstantDepth(depths)              the same value everywhere

Both take the place of `DepthGrids` where parts are made and joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from isaac_lora.depth.depth_cache import DepthGrids, UnseenDepth
from isaac_lora.pictures.content import KnownPicture
from lora_core.errors import DataError

MIDDLE = 0.5  # of the normalised depth, 0 to 1


class DepthSource(Protocol):
    """What gives the depth of pictures, as `DepthGrids` does."""

    def part(self, picture: KnownPicture) -> Tensor | UnseenDepth:
        """The depth of a picture's tokens, or what `joined` computes it from."""

    def joined(self, parts: Sequence[Tensor | UnseenDepth]) -> Tensor:
        """The depth of all tokens of a batch, float32 [sum of tokens] in 0..1."""


@dataclass(frozen=True)
class ConstantDepth:
    """Every place of every picture is as near as every other one."""

    depths: DepthGrids

    def part(self, picture: KnownPicture) -> Tensor:
        """See `DepthSource`."""
        rows, columns = picture.grid
        return torch.full((rows * columns,), MIDDLE)

    def joined(self, parts: Sequence[Tensor | UnseenDepth]) -> Tensor:
        """See `DepthSource`."""
        return self.depths.joined(parts)


class ShuffledDepth:
    """Every picture has the depth of another one, brought to its own grid of tokens.

    Pictures of one content are one picture. Which other one it is follows from the digests of all
    pictures alone: half the circle of them further, in the order of their digests.

    Args:
        pictures: all that will be asked about.

    Raises:
        DataError: fewer than two different pictures.
    """

    def __init__(self, depths: DepthGrids, pictures: Iterable[KnownPicture]) -> None:
        self.depths = depths
        known = {picture.content: picture for picture in pictures}
        if len(known) < 2:
            raise DataError(
                "the depth of another picture was asked for, but there are not two different "
                "pictures: leave out --shuffled_depth"
            )
        contents = sorted(known)
        away = len(contents) // 2
        turned = contents[away:] + contents[:away]
        self.other = {own: known[other] for own, other in zip(contents, turned, strict=True)}

    def part(self, picture: KnownPicture) -> Tensor | UnseenDepth:
        """See `DepthSource`."""
        return self.depths.part(replace(self.other[picture.content], grid=picture.grid))

    def joined(self, parts: Sequence[Tensor | UnseenDepth]) -> Tensor:
        """See `DepthSource`."""
        return self.depths.joined(parts)
