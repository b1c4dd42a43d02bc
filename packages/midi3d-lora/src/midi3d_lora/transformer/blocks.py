"""A block of the transformer, and its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.weights import without_autocast
from midi3d_lora.transformer.attention import Attention
from midi3d_lora.transformer.groups import GroupPlan

LAYER_NORM_EPS = 1e-5


class LayerNorm(nn.LayerNorm):
    """Computed in float32, also under autocast, and given back in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] -> [.., W]."""
        with without_autocast(x.device):
            if x.dtype == self.weight.dtype:  # torch's kernels compute in float32 by themselves
                return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            weight, bias = self.weight.float(), self.bias.float()
            normed = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
            return normed.to(x.dtype)


class GELU(nn.Module):
    """GELU(Linear(x)), exact; key `proj`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] -> [.., hidden]."""
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear(GELU(Linear(x))) with 4 W hidden channels; keys `net.0.proj`, `net.2`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The official dropout of probability 0 stands at place 1.
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] -> [.., W]."""
        result: Tensor = self.net(x)
        return result


class DiTBlock(nn.Module):
    """Self-attention, two cross-attentions that read the same x, feed-forward.

    Args:
        width: W. heads: of the attentions.
        cross_attention_dim, cross_attention_2_dim: channels of the two contexts.
        skip: takes the output of an earlier block.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        cross_attention_dim: int,
        cross_attention_2_dim: int,
        skip: bool,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, cross_attention_dim)
        self.norm2_2 = LayerNorm(width)
        self.attn2_2 = Attention(width, heads, cross_attention_2_dim)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.skip_norm = LayerNorm(width) if skip else None

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        context_2: Tensor,
        skip: Tensor | None = None,
        plan: GroupPlan | None = None,
    ) -> Tensor:
        """[B, 1 + N, W] -> the same.

        Args:
            context, context_2: [B, T1, cross_attention_dim], [B, T2, cross_attention_2_dim].
            skip: [B, 1 + N, W] output of an earlier block, for a block that takes one.
            plan: the scenes whose rows attend to each other; None: each row alone.
        """
        if self.skip_linear is not None and self.skip_norm is not None:
            assert skip is not None
            x = self.skip_norm(self.skip_linear(torch.cat([skip, x], dim=-1)))
        x = x + self.attn1(self.norm1(x), plan=plan)
        if context.shape[1] == 1:  # exact, and saves a tenth of the block
            first = self.attn2.of_single_token(context)
        else:
            first = self.attn2(self.norm2(x), context)
        x = x + first + self.attn2_2(self.norm2_2(x), context_2)
        return x + self.ff(self.norm3(x))
