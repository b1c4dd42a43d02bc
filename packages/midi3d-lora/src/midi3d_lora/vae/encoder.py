"""The encoder: chosen points ask all points of the surface, then one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from midi3d_lora.transformer.blocks import LayerNorm
from midi3d_lora.vae.blocks import CrossBlock, SelfBlock


class Encoder(nn.Module):
    """Block 0 is the cross-attention to the surface, blocks 1 ... L are self-attention."""

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, in_channels: int, width: int, heads: int, num_layers: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(in_channels, width)
        cross = CrossBlock(width, heads)
        self.blocks = nn.ModuleList([cross, *(SelfBlock(width, heads) for _ in range(num_layers))])
        self.norm_out = LayerNorm(width)
        self.gradient_checkpointing = False  # diffusers sets it, and the function below

    def forward(self, sampled: Tensor, surface: Tensor) -> Tensor:
        """Features [B, N, C] of the chosen and [B, M, C] of all points to tokens [B, N, W]."""
        x = self.proj_in(sampled)
        cross = self.blocks[0]
        assert isinstance(cross, CrossBlock)
        x = cross(x, *cross.attn2.keys_values(self.proj_in(surface)))
        for block in self.blocks[1:]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        out: Tensor = self.norm_out(x)
        return out
