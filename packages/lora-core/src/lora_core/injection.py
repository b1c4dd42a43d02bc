"""Adapt a model, run several adapters on it, and give the untouched model back."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lora_core import full_training, mechanisms, overview, placement
from lora_core.config import Bias, LoraConfig
from lora_core.errors import ConfigError, listing, near
from lora_core.full_training import FullTensor
from lora_core.initialise import module_seed
from lora_core.layers import AdapterSpec, LoraLayer
from lora_core.mechanisms import TiedLayer
from lora_core.module_names import in_time, unwrapped
from lora_core.overview import Summary
from lora_core.targets import Roles, adaptable_view, resolve, saved_modules

__all__ = [
    "Summary",
    "adapters_off",
    "configs",
    "full_keys",
    "full_tensors",
    "inject",
    "known",
    "lora_layers",
    "parameter_groups",
    "remove",
    "set_adapters",
    "summary",
    "train_biases",
    "trainable_parameters",
]


def inject(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    roles: Roles | None = None,
    trainable: bool = True,
) -> Summary:
    """Put an adapter on a model, in place, and make it the active one.

    The base is frozen: only the adapter and what `config` names besides it requires gradients.
    Parameters, hooks, device, mode and state-dict keys of the base stay, keys are added. The
    output does not change until the adapter is trained or loaded.

    Args:
        name: of the adapter; a second one on the same model needs another.
        roles: names that stand for target patterns, supplied by a model's package.
        trainable: False for an adapter that is only used.

    Raises:
        ConfigError: a target, rank, slice or combination that cannot work. The model is as it was.
    """
    model = unwrapped(model)
    _check_name(model, name)
    _refuse_merged(model, "add an adapter")
    with in_time("the names in target_modules, exclude_modules and the patterns of ranks"):
        paths = resolve(model, config, roles)
        plan = placement.plan(model, paths, config, trainable)
    _warn_ranks(model, plan)
    keys = full_keys(model, config, plan)
    if not hasattr(model, "_lora_configs"):
        _freeze(model)
    configs(model)[name] = config
    try:
        for path, spec in plan.items():
            mechanisms.adapt(model.get_submodule(path), name, spec, module_seed(config.seed, path))
        placement.tie_readers(model, plan)
        full_training.keep_aside(model, name, _full(model), keys, trainable)
    except BaseException:  # out of memory, Ctrl-C: no half-adapted model
        remove(model, name)
        raise
    set_adapters(model, name)
    return summary(model, name)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all, off the model again.

    Without adapters every module is the same object, of its own class, with the same keys and
    bits as before `inject`, and the same parameters require gradients as then. After
    `merge(model, keep=False)` it is the plain model with the merged weights.

    Raises:
        ConfigError: no such adapter, or merged ones whose old weights are kept for `unmerge`.
    """
    model = unwrapped(model)
    if name is None and _merged_for_good(model):
        _full(model).clear()  # what was trained in full stays, as the merged weights do
    else:
        _refuse_merged(model, "remove adapters")
    names = list(configs(model)) if name is None else [known(model, name)]
    for each in names:
        for layer in lora_layers(model).values():
            if each in layer.lora_adapters:
                mechanisms.drop(layer, each)
        full_training.forget(_full(model), each)
        del configs(model)[each]
    for module in model.modules():
        if isinstance(module, TiedLayer) and not isinstance(module.lora_owner, LoraLayer):
            mechanisms.strip(module)
    if not configs(model) and hasattr(model, "_lora_configs"):
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in model.__dict__["_lora_was_trainable"])
        model.__dict__["_lora_hook"].remove()
        for state in ("_lora_configs", "_lora_full", "_lora_was_trainable", "_lora_hook"):
            del model.__dict__[state]


def set_adapters(
    model: nn.Module,
    names: str | Sequence[str],
    scales: float | Sequence[float] | Mapping[str, float] | None = None,
) -> None:
    """Say which adapters act; several add up. Inactive ones stay on the model, frozen.

    Args:
        names: one name, several, or [] for the plain base.
        scales: multiplier of each adapter's effect (0: none, 1: as trained); 1 by default.

    Raises:
        ConfigError: an unknown name or one that stands twice, a scale that is no number, merged
            adapters, or two adapters that each have their own values of a fully trained module.
    """
    model = unwrapped(model)
    names = [names] if isinstance(names, str) else list(names)
    if len(set(names)) < len(names):
        raise ConfigError(f"adapters {names}: a name stands twice; use scales for a larger effect")
    _refuse_merged(model, "change the active adapters")
    factors = _scales([known(model, name) for name in names], scales)
    full_training.switch_all(_full(model), names)
    for layer in lora_layers(model).values():
        layer.lora_active = [name for name in names if name in layer.lora_adapters]
        layer.lora_scales |= {name: factors[name] for name in layer.lora_active}
        for name, spec in layer.lora_adapters.items():
            mechanisms.set_trainable(layer, name, spec.trainable and name in names)


