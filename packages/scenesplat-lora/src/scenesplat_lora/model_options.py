"""The model and the classes that `evaluate` and `predict` use: settings, checks, loading."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option
from lora_core.errors import CheckpointError, ConfigError, listing
from lora_core.guards import count_problem, unnamed

if TYPE_CHECKING:
    import torch

    from scenesplat_lora.adapter_read import AdapterFacts
    from scenesplat_lora.labelling import Labelling
    from scenesplat_lora.language.text_embeddings import TextEmbeddings
    from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
    from scenesplat_lora.network.official import OfficialFile
    from scenesplat_lora.network.ptv3_config import PTv3Config

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


@dataclass(frozen=True)
class Classes:
    """What Gaussians are labelled as.

    Attributes:
        text: embeddings that a language model's features are compared with; None: the classes of
            a segmentation model's head.
    """

    names: tuple[str, ...]
    text: TextEmbeddings | None = None


@dataclass(kw_only=True)
class ModelOptions:
    """A model, LoRA on it or not, the classes, and how it computes."""

    checkpoint: str = option(MISSING, "Base model, or a merged one: .pth or .safetensors.", "model")
    adapter: str | None = option(None, "LoRA: what save_lora_checkpoint wrote, or PEFT.", "model")
    network: str | None = option(
        None,
        "A .py file whose model.backbone describes the network, for a checkpoint of another shape "
        "than the released ones that does not describe itself.",
        "model",
    )
    text: str | None = option(
        None,
        "Text embeddings of the class names, for a language model: .pt, .npz, or the folder of a "
        "SigLIP 2. A segmentation model has classes of its own.",
        "classes",
    )
    names: str | None = option(
        None,
        "Class names, one per line; default: in the .npz, the .txt beside the .pt, or what a "
        "segmentation model or its adapter says.",
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
    first_grid: float | None = option(
        None,
        "Metres; of each such cell one Gaussian is labelled; null: half of grid_size.",
        "data",
    )
    grid_size: float | None = option(
        None,
        "Metres; the network's voxels; null: as the adapter was trained with or the checkpoint was "
        "made for, 0.02 for the released models.",
        "data",
    )
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
            value = getattr(self, name)
            if value is not None and not 0 < value < 100:
                found.append(f"--{name} is {value}: it must be metres above 0")
        return found

    def labelling(self) -> Labelling:
        """How scenes are labelled."""
        from scenesplat_lora.labelling import Labelling

        size = self.voxels()
        first = size / 2 if self.first_grid is None else self.first_grid
        return Labelling(
            first, size, self.confidence_threshold, self.precision, self.seed, bool(self.wanted)
        )

    def voxels(self) -> float:
        """Side of the network's voxels in metres."""
        from scenesplat_lora.network.description import base_grid_size

        return self.grid_size or self._facts.grid_size or base_grid_size(self._file)

    @property
    def wanted(self) -> tuple[str, ...]:
        """What the network takes of a scene besides its Gaussians."""
        return ("normal",) if self._network.in_channels == 14 else ()

    # -- before any weight is read ---------------------------------------------------------------

    def check_device(self) -> None:
        """Refuse a device or precision that this machine does not have.

        Raises:
            ConfigError: with what it has.
        """
        from lora_core.training.arguments import choose_device, choose_precision

        choose_precision(self.precision, choose_device(self.device))

    @cached_property
    def _file(self) -> OfficialFile:
        """The checkpoint without its values."""
        from scenesplat_lora.network.official import read_official

        return read_official(self.checkpoint, device="meta")

    @cached_property
    def _network(self) -> PTv3Config:
        from scenesplat_lora.network.description import network_config

        return self.backbone() or network_config(self._file)

    @cached_property
    def _facts(self) -> AdapterFacts:
        """What --adapter says about itself."""
        from scenesplat_lora.adapter_read import AdapterFacts, read_facts

        return read_facts(self.adapter) if self.adapter else AdapterFacts()

    @property
    def head(self) -> int | None:
        """Classes of the model's head; None: a language model."""
        from scenesplat_lora.network.official import head_of

        return self._facts.classes or head_of(self._file)

    @property
    def base_compares(self) -> bool:
        """Whether the base without --adapter has the same classes."""
        from scenesplat_lora.network.official import head_of

        return self.head == head_of(self._file)

    def classes(self) -> Classes:
        """The classes, with text embeddings for a language model.

        Raises:
            ConfigError: texts that are missing, or that a segmentation model has no use for.
            DataError, CheckpointError: see `read_text_embeddings` and `read_names`.
        """
        if self.head is None:
            text = self.texts()
            return Classes(text.names, text)
        if self.text is not None:
            raise ConfigError(
                f"--text: {self.checkpoint} with its adapter is a segmentation model with classes "
                "of its own: leave --text out; --names gives them names"
            )
        said = self._facts.names or (self._file.description and self._file.description.classes)
        names = tuple(f"class {number}" for number in range(self.head))
        if self.names is not None:
            from scenesplat_lora.language.text_embeddings import read_names

            said = tuple(read_names(self.names))
            if len(said) != self.head:
                raise ConfigError(
                    f"--names: {self.names} has {len(said)} names, the model {self.head} classes"
                )
        return Classes(said if said and len(said) == self.head else names)

    def texts(self) -> TextEmbeddings:
        """The text embeddings.

        Raises:
            ConfigError: none are given.
            DataError, CheckpointError: see `read_text_embeddings`.
        """
        if self.text is None:
            raise ConfigError(
                f"--text is needed: {self.checkpoint} is a language model, whose features are "
                "compared with text embeddings of the class names"
            )
        from scenesplat_lora.language.text_embeddings import read_text_embeddings

        return read_text_embeddings(self.text, self.names, self.prompt_classes or None)

    def backbone(self) -> PTv3Config | None:
        """See `network_of`."""
        return network_of(self.network)

    def glance(self) -> None:
        """Compare the classes with the model, and find the adapter; no weights are read.

        Raises:
            ConfigError, CheckpointError, DataError: what cannot work.
        """
        if self.adapter and not Path(self.adapter).exists():
            raise CheckpointError(f"--adapter: {Path(self.adapter).absolute()} does not exist")
        width, text = self._network.out_channels, self.classes().text
        if text is not None and text.features.shape[1] != width:
            raise ConfigError(
                f"--text: {self.text} has embeddings of width {text.features.shape[1]}, the model "
                f"features of width {width}: they are of different models"
            )

    def load(self) -> LangPretrainer | DefaultSegmentorV2:
        """The model in evaluation mode on its device, with --adapter.

        Raises:
            CheckpointError, ConfigError: a file that cannot be used.
        """
        from lora_core.report import say
        from scenesplat_lora.lora import load_lora_checkpoint
        from scenesplat_lora.network.official import build_model, load_state, read_official

        file = read_official(self.checkpoint)
        # A base without a head gets an empty one here; another head is exchanged by the adapter.
        model = build_model(file, self._network, None if self.base_compares else self.head)
        load_state(model, file)
        if self.adapter:
            load_lora_checkpoint(model, self.adapter)
        if self.grid_size is None:
            say(f"voxels of {self.voxels():g} m, as the model was made for (--grid_size)")
        return model.eval().to(self._device())

    def _device(self) -> torch.device:
        from lora_core.training.arguments import choose_device

        return choose_device(self.device)


def network_of(path: str | None) -> PTv3Config | None:
    """The network that the file of `--network` describes; None: none is given.

    Raises:
        ConfigError: a file that cannot be read, or without such a section.
    """
    if path is None:
        return None
    from scenesplat_lora.network.ptv3_config import PTv3Config
    from scenesplat_lora.settings.files import find, read_config

    model: Any = read_config(find(path)).values.get("model")
    section = model.get("backbone") if isinstance(model, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: it has no model = dict(backbone=dict(...))")
    return PTv3Config.from_dict(section)
