"""The networks that `sam2_step.py` compares, and a batch for them; everything is random."""

from __future__ import annotations

from typing import Any

import peft
import torch
from floor import begin_graph_at
from transformers import Sam2Model

from lora_core import targets
from sam2_lora import model, official, placement
from sam2_lora.config import Config


def build(method: str, variant: str, cfg: Config, device: str) -> Sam2Model:
    """The network with random weights, ready to train by one method."""
    network = model.network(official.published(f"sam2.1_hiera_{variant}")).to_empty(device=device)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            is_norm = tensor.dim() == 1 and name.endswith("weight")
            tensor.normal_(mean=float(is_norm), std=0.02)
    model.set_image_size(network, cfg.size)
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing(network)
    network.requires_grad_(False)
    if method == "lora_core":
        placement.adapt(network, cfg)
    elif method == "PEFT":
        adapt_with_peft(network, cfg)
    else:
        begin_graph_at(network, targets.resolve(network, placement.lora_config(cfg)))
    return network.train()


def adapt_with_peft(network: Sam2Model, cfg: Config) -> None:
    """PEFT's adapters, in place, on the layers that `placement.adapt` would take."""
    patterns = [pattern.removeprefix("re:") for pattern in placement.targets(cfg)]
    adapter = peft.LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules="|".join(patterns),
    )
    peft.get_peft_model(network, adapter)


def random_batch(cfg: Config, objects: int, device: str) -> dict[str, Any]:
    """A batch as `data.collate` makes it: rectangles to segment, one click in each."""
    height, width = cfg.size
    count = cfg.batch_size * objects
    rectangles = torch.zeros(count, height, width, dtype=torch.uint8)
    rectangles[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    clicks = torch.tensor([[3 * width / 8, 3 * height / 8]]).expand(count, 1, 2)
    bucket = {
        "image": torch.arange(cfg.batch_size).repeat_interleave(objects),
        "targets": rectangles,
        "points": clicks,
        "labels": torch.ones(count, 1, dtype=torch.int64),
    }
    return {
        "pixel_values": torch.randn(cfg.batch_size, 3, height, width).to(device),
        "seed": list(range(cfg.batch_size)),
        "buckets": [{name: tensor.to(device) for name, tensor in bucket.items()}],
    }