def train_biases(model: nn.Module, name: str, bias: Bias) -> None:
    """Choose anew which biases of the base an adapter trains, and make it the active one.

    Those that it trains already keep their values, others begin with the base's.

    Args:
        bias: as in `LoraConfig`.

    Raises:
        ConfigError: no such adapter or choice, or merged adapters.
    """
    model = unwrapped(model)
    _refuse_merged(model, "change what is trained")
    config = replace(configs(model)[known(model, name)], bias=bias)
    layers = lora_layers(model)
    plan = {p: la.lora_adapters[name] for p, la in layers.items() if name in la.lora_adapters}
    wanted, has = full_keys(model, config, plan), full_tensors(model, name).keys()
    full_training.forget(_full(model), name, has - set(wanted))
    new = [key for key in wanted if key not in has]
    full_training.keep_aside(model, name, _full(model), new, train=True)
    configs(model)[name] = config
    set_adapters(model, name)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base, bit for bit; afterwards as before."""
    model = unwrapped(model)
    _refuse_merged(model, "switch adapters off")
    layers, full = list(lora_layers(model).values()), _full(model)
    before = [layer.lora_active for layer in layers]
    live = {entry.live for entry in full.values() if entry.live}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        full_training.switch_all(full, ())
        for layer in layers:
            layer.lora_active = []
        yield
    finally:
        full_training.switch_all(full, live)
        for layer, active in zip(layers, before, strict=True):
            layer.lora_active = active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Path -> adapted module, in module order."""
    modules = unwrapped(model).named_modules()
    return {path: module for path, module in modules if isinstance(module, LoraLayer)}


def full_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """State-dict key -> values of what an adapter trains in full (live tensors, not copies).

    Buffers of `modules_to_save` are among them. Write into them to load them.
    """
    entries = _full(unwrapped(model)).items()
    return {key: entry.of(name) for key, entry in entries if name in entry.adapters}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients, each once, in module order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, b_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: every B at `lr * b_lr_ratio` (LoRA+, arXiv 2402.12354: about 16).

    Vectors (biases, magnitudes) have no weight decay. Each group has "name", "params", "lr" and
    "weight_decay"; empty ones are left out.
    """
    groups: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "full": [], "vectors": []}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or ".lora_magnitude_vector." in f".{key}":
            groups["vectors"].append(parameter)
        elif ".lora_B." in f".{key}" or ".lora_embedding_B." in f".{key}":
            groups["B"].append(parameter)
        else:
            groups["A" if ".lora_" in f".{key}" else "full"].append(parameter)
    return [
        {
            "name": name,
            "params": params,
            "lr": lr * b_lr_ratio if name == "B" else lr,
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, params in groups.items()
        if params
    ]


def summary(model: nn.Module, name: str | None = None) -> Summary:
    """What is adapted, by one adapter or all; printing it gives a table."""
    model = unwrapped(model)
    names = list(configs(model)) if name is None else [known(model, name)]
    return overview.summarise(model, lora_layers(model), _full(model), names)


# State of the model


def configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Adapter name -> its configuration, for every adapter on an unwrapped model."""
    found: dict[str, LoraConfig] = model.__dict__.get("_lora_configs", {})
    return found


def _full(model: nn.Module) -> dict[str, FullTensor]:
    """State-dict key -> what adapters train in full."""
    found: dict[str, FullTensor] = model.__dict__.get("_lora_full", {})
    return found


def _freeze(model: nn.Module) -> None:
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    hook = model.register_load_state_dict_post_hook(_accept_base_checkpoint)
    model.__dict__.update(
        _lora_configs={}, _lora_full={}, _lora_was_trainable=trainable, _lora_hook=hook
    )
    model.requires_grad_(False)


def _accept_base_checkpoint(model: nn.Module, result: Any) -> None:
    """Let `load_state_dict` take a checkpoint of the base, without any adapter key, as complete.

    Not where adapters hold what they took from the old base: norms (DoRA), values that are kept
    aside (trained in full), a merged weight.
    """
    layers = lora_layers(model).values()
    specs = [spec for layer in layers for spec in layer.lora_adapters.values()]
    if _full(model) or any(s.use_dora for s in specs) or any(la.lora_merged for la in layers):
        return
    missing = {key for key in result.missing_keys if ".lora_" in f".{key}"}
    if len(missing) == sum(".lora_" in f".{key}" for key in model.state_dict()):
        result.missing_keys[:] = [key for key in result.missing_keys if key not in missing]


