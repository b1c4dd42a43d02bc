"""From an adapted model to PEFT's names and settings: keys, `adapter_config.json`, our facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lora_core import initialise
from lora_core.injection import configs
from lora_core.layers import AdapterSpec, LoraLayer
from lora_core.mechanisms import TiedLayer
from lora_core.module_names import clean, exactly, join, targets
from lora_core.targets import adaptable_view, saved_modules

Layers = Mapping[str, LoraLayer]

PEFT_VERSION = "0.21.2"  # the version whose format is written, and against which it is tested
OUT_PROJ = "base_layer.out_proj"  # where PEFT keeps the adapter of an attention's out_proj


def is_out_proj(model: nn.Module, live: str) -> bool:
    """Whether a module is the out_proj of an nn.MultiheadAttention."""
    parent, _, child = live.rpartition(".")
    return child == "out_proj" and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def file_prefix(model: nn.Module, live: str, paths: Mapping[str, str]) -> str:
    """The path under which a file keeps the adapter of the module at `live`."""
    if is_out_proj(model, live):
        return join(paths[live.rpartition(".")[0]], OUT_PROJ)
    return paths[live]


def file_target(model: nn.Module, live: str, paths: Mapping[str, str]) -> str:
    """The module that PEFT has to adapt for it: of an out_proj the attention layer."""
    return paths[live.rpartition(".")[0] if is_out_proj(model, live) else live]


def full_file_key(
    model: nn.Module, key: str, paths: Mapping[str, str], adapted: Container[str]
) -> str:
    """The file's key for a tensor that was trained in full.

    PEFT puts an adapted layer inside a wrapper: its own bias is `base_layer.bias`, and what lies
    below it (an attention's out_proj) moves too.

    Args:
        adapted: live paths of the adapted layers.
    """
    live, _, name = key.rpartition(".")
    if live in adapted:
        return join(file_prefix(model, live, paths), f"base_layer.{name}")
    if is_out_proj(model, live) and live.rpartition(".")[0] in adapted:
        return join(file_prefix(model, live, paths), name)
    return join(paths.get(live, clean(live)), name)


def file_tensors(
    model: nn.Module, live: str, paths: Mapping[str, str], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One layer's adapter with the file's keys."""
    prefix = file_prefix(model, live, paths)
    return {join(prefix, suffix): value for suffix, value in values.items()}


def plain_spec(spec: AdapterSpec) -> AdapterSpec:
    """The adapter as it comes back from a file: an initial pair (PiSSA, OLoRA) joined the rank."""
    r, alpha = replace(spec, slices=None).file_rank
    return replace(spec, r=r, alpha=number(alpha), init=True)


def layer_facts(spec: AdapterSpec) -> dict[str, Any]:
    """What PEFT's configuration cannot say about one layer, and its rank and alpha before that."""
    spec = plain_spec(spec)
    facts: dict[str, Any] = {"r": spec.r, "alpha": spec.alpha}
    if spec.slices is not None:
        facts["slices"] = [list(part) for part in spec.slices]
    if spec.weight_names not in {("weight",), ("in_proj_weight",)}:
        facts["weights"] = list(spec.weight_names)
    if spec.groups > 1:
        facts["groups"] = spec.groups
    return facts


def file_shapes(spec: AdapterSpec, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of what a file must hold for one layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    whole = replace(spec, slices=None, r=spec.file_rank[0], init=True)
    for name in spec.weight_names:
        weight = module._parameters[name]
        assert weight is not None
        A, B = initialise.pair_shapes(weight, whole)
        if spec.kind == "embedding":
            shapes |= {"lora_embedding_A": A, "lora_embedding_B": B}
        else:
            key = spec.factor_name(name)
            shapes |= {f"lora_A.{key}": A, f"lora_B.{key}": B}
    if spec.lora_bias:
        shapes["lora_B.bias"] = (B[0],)
    if spec.use_dora:
        convolution = spec.kind in ("conv", "conv_transpose")
        shapes["lora_magnitude_vector"] = (1, *B[:1], *B[2:]) if convolution else (B[0],)
    return shapes


def layout(spec: AdapterSpec) -> tuple[object, ...]:
    """All that a file's values depend on: equal layouts can take each other's values."""
    facts = layer_facts(spec)
    return (*sorted(facts.items(), key=str), spec.use_rslora, spec.use_dora, spec.lora_bias)


def extra(model: nn.Module, name: str, layers: Layers, paths: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT has no word for."""
    config = configs(model)[name]
    return {
        "layers": {
            file_prefix(model, live, paths): layer_facts(layer.lora_adapters[name])
            for live, layer in layers.items()
        },
        "lora_dropout": config.lora_dropout,
        "freeze_A": config.freeze_A,
    }


def number(value: float) -> int | float:
    """16 rather than 16.0, as people write it."""
    return int(value) if float(value).is_integer() else value


def adapter_config(
    model: nn.Module, name: str, layers: Layers, paths: Mapping[str, str]
) -> dict[str, Any]:
    """The fields of PEFT's `adapter_config.json`; `layers` are those with this adapter."""
    lora = configs(model)[name]
    saved = sorted(paths[live] for live in saved_modules(adaptable_view(model), lora))
    everything = [path for path in paths.values() if path]
    modules, parameters = _targets(model, layers, paths, everything)
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    for live, layer in layers.items():
        r, alpha = layer.lora_adapters[name].file_rank
        target = file_target(model, live, paths)
        # PEFT has one rank for in_proj and out_proj; where they differ, in_proj's stands here.
        if target not in ranks or not is_out_proj(model, live):
            ranks[target], alphas[target] = r, number(alpha)
    r, alpha = _usual(ranks), _usual(alphas)
    own = {target: target if target in modules else parameters[target] for target in ranks}
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(own[t]): v for t, v in sorted(ranks.items()) if v != r},
        "alpha_pattern": {exactly(own[t]): v for t, v in sorted(alphas.items()) if v != alpha},
        # PEFT cannot drop the input of a bare parameter and refuses to try.
        "lora_dropout": 0.0 if parameters else lora.lora_dropout,
        "target_modules": targets(modules, everything),
        "target_parameters": sorted(parameters.values()) or None,
        "exclude_modules": None,
        "modules_to_save": saved or None,
        "bias": lora.bias,
        "lora_bias": lora.lora_bias,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _targets(
    model: nn.Module, layers: Layers, paths: Mapping[str, str], everything: list[str]
) -> tuple[set[str], dict[str, str]]:
    """(modules, module -> parameter) for PEFT to adapt.

    An attention layer whose out_proj stays as it is, is named by its parameter: PEFT then computes
    exactly `W + delta`. As a module it would get an adapter on out_proj as well. (PEFT matches
    parameters by the end of their name only, so the exact form needs an unambiguous one.)
    """
    modules = {file_target(model, live, paths) for live in layers}
    parameters = {}
    for live, layer in layers.items():
        path = paths[live]
        if not isinstance(layer, nn.MultiheadAttention) or join(live, "out_proj") in layers:
            continue
        if not path or any(other.endswith(f".{path}") for other in everything):
            continue
        spec = next(iter(layer.lora_adapters.values()))
        if spec.weight_names == ("in_proj_weight",) and not (spec.use_dora or spec.lora_bias):
            parameters[path] = f"{path}.in_proj_weight"
    return modules - parameters.keys(), parameters


def _usual(values: Mapping[str, Any]) -> Any:
    """The most frequent value, of equally frequent ones the smallest."""
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value))


