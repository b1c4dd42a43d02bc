"""What LoRA is asked to do, and (from `lora_core.settings`) how commands read their settings.

Nothing here imports torch: `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lora_core.errors import ConfigError, near
from lora_core.settings import dump, option, parse

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Bias", "LoraConfig", "Slices", "dump", "option", "parse"]

Bias = Literal["none", "all", "lora_only"]
MAX_FLOAT = 3.4028234e38  # of float32: a larger scale is infinite to the adapters


@dataclass(frozen=True)
class Slices:
    """Parts of a fused projection's output rows, such as q|k|v, each with an adapter of its own.

    Attributes:
        names: the parts in the order of their rows.
        use: the parts that are adapted.
        sizes: rows of each part; None: equal parts.
    """

    names: tuple[str, ...] = ("q", "k", "v")
    use: tuple[str, ...] = ("q", "v")
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("names", "use", "sizes"):  # lists, as files give them, are welcome
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if not self.names or len(set(self.names)) != len(self.names):
            raise ConfigError(f"slices: names {self.names} must be different and at least one")
        if not self.use or len(set(self.use)) != len(self.use):
            raise ConfigError(f"slices: use {self.use} must be different and at least one")
        for name in self.use:
            if name not in self.names:
                raise ConfigError(f"slices: {name!r} is not one of {self.names}")
        if self.sizes is not None and (
            len(self.sizes) != len(self.names) or any(not _is_int(s) or s < 1 for s in self.sizes)
        ):
            raise ConfigError(
                f"slices: sizes {self.sizes} must be one positive number for each of {self.names}"
            )


@dataclass
class LoraConfig:
    """What is adapted, and how. Fields have PEFT's names and meaning where PEFT has them.

    Attributes:
        target_modules: list of names (exact, dotted suffix, glob, `re:...`, or a role of the
            package); one string is a regular expression for the whole name; or a function
            `(name, module) -> bool`.
        r: rank. lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: share of the adapter's input that is dropped in training, 0 <= p < 1.
        exclude_modules: full-path patterns that are never adapted; exclusion wins.
        last_blocks: path of a ModuleList -> only its last N children are adapted.
        rank_pattern, alpha_pattern: pattern -> rank or alpha of the layers whose name matches
            `(.*\\.)?pattern`; the first hit wins.
        slices: pattern -> parts of that fused Linear (or of nn.MultiheadAttention's in_proj).
        modules_to_save: modules that are trained fully and stored with the adapter.
        bias: which biases of the base are trained: none, all, or those of adapted layers.
        lora_bias: B gets a bias. use_rslora: scale by alpha / sqrt(r). use_dora: train the
            magnitude of the weight's columns too. freeze_A: train B only (LoRA-FA).
        init_lora_weights: True: Kaiming-uniform A and zero B; "gaussian": A from N(0, 1/r^2);
            "pissa" and "olora": A and B from the singular vectors or the QR of the base weight.
        seed: together with a layer's name it fixes the initial values of that layer.

    Raises:
        ConfigError: a value that cannot work; the message holds it.
    """

    target_modules: list[str] | str | Callable[[str, nn.Module], bool]
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    exclude_modules: list[str] | str | None = None
    last_blocks: dict[str, int] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    slices: dict[str, Slices] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    bias: Bias = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    freeze_A: bool = False
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ConfigError(f"target_modules is {self.target_modules!r}: name at least one layer")
        if not callable(self.target_modules):
            _check_names("target_modules", self.target_modules)
        for name in ("exclude_modules", "modules_to_save"):
            _check_names(name, getattr(self, name) or [])
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        for path, count in self.last_blocks.items():
            if not _is_int(count) or count < 1:
                raise ConfigError(f"last_blocks[{path!r}] is {count!r}: it must be at least 1")
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *self.slices):
            _check_regex(pattern)
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}: it must be 0 <= p < 1")
        if not _is_int(self.seed):
            raise ConfigError(f"seed is {self.seed!r}: it must be a whole number")
        _check_choice("bias", self.bias, ("none", "all", "lora_only"))
        _check_choice(
            "init_lora_weights", self.init_lora_weights, (True, "gaussian", "pissa", "olora")
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -MAX_FLOAT <= value <= MAX_FLOAT  # which NaN and infinities are not


def _check_rank(name: str, value: Any) -> None:
    if not _is_int(value) or value < 1:
        raise ConfigError(f"{name} is {value!r}: a rank is a whole number of at least 1")


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{name} is {value!r}: alpha must be a finite number above 0")


def _check_names(name: str, value: Any) -> None:
    if isinstance(value, str):
        _check_regex(value)
    elif not isinstance(value, (list, tuple, set)) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{name} is {value!r}: expected a list of names or one regex")
    else:
        for entry in value:
            if entry.startswith("re:"):
                _check_regex(entry[3:])


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{pattern[:200]!r} is no regular expression: {error}") from None


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        words = ", ".join(map(repr, choices))
        hint = near(value, choices)
        raise ConfigError(f"{name} is {value!r}: it must be one of {words}{hint and '; ' + hint}")
