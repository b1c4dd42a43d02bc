"""LoRA fine-tuning of SAM 3: train on phrases, evaluate, predict, merge to official files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_core.first_use import loader

__version__ = "0.1.0"

_HOME = {"Config": "config", "Predictor": "predictor", "build": "model", "load": "data"}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from sam3_lora.config import Config as Config
    from sam3_lora.data import load as load
    from sam3_lora.model import build as build
    from sam3_lora.predictor import Predictor as Predictor

__getattr__ = loader(__name__, _HOME)
