"""Every setting of a training run, each with its default and its help text.

Names and defaults are those of the guide, and for training those of transformers'
`TrainingArguments`, see `training_flags`. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from isaac_lora.depth.settings import ALPHA, INPUT_SIZE, setting_problems
from isaac_lora.lora_choice import names_of, target_problems
from isaac_lora.training_flags import Schedule, TrainingFlags
from lora_core.config import MAX_FLOAT, Bias, option
from lora_core.guards import Guards, count_problem, unnamed
from lora_core.settings.types import shown

# Where things are on this machine: not part of what an adapter says about itself.
PATHS = frozenset(
    ["model_path", "depth_checkpoint_path", "data_path", "val_data_path", "image_folder",
     "output_dir", "cache_dir", "resume", "resume_from_checkpoint", "adapter"]
)  # fmt: skip
_COUNTS = (
    "lora_r", "max_seq_length", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "save_steps", "logging_steps", "eval_max_new_tokens",
)  # fmt: skip
_REQUIRED = {
    "model_path": "the folder of Isaac",
    "data_path": "the JSON file with conversations",
    "output_dir": "the folder of the run, in which the adapter will be",
}
OURS = "tensorboard"  # of `--report_to`: this program writes it, with pictures


@dataclass(kw_only=True)
class Config(TrainingFlags, Guards):
    """Settings of `isaac-lora train` and `src/train_lora.py`.

    Raises:
        ConfigError: values that cannot work, all of them.
    """

    group_order = ("model", "data", "LoRA", "training", "output")

    model_path: str = option("", "The model's folder, as published. (required)", "model")
    use_depth: bool = option(False, "Add the depth of each image to its tokens.", "model")
    depth_checkpoint_path: str | None = option(
        None, "Depth Anything V2: its .pth file, or a transformers folder.", "model"
    )
    depth_alpha: float = option(ALPHA, "Depth, 0 to 1 in each image, times this.", "model")
    depth_input_size: int = option(
        INPUT_SIZE, "Side of the square that the depth model sees, a multiple of 14.", "model"
    )

    data_path: str = option("", "Conversations: a JSON list or lines. (required)", "data")
    image_folder: str | None = option(None, "Where relative paths of images begin.", "data")
    val_data_path: str | None = option(None, "Conversations to validate with.", "data")
    val_fraction: float = option(
        0.0, "Without val_data_path: this share of the conversations is kept for it.", "data"
    )
    max_seq_length: int = option(
        16384, "Tokens, with those of images; longer samples are bad samples.", "data"
    )
    cut_long_samples: bool = option(
        False,
        "Cut them after the last answer that fits instead; never inside a turn or an image.",
        "data",
    )
    image_first: bool = option(
        False, "Put images that no <image> places in front of the first question.", "data"
    )
    packing: bool = option(
        False, "Put several samples into one row of max_seq_length; they do not see each other.",
        "data",
    )  # fmt: skip
    cache_vision: bool = option(
        False, "Keep what the frozen vision tower makes of each image on disk.", "data"
    )
    cache_dir: str | None = option(
        None, "Depth and image features; null: isaac_cache beside output_dir, for all runs there.",
        "data",
    )  # fmt: skip
    cache_gb: float = option(200.0, "Upper bound of the cache in 10^9 bytes.", "data")

    lora_r: int = option(128, "Rank r of every adapter.", "LoRA")
    lora_alpha: float = option(256.0, "The update is scaled by lora_alpha / lora_r.", "LoRA")
    lora_dropout: float = option(0.05, "Dropout on the adapters' input, 0 <= p < 1.", "LoRA")
    lora_bias: Bias = option("none", "Biases that train: none, all or lora_only.", "LoRA")
    target_modules: list[str] | str | None = option(
        None,
        "Layers with adapters, with commas between them: ends of names, paths, globs, re:..., or "
        "attention, mlp, projector, vision, lm_head; null: all of decoder and projector.",
        "LoRA",
    )

    last_blocks: int | None = option(
        None,
        "Adapt only the last so many layers of the decoder: of what runs before nothing is kept "
        "for the backward pass, which ends there. The projector is adapted too only if "
        "target_modules names it. null: all layers.",
        "LoRA",
    )

    output_dir: str = option("", "Folder of the run and its adapter. (required)", "training")
    num_train_epochs: float = option(3.0, "Passes over the conversations.", "training")
    max_steps: int = option(-1, "Updates, in place of num_train_epochs; -1: not.", "training")
    per_device_train_batch_size: int = option(8, "Samples per step and device.", "training")
    per_device_eval_batch_size: int = option(8, "The same in validation.", "training")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer update.", "training")
    learning_rate: float = option(
        5e-5, "Peak learning rate; 1e-4 to 2e-4 are usual for LoRA.", "training"
    )
    group_by_length: bool = option(
        False, "Batches of conversations of similar length: less padding, another order.",
        "training",
    )  # fmt: skip
    train_sampling_strategy: str = option(
        "random", "group_by_length means the same; random: any order.", "training"
    )
    lr_scheduler_type: Schedule = option("linear", "The learning rate over the run.", "training")
    warmup_steps: float = option(
        0.0, "Updates of linear warm-up, or below 1 their share of all updates.", "training"
    )
    warmup_ratio: float | None = option(None, "The same as a share.", "training")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.", "training")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", "training")
    fp16: bool | None = option(
        None, "Train in fp16. Neither fp16 nor bf16 given: what the device does best.", "training"
    )
    bf16: bool | None = option(
        None, "Train in bf16. With one of them false and the other not given: fp32.", "training"
    )
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass: less memory, slower.", "training"
    )
    seed: int = option(42, "Fixes adapters, order of samples and dropout.", "training")
    use_cpu: bool = option(False, "Train on the CPU even if there is a GPU.", "training")
    dataloader_num_workers: int = option(0, "Processes that load samples.", "training")

    save_steps: int = option(500, "Write the training state every so many updates.", "output")
    save_total_limit: int | None = option(
        None, "Training states that are kept; null: as keep_last says.", "output"
    )
    logging_steps: int = option(500, "Log figures every so many updates.", "output")
    eval_steps: int | None = option(
        None, "Validate every so many updates; null: as often as save_steps.", "output"
    )
    eval_generate_samples: int = option(
        64, "So many validation questions are answered each time, for the metrics.", "output"
    )
    eval_max_new_tokens: int = option(256, "Tokens of such an answer, at most.", "output")
    report_to: list[str] | str | None = option(
        "none", "Other tools that get the figures, such as wandb.", "output"
    )
    tensorboard: bool = option(True, "Write TensorBoard files if it is installed.", "output")
    resume_from_checkpoint: str | bool | None = option(
        None, "Continue the run in this folder, or from its checkpoint-N; true: output_dir.",
        "output",
    )  # fmt: skip
    resume: str | None = option(None, "The same.", "output")
    adapter: str | None = option(None, "Start from this adapter (warm start).", "output")
    overwrite: bool = option(False, "Replace the run that is in output_dir.", "output")

    def __post_init__(self) -> None:
        self.resume_from_checkpoint = _folder(self.resume_from_checkpoint, self.output_dir)
        super().__post_init__()
        self.resume = self.resume_from_checkpoint = self.resume or self.resume_from_checkpoint
        if self.save_total_limit is not None:
            self.keep_last = self.save_total_limit

    # -- what the parts of the program ask for ---------------------------------------------------

    @property
    def precision(self) -> str:
        """auto, bf16, fp16 or fp32, as `lora_core.training.arguments.choose_precision` takes it."""
        if self.fp16 or self.bf16:
            return "fp16" if self.fp16 else "bf16"
        return "auto" if self.fp16 is None and self.bf16 is None else "fp32"

    @property
    def device(self) -> str:
        """auto or cpu."""
        return "cpu" if self.use_cpu else "auto"

    @property
    def cache_place(self) -> Path:
        """The folder of the caches."""
        return Path(self.cache_dir or Path(self.output_dir).absolute().parent / "isaac_cache")

    @property
    def trainer(self) -> dict[str, Any]:
        """Fields of `TrainingArguments` that are handed on, where they are not its defaults."""
        found = {
            item.name: getattr(self, item.name)
            for item in fields(TrainingFlags)
            if getattr(self, item.name) != item.default
        }
        reporters = [name for name in self.reporters if name != OURS]
        found["lr_scheduler_type"] = self.lr_scheduler_type
        return found | ({"report_to": reporters} if reporters else {})

    @property
    def by_length(self) -> bool:
        """Whether batches are made of conversations of similar length."""
        return self.group_by_length or self.train_sampling_strategy == "group_by_length"

    @property
    def reporters(self) -> list[str]:
        """The tools in `report_to`."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        return [name for name in names if name != "none"]

    def warmup_updates(self, updates: int) -> int:
        """How many of all updates the warm-up takes."""
        asked = self.warmup_steps if self.warmup_ratio is None else self.warmup_ratio
        share = asked < 1 or self.warmup_ratio is not None
        return math.ceil(asked * updates) if share else int(asked)

    # -- what cannot work ------------------------------------------------------------------------

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from super().problems()
        yield from unnamed(self, PATHS - set(_REQUIRED))
        if not self.resume and not self.resume_from_checkpoint:  # a run has them in its settings
            yield from (f"--{name} is missing: {_REQUIRED[name]}" for name in self._unsaid())
        for name in _COUNTS:
            yield from count_problem(self, name, 1)
        for name in ("seed", "dataloader_num_workers", "eval_generate_samples"):
            yield from count_problem(self, name, 0)
        for name in ("eval_steps", "save_total_limit", "last_blocks"):
            if getattr(self, name) is not None:
                yield from count_problem(self, name, 1)
        yield from self._number_problems()
        yield from self._length_problems()
        yield from self._model_problems()
        yield from self._conflicts()

    def _unsaid(self) -> list[str]:
        return [name for name in _REQUIRED if not getattr(self, name)]

    def _number_problems(self) -> Iterator[str]:
        for name in ("lora_alpha", "learning_rate", "max_grad_norm", "cache_gb"):
            if not 0 < getattr(self, name) <= MAX_FLOAT:  # which NaN is not
                yield f"--{name} is {getattr(self, name)}: it must be a finite number above 0"
        for name in ("weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) <= MAX_FLOAT:
                yield f"--{name} is {getattr(self, name)}: it must be a number of 0 or more"
        for name in ("lora_dropout", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} is {getattr(self, name)}: it must be 0 <= share < 1"

    def _length_problems(self) -> Iterator[str]:
        """About the length of the training and of its warm-up."""
        if not 0 < self.num_train_epochs <= MAX_FLOAT:
            yield f"--num_train_epochs is {self.num_train_epochs}: it must be above 0"
        if self.max_steps != -1:
            yield from count_problem(self, "max_steps", 1)
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            yield f"--warmup_ratio is {self.warmup_ratio}: it must be a share, 0 to 1"
        if self.warmup_ratio is not None and self.warmup_steps:
            yield "--warmup_steps and --warmup_ratio mean the same: give one of them"
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            yield f"--warmup_steps is {self.warmup_steps}: expected a whole number, or below 1"

    def _model_problems(self) -> Iterator[str]:
        """About depth and LoRA."""
        if self.use_depth and self.depth_checkpoint_path is None:
            yield (
                "--use_depth needs --depth_checkpoint_path, such as depth_anything_v2_vitl.pth: "
                "nothing is trained without the depth that is asked for"
            )
        for line in setting_problems(self.depth_alpha, self.depth_input_size):
            yield f"--{line}"
        for line in target_problems(names_of(self.target_modules)):
            yield f"--{line}"
        if self.last_blocks is not None and self.lora_bias == "all":
            yield (
                "--last_blocks leaves what runs before these layers as it is, and --lora_bias all "
                "trains the biases there: lora_only trains those of adapted layers"
            )

    def _conflicts(self) -> Iterator[str]:
        """About settings that exclude each other."""
        if self.train_sampling_strategy not in ("random", "group_by_length"):
            yield (
                f"--train_sampling_strategy {shown(self.train_sampling_strategy)}: the order is a "
                "function of the seed and the epoch: random, or group_by_length"
            )
        if self.fp16 and self.bf16:
            yield "--fp16 and --bf16 exclude each other: give one of them"
        if self.resume and self.resume_from_checkpoint not in (None, self.resume):
            yield "--resume and --resume_from_checkpoint mean the same: give one of them"
        if self.val_data_path and self.val_fraction:
            yield "--val_data_path and --val_fraction exclude each other: give one of them"
        if "all" in self.reporters:
            yield "--report_to all: name the tools, such as wandb"
        if OURS in self.reporters and not self.tensorboard:
            yield "--report_to tensorboard and --tensorboard false contradict each other"
        trained = "vision" in names_of(self.target_modules) or self.lora_bias == "all"
        if self.cache_vision and trained:
            yield (
                "--cache_vision keeps what a frozen vision tower makes of an image, and "
                "--target_modules vision or --lora_bias all train the tower: leave one out"
            )


def _folder(resume: str | bool | None, output_dir: str) -> str | None:
    """What `--resume_from_checkpoint` names; "True", as scripts of transformers have it, too."""
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if isinstance(resume, bool):
        return output_dir if resume else None
    return resume
