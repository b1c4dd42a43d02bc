"""Every setting of a sam3-lora training run, each with its default and its help text.

Sections and names are those of the guide's `lora_config_example.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_core.config import MAX_FLOAT, option
from lora_core.errors import ConfigError, near
from lora_core.guards import Guards, count_problem, unnamed
from lora_core.pictures import input_size
from lora_core.settings.types import shown

PATCH = 14  # pixels per token: each side of the input is a multiple of it
LARGEST_SIDE = 8192  # pixels
ROLES = ("q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2")
COMPONENTS = (
    "vision_encoder", "text_encoder", "geometry_encoder", "detr_encoder", "detr_decoder",
    "mask_decoder",
)  # fmt: skip
# The guide's other way to say that a component is not adapted.
FREEZES = {
    "freeze_backbone": "vision_encoder",
    "freeze_text_encoder": "text_encoder",
    "freeze_encoder": "detr_encoder",
    "freeze_decoder": "detr_decoder",
}
Device = Literal["auto", "cuda", "cpu"]


@dataclass
class Lora:
    """Which layers get adapters, and how large these are."""

    rank: int = option(8, "Rank r of every adapter.")
    alpha: float = option(16.0, "The update is scaled by alpha / r.")
    dropout: float = option(0.1, "Dropout on the adapters' input, 0 <= p < 1.")
    target_modules: list[str] = option(
        list(ROLES),
        "Layers of the adapted components: q_proj, k_proj, v_proj, out_proj, linear1, linear2; all "
        "means these six. Full paths and globs of the network's modules are taken, too.",
    )
    apply_to_vision_encoder: bool | None = option(None, "Adapt the image encoder (default: yes).")
    apply_to_text_encoder: bool | None = option(
        None, "Adapt the text tower (default: no: trained on few phrases it fires on any)."
    )
    apply_to_geometry_encoder: bool | None = option(
        None, "Adapt the encoder of example boxes (default: no)."
    )
    apply_to_detr_encoder: bool | None = option(None, "Adapt the DETR encoder (default: yes).")
    apply_to_detr_decoder: bool | None = option(None, "Adapt the DETR decoder (default: yes).")
    apply_to_mask_decoder: bool | None = option(
        None, "Adapt the mask head (default: with training.enable_segmentation)."
    )
    last_blocks: int | None = option(
        None,
        "Of the image encoder adapt only the last so many layers: of those before nothing is kept "
        "for the backward pass, which ends there (default: all layers).",
    )
    freeze_backbone: bool | None = option(None, "Opposite of apply_to_vision_encoder.")
    freeze_text_encoder: bool | None = option(None, "Opposite of apply_to_text_encoder.")
    freeze_encoder: bool | None = option(None, "Opposite of apply_to_detr_encoder.")
    freeze_decoder: bool | None = option(None, "Opposite of apply_to_detr_decoder.")

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        if not 1 <= self.rank <= 65536:
            yield f"--lora.rank is {shown(self.rank)}: it must be 1 to 65536"
        if not 0 < self.alpha <= MAX_FLOAT:  # which NaN is not
            yield f"--lora.alpha is {self.alpha}: it must be a finite number above 0"
        if not 0 <= self.dropout < 1:
            yield f"--lora.dropout is {self.dropout}: it must be 0 <= p < 1"
        if self.last_blocks is not None:
            for text in count_problem(self, "last_blocks", 1):
                yield text.replace("--", "--lora.", 1)
        if not self.target_modules:
            yield "--lora.target_modules is empty: name layers, or all"
        for name in self.target_modules:
            plain = re.fullmatch(r"\w+", name)
            if plain and name not in (*ROLES, "all"):
                yield (
                    f"--lora.target_modules {shown(name)}: "
                    f"{near(name, (*ROLES, 'all')) or 'one of ' + ', '.join((*ROLES, 'all'))}"
                )
        for freeze, component in FREEZES.items():
            if getattr(self, freeze) is not None and self._switch(component) is not None:
                yield f"--lora.{freeze} and --lora.apply_to_{component}: give one of them"

    def _switch(self, component: str) -> bool | None:
        value: bool | None = getattr(self, f"apply_to_{component}")
        return value

    def components(self, masks: bool) -> tuple[str, ...]:
        """The adapted components, in the order of `COMPONENTS`; masks: whether they are trained."""
        chosen = {
            "vision_encoder": True,
            "text_encoder": False,
            "geometry_encoder": False,
            "detr_encoder": True,
            "detr_decoder": True,
            "mask_decoder": masks,
        }
        for freeze, component in FREEZES.items():
            if getattr(self, freeze) is not None:
                chosen[component] = not getattr(self, freeze)
        for component in COMPONENTS:
            if (switch := self._switch(component)) is not None:
                chosen[component] = switch
        return tuple(component for component in COMPONENTS if chosen[component])


@dataclass
class Dataset:
    """Where the pictures and COCO files are, and how they become queries."""

    train_img_folder: str = option("data/train", "Training pictures.")
    train_ann_file: str = option("data/train/_annotations.coco.json", "Their COCO JSON.")
    val_img_folder: str | None = option(
        "data/valid", "Validation pictures; null: none are validated."
    )
    val_ann_file: str | None = option("data/valid/_annotations.coco.json", "Their COCO JSON.")
    resolution: str = option(
        "1008",
        "Model input: a side such as 1008, or HEIGHTxWIDTH such as 672x1008; multiples of 14, best "
        "of 336.",
    )
    max_ann_per_img: int = option(
        200, "A query with more objects is left out and counted (a cut would teach wrong)."
    )
    max_negatives: int = option(
        10, "Absent categories asked for per training picture, drawn anew each epoch."
    )
    max_val_negatives: int = option(
        10, "Absent categories asked for per validation picture; a fixed choice."
    )
    phrase: str = option("object", "What is asked for where a file has no categories.")
    prompts: list[str] = option(
        [],
        "What to ask for instead of a category's name, each as id=phrase or name=phrase.",
    )
    clean_names: bool = option(
        True, "Write spaces for the underscores and hyphens of category names."
    )
    keep_placeholder_category: bool = option(
        False,
        "Keep the category without annotations that Roboflow's exports name as supercategory.",
    )
    keep_crowd: bool = option(False, "Take crowd regions as objects instead of leaving them out.")
    enable_augmentation: bool = option(
        True, "Training pictures in random sizes at random places, as in official training."
    )
    hflip: bool = option(
        False, "Mirror half of the training pictures (not with phrases such as left arrow)."
    )
    exemplars: float = option(
        0.0, "Share of training queries that show one box as an example instead of the phrase."
    )
    box_noise_std: float = option(0.1, "Noise on example boxes, as a share of their sides.")
    box_noise_max: float = option(20.0, "Upper bound of that noise in pixels.")
    follow_links: bool = option(False, "Read files that links lead to outside of the folder.")
    num_workers: int = option(2, "Processes that load training pictures.")

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        try:
            self.size  # noqa: B018 - it raises
        except ConfigError as error:
            yield str(error)
        if not 1 <= self.max_ann_per_img <= 10**6:
            yield f"--dataset.max_ann_per_img is {shown(self.max_ann_per_img)}: 1 to 1000000"
        for name in ("max_negatives", "max_val_negatives"):
            if not 0 <= getattr(self, name) <= 10**6:
                yield f"--dataset.{name} is {shown(getattr(self, name))}: it must be 0 or more"
        if not 0 <= self.exemplars <= 1:
            yield f"--dataset.exemplars is {self.exemplars}: it must be a share, 0 to 1"
        for name in ("box_noise_std", "box_noise_max"):
            if not 0 <= getattr(self, name) <= MAX_FLOAT:
                yield f"--dataset.{name} is {getattr(self, name)}: it must be 0 or more"
        if not 0 <= self.num_workers <= 1024:
            yield f"--dataset.num_workers is {shown(self.num_workers)}: it must be 0 to 1024"
        if (self.val_img_folder is None) != (self.val_ann_file is None):
            yield "--dataset.val_img_folder and --dataset.val_ann_file: give both, or neither"
        for prompt in self.prompts:
            category, _, phrase = prompt.partition("=")
            if not category.strip() or not phrase.strip():
                yield f"--dataset.prompts {shown(prompt)}: expected id=phrase or name=phrase"
        if not self.phrase.strip():
            yield "--dataset.phrase is empty: say what the objects are called"

    @property
    def size(self) -> tuple[int, int]:
        """Model input as (height, width) in pixels."""
        return parse_size(self.resolution)


@dataclass
class Training:
    """The schedule and the loss."""

    max_epochs: int = option(20, "Passes over the training pictures.")
    batch_size: int = option(2, "Pictures per step and device, each with all its phrases.")
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer update.")
    use_amp: bool = option(True, "Mixed precision on a GPU; a CPU trains in fp32.")
    amp_dtype: Literal["bfloat16", "float16"] = option("bfloat16", "Its number format.")
    enable_segmentation: bool = option(False, "Train masks, not boxes alone.")
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay.")
    scheduler: Literal["inverse_sqrt", "cosine", "constant"] = option(
        "inverse_sqrt", "Of the learning rate after the warm-up."
    )
    warmup_steps: int = option(100, "Linear warm-up, at most a tenth of all updates.")
    timescale: int = option(1000, "Updates over which inverse_sqrt falls to 0.7 of the peak.")
    cooldown_steps: int = option(50, "Updates of the linear end of inverse_sqrt.")
    max_grad_norm: float = option(0.1, "Gradients are clipped to this norm.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, slower."
    )
    o2m_weight: float = option(
        2.0, "Weight of the one-to-many half of the queries; 0 leaves it out: faster."
    )
    mask_points: int = option(
        0, "Compute mask losses at so many points of each mask; 0: at every pixel, exactly."
    )
    val_epoch_freq: int = option(1, "Validate every so many epochs, and at the end.")
    best_metric: Literal["auto", "bbox_mAP", "segm_mAP", "cgF1", "loss"] = option(
        "auto", "What best.pt follows; auto: mAP of masks if they are trained, else of boxes."
    )

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        for name in ("max_epochs", "batch_size", "gradient_accumulation_steps", "val_epoch_freq",
                     "timescale"):  # fmt: skip
            for text in count_problem(self, name, 1):
                yield text.replace("--", "--training.", 1)
        for name in ("warmup_steps", "cooldown_steps", "mask_points"):
            for text in count_problem(self, name, 0):
                yield text.replace("--", "--training.", 1)
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) <= MAX_FLOAT:
                yield f"--training.{name} is {getattr(self, name)}: a finite number above 0"
        for name in ("weight_decay", "o2m_weight"):
            if not 0 <= getattr(self, name) <= MAX_FLOAT:
                yield f"--training.{name} is {getattr(self, name)}: a finite number of 0 or more"


@dataclass
class Paths:
    """The model's own files."""

    sam3_checkpoint: str = option(
        "sam3.pt", "Official sam3.pt, a transformers folder, or a hub id such as facebook/sam3."
    )
    bpe_path: str | None = option(
        None, "bpe_simple_vocab_16e6.txt.gz of CLIP, where the checkpoint has no tokenizer beside."
    )


