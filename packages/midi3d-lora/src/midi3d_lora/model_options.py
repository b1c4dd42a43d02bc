"""The model and how scenes are made of noise: settings that `predict` and `evaluate` share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option
from lora_core.errors import ConfigError, listing
from lora_core.guards import count_problem, unnamed
from midi3d_lora.lora_choice import RELEASED_LAYERS, block_problems

if TYPE_CHECKING:
    import torch

    from midi3d_lora.adapter_files import Adapter
    from midi3d_lora.meshes.extraction import ExtractionSettings
    from midi3d_lora.pipeline import MIDIPipeline

PRETRAINED = "pretrained_weights/MIDI-3D"


@dataclass(kw_only=True)
class ModelOptions:
    """A model, LoRA on it or not, and how it makes scenes."""

    pretrained_model: str = option(
        PRETRAINED, "Folder of MIDI-3D, the official one or a merged one.", "model"
    )
    lora_path: str | None = option(
        None,
        "LoRA: lora_weights.pth, its folder, or one as PEFT has it; without: the base model.",
        "model",
    )
    lora_rank: int | None = option(
        None, "Not needed: the adapter's file has it, and another value is an error.", "model"
    )
    lora_alpha: float | None = option(
        None, "As --lora_rank; needed for files of other programs that hold tensors alone.", "model"
    )
    mi_attention_blocks: list[str] | None = option(
        None,
        "Blocks in which all instances of a scene attend to each other; null: those of the "
        "adapter, or blocks.8 to blocks.12 of the released model.",
        "model",
    )
    variant: str | None = option(None, "Of the weight files, such as fp16.", "model")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Of the transformer and the picture encoders; auto is bf16 or fp16 on a GPU. Surfaces are "
        "decoded in fp32.",
        "model",
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "Where to compute.", "model")

    num_inference_steps: int = option(50, "Steps from noise to latents.", "sampling")
    guidance_scale: float = option(
        7.0, "How closely pictures are followed; 1: without guidance, in half the time.", "sampling"
    )
    seed: int = option(42, "Of the noise: one seed is one scene on every device.", "sampling")
    num_tokens: int | None = option(
        None, "Latent tokens of an instance; null: the transformer's width, 2048.", "sampling"
    )

    octree_depth: int = option(8, "Surfaces on a grid of 2^depth cells a side.", "surface")
    coarse_depth: int = option(
        6, "Depth of the grid that is looked at wholly; parts thinner than its cells may get lost.",
        "surface",
    )  # fmt: skip
    inside: Literal["auto", "negative", "positive"] = option(
        "auto", "Sign of the field inside of objects; auto asks the border of the box.", "surface"
    )
    fit_box: bool = option(
        True, "Look at each instance again in its own box, at the full depth.", "surface"
    )
    smooth: bool = option(True, "Mean of 3 x 3 x 3 points, as the official pipeline.", "surface")
    chunk_size: int = option(
        10_000, "Points that are decoded at a time; fewer need less memory.", "surface"
    )

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(listing(problems))

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = list(unnamed(self, ("pretrained_model", "lora_path", "variant")))
        found += count_problem(self, "num_inference_steps", 1)
        found += count_problem(self, "seed", 0)
        found += count_problem(self, "chunk_size", 1)
        for name in ("lora_rank", "num_tokens"):
            if getattr(self, name) is not None:
                found += count_problem(self, name, 1)
        for name in ("octree_depth", "coarse_depth"):
            if not 1 <= getattr(self, name) <= 10:
                found.append(f"--{name} is {getattr(self, name)}: it must be 1 to 10")
        if not 0 <= self.guidance_scale < math.inf:
            found.append(f"--guidance_scale is {self.guidance_scale}: it must be a number from 0")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            found.append(f"--lora_alpha is {self.lora_alpha}: it must be a number above 0")
        if self.lora_path is None:
            found += [
                f"--{name} is of an adapter: give --lora_path, or leave it out"
                for name in ("lora_rank", "lora_alpha")
                if getattr(self, name) is not None
            ]
        return found + [f"--{line}" for line in block_problems(self.mi_attention_blocks or ())]

    def extraction(self) -> ExtractionSettings:
        """How closely fields are looked at."""
        from midi3d_lora.meshes.extraction import ExtractionSettings

        return ExtractionSettings(
            depth=self.octree_depth,
            coarse_depth=min(self.coarse_depth, self.octree_depth),
            inside=self.inside,
            fit_box=self.fit_box,
            smooth=self.smooth,
            chunk_size=self.chunk_size,
        )

    # -- before any weight is read ---------------------------------------------------------------

    def check_device(self) -> None:
        """Refuse a device or precision that this machine does not have.

        Raises:
            ConfigError: with what it has.
        """
        from lora_core.training.arguments import choose_precision

        choose_precision(self.precision, self.torch_device)

    def glance(self) -> None:
        """Look whether the model's parts are there, and what the adapter says; reads no weights.

        Raises:
            CheckpointError: what is missing or damaged.
            ConfigError: flags that contradict the adapter.
        """
        from lora_core.preflight import check_all
        from midi3d_lora import official

        check_all(
            lambda: official.find_model(self.pretrained_model, variant=self.variant),
            lambda: self.blocks,
        )

    def check_blocks(self, instances: int) -> None:
        """Compare the multi-instance blocks with the transformer; to be asked after `glance`.

        Args:
            instances: of the largest scene.

        Raises:
            ConfigError: blocks that it does not have, or none are known for several instances.
            CheckpointError: its settings cannot be read.
        """
        from lora_core.base_file import read_settings

        config = Path(self.pretrained_model) / "transformer" / "config.json"
        layers = read_settings(config).get("num_layers", RELEASED_LAYERS)
        blocks = self.blocks
        if blocks is None and instances > 1 and layers != RELEASED_LAYERS:
            raise ConfigError(
                f"--mi_attention_blocks is needed: {config} has {layers} blocks, not the "
                f"{RELEASED_LAYERS} of the released model, and nothing says in which of them the "
                "instances of a scene attend to each other; [] for none"
            )
        if type(layers) is not int or layers < 1:
            return  # which loading refuses
        known = [f"blocks.{index}" for index in range(layers)]
        unknown = [name for name in blocks or () if name not in known]
        if unknown:
            raise ConfigError(
                f"--mi_attention_blocks {' '.join(unknown)}: {config} has {known[0]} to {known[-1]}"
            )

    @cached_property
    def adapter(self) -> Adapter | None:
        """What is in --lora_path; None without.

        Raises:
            CheckpointError: no adapter. ConfigError: flags that contradict it.
        """
        from midi3d_lora.adapter_files import read_adapter, refuse_contradiction

        if self.lora_path is None:
            return None
        adapter = read_adapter(self.lora_path, self.lora_alpha)
        refuse_contradiction(adapter, self.lora_rank, self.lora_alpha, self.mi_attention_blocks)
        return adapter

    @property
    def blocks(self) -> list[str] | None:
        """The multi-instance blocks; None: nobody says, so those of the released model."""
        said = self.adapter.multi_instance_blocks if self.adapter else None
        if said is None and self.mi_attention_blocks is None:
            from midi3d_lora.merged_model import recorded_blocks

            said = recorded_blocks(self.pretrained_model)
        return self.mi_attention_blocks if said is None else list(said)

    # -- loading ---------------------------------------------------------------------------------

    @property
    def torch_device(self) -> torch.device:
        """Where to compute.

        Raises:
            ConfigError: no such device.
        """
        from lora_core.training.arguments import choose_device

        return choose_device(self.device)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the models, as `MIDIPipeline.from_pretrained` takes them."""
        import torch

        from lora_core.training.arguments import choose_precision

        chosen = choose_precision(self.precision, self.torch_device)
        half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        # Values near a surface are near 0: with 8 bits it becomes uneven.
        return {"default": half[chosen], "vae": torch.float32}

    def load(self, folder: str | None = None, adapter: bool = True) -> MIDIPipeline:
        """The model in evaluation mode on its device, with --lora_path.

        Args:
            folder: instead of --pretrained_model.
            adapter: False: without the adapter, but with its multi-instance blocks.

        Raises:
            CheckpointError, ConfigError: a file that cannot be used.
        """
        from midi3d_lora.pipeline import MIDIPipeline

        pipeline = MIDIPipeline.from_pretrained(
            Path(folder or self.pretrained_model),
            torch_dtype=self.dtypes(),
            variant=None if folder else self.variant,
            multi_instance_blocks=self.blocks,
        )
        if adapter and self.adapter is not None:
            from midi3d_lora.adapter_files import load_adapter

            load_adapter(pipeline.transformer, self.adapter)
        pipeline.to(self.torch_device)
        return pipeline

    def said(self) -> dict[str, Any]:
        """How scenes are made, plain values for files that are copied and published."""
        return {
            "pretrained_model": Path(self.pretrained_model).name,
            "lora": None if self.lora_path is None else Path(self.lora_path).name,
            "lora_sha256": self.adapter.file.extra.get("sha256") if self.adapter else None,
            "multi_instance_blocks": self.blocks,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "num_tokens": self.num_tokens,
            "precision": self.precision,
            "octree_depth": self.octree_depth,
        }
