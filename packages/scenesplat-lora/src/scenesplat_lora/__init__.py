"""LoRA for SceneSplat: Point Transformer V3, official checkpoints, Gaussian scenes as data.

The public names are loaded on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DefaultSegmentorV2": "network.models",
    "LangPretrainer": "network.models",
    "PTv3Config": "network.ptv3_config",
    "PointBatch": "network.point_batch",
    "PointTransformerV3": "network.ptv3",
    "get_lora_parameters": "lora",
    "inject_lora_to_ptv3": "lora",
    "inject_lora_to_stage": "lora",
    "inject_lora_with_preset": "lora",
    "load_lora_checkpoint": "lora",
    "load_official": "network.official",
    "mark_only_lora_as_trainable": "lora",
    "merge_lora_weights": "lora",
    "print_lora_summary": "lora",
    "save_lora_checkpoint": "lora",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from scenesplat_lora.lora import get_lora_parameters as get_lora_parameters
    from scenesplat_lora.lora import inject_lora_to_ptv3 as inject_lora_to_ptv3
    from scenesplat_lora.lora import inject_lora_to_stage as inject_lora_to_stage
    from scenesplat_lora.lora import inject_lora_with_preset as inject_lora_with_preset
    from scenesplat_lora.lora import load_lora_checkpoint as load_lora_checkpoint
    from scenesplat_lora.lora import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from scenesplat_lora.lora import merge_lora_weights as merge_lora_weights
    from scenesplat_lora.lora import print_lora_summary as print_lora_summary
    from scenesplat_lora.lora import save_lora_checkpoint as save_lora_checkpoint
    from scenesplat_lora.network.models import DefaultSegmentorV2 as DefaultSegmentorV2
    from scenesplat_lora.network.models import LangPretrainer as LangPretrainer
    from scenesplat_lora.network.official import load_official as load_official
    from scenesplat_lora.network.point_batch import PointBatch as PointBatch
    from scenesplat_lora.network.ptv3 import PointTransformerV3 as PointTransformerV3
    from scenesplat_lora.network.ptv3_config import PTv3Config as PTv3Config


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scenesplat_lora' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"scenesplat_lora.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