def notes(model: nn.Module, name: str, layers: Layers) -> list[str]:
    """What a user of plain PEFT must know about this adapter."""
    found = []
    if any(is_out_proj(model, live) for live in layers):
        found.append(
            "It adapts `out_proj` of `nn.MultiheadAttention`, whose update PEFT up to 0.21.2 adds "
            "twice, in the forward pass and in `merge_and_unload`. Load it with lora_core."
        )
    if any(
        isinstance(model.get_submodule(live.rpartition(".")[0]), nn.TransformerEncoderLayer)
        for live in layers
    ):
        found.append(
            "It adapts children of `nn.TransformerEncoderLayer`, which in evaluation reads their "
            "weights without calling them: PEFT up to 0.21.2 then ignores the adapter."
        )
    owners = [module.lora_owner for module in model.modules() if isinstance(module, TiedLayer)]
    if any(layer is owner for layer in layers.values() for owner in owners):
        found.append(
            "It adapts a weight that several layers share: with PEFT only one of them would see "
            "the adapter. Load it with lora_core."
        )
    beyond = [live for live, layer in layers.items() if layer.lora_adapters[name].beyond_peft]
    if beyond:
        found.append(
            "PEFT cannot express the adapters of grouped or transposed convolutions, of separate "
            f"attention weights or of other layers ({beyond[0]} and so on). Load it with lora_core."
        )
    return found
