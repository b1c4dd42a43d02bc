"""The image encoder: vision transformer with windows and rotary positions, and its feature maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sam3_lora.attention import attend, block
from sam3_lora.positions import position_map, rotate, rotations

if TYPE_CHECKING:
    from transformers import Sam3Model


class Features(NamedTuple):
    """What the detector needs of I images; h = H / patch, w = W / patch cells (patch 14)."""

    map: Tensor  # [I, C, h, w]
    position: Tensor  # f32 [h w, C], sine code of the cells
    fine: tuple[Tensor, ...]  # [I, C, 4 h, 4 w], [I, C, 2 h, 2 w]; empty without masks

    @property
    def tokens(self) -> Tensor:
        """The map as a sequence, [I, h w, C]."""
        return self.map.flatten(2).transpose(1, 2).contiguous()


def encode_images(model: Sam3Model, pixel_values: Tensor, *, masks: bool = True) -> Features:
    """Feature maps of images, with gradient; the same for every phrase.

    Args:
        pixel_values: f32 [I, 3, H, W], normalised; both sides multiples of the patch size (14).
        masks: also compute the two finer maps, which only the mask head reads.

    Raises:
        ValueError: a side that is no multiple of the patch size.
    """
    return feature_maps(model, encode_trunk(model, pixel_values), masks=masks)


def feature_maps(model: Sam3Model, trunk: Tensor, *, masks: bool = True) -> Features:
    """What the neck makes of the transformer's output, with gradient.

    Args:
        trunk: [I, h, w, width], of `encode_trunk`.
        masks: as for `encode_images`.
    """
    height, width = trunk.shape[1:3]
    levels = model.vision_encoder.neck.fpn_layers
    coarse = _level(levels[2], trunk.permute(0, 3, 1, 2))
    fine = tuple(
        block(model, levels[j], _level, trunk.permute(0, 3, 1, 2)) for j in range(2 if masks else 0)
    )  # level 3 of the official model is computed there and thrown away
    position = position_map(height, width, coarse.shape[1], coarse.device)
    return Features(coarse, position.flatten(0, 1), fine)


def _level(level: Any, x: Tensor) -> Tensor:
    for layer in level.scale_layers:
        x = layer(x)
    return level.proj2(level.proj1(x))


# -- windows -------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """How the tokens of a grid lie in square windows, the last ones padded to full size.

    A slot is a place in a window, slots are numbered window after window.
    """

    area: int  # slots of a window
    slot_of: Tensor  # i64 [h w], the slot of each token
    token_in: Tensor  # i64 [slots], the token in each slot; h w: padding
    padded: bool


def windows(height: int, width: int, side: int, device: torch.device) -> Windows:
    """Cut a grid of `height` x `width` tokens (numbered row by row) into windows of `side`²."""
    across, down = -(-width // side), -(-height // side)
    token = torch.arange(height * width, device=device)
    y, x = token // width, token % width
    window = y // side * across + x // side
    slot_of = (window * side + y % side) * side + x % side
    token_in = torch.full((across * down * side**2,), height * width, device=device)
    token_in[slot_of] = token
    return Windows(side**2, slot_of, token_in, len(token_in) > len(token))


# -- transformer ---------------------------------------------------------------------------------


def encode_trunk(model: Sam3Model, pixel_values: Tensor) -> Tensor:
    """The transformer's output of images, [I, 3, H, W] -> [I, h, w, width], with gradient.

    Where the windows fill the grid, the tokens stay in the order of the windows from the first
    block to the last: a window block then is a view, and a global block does not mind the order.
    """
    vit = model.vision_encoder.backbone
    x, (height, width) = _embed(vit, pixel_values)
    grid = windows(height, width, vit.config.window_size, x.device)
    in_window, on_grid = rotary_tables(vit.config, height, width, x.device)
    if not grid.padded:
        x, on_grid = x.index_select(1, grid.token_in), on_grid[grid.token_in]
    for layer in vit.layers:
        if layer.window_size == 0:
            x = block(model, layer, _global_block, x, on_grid)
        elif grid.padded:
            x = block(model, layer, _padded_block, x, in_window, grid)
        else:
            x = block(model, layer, _window_block, x, in_window, grid.area)
    if not grid.padded:
        x = x.index_select(1, grid.slot_of)
    return x.unflatten(1, (height, width))


def _embed(vit: Any, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Tokens [I, h w, width], row by row, and (h, w)."""
    patch = vit.config.patch_size
    sides = tuple(pixel_values.shape[-2:])
    if any(side < patch or side % patch for side in sides):
        raise ValueError(f"images of {sides} pixels: both sides must be multiples of {patch}")
    height, width = sides[0] // patch, sides[1] // patch
    x = vit.embeddings.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
    known = vit.embeddings.position_embeddings[0]  # of the images of pre-training
    side = round(len(known) ** 0.5)
    rows = torch.arange(height, device=x.device) % side  # tiled, not interpolated
    columns = torch.arange(width, device=x.device) % side
    x = x + known.unflatten(0, (side, side))[rows[:, None], columns].flatten(0, 1)
    return vit.layer_norm(vit.embeddings.dropout(x)), (height, width)


