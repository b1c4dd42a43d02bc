"""What the blocks of all parts share: attention, and computing a block again in the backward pass.

Attention modules are transformers': q_proj, k_proj, v_proj and o_proj, each called as a module, so
that adapters on them work. The scores never exist as a matrix unless the device has no kernel for
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`softmax(q k^T / sqrt(d) + mask) v` in each head.

    Args:
        q: [B, L, C]; k, v: [B, S, C]; d = C / heads.
        mask: True where a key takes part, or an additive bias; broadcast to [B, heads, L, S].

    Returns:
        [B, L, C].
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """A `Sam3Attention`: project, `attend`, project; shapes as there."""
    q, k, v = module.q_proj(query), module.k_proj(key), module.v_proj(value)
    return module.o_proj(attend(q, k, v, module.num_attention_heads, mask))


def key_mask(valid: Tensor) -> Tensor:
    """bool [B, S], True for tokens that are no padding, as a mask for `attend`."""
    return valid[:, None, None]


def block(model: Any, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(module, *args)`, recomputed in the backward pass where that saves memory.

    Blocks before the first trainable parameter have no graph, and nothing to recompute.

    Args:
        model: the network; its `sam3_checkpointing` says whether to recompute.
        module: whose parameters `function` uses.
    """
    if getattr(model, "sam3_checkpointing", False) and _needs_graph(module, args):
        return checkpoint(function, module, *args, use_reentrant=False)
    return function(module, *args)


def _needs_graph(module: nn.Module, args: tuple[Any, ...]) -> bool:
    tensors = [a for a in args if isinstance(a, Tensor)]
    return torch.is_grad_enabled() and any(
        t.requires_grad for t in (*tensors, *module.parameters())
    )
