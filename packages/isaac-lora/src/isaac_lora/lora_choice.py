"""What LoRA is put on, and with what: the settings of the guide. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_core.config import Bias, LoraConfig
from lora_core.errors import ConfigError, listing

AUTO = "auto"
BLOCKS = "model.layers"  # path of the list of decoder layers
# Names in `target_modules` that stand for several layers, as expressions for whole paths.
ATTENTION = r"re:model\.layers\.\d+\.self_attn\.[qkvo]_proj"
MLP = r"re:model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
PROJECTOR = r"re:model\.vision_embedding\.[13]"
VISION = (
    r"re:model\.vision_embedding\.0\.encoder\.layers\.\d+"
    r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
)
ROLES = {
    "attention": (ATTENTION,),
    "mlp": (MLP,),
    "projector": (PROJECTOR,),
    "vision": (VISION,),
    AUTO: (ATTENTION, MLP, PROJECTOR),
    "all-linear": (ATTENTION, MLP, PROJECTOR),  # PEFT's word; the tower has its own
}
# Parts of the model, by the beginnings of their paths; the first that fits counts.
PARTS = {
    "vision tower": r"model\.vision_embedding\.0(\.|$)",
    "projector": r"model\.vision_embedding(\.|$)",
    "depth model": r"(model\.)?depth",
    "embeddings": r"model\.embed_tokens(\.|$)",
    "decoder": r"model\.",
    "lm_head": r"lm_head(\.|$)",
}
POSITIONS = "model.vision_embedding.0.embeddings.position_embedding"  # resized, never looked up
# Parts that short names do not reach -> how to ask for them.
CLOSED = {
    "vision tower": "for these too: vision, or names with vision_embedding.0",
    "embeddings": "for these too: embed_tokens",
    "lm_head": "for this too: lm_head",
    "depth model": "it is never trained",
}


@dataclass(frozen=True)
class LoraChoice:
    """The layers that are adapted, and with what.

    Attributes:
        r, alpha: y = W x + b + (alpha / r) B A x.
        dropout: share of the adapters' input that is dropped in training.
        bias: which biases of the base train: none, all, or those of adapted layers.
        target_modules: ends of names as in PEFT ("q_proj"), paths, globs, "re:...", or one of
            `ROLES`; see `asks_for` for what these do not reach.
        seed: of the initial values, together with each layer's name.
        last_blocks: of the decoder's layers only the last so many are adapted, and the projector
            only if it is named; None: all.

    Raises:
        ConfigError: values that cannot work, all of them.
    """

    r: int = 128
    alpha: float = 256
    dropout: float = 0.05
    bias: Bias = "none"
    target_modules: tuple[str, ...] = (AUTO,)
    seed: int = 0
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", names_of(self.target_modules))
        if problems := list(self._problems()):
            raise ConfigError(listing(problems))

    def _problems(self) -> Iterator[str]:
        yield from target_problems(self.target_modules)
        try:
            self.config(["any"])
        except ConfigError as error:  # of the rank, alpha, dropout, bias or seed
            yield str(error)
        if self.last_blocks is not None and self.last_blocks < 1:
            yield f"last_blocks is {self.last_blocks}: it must be at least 1"

    @property
    def closed(self) -> dict[str, str]:
        """Parts that short names do not reach -> how to ask for them."""
        if self.last_blocks is None:
            return CLOSED
        return CLOSED | {"projector": "for these too: projector (then all layers keep activations)"}

    def config(self, paths: Sequence[str]) -> LoraConfig:
        """The same for lora_core, on layers with these full paths."""
        return LoraConfig(
            target_modules=list(paths),
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            bias=self.bias,
            seed=self.seed,
        )


def names_of(given: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names in `--target_modules`: "q_proj,v_proj", a list of them, or None for `AUTO`."""
    if given is None:
        return (AUTO,)
    texts = [given] if isinstance(given, str) else list(given)
    return tuple(name for text in texts for name in _split(text))


def _split(text: str) -> Iterator[str]:
    """Yield what commas separate; inside of brackets they belong to an expression."""
    depth, word = 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            yield word.strip()
            word = ""
        else:
            word += character
    yield word.strip()


def target_problems(names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with names of layers, as far as it shows without a model."""
    if not names or not all(names):
        yield (
            f"target_modules is {', '.join(names)!r}: expected names with commas between them, "
            "such as q_proj,v_proj, or leave it out"
        )
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        yield f"target_modules: {', '.join(map(repr, twice))} stands twice"


def part_of(path: str) -> str:
    """The part of the model, one of `PARTS`, in which a module lies."""
    return next((part for part, start in PARTS.items() if re.match(start, path)), "other")


def asks_for(name: str, part: str, closed: Container[str] = CLOSED) -> bool:
    """Whether a name in `target_modules` reaches a part of the model.

    `q_proj` is also the end of names in the vision tower, which the guide leaves frozen, and
    "**.*_proj" fits them. So closed parts have to be named.

    Args:
        closed: these parts.
    """
    if part not in closed:
        return True
    plain = name.replace("\\", "")
    if part == "vision tower":
        return name == "vision" or "vision_embedding.0" in plain
    if part == "projector":
        return name == "projector" or "vision_embedding" in plain
    words = {"embeddings": "embed_tokens", "lm_head": "lm_head"}
    return part in words and words[part] in plain
