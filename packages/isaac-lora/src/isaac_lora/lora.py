"""LoRA on Isaac.

A layer y = W x + b becomes y = W x + b + (alpha / r) B A x (Hu et al., arXiv 2106.09685), in place:
state-dict keys of the base stay, `lora_A.default.weight` and `lora_B.default.weight` are added. A
is uniform as Kaiming's (a = sqrt 5), B is 0, so that nothing changes at first.

The default is every Linear of the decoder and the projector: 198 layers of Isaac-0.1, in which
rank r trains r * 1,133,056 parameters. The vision tower, the depth model and `lm_head` stay frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from isaac_lora.lora_choice import (
    AUTO,
    BLOCKS,
    POSITIONS,
    ROLES,
    LoraChoice,
    asks_for,
    part_of,
)
from lora_core import injection
from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, listing
from lora_core.injection import Summary
from lora_core.last_blocks import Stack
from lora_core.module_names import in_time, unwrapped
from lora_core.overview import require_linears
from lora_core.report import plural, say
from lora_core.targets import resolve

if TYPE_CHECKING:
    from isaac_lora.network.configuration import IsaacConfig
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

__all__ = ["ADAPTER", "LoraChoice", "adapted_layers", "inject", "lora_parameters", "remove"]

ADAPTER = "default"  # name of the one adapter on a model


def inject(model: IsaacForConditionalGeneration, choice: LoraChoice | None = None) -> Summary:
    """Put LoRA on a model, in place.

    The base is frozen: only LoRA, and the biases that were asked for, require gradients. The mode
    (train, eval) stays.

    Args:
        model: it may be on the meta device.
        choice: None: the guide's defaults.

    Returns:
        what was adapted; printing it gives a table, see also `by_part`.

    Raises:
        ConfigError: names of layers that the model lacks, or LoRA is there already. The model is
            as it was.
        RuntimeError: the default did not reach the layers that it is meant for.
    """
    choice = LoraChoice() if choice is None else choice
    if injection.lora_layers(model):
        raise ConfigError("the model has LoRA already: remove(model) takes it off")
    paths = adapted_layers(model, choice)
    summary = injection.inject(model, choice.config(paths), ADAPTER)
    if choice.target_modules == (AUTO,) and choice.bias == "none":
        wanted = default_linears(model.config, choice.last_blocks)
        require_linears(summary, wanted, choice.r, "target_modules auto")
    return summary


def adapted_layers(model: IsaacForConditionalGeneration, choice: LoraChoice) -> list[str]:
    """Paths of the layers that a choice means, in module order.

    Says which layers its names fit and do not reach.

    Raises:
        ConfigError: names that mean no layer, all of them.
    """
    last = {} if choice.last_blocks is None else {BLOCKS: choice.last_blocks}
    wanted: set[str] = set()
    passed: dict[str, set[str]] = {}  # closed part -> layers in it that were not asked for
    problems = []
    for name in choice.target_modules:
        try:
            with in_time(f"the name {name!r} in target_modules"):
                asked = LoraConfig([name], exclude_modules=[POSITIONS], last_blocks=last)
                found = resolve(model, asked, ROLES)
        except ConfigError as error:
            problems.append(str(error))
            continue
        reached = {path for path in found if asks_for(name, part_of(path), choice.closed)}
        for path in set(found) - reached:
            passed.setdefault(part_of(path), set()).add(path)
        if not reached:
            parts = sorted({part_of(path) for path in found})
            problems += [_closed(name, part, choice.closed[part]) for part in parts]
        wanted |= reached
    if problems:
        raise ConfigError(listing(list(dict.fromkeys(problems))))
    for part, found_there in passed.items():
        if left := found_there - wanted:
            count = plural(len(left), "layer")
            say(f"{part}: {count} with these names stay frozen; {choice.closed[part]}")
    return [path for path, _ in model.named_modules() if path in wanted]


def _closed(name: str, part: str, how: str) -> str:
    return (
        f"target_modules: {name!r} means layers of the {part} alone, which stays frozen unless it "
        f"is named: {how}"
    )


def default_linears(config: IsaacConfig, last_blocks: int | None = None) -> list[tuple[int, int]]:
    """(in, out) of each Linear that the default adapts, from the model's sizes and not its names.

    An adapter of rank r has r * sum(in + out) parameters.

    Args:
        last_blocks: only in the last so many layers of the decoder; None: in all, and in the
            projector.
    """
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    attention = [(width, heads), (width, shared), (width, shared), (heads, width)]
    mlp = [(width, inner), (width, inner), (inner, width)]
    if last_blocks is not None:
        return (attention + mlp) * last_blocks
    tower = config.vision_config.hidden_size * config.pixel_shuffle_scale**2  # type: ignore[union-attr]
    projector = [(tower, 4 * tower), (4 * tower, width)]
    return (attention + mlp) * config.num_hidden_layers + projector


def stack(model: nn.Module) -> Stack:
    """The decoder's layers, the last of which `--last_blocks` adapts without the projector."""
    before = [path for path in injection.lora_layers(model) if part_of(path) == "projector"]
    return Stack.of(model, "--last_blocks", BLOCKS, before)


def by_part(paths: Sequence[str]) -> str:
    """How many layers are in which part of the model, such as "decoder 196, projector 2"."""
    counts = Counter(map(part_of, paths))
    return ", ".join(f"{part} {count}" for part, count in counts.most_common())


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, in module order: those for the optimizer."""
    return injection.trainable_parameters(unwrapped(model))


def remove(model: IsaacForConditionalGeneration) -> None:
    """Take LoRA off again: the base as it was before, bit for bit."""
    injection.remove(model)
