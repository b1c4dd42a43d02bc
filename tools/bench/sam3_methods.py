"""The network of sam3-lora whose training steps are compared, its forward passes, and a batch.

Everything is random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from training_step import last_quarter, train_by
from transformers import Sam3Config, Sam3Model

from sam3_lora import losses, network, placement
from sam3_lora.config import PATCH, Config, Lora, Training
from sam3_lora.outputs import Detections, Outputs, Targets

WORDS, TOKENS = 512, 32  # the vocabulary costs no time; a phrase has up to 32 tokens
BLOCKS = "vision_encoder.backbone.layers"


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        size: pixels of a picture's side.
        vision_layers: every fourth one global. detr_layers: of encoder and decoder each.
        images: of the batch. phrases: asked of each image.
        stock: PEFT's network runs `Sam3Model.forward`, and all have the loss of its outputs.
        precision: "fp32", "autocast", or "bf16": weights of the image encoder's transformer in
            bf16, all under autocast.
        last_blocks: of the image encoder only the last quarter of the blocks has adapters.
        cached: the text features are given.
    """

    size: int = 1008
    vision_layers: int = 4
    text_layers: int = 3
    detr_layers: int = 1
    images: int = 1
    phrases: int = 2
    rank: int = 8
    dropout: float = 0.1
    stock: bool = False
    precision: str = "fp32"
    checkpointing: bool = False
    last_blocks: bool = False
    cached: bool = True
    device: str = "cpu"

    @property
    def config(self) -> Config:
        """What `sam3-lora train` would be told."""
        lora = Lora(rank=self.rank, dropout=self.dropout)
        return Config(lora=lora, training=Training(enable_segmentation=self.stock))

    @property
    def other_loss(self) -> tuple[str, ...]:
        """`Sam3Model.forward` has no class token."""
        return ("PEFT",) if self.stock else ()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision != "fp32")


CASES = {
    "fp32": Case(),
    "fp32, 336 pixels": Case(size=336),
    "fp32, 336, no dropout": Case(size=336, dropout=0.0),
    "fp32, 336, stock": Case(size=336, stock=True),
    "autocast": Case(size=336, precision="autocast"),
    "bf16 encoder": Case(size=336, precision="bf16"),
    "autocast, stock": Case(size=336, precision="autocast", stock=True),
}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "checkpointed": {"checkpointing": True},
    "last blocks": {"last_blocks": True},
    "uncached": {"cached": False},
}


def architecture(case: Case) -> Sam3Config:
    """The published widths and heads with fewer blocks; a window has a third of the side."""
    cells, blocks = case.size // PATCH, case.vision_layers
    sides = [cells * 4, cells * 2, cells]
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "num_hidden_layers": blocks,
                "global_attn_indexes": list(range(3, blocks, 4)),
                "image_size": case.size,
                "window_size": max(1, cells // 3),
            },
            "backbone_feature_sizes": [[side, side] for side in sides],
        },
        text_config={
            "vocab_size": WORDS, "bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1,
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": case.text_layers, "max_position_embeddings": TOKENS,
        },
    )  # fmt: skip
    config.geometry_encoder_config.num_layers = 1
    config.detr_encoder_config.num_layers = case.detr_layers
    config.detr_decoder_config.num_layers = case.detr_layers
    return config


def random_weights(case: Case) -> dict[str, Tensor]:
    """Of the whole network: matrices keep the size of what passes through them."""
    torch.manual_seed(0)
    model = network.build_network(architecture(case))
    for name, parameter in model.named_parameters():  # at the library's own, nearly all is zero
        if parameter.dim() > 1:
            nn.init.normal_(
                parameter, std=0.02 if "embed" in name else parameter[0].numel() ** -0.5
            )
    if case.precision == "bf16":
        model.vision_encoder.backbone.bfloat16()
    return model.to(case.device).state_dict()


def frozen(case: Case, weights: Mapping[str, Tensor]) -> Sam3Model:
    """The frozen network, with these very weights."""
    model = network.build_network(architecture(case), device="meta")
    model.load_state_dict(weights, assign=True)
    if case.precision == "bf16":
        model.vision_encoder.backbone.bfloat16()  # its buffers
    network.set_gradient_checkpointing(model, case.checkpointing)
    return model.to(case.device).requires_grad_(False)


def build(method: str, case: Case, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network ready to train by one method; the frozen weights are shared by all."""
    model = frozen(case, weights)
    # The stock network's own forward needs its text encoder.
    if case.cached and not (case.stock and method == "PEFT"):
        network.drop_text_encoder(model)
    config = placement.lora_config(case.config)
    if case.last_blocks:
        config = replace(config, last_blocks={BLOCKS: last_quarter(case.vision_layers)})
    return train_by(method, model, config)


# -- one step ------------------------------------------------------------------------------------


def step_batch(case: Case, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every phrase asked of every image; it finds two rectangles in it."""
    generator = torch.Generator().manual_seed(0)
    count, size = case.images * case.phrases, case.size
    boxes = 0.2 + 0.6 * torch.rand(2 * count, 4, generator=generator)
    boxes[:, 2:] *= 0.4
    drawn = torch.zeros(2 * count, size, size, dtype=torch.bool)
    for mask, (x, y, w, h) in zip(drawn, (boxes * size).tolist(), strict=True):
        mask[int(y - h / 2) : int(y + h / 2), int(x - w / 2) : int(x + w / 2)] = True
    tokens = torch.ones(case.phrases, TOKENS, dtype=torch.long)
    tokens[:, :8] = torch.randint(2, WORDS - 2, (case.phrases, 8), generator=generator)
    batch = {
        "pixel_values": torch.randn(case.images, 3, size, size, generator=generator),
        "input_ids": tokens,
        "attention_mask": (torch.arange(TOKENS) < 8).long().repeat(case.phrases, 1),
        "image_ids": torch.arange(case.images).repeat_interleave(case.phrases),
        "text_ids": torch.arange(case.phrases).repeat(case.images),
    }
    batch = {name: tensor.to(case.device) for name, tensor in batch.items()}
    with torch.no_grad(), case.autocast():
        batch["text_features"] = network.encode_text(
            frozen(case, weights), batch["input_ids"], batch["attention_mask"]
        )
    found = Targets(
        boxes.to(case.device),
        torch.full((count,), 2, device=case.device),
        drawn.to(case.device) if case.stock else None,
    )
    return batch | {"targets": found}


def loss_of(model: Any, batch: dict[str, Any], case: Case) -> Tensor:
    """The official loss of one forward pass; of its last layer alone in a "stock" case."""
    with case.autocast():
        if case.stock and hasattr(model, "peft_config"):
            outputs = stock_forward(model, batch)
        else:
            if not case.cached:
                batch = {name: value for name, value in batch.items() if name != "text_features"}
            outputs = network.forward(model, batch, masks=case.stock, one_to_many=not case.stock)
        if case.stock:
            outputs = Outputs(outputs.one_to_one[-1:], [], outputs.presence[-1:], outputs.semantic)
        weights = losses.LossSettings(masks=case.stock)
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
