"""From an adapter file to a model: which layer each tensor belongs to, and the settings behind it.

Everything is checked, and all problems are reported together, before the model is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_core import file_layout, placement
from lora_core.adapters.layout import file_prefix, file_shapes, file_target, full_file_key
from lora_core.adapters.settings import (
    check_settings,
    layer_settings,
    lora_config,
    target_parameter,
)
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError, ConfigError, listing, near
from lora_core.injection import full_keys
from lora_core.mechanisms import kind_of
from lora_core.module_names import is_target, join
from lora_core.targets import resolve

if TYPE_CHECKING:
    from lora_core.adapters.read import AdapterFile

_FACTOR = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<rest>.+))?"
)
HINTS = 10  # names that get a hint; to find one among those of a large model takes 0.1 s
_NUMBERS = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)


@dataclass
class Match:
    """A file laid over a model.

    Attributes:
        config: settings to adapt the model with. plan: live path -> what its adapter will be.
        factors: live path -> `lora_A.weight` and so on -> value.
        full: state-dict key -> value of what was trained in full.
        gaps: what is missing in the file or belongs nowhere; empty unless that is allowed.
    """

    config: LoraConfig
    plan: placement.Plan
    factors: dict[str, dict[str, Tensor]]
    full: dict[str, Tensor]
    gaps: list[str]


def size_limit(model: nn.Module) -> int:
    """Bytes that no file of an adapter of this model needs: checked before anything is read."""
    return 2**26 + 64 * sum(parameter.numel() for parameter in model.parameters())


def match(
    file: AdapterFile,
    model: nn.Module,
    paths: Mapping[str, str],
    lora_alpha: float | None,
    allow_partial: bool = False,
) -> Match:
    """Lay a file over a model.

    Args:
        paths: live path -> path in the file, for every module of the model.
        lora_alpha: for a file without configuration.
        allow_partial: use the complete layers where tensors are missing or belong nowhere.

    Raises:
        CheckpointError: anything that does not fit, with the file, the keys, the nearest names and
            what to do.
    """
    check_settings(file, lora_alpha)
    by_file, rest = _sorted_out(file, paths)
    owners = {file_prefix(model, live, paths): live for live in paths}
    owners |= {path: live for live, path in paths.items()}  # `attn.out_proj` of other programs
    known = [path for path in by_file if path in owners]
    unknown = by_file.keys() - owners.keys()
    gaps = _unknown(unknown, owners, ": no such module in the model")
    if not known:
        raise CheckpointError(
            f"{file.path}: 0 of {len(file.tensors)} adapter tensors match this model. It is the "
            f"adapter of another model, or modules were renamed: load it on its own\n"
            f"{listing(gaps, 5)}"
        )
    factors = {owners[path]: by_file[path] for path in known}
    problems = [
        f"{path}: the file has this module under another name as well"
        for path in known
        if factors[owners[path]] is not by_file[path]
    ]
    gaps += _missing_layers(file, model, paths, set(factors))
    problems += _bad_values(file)
    problems += [
        f"{path}: {type(model.get_submodule(owners[path])).__name__} cannot take an adapter"
        for path in known
        if kind_of(model.get_submodule(owners[path])) is None
    ]
    _refuse(file, problems, gaps, allow_partial)
    config, plan = _placed(file, model, paths, factors, lora_alpha)
    problems = [
        f"{paths[live]}: its weight is also that of another layer in the file; a shared weight has "
        "one adapter"
        for live in factors.keys() - plan.keys()
    ]
    incomplete, more = _incomplete(model, paths, plan, factors)
    gaps += more
    problems += _bad_shapes(model, paths, plan, factors)
    full, more, wrong = _full_tensors(file, model, paths, plan, config, rest)
    gaps += more
    _refuse(file, problems + wrong, gaps, allow_partial)
    if incomplete:
        factors = {live: tensors for live, tensors in factors.items() if live not in incomplete}
        if not factors:
            raise CheckpointError(f"{file.path}: no layer is complete\n{listing(gaps)}")
        config, plan = _placed(file, model, paths, factors, lora_alpha)
    for live, spec in plan.items():
        expected = file_shapes(spec, model.get_submodule(live))
        factors[live] = {suffix: factors[live][suffix] for suffix in expected}
    return Match(config, plan, factors, full, sorted(gaps))


def _placed(
    file: AdapterFile,
    model: nn.Module,
    paths: Mapping[str, str],
    factors: Mapping[str, Mapping[str, Tensor]],
    lora_alpha: float | None,
) -> tuple[LoraConfig, placement.Plan]:
    facts = {
        live: layer_settings(file, model, live, paths, factors[live], lora_alpha)
        for live in factors
    }
    config = lora_config(file, model, paths, facts)
    try:
        return config, placement.plan(model, resolve(model, config), config)
    except ConfigError as error:
        raise CheckpointError(f"{file.path} does not fit this model: {error}") from error


def _refuse(file: AdapterFile, problems: list[str], gaps: list[str], allow_partial: bool) -> None:
    """Report what cannot be used; gaps alone can be, on request."""
    found = sorted(problems) + ([] if allow_partial else sorted(gaps))
    if not found:
        return
    way_out = "\nTo use the layers that fit all the same: allow_partial=True (--allow_partial)"
    if problems:
        way_out = "\nLoad it on the model that it was trained on, or use an earlier adapter"
    raise CheckpointError(f"{file.path} does not fit this model:\n{listing(found)}{way_out}")


def split_key(key: str) -> tuple[str, str] | None:
    """(module path, suffix such as `lora_A.weight`) of an adapter's tensor; None for others.

    Understands the live names of PEFT and lora_core too, which carry the adapter's name, and the
    short `<module>.lora_A` of older programs.
    """
    found = _FACTOR.fullmatch(key)
    if found is None:
        return None
    path, part = found["path"] or "", found["part"]
    if part not in ("lora_A", "lora_B"):
        return path, part
    last = (found["rest"] or "weight").rpartition(".")[2]
    return path, f"{part}.{last if last == 'bias' or last.endswith('weight') else 'weight'}"


def _sorted_out(
    file: AdapterFile, paths: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module path -> suffix -> tensor, other key -> tensor), modules as the file names them."""
    tensors = dict(file.tensors)
    if all(key.startswith("module.") for key in tensors) and "module" not in paths.values():
        tensors = {key.removeprefix("module."): t for key, t in tensors.items()}  # saved from DDP
    factors: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            rest[key] = tensor
            continue
        path, suffix = split
        if suffix in factors.setdefault(path, {}):
            raise CheckpointError(
                f"{file.path} holds {join(path, suffix)} twice: several adapters in one file, or "
                "two spellings of one name"
            )
        factors[path][suffix] = tensor
    if not factors:
        some = ", ".join(list(tensors)[:3]) or "none at all"
        raise CheckpointError(
            f"{file.path} is no LoRA adapter: it holds no lora_A and lora_B tensors, but {some}. "
            "Perhaps it is a base or merged model"
        )
    return factors, rest


