"""From an adapter file to a model: which layer each tensor belongs to, and the settings behind it.

Everything is checked, and all problems are reported together, before the model is touched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_core import file_layout, placement
from lora_core.adapter_layout import file_prefix, file_shapes, file_target, full_file_key
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError, ConfigError, listing, near
from lora_core.inject import _full_keys
from lora_core.mechanisms import kind_of
from lora_core.module_names import exactly, first_match, is_target, join, only
from lora_core.targets import resolve

if TYPE_CHECKING:
    from lora_core.adapter_file import AdapterFile

_FACTOR = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<rest>.+))?"
)
# Fields of PEFT's configuration that need nothing beyond what LoraConfig says, whatever they hold.
_UNDERSTOOD = frozenset(
    {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"}
    | {"ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode"}
    | {"init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"}
    | {"lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save"}
    | {"peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"}
    | {"runtime_config", "target_modules", "target_parameters", "task_type", "use_dora"}
    | {"use_rslora"}
)
_TYPES: dict[str, tuple[type, ...]] = {
    "alpha_pattern": (dict,),
    "exclude_modules": (list, str),
    "layers_pattern": (list, str),
    "modules_to_save": (list,),
    "rank_pattern": (dict,),
    "target_modules": (list, str),
    "target_parameters": (list,),
}
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

Facts = dict[str, Any]  # of one layer: see adapter_layout.layer_facts


@dataclass
class Match:
    """A file laid over a model.

    Attributes:
        config: settings to adapt the model with. plan: live path -> what its adapter will be.
        factors: live path -> `lora_A.weight` and so on -> value.
        full: state-dict key -> value of what was trained in full.
    """

    config: LoraConfig
    plan: placement.Plan
    factors: dict[str, dict[str, Tensor]]
    full: dict[str, Tensor]


def match(
    file: AdapterFile, model: nn.Module, paths: Mapping[str, str], lora_alpha: float | None
) -> Match:
    """Lay a file over a model.

    Args:
        paths: live path -> path in the file, for every module of the model.
        lora_alpha: for a file without configuration.

    Raises:
        CheckpointError: anything that does not fit, with the file, the keys, the nearest names and
            what to do.
    """
    _check_settings(file, lora_alpha)
    by_file, rest = _sorted_out(file, paths)
    owners = {file_prefix(model, live, paths): live for live in paths}
    owners |= {path: live for live, path in paths.items()}  # `attn.out_proj` of other programs
    known = by_file.keys() & owners.keys()
    problems = [
        f"{path}: no such module in the model; {near(path, owners)}".rstrip("; ")
        for path in by_file
        if path not in known
    ]
    if not known:
        raise CheckpointError(
            f"{file.path}: 0 of {len(file.tensors)} adapter tensors match this model. It is the "
            f"adapter of another model, or modules were renamed\n{listing(problems, 5)}"
        )
    factors = {owners[path]: by_file[path] for path in known}
    if len(factors) < len(known):
        problems.append("two names in the file are one module of the model")
    problems += _missing_layers(file, model, paths, set(factors)) + _bad_values(file)
    problems += [
        f"{path}: {type(model.get_submodule(owners[path])).__name__} cannot take an adapter"
        for path in known
        if kind_of(model.get_submodule(owners[path])) is None
    ]
    _refuse(file, problems)
    facts = {live: _facts(file, model, live, paths, factors[live], lora_alpha) for live in factors}
    config = _lora_config(file, model, paths, facts)
    try:
        plan = placement.plan(model, resolve(model, config), config)
    except ConfigError as error:
        raise CheckpointError(f"{file.path} does not fit this model: {error}") from error
    problems = _bad_factors(file, model, paths, plan, factors)
    full, more = _full_tensors(file, model, paths, plan, config, rest)
    _refuse(file, problems + more)
    return Match(config, plan, factors, full)


def _refuse(file: AdapterFile, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{file.path} does not fit this model:\n{listing(problems)}")


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


# Settings


def _check_settings(file: AdapterFile, lora_alpha: float | None) -> None:
    config = file.config
    wrote = f" (written by PEFT {config.get('peft_version', 'of unknown version')})"
    if not config:
        if lora_alpha is None:
            raise CheckpointError(
                f"{file.path} is a bare dict of tensors without lora_alpha, and the scale cannot "
                "be guessed: pass lora_alpha=..., the value it was trained with"
            )
        return
    if lora_alpha is not None and lora_alpha != config.get("lora_alpha"):
        raise CheckpointError(
            f"{file.path} has lora_alpha {config.get('lora_alpha')}, not {lora_alpha}: leave it out"
        )
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise CheckpointError(f"{file.path} is an adapter of type {kind!r}, expected 'LORA'{wrote}")
    for name in ("r", "lora_alpha"):
        if name not in config:
            raise CheckpointError(f"{file.path}: its configuration has no {name}{wrote}")
    for name, types in _TYPES.items():
        _check_patterns(file, name, config.get(name) or types[0](), types)
    beyond = [key for key, value in config.items() if value and key not in _UNDERSTOOD]
    if beyond:
        raise CheckpointError(
            f"{file.path} uses {', '.join(sorted(beyond))}, which lora_core does not know{wrote}"
        )
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{file.path}: init_lora_weights {config['init_lora_weights']!r} changed the base it "
            "was trained on. Convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _check_patterns(file: AdapterFile, name: str, value: Any, types: tuple[type, ...]) -> None:
    entries = (
        [value] if isinstance(value, str) else list(value) if isinstance(value, types) else [0]
    )
    if not all(isinstance(entry, str) for entry in entries):
        kinds = " or ".join(kind.__name__ for kind in types)
        raise CheckpointError(f"{file.path}: {name} is {value!r}, expected a {kinds} of names")
    for entry in entries:
        try:
            re.compile(entry)
        except re.error as error:
            raise CheckpointError(f"{file.path}: bad pattern in {name}: {error}") from error


def _facts(
    file: AdapterFile,
    model: nn.Module,
    live: str,
    paths: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    lora_alpha: float | None,
) -> Facts:
    """Rank and alpha of one layer, and where we wrote the file its slices and weights."""
    own = file.extra.get("layers", {}).get(file_prefix(model, live, paths))
    if own is not None:
        if not isinstance(own, dict) or not {"r", "alpha"} <= own.keys():
            raise CheckpointError(f"{file.path}: what it says about {live} is unreadable")
        return own
    if not file.config:
        up = next((t for suffix, t in tensors.items() if "_B" in suffix and t.dim() > 1), None)
        return {"r": 0 if up is None else up.shape[1], "alpha": lora_alpha}
    name = file_target(model, live, paths)
    name = _target_parameter(file, model.get_submodule(live), name) or name
    return {
        "r": first_match(file.config.get("rank_pattern") or {}, name, file.config["r"]),
        "alpha": first_match(
            file.config.get("alpha_pattern") or {}, name, file.config["lora_alpha"]
        ),
    }


def _target_parameter(file: AdapterFile, module: nn.Module, path: str) -> str | None:
    """The full name of the parameter of a module that PEFT adapts on its own."""
    wanted = tuple(f".{target}" for target in file.config.get("target_parameters") or [])
    names = [join(path, name) for name in module._parameters]
    return next((name for name in names if f".{name}".endswith(wanted)), None)


def _lora_config(
    file: AdapterFile, model: nn.Module, paths: Mapping[str, str], facts: Mapping[str, Facts]
) -> LoraConfig:
    """Settings that adapt exactly the layers of the file, each as it was."""
    unchanged = [
        join(live, "out_proj")
        for live in facts
        if isinstance(model.get_submodule(live), nn.MultiheadAttention)
        and join(live, "out_proj") not in facts
    ]
    ranks = {live: fact["r"] for live, fact in facts.items()}
    alphas = {live: fact["alpha"] for live, fact in facts.items()}
    config = file.config
    try:
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return LoraConfig(
            target_modules=only(facts),
            exclude_modules=only(unchanged) if unchanged else None,
            r=r,
            lora_alpha=alpha,
            # All or none: an out_proj without a pattern of its own follows its attention layer.
            rank_pattern={exactly(k): v for k, v in ranks.items() if len({*ranks.values()}) > 1},
            alpha_pattern={exactly(k): v for k, v in alphas.items() if len({*alphas.values()}) > 1},
            slices={
                exactly(live): _slices(model.get_submodule(live), fact)
                for live, fact in facts.items()
                if "slices" in fact or "weights" in fact
            },
            lora_dropout=file.extra.get("lora_dropout", config.get("lora_dropout", 0.0)),
            modules_to_save=[f"re:{re.escape(live)}" for live in _saved(file, paths)],
            bias=config.get("bias", "none"),
            lora_bias=config.get("lora_bias", False),
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            freeze_A=file.extra.get("freeze_A", False),
        )
    except (ValueError, TypeError) as error:  # ConfigError is a ValueError
        raise CheckpointError(f"{file.path}: unusable configuration: {error}") from error


def _slices(module: nn.Module, facts: Facts) -> Slices:
    """The slices of one layer, with names for the rows between them."""
    if "slices" not in facts:  # separate query, key and value weights, of which some are adapted
        return Slices(use=tuple(name[0] for name in facts["weights"]))
    weight = module._parameters["weight" if "weight" in module._parameters else "in_proj_weight"]
    rows = 0 if weight is None else weight.shape[0]
    names, sizes, end = [], [], 0
    for name, start, stop in [*sorted(facts["slices"], key=lambda part: part[1]), ("", rows, rows)]:
        if start > end:
            names.append(f"rows_{end}")
            sizes.append(start - end)
        if name:
            names.append(name)
            sizes.append(stop - start)
        end = stop
    return Slices(tuple(names), tuple(name for name, _, _ in facts["slices"]), tuple(sizes))


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
        if path not in have and (named or _target_parameter(file, module, path)):
            problems.append(f"{path}: its tensors are missing, though the configuration names it")
    return problems


def _bad_values(file: AdapterFile) -> list[str]:
    problems = []
    for key, tensor in file.tensors.items():
        if split_key(key) and not tensor.is_floating_point():
            problems.append(f"{key}: dtype {tensor.dtype}, expected floating-point numbers")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            problems.append(f"{key}: {bad} values are NaN or infinite, its training went wrong")
    return problems


def _bad_factors(
    file: AdapterFile,
    model: nn.Module,
    paths: Mapping[str, str],
    plan: placement.Plan,
    factors: Mapping[str, Mapping[str, Tensor]],
) -> list[str]:
    """Missing, unexpected and mis-shaped tensors of the layers."""
    problems = []
    for live, spec in plan.items():
        prefix, tensors = file_prefix(model, live, paths), factors[live]
        expected = file_shapes(spec, model.get_submodule(live))
        problems += [f"{join(prefix, s)} is missing" for s in expected.keys() - tensors.keys()]
        problems += [
            f"{join(prefix, s)} is unexpected: the configuration asks for {', '.join(expected)}"
            for s in tensors.keys() - expected.keys()
        ]
        wrong = [s for s in expected.keys() & tensors.keys() if tensors[s].shape != expected[s]]
        problems += [
            f"{join(prefix, s)} has shape {tuple(tensors[s].shape)}; rank {spec.file_rank[0]} on "
            f"this layer needs {expected[s]}"
            for s in wrong
        ]
        if spec.rows is not None and expected.keys() == tensors.keys() and not wrong:
            problems += _outside_slices(prefix, spec.r, spec.rows, tensors)
    return sorted(problems)


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


def _saved(file: AdapterFile, paths: Mapping[str, str]) -> list[str]:
    """Live paths of modules_to_save. PEFT takes every module whose name ends with an entry."""
    entries = file.config.get("modules_to_save") or []
    if file.extra:
        return [live for live, path in paths.items() if path in entries]
    return [live for live, path in paths.items() if path.endswith(tuple(entries)) and live]


def _full_tensors(
    file: AdapterFile,
    model: nn.Module,
    paths: Mapping[str, str],
    plan: placement.Plan,
    config: LoraConfig,
    rest: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """(state-dict key -> value, problems)."""
    state = model.state_dict()
    expected = {
        full_file_key(model, key, paths, plan): key for key in _full_keys(model, config, plan)
    }
    if not file.extra:  # PEFT leaves out in_proj_bias, and keeps copies of the base's values
        rest = {key: t for key, t in rest.items() if ".original_module." not in f".{key}"}
        expected = {k: v for k, v in expected.items() if k in rest or k.endswith(".bias")}
    problems = [f"{key} is missing" for key in expected.keys() - rest.keys()]
    for key in rest.keys() - expected.keys():
        hint = near(key, expected)
        problems.append(f"{key} is unexpected: nothing of this name was trained in full; {hint}")
    for key in expected.keys() & rest.keys():
        shape = tuple(state[expected[key]].shape)
        if tuple(rest[key].shape) != shape:
            problems.append(f"{key} has shape {tuple(rest[key].shape)}, this model needs {shape}")
    found = {live: rest[key] for key, live in expected.items() if key in rest}
    return found, sorted(problem.rstrip("; ") for problem in problems)
