"""What is asked for: phrases, and boxes around examples, as a sequence of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sam3_lora.attention import attend, attention, block, key_mask
from sam3_lora.positions import corners, sine_code
from sam3_lora.roi import roi_align
from sam3_lora.vision import Features

if TYPE_CHECKING:
    from transformers import Sam3Model

PADDING = -10  # label of a box that is not there, as in transformers


# -- phrases -------------------------------------------------------------------------------------


def encode_text(model: Sam3Model, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Features of P phrases, with gradient; the same for every image, so they can be kept.

    Every token looks back only (CLIP), so that padding behind a phrase cannot change it: the
    encoder runs to the end of the longest phrase.

    Args:
        input_ids: i64 [P, L], L at most 32.
        attention_mask: i64 or bool [P, L], 1 for a phrase's tokens, 0 for the padding behind.

    Returns:
        [P, L, C], 0 at padding behind the longest phrase.
    """
    text, width = model.text_encoder.text_model, input_ids.shape[1]
    longest = max(map(sum, attention_mask.tolist()))
    x = text.embeddings.token_embedding(input_ids[:, :longest])
    x = x + text.embeddings.position_embedding.weight[:longest]
    for layer in text.encoder.layers:
        x = block(model, layer, _text_block, x)
    x = model.text_projection(text.final_layer_norm(x))
    return F.pad(x, (0, 0, 0, width - longest))


def _text_block(layer: Any, x: Tensor) -> Tensor:
    module, y = layer.self_attn, layer.layer_norm1(x)
    q, k, v = module.q_proj(y), module.k_proj(y), module.v_proj(y)
    x = x + module.out_proj(attend(q, k, v, module.num_heads, causal=True))
    return x + layer.mlp(layer.layer_norm2(x))


# -- exemplars -----------------------------------------------------------------------------------


def per_query(x: Tensor, image_ids: Tensor | None) -> Tensor:
    """Rows of images [I, ...] for queries [B, ...], without a copy where one is not needed.

    Args:
        image_ids: i64 [B]; None: query b asks about image b.
    """
    if image_ids is None:
        return x
    if len(x) == 1:
        return x.expand(len(image_ids), *x.shape[1:])
    return x.index_select(0, image_ids)


def encode_exemplars(
    model: Sam3Model,
    features: Features,
    image_ids: Tensor | None,
    boxes: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens of K boxes of each query and, always, the learned class token behind them.

    The official model has that token without boxes too; transformers leaves it out there, which
    gives other results. The order of the tokens means nothing to the network.

    Args:
        image_ids: i64 [B]; None: query b asks about image b.
        boxes: f32 [B, K, 4]; None: no query has any.
        labels: i64 [B, K]: 1 an example, 0 a counter-example, -10 padding.

    Returns:
        tokens [B, K + 1, C], and which of them are no padding, bool [B, K + 1].
    """
    encoder = model.geometry_encoder
    count = len(features.map if image_ids is None else image_ids)
    x = encoder.cls_embed.weight.repeat(count, 1, 1)
    valid = torch.ones(count, 1, dtype=torch.bool, device=x.device)
    if boxes is not None and labels is not None and boxes.shape[1]:
        here = labels != PADDING
        x = torch.cat([_box_tokens(encoder, features, image_ids, boxes, labels, here), x], 1)
        valid = torch.cat([here, valid], 1)
    x = encoder.prompt_layer_norm(encoder.final_proj(x))
    tokens, mask = features.tokens, key_mask(valid)
    for layer in encoder.layers:
        x = block(model, layer, _exemplar_block, x, mask, tokens, features.position, image_ids)
    return encoder.output_layer_norm(x), valid


def _box_tokens(
    encoder: Any,
    features: Features,
    image_ids: Tensor | None,
    boxes: Tensor,
    labels: Tensor,
    here: Tensor,
) -> Tensor:
    """Label, coordinates, pooled features and position of each box, added: [B, K, C].

    Only boxes that are there are computed; padding is 0.
    """
    if image_ids is None:
        image_ids = torch.arange(len(boxes), device=boxes.device)
    box, images = boxes[here], image_ids[:, None].expand_as(labels)[here]  # [M, 4], [M]
    height, width = features.map.shape[-2:]
    normed = encoder.vision_layer_norm(features.map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    cells = corners(box.float()) * box.new_tensor([width, height, width, height])
    pooled = encoder.boxes_pool_project(roi_align(normed, cells, images, encoder.roi_size))
    cx, cy, w, h = box.unbind(-1)
    half = encoder.hidden_size // 2
    place = torch.cat([sine_code(cy, half), sine_code(cx, half), h[:, None], w[:, None]], -1)
    tokens = (
        encoder.label_embed(labels[here])
        + encoder.boxes_direct_project(box)
        + pooled.flatten(1)
        + encoder.boxes_pos_enc_project(place)
    )
    return tokens.new_zeros(*labels.shape, tokens.shape[-1]).index_put((here,), tokens)


def _exemplar_block(
    layer: Any,
    x: Tensor,
    mask: Tensor,
    image: Tensor,
    position: Tensor,
    image_ids: Tensor | None,
) -> Tensor:
    y = layer.layer_norm1(x)
    x = x + layer.dropout(attention(layer.self_attn, y, y, y, mask))
    look = layer.cross_attn
    key, value = look.k_proj(image + position), look.v_proj(image)  # once per image
    key, value = per_query(key, image_ids), per_query(value, image_ids)
    out = attend(look.q_proj(layer.layer_norm2(x)), key, value, look.num_attention_heads)
    x = x + layer.dropout(look.o_proj(out))
    return x + layer.dropout(layer.mlp(layer.layer_norm3(x)))
