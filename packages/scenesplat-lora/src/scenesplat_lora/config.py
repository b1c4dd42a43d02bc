"""Every setting of a training run, each with its default and its help text.

Sections and names are those of the guide's configuration files. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_core.config import MAX_FLOAT, option
from lora_core.errors import ConfigError
from lora_core.guards import Guards, count_problem
from lora_core.settings.types import shown
from scenesplat_lora.presets import PROMPT_WIDTH, LoraChoice, preset_choice

Device = Literal["auto", "cuda", "cpu"]
LayoutName = Literal[
    "generic", "scannet", "scannet200", "scannetpp", "matterport", "matterport160", "holicity",
    "kitti360",
]  # fmt: skip
DISTILLATION = [
    {"type": "CosineSimilarity", "loss_weight": 1.0},
    {"type": "L2Loss", "loss_weight": 1.0},
]
SEGMENTATION = [
    {"type": "CrossEntropyLoss", "loss_weight": 1.0},
    {"type": "LovaszLoss", "loss_weight": 1.0},
]


@dataclass
class Lora:
    """Which layers get adapters, and how large these are; what is not set is the preset's own."""

    enabled: bool = option(True, "Must stay true: this program trains LoRA alone.")
    preset: Literal["minimal", "standard", "full", "decoder_only"] = option(
        "standard",
        "minimal: r 4, attention of the two deepest encoder stages; standard: r 8, attention of "
        "the encoder; full: r 16, attention and MLP, with prompts; decoder_only: r 8, attention "
        "of the decoder. The settings below override it.",
    )
    r: int | None = option(None, "Rank (default: the preset's).")
    lora_alpha: float | None = option(None, "The update is scaled by lora_alpha / r.")
    target_modules: list[str] | None = option(None, "attn (qkv and proj), mlp (fc1 and fc2).")
    enable_prompt: bool | None = option(
        None, "A prompt MLP beside every adapted layer; it cannot be merged."
    )
    encoder_only: bool | None = option(None, "Leave the decoder out.")
    target_stages: list[int] | None = option(
        None, "s of enc{s} and, without encoder_only, dec{s}; null: all."
    )
    last_blocks: int | None = option(
        None,
        "Of the blocks that the settings above mean, only the last so many in the order in which "
        "they run: of those before nothing is kept for the backward pass; null: all.",
    )
    lora_dropout: float = option(0.0, "Dropout on the adapters' input, 0 <= p < 1.")
    prompt_width: int = option(PROMPT_WIDTH, "Largest hidden width of a prompt MLP.")
    bias: Literal["none", "all", "lora_only"] = option(
        "none", "Biases of the base that train too: all, or those of adapted layers."
    )
    freeze_backbone: bool = option(True, "Must stay true, as enabled.")

    def choice(self, seed: int) -> LoraChoice:
        """The layers and ranks that are meant.

        Raises:
            ConfigError: values that cannot work.
        """
        modules = None if self.target_modules is None else tuple(self.target_modules)
        stages = None if self.target_stages is None else tuple(self.target_stages)
        return preset_choice(
            self.preset,
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=modules,
            enable_prompt=self.enable_prompt,
            encoder_only=self.encoder_only,
            target_stages=stages,
            last_blocks=self.last_blocks,
            lora_dropout=self.lora_dropout,
            prompt_width=self.prompt_width,
            seed=seed,
        )

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        for name in ("enabled", "freeze_backbone"):
            if not getattr(self, name):
                yield (
                    f"--lora.{name} is false: this program trains LoRA alone; the official code "
                    "trains whole models"
                )
        if self.r is not None and not 1 <= self.r <= 65536:
            yield f"--lora.r is {shown(self.r)}: it must be 1 to 65536"
        if self.lora_alpha is not None and not 0 < self.lora_alpha <= MAX_FLOAT:
            yield f"--lora.lora_alpha is {self.lora_alpha}: it must be a finite number above 0"
        if self.last_blocks is not None and self.bias == "all":
            yield (
                "--lora.last_blocks leaves what runs before these blocks as it is, and --lora.bias "
                "all trains the biases there: lora_only trains those of adapted layers"
            )
        if not 0 <= self.lora_dropout < 1:
            yield f"--lora.lora_dropout is {self.lora_dropout}: it must be 0 <= p < 1"
        try:
            self.choice(0)
        except ConfigError as error:
            yield f"--lora: {error}"


