"""Reading files of LoRA, without changing a model: those of the guide, and lora_core's own.

The first code wrote `<module path>.lora_A` and so on with little metadata: there ranks come from
the shapes, alpha from the metadata, and a missing `prompt_weight` is the 0.1 that it never trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.adapters.file import AdapterFile, read_adapter
from lora_core.adapters.match import size_limit
from lora_core.errors import CheckpointError
from lora_core.injection import lora_layers
from lora_core.merged_file import LARGEST_ADAPTER as LARGEST
from lora_core.module_names import clean
from lora_core.tensor_file import read_torch
from scenesplat_lora.network.models import HEAD
from scenesplat_lora.network.prompt_mlp import INITIAL_WEIGHT, NAME

FORMAT = 1
STATE, FACTS = "lora_state_dict", "metadata"
_FACTOR = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_[AB])(?:\.weight)?")

Facts = dict[str, Any]


def read_lora(path: Path, target: nn.Module, lora_alpha: float | None = None) -> AdapterFile:
    """Read a file of LoRA for a model, in lora_core's words and with the file's names of modules.

    Args:
        target: the model, which bounds the file's size. If it has LoRA, its alpha stands in where
            neither the file nor the caller says one.
        lora_alpha: for a file that does not say it.

    Raises:
        CheckpointError: missing, damaged, of a later program, no adapter, or contradicting itself.
    """
    limit = size_limit(target)
    if path.is_dir() or path.suffix == ".safetensors":
        return read_adapter(path, limit)
    content = read_torch(path, limit)
    if not isinstance(content, dict) or STATE not in content:
        return read_adapter(path, limit)
    state, facts = content[STATE], content.get(FACTS) or {}
    _check_content(path, state, facts)
    tensors = _core_names(path, state)
    layers = _layers(path, tensors, facts, target, lora_alpha)
    for layer in layers:
        if (bias := tensors.pop(f"{layer}.bias", None)) is not None:
            tensors[f"{layer}.base_layer.bias"] = bias
    scalar = f".{NAME}.prompt_weight"
    whole = [name.removesuffix(".prompt_weight") for name in tensors if name.endswith(scalar)]
    config = {
        "peft_type": "LORA",
        "r": max(layer["r"] for layer in layers.values()),
        "lora_alpha": max(layer["alpha"] for layer in layers.values()),
        "target_modules": sorted(layers),
        "modules_to_save": whole + [key.removesuffix(".weight") for key in head_keys(tensors)],
        "bias": facts.get("bias", "none"),
    }
    extra = {"layers": layers, "lora_dropout": facts.get("lora_dropout", 0.0)}
    return AdapterFile(path, config, tensors, facts, extra | {"made": facts.get("made")})


def head_keys(names: Iterable[str]) -> list[str]:
    """The name of the weight [classes, features] of a segmentation head in a file, or nothing."""
    return [name for name in names if re.fullmatch(rf"(?:.+\.)?{HEAD}\.weight", name)]


def head_classes(tensors: Mapping[str, Tensor]) -> int | None:
    """How many classes the head in a file has; None: no head, or no weight of one."""
    for key in head_keys(tensors):
        return len(tensors[key]) if tensors[key].dim() == 2 else None
    return None


class AdapterFacts(NamedTuple):
    """What is asked of an adapter before a model is there.

    Attributes:
        classes: of the segmentation head in it; None: it has none.
        names: of these classes; None: the file does not say them.
        grid_size: metres, voxels that it was trained with; None: not known.
    """

    classes: int | None = None
    names: tuple[str, ...] | None = None
    grid_size: float | None = None


def read_facts(path: str | Path) -> AdapterFacts:
    """Look at an adapter, a file or a folder as PEFT has it.

    Raises:
        CheckpointError: missing, damaged, or no adapter.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        file = read_adapter(path, LARGEST)
        state, facts = file.tensors, file.metadata
    else:
        held: Any = read_torch(path, LARGEST, device="meta")
        held = held if isinstance(held, dict) else {}
        state, facts = held.get(STATE, held.get("tensors")), held.get(FACTS)
    state = state if isinstance(state, dict) else {}
    tensors = {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
    facts = facts if isinstance(facts, dict) else {}
    settings, names = facts.get("settings"), facts.get("classes")
    size = settings.get("data.grid_size") if isinstance(settings, dict) else None
    size = size if isinstance(size, float) and 0 < size < 100 else None
    count = head_classes(tensors)
    known = isinstance(names, list) and len(names) == count
    return AdapterFacts(count, tuple(map(str, names or ())) if known else None, size)


def _check_content(path: Path, state: Any, facts: Any) -> None:
    for name, value in ((STATE, state), (FACTS, facts)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"{path}: {name} is no dictionary with names as keys")
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not any(_FACTOR.fullmatch(name) for name in state):
        found = ", ".join((wrong or list(state))[:5]) or "nothing"
        raise CheckpointError(
            f"{path}: {STATE} must hold tensors `<module path>.lora_A` and `.lora_B`, found {found}"
        )
    version = facts.get("format", FORMAT)
    if type(version) is not int or version > FORMAT:
        raise CheckpointError(
            f"{path} was written as format {version!r:.80}, this program reads up to {FORMAT}: "
            "update scenesplat-lora"
        )


def _core_names(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as lora_core has them: `.lora_A.weight`, `.prompt_mlp.prompt_weight`."""
    names = {name: clean(name) for name in state}
    if all(name.startswith("module.") for name in names.values()):  # saved from DDP
        names = {name: own.removeprefix("module.") for name, own in names.items()}
    tensors: dict[str, Tensor] = {}
    for name, own in names.items():
        factor = _FACTOR.fullmatch(own)
        if factor:
            own = f"{factor['layer']}.{factor['factor']}.weight"
        elif own.endswith(".prompt_weight") and not own.endswith(f".{NAME}.prompt_weight"):
            own = own.removesuffix("prompt_weight") + f"{NAME}.prompt_weight"
        if own in tensors:
            raise CheckpointError(f"{path} holds {own} twice, under two spellings of its name")
        tensors[own] = state[name]
    first = f".{NAME}.0.weight"
    prompts = [name.removesuffix(".0.weight") for name in tensors if name.endswith(first)]
    if not any(f"{prompt}.prompt_weight" in tensors for prompt in prompts):
        scalar = torch.tensor(INITIAL_WEIGHT)
        tensors |= {f"{prompt}.prompt_weight": scalar.clone() for prompt in prompts}
    return tensors


def _layers(
    path: Path,
    tensors: Mapping[str, Tensor],
    facts: Facts,
    target: nn.Module,
    lora_alpha: float | None,
) -> dict[str, Facts]:
    """Layer -> rank and alpha: as the file notes them, else from shapes and the metadata."""
    said = facts.get("lora_alpha")
    if lora_alpha is not None and said is not None and lora_alpha != said:
        raise CheckpointError(f"{path} has lora_alpha {said!r:.80}, not {lora_alpha}: leave it out")
    noted = facts.get("layers")
    if noted is not None:
        _check_notes(path, noted)
        return {clean(name).removeprefix("module."): note for name, note in noted.items()}
    ranks = _ranks(path, tensors)
    claimed = facts.get("r")
    wrong = {layer: rank for layer, rank in ranks.items() if claimed not in (None, rank)}
    if wrong:
        layer = next(iter(wrong))
        raise CheckpointError(
            f"{path}: its metadata say r = {claimed!r:.80}, its tensors r = {wrong[layer]} "
            f"({layer} and {len(wrong) - 1} more): it was put together from two adapters"
        )
    alpha = next((a for a in (lora_alpha, said, _live_alpha(target)) if a is not None), None)
    if alpha is None:
        alpha = max(ranks.values())
        warnings.warn(
            f"{path} does not say its lora_alpha: taken to be its rank, {alpha}. If it was trained "
            "with another one, pass lora_alpha=...",
            stacklevel=5,
        )
    return {layer: {"r": rank, "alpha": alpha} for layer, rank in ranks.items()}


def _check_notes(path: Path, noted: Any) -> None:
    """Whether rank and alpha are written for every layer."""
    notes = list(noted.values()) if isinstance(noted, dict) else []
    fit = [
        isinstance(note, dict)
        and note.keys() == {"r", "alpha"}
        and all(type(value) in (int, float) for value in note.values())
        for note in notes
    ]
    if not notes or not all(fit):
        raise CheckpointError(f"{path}: what its metadata say about layers is unreadable")


def _ranks(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Layer -> rank, from A [r, in] or, where it is missing, B [out, r]."""
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        factor = _FACTOR.fullmatch(name)
        if factor is None:
            continue
        if tensor.dim() != 2:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected 2 axes"
            )
        if factor["factor"] == "lora_A" or factor["layer"] not in ranks:
            ranks[factor["layer"]] = tensor.shape[0 if factor["factor"] == "lora_A" else 1]
    return ranks


def _live_alpha(target: nn.Module) -> float | None:
    """alpha of the LoRA that a model has."""
    for layer in lora_layers(target).values():
        for spec in layer.lora_adapters.values():
            return spec.alpha
    return None
