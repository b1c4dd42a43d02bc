"""Every setting of a training run, each with its default and its help text.

Names and defaults are those of the guide's script. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_core.config import MAX_FLOAT, option
from lora_core.guards import Guards, count_problem, unnamed

Device = Literal["auto", "cuda", "cpu"]
Precision = Literal["auto", "no", "fp16", "bf16"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]
Scheme = Literal["logit_normal_dist", "logit_normal", "mode", "cosmap", "sigma_sqrt", "none"]

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
BLOCKS = ("blocks.8", "blocks.9", "blocks.10", "blocks.11", "blocks.12")
# Where things are on this machine: not part of what an adapter says about itself.
PATHS = frozenset(
    ["pretrained_model", "data_dir", "val_data_dir", "output_dir", "cache_dir", "resume",
     "resume_from_checkpoint", "adapter"]
)  # fmt: skip
_COUNTS = (
    "lora_rank", "batch_size", "gradient_accumulation_steps", "num_epochs", "num_points",
    "max_instances", "surface_draws", "save_every_n_epochs", "checkpointing_steps",
    "eval_every_n_epochs", "log_steps", "preview_every_n_epochs", "preview_steps",
)  # fmt: skip
_SHARES = ("guidance_dropout", "single_object_ratio", "val_fraction")


@dataclass
class Config(Guards):
    """Settings of `midi3d-lora train` and `train_lora.py`."""

    name: str = option("midi3d-lora", "What this run is called in its summary.")
    pretrained_model: str = option(
        "pretrained_weights/MIDI-3D", "The model's folder, with transformer/, vae/ and the rest.",
        "files",
    )  # fmt: skip
    data_dir: str = option(
        "data/training_data",
        "Folder of scenes: <scene>/{rgb.png, seg.png, scene_rgb.png, surface.npy}.", "files",
    )  # fmt: skip
    output_dir: str = option("outputs/lora_finetune", "The folder of the run.", "files")
    val_data_dir: str | None = option(None, "Scenes to validate with, as data_dir.", "files")
    val_fraction: float = option(
        0.1,
        "Without val_data_dir: this share of the scenes (rounded down, chosen by their names) is "
        "kept out of training for validation.",
        "files",
    )

    lora_rank: int = option(16, "Rank r of every adapter.", "LoRA")
    lora_alpha: float = option(16.0, "The update is scaled by lora_alpha / lora_rank.", "LoRA")
    lora_dropout: float = option(0.1, "Dropout on the adapters' input, 0 <= p < 1.", "LoRA")
    lora_target_modules: list[str] = option(
        list(TARGETS), "Layers of the transformer's blocks that get adapters.", "LoRA"
    )
    lora_last_blocks: int | None = option(
        None,
        "Adapt only the last so many blocks of the transformer: of those before nothing is kept "
        "for the backward pass, which ends there; null: all blocks.",
        "LoRA",
    )
    enable_multi_instance_attention: bool = option(
        True, "Instances of a scene attend to each other in mi_attention_blocks.", "LoRA"
    )
    mi_attention_blocks: list[str] = option(
        list(BLOCKS), "Blocks with attention between instances; the released ones.", "LoRA"
    )

    batch_size: int = option(4, "Scenes per step and device.", "training")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer update.", "training")
    num_epochs: int = option(100, "Passes over the training scenes.", "training")
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.", "training")
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay.", "training")
    lr_scheduler: Schedule = option("cosine", "The learning rate over the run.", "training")
    lr_warmup_steps: int = option(
        500, "Updates of linear warm-up, at most a tenth of all updates.", "training"
    )
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", "training")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: 3 GB less per instance.", "training"
    )
    mixed_precision: Precision = option(
        "auto",
        "auto: bf16 where the GPU computes in it, else fp16; a CPU trains in fp32. no: fp32.",
        "training",
    )
    weighting_scheme: Scheme = option(
        "logit_normal_dist", "Density of the noise levels, or their weights.", "training"
    )
    logit_mean: float = option(0.0, "Mean of the logit-normal density.", "training")
    logit_std: float = option(1.0, "Its standard deviation.", "training")
    guidance_dropout: float = option(
        0.1, "Share of the scenes that are trained without pictures, for guidance.", "training"
    )
    single_object_ratio: float = option(
        0.0, "Share of the scenes whose instances do not see each other.", "training"
    )
    seed: int = option(42, "Fixes adapters, order of scenes, noise and dropout.", "training")
    device: Device = option("auto", "Where to train.", "training")

    image_size: int = option(512, "Pixels of the square pictures of a scene.", "data")
    num_points: int = option(20480, "Points of each instance for the encoder.", "data")
    num_tokens: int | None = option(
        None, "Latent tokens of an instance; null: the width of the transformer, 2048.", "data"
    )
    max_instances: int = option(
        7, "Of a scene with more instances a random choice is trained in each epoch.", "data"
    )
    surface_draws: int = option(
        4, "Different draws of an instance's points, which take turns over the epochs.", "data"
    )
    normalize: bool = option(
        False, "Bring scenes whose points are outside of [-1, 1] into it, as a whole.", "data"
    )
    num_workers: int = option(2, "Processes that load scenes.", "data")
    cache: Literal["on", "off"] = option(
        "on",
        "Keep the latents and picture embeddings of the frozen encoders on disk, so that these are "
        "not in memory while training. off: the same numbers, slower.",
        "data",
    )
    cache_dir: str | None = option(
        None, "Where; null: midi3d_cache beside output_dir, for all runs there.", "data"
    )
    cache_gb: float = option(200.0, "Upper bound of the cache in 10^9 bytes.", "data")

    save_every_n_epochs: int = option(10, "Write lora-epoch-N every so many epochs.", "output")
    checkpointing_steps: int = option(
        500, "Write the full training state every so many updates.", "output"
    )
    eval_every_n_epochs: int = option(1, "Validate every so many epochs.", "output")
    preview_scenes: int = option(
        2, "So many validation scenes are generated and compared with the true ones.", "output"
    )
    preview_every_n_epochs: int = option(10, "How often.", "output")
    preview_steps: int = option(20, "Sampling steps of these scenes.", "output")
    preview_depth: int = option(6, "Their surfaces have 2^depth cells a side.", "output")
    log_steps: int = option(10, "Log training figures every so many updates.", "output")
    resume_from_checkpoint: str | None = option(
        None, "Continue the run in this folder, or from its checkpoint-N or adapter file.", "output"
    )
    resume: str | None = option(None, "The same.", "output")
    adapter: str | None = option(None, "Start from this adapter (warm start).", "output")
    overwrite: bool = option(False, "Replace the run that is in output_dir.", "output")
    tensorboard: bool = option(True, "Write TensorBoard curves if it is installed.", "output")
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resume = self.resume_from_checkpoint = self.resume or self.resume_from_checkpoint

    @property
    def cache_place(self) -> Path:
        """The folder of the encoder cache."""
        return Path(self.cache_dir or Path(self.output_dir).absolute().parent / "midi3d_cache")

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from super().problems()
        for name in _COUNTS:
            yield from count_problem(self, name, 1)
        for name in ("seed", "lr_warmup_steps", "num_workers", "preview_scenes"):
            yield from count_problem(self, name, 0)
        for name in ("num_tokens", "lora_last_blocks"):
            if getattr(self, name) is not None:
                yield from count_problem(self, name, 1)
        yield from unnamed(self, PATHS)
        for name in ("lora_alpha", "learning_rate", "max_grad_norm", "logit_std", "cache_gb"):
            if not 0 < getattr(self, name) <= MAX_FLOAT:  # which NaN is not
                yield f"--{name} is {getattr(self, name)}: it must be a finite number above 0"
        if not 0 <= self.weight_decay <= MAX_FLOAT:
            yield f"--weight_decay is {self.weight_decay}: it must be a number of 0 or more"
        if not -MAX_FLOAT <= self.logit_mean <= MAX_FLOAT:
            yield f"--logit_mean is {self.logit_mean}: it must be a finite number"
        if not 0 <= self.lora_dropout < 1:
            yield f"--lora_dropout is {self.lora_dropout}: it must be 0 <= p < 1"
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                yield f"--{name} is {getattr(self, name)}: it must be a share, 0 to 1"
        if not 14 <= self.image_size <= 8192:
            yield f"--image_size is {self.image_size}: it must be 14 to 8192 pixels"
        if not 1 <= self.preview_depth <= 9:
            yield f"--preview_depth is {self.preview_depth}: it must be 1 to 9"
        if not self.lora_target_modules:
            yield "--lora_target_modules is empty: name layers, such as to_q to_k to_v to_out.0"
        if self.resume and self.resume_from_checkpoint not in (None, self.resume):
            yield "--resume and --resume_from_checkpoint mean the same: give one of them"