@dataclass
class LoraTraining:
    """The base, and what is evaluated and saved when."""

    pretrained_path: str = option(
        "checkpoints/pretrained.pth", "Checkpoint of the official trainer, or safetensors."
    )
    eval_epoch: int = option(1, "Evaluate every so many epochs, and at the end.")
    save_epoch: int = option(5, "Write model/lora_epoch_N.pth every so many epochs.")
    save_lora_only: bool = option(
        True, "false: as merge_on_end, a whole model is written at the end."
    )
    merge_before_eval: bool = option(
        False, "Evaluate with merged weights, as deployed; the result is the same up to rounding."
    )
    merge_on_end: bool = option(
        False, "Write the best adapter merged into the base as model/model_best.pth."
    )

    @property
    def merges(self) -> bool:
        """Whether a whole model is written at the end."""
        return self.merge_on_end or not self.save_lora_only


@dataclass
class Model:
    """The network of the base."""

    type: Literal["LangPretrainer", "DefaultSegmentorV2"] | None = option(
        None, "The model; null: the one that the checkpoint is of."
    )
    backbone: dict[str, Any] = option(
        {},
        "Fields of PT-v3m1 that differ from what the checkpoint says of itself, or else from the "
        "released model of its widths; all of them for another shape.",
    )
    new_head: bool = option(
        False, "A new head for a segmentation model, even with as many classes as the checkpoint's."
    )
    criteria: list[dict[str, Any]] = option(
        [], "Terms of the loss, each dict(type=..., loss_weight=...); none: cosine and L2, or "
        "cross-entropy and Lovasz for a segmentation model."
    )  # fmt: skip


@dataclass
class TrainData:
    """The scenes that are trained on."""

    data_root: str = option("data", "Folder of the splits: <data_root>/<split>/<scene>/*.npy.")
    split: list[str] = option(["train"], "Folders in it, whose scenes are used.")
    filtered_scene: list[str] = option([], "Leave out scenes with these names before the first _.")
    loop: int = option(1, "How often each scene comes in an epoch, augmented anew.")
    transform: list[dict[str, Any]] = option(
        [], "Transforms in order, each dict(type=...); none: the official augmentation."
    )


@dataclass
class ValData:
    """The scenes that are evaluated on."""

    data_root: str | None = option(None, "null: that of data.train.")
    split: list[str] = option(["val"], "Folders in it; none: nothing is evaluated.")
    filtered_scene: list[str] = option([], "Leave out scenes with these names before the first _.")
    transform: list[dict[str, Any]] = option(
        [], "Transforms in order, each dict(type=...); none: the official ones."
    )


@dataclass
class Data:
    """Where scenes lie and what their files mean."""

    layout: LayoutName = option("generic", "Names of label files and ranges of scales.")
    grid_size: float | None = option(
        None,
        "Side of a voxel in metres, of the transforms that are not given; null: what the base was "
        "made for, 0.02 for the released models.",
    )
    point_max: int = option(192_000, "Voxels of a training sample at most (as grid_size).")
    text_embeddings: str | None = option(
        None, "Text embeddings (.pt, .npz) for the zero-shot mIoU; null: only the loss is measured."
    )
    class_names: str | None = option(
        None, "Names for a .pt of embeddings, or of a segmentation model's classes, one per line."
    )
    excluded: list[str] = option([], "Classes that fg_mIoU leaves out, such as wall and floor.")
    num_classes: int | None = option(
        None,
        "Of a segmentation model; null: as the checkpoint has. Another number gets a new head.",
    )
    train: TrainData = field(default_factory=TrainData)
    val: ValData = field(default_factory=ValData)

    @property
    def val_root(self) -> str:
        """Folder of the splits that are evaluated on."""
        return self.val.data_root or self.train.data_root

    @property
    def voxels(self) -> float:
        """Side of a voxel in metres; a run has asked its base where nothing is set."""
        return 0.02 if self.grid_size is None else self.grid_size

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        if not 1e-6 <= self.voxels <= 1e6:
            yield f"--data.grid_size is {self.grid_size}: it must be metres, above 0"
        for text in count_problem(self, "point_max", 1):
            yield text.replace("--", "--data.", 1)
        for text in count_problem(self.train, "loop", 1):
            yield text.replace("--", "--data.train.", 1)
        if not self.train.split:
            yield "--data.train.split is empty: name a folder of scenes"
        if self.num_classes is not None and not 1 <= self.num_classes <= 100_000:
            yield f"--data.num_classes is {shown(self.num_classes)}: 1 to 100000"


