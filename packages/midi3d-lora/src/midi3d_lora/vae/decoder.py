"""The decoder: latents become a context, and any point in space asks it for the field's value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from midi3d_lora.transformer.blocks import LayerNorm
from midi3d_lora.vae.blocks import CrossBlock, SelfBlock
from midi3d_lora.vae.frequencies import FrequencyEmbedding


class Decoder(nn.Module):
    """Blocks 0 ... L-1 are self-attention of the latents, block L is the queries' attention."""

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self, embedding: FrequencyEmbedding, width: int, heads: int, num_layers: int
    ) -> None:
        super().__init__()
        self.embedding = embedding
        cross = CrossBlock(width, heads)
        self.blocks = nn.ModuleList([*(SelfBlock(width, heads) for _ in range(num_layers)), cross])
        self.proj_query = nn.Linear(embedding.out_channels, width)
        self.norm_out = LayerNorm(width)
        self.proj_out = nn.Linear(width, 1)
        self.gradient_checkpointing = False  # diffusers sets it, and the function below

    def context(self, x: Tensor) -> Tensor:
        """What every query asks: projected latents [B, N, W] after the self-attention blocks."""
        for block in self.blocks[:-1]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the last block: they are the same for all queries."""
        cross = self.blocks[-1]
        assert isinstance(cross, CrossBlock)
        return cross.attn2.keys_values(context)

    def forward(self, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Points [B, Q, 3] to the field's values, float32 [B, Q, 1].

        -1 times the network's output, as the official decoder: the released weights were trained
        with the other sign. Which sign is inside, `midi3d_lora.meshes.extraction` finds out.
        """
        dtype = self.proj_query.weight.dtype
        x = self.proj_query(self.embedding(queries).to(dtype))
        x = self.blocks[-1](x, key, value)
        out: Tensor = self.proj_out(self.norm_out(x)).float()
        return -out


class DecodedField:
    """The field of one instance as a function of points, its context computed once."""

    def __init__(self, decoder: Decoder, context: Tensor) -> None:
        """`context`: [1, N, W], from `Decoder.context`."""
        self.decoder = decoder
        self.device = context.device
        with torch.inference_mode():
            self.key, self.value = decoder.keys_values(context)

    def __call__(self, points: Tensor) -> Tensor:
        """[Q, 3] points on any device to float32 [Q] on the decoder's; no gradient."""
        with torch.inference_mode():
            queries = points.to(self.device)[None]
            return self.decoder(queries, self.key, self.value)[0, :, 0]
