"""Every setting of a sam2-lora training run, each with its default and its help text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_core.config import MAX_FLOAT, option
from lora_core.errors import ConfigError, near
from lora_core.guards import Guards, count_problem, unnamed
from lora_core.pictures import input_size
from lora_core.settings.types import shown

AT_LEAST_ONE = (
    "steps", "batch_size", "lora_rank", "max_objects", "gradient_accumulation_steps", "eval_steps",
    "log_steps", "patience", "keep_best",
)  # fmt: skip
AT_LEAST_ZERO = ("max_val_images", "num_workers", "warmup_steps", "min_object_area", "seed")
LARGEST_SIDE = 16384  # pixels of the model's input
STRIDE = 32  # Hiera: patches of 4 pixels, window positions of 8 patches
PATHS = ("checkpoint", "adapter", "data_root", "output_dir", "logs_dir", "resume", "cache_dir")
# Preset of `--targets` -> roles of `placement`.
PRESETS = {
    "default": ("encoder_attention", "decoder_attention", "decoder_mlp"),
    "encoder": ("encoder_attention",),
    "decoder": ("decoder_attention", "decoder_mlp"),
    "decoder_attention": ("decoder_attention",),
}

# Choices that several commands offer.
DataFormat = Literal["auto", "severstal", "kaggle", "folders", "coco"]
MaskKind = Literal["auto", "binary", "instances", "labels"]
ObjectRule = Literal["auto", "components", "annotations", "union"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["auto", "cuda", "cpu"]


@dataclass
class Config(Guards):
    """Settings of `sam2-lora train`; the guide's flags keep their names and defaults."""

    # -- the guide's flags ---------------------------------------------------------------------
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.", "optimisation")
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay.", "optimisation")
    steps: int = option(10_000, "Optimizer updates.", "optimisation")
    batch_size: int = option(1, "Images per step and device.", "optimisation")
    lora_rank: int = option(8, "Rank r of every adapter.", "lora")
    lora_alpha: float = option(16.0, "The update is scaled by alpha / r.", "lora")
    lora_dropout: float = option(0.05, "Dropout on the adapters' input, 0 <= p < 1.", "lora")

    # -- what is adapted -----------------------------------------------------------------------
    checkpoint: str = option(
        "sam2_hiera_large.pt",
        "Official SAM 2 / 2.1 checkpoint, transformers folder, or hub id. A bare file name is also "
        "looked for in checkpoints/ and libs/sam2base/checkpoints/.",
        "model",
    )
    targets: str = option(
        "default",
        "Where LoRA goes: default (encoder attention, decoder attention and MLP), encoder, "
        "decoder, decoder_attention; append +heads for the decoder's prediction heads.",
        "lora",
    )
    last_blocks: int | None = option(
        None,
        "Adapt only the last so many blocks of the image encoder: of those before nothing is kept "
        "for the backward pass, which ends there (default: all blocks).",
        "lora",
    )
    adapter: str | None = option(None, "Start from this adapter (warm start).", "lora")
    allow_partial: bool = option(
        False, "With --adapter: use what fits where tensors are missing or unexpected.", "lora"
    )
    image_size: str = option(
        "1024", "Model input: a side such as 1024, or HEIGHTxWIDTH such as 256x1600.", "model"
    )
    precision: Precision = option(
        "auto", "Mixed precision; auto: bf16 where the GPU has it, else fp16, fp32 on CPU.", "model"
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, slower.", "model"
    )
    device: Device = option("auto", "Where to train.", "model")

    # -- data ----------------------------------------------------------------------------------
    data_root: str = option(
        "datasets/Data/splits",
        "Folder with train_split/val_split/test_split (or train/val/test), or one folder to split.",
        "data",
    )
    data_format: DataFormat = option(
        "auto",
        "severstal: Supervisely img/ + ann/; kaggle: train.csv + train_images/; "
        "folders: images/ + masks/; coco: images and a COCO json.",
        "data",
    )
    mask_kind: MaskKind = option(
        "auto",
        "Meaning of mask values in folders: binary (0 and one other value), instances (one id per "
        "object), labels (one index per class). auto accepts only masks that are evidently binary.",
        "data",
    )
    follow_links: bool = option(
        False, "Read files outside of the data folder that links in it lead to.", "data"
    )
    dataset_size: Literal["full", "500", "1000", "2000"] = option(
        "full", "Use subsets/{N}_subset of the Severstal splits for training.", "data"
    )
    val_fraction: float = option(
        0.1, "Share of pictures for validation when the data has no validation split.", "data"
    )
    objects: ObjectRule = option(
        "auto",
        "What one object is: a connected component, one annotation, or all of one class together; "
        "auto takes components of binary and label masks and Kaggle rows, else annotations.",
        "data",
    )
    min_object_area: int = option(16, "Objects with fewer pixels are left out and counted.", "data")
    max_objects: int = option(8, "Objects per image and step; a seeded choice of more.", "data")
    max_val_images: int = option(0, "Validate on a fixed choice of so many images; 0: all.", "data")
    hflip: bool = option(True, "Mirror training images left-right half of the time.", "data")
    num_workers: int = option(2, "Processes that load training images.", "data")

    # -- prompts and loss ----------------------------------------------------------------------
    prompts: Literal["mixed", "point", "box"] = option(
        "mixed", "An object's first prompt in training; mixed: half points, half boxes.", "prompts"
    )
    box_jitter: float = option(
        0.1, "Box sides move by up to this share of their length.", "prompts"
    )
    correction_clicks: int = option(
        0, "Training clicks on the prediction's errors after the first prompt, 0 to 7.", "prompts"
    )
    loss: Literal["official", "legacy"] = option(
        "official", "official: 20 focal + dice + iou + class; legacy: BCE of mask 0.", "prompts"
    )

    # -- schedule ------------------------------------------------------------------------------
    warmup_steps: int = option(100, "Linear warm-up, at most a tenth of all steps.", "optimisation")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", "optimisation")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer update.", "optimisation")
    seed: int = option(42, "Fixes adapters, data order, prompts and dropout.", "optimisation")
    eval_steps: int = option(500, "Validate every so many updates, and at the end.", "schedule")
    log_steps: int = option(100, "Log training figures every so many updates.", "schedule")
    patience: int = option(7, "Stop after this many validations without a better IoU.", "schedule")
    min_delta: float = option(1e-4, "A better IoU is better by more than this.", "schedule")

    # -- output --------------------------------------------------------------------------------
    output_dir: str = option("models/severstal_lora", "Run folders are made in here.", "output")
    logs_dir: str = option("logs", "training_metrics_lora_{timestamp}.csv goes here.", "output")
    keep_best: int = option(3, "How many of the best adapters and merged models to keep.", "output")
    resume: str | None = option(
        None,
        "Continue this unfinished run: its folder or its latest_lora_step file. latest: the last "
        "one with the same settings, or a new run if there is none.",
        "output",
    )
    tensorboard: bool = option(
        True, "Write TensorBoard curves and pictures if installed.", "output"
    )
    cache_dir: str | None = option(
        None,
        "Keep image embeddings here when only the decoder is adapted: the encoder runs once per "
        "picture, and once more for its mirror image with --hflip.",
        "output",
    )
    cache_gb: float = option(50.0, "Upper bound of the embedding cache in 10^9 bytes.", "output")
    trainer: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from super().problems()
        yield from unnamed(self, PATHS)
        for name in AT_LEAST_ONE:
            yield from count_problem(self, name, 1)
        for name in AT_LEAST_ZERO:
            yield from count_problem(self, name, 0)
        for name in ("learning_rate", "lora_alpha", "max_grad_norm", "cache_gb"):
            value = getattr(self, name)
            if not 0 < value <= MAX_FLOAT:  # which NaN is not
                yield f"--{name} is {value}: it must be a finite number above 0"
        if not 0 <= self.lora_dropout < 1:
            yield f"--lora_dropout is {self.lora_dropout}: it must be 0 <= p < 1"
        if not 0 < self.val_fraction < 1:
            yield f"--val_fraction is {self.val_fraction}: it must be between 0 and 1"
        if not 0 <= self.box_jitter < 0.5:
            yield f"--box_jitter is {self.box_jitter}: it must be 0 <= share < 0.5"
        if not 0 <= self.correction_clicks <= 7:
            yield f"--correction_clicks is {self.correction_clicks}: it must be 0 to 7"
        for name in ("weight_decay", "min_delta"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_FLOAT:
                yield f"--{name} is {value}: it must be a finite number of 0 or more"
        if self.last_blocks is not None:
            yield from count_problem(self, "last_blocks", 1)
            if self.targets.startswith("decoder"):
                yield (
                    "--last_blocks chooses among the blocks of the image encoder, of which "
                    f"--targets {self.targets} adapts none: leave one out"
                )
        for read in (lambda: self.size, lambda: self.preset):
            try:
                read()
            except ConfigError as error:
                yield str(error)
        if self.cache_dir and not self.targets.startswith("decoder"):
            yield (
                f"--cache_dir needs an unchanged encoder, not --targets {self.targets}: "
                "use --targets decoder or decoder_attention"
            )
        if self.cache_dir and self.shard_base:
            yield (
                "--shard_base divides an encoder that --cache_dir hardly runs: leave one of them "
                "out"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Model input as (height, width) in pixels."""
        return parse_size(self.image_size)

    @property
    def preset(self) -> tuple[str, bool]:
        """Name of the target preset, and whether the prediction heads are adapted too."""
        name, plus, extra = self.targets.partition("+")
        if name not in PRESETS or (plus and extra != "heads"):
            choices = [*PRESETS, *(f"{preset}+heads" for preset in PRESETS)]
            raise ConfigError(
                f"unknown --targets {shown(self.targets)}; "
                f"{near(self.targets, choices) or 'one of ' + ', '.join(choices)}"
            )
        return name, bool(plus)

    @property
    def decoder_only(self) -> bool:
        """Whether the image encoder stays as it is, so that its output can be cached."""
        return self.preset[0].startswith("decoder")


def parse_size(text: str) -> tuple[int, int]:
    """Read `1024` or `256x1600` as (height, width); each side a multiple of 32 pixels.

    Raises:
        ConfigError: anything else, with the nearest size that works.
    """
    such_as = "1024 or HEIGHTxWIDTH such as 256x1600"
    return input_size.parse_size(
        text, "--image_size", multiple=STRIDE, largest=LARGEST_SIDE, such_as=such_as
    )
