"""What an adapter will be on each layer, decided before anything changes, and the table of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lora_core import mechanisms
from lora_core.config import LoraConfig, Slices
from lora_core.errors import ConfigError, listing, near
from lora_core.full_training import FullTensor
from lora_core.layers import BIAS_OF, AdapterSpec, LoraLayer, Mechanism
from lora_core.mechanisms import TiedLayer
from lora_core.module_names import first_match
from lora_core.report import table

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
    holders, taken = _holders(model), set()
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
    if tied or isinstance(parent, readers) or not mechanisms.has_own_forward(module):
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
    slices: Slices | None = first_match(config.slices, path, None)  # type: ignore[arg-type]
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


# The table


@dataclass(frozen=True)
class Row:
    """One adapted module, or one that is trained in full."""

    path: str
    kind: str
    mechanism: str
    r: int
    alpha: float
    parameters: int
    note: str = ""

    @property
    def alike(self) -> tuple[object, ...]:
        """What rows that share a line of the table have in common."""
        return (self.kind, self.mechanism, self.r, self.alpha, self.note)


@dataclass(frozen=True)
class Summary:
    """What is adapted. Printing it gives a table in which like neighbours share a line.

    Attributes:
        rows: one per adapted module and adapter, in module order.
        full: state-dict keys that are trained in full -> number of values.
        trainable, total: parameters that require gradients, and all.
    """

    rows: tuple[Row, ...]
    full: dict[str, int]
    trainable: int
    total: int

    def __str__(self) -> str:
        lines = [
            (path, row.kind, row.mechanism, str(row.r), f"{row.alpha:g}", parameters, row.note)
            for path, row, parameters in _grouped(self.rows)
        ]
        lines += [
            (path, "trained in full", "", "", "", count, "")
            for path, count in _by_module(self.full).items()
        ]
        header = ("module", "kind", "mechanism", "r", "alpha", "parameters", "note")
        share = 100 * self.trainable / max(1, self.total)
        return (
            f"{table(header, lines)}\n{len(self.rows)} adapted modules, {self.trainable:,} of "
            f"{self.total:,} parameters train ({share:.2f} %)"
        )


def summarise(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    full: Mapping[str, FullTensor],
    names: Sequence[str],
) -> Summary:
    """The table of the named adapters."""
    rows = []
    for path, layer in layers.items():
        for name in names:
            if name in layer.lora_adapters:
                spec = layer.lora_adapters[name]
                size = sum(p.numel() for p in layer.lora_parameters(name).values())
                note = _note(model, path, spec, name if len(names) > 1 else "")
                base = _name(layer)
                rows.append(Row(path, base, spec.mechanism, spec.r, spec.alpha, size, note))
    shown = {
        key: entry.tensor.numel() for key, entry in full.items() if entry.adapters & set(names)
    }
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, flag in sizes if flag)
    return Summary(tuple(rows), shown, trainable, sum(size for size, _ in sizes))


def _note(model: nn.Module, path: str, spec: AdapterSpec, adapter: str) -> str:
    """What a reader of the table could not guess."""
    notes = [f"adapter {adapter}"] if adapter else []
    if spec.slices:
        notes.append("rows " + " ".join(f"{name}[{a}:{b}]" for name, a, b in spec.slices))
    if len(spec.weight_names) > 1:
        notes.append(" ".join(spec.weight_names))
    if spec.groups > 1:
        notes.append(f"{spec.groups} groups: not for plain PEFT")
    if spec.use_dora:
        notes.append("DoRA")
    if spec.freeze_A:
        notes.append("A frozen")
    if spec.dropout and spec.kind == "embedding":
        notes.append("no dropout on tokens")
    elif spec.dropout and not _called(model, path):
        notes.append("dropout of input channels")
    return ", ".join(notes)


def _called(model: nn.Module, path: str) -> bool:
    """Whether the layer's fast forward, which can drop elements of x, is what the model calls."""
    parent = model.get_submodule(path.rpartition(".")[0])
    fast = isinstance(model.get_submodule(path), mechanisms.WrappedLayer)
    return fast and not isinstance(parent, nn.MultiheadAttention)


def _grouped(rows: Sequence[Row]) -> list[tuple[str, Row, int]]:
    """Rows that differ only in numbers of their paths as one: (path, row, sum of parameters).

    One component after the other, so that `a.{0..2}.b.{0..1}` always means all six.
    """
    groups = {(tuple(row.path.split(".")), row.alike): [row] for row in rows}
    for place in range(max((row.path.count(".") + 1 for row in rows), default=0)):
        merged: dict[tuple[object, ...], list[tuple[tuple[str, ...], list[Row]]]] = {}
        for (parts, alike), group in groups.items():
            number = place < len(parts) and parts[place].isdigit()
            key = (*parts[:place], "#", *parts[place + 1 :]) if number else parts
            merged.setdefault((key, number, alike), []).append((parts, group))
        groups = {}
        for (_, number, alike), members in merged.items():
            parts = members[0][0]
            if number:
                span = _span([int(other[place]) for other, _ in members])
                parts = (*parts[:place], span, *parts[place + 1 :])
            groups[parts, alike] = [row for _, group in members for row in group]
    return [
        (
            ".".join(parts) + (f"  x {len(group)}" if len(group) > 1 else ""),
            group[0],
            sum(row.parameters for row in group),
        )
        for (parts, _), group in groups.items()
    ]


def _span(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "{0..2,5}", [3] -> "3"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(numbers) == 1:
        return str(numbers[0])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return "{" + ",".join(texts) + "}"


def _by_module(full: Mapping[str, int]) -> dict[str, int]:
    """Keys trained in full, added up by module."""
    sums: dict[str, int] = {}
    for key, count in full.items():
        path = key.rpartition(".")[0]
        sums[path] = sums.get(path, 0) + count
    return sums
