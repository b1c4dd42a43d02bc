"""The network of sam2-lora whose training steps are compared, a batch, and the loss.

Everything is random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from training_step import last_quarter, train_by
from transformers import Sam2Model

from sam2_lora import losses, model, official, placement
from sam2_lora.config import Config

BLOCKS = "vision_encoder.backbone.blocks"


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        variant: tiny, small, base_plus or large.
        size: pixels of a picture's side. pictures: of the batch. objects: of each, with one click.
        targets: as for `sam2-lora train`.
        last_blocks: of the encoder only the last quarter of the blocks has adapters.
        cached: the decoder is given what the encoder makes of the pictures.
        precision: "fp32" or "autocast".
    """

    variant: str = "tiny"
    size: int = 1024
    pictures: int = 1
    objects: int = 1
    targets: str = "default"
    rank: int = 8
    dropout: float = 0.05
    precision: str = "fp32"
    checkpointing: bool = False
    last_blocks: bool = False
    cached: bool = False
    device: str = "cpu"

    @property
    def config(self) -> Config:
        """What `sam2-lora train` would be told."""
        return Config(
            image_size=str(self.size),
            batch_size=self.pictures,
            targets=self.targets,
            lora_rank=self.rank,
            lora_dropout=self.dropout,
            gradient_checkpointing=self.checkpointing,
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision != "fp32")


CASES = {
    "fp32": Case(),
    "fp32, 512 pixels": Case(size=512),
    "fp32, 512, no dropout": Case(size=512, dropout=0.0),
    "fp32, 512, decoder": Case(size=512, targets="decoder"),
    "autocast": Case(precision="autocast"),
}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "checkpointed": {"checkpointing": True},
    "last blocks": {"last_blocks": True},
    "cached": {"cached": True, "targets": "decoder"},
}


def skeleton(case: Case) -> Sam2Model:
    """The network on the meta device."""
    network = model.network(official.published(f"sam2.1_hiera_{case.variant}"))
    model.set_image_size(network, case.config.size)
    if case.checkpointing:
        model.enable_gradient_checkpointing(network)
    return network.requires_grad_(False)


def random_weights(case: Case) -> dict[str, Tensor]:
    """Of the published architecture: normal with deviation 0.02; norms around 1."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in skeleton(case).state_dict().items():
        is_norm = tensor.dim() == 1 and name.endswith("weight")
        value = torch.empty(tensor.shape).normal_(float(is_norm), 0.02, generator=draw)
        found[name] = value.to(case.device)
    return found


def frozen(case: Case, weights: Mapping[str, Tensor]) -> Sam2Model:
    """The frozen network, with these very weights."""
    network = skeleton(case)
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False)  # tensors that were assigned want gradients


def build(method: str, case: Case, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network ready to train by one method; the frozen weights are shared by all."""
    network = frozen(case, weights)
    config = placement.lora_config(case.config)
    if case.last_blocks:
        count = last_quarter(len(network.get_submodule(BLOCKS)))
        config = replace(config, last_blocks={BLOCKS: count})
    return train_by(method, network, config)


def step_batch(case: Case, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """A batch as `data.collate` makes it, with the encoder's features of its pictures.

    There are rectangles to segment, one click in each.
    """
    side, count = case.size, case.pictures * case.objects
    rectangles = torch.zeros(count, side, side, dtype=torch.uint8)
    rectangles[:, side // 4 : side // 2, side // 4 : side // 2] = 1
    bucket = {
        "image": torch.arange(case.pictures).repeat_interleave(case.objects),
        "targets": rectangles,
        "points": torch.full((count, 1, 2), 3 * side / 8),
        "labels": torch.ones(count, 1, dtype=torch.int64),
    }
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randn(case.pictures, 3, side, side, generator=draw).to(case.device)
    with torch.no_grad(), case.autocast():
        features = model.encode(frozen(case, weights).eval(), pictures)
    return {
        "pixel_values": pictures,
        "features": features._asdict(),
        "seed": list(range(case.pictures)),
        "buckets": [{name: tensor.to(case.device) for name, tensor in bucket.items()}],
    }


def loss_of(network: Any, batch: dict[str, Any], case: Case) -> Tensor:
    """The official loss."""
    without = "pixel_values" if case.cached else "features"
    given = {name: value for name, value in batch.items() if name != without}
    with case.autocast():
        return losses.loss(network, given, case.config)[0]