def _unknown(names: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """One line for each name in a file that means nothing to the model, the first with a hint."""
    names, known = sorted(names), list(known)
    hints = [near(name, known) for name in names[:HINTS]]
    return [
        f"{name}{what}; {hint}".rstrip("; ")
        for name, hint in zip_longest(names, hints, fillvalue="")
    ]


# Completeness and shapes


def _missing_layers(
    file: AdapterFile, model: nn.Module, paths: Mapping[str, str], found: set[str]
) -> list[str]:
    """Layers that the configuration adapts and for which the file has no tensors."""
    if "layers" in file.extra:
        have = {file_prefix(model, live, paths) for live in found}
        return [f"{path}: its tensors are missing" for path in file.extra["layers"].keys() - have]
    if not file.config:
        return []
    have = {file_target(model, live, paths) for live in found}
    problems = []
    for live, path in paths.items():
        module = model.get_submodule(live)
        named = is_target(file.config, path) and kind_of(module) is not None
        if path not in have and (named or target_parameter(file, module, path)):
            problems.append(f"{path}: its tensors are missing, though the configuration names it")
    return problems


def _bad_values(file: AdapterFile) -> list[str]:
    problems = []
    for key, tensor in file.tensors.items():
        factor = split_key(key) is not None
        if tensor.dtype not in _NUMBERS and (factor or tensor.is_floating_point()):
            problems.append(f"{key}: dtype {tensor.dtype}, expected floating-point numbers")
        elif tensor.is_floating_point():
            # Factors become fp32 in the model; float8 has no isfinite.
            values = tensor.float() if factor or tensor.itemsize == 1 else tensor
            if bad := values.numel() - int(values.isfinite().sum()):
                count = f"{bad} of {values.numel()} values"
                problems.append(f"{key}: {count} are NaN or infinite, its training went wrong")
    return problems


def _incomplete(
    model: nn.Module,
    paths: Mapping[str, str],
    plan: placement.Plan,
    factors: Mapping[str, Mapping[str, Tensor]],
) -> tuple[set[str], list[str]]:
    """Layers of which tensors are missing; what is missing or unexpected in all of them."""
    incomplete, gaps = set(), []
    for live, spec in plan.items():
        prefix = file_prefix(model, live, paths)
        expected = file_shapes(spec, model.get_submodule(live))
        missing = expected.keys() - factors[live].keys()
        if missing:
            incomplete.add(live)
        gaps += [f"{join(prefix, suffix)} is missing" for suffix in missing]
        gaps += [
            f"{join(prefix, suffix)} is unexpected: the configuration asks for "
            + ", ".join(expected)
            for suffix in factors[live].keys() - expected.keys()
        ]
    return incomplete, gaps


def _bad_shapes(
    model: nn.Module,
    paths: Mapping[str, str],
    plan: placement.Plan,
    factors: Mapping[str, Mapping[str, Tensor]],
) -> list[str]:
    """Mis-shaped tensors of the layers, and values where the slices have none."""
    problems = []
    for live, spec in plan.items():
        prefix, tensors = file_prefix(model, live, paths), factors[live]
        expected = file_shapes(spec, model.get_submodule(live))
        wrong = [s for s in expected.keys() & tensors.keys() if tensors[s].shape != expected[s]]
        problems += [
            f"{join(prefix, s)} has shape {tuple(tensors[s].shape)}; rank {spec.file_rank[0]} on "
            f"this layer needs {expected[s]}"
            for s in wrong
        ]
        if spec.rows is not None and expected.keys() == tensors.keys() and not wrong:
            problems += _outside_slices(prefix, spec.r, spec.rows, tensors)
    return problems


def _outside_slices(
    prefix: str, r: int, rows: file_layout.Rows, tensors: Mapping[str, Tensor]
) -> list[str]:
    try:
        file_layout.split_pair(tensors["lora_A.weight"], tensors["lora_B.weight"], r, rows, False)
        file_layout.compact_rows(tensors.get("lora_B.bias", tensors["lora_B.weight"][:, 0]), rows)
    except CheckpointError as error:
        return [f"{prefix}: {error}"]
    return []


# Tensors that were trained in full


def _full_tensors(
    file: AdapterFile,
    model: nn.Module,
    paths: Mapping[str, str],
    plan: placement.Plan,
    config: LoraConfig,
    rest: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(state-dict key -> value, what is missing or unexpected, wrong shapes)."""
    state = model.state_dict()
    expected = {
        full_file_key(model, key, paths, plan): key for key in full_keys(model, config, plan)
    }
    if not file.extra:  # PEFT leaves out in_proj_bias, and keeps copies of the base's values
        rest = {key: t for key, t in rest.items() if ".original_module." not in f".{key}"}
        expected = {k: v for k, v in expected.items() if k in rest or "in_proj_bias" not in k}
    gaps = [f"{key} is missing" for key in expected.keys() - rest.keys()]
    unexpected = rest.keys() - expected.keys()
    what = " is unexpected: nothing of this name was trained in full"
    gaps += _unknown(unexpected, expected, what)
    problems = []
    for key in expected.keys() & rest.keys():
        shape = tuple(state[expected[key]].shape)
        if tuple(rest[key].shape) != shape:
            problems.append(f"{key} has shape {tuple(rest[key].shape)}, this model needs {shape}")
    found = {live: rest[key] for key, live in expected.items() if key in rest}
    return found, gaps, problems
