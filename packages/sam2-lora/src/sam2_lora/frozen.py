"""What a frozen image encoder makes of the pictures of a run, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.cache import FeatureCache
from lora_core.errors import ConfigError
from lora_core.frozen import FrozenImages, why_changing
from lora_core.memory import AUTOCAST
from sam2_lora import losses
from sam2_lora.config import Config
from sam2_lora.forward import encode_pictures

if TYPE_CHECKING:
    from transformers import Sam2Model

KIND = "sam2 image 1"  # of entries; another number where the computation changes


def frozen_images(network: Sam2Model, cfg: Config, precision: str) -> FrozenImages | None:
    """What gives `forward.Features` of pictures; None where they change in training.

    None also where the base is divided among processes: these run a divided encoder together, and
    so cannot see one picture at a time.

    Args:
        network: adapted, on its device.
        precision: fp32, bf16 or fp16.

    Raises:
        ConfigError: they change, and are to be kept.
    """
    # The finer maps go through two convolutions of the decoder.
    parts = (network.vision_encoder, network.mask_decoder.conv_s0, network.mask_decoder.conv_s1)
    changing = next(filter(None, map(why_changing, parts)), "")
    if changing and cfg.cache_dir:
        by = f" by {cfg.adapter}" if cfg.adapter else ""
        raise ConfigError(f"--cache_dir needs an unchanged encoder, but {changing}{by}")
    if changing or cfg.shard_base:
        return None
    device, dtype = next(network.parameters()).device, AUTOCAST.get(precision)

    def encoded(picture: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return encode_pictures(network, [picture])._asdict()

    facts = {
        "kind": KIND,
        "base": str(network.sam2_base.fingerprint),
        "numbers": f"{precision} {device.type} {torch.get_float32_matmul_precision()}",
    }
    cache = FeatureCache(cfg.cache_dir, int(cfg.cache_gb * 1e9)) if cfg.cache_dir else None
    return FrozenImages(encoded, facts, device, cache)


def loss_of(
    cfg: Config, images: FrozenImages | None
) -> Callable[[Any, dict[str, Any]], tuple[Tensor, dict[str, float]]]:
    """(network, batch) -> (loss, parts).

    Args:
        images: see `frozen_images`; None: the encoder sees all pictures of a batch at once.
    """

    def loss(network: Sam2Model, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        if images is not None:
            batch = batch | {"features": images.features(batch["images"])}
        return losses.loss(network, batch, cfg)

    return loss
