"""Merging: the adapters' effect as part of the base's weights.

Each merged weight is `round(W + sum of c dW)`: the sum in fp32 (or fp64), rounded once to the
weight's own dtype. Everything is computed and checked before the first weight changes, and undoing
restores a kept copy instead of subtracting. A weight that no adapter changes keeps its bits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from lora_core.errors import CheckpointError, ConfigError, NumericError, near
from lora_core.injection import full_tensors, lora_layers
from lora_core.layers import LoraLayer
from lora_core.module_names import clean, join, unwrapped
from lora_core.state_keys import changed_names, keys_of_weights, own_state, refuse_ties

NOISE_LIMIT = 0.1  # share of the adapters' effect that rounding may take without a warning
UNCHANGED_LIMIT = 0.01  # share of the values that should change and may stay, without a warning
# Elements of a weight that are looked at at once, on the CPU and elsewhere.
CPU_BLOCK, DEVICE_BLOCK = 1 << 15, 1 << 25
# How much of a probe's largest output merging may change: some roundings of the weights' dtype.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class _Rounded:
    """A merged weight in its own dtype, and what rounding did to the adapters' effect on it."""

    tensor: Tensor
    noise: float
    touched: int  # values that the exact sum changes
    unchanged: int  # those of them that rounding left as they were


@dataclass(frozen=True)
class MergeReport:
    """What a merge cost in accuracy.

    Attributes:
        noise: state-dict key -> `|round(W + d) - (W + d)| / |d|` in the Frobenius norm: the share
            of the adapters' effect d that rounding to the weight's dtype replaced by noise.
        unchanged: share of the values with an effect that rounding left as they were.
        output_error: largest change of the probe's output as a share of its largest value; None
            without a probe.
    """

    noise: dict[str, float]
    unchanged: float = 0.0
    output_error: float | None = None

    def __str__(self) -> str:
        key = max(self.noise, key=self.noise.__getitem__)
        text = f"merged {len(self.noise)} weights, rounding noise {self.noise[key]:.1e} at {key}"
        if self.unchanged:
            text += f", {self.unchanged:.1%} of the values unchanged by rounding"
        if self.output_error is None:
            return text
        return f"{text}, largest output error {self.output_error:.1e}"