def rotary_tables(
    config: Any, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotations of the tokens of one window [side², d / 2] and of the grid [h w, d / 2].

    In a window x and y count cells, 0 to side - 1. On the grid each axis is scaled by side / cells
    to the same range, so that a place in the image keeps its angle at every size and shape.

    Args:
        config: a `Sam3ViTConfig`.
    """
    side, head_dim = config.window_size, config.hidden_size // config.num_attention_heads
    tables = []
    for rows, columns in ((side, side), (height, width)):
        y = torch.arange(rows, device=device) * (side / rows)
        x = torch.arange(columns, device=device) * (side / columns)
        flat = x.repeat(rows), y.repeat_interleave(columns)
        tables.append(rotations(*flat, head_dim, config.rope_parameters["rope_theta"]))
    return tables[0], tables[1]


def _global_block(layer: Any, x: Tensor, table: Tensor) -> Tensor:
    return _mlp(layer, x + _attention(layer.attention, layer.layer_norm1(x), table))


def _window_block(layer: Any, x: Tensor, table: Tensor, area: int) -> Tensor:
    parts = layer.layer_norm1(x).unflatten(1, (-1, area)).flatten(0, 1)
    return _mlp(layer, x + _attention(layer.attention, parts, table).view_as(x))


def _padded_block(layer: Any, x: Tensor, table: Tensor, grid: Windows) -> Tensor:
    return _mlp(layer, x + _padded_attention(layer.attention, layer.layer_norm1(x), table, grid))


def _mlp(layer: Any, x: Tensor) -> Tensor:
    return x + layer.dropout(layer.mlp(layer.layer_norm2(x)))


def _attention(module: Any, x: Tensor, table: Tensor) -> Tensor:
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    return module.o_proj(_rotary(module, q, k, v, table))


def _padded_attention(module: Any, x: Tensor, table: Tensor, grid: Windows) -> Tensor:
    """Attention in windows of which some slots are empty.

    The official model fills them with zeros before the projections and does not mask them. One
    token of zeros stands for all of them here, so that the projections run over h w + 1 tokens.
    """
    x = F.pad(x, (0, 0, 0, 1))
    q, k, v = (
        projection(x).index_select(1, grid.token_in).view(-1, grid.area, x.shape[-1])
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = _rotary(module, q, k, v, table).view(len(x), -1, x.shape[-1])
    return module.o_proj(out.index_select(1, grid.slot_of))


def _rotary(module: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    heads = module.num_attention_heads
    q, k = (rotate(part.unflatten(-1, (heads, -1)), table).flatten(-2) for part in (q, k))
    return attend(q, k, v, heads)
