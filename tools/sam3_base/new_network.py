"""The tiny SAM 3 before its training: sizes, and initial weights that can learn from nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3_lora import network
from sam3_lora.config import PATCH
from sam3_lora.demo_base.scenes import SIZE
from sam3_lora.positions import position_map

if TYPE_CHECKING:
    from transformers import Sam3Model

GRID = SIZE // PATCH  # cells per side of the map
ANCHORS = 4  # per side: the object queries start as a grid of boxes
ANCHOR = 0.32  # side of these boxes


def config_dict(tokens: int) -> dict[str, Any]:
    """Sam3Config of the tiny base; tokens: size of its vocabulary."""
    width, trunk, text = 64, 128, 64
    block = {
        "hidden_size": width, "num_attention_heads": 4, "intermediate_size": 2 * width,
        "dropout": 0.0, "hidden_dropout": 0.0,
    }  # fmt: skip
    return {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": trunk,
                "intermediate_size": 2 * trunk,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": SIZE,
                "pretrain_image_size": SIZE,
                "patch_size": PATCH,
                "window_size": GRID // 2,
                "global_attn_indexes": [1, 3],
            },
            "fpn_hidden_size": width,
            "backbone_feature_sizes": [[k * GRID, k * GRID] for k in (4, 2, 1)],
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": tokens,
            "hidden_size": text,
            "intermediate_size": 2 * text,
            "projection_dim": text,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "pad_token_id": 0,
            "bos_token_id": tokens - 2,
            "eos_token_id": tokens - 1,
        },
        "geometry_encoder_config": {**block, "num_layers": 1, "roi_size": 3},
        "detr_encoder_config": {**block, "num_layers": 2},
        "detr_decoder_config": {**block, "num_layers": 2, "num_queries": ANCHORS**2},
        "mask_decoder_config": {"hidden_size": width, "num_attention_heads": 4},
    }


def new_model(config: dict[str, Any], seed: int) -> Sam3Model:
    """A random `Sam3Model` that can learn from nothing.

    What differs from transformers' initial state: scales that fit the widths (0.02 starves narrow
    layers), patches projected on cosines, positions as sine codes, and object queries that start
    as a grid of boxes and look into their own box.
    """
    from transformers import Sam3Config

    torch.manual_seed(seed)
    model = network.build_network(Sam3Config(**config))
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = model.vision_encoder.backbone.embeddings
    width = embeddings.position_embeddings.shape[-1]
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.copy_(cosines(width))
        code = position_map(GRID, GRID, width, torch.device("cpu")).flatten(0, 1)
        embeddings.position_embeddings.copy_(0.5 * code[None])
        model.text_encoder.text_model.embeddings.position_embedding.weight.mul_(0.3)
        start_as_grid(model.detr_decoder)
    return model


def cosines(width: int) -> Tensor:
    """Filters [width, 3, 14, 14]: cosines of low frequency, half of them grey, half of colours.

    Higher frequencies get larger gains, as pictures hold less of them.
    """
    k = torch.arange(PATCH, dtype=torch.float32)
    waves = torch.cos(math.pi * (k + 0.5) * k[:, None] / PATCH)  # [frequency, pixel]
    waves = waves / waves.norm(dim=1, keepdim=True)
    order = sorted((u * u + v * v, u, v) for u in range(PATCH) for v in range(PATCH))
    axes = F.normalize(torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]), dim=1)
    filters = []
    for axis, count in zip(axes, (width // 2, width // 4, width // 4), strict=True):
        for f2, u, v in order[:count]:
            gain = (1 + math.sqrt(f2)) / PATCH
            filters.append(gain * axis[:, None, None] * (waves[u][:, None] * waves[v]))
    return torch.stack(filters)


def start_as_grid(decoder: Any) -> None:
    """Reference boxes on a grid; the box bias lets a query look into its box and little outside."""
    centre = (torch.arange(ANCHORS) + 0.5) / ANCHORS
    cy, cx = torch.meshgrid(centre, centre, indexing="ij")
    side = torch.full_like(cx, ANCHOR)
    decoder.reference_points.weight.copy_(
        torch.stack([cx, cy, side, side], -1).flatten(0, 1).logit()
    )
    for embed in (decoder.box_rpb_embed_x, decoder.box_rpb_embed_y):
        embed.layer1.weight[:2] = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])  # outside, on each side
        embed.layer2.weight.mul_(0.1)
        embed.layer2.weight[:, :2] = -torch.tensor([2.0, 4.0, 6.0, 8.0])[:, None]
    nn.init.zeros_(decoder.box_head.layer3.weight)
