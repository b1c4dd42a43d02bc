"""Where a Point Transformer V3 lies in a model, and its layers by part, stage and role."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from lora_core.errors import ConfigError
from lora_core.injection import configs, lora_layers
from lora_core.module_names import Rename, clean, unwrapped
from scenesplat_lora.presets import ROLES, LoraChoice, Part

_LAYER = re.compile(
    r"(?:.+\.)?(?P<part>enc|dec)(?P<stage>\d+)\.block(?P<block>\d+)\."
    r"(?P<name>attn\.qkv|attn\.proj|mlp\.0\.fc1|mlp\.0\.fc2)"
)
_BLOCK = re.compile(r".*?\b(?:enc|dec)\d+\.block\d+(?=\.)")
_START = re.compile(r"(?P<prefix>(?:.+?\.)?)(?:enc\.enc|dec\.dec)\d+\.block\d+\.")
_ROLE = {name: role for role, names in ROLES.items() for name in names}


@dataclass(frozen=True)
class Layer:
    """A Linear layer of a block.

    Attributes:
        path: of the module in the model. part: encoder or decoder.
        stage: s of enc{s} and dec{s}. role: "attn" or "mlp".
    """

    path: str
    part: Part
    stage: int
    role: str


def layers_of(model: nn.Module) -> list[Layer]:
    """Every Linear layer of every block, wherever in the model the backbone is.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for path, module in model.named_modules():
        match = _LAYER.fullmatch(clean(path))
        if match and isinstance(module, nn.Linear):
            part = cast(Part, match["part"])
            found.append(Layer(path, part, int(match["stage"]), _ROLE[match["name"]]))
    if not found:
        raise ConfigError(
            f"{type(model).__name__} holds no blocks of a Point Transformer V3: expected modules "
            "such as enc.enc0.block0.attn.qkv or backbone.enc.enc0.block0.attn.qkv"
        )
    return found


def chosen_layers(model: nn.Module, choice: LoraChoice) -> list[Layer]:
    """The layers that a choice means. Stages that are missing are named in a warning.

    Raises:
        ConfigError: none of the stages exists, the model has no such part, or fewer blocks than
            `last_blocks`.
    """
    layers = layers_of(model)
    inside = [layer for layer in layers if layer.part in choice.parts]
    if not inside:
        names = " or ".join({"enc": "encoder", "dec": "decoder"}[part] for part in choice.parts)
        raise ConfigError(f"{type(model).__name__} has no {names}: choose the other part")
    wanted = {(layer.part, layer.stage) for layer in inside}
    if choice.target_stages is not None:
        wanted = {key for key in wanted if key[1] in choice.target_stages}
        _check_stages(choice.target_stages, inside)
    elif choice.deepest is not None:
        wanted = {key for key in wanted if key[1] in _deepest(inside, key[0], choice.deepest)}
    meant = [
        layer
        for layer in inside
        if (layer.part, layer.stage) in wanted and layer.role in choice.target_modules
    ]
    return meant if choice.last_blocks is None else _in_last_blocks(meant, choice.last_blocks)


def _in_last_blocks(layers: Sequence[Layer], count: int) -> list[Layer]:
    """The layers in the last so many of the blocks in which there are any."""
    blocks = blocks_of(layer.path for layer in layers)
    if count > len(blocks):
        raise ConfigError(
            f"last_blocks is {count}: preset, encoder_only and target_stages mean {len(blocks)} "
            f"blocks (1 to {len(blocks)})"
        )
    return [layer for layer in layers if block_of(layer.path) in blocks[-count:]]


def blocks_of(paths: Iterable[str]) -> list[str]:
    """Paths of the blocks in which layers lie, in the order of these: that of module order is the
    order in which they run."""
    return list(dict.fromkeys(map(block_of, paths)))


def block_of(path: str) -> str:
    """The path of the block in which a layer of `layers_of` lies."""
    match = _BLOCK.match(path)
    assert match is not None
    return match[0]


def _deepest(layers: Iterable[Layer], part: Part, count: int) -> list[int]:
    return sorted({layer.stage for layer in layers if layer.part == part})[-count:]


def _check_stages(asked: Iterable[int], layers: Iterable[Layer]) -> None:
    there = sorted({f"{layer.part}{layer.stage}" for layer in layers})
    stages = {layer.stage for layer in layers}
    missing = [stage for stage in asked if stage not in stages]
    if not missing:
        return
    if not stages & set(asked):
        raise ConfigError(
            f"target_stages {list(asked)}: the model has none of them, only {', '.join(there)}"
        )
    warnings.warn(
        f"target_stages: the model has no stage {', '.join(map(str, missing))}, only "
        f"{', '.join(there)}; the others are adapted",
        stacklevel=6,
    )


# -- models with LoRA ------------------------------------------------------------------------------


def adapted_part(model: nn.Module) -> nn.Module | None:
    """The module that LoRA was injected into: the model, or the backbone in it; None without LoRA.

    Raises:
        ConfigError: several parts were adapted one by one.
    """
    model = unwrapped(model)
    parts = [module for module in model.modules() if configs(module)]
    if len(parts) > 1:
        raise ConfigError(
            f"{len(parts)} parts of the model have LoRA, injected one by one: pass the part that "
            "is meant"
        )
    if not parts and lora_layers(model):
        raise ConfigError("LoRA was injected into a model around this one: pass that model")
    return parts[0] if parts else None


def with_lora(model: nn.Module) -> nn.Module:
    """As `adapted_part`.

    Raises:
        ConfigError: the model has no LoRA.
    """
    part = adapted_part(model)
    if part is None:
        raise ConfigError(
            "the model has no LoRA layers: call inject_lora_to_ptv3(model) or "
            "load_lora_checkpoint(model, path) first"
        )
    return part


# -- names in files --------------------------------------------------------------------------------


def prefix(names: Iterable[str]) -> str | None:
    """What stands before enc.enc{s} and dec.dec{s} in these names, such as "backbone." and "".

    None: they differ in it, or none is the name of (a tensor of) a layer.
    """
    found = {match["prefix"] or "" for match in map(_START.match, names) if match}
    return found.pop() if len(found) == 1 else None


def renaming(model: nn.Module, names: Iterable[str]) -> Rename:
    """Module path in the model -> path in a file of these names.

    They may differ in what the backbone lies in: `backbone.`, `module.`.
    """
    there, here = prefix(names), prefix(clean(layer.path) for layer in layers_of(model))
    if there is None or here is None:
        return str
    return lambda path: there + path.removeprefix(here) if path.startswith(here) else path
