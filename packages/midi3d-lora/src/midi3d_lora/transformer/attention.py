"""TripoSG's attention: an interleaved head split, RMS norms of queries and keys, joint scenes.

The projections are laid side by side as slots of d channels and dealt out to the heads *after*
that: in self-attention head h takes the slots 3h, 3h + 1, 3h + 2 of [Q | K | V], in cross-attention
the slots 2h, 2h + 1 of [K | V]. So `to_q` of a self-attention makes query, key and value of the
first third of the heads. The names are those of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.weights import without_autocast
from midi3d_lora.transformer.groups import GroupPlan

RMS_EPS = 1e-6


def deal(projections: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """Deal the slots of n projections out to the heads: n of [B, T, W] -> n of [B, T, H, d].

    Slot n h + i of the projections side by side is the i-th thing of head h.
    """
    n = len(projections)
    slots = torch.cat(list(projections), dim=-1)
    return slots.unflatten(-1, (heads, n, slots.shape[-1] // (n * heads))).unbind(-2)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + 1e-6) w over the last axis, the mean in float32; key `weight`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] -> [.., d], in the dtype of x."""
        with without_autocast(x.device):
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), RMS_EPS)


class Attention(nn.Module):
    """Self-attention, or cross-attention to a context of another width.

    Keys `to_q`, `to_k`, `to_v` (no bias), `to_out.0`, `norm_q`, `norm_k`.

    Args:
        width: W of the queries and of the result. heads: H, each of d = W / H channels.
        context_dim: channels of the context; None: self-attention.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.crossed = context_dim is not None
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim or width, width, bias=False)
        self.to_v = nn.Linear(context_dim or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = RMSNorm(width // heads)
        self.norm_k = RMSNorm(width // heads)

    def forward(
        self, x: Tensor, context: Tensor | None = None, plan: GroupPlan | None = None
    ) -> Tensor:
        """[B, T, W] -> [B, T, W].

        Args:
            context: [B, T', context_dim] of a cross-attention.
            plan: of a self-attention among all tokens of a scene; None: each row alone.
        """
        if self.crossed:
            q = self.to_q(x).unflatten(-1, (self.heads, -1))
            k, v = deal([self.to_k(context), self.to_v(context)], self.heads)
        else:
            q, k, v = deal([self.to_q(x), self.to_k(x), self.to_v(x)], self.heads)
        q, k = self.norm_q(q), self.norm_k(k)
        out = attend(q, k, v) if plan is None else attend_in_scenes(q, k, v, plan)
        return self._out(out)

    def of_single_token(self, context: Tensor) -> Tensor:
        """What `forward` gives every query where the context has one token: [B, 1, C] -> [B, 1, W].

        The softmax over one key is 1 whatever the query and the key are, so the value is the
        result, and `to_q`, `norm_q`, `norm_k` and the slots of keys have no effect.
        """
        _, v = deal([self.to_k(context), self.to_v(context)], self.heads)
        return self._out(v.flatten(2))

    def _out(self, x: Tensor) -> Tensor:
        result: Tensor = self.to_out[0](x)
        return result


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: [B, T, H, d], [B, T', H, d] twice -> [B, T, W]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)  # from [B, H, T, d]


def attend_in_scenes(q: Tensor, k: Tensor, v: Tensor, plan: GroupPlan) -> Tensor:
    """As `attend`, where a row's queries see the keys of all rows of its scene.

    The K rows of a scene are one row of K T tokens, so no key is repeated.
    """
    if plan.order is not None:
        q, k, v = (t.index_select(0, plan.order) for t in (q, k, v))
    parts, start = [], 0
    for scenes, instances in plan.sizes:
        stop = start + scenes * instances
        folded = [t[start:stop].unflatten(0, (scenes, instances)).flatten(1, 2) for t in (q, k, v)]
        out = attend(*folded)  # [scenes, K T, W]
        parts.append(out.reshape(stop - start, q.shape[1], -1))
        start = stop
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined if plan.inverse is None else joined.index_select(0, plan.inverse)