def merge(
    model: nn.Module,
    probe: Callable[[nn.Module], Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    keep: bool = True,
    untie: bool = False,
) -> MergeReport:
    """Put the active adapters into the base's weights, in place; `forward` then adds nothing.

    Args:
        probe: computes an output of the model; called before and after in evaluation mode, to
            measure and bound what merging changed.
        dtype: of the sum before it is rounded: fp32 or fp64.
        keep: hold a copy of the old weights in main memory for `unmerge`. Without it the merge is
            for good, and `remove(model)` leaves a plain model with the merged weights.
        untie: give a weight that is shared with unadapted layers a storage of its own first.

    Raises:
        ConfigError: nothing to merge, merged already, sharded, or tied weights without `untie`.
        NumericError: a value that is not finite or does not fit the dtype, or a probe that
            changed too much. The model is as it was.
    """
    model = unwrapped(model)
    layers = _mergeable(model)
    if not untie:
        refuse_ties(model)
    before = None if probe is None else _output(model, probe)
    plan = {}
    for path, layer in layers.items():
        own = {name: layer.lora_raw(name) for name in changed_names(layer)}
        plan[path] = _merged(path, layer, layer.lora_active, dtype, own)
    for path, parts in plan.items():
        _apply(layers[path], {name: part.tensor for name, part in parts.items()}, untie)
    report = _report(plan)
    if probe is not None and before is not None:
        report = replace(report, output_error=_difference(before, _output(model, probe)))
        _refuse_drift(model, report, plan)
    if not keep:
        for layer in layers.values():
            layer.lora_kept = None
    _warn(report)
    return report


def unmerge(model: nn.Module) -> None:
    """Give every merged weight its old bits back.

    Raises:
        ConfigError: nothing is merged, or it was merged with `keep=False`.
    """
    layers = [layer for layer in lora_layers(model).values() if layer.lora_merged]
    if not layers:
        raise ConfigError("nothing is merged: call merge(model) first")
    if any(layer.lora_kept is None for layer in layers):
        raise ConfigError("merged without a copy of the old weights: load the base again instead")
    for layer in layers:
        for name, kept in (layer.lora_kept or {}).items():
            if isinstance(kept, nn.Parameter):
                layer._parameters[name] = kept  # tied again
            else:
                _write(layer.lora_raw(name), kept)
        layer.lora_merged, layer.lora_kept = (), None


def merged_state_dict(
    model: nn.Module,
    base: Mapping[str, Tensor] | None = None,
    rename: Callable[[str], str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    untie: bool = False,
) -> dict[str, Tensor]:
    """The model with its active adapters merged, as a new state dict with the base's keys.

    The live model stays as it is, and tensors that nothing changed are the same objects as before.

    Args:
        base: the tensors of the original checkpoint file. The result then has its keys, order and
            dtypes, and the adapters are merged into its values, which are often more exact than
            the model's own, rounded ones.
        rename: state-dict key of the model -> key in `base`.
        dtype: as for `merge`.
        untie: accept that a weight which unadapted layers share becomes another one under its key.

    Raises:
        CheckpointError: a changed tensor is not in `base`, or has another shape there.
        ConfigError, NumericError: as for `merge`.
    """
    model = unwrapped(model)
    if not untie:
        refuse_ties(model)
    layers = lora_layers(model)
    _refuse_shards(layers)
    own = own_state(model)
    result = dict(own if base is None else base)
    in_result = rename if rename and base is not None else str
    full = [clean(key) for key in _trained_in_full(model, layers)]
    changed = {in_result(key): own[key].clone() for key in full}  # training may change them again
    keys_by_weight = keys_of_weights(model)
    for key, tensor in changed.items():
        if not tensor.isfinite().all():
            raise NumericError(f"{key}, trained in full, holds NaN or infinite values")
    plan: dict[str, dict[str, _Rounded]] = {}
    for path, layer in layers.items():
        adapters = layer.lora_merged or tuple(layer.lora_active)
        places = {}  # a weight that the model has under several keys may have one in the file
        for name in changed_names(layer, adapters):
            keys = [in_result(key) for key in keys_by_weight[id(layer.lora_raw(name))]]
            places[name] = [key for key in keys if key in result] or keys[:1]
        if base is None and layer.lora_merged:
            tensors = {name: layer.lora_raw(name).detach().clone() for name in places}
        else:
            into = {n: _like(result, keys[0], layer.lora_raw(n)) for n, keys in places.items()}
            plan[path] = _merged(path, layer, adapters, dtype, into)
            tensors = {name: part.tensor for name, part in plan[path].items()}
        for name, tensor in tensors.items():
            changed |= dict.fromkeys(places[name], tensor)
    for key, tensor in changed.items():
        old = _like(result, key, tensor)
        result[key] = tensor.to(old.device, old.dtype)
    _warn(_report(plan))
    return result


def deltas(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """State-dict key -> what the active adapters together add to an unmerged model's weight.

    Biases are among them where B has one, modules that were trained in full are not.
    """
    found: dict[str, Tensor] = {}
    for path, layer in lora_layers(model).items():
        for name, merged in layer.lora_merged_weights(dtype=torch.float64).items():
            change = merged - layer.lora_raw(name).detach().to(merged)
            found[join(clean(path), name)] = change.to(dtype)
    return found


# Checks


def _mergeable(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if any(layer.lora_merged for layer in layers.values()):
        raise ConfigError("the adapters are merged already: call unmerge(model) first")
    active = {path: layer for path, layer in layers.items() if layer.lora_active}
    if not active:
        raise ConfigError(
            "nothing to merge: the model has no adapter"
            if not layers
            else "nothing to merge: no adapter is active, call set_adapters(model, ...) first"
        )
    _refuse_shards(active)
    return active


def _refuse_shards(layers: Mapping[str, LoraLayer]) -> None:
    for layer in layers.values():
        if any(hasattr(parameter, "full_tensor") for parameter in layer.parameters()):
            raise ConfigError(
                "the weights are sharded: save the adapter, load it in one process, merge there"
            )


def _refuse_drift(
    model: nn.Module, report: MergeReport, plan: Mapping[str, Mapping[str, _Rounded]]
) -> None:
    """Undo the merge if the probe's output changed by more than rounding explains."""
    dtypes = {part.tensor.dtype for parts in plan.values() for part in parts.values()}
    bound = max(TOLERANCE.get(dtype, 0.1) for dtype in dtypes)
    if report.output_error is not None and not report.output_error <= bound:  # NaN counts too
        unmerge(model)
        raise NumericError(
            f"merging changed the probe's output by {report.output_error:.1e} of its largest "
            f"value, allowed {bound:.0e}; nothing was merged. Merge into an fp32 base"
        )


def _report(plan: Mapping[str, Mapping[str, _Rounded]]) -> MergeReport:
    found = {
        join(clean(path), name): part
        for path, parts in plan.items()
        for name, part in parts.items()
    }
    touched = sum(part.touched for part in found.values())
    unchanged = sum(part.unchanged for part in found.values())
    noise = {key: part.noise for key, part in found.items()}
    return MergeReport(noise, unchanged / touched if touched else 0.0)


def _warn(report: MergeReport) -> None:
    loud = {key: value for key, value in report.noise.items() if value > NOISE_LIMIT}
    problems = []
    if loud:
        key = max(loud, key=loud.__getitem__)
        problems.append(
            f"rounding took a large part of the adapters' effect in {len(loud)} of "
            f"{len(report.noise)} merged weights ({loud[key]:.0%} at {key})"
        )
    if report.unchanged > UNCHANGED_LIMIT:
        problems.append(
            f"{report.unchanged:.1%} of the values that the adapters change are as before, since "
            "the change is smaller than the dtype's precision"
        )
    if problems:
        text = "; ".join(problems)
        warnings.warn(f"{text}: merge into an fp32 base to keep it", stacklevel=3)


# Computing


def _merged(
    path: str,
    layer: LoraLayer,
    adapters: Iterable[str],
    dtype: torch.dtype,
    base: Mapping[str, Tensor],
) -> dict[str, _Rounded]:
    """`round(W + sum of c dW)` of one layer by parameter name, checked.

    `base` has the W by parameter name.
    """
    exact = layer.lora_merged_weights(list(adapters), dtype, base)
    return {
        name: _rounded(join(path, name), base[name].detach(), value)
        for name, value in exact.items()
    }


def _rounded(key: str, W: Tensor, exact: Tensor) -> _Rounded:
    """The exact sum, which is written to, in W's dtype, and what rounding took of its effect."""
    W, exact = W.to(exact.device), exact.contiguous()
    merged = exact if exact.dtype == W.dtype else torch.empty_like(exact, dtype=W.dtype)
    effect = error = 0.0
    touched = unchanged = 0
    # Some ten passes: in blocks they stay in the processor's cache.
    size = CPU_BLOCK if exact.device.type == "cpu" else DEVICE_BLOCK
    parts = (t.reshape(-1).split(size) for t in (W, exact, merged))
    for old, value, new in zip(*parts, strict=True):  # elements of W, of the sum, of the result
        before, rounded = old.to(value.dtype), value.to(old.dtype)
        same = value == before
        touched += same.numel() - int(same.sum())
        effect += _square(value - before)
        if rounded is not value:
            after = rounded.to(value.dtype)
            error += _square(after - value)
            unchanged += int(((after == before) & ~same).sum())
        # An unchanged weight keeps its very bits: -0 + 0 would give +0.
        torch.where(same, old, rounded, out=new)
    if not math.isfinite(effect + error):
        _refuse_infinite(key, W, exact)
    return _Rounded(merged, (error / effect) ** 0.5 if effect else 0.0, touched, unchanged)


def _square(values: Tensor) -> float:
    """The sum of squares, in fp64."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def _refuse_infinite(key: str, W: Tensor, exact: Tensor) -> NoReturn:
    """Say why a merged weight is not finite."""
    if not W.isfinite().all():
        raise NumericError(f"{key}: the base's weight holds NaN or infinite values already")
    if not exact.isfinite().all():
        raise NumericError(
            f"{key}: the adapter holds NaN or infinite values; nothing was merged. Use an earlier "
            "checkpoint of the training"
        )
    raise NumericError(
        f"{key}: merged values up to {exact.abs().max():.3g} do not fit {W.dtype}; nothing "
        "was merged. Merge into an fp32 or bf16 base"
    )


@torch.no_grad()
def _apply(layer: LoraLayer, tensors: Mapping[str, Tensor], untie: bool) -> None:
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        raw = layer.lora_raw(name)
        if untie:
            kept[name] = raw
            layer._parameters[name] = nn.Parameter(tensor.to(raw.device), raw.requires_grad)
        else:
            kept[name] = raw.detach().to("cpu", copy=True)
            _write(raw, tensor)
    layer.lora_merged, layer.lora_kept = tuple(layer.lora_active), kept


@torch.no_grad()
def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


@torch.no_grad()
def _output(model: nn.Module, probe: Callable[[nn.Module], Tensor]) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return probe(model).detach().double().clone()
    finally:
        for module, training in modes:
            module.training = training


def _difference(before: Tensor, after: Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max().clamp_min(1e-30)).item()


# State dicts


def _trained_in_full(model: nn.Module, layers: Mapping[str, LoraLayer]) -> set[str]:
    """Keys of what the active adapters trained besides their factors."""
    names = {name for layer in layers.values() for name in layer.lora_active}
    return {key for name in names for key in full_tensors(model, name)}


def _like(base: Mapping[str, Tensor], key: str, own: Tensor) -> Tensor:
    """The tensor of a base checkpoint in whose place one of the model's will be."""
    if key not in base:
        hint = near(key, base)
        raise CheckpointError(f"the base checkpoint has no {key}{hint and '; ' + hint}")
    found = base[key]
    if found.shape != own.shape:
        raise CheckpointError(
            f"{key} has shape {tuple(found.shape)} in the base checkpoint, "
            f"{tuple(own.shape)} in the model: this is another base"
        )
    if own.is_floating_point() and not (found.is_floating_point() and found.itemsize > 1):
        raise CheckpointError(
            f"{key} is quantised ({found.dtype}) in the base checkpoint: merge into the "
            "full-precision checkpoint that it was made from, and quantise the result"
        )
    return found
