"""What LoRA is put on, and with what: the settings of the guide. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, listing

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
BLOCKS = "blocks"  # path of the list of blocks in the transformer
# Of the released model: its depth, and the five in the middle.
RELEASED_LAYERS = 21
RELEASED_MULTI_INSTANCE_BLOCKS = tuple(f"blocks.{index}" for index in range(8, 13))
# Names in `target_modules` that stand for several layers.
ROLES = {
    "attention": TARGETS,
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "skip": ("skip_linear",),
    "all-linear": ("**",),  # PEFT's word
}
# The softmax over the one token of CLIP is 1 whatever the query is, so these have no effect.
WITHOUT_EFFECT = r"blocks\.\d+\.attn2\.to_q"


@dataclass(frozen=True)
class LoraChoice:
    """The layers that are adapted, with what, and the blocks in which a scene's rows are joined.

    Attributes:
        rank, alpha: y = W x + b + (alpha / rank) B A x.
        dropout: share of the adapters' input that is dropped in training.
        target_modules: ends of names as in PEFT ("to_q", "attn1.to_out.0"), globs, "re:...", or one
            of `ROLES`. `attn2.to_q` is never among them: it has no effect.
        multi_instance_blocks: names of blocks, as "blocks.8"; empty: none.
        seed: of the initial values, together with each layer's name.
        last_blocks: only the last so many blocks are adapted; None: all.

    Raises:
        ConfigError: values that cannot work, all of them.
    """

    rank: int = 16
    alpha: float = 16
    dropout: float = 0.1
    target_modules: tuple[str, ...] = TARGETS
    multi_instance_blocks: tuple[str, ...] = RELEASED_MULTI_INSTANCE_BLOCKS
    seed: int = 0
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "multi_instance_blocks"):
            object.__setattr__(self, name, _listed(getattr(self, name)))
        if problems := [*target_problems(self.target_modules), *self._problems()]:
            raise ConfigError(listing(problems))

    def _problems(self) -> Iterator[str]:
        yield from block_problems(self.multi_instance_blocks)
        try:
            self._settings(["any"])
        except ConfigError as error:  # of the rank, alpha, dropout or seed
            yield str(error)

    def config(self) -> LoraConfig:
        """The same for lora_core, with PEFT's words."""
        return self._settings(list(self.target_modules))

    def _settings(self, targets: list[str]) -> LoraConfig:
        return LoraConfig(
            target_modules=targets,
            exclude_modules=[f"re:{WITHOUT_EFFECT}"],
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            last_blocks={} if self.last_blocks is None else {BLOCKS: self.last_blocks},
            seed=self.seed,
        )


def target_problems(names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with names of layers to adapt, each as one line."""
    if not names:
        yield "lora_target_modules is empty: name layers, as to_q to_k to_v to_out.0"
    for name in names:
        if name.endswith("attn2.to_q"):
            yield (
                f"lora_target_modules: {name!r} has no effect: attn2 sees one CLIP token, so its "
                "softmax is 1 whatever the query is. Leave it out"
            )


def block_problems(names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with names of blocks, as far as it shows without a model."""
    odd = [name for name in names if not re.fullmatch(r"blocks\.(0|[1-9]\d*)", str(name))]
    if odd:
        yield f"mi_attention_blocks: {', '.join(map(repr, odd[:5]))}: write blocks.8, blocks.9 ..."
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield f"mi_attention_blocks: {', '.join(map(repr, twice))} stands twice"


def _listed(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
