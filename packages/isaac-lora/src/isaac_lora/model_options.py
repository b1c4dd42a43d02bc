"""The model that `predict` and `evaluate` ask: base, adapter, depth, and how it computes."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isaac_lora.depth.settings import ALPHA, FILE, INPUT_SIZE, check_adapter, setting_problems
from lora_core.config import option
from lora_core.errors import ConfigError, listing, one_line
from lora_core.guards import count_problem, unnamed

if TYPE_CHECKING:
    import torch

    from isaac_lora.adapter_files import Adapter
    from isaac_lora.depth.controls import DepthSource
    from isaac_lora.depth.depth_cache import DepthGrids
    from isaac_lora.depth.settings import DepthSettings
    from isaac_lora.frozen_features import FrozenFeatures
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

CACHE_BYTES = 200 * 10**9  # as `--cache_gb` of the training


@dataclass(kw_only=True)
class ModelOptions:
    """A model, LoRA on it or not, depth or not, and how it answers."""

    model_path: str = option(MISSING, "Folder of Isaac, as published, or a merged one.", "model")
    adapter: str | None = option(
        None, "LoRA: the folder of a training, or one as PEFT has it.", "model"
    )
    use_depth: bool | None = option(
        None, "Depth for the images; null: as the adapter or merged model was trained.", "model"
    )
    depth_checkpoint_path: str | None = option(
        None, "Depth Anything V2: its .pth file, or a transformers folder.", "model"
    )
    depth_alpha: float | None = option(
        None, f"Scale of the depth; null: as trained, or {ALPHA:g}.", "model"
    )
    depth_input_size: int | None = option(
        None, f"Pixels that the depth model sees; null: as trained, or {INPUT_SIZE}.", "model"
    )
    cache_dir: str | None = option(
        None, "Depth of images that a training has kept, its isaac_cache.", "model"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Mixed precision; auto is fp32 on the CPU, bf16 or fp16 on a GPU.", "model"
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "Where to compute.", "model")

    max_new_tokens: int = option(256, "Tokens of an answer, at most.", "answers")
    batch_size: int = option(8, "Questions that are answered at a time.", "answers")

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ConfigError(listing(problems))

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        paths = ("model_path", "adapter", "depth_checkpoint_path", "cache_dir")
        found = list(unnamed(self, paths))
        for name in ("max_new_tokens", "batch_size"):
            found += count_problem(self, name, 1)
        alpha = ALPHA if self.depth_alpha is None else self.depth_alpha
        size = INPUT_SIZE if self.depth_input_size is None else self.depth_input_size
        return found + [f"--{line}" for line in setting_problems(alpha, size)]

    # -- before any weight of Isaac is read --------------------------------------------------------

    def check_device(self) -> None:
        """Refuse a device or precision that this machine does not have.

        Raises:
            ConfigError: with what it has.
        """
        from lora_core.training.arguments import choose_precision

        choose_precision(self.precision, self.torch_device)

    def glance(self) -> None:
        """Look at versions, at the headers of the model, at the adapter, and read the depth model.

        Raises:
            ConfigError, CheckpointError: what cannot work, all together.
        """
        from isaac_lora import official
        from isaac_lora.adapter_files import check_fit
        from isaac_lora.conversations.tokenizer_files import find_tokenizer
        from lora_core import preflight
        from lora_core.adapters import on_base

        preflight.libraries("isaac-lora", "pictures")
        empty: list[IsaacForConditionalGeneration] = []

        def base() -> None:
            folder = official.find_model(self.model_path)
            preflight.check_all(
                lambda: empty.append(official.check_folder(folder)), lambda: find_tokenizer(folder)
            )

        def adapter() -> None:
            on_base.refuse_missing(self.adapter)
            self.check_depth()

        preflight.check_all(base, adapter)
        if self.trained is not None:
            check_fit(empty[0], self.trained)

    def check_depth(self) -> None:
        """Compare the depth of the options with that of the adapter or merged model.

        Raises:
            CheckpointError: it was trained with another one. Warns: depth on one side only.
            ConfigError: no depth checkpoint where one is needed.
        """
        if self.depths is None and self.depth_checkpoint_path is not None:
            warnings.warn(
                "--depth_checkpoint_path is given, but without --use_depth True images have no "
                "depth: nothing here was trained with it",
                stacklevel=2,
            )
        if self.adapter is not None or self.trained_depth is not None:
            check_adapter(self.trained_folder, self.depth_settings)

    # -- what was trained --------------------------------------------------------------------------

    @cached_property
    def trained(self) -> Adapter | None:
        """What is in --adapter; None without.

        Raises:
            CheckpointError: no adapter there.
        """
        from isaac_lora.adapter_files import read_adapter

        return None if self.adapter is None else read_adapter(self.adapter)

    @property
    def trained_folder(self) -> Path:
        """The folder of the adapter, or else of the model."""
        if self.trained is None:
            return Path(self.model_path)
        path = self.trained.path
        return path if path.is_dir() else path.parent

    @property
    def trained_depth(self) -> DepthSettings | None:
        """The depth that the adapter, or else the merged model, was trained with; None: none."""
        from isaac_lora.depth.settings import read_depth_settings

        return read_depth_settings(self.trained_folder)

    @cached_property
    def depths(self) -> DepthGrids | None:
        """The depth of images; None: without.

        Raises:
            ConfigError: depth is needed and no checkpoint given, or settings that do not fit it.
            CheckpointError: the checkpoint is missing, damaged, or of another model.
        """
        from isaac_lora.depth.checkpoint import find_depth_checkpoint
        from isaac_lora.depth.depth_cache import DepthGrids
        from lora_core.cache import FeatureCache

        trained = self.trained_depth
        if not (trained is not None if self.use_depth is None else self.use_depth):
            return None
        if self.depth_checkpoint_path is None:
            reason = "--use_depth needs --depth_checkpoint_path, such as depth_anything_v2_vitl.pth"
            if trained is not None:
                reason = (
                    f"{one_line(self.trained_folder)} was trained with depth from "
                    f"{one_line(trained.checkpoint)} ({FILE}): give it as --depth_checkpoint_path, "
                    "or go without depth with --use_depth False"
                )
            raise ConfigError(reason)
        checkpoint = find_depth_checkpoint(self.depth_checkpoint_path)
        size = self.depth_input_size or (trained.input_size if trained else INPUT_SIZE)
        if problems := setting_problems(self.alpha, size, checkpoint.patch):
            raise ConfigError(listing([f"--{line}" for line in problems]))
        cache = FeatureCache(Path(self.cache_dir), CACHE_BYTES) if self.cache_dir else None
        return DepthGrids(checkpoint, size, self.torch_device, cache)

    @property
    def alpha(self) -> float:
        """Scale of the depth."""
        if self.depth_alpha is not None:
            return self.depth_alpha
        return ALPHA if self.trained_depth is None else self.trained_depth.alpha

    @property
    def depth_settings(self) -> DepthSettings | None:
        """The depth of images, as it is stored beside adapters; None: without."""
        return None if self.depths is None else self.depths.settings(self.alpha)

    # -- loading -----------------------------------------------------------------------------------

    @property
    def torch_device(self) -> torch.device:
        """Where to compute.

        Raises:
            ConfigError: no such device.
        """
        from lora_core.training.arguments import choose_device

        return choose_device(self.device)

    def load(
        self, folder: str | None = None, adapter: bool = True
    ) -> IsaacForConditionalGeneration:
        """The model on its device in evaluation mode, with --adapter; depth is given by `features`.

        Args:
            folder: instead of --model_path. adapter: False: without.

        Raises:
            CheckpointError, ConfigError: files that cannot be used.
        """
        from isaac_lora import official
        from isaac_lora.adapter_files import load_adapter
        from isaac_lora.objective import DTYPES
        from lora_core.training.arguments import choose_precision

        dtype = DTYPES[choose_precision(self.precision, self.torch_device)]
        model = official.load_model(folder or self.model_path, dtype).requires_grad_(False)
        if adapter and self.trained is not None:
            load_adapter(model, self.trained, depth=self.depth_settings)
        return model.to(self.torch_device).eval()

    def features(
        self, model: IsaacForConditionalGeneration, depth: DepthSource | None
    ) -> FrozenFeatures:
        """What makes the inputs of a model's pictures, with this depth."""
        from isaac_lora.frozen_features import FrozenFeatures

        return FrozenFeatures(None, depth, self.alpha, model.config.hidden_size)

    def said(self) -> dict[str, Any]:
        """How answers are made, plain values for files that are copied and published."""
        depth = self.depth_settings
        return {
            "model": Path(self.model_path).name,
            "adapter": None if self.adapter is None else Path(self.adapter).name,
            "adapter_sha256": self.trained.file.extra.get("sha256") if self.trained else None,
            "depth": None
            if depth is None
            else {
                "checkpoint": depth.checkpoint,
                "model": depth.model,
                "sha256": depth.fingerprint,
                "alpha": depth.alpha,
                "input_size": depth.input_size,
            },
            "precision": self.precision,
            "max_new_tokens": self.max_new_tokens,
        }
