"""What LoRA is put on: the options of the guide and its presets. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_core.errors import ConfigError, near

Part = Literal["enc", "dec"]

PROMPT_WIDTH = 32  # of the hidden layer of a prompt MLP, at most
ROLES: Mapping[str, tuple[str, ...]] = {
    "attn": ("attn.qkv", "attn.proj"),
    "mlp": ("mlp.0.fc1", "mlp.0.fc2"),
}  # name in `target_modules` -> Linear layers of every block


@dataclass(frozen=True)
class LoraChoice:
    """The layers that are adapted, and with what.

    Attributes:
        r, lora_alpha: y = W x + b + (lora_alpha / r) B A x.
        target_modules: "attn" (qkv and proj), "mlp" (fc1 and fc2).
        enable_prompt: a prompt MLP beside every adapted layer, see `prompt_mlp`.
        parts: the encoder ("enc"), the decoder ("dec"), or both.
        target_stages: numbers s of enc{s} and dec{s}; None: all.
        deepest: in place of target_stages, so many of the deepest stages of each part.
        lora_dropout: share of the adapters' input that is dropped in training.
        prompt_width: largest hidden width of a prompt MLP; None: a quarter of its input.
        seed: of the initial values, together with each layer's name.
        last_blocks: of the blocks that all this means, only the last so many in the order in which
            they run; None: all.

    Raises:
        ConfigError: a value that cannot work.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] = ("attn",)
    enable_prompt: bool = False
    parts: tuple[Part, ...] = ("enc",)
    target_stages: tuple[int, ...] | None = None
    deepest: int | None = None
    lora_dropout: float = 0.0
    prompt_width: int | None = PROMPT_WIDTH
    seed: int = 0
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        names = self.target_modules
        names = (names,) if isinstance(names, str) else tuple(names)
        object.__setattr__(self, "target_modules", names)
        for name in names:
            if name not in ROLES:
                hint = near(name, ROLES)
                raise ConfigError(
                    f"target_modules: {name!r} is neither 'attn' nor 'mlp'{hint and '; ' + hint}"
                )
        if not names:
            raise ConfigError("target_modules is empty: name 'attn', 'mlp' or both")
        if self.target_stages is not None:
            object.__setattr__(self, "target_stages", _stages(self.target_stages))
        width = self.prompt_width
        if width is not None and (not isinstance(width, int) or width < 1):
            raise ConfigError(f"prompt_width is {width!r}: it must be a whole number, 1 or more")
        last = self.last_blocks
        if last is not None and (type(last) is not int or last < 1):
            raise ConfigError(f"last_blocks is {last!r}: it must be a whole number, 1 or more")


PRESETS: Mapping[str, LoraChoice] = {
    "minimal": LoraChoice(r=4, lora_alpha=4, deepest=2),
    "standard": LoraChoice(r=8, lora_alpha=8),
    "full": LoraChoice(r=16, lora_alpha=16, target_modules=("attn", "mlp"), enable_prompt=True),
    "decoder_only": LoraChoice(r=8, lora_alpha=8, parts=("dec",)),
}


def preset_choice(name: str, **overrides: Any) -> LoraChoice:
    """A preset, with fields of `LoraChoice` or `encoder_only` in place of its own; None: its own.

    Raises:
        ConfigError: no such preset or field, or a value that cannot work.
    """
    if name not in PRESETS:
        hint = near(name, PRESETS)
        raise ConfigError(
            f"preset {name!r}: it must be one of {', '.join(PRESETS)}{hint and '; ' + hint}"
        )
    preset = PRESETS[name]
    overrides = {k: v for k, v in overrides.items() if v is not None or k == "prompt_width"}
    if "encoder_only" in overrides:
        encoder_only = overrides.pop("encoder_only")
        if encoder_only and "enc" not in preset.parts:
            raise ConfigError(f"preset {name!r} with encoder_only: it adapts the decoder alone")
        if "enc" in preset.parts:
            overrides["parts"] = parts_of(encoder_only)
    if "target_stages" in overrides:
        overrides["deepest"] = None
    known = list(LoraChoice.__dataclass_fields__)
    unknown = [field for field in overrides if field not in known]
    if unknown:
        hint = near(unknown[0], [*known, "encoder_only"])
        raise ConfigError(f"preset {name!r}: unknown option {unknown[0]!r}. {hint}".rstrip())
    return replace(preset, **overrides)


def parts_of(encoder_only: bool) -> tuple[Part, ...]:
    """The parts that `encoder_only` of the guide means."""
    return ("enc",) if encoder_only else ("enc", "dec")


def _stages(value: Any) -> tuple[int, ...]:
    stages = (value,) if isinstance(value, int) else tuple(value)
    if not stages or any(type(s) is not int or s < 0 for s in stages):
        raise ConfigError(
            f"target_stages is {value!r}: expected numbers of stages from 0 on, as in [3, 4]; None "
            "for all"
        )
    return tuple(sorted(set(stages)))
