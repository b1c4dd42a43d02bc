"""The image encoder of transformers without what it computes and nothing reads.

Outputs and gradients are the same, bit for bit. Importing this imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention


def lighten(encoder: Any) -> None:
    """Change a `Sam2VisionModel` in place; its weights and their names stay."""
    encoder.neck.position_encoding = NoPositions()
    for block in encoder.backbone.blocks:
        block.attn.__class__ = Attention


class Attention(Sam2MultiScaleAttention):
    """Hiera's attention.

    That of transformers multiplies queries and keys of each place across its heads as well, takes
    the softmax of these products, and drops them.
    """

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """[B, H, W, C] -> [B, H', W', C'], H' and W' being half at the beginning of a stage."""
        batch, height, width, _channels = hidden_states.shape
        heads = self.num_attention_heads
        qkv = self.qkv(hidden_states).reshape(batch, height * width, 3, heads, -1)
        query, key, value = qkv.unbind(2)
        if self.query_stride:
            places = query.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
            pooled = F.max_pool2d(places, self.query_stride, self.query_stride).permute(0, 2, 3, 1)
            height, width = pooled.shape[1:3]
            query = pooled.reshape(batch, height * width, heads, -1)
        found = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=self.scale
        )
        return self.proj(found.transpose(1, 2).reshape(batch, height, width, -1))


class NoPositions(nn.Module):
    """Zeros in place of the neck's position encodings, which only the memory of videos reads.

    transformers computes them for each batch of pictures: sines of B x 256 x H/4 x W/4 and two
    smaller levels, of which it keeps the largest until the next batch.
    """

    def forward(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One zero in any shape [B, C, H, W], without memory for it."""
        return torch.zeros((), dtype=dtype, device=device).expand(shape)
