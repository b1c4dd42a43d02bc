"""The networks that `sam3_step.py` compares, their forward passes, and a batch; all is random."""

from __future__ import annotations

import argparse
from typing import Any

import peft
import torch
from floor import begin_graph_at
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model

from lora_core import targets
from sam3_lora import losses, network, placement
from sam3_lora.config import PATCH, Config, Lora, Training
from sam3_lora.outputs import Detections, Outputs, Targets

WORDS, TOKENS = 512, 32  # the vocabulary costs no time; a phrase has up to 32 tokens


def settings(args: argparse.Namespace) -> Config:
    """What `sam3-lora train` would be told."""
    lora = Lora(rank=args.rank, dropout=args.dropout)
    return Config(lora=lora, training=Training(enable_segmentation=args.stock))


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision != "fp32")


def architecture(args: argparse.Namespace) -> Sam3Config:
    """The published widths and heads with fewer blocks; a window has a third of the side."""
    cells, blocks = args.image_size // PATCH, args.vision_layers
    sides = [cells * 4, cells * 2, cells]
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "num_hidden_layers": blocks,
                "global_attn_indexes": list(range(3, blocks, 4)),
                "image_size": args.image_size,
                "window_size": max(1, cells // 3),
            },
            "backbone_feature_sizes": [[side, side] for side in sides],
        },
        text_config={
            "vocab_size": WORDS, "bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1,
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": args.text_layers, "max_position_embeddings": TOKENS,
        },
    )  # fmt: skip
    config.geometry_encoder_config.num_layers = 1
    config.detr_encoder_config.num_layers = args.detr_layers
    config.detr_decoder_config.num_layers = args.detr_layers
    return config


def build(
    method: str, args: argparse.Namespace, batch: dict[str, Any]
) -> tuple[nn.Module, Tensor | None]:
    """The network ready to train by one method, and the features of the batch's phrases.

    All methods have equal weights. With precision "bf16" those of the image encoder's transformer
    are bf16; adapters are fp32. Features are None where the text encoder runs in every step.
    """
    torch.manual_seed(0)
    model = network.build_network(architecture(args))
    for name, parameter in model.named_parameters():  # at the library's own, nearly all is zero
        if parameter.dim() > 1:
            nn.init.normal_(
                parameter, std=0.02 if "embed" in name else parameter[0].numel() ** -0.5
            )
    if args.precision == "bf16":
        model.vision_encoder.backbone.bfloat16()
    model = model.to(args.device).requires_grad_(False)
    features = None
    if not (args.stock and method == "PEFT"):
        with torch.no_grad(), autocast(args):
            features = network.encode_text(model, batch["input_ids"], batch["attention_mask"])
        network.drop_text_encoder(model)
    cfg = settings(args)
    if method == "lora_core":
        placement.adapt(model, cfg)
    elif method == "PEFT":
        model = with_peft(model, cfg)
    elif method == "full":
        model.requires_grad_(True)
    else:
        begin_graph_at(model, targets.resolve(model, placement.lora_config(cfg)))
    return model.train(), features


def with_peft(model: Sam3Model, cfg: Config) -> peft.PeftModel:
    """PEFT's adapters on the layers that `placement.adapt` would take."""
    patterns = [
        pattern.removeprefix("re:") for pattern in placement.lora_config(cfg).target_modules
    ]
    adapter = peft.LoraConfig(
        r=cfg.lora.rank,
        lora_alpha=cfg.lora.alpha,
        lora_dropout=cfg.lora.dropout,
        target_modules="|".join(patterns),
    )
    return peft.get_peft_model(model, adapter)


# -- one step ------------------------------------------------------------------------------------


def random_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Every phrase asked of every image; it finds two rectangles in it."""
    generator = torch.Generator().manual_seed(0)
    images, phrases = args.images, args.phrases
    count, size = images * phrases, args.image_size
    boxes = 0.2 + 0.6 * torch.rand(2 * count, 4, generator=generator)
    boxes[:, 2:] *= 0.4
    drawn = torch.zeros(2 * count, size, size, dtype=torch.bool)
    for mask, (x, y, w, h) in zip(drawn, (boxes * size).tolist(), strict=True):
        mask[int(y - h / 2) : int(y + h / 2), int(x - w / 2) : int(x + w / 2)] = True
    tokens = torch.ones(phrases, TOKENS, dtype=torch.long)
    tokens[:, :8] = torch.randint(2, WORDS - 2, (phrases, 8), generator=generator)
    batch = {
        "pixel_values": torch.randn(images, 3, size, size, generator=generator),
        "input_ids": tokens,
        "attention_mask": (torch.arange(TOKENS) < 8).long().repeat(phrases, 1),
        "image_ids": torch.arange(images).repeat_interleave(phrases),
        "text_ids": torch.arange(phrases).repeat(images),
    }
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    found = Targets(boxes, torch.full((count,), 2), drawn if args.stock else None)
    for name in ("boxes", "counts", "masks"):
        if (tensor := getattr(found, name)) is not None:
            setattr(found, name, tensor.to(args.device))
    return batch | {"targets": found}


def loss_of(model: Any, batch: dict[str, Any], args: argparse.Namespace) -> Tensor:
    """The official loss of one forward pass; of its last layer alone in a "stock" case."""
    with autocast(args):
        if "text_features" in batch:
            inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
            outputs = network.forward(inner, batch, masks=args.stock, one_to_many=not args.stock)
        else:
            outputs = stock_forward(model, batch)
        if args.stock:
            outputs = Outputs(outputs.one_to_one[-1:], [], outputs.presence[-1:], outputs.semantic)
        weights = losses.LossSettings(masks=args.stock)
        return losses.loss(outputs, batch["targets"], weights)[0]


def stock_forward(model: Any, batch: dict[str, Any]) -> Outputs:
    """`Sam3Model.forward` as its documentation has it for several phrases per image."""
    images, texts = batch["image_ids"], batch["text_ids"]
    seen = model.get_vision_features(pixel_values=batch["pixel_values"])
    if len(images) > len(batch["pixel_values"]):
        seen.fpn_hidden_states = [level[images] for level in seen.fpn_hidden_states]
        seen.fpn_position_encoding = [
            code.expand(len(batch["pixel_values"]), -1, -1, -1)[images]
            for code in seen.fpn_position_encoding
        ]
    out = model(
        vision_embeds=seen,
        input_ids=batch["input_ids"][texts],
        attention_mask=batch["attention_mask"][texts],
    )
    x0, y0, x1, y1 = out.pred_boxes.float().unbind(-1)
    boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    found = Detections(out.pred_logits.float(), boxes, out.pred_masks)
    return Outputs([found], [], [out.presence_logits.float()[:, 0]], out.semantic_seg)
