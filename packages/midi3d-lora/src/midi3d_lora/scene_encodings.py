"""The encodings of a run's scenes, made before it begins: each process takes its share of them."""

from __future__ import annotations

import torch

from lora_core.cache import FeatureCache
from lora_core.distributed import in_shares
from midi3d_lora import model
from midi3d_lora.config import Config
from midi3d_lora.data import Splits, scene_settings
from midi3d_lora.encoder_cache import Encodings, FrozenEncoders, Plan
from midi3d_lora.transformer.dit import TripoSGDiTModel


def encodings_of(
    cfg: Config,
    net: TripoSGDiTModel,
    device: torch.device,
    dtype: torch.dtype,
    kept: bool = True,
) -> Encodings:
    """What the frozen encoders make of scenes for a transformer, kept as settings say.

    Args:
        net: may be on the meta device.
        dtype: of the training, in which picture embeddings are kept.
        kept: False: without the cache.
    """
    plan = Plan(
        scene=scene_settings(cfg),
        num_tokens=model.num_tokens(cfg, net),
        draws=cfg.surface_draws,
        dtype=dtype,
    )
    cache = None
    if kept and cfg.cache == "on":
        cache = FeatureCache(cfg.cache_place, int(cfg.cache_gb * 1e9))
    return Encodings(FrozenEncoders(model.folder_of(cfg), device), plan, cache)


def fill(encodings: Encodings, splits: Splits, device: torch.device) -> None:
    """Encode all scenes that are not in the cache; each process takes its share of them."""

    def share(own: slice) -> None:
        encodings.fill(splits.train[own])
        encodings.fill(splits.val[own], draws=1)

    in_shares(share, device)
