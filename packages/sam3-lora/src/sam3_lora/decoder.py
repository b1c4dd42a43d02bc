"""From image and prompt to objects: DETR encoder, decoder with box refinement, scores, masks.

B counts queries (an image and a phrase), N = h w cells of the map, S tokens of the prompt, Q object
queries of the decoder.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sam3_lora.attention import attend, attention, block, key_mask
from sam3_lora.outputs import Masks
from sam3_lora.positions import box_code, corners
from sam3_lora.prompts import per_query
from sam3_lora.vision import Features

if TYPE_CHECKING:
    from transformers import Sam3Model

MAX_SCORE = 12.0  # the object scores are clamped to +- this
EPSILON = 1e-3  # of the inverse sigmoid of boxes


class Prompt(NamedTuple):
    """Text and exemplar tokens of each query."""

    tokens: Tensor  # [B, S, C]
    valid: Tensor  # bool [B, S]


class Refined(NamedTuple):
    """One decoder layer; the object queries are Q, or 2 Q with the one-to-many half behind."""

    hidden: Tensor  # [B, Q, C], normalised
    boxes: Tensor  # f32 [B, Q, 4]
    presence: Tensor  # f32 [B]


# -- encoder -------------------------------------------------------------------------------------


def encode(
    model: Sam3Model, features: Features, prompt: Prompt, image_ids: Tensor | None
) -> Tensor:
    """The map of each query's image, informed by its prompt: the memory [B, N, C].

    Until the first look at the prompt all queries of an image are the same, and computed once (so
    dropout, too, is drawn once for them there).

    Args:
        image_ids: i64 [B]; None: query b asks about image b.
    """
    x, mask = features.tokens, key_mask(prompt.valid)
    for k, layer in enumerate(model.detr_encoder.layers):
        x = block(model, layer, _look_around, x, features.position)
        if k == 0:
            x = per_query(x, image_ids)
        x = block(model, layer, _look_at_prompt, x, prompt.tokens, mask)
    return x


def _look_around(layer: Any, x: Tensor, position: Tensor) -> Tensor:
    y = layer.layer_norm1(x)
    placed = y + position
    return x + layer.dropout(attention(layer.self_attn, placed, placed, y))


def _look_at_prompt(layer: Any, x: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
    y = attention(layer.cross_attn, layer.layer_norm2(x), prompt, prompt, mask)
    x = x + layer.dropout(y)
    return x + layer.dropout(layer.mlp(layer.layer_norm3(x)))


# -- decoder -------------------------------------------------------------------------------------


def decode(
    model: Sam3Model,
    memory: Tensor,
    features: Features,
    prompt: Prompt,
    one_to_many: bool,
) -> list[Refined]:
    """Refine the object queries layer by layer.

    A layer starts from the boxes of the one before without gradient (the first from learned ones).
    Its own boxes are computed from them with gradient, which so reaches one layer back.

    Args:
        memory: [B, N, C], of `encode`.
        one_to_many: double the queries (DAC-DETR); the second half takes no part in self-attention.
    """
    decoder, count = model.detr_decoder, len(memory)
    copies = 2 if one_to_many else 1
    queries = decoder.query_embed.weight.repeat(copies, 1)
    x = torch.cat([decoder.presence_token.weight, queries]).repeat(count, 1, 1)
    boxes = decoder.reference_points.weight.float().sigmoid().repeat(copies, 1)
    boxes = boxes.expand(count, -1, -1)
    alone = decoder.query_embed.num_embeddings if one_to_many else 0
    keys, mask = memory + features.position, key_mask(prompt.valid)
    size = (features.map.shape[-2], features.map.shape[-1])
    layers, reference = [], boxes
    for layer in decoder.layers:
        place, bias = _where(decoder, reference, size)
        x = block(
            model, layer, _decoder_block, x, place, bias, prompt.tokens, mask, memory, keys, alone
        )
        refined, boxes = _refine(decoder, x, reference, boxes)
        reference = boxes.detach()
        layers.append(refined)
    return layers


def _where(decoder: Any, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of each query and the presence token (which has no place: 0): position and box bias."""
    place = decoder.ref_point_head(box_code(boxes, decoder.hidden_size // 2))
    return F.pad(place, (0, 0, 1, 0)), box_bias(decoder, boxes, size)


def box_bias(decoder: Any, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How much a query with a box looks at each row and at each column of the map.

    With the distances d = 8 (i / H - y0, i / H - y1) of row i, for columns alike,

        B_y = MLP(sign(d) log2(|d| + 1) / 3) ,   bias[i, j] = B_y[i] + B_x[j] .

    Args:
        boxes: f32 [B, Q, 4].
        size: (H, W) of the map.

    Returns:
        B_y [B, heads, 1 + Q, H] and B_x [B, heads, 1 + Q, W]; row 0 is 0.
    """
    x0, y0, x1, y1 = corners(boxes).unbind(-1)
    shares = []
    for cells, ends, embed in (
        (size[0], (y0, y1), decoder.box_rpb_embed_y),
        (size[1], (x0, x1), decoder.box_rpb_embed_x),
    ):
        at = torch.arange(cells, device=boxes.device) / cells
        d = 8 * (at[:, None] - torch.stack(ends, -1)[:, :, None])  # [B, Q, cells, 2]
        share = embed(d.sign() * (d.abs() + 1).log2() / math.log2(8))  # [B, Q, cells, heads]
        shares.append(F.pad(share.permute(0, 3, 1, 2), (0, 0, 1, 0)))
    return shares[0], shares[1]


def _decoder_block(
    layer: Any,
    x: Tensor,
    place: Tensor,
    bias: tuple[Tensor, Tensor],
    prompt: Tensor,
    prompt_mask: Tensor,
    memory: Tensor,
    keys: Tensor,
    alone: int,
) -> Tensor:
    """Post-norm: among each other, to the prompt, to the image, and a feed-forward network.

    Args:
        x: [B, 1 + Q, C], the presence token first. place: as x.
        alone: how many queries at the end do not see the others (one-to-many).
    """
    first, rest = x.split([x.shape[1] - alone, alone], 1)
    placed = first + place[:, : first.shape[1]]
    seen = attention(layer.self_attn, placed, placed, first)
    first = first + layer.self_attn_dropout(seen)
    x = layer.self_attn_layer_norm(torch.cat([first, rest], 1) if alone else first)

    seen = attention(layer.text_cross_attn, x + place, prompt, prompt, prompt_mask)
    x = layer.text_cross_attn_layer_norm(x + layer.text_cross_attn_dropout(seen))

    seen = _look_at_image(layer.vision_cross_attn, x + place, keys, memory, bias)
    x = layer.vision_cross_attn_layer_norm(x + layer.vision_cross_attn_dropout(seen))

    with torch.autocast(x.device.type, enabled=False):  # as the official training
        x = x.float()
        return layer.mlp_layer_norm(x + layer.mlp_dropout(layer.mlp(x)))


def _look_at_image(
    module: Any, query: Tensor, keys: Tensor, memory: Tensor, bias: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention with the box bias, which at full size is the largest tensor of a layer.

    Only its rows and columns are kept for the backward pass, which adds them up again.
    """
    parts = module.q_proj(query), module.k_proj(keys), module.v_proj(memory), *bias
    heads = module.num_attention_heads
    if not torch.is_grad_enabled():
        return module.o_proj(_biased(*parts, heads))
    seen = checkpoint(_biased, *parts, heads, use_reentrant=False, preserve_rng_state=False)
    return module.o_proj(seen)


def _biased(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
    cells = (rows[..., None] + columns[..., None, :]).flatten(-2)  # [B, heads, 1 + Q, N]
    return attend(q, k, v, heads, cells)


def _refine(decoder: Any, x: Tensor, reference: Tensor, boxes: Tensor) -> tuple[Refined, Tensor]:
    """One layer's result, and where the next one starts, with gradient.

    Args:
        reference: the boxes that the layer started from.
        boxes: the same with the gradient of the layer before.
    """
    with torch.autocast(x.device.type, enabled=False):  # boxes need more than 8 bits
        hidden = decoder.output_layer_norm(x[:, 1:].float())
        change = decoder.box_head(hidden)
        following = (change + inverse_sigmoid(reference)).sigmoid()
        refined = following
        if boxes.requires_grad:
            refined = (change + inverse_sigmoid(boxes)).sigmoid()
        presence = decoder.presence_head(decoder.presence_layer_norm(x[:, 0].float()))
    return Refined(hidden, refined, presence[:, 0]), following


def inverse_sigmoid(p: Tensor) -> Tensor:
    """`ln(max(p, eps) / max(1 - p, eps))`."""
    p = p.clamp(0, 1)
    return (p.clamp(min=EPSILON) / (1 - p).clamp(min=EPSILON)).log()


# -- heads ---------------------------------------------------------------------------------------


def scores(model: Sam3Model, hidden: Tensor, prompt: Prompt) -> Tensor:
    """Logits <W h, V p> / sqrt(C) with p the mean prompt: f32 [layers, B, Q].

    Args:
        hidden: [layers, B, Q, C].
    """
    head = model.dot_product_scoring
    tokens = prompt.tokens
    tokens = head.text_mlp_out_norm(tokens + head.text_mlp_dropout(head.text_mlp(tokens)))
    share = prompt.valid / prompt.valid.sum(1, keepdim=True)  # the class token is always there
    mean = (tokens * share[..., None]).sum(1)
    product = (head.query_proj(hidden) @ head.text_proj(mean)[:, :, None])[..., 0]
    return (product.float() / hidden.shape[-1] ** 0.5).clamp(-MAX_SCORE, MAX_SCORE)


def draw_masks(
    model: Sam3Model,
    memory: Tensor,
    features: Features,
    prompt: Prompt,
    image_ids: Tensor | None,
    hidden: Tensor,
) -> tuple[Masks, Tensor]:
    """Mask logits of each object [B, Q, 4 h, 4 w] and of their union [B, 1, 4 h, 4 w].

    Args:
        hidden: [B, Q, C], of the last decoder layer.
    """
    head = model.mask_decoder
    x = block(
        model,
        head.prompt_cross_attn,
        _ask_prompt,
        head,
        memory,
        prompt.tokens,
        key_mask(prompt.valid),
    )
    x = x.transpose(1, 2).unflatten(2, features.map.shape[-2:])
    levels = zip(
        reversed(features.fine),
        head.pixel_decoder.conv_layers,
        head.pixel_decoder.norms,
        strict=False,
    )  # the third convolution of the official model never runs
    for fine, conv, norm in levels:
        x = block(model, conv, _finer, norm, x, fine, image_ids)
    masks = Masks(head.mask_embedder(hidden), head.instance_projection(x))
    return masks, head.semantic_projection(x)


def _ask_prompt(module: Any, head: Any, memory: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
    seen = attention(module, head.prompt_cross_attn_norm(memory), prompt, prompt, mask)
    return memory + head.prompt_cross_attn_dropout(seen)


def _finer(conv: Any, norm: Any, x: Tensor, fine: Tensor, image_ids: Tensor | None) -> Tensor:
    x = F.interpolate(x, size=fine.shape[-2:], mode="nearest") + per_query(fine, image_ids)
    return F.relu(norm(conv(x)))