@dataclass
class Checkpoint:
    """Where the results go."""

    save_dir: str = option("experiments/checkpoints", "best.pt and epoch_N.pt go here.")
    save_freq: int = option(1, "Write epoch_N.pt every so many epochs.")


@dataclass
class Logging:
    """Where the figures go."""

    log_dir: str = option("experiments/logs", "training.log and TensorBoard's files go here.")
    log_steps: int = option(10, "Log training figures every so many updates.")


@dataclass
class Config(Guards):
    """Settings of `sam3-lora train`."""

    lora: Lora = field(default_factory=Lora)
    dataset: Dataset = field(default_factory=Dataset)
    training: Training = field(default_factory=Training)
    paths: Paths = field(default_factory=Paths)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    resume: str | None = option(
        None, "Continue from this best.pt or epoch_N.pt, or the last state of its folder."
    )
    adapter: str | None = option(None, "Start from this adapter (warm start).")
    cache_dir: str | None = option(
        None,
        "Keep what frozen encoders make here, for all runs: features of phrases, and with "
        "lora.apply_to_vision_encoder false those of pictures (needs "
        "--dataset.enable_augmentation false).",
    )
    cache_gb: float = option(50.0, "Upper bound of the cache in 10^9 bytes.")
    overwrite: bool = option(False, "Replace the results of a finished run in the folders.")
    device: Device = option("auto", "Where to train.")
    seed: int = option(123, "Fixes adapters, data order, negatives and dropout.")
    tensorboard: bool = option(True, "Write TensorBoard curves and pictures if installed.")
    trainer: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from super().problems()
        for section in (self.lora, self.dataset, self.training):
            yield from section.problems()
        yield from count_problem(self, "seed", 0)
        yield from self._cache_problems()
        for text in count_problem(self.checkpoint, "save_freq", 1):
            yield text.replace("--", "--checkpoint.", 1)
        for text in count_problem(self.logging, "log_steps", 1):
            yield text.replace("--", "--logging.", 1)
        components = self.lora.components(self.training.enable_segmentation)
        if not components:
            yield "nothing to train: every component is switched off by --lora.apply_to_..."
        if self.lora.last_blocks is not None and "vision_encoder" not in components:
            yield (
                "--lora.last_blocks chooses among the layers of the image encoder, which is not "
                "adapted (apply_to_vision_encoder, freeze_backbone): leave one out"
            )
        if self.training.best_metric == "segm_mAP" and not self.training.enable_segmentation:
            yield (
                "--training.best_metric segm_mAP: masks are trained only with "
                "--training.enable_segmentation true"
            )
        if self.training.best_metric != "auto" and self.dataset.val_ann_file is None:
            yield "--training.best_metric needs validation data: give --dataset.val_ann_file"
        if self.lora.apply_to_mask_decoder and not self.training.enable_segmentation:
            yield (
                "--lora.apply_to_mask_decoder: the mask head is trained only with "
                "--training.enable_segmentation true"
            )

    def _cache_problems(self) -> Iterator[str]:
        yield from unnamed(self, ["cache_dir"])
        if not 0 < self.cache_gb <= MAX_FLOAT:
            yield f"--cache_gb is {self.cache_gb}: it must be a finite number above 0"
        if not self.cache_dir:
            return
        adapted = self.lora.components(self.training.enable_segmentation)
        if "vision_encoder" in adapted and "text_encoder" in adapted and not self.adapter:
            yield (
                "--cache_dir keeps what frozen encoders make, and both are adapted: leave it out, "
                "or add --lora.apply_to_vision_encoder false or --lora.apply_to_text_encoder false"
            )
        if "vision_encoder" not in adapted and self.dataset.enable_augmentation:
            yield (
                "--cache_dir keeps the features of each picture as it is: add "
                "--dataset.enable_augmentation false"
            )
        if "vision_encoder" not in adapted and self.shard_base:
            yield (
                "--shard_base divides an image encoder that --cache_dir hardly runs: leave one of "
                "them out"
            )


def parse_size(text: str, setting: str = "--dataset.resolution") -> tuple[int, int]:
    """Read `1008` or `672x1008` as (height, width); each side a multiple of 14 pixels.

    Raises:
        ConfigError: anything else, with the nearest size that works.
    """
    such_as = "1008 or HEIGHTxWIDTH such as 672x1008"
    return input_size.parse_size(
        text, setting, multiple=PATCH, largest=LARGEST_SIDE, such_as=such_as
    )
