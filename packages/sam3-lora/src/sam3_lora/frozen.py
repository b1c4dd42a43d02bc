"""What the frozen encoders of a run make of its pictures, computed once and kept on disk.

Kept is the output of the vision transformer, [h, w, width]: nearly all of the image encoder's time
lies before it, and all of its adapters. The feature maps behind it would be five times as large
with masks, and differ with and without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_core.cache import FeatureCache
from lora_core.frozen import FrozenImages, why_changing
from lora_core.memory import AUTOCAST
from lora_core.report import say
from sam3_lora.config import Config
from sam3_lora.transforms import network_input
from sam3_lora.vision import encode_trunk

if TYPE_CHECKING:
    from transformers import Sam3Model

KIND = "sam3 trunk 1"  # of entries; another number where the computation changes


def cache_of(cfg: Config) -> FeatureCache | None:
    """Where features of pictures and phrases are kept; None: nowhere."""
    return FeatureCache(cfg.cache_dir, int(cfg.cache_gb * 1e9)) if cfg.cache_dir else None


def frozen_images(
    net: Sam3Model, cfg: Config, precision: str, cache: FeatureCache | None = None
) -> FrozenImages | None:
    """What gives the "trunk" of pictures; None where it changes in training.

    None also where the base is divided among processes: these run a divided encoder together, and
    so cannot see one picture at a time.

    Args:
        net: adapted, on its device.
        precision: fp32, bf16 or fp16.
        cache: says what it will keep.
    """
    trunk = net.vision_encoder.backbone
    why = why_changing(trunk)
    if cache is not None:
        kept = f"without pictures; of the image encoder, {why}" if why else "pictures and phrases"
        say(f"cache of frozen features: {cache.folder.absolute()} ({kept})")
    if why or cfg.shard_base:
        return None
    device, dtype = next(net.parameters()).device, AUTOCAST.get(precision)

    def encode(picture: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = encode_trunk(net, network_input([picture]))
        # The convolutions that read it would cast it to this, too.
        return {"trunk": found if dtype is None else found.to(dtype)}

    facts = {
        "kind": KIND,
        "base": str(net.sam3_base.fingerprint),
        "numbers": f"{precision} {device.type} {torch.get_float32_matmul_precision()}",
    }
    return FrozenImages(encode, facts, device, cache)
