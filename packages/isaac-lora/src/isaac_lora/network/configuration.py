"""The configuration of Isaac as its checkpoints write it, and the checks of what must agree.

Field names are those of Isaac-0.1's `config.json`. Three things in that file mislead. Its
`rope_scaling` names an interleaved layout that the model does not use: the rotary sections are
always [head_dim/4, head_dim/8, head_dim/8], one after the other (see `positions`). The patch size
is called `video_patch_size`, and some programs write `vision_patch_size`. Patch size and pixel
shuffle are each written twice, for the processor and for the tower, and must be equal.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from lora_core.errors import ConfigError, listing

UNUSED_ROPE_KEYS = ("mrope_interleaved", "mrope_section")  # in files, without any effect


@strict
class IsaacVisionConfig(Siglip2VisionConfig):
    """The SigLIP2 tower, whose output is shuffled: r x r patches become one token.

    `num_patches` is the size of the position table, a square number; `image_size` is in the
    files and has no effect. `patch_size` and `pixel_shuffle_scale_factor` in pixels and patches.
    """

    model_type = "pixel_shuffle_siglip2"
    base_config_key = "vision_config"

    patch_size: int = 16
    image_size: int = 256
    pixel_shuffle_scale_factor: int = 1


@strict
class IsaacConfig(Qwen3Config):
    """Qwen3's fields, the vision tower's configuration, and how images and depth are prepared.

    `vision_patch_size` is taken as another name of `video_patch_size`; only the latter is saved.
    Without `vision_config` the tower takes the patch size and the shuffle from here.

    Raises:
        ConfigError: fields that contradict each other, all of them in one message.
    """

    model_type = "isaac"
    sub_configs_defaults = {"vision_config": IsaacVisionConfig}  # noqa: RUF012 (transformers)

    rope_parameters: dict[str, Any] | None = None
    vision_config: dict[str, Any] | PretrainedConfig | None = None
    vision_token: str = "<image>"
    video_patch_size: int = 16  # pixels
    vision_max_num_patches: int = 256  # of one image, before the shuffle
    vision_min_num_patches: int | None = None
    pixel_shuffle_scale: int = 1
    max_sequence_length: int = 16384  # tokens
    vision_attn_implementation: str | None = None  # kept for the file: the tower takes SDPA
    use_depth: bool = False
    depth_alpha: float = 100.0
    depth_input_size: int = 518  # pixels, a multiple of 14
    depth_checkpoint_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        other_name = kwargs.pop("vision_patch_size", None)
        if other_name is not None:
            self.video_patch_size = self._one_patch_size(other_name)
        if self.vision_config is None:
            self.vision_config = {
                "patch_size": self.video_patch_size,
                "pixel_shuffle_scale_factor": self.pixel_shuffle_scale,
            }
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters
        self.rope_parameters = _used_rope(rope or {})
        super().__post_init__(**kwargs)
        problems = _problems(self)
        if problems:
            raise ConfigError(listing(["config.json of Isaac cannot be used:", *problems]))

    def _one_patch_size(self, other_name: int) -> int:
        default = type(self).video_patch_size
        if self.video_patch_size not in (default, other_name):
            raise ConfigError(
                f"config.json of Isaac: vision_patch_size is {other_name} and video_patch_size "
                f"is {self.video_patch_size}; they are two names of one size, give one of them"
            )
        return other_name


def _used_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Leave out what transformers would remark on and the model never reads."""
    return {key: value for key, value in rope.items() if key not in UNUSED_ROPE_KEYS}


def _problems(config: IsaacConfig) -> list[str]:
    """Say what contradicts, one line for each contradiction."""
    vision = config.vision_config
    assert isinstance(vision, IsaacVisionConfig)
    checks = [*_agreement(config, vision), *_decoder(config), *_tower(vision)]
    return [message for wrong, message in checks if wrong]


def _agreement(config: IsaacConfig, vision: IsaacVisionConfig) -> list[tuple[bool, str]]:
    low, high = config.vision_min_num_patches, config.vision_max_num_patches
    return [
        (
            config.video_patch_size != vision.patch_size,
            f"video_patch_size is {config.video_patch_size} and vision_config.patch_size is "
            f"{vision.patch_size}; images would be cut into other patches than the tower reads: "
            "make them equal",
        ),
        (
            config.pixel_shuffle_scale != vision.pixel_shuffle_scale_factor,
            f"pixel_shuffle_scale is {config.pixel_shuffle_scale} and vision_config."
            f"pixel_shuffle_scale_factor is {vision.pixel_shuffle_scale_factor}; an image would "
            "get another number of places than of tokens: make them equal",
        ),
        (
            low is not None and low > high,
            f"vision_min_num_patches is {low}, more than vision_max_num_patches, {high}",
        ),
    ]


def _decoder(config: IsaacConfig) -> list[tuple[bool, str]]:
    rope: dict[str, Any] = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    return [
        (
            rope_type != "default",
            f"rope_type is {rope_type!r}; Isaac's three-axis positions know only 'default'",
        ),
        (
            config.head_dim % 8 != 0,
            f"head_dim is {config.head_dim}; its rotary sections of 1/4, 1/8 and 1/8 need a "
            "multiple of 8",
        ),
        (
            heads % shared != 0,
            f"num_attention_heads is {heads}, no multiple of num_key_value_heads, {shared}",
        ),
        (
            set(config.layer_types) != {"full_attention"},
            "layer_types or use_sliding_window ask for sliding windows; Isaac has full attention "
            "in every layer",
        ),
    ]


def _tower(vision: IsaacVisionConfig) -> list[tuple[bool, str]]:
    side = isqrt(vision.num_patches)
    width, heads = vision.hidden_size, vision.num_attention_heads
    return [
        (
            side * side != vision.num_patches,
            f"vision_config.num_patches is {vision.num_patches}; the position table is a square "
            "grid, so it must be a square number",
        ),
        (
            width % heads != 0,
            f"vision_config.hidden_size is {width}, no multiple of num_attention_heads, {heads}",
        ),
        (
            vision.pixel_shuffle_scale_factor < 1,
            "vision_config.pixel_shuffle_scale_factor is "
            f"{vision.pixel_shuffle_scale_factor}; the least is 1, no shuffle",
        ),
    ]