@dataclass
class Optimizer:
    """AdamW."""

    type: Literal["AdamW"] = option("AdamW", "The optimizer.")
    lr: float = option(1e-4, "Peak learning rate.")
    weight_decay: float = option(0.01, "Decoupled weight decay.")
    betas: list[float] = option([0.9, 0.999], "Decay of the first and second moment.")

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        if not 0 < self.lr <= MAX_FLOAT:
            yield f"--optimizer.lr is {self.lr}: a finite number above 0"
        if not 0 <= self.weight_decay <= MAX_FLOAT:
            yield f"--optimizer.weight_decay is {self.weight_decay}: a number of 0 or more"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield f"--optimizer.betas is {self.betas}: two numbers, 0 <= beta < 1"


@dataclass
class Scheduler:
    """The learning rate over the run."""

    type: Literal["cosine", "OneCycleLR"] = option(
        "cosine",
        "cosine with warm-up, or the one-cycle of official pretraining, in which the first of "
        "optimizer.betas goes from 0.95 to 0.85 at the peak and back.",
    )
    warmup_epochs: float = option(10.0, "Of cosine; at most a tenth of all updates.")
    warmup_lr: float = option(1e-5, "Learning rate of the first update, of cosine.")
    min_lr: float = option(1e-6, "Learning rate of the last update, of cosine.")
    pct_start: float = option(0.05, "Share of the updates in which one-cycle rises.")
    div_factor: float = option(10.0, "One-cycle begins at lr / div_factor.")
    final_div_factor: float = option(1000.0, "It ends at its first learning rate / this.")

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        for name in ("warmup_epochs", "warmup_lr", "min_lr"):
            if not 0 <= getattr(self, name) <= MAX_FLOAT:
                yield f"--scheduler.{name} is {getattr(self, name)}: a number of 0 or more"
        if not 0 <= self.pct_start <= 1:
            yield f"--scheduler.pct_start is {self.pct_start}: it must be from 0 to 1"
        for name in ("div_factor", "final_div_factor"):
            if not 0 < getattr(self, name) <= MAX_FLOAT:
                yield f"--scheduler.{name} is {getattr(self, name)}: a number above 0"


@dataclass
class Config(Guards):
    """Settings of `scenesplat-lora train`."""

    lora: Lora = field(default_factory=Lora)
    lora_training: LoraTraining = field(default_factory=LoraTraining)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    save_path: str = option("exp/default", "The folder of the run.")
    epoch: int = option(50, "Passes over the training scenes.")
    batch_size: int = option(2, "Scenes per step and device.")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer update.")
    clip_grad: float | None = option(1.0, "Gradients are clipped to this norm; null: never.")
    mix_prob: float = option(0.0, "Share of the batches whose neighbouring scenes become one.")
    enable_amp: bool = option(False, "Mixed precision on a GPU; a CPU trains in fp32.")
    amp_dtype: Literal["auto", "float16", "bfloat16"] = option(
        "auto", "Its number format; auto: bfloat16 where the GPU computes in it."
    )
    num_worker: int = option(2, "Processes that load scenes.")
    log_steps: int = option(10, "Log training figures every so many updates.")
    resume: str | None = option(None, "Continue the run in this folder.")
    adapter: str | None = option(None, "Start from this adapter (warm start).")
    overwrite: bool = option(False, "Replace the run that is in save_path.")
    device: Device = option("auto", "Where to train.")
    seed: int = option(0, "Fixes adapters, scene order, augmentation and dropout.")
    tensorboard: bool = option(True, "Write TensorBoard curves if it is installed.")
    trainer: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from super().problems()
        for section in (self.lora, self.data, self.optimizer, self.scheduler):
            yield from section.problems()
        for name in ("epoch", "batch_size", "gradient_accumulation_steps", "log_steps"):
            yield from count_problem(self, name, 1)
        for name in ("seed", "num_worker"):
            yield from count_problem(self, name, 0)
        for name in ("eval_epoch", "save_epoch"):
            for text in count_problem(self.lora_training, name, 1):
                yield text.replace("--", "--lora_training.", 1)
        if self.num_worker > 1024:
            yield f"--num_worker is {shown(self.num_worker)}: it must be at most 1024"
        if not 0 <= self.mix_prob <= 1:
            yield f"--mix_prob is {self.mix_prob}: it must be a share, 0 to 1"
        if self.clip_grad is not None and not 0 < self.clip_grad <= MAX_FLOAT:
            yield f"--clip_grad is {self.clip_grad}: a finite number above 0, or null"
        if not self.adapter and self.lora_training.merges and _prompts(self.lora):
            yield (
                "--lora_training.merge_on_end (or save_lora_only false): prompt MLPs cannot be "
                "merged; add --lora.enable_prompt false, or keep the adapter beside the base"
            )


def _prompts(lora: Lora) -> bool:
    try:
        return lora.choice(0).enable_prompt
    except ConfigError:  # told by `Lora.problems`
        return False
