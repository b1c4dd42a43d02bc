"""The model and the texts that `evaluate` and `predict` use: settings, checks, loading."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option
from lora_core.errors import CheckpointError, ConfigError, listing
from lora_core.guards import count_problem, unnamed

if TYPE_CHECKING:
    import torch

    from scenesplat_lora.labelling import Labelling
    from scenesplat_lora.models import LangPretrainer
    from scenesplat_lora.ptv3_config import PTv3Config
    from scenesplat_lora.text_embeddings import TextEmbeddings

LayoutName = Literal[
    "generic",
    "scannet",
    "scannet200",
    "scannetpp",
    "matterport",
    "matterport160",
    "holicity",
    "kitti360",
]


@dataclass(kw_only=True)
class ModelOptions:
    """A language model, LoRA on it or not, the texts it is compared with, and how it computes."""

    checkpoint: str = option(MISSING, "Base model, or a merged one: .pth or .safetensors.", "model")
    adapter: str | None = option(None, "LoRA: what save_lora_checkpoint wrote, or PEFT.", "model")
    network: str | None = option(
        None,
        "A .py file whose model.backbone describes the network, for a checkpoint of another shape "
        "than the released ones.",
        "model",
    )
    text: str = option(MISSING, "Text embeddings of the class names: .pt or .npz.", "classes")
    names: str | None = option(
        None,
        "Class names, one per line; default: in the .npz, or the .txt beside the .pt.",
        "classes",
    )
    prompt_classes: list[int] = option(
        [], "Class number of each text, where several are of one class.", "classes"
    )
    confidence_threshold: float = option(
        0.1, "No label below this sigmoid(feature . text); 0.1 rejects nothing.", "classes"
    )
    vote_k: int = option(25, "Neighbours that vote for each point's label; 0: no vote.", "classes")
    layout: LayoutName = option("generic", "Which data set's files a scene folder holds.", "data")
    first_grid: float = option(0.01, "Metres; of each such cell one Gaussian is labelled.", "data")
    grid_size: float = option(0.02, "Metres; the network's voxels, as in training.", "data")
    seed: int = option(0, "Another seed takes other Gaussians of the cells.", "data")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "fp32", "Mixed precision; auto is bf16 or fp16 on a GPU.", "model"
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "Where to compute.", "model")

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(listing(problems))

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = list(unnamed(self, ("checkpoint", "adapter", "network", "text", "names")))
        found += count_problem(self, "vote_k", 0)
        found += count_problem(self, "seed", 0)
        if not 0 <= self.confidence_threshold <= 1:
            found.append(
                f"--confidence_threshold is {self.confidence_threshold}: it must be 0 to 1"
            )
        for name in ("first_grid", "grid_size"):
            if not 0 < getattr(self, name) < 100:
                found.append(f"--{name} is {getattr(self, name)}: it must be metres above 0")
        return found

    def labelling(self) -> Labelling:
        """How scenes are labelled."""
        from scenesplat_lora.labelling import Labelling

        return Labelling(
            self.first_grid, self.grid_size, self.confidence_threshold, self.precision, self.seed
        )

    # -- before any weight is read ---------------------------------------------------------------

    def check_device(self) -> None:
        """Refuse a device or precision that this machine does not have.

        Raises:
            ConfigError: with what it has.
        """
        from lora_core.training.arguments import choose_device, choose_precision

        choose_precision(self.precision, choose_device(self.device))

    def texts(self) -> TextEmbeddings:
        """The text embeddings.

        Raises:
            DataError, CheckpointError: see `read_text_embeddings`.
        """
        from scenesplat_lora.text_embeddings import read_text_embeddings

        return read_text_embeddings(self.text, self.names, self.prompt_classes or None)

    def backbone(self) -> PTv3Config | None:
        """The network that --network describes; None: a released one.

        Raises:
            ConfigError: a file that cannot be read, or without such a section.
        """
        if self.network is None:
            return None
        from scenesplat_lora.config_files import read_config
        from scenesplat_lora.ptv3_config import PTv3Config

        model: Any = read_config(self.network).values.get("model")
        section = model.get("backbone") if isinstance(model, dict) else None
        if not isinstance(section, dict):
            raise ConfigError(f"{self.network}: it has no model = dict(backbone=dict(...))")
        return PTv3Config.from_dict(section)

    def glance(self) -> None:
        """Compare the texts with the model, and find the adapter; no weights are read.

        Raises:
            ConfigError, CheckpointError, DataError: what cannot work.
        """
        from scenesplat_lora.official import read_official, released_config

        if self.adapter and not Path(self.adapter).exists():
            raise CheckpointError(f"--adapter: {Path(self.adapter).absolute()} does not exist")
        file = read_official(self.checkpoint, device="meta")
        if "seg_head.weight" in file.tensors:
            raise CheckpointError(
                f"{file.path} is a segmentation model with classes of its own; texts are compared "
                "with the features of a language model"
            )
        width = (self.backbone() or released_config(file)).out_channels
        texts = self.texts()
        if texts.features.shape[1] != width:
            raise ConfigError(
                f"--text: {self.text} has embeddings of width {texts.features.shape[1]}, the model "
                f"features of width {width}: they are of different models"
            )

    def load(self) -> LangPretrainer:
        """The model in evaluation mode on its device, with --adapter.

        Raises:
            CheckpointError, ConfigError: a file that cannot be used.
        """
        from scenesplat_lora.lora import load_lora_checkpoint
        from scenesplat_lora.models import LangPretrainer
        from scenesplat_lora.official import load_official

        model = load_official(self.checkpoint, config=self.backbone())
        if not isinstance(model, LangPretrainer):
            raise CheckpointError(f"{self.checkpoint} is no language model")
        if self.adapter:
            load_lora_checkpoint(model, self.adapter)
        return model.eval().to(self._device())

    def _device(self) -> torch.device:
        from lora_core.training.arguments import choose_device

        return choose_device(self.device)
