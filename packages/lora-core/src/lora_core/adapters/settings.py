"""From the configuration in an adapter file to the settings that adapt a model like it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_core.adapters.layout import file_prefix, file_target
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError
from lora_core.module_names import exactly, first_match, join, only

if TYPE_CHECKING:
    from lora_core.adapters.read import AdapterFile

Facts = dict[str, Any]  # of one layer: rank, alpha, slices; see adapter_layout.layer_facts

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
# Fields that hold names or patterns, and whether one string will do in place of several.
_PATTERNS = {
    "alpha_pattern": False,
    "exclude_modules": True,
    "layers_pattern": True,
    "modules_to_save": False,
    "rank_pattern": False,
    "target_modules": True,
    "target_parameters": False,
}
_FLAGS = ("lora_bias", "use_dora", "use_rslora", "freeze_A")
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_settings(file: AdapterFile, lora_alpha: float | None) -> None:
    """Refuse a configuration that lacks something, or asks for what we cannot do.

    Raises:
        CheckpointError: naming the file, the field, and the version that wrote it.
    """
    config, wrote = file.config, written_by(file)
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
        kind = _short(config.get("peft_type"))
        raise CheckpointError(
            f"{file.path} is an adapter of type {kind}{wrote}, expected 'LORA': only LoRA can be "
            "loaded here"
        )
    for name in ("r", "lora_alpha"):
        if name not in config:
            raise CheckpointError(
                f"{file.path}: its configuration has no {name}{wrote}: copy its files again"
            )
    flags = {name: (config | file.extra).get(name) for name in _FLAGS}
    for name, value in flags.items():
        if not isinstance(value or False, bool):  # any text would count as true
            raise CheckpointError(
                f"{file.path}: {name} is {_short(value)}, expected true or false{wrote}"
            )
    for name, one_will_do in _PATTERNS.items():
        _check_patterns(file, name, one_will_do)
    beyond = [key for key, value in config.items() if value and key not in _UNDERSTOOD]
    if beyond:
        raise CheckpointError(
            f"{file.path} uses {', '.join(sorted(beyond)):.200}{wrote}, which lora_core does not "
            "know: update lora-core, or save the adapter without it"
        )
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{file.path}: init_lora_weights {_short(config['init_lora_weights'])} changed the "
            "base it was trained on. Convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def written_by(file: AdapterFile) -> str:
    """The program that wrote a file, as the end of a sentence."""
    made = file.extra.get("made")
    if isinstance(made, dict) and "lora-core" in made:
        return f" (written by lora-core {made['lora-core']!s:.40})"
    return f" (written by PEFT {file.config.get('peft_version', 'of unknown version')!s:.40})"


def _short(value: object) -> str:
    """A value of a file, which may be of any length, for a message."""
    return f"{value!r:.100}"


def _check_patterns(file: AdapterFile, name: str, one_will_do: bool) -> None:
    value = file.config.get(name) or []
    if isinstance(value, str) and one_will_do:
        value = [value]
    wanted = dict if name.endswith("_pattern") and not one_will_do else list
    if value and (not isinstance(value, wanted) or not all(isinstance(v, str) for v in value)):
        raise CheckpointError(
            f"{file.path}: {name} is {_short(value)}, expected a {wanted.__name__}"
        )
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{file.path}: bad pattern in {name}: {error}") from error


def layer_settings(
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
    name = target_parameter(file, model.get_submodule(live), name) or name
    return {
        "r": first_match(file.config.get("rank_pattern") or {}, name, file.config["r"]),
        "alpha": first_match(
            file.config.get("alpha_pattern") or {}, name, file.config["lora_alpha"]
        ),
    }


def target_parameter(file: AdapterFile, module: nn.Module, path: str) -> str | None:
    """The full name of the parameter of a module that PEFT adapts on its own."""
    wanted = tuple(f".{target}" for target in file.config.get("target_parameters") or [])
    names = [join(path, name) for name in module._parameters]
    return next((name for name in names if f".{name}".endswith(wanted)), None)


def lora_config(
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
            modules_to_save=[f"re:{re.escape(live)}" for live in saved_modules(file, paths)],
            bias=config.get("bias", "none"),
            lora_bias=config.get("lora_bias", False),
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            freeze_A=file.extra.get("freeze_A", False),
        )
    except (ValueError, TypeError, LookupError) as error:
        # ConfigError is a ValueError; the others come from slices without name, start and end.
        raise CheckpointError(
            f"{file.path}: unusable configuration{written_by(file)}: {error!s:.500}"
        ) from error


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


def saved_modules(file: AdapterFile, paths: Mapping[str, str]) -> list[str]:
    """Live paths of modules_to_save. PEFT takes every module whose name ends with an entry."""
    entries = file.config.get("modules_to_save") or []
    if file.extra:
        return [live for live, path in paths.items() if path in entries]
    return [live for live, path in paths.items() if path.endswith(tuple(entries)) and live]
