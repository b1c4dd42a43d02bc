"""Where LoRA goes in SAM 3: roles of layers inside the components that are switched on.

The roles have the names of the official transformer layers (`q_proj` .. `linear2`). They stand for
exact lists of Linears, wherever a component has such a layer and whatever it is called there; a
name never matches as a part of another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, listing, near
from sam3_lora.config import COMPONENTS, ROLES, Config

if TYPE_CHECKING:
    from transformers import Sam3Config, Sam3Model

    from lora_core.injection import Summary
    from lora_core.last_blocks import Stack

BLOCKS = "vision_encoder.backbone.layers"
ATTENTION = ROLES[:4]


@dataclass(frozen=True)
class Site:
    """Where a component's layers are in `Sam3Model`."""

    layers: str  # expression for the path of a layer
    attention: str  # expression for its attentions
    attentions: int  # how many these are
    output: str = "o_proj"  # what their output projection is called
    mlp: bool = True


SITES = {
    "vision_encoder": Site(r"vision_encoder\.backbone\.layers\.\d+", "attention", 1),
    "text_encoder": Site(
        r"text_encoder\.text_model\.encoder\.layers\.\d+", "self_attn", 1, output="out_proj"
    ),
    "geometry_encoder": Site(r"geometry_encoder\.layers\.\d+", "(self_attn|cross_attn)", 2),
    "detr_encoder": Site(r"detr_encoder\.layers\.\d+", "(self_attn|cross_attn)", 2),
    "detr_decoder": Site(
        r"detr_decoder\.layers\.\d+", "(self_attn|text_cross_attn|vision_cross_attn)", 3
    ),
    "mask_decoder": Site("mask_decoder", "prompt_cross_attn", 1, mlp=False),
}


def targets(names: Sequence[str], components: Sequence[str]) -> list[str]:
    """Patterns of the Linears that names stand for inside components.

    Args:
        names: roles; `all` for the six of them; or full paths of modules, globs and `re:`
            expressions over them.
        components: of `config.COMPONENTS`. Globs and expressions stay outside the others.

    Returns:
        Entries for `LoraConfig.target_modules`.

    Raises:
        ConfigError: unknown names with the closest known ones, a path in a component that is off,
            or nothing left.
    """
    off = [component for component in COMPONENTS if component not in components]
    patterns: dict[str, None] = {}
    problems = []
    for name in names:
        first = name.partition(".")[0]
        if name in (*ROLES, "all"):
            patterns.update((_pattern(*site), None) for site in _sites(name, components))
        elif _is_pattern(name):
            patterns[_outside(name, off)] = None
        elif "." not in name:
            hint = near(name, (*ROLES, "all"))
            problems.append(f"{name!r} is no role{hint and '; ' + hint}, and no path or glob")
        elif first in off:
            problems.append(f"{name!r} is in a component that is off (apply_to_{first})")
        else:
            patterns[name] = None
    if not patterns and not problems:
        where = ", ".join(components) or "no component"
        problems.append(f"{', '.join(names)} name no layer of {where}")
    if problems:
        raise ConfigError(f"target_modules: {listing(problems)}")
    return list(patterns)


def _is_pattern(name: str) -> bool:
    return name.startswith("re:") or re.search(r"[*?\[]", name) is not None


def _sites(role: str, components: Sequence[str]) -> list[tuple[str, str]]:
    """(component, role) pairs that a role, or `all`, stands for."""
    return [
        (component, one)
        for component in components
        for one in (ROLES if role == "all" else (role,))
        if SITES[component].mlp or one in ATTENTION
    ]


def _pattern(component: str, role: str) -> str:
    site = SITES[component]
    if role not in ATTENTION:
        return rf"re:{site.layers}\.mlp\.{role.replace('linear', 'fc')}"
    return rf"re:{site.layers}\.{site.attention}\.{site.output if role == 'out_proj' else role}"


def _outside(pattern: str, off: Sequence[str]) -> str:
    """A glob or expression kept from the components that are off."""
    if not off:
        return pattern
    from lora_core.targets import glob

    expression = pattern[3:] if pattern.startswith("re:") else glob(pattern).pattern
    return rf"re:(?!({'|'.join(off)})(\.|$))(?:{expression})"


def lora_config(cfg: Config) -> LoraConfig:
    """The adapter that a configuration asks for.

    Raises:
        ConfigError: see `targets`.
    """
    return LoraConfig(
        target_modules=targets(cfg.lora.target_modules, _components(cfg)),
        r=cfg.lora.rank,
        lora_alpha=cfg.lora.alpha,
        lora_dropout=cfg.lora.dropout,
        last_blocks={} if cfg.lora.last_blocks is None else {BLOCKS: cfg.lora.last_blocks},
        seed=cfg.seed,
    )


def stack(model: Sam3Model) -> Stack:
    """The layers of the image encoder, the last of which `--lora.last_blocks` adapts."""
    from lora_core.last_blocks import Stack

    return Stack.of(model, "--lora.last_blocks", BLOCKS)


def _components(cfg: Config) -> tuple[str, ...]:
    return cfg.lora.components(cfg.training.enable_segmentation)


def linears(
    config: Sam3Config, component: str, role: str, last_blocks: int | None = None
) -> list[tuple[int, int]]:
    """(in, out) of each Linear of a role, from the model's sizes and not from its module names.

    An adapter of rank r has r * sum(in + out) parameters.

    Args:
        last_blocks: of the vision encoder only those in the last so many layers; None: in all.
    """
    if component == "vision_encoder":
        part = config.vision_config.backbone_config
    elif component == "text_encoder":
        part = config.text_config
    else:
        part = getattr(config, f"{component}_config")
    width, site = part.hidden_size, SITES[component]
    layers: int = getattr(part, "num_layers", getattr(part, "num_hidden_layers", 1))
    if component == "vision_encoder" and last_blocks is not None:
        layers = last_blocks
    if role in ATTENTION:
        return [(width, width)] * (layers * site.attentions)
    if not site.mlp:
        return []
    inner = part.intermediate_size
    return [(width, inner) if role == "linear1" else (inner, width)] * layers


def adapt(model: Sam3Model, cfg: Config) -> Summary:
    """Freeze the network, put the adapters of a configuration on it, and check their number.

    Raises:
        ConfigError: impossible LoRA settings.
        RuntimeError: other layers than intended were adapted, as after a change of names in the
            library; training would be worth nothing.
    """
    from lora_core.injection import inject
    from lora_core.overview import require_linears

    summary = inject(model, lora_config(cfg))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    strangers = sorted(name for name in trained if "lora_" not in name)
    if strangers:
        raise RuntimeError(f"the base is not frozen: {', '.join(strangers[:5])}")
    names = cfg.lora.target_modules
    if not all(name in (*ROLES, "all") for name in names):
        return summary
    sites = {site for name in names for site in _sites(name, _components(cfg))}
    last = cfg.lora.last_blocks
    wanted = [shape for site in sites for shape in linears(model.config, *site, last)]
    require_linears(summary, wanted, cfg.lora.rank, f"target_modules {names}")
    return summary
