"""What an adapter will be on each layer: decided, and refused, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_core import mechanisms
from lora_core.config import LoraConfig, Slices
from lora_core.errors import ConfigError, listing, near
from lora_core.layers import BIAS_OF, AdapterSpec, LoraLayer, Mechanism
from lora_core.mechanisms import TiedLayer
from lora_core.module_names import first_match

Plan = dict[str, AdapterSpec]


def plan(
    model: nn.Module, paths: Sequence[str], config: LoraConfig, trainable: bool = True
) -> Plan:
    """Path -> spec, in module order, for the targets of one adapter.

    A weight that several of them share is adapted once, on the first.

    Raises:
        ConfigError: every problem of the placement in one message.
    """
    modules = dict(model.named_modules())
    problems = _unused_patterns(paths, config)
    found: Plan = {}
    holders, taken = _holders(model), set[int]()
    for path in paths:
        module = modules[path]
        weights = {id(module._parameters[name]) for name in mechanisms.weight_names(module)}
        if weights & taken or isinstance(module, TiedLayer):
            continue
        taken |= weights
        tied = any(len(holders[weight]) > 1 for weight in weights)
        try:
            mechanism = _mechanism(modules, path, tied)
            found[path] = replace(_spec(modules, path, config, mechanism), trainable=trainable)
        except ConfigError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(listing(problems))
    return found


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter -> where it is registered."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return places


def tie_readers(model: nn.Module, plan: Iterable[str]) -> None:
    """Let every module that shares a weight of an adapted layer read the adapted one."""
    holders = _holders(model)
    for path in plan:
        owner = model.get_submodule(path)
        assert isinstance(owner, LoraLayer)
        for name in mechanisms.weight_names(owner):
            for module, other in holders[id(owner.lora_raw(name))]:
                if module is not owner and not isinstance(module, TiedLayer):
                    mechanisms.tie(module, other, owner, name)


def _mechanism(modules: Mapping[str, nn.Module], path: str, tied: bool) -> Mechanism:
    """Wrap only where the module's own forward is what computes with its weight.

    torch's attention reads the weight of its `out_proj`, and the evaluation path of its encoder
    layer those of `linear1` and `linear2`, without ever calling these children.
    """
    module, parent = modules[path], modules[path.rpartition(".")[0]]
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    if tied or isinstance(parent, readers) or not mechanisms.runs_torch_forward(module):
        return "parametrize"
    return "wrap"


def _spec(
    modules: Mapping[str, nn.Module], path: str, config: LoraConfig, mechanism: Mechanism
) -> AdapterSpec:
    module = modules[path]
    kind = mechanisms.kind_of(module)
    assert kind is not None
    names, parent = mechanisms.weight_names(module), path.rpartition(".")[0]
    r, alpha = config.r, config.lora_alpha
    if isinstance(modules[parent], nn.MultiheadAttention):  # out_proj follows its layer, as in PEFT
        r = first_match(config.rank_pattern, parent, r)
        alpha = first_match(config.alpha_pattern, parent, alpha)
    spec = AdapterSpec(
        r=first_match(config.rank_pattern, path, r),
        alpha=first_match(config.alpha_pattern, path, alpha),
        kind=kind,
        mechanism=mechanism,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        freeze_A=config.freeze_A,
        init=config.init_lora_weights,
        weight_names=names,
        groups=getattr(module, "groups", 1) if kind in ("conv", "conv_transpose") else 1,
    )
    slices: Slices | None = first_match(config.slices, path, None)
    if slices is not None:
        spec = _sliced(module, spec, slices)
    _check_combination(module, spec)
    return spec


def _sliced(module: nn.Module, spec: AdapterSpec, slices: Slices) -> AdapterSpec:
    """The spec on the chosen slices of a fused weight, or on the chosen of separate weights."""
    if spec.kind not in ("linear", "attention"):
        raise ConfigError(f"slices need a Linear or an attention layer, this is {_name(module)}")
    if len(spec.weight_names) > 1:
        own = dict(zip(("q", "k", "v"), spec.weight_names, strict=True))
        unknown = [name for name in slices.use if name not in own]
        if unknown:
            raise ConfigError(f"slices {unknown}: the separate weights of this layer are {[*own]}")
        return replace(spec, weight_names=tuple(own[name] for name in own if name in slices.use))
    weight = module._parameters[spec.weight_name]
    assert weight is not None
    rows, count = weight.shape[0], len(slices.names)
    if slices.sizes is None and rows % count:
        raise ConfigError(f"{rows} rows do not divide into {count} equal slices: give sizes")
    sizes = slices.sizes or (rows // count,) * count
    if sum(sizes) != rows:
        raise ConfigError(f"slice sizes {sizes} add up to {sum(sizes)}, the weight has {rows} rows")
    stops = [sum(sizes[: i + 1]) for i in range(count)]
    spans = [
        (name, stop - size, stop)
        for name, size, stop in zip(slices.names, sizes, stops, strict=True)
        if name in slices.use
    ]
    return replace(spec, slices=tuple(spans))


def _check_combination(module: nn.Module, spec: AdapterSpec) -> None:
    """Refuse what has no meaning, or what nobody could load again."""
    if spec.use_dora and (spec.slices or spec.lora_bias or spec.has_initial):
        raise ConfigError("use_dora goes with neither slices, lora_bias, pissa nor olora")
    if spec.use_dora and len(spec.weight_names) > 1:
        raise ConfigError("use_dora needs one weight, this layer has separate q, k and v")
    if spec.has_initial:
        if spec.kind not in ("linear", "attention"):
            raise ConfigError(f"init {spec.init!r} needs a Linear weight, this is {_name(module)}")
        if spec.r > largest_rank(module, spec):
            raise ConfigError(
                f"init {spec.init!r} with r {spec.r}: the weight has only "
                f"{largest_rank(module, spec)} directions"
            )
    if spec.lora_bias:
        bias = module._parameters.get(bias_name(spec))
        if spec.kind == "embedding" or len(spec.weight_names) > 1:
            raise ConfigError(f"lora_bias has no bias to go to in {_name(module)}")
        if bias is None and spec.mechanism == "parametrize":
            raise ConfigError(f"lora_bias needs a bias in the base, this {_name(module)} has none")
    if isinstance(module, LoraLayer):
        first = next(iter(module.lora_adapters.values()))
        if first.kind != spec.kind or first.mechanism != spec.mechanism:
            raise ConfigError(
                f"adapted as {first.mechanism}, now it would be {spec.mechanism}: the model was "
                "changed in between. Call remove(model) first"
            )


def largest_rank(module: nn.Module, spec: AdapterSpec) -> int:
    """The rank beyond which an adapter of this layer can express nothing more."""
    smallest = []
    for name in spec.weight_names:
        weight = module._parameters[name]
        assert weight is not None
        outputs, inputs = weight.shape[0], weight[0].numel()
        if spec.kind == "conv_transpose":
            outputs, inputs = weight.shape[1], weight.numel() // weight.shape[1]
        for start, stop in spec.rows or ((0, outputs),):
            smallest.append(
                min((stop - start) // (spec.groups if spec.kind == "conv" else 1), inputs)
            )
    return min(smallest)


def bias_name(spec: AdapterSpec) -> str:
    """The base's bias that belongs to what the adapter changes."""
    return BIAS_OF.get(spec.weight_name, "in_proj_bias")


def _unused_patterns(paths: Sequence[str], config: LoraConfig) -> list[str]:
    """Patterns for rank, alpha or slices that no target hits: a spelling mistake, as a rule."""
    problems = []
    for field in ("rank_pattern", "alpha_pattern", "slices"):
        for key in getattr(config, field):
            if not any(first_match({key: True}, path, False) for path in paths):
                ends = dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)
                problems.append(f"{field}: {key!r} hits no target. {near(key, [*ends, *paths])}")
    return [problem.rstrip() for problem in problems]


def _name(module: nn.Module) -> str:
    return getattr(module, "lora_base_class", type(module)).__name__