def known(model: nn.Module, name: str) -> str:
    """The name of an adapter on an unwrapped model.

    Raises:
        ConfigError: the model has none of this name.
    """
    names = configs(model)
    if name not in names:
        hint = near(name, names) or _say_foreign(model)
        raise ConfigError(
            f"the model has no adapter {name!r}, only {sorted(names)}. {hint}".strip()
        )
    return name


def _say_foreign(model: nn.Module) -> str:
    """What to do about adapters that were put on a part of the model, or on what it is part of."""
    layers = lora_layers(model).items()
    path = next((path for path, la in layers if la.lora_adapters.keys() - configs(model)), None)
    if path is None:
        return ""
    return f"{path} was adapted through another module: pass the one that was given to inject"


def _check_name(model: nn.Module, name: str) -> None:
    foreign = _say_foreign(model)
    if foreign:
        raise ConfigError(foreign)
    if name in configs(model):
        raise ConfigError(
            f"the model already has adapter {name!r}: give another name, or call "
            f"remove(model, {name!r}) first"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or "lora" in name.lower():
        raise ConfigError(
            f"adapter name {name!r}: use letters, digits, '_' and '-', and not the word 'lora', "
            "which tools look for in the names of parameters"
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ConfigError(f"adapter name {name!r} is a name that torch's containers use themselves")


def _refuse_merged(model: nn.Module, what: str) -> None:
    if _merged_for_good(model):
        raise ConfigError(
            f"adapters were merged for good (keep=False), so it is too late to {what}: "
            "remove(model) gives the plain merged model"
        )
    if any(layer.lora_merged for layer in lora_layers(model).values()):
        raise ConfigError(f"adapters are merged: call unmerge(model) first to {what}")


def _merged_for_good(model: nn.Module) -> bool:
    """Whether adapters are merged and no copy of the old weights is kept."""
    merged = [layer for layer in lora_layers(model).values() if layer.lora_merged]
    return bool(merged) and all(layer.lora_kept is None for layer in merged)


def _scales(
    names: Sequence[str], scales: float | Sequence[float] | Mapping[str, float] | None
) -> dict[str, float]:
    if isinstance(scales, Mapping):
        unknown = set(scales) - set(names)
        if unknown:
            raise ConfigError(f"scales for {sorted(unknown)}, which are not among {list(names)}")
        factors = {name: scales.get(name, 1.0) for name in names}
    elif isinstance(scales, Sequence):
        if len(scales) != len(names):
            raise ConfigError(f"{len(scales)} scales for {len(names)} adapters")
        factors = dict(zip(names, scales, strict=True))
    else:
        factors = dict.fromkeys(names, 1.0 if scales is None else scales)
    wrong = {name: c for name, c in factors.items() if not float("-inf") < c < float("inf")}
    if wrong:
        raise ConfigError(f"scales must be finite numbers: {wrong}")
    return {name: float(c) for name, c in factors.items()}


def full_keys(model: nn.Module, config: LoraConfig, plan: Mapping[str, AdapterSpec]) -> list[str]:
    """State-dict keys of what this configuration trains in full."""
    keys: dict[str, None] = {}
    modules = adaptable_view(model)
    for path in sorted(saved_modules(modules, config)):
        keys |= dict.fromkeys(full_training.keys_of_module(path, modules[path]))
    if config.bias == "all":
        keys |= dict.fromkeys(full_training.bias_keys(model))
    elif config.bias == "lora_only":
        adapted = [f"{path}.{placement.bias_name(spec)}" for path, spec in plan.items()]
        present = set(full_training.bias_keys(model))
        keys |= dict.fromkeys(key for key in adapted if key in present)
    adapted_inside = [key for key in keys if ".lora_" in f".{key}"]
    if adapted_inside:
        raise ConfigError(
            listing(
                [f"modules_to_save: {key} belongs to another adapter" for key in adapted_inside]
            )
        )
    return list(keys)


def _warn_ranks(model: nn.Module, plan: Mapping[str, AdapterSpec]) -> None:
    """One warning for all layers whose rank is above what their weight can use."""
    large = []
    for path, spec in plan.items():
        limit = placement.largest_rank(model.get_submodule(path), spec)
        if spec.r > limit:
            large.append(f"{path} (r {spec.r}, weight allows {limit})")
    if large:
        warnings.warn(
            "a rank above the smaller side of the weight adds parameters and nothing else: "
            + listing(large, 5),
            stacklevel=3,
        )
