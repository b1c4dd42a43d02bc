"""The published sizes of Depth-Anything-V2, and what transformers calls their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATCH = 14  # side of a patch, pixels
NATIVE_SIZE = 518  # side of the input that the position table was trained for, 37 patches
HEAD_CHANNELS = 32  # before the last convolution


@dataclass(frozen=True)
class Variant:
    """One published size.

    Attributes:
        name: of the encoder in file names, as in depth_anything_v2_vitl.pth.
        hidden_size, layers, heads: of the DINOv2 encoder.
        taps: layers whose output is used, counted from 1 (0 is the embedding).
        features: channels of the fusion. out_channels: of the four taps before it.
        licence: of the weights.
    """

    name: str
    hidden_size: int
    layers: int
    heads: int
    taps: tuple[int, int, int, int]
    features: int
    out_channels: tuple[int, int, int, int]
    licence: str


VARIANTS = (
    Variant("vits", 384, 12, 6, (3, 6, 9, 12), 64, (48, 96, 192, 384), "Apache-2.0"),
    Variant("vitb", 768, 12, 12, (3, 6, 9, 12), 128, (96, 192, 384, 768), "CC-BY-NC-4.0"),
    Variant("vitl", 1024, 24, 16, (5, 12, 18, 24), 256, (256, 512, 1024, 1024), "CC-BY-NC-4.0"),
)
CUSTOM = "custom"  # the variant of another size


def settings_of(variant: Variant) -> dict[str, Any]:
    """The arguments of transformers' `DepthAnythingConfig`."""
    return {
        "backbone_config": {
            "model_type": "dinov2",
            "image_size": NATIVE_SIZE,
            "patch_size": PATCH,
            "hidden_size": variant.hidden_size,
            "num_hidden_layers": variant.layers,
            "num_attention_heads": variant.heads,
            "out_indices": list(variant.taps),
            "apply_layernorm": True,
            "reshape_hidden_states": False,
        },
        "patch_size": PATCH,
        "reassemble_hidden_size": variant.hidden_size,
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": list(variant.out_channels),
        "fusion_hidden_size": variant.features,
        "head_hidden_size": HEAD_CHANNELS,
        "head_in_index": -1,
        "depth_estimation_type": "relative",
        "max_depth": 1,
    }


def name_of(settings: Mapping[str, Any]) -> str:
    """The published name of a model with these settings, or "custom"."""
    backbone = settings.get("backbone_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    found = (  # transformers leaves its defaults out of files
        backbone.get("hidden_size", 768),
        backbone.get("num_hidden_layers", 12),
        settings.get("fusion_hidden_size", 64),
    )
    for variant in VARIANTS:
        if found == (variant.hidden_size, variant.layers, variant.features):
            return variant.name
    return CUSTOM


def licence_of(name: str) -> str:
    """The licence of a published size's weights; "" for another size, whose licence is unknown."""
    return next((variant.licence for variant in VARIANTS if variant.name == name), "")
