"""The model that `predict` and `evaluate` use: its settings, and loading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_core.config import option
from sam2_lora.config import Config, Device, Precision, parse_size

if TYPE_CHECKING:
    from sam2_lora.predictor import Predictor


@dataclass
class ModelOptions:
    """A base or merged model, an adapter on it or not, and how it computes."""

    checkpoint: str = option(
        Config.checkpoint, "Base model, or a merged model (then without --adapter).", "model"
    )
    adapter: str | None = option(None, "Adapter directory or .torch file.", "model")
    allow_partial: bool = option(
        False, "Use what fits of an adapter with missing or unexpected tensors.", "model"
    )
    image_size: str | None = option(
        None,
        "Model input such as 1024 or 256x1600; default: the adapter's or checkpoint's own.",
        "model",
    )
    precision: Precision = option(
        "auto", "Mixed precision; auto is fp32 on the CPU, bf16 or fp16 on a GPU.", "model"
    )
    device: Device = option("auto", "Where to compute.", "model")

    def input_size(self) -> tuple[int, int] | None:
        """--image_size as (height, width); None: the model's own.

        Raises:
            ConfigError: no size that the network runs at.
        """
        return parse_size(self.image_size) if self.image_size else None

    def predictor(self) -> Predictor:
        """The model, loaded.

        Raises:
            CheckpointError, ConfigError: see `Predictor.load`.
        """
        from sam2_lora.predictor import Predictor

        return Predictor.load(
            self.checkpoint,
            self.adapter,
            self.input_size(),
            self.device,
            self.precision,
            self.allow_partial,
        )
