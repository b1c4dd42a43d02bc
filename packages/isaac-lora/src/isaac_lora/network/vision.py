"""The vision tower: SigLIP2 on packed patches of any number of images, then a pixel shuffle.

Patches of all images stand in one sequence. Attention stays inside one image and is computed image
by image, images of one size that follow each other together, so memory grows with the largest
image and not with the square of the packed length.
"""

from __future__ import annotations

from itertools import groupby
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from isaac_lora.network.configuration import IsaacVisionConfig
from isaac_lora.pictures.pixels import normalise
from lora_core.errors import DataError
from lora_core.report import plural

Grid = tuple[int, int]  # rows and columns of patches


class IsaacVisionEmbeddings(nn.Module):
    """Patches to tokens: a linear map plus the position table, resized to each image's grid."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        values = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(values, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """Map (sum N, 3 p^2) patches to (sum N, V), in the dtype of the weights.

        uint8 are levels 0..255 and are normalised here, once, where the tower computes.
        """
        weight = self.patch_embedding.weight
        if patches.dtype == torch.uint8:
            patches = normalise(patches)
        return self.patch_embedding(patches.to(weight.dtype)) + self.positions(grids)

    def positions(self, grids: list[Grid]) -> Tensor:
        """Give the position of every patch, (sum N, V): the square table, resized per image."""
        weight = self.position_embedding.weight
        side = isqrt(len(weight))
        # In float32: there is no antialiased resize of half precision on a CPU.
        table = weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = {grid: _resized(table, grid) for grid in dict.fromkeys(grids)}
        return torch.cat([resized[grid] for grid in grids]).to(weight.dtype)


def _resized(table: Tensor, grid: Grid) -> Tensor:
    """Resize (1, V, side, side) to the grid and give its rows, (rows * columns, V)."""
    resized = F.interpolate(table, grid, mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).squeeze(0).T


class IsaacVisionAttention(nn.Module):
    """Full attention among the patches of one image, with biases, without rotation."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = float(config.attention_dropout)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """Attend within images. `hidden_states`: (sum N, V); `runs`: see `equal_runs`."""
        q, k, v = (
            projection(hidden_states).split([count * size for count, size in runs])
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        parts = zip(q, k, v, runs, strict=True)
        attended = [self._attend(a, b, c, count) for a, b, c, (count, _) in parts]
        return self.out_proj(torch.cat(attended))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
        q, k, v = (
            part.view(count, len(part) // count, self.num_heads, -1).transpose(1, 2)
            for part in (q, k, v)
        )
        dropout = self.dropout if self.training else 0.0
        result = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return result.transpose(1, 2).flatten(2).flatten(0, 1)


class IsaacVisionMLP(nn.Module):
    """Two linear maps with the tanh form of GELU between them."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class IsaacVisionEncoderLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = IsaacVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = IsaacVisionMLP(config)

    def forward(self, hidden_states: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), runs)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class IsaacVisionEncoder(nn.Module):
    """The layers of the tower."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            IsaacVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, runs)
        return hidden_states


class IsaacVisionTransformer(nn.Module):
    """Patches of all images of a batch to the tokens of these images."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = IsaacVisionEmbeddings(config)
        self.encoder = IsaacVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Run the tower.

        Args:
            patches: (sum N, 3 p^2), images one after the other, patches row by row; uint8, or
                floats that `pictures.pixels.normalise` has made of them.
            grids: (images, 2) integer, rows and columns of patches.

        Returns:
            (sum N / r^2, r^2 V), shuffled, in the dtype of the weights.

        Raises:
            DataError: the grids do not cover the patches, or do not divide by r.
        """
        grid_list: list[Grid] = [(int(rows), int(columns)) for rows, columns in grids.tolist()]
        scale = self.config.pixel_shuffle_scale_factor
        _check_grids(len(patches), grid_list, scale)
        hidden_states = self.embeddings(patches, grid_list)
        hidden_states = self.encoder(hidden_states, equal_runs(grid_list))
        return pixel_shuffle(self.post_layernorm(hidden_states), grid_list, scale)


def _check_grids(patches: int, grids: list[Grid], scale: int) -> None:
    total = sum(rows * columns for rows, columns in grids)
    if total != patches:
        raise DataError(
            f"`patches` has {plural(patches, 'row')}, but `grids` is of "
            f"{plural(len(grids), 'image')} with {total} patches together; make both "
            "from the same images"
        )
    odd = [grid for grid in grids if grid[0] % scale or grid[1] % scale]
    if odd:
        raise DataError(
            f"an image of {odd[0][0]} x {odd[0][1]} patches cannot be shuffled by {scale}: both "
            "sides must be multiples of it; resize images to multiples of patch size times shuffle"
        )


def equal_runs(grids: list[Grid]) -> list[tuple[int, int]]:
    """Give (images, patches of each) for every run of neighbours with equally many patches."""
    return [
        (len(list(run)), size) for size, run in groupby(rows * columns for rows, columns in grids)
    ]


def pixel_shuffle(hidden_states: Tensor, grids: list[Grid], scale: int) -> Tensor:
    """Join the patches of every r x r block to one token, (sum N, V) to (sum N / r^2, r^2 V).

    Tokens stand row by row, patches row by row inside a token; r = 1 changes nothing.
    """
    if scale == 1:
        return hidden_states
    images = hidden_states.split([rows * columns for rows, columns in grids])
    return torch.cat(
        [_blocks(image, grid, scale) for image, grid in zip(images, grids, strict=True)]
    )


def _blocks(image: Tensor, grid: Grid, scale: int) -> Tensor:
    rows, columns = grid[0] // scale, grid[1] // scale
    blocks = image.view(rows, scale, columns, scale, -1).transpose(1, 2)
    return blocks.reshape(rows * columns, -1)
