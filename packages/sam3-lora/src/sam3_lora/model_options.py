"""The model that `predict` and `evaluate` use: its settings, what they must be, and loading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_core.config import option
from sam3_lora.config import Config, Dataset, Device, Paths, parse_size

if TYPE_CHECKING:
    from sam3_lora.predictor import Predictor


@dataclass
class ModelOptions:
    """A base or merged model, an adapter on it or not, and how it computes."""

    checkpoint: str = option(
        Paths.sam3_checkpoint,
        "Base model, or a merged model (then without --adapter): file, folder or hub id.",
        "model",
    )
    adapter: str | None = option(None, "best.pt, epoch_N.pt, or a PEFT directory.", "model")
    bpe_path: str | None = option(
        None,
        "bpe_simple_vocab_16e6.txt.gz of CLIP, where the checkpoint has no tokenizer beside.",
        "model",
    )
    allow_partial: bool = option(
        False, "Use what fits of an adapter with missing or unexpected tensors.", "model"
    )
    resolution: str | None = option(
        None,
        "Model input such as 1008 or 672x1008; default: the adapter's or checkpoint's own.",
        "model",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Mixed precision; auto is fp32 on the CPU, bf16 or fp16 on a GPU.", "model"
    )
    device: Device = option("auto", "Where to compute.", "model")

    def input_size(self) -> tuple[int, int] | None:
        """--resolution as (height, width); None: the model's own.

        Raises:
            ConfigError: no size that the network runs at.
        """
        return None if self.resolution is None else parse_size(self.resolution, "--resolution")

    def check_device(self) -> None:
        """Refuse a device or precision that this machine does not have.

        Raises:
            ConfigError: with what it has.
        """
        from lora_core.training.arguments import choose_device, choose_precision

        choose_precision(self.precision, choose_device(self.device))

    def glance(self) -> None:
        """Look at versions, and at the headers and the vocabulary of --checkpoint and --adapter.

        Raises:
            ConfigError, CheckpointError: what cannot work, all together.
        """
        from lora_core import preflight
        from sam3_lora import model

        preflight.libraries("sam3-lora", "pictures")
        paths = Paths(self.checkpoint, self.bpe_path)
        data = Dataset(resolution=self.resolution or Dataset.resolution)
        model.glance(Config(paths=paths, dataset=data, adapter=self.adapter))

    def predictor(self) -> Predictor:
        """The model, loaded.

        Raises:
            CheckpointError, ConfigError: see `Predictor.load`.
        """
        from sam3_lora.predictor import Predictor

        return Predictor.load(
            self.checkpoint,
            self.adapter,
            self.input_size(),
            self.device,
            self.precision,
            self.bpe_path,
            self.allow_partial,
        )
