"""Blocks of the autoencoder: the transformer's head split, without norms of queries and keys.

Names and shapes of the parameters are those of the released checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn

from midi3d_lora.transformer.attention import attend, deal
from midi3d_lora.transformer.blocks import FeedForward, LayerNorm


class Attention(nn.Module):
    """Attention within a set, or from one set to another, whose norm is key `norm_cross`."""

    def __init__(self, width: int, heads: int, crossed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_cross = LayerNorm(width) if crossed else None

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention: [B, T, W] -> [B, T, W]."""
        q, k, v = deal([self.to_q(x), self.to_k(x), self.to_v(x)], self.heads)
        result: Tensor = self.to_out[0](attend(q, k, v))
        return result

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T', H, d] of a context [B, T', W]."""
        if self.norm_cross is not None:
            context = self.norm_cross(context)
        k, v = deal([self.to_k(context), self.to_v(context)], self.heads)
        return k, v

    def from_context(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cross-attention of [B, T, W] to what `keys_values` gave."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        result: Tensor = self.to_out[0](attend(q, k, v))
        return result


class SelfBlock(nn.Module):
    """x += attention(norm(x)), x += feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads, crossed=False)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        x = x + self.attn1(self.norm1(x))
        result: Tensor = x + self.ff(self.norm3(x))
        return result


class CrossBlock(nn.Module):
    """x += attention(norm(x), context), x += feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, crossed=True)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, W]; k and v are `self.attn2.keys_values(context)`."""
        x = x + self.attn2.from_context(self.norm2(x), k, v)
        result: Tensor = x + self.ff(self.norm3(x))
        return result
