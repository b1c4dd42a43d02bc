"""What is added to the projector's output for the pictures of a batch, from the pictures.

Training takes the depth of its tokens from the cache and calls `encode_depth` on the device; this
is the same for pictures at hand, as in a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.encoding import encode_depth, token_grid
from isaac_lora.depth.settings import ALPHA
from isaac_lora.pictures.content import Picture, content_digest


def depth_values_of(
    pictures: Sequence[Picture], grids: Iterable[Sequence[int]], shuffle: int, depths: DepthGrids
) -> Tensor:
    """The normalised depth of the tokens of pictures, one picture after the other.

    Args:
        pictures: RGB, uint8 [H, W, 3], as they lie in their files.
        grids: rows and columns of patches of each, before the shuffle by `shuffle`.

    Returns:
        float32 [sum of tokens] in 0..1 on the CPU.

    Raises:
        ValueError: another number of grids than of pictures.
        NumericError: a depth that is not finite.
    """
    values = [torch.zeros(0)]
    for number, (picture, (rows, columns)) in enumerate(zip(pictures, grids, strict=True), start=1):
        grid = token_grid(int(rows), int(columns), shuffle)
        values.append(depths.values(picture, content_digest(picture), grid, f"image {number}"))
    return torch.cat(values)


def depth_encoding_of(
    pictures: Sequence[Picture],
    grids: Iterable[Sequence[int]],
    shuffle: int,
    depths: DepthGrids,
    channels: int,
    alpha: float = ALPHA,
) -> Tensor:
    """The `depth_encoding` of `IsaacForConditionalGeneration`; see `depth_values_of`.

    Args:
        channels: C, the decoder's hidden size. alpha: scale of the normalised depth.

    Returns:
        float32 [sum of tokens, C] on the device of `depths`.
    """
    values = depth_values_of(pictures, grids, shuffle, depths).to(depths.device)
    return encode_depth(values * alpha, channels)
