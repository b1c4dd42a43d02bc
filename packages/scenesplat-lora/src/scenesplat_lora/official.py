"""Official SceneSplat checkpoints in all their packings: reading, checking, writing back.

The official trainer saves `{"epoch", "state_dict", "optimizer", "scheduler", "scaler",
"best_metric_value"}`, with `module.` before every name when it ran on several GPUs. Backbones also
travel alone, without `backbone.`, and as safetensors. Nothing in a file is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import base_file
from lora_core.errors import CheckpointError
from lora_core.merged_file import write_tensors
from lora_core.module_names import unwrapped
from lora_core.report import say
from lora_core.state_keys import own_state
from lora_core.tensor_file import atomic_write, plain, read_safetensors
from scenesplat_lora.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.ptv3 import PointTransformerV3
from scenesplat_lora.ptv3_config import LANGUAGE, SEGMENTATION, PTv3Config
from scenesplat_lora.training_archive import read_archive

RELEASED = {"language model": LANGUAGE, "segmentation model": SEGMENTATION}
_BACKBONE = "backbone."
_PARTS = ("embedding.", "enc.", "dec.")
# The first LoRA code for SceneSplat put each adapted Linear inside a layer of its own.
_WRAPPED = re.compile(r"((?:attn\.(?:qkv|proj)|mlp\.0\.fc[12]))\.linear(\.(?:weight|bias))$")
_ADAPTER = re.compile(r"\.(?:lora_[AB]|prompt_mlp\..+|prompt_weight)$")


@dataclass(frozen=True)
class OfficialFile:
    """A checkpoint as it lies on disk.

    Attributes:
        path: of the file.
        format: "checkpoint" (`{"state_dict": ...}`), "model" (`{"model": ...}`), "flat" (the bare
            state dict) or "safetensors".
        tensors: under the official names, `backbone.` and `seg_head.`, with their own dtypes.
        spelled: official name -> as the file has it.
        epoch: that the file was saved after; 0 where it does not say.
        best_metric: where the file says.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor] = field(repr=False)
    spelled: dict[str, str] = field(repr=False)
    epoch: int = 0
    best_metric: float | None = None


@dataclass(frozen=True)
class Misfit:
    """What a file and a model do not have in common, by official names."""

    matched: int
    missing: list[str]
    unexpected: list[str]
    other_shape: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.other_shape)


# -- reading -------------------------------------------------------------------------------------


def read_official(path: str | Path, device: str = "cpu") -> OfficialFile:
    """Read a checkpoint of any packing.

    Args:
        device: "cpu", or "meta": names, shapes and dtypes only, without reading the values.

    Raises:
        CheckpointError: missing, damaged, no checkpoint, holding more than tensors and numbers, or
            of another model.
    """
    path = Path(path)
    epoch, best, kind = 0, None, "safetensors"
    if path.suffix == ".safetensors":
        state, _ = read_safetensors(path, device=device)
        state = dict(sorted(state.items()))
    else:
        content = read_archive(path, device)
        state, kind = _state_in(path, content)
        if kind == "checkpoint":
            epoch, best = _progress(content)
    spelled: dict[str, str] = {}
    for name in state:
        official = official_name(name)
        if official in spelled:
            raise CheckpointError(f"{path}: {spelled[official]} and {name} are the same tensor")
        spelled[official] = name
    tensors = {official: state[name] for official, name in spelled.items()}
    if not any(name.startswith(_BACKBONE) for name in tensors):
        first = base_file.some(list(state), 3) or "nothing"
        raise CheckpointError(
            f"{path}: 0 of {len(state)} tensors are of a Point Transformer V3 (it starts with "
            f"{first}): pass a checkpoint of SceneSplat's language or segmentation model"
        )
    return OfficialFile(path, kind, tensors, spelled, epoch, best)


def official_name(name: str) -> str:
    """A tensor's name in the official models: without wrappers, with `backbone.`."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    name = _WRAPPED.sub(r"\1\2", name)
    return _BACKBONE + name if name.startswith(_PARTS) else name


def _state_in(path: Path, content: Any) -> tuple[dict[str, Tensor], str]:
    kind, state = "flat", content
    for key, name in (("state_dict", "checkpoint"), ("model", "model")):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            kind, state = name, content[key]
            break
    if isinstance(content, Mapping) and "lora_state_dict" in content:
        raise CheckpointError(
            f"{path} is a LoRA adapter, not a base model: load it with load_lora_checkpoint"
        )
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
    ):
        entries = content if isinstance(content, Mapping) else {type(content).__name__: None}
        raise CheckpointError(
            f'{path}: expected a state dict, or {{"state_dict": ...}} as the official trainer '
            f"saves it; found: {base_file.some([str(entry)[:80] for entry in entries])}"
        )
    return dict(state), kind


def _progress(content: Mapping[str, Any]) -> tuple[int, float | None]:
    epoch, best = content.get("epoch"), content.get("best_metric_value")
    return (
        epoch if type(epoch) is int else 0,
        float(best) if isinstance(best, int | float) else None,
    )


# -- building ------------------------------------------------------------------------------------


def load_official(
    path: str | Path,
    model: nn.Module | None = None,
    config: PTv3Config | None = None,
    strict: bool = True,
) -> nn.Module:
    """Read a checkpoint into a model.

    Args:
        model: filled in place, a backbone or a model around one, also with adapters on it; None:
            build the one that the file is of.
        config: for a new model of another shape than the released ones.
        strict: False: tensors that do not fit are named on the screen and left as they are.

    Returns:
        The model; a new one is in evaluation mode.

    Raises:
        CheckpointError: as `read_official`, `build_model` and `load_state`.
    """
    file = read_official(path)
    if model is None:
        model = build_model(file, config).eval()
    if misfit := load_state(model, file, strict):
        say(f"{file.path}: {_described(misfit)}; these stay as they were")
    return model


def build_model(
    file: OfficialFile, config: PTv3Config | None = None
) -> LangPretrainer | DefaultSegmentorV2:
    """The model that a file is of, with random weights.

    Raises:
        CheckpointError: without `config`, another shape than the released ones.
    """
    config = config or released_config(file)
    head = file.tensors.get("seg_head.weight")
    return LangPretrainer(config) if head is None else DefaultSegmentorV2(config, len(head))


def released_config(file: OfficialFile) -> PTv3Config:
    """The settings of the released model with the widths and depths of a file.

    Heads, patch sizes and curves leave no trace in tensors, so other shapes cannot be worked out.

    Raises:
        CheckpointError: neither shape, with what the file has.
    """
    found = _widths(file.tensors)
    for config in RELEASED.values():
        if found == {name: getattr(config, name) for name in found}:
            stem = file.tensors[f"{_BACKBONE}embedding.stem.conv.weight"]
            return replace(config, in_channels=stem.shape[-1])
    shape = ", ".join(f"{name} {value}" for name, value in found.items())
    raise CheckpointError(
        f"{file.path}: a Point Transformer V3 of neither released shape ({shape}): pass its "
        "settings, the section model.backbone of its config file"
    )


def _widths(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Depths and widths of the stages, as far as the names are there."""
    stages: dict[str, dict[int, dict[int, int]]] = {"enc": {}, "dec": {}}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"backbone\.(enc|dec)\.\1(\d+)\.block(\d+)\.norm1\.0\.weight", name)
        if place and tensor.ndim == 1:
            side, stage, block = place[1], int(place[2]), int(place[3])
            stages[side].setdefault(stage, {})[block] = len(tensor)
    found: dict[str, tuple[int, ...]] = {}
    for side, blocks in stages.items():
        ordered = [blocks[stage] for stage in sorted(blocks)]
        found[f"{side}_depths"] = tuple(map(len, ordered))
        found[f"{side}_channels"] = tuple(max(widths.values()) for widths in ordered)
    return found


# -- filling a model -----------------------------------------------------------------------------


def load_state(model: nn.Module, file: OfficialFile, strict: bool = True) -> Misfit:
    """Copy a file's tensors into a model, which keeps its device and dtype.

    A backbone alone takes its part of a model's file; adapters on the model are not touched.

    Returns:
        What did not fit; nothing with `strict`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape, or with
            `strict=False` none fits; NaN or infinite values. The model is as it was.
    """
    model = unwrapped(model)
    own = {official_name(name): t for name, t in own_state(model).items()}
    if isinstance(model, PointTransformerV3):
        body = {name: t for name, t in file.tensors.items() if name.startswith(_BACKBONE)}
        file = replace(file, tensors=body)
    misfit = compare(file, own)
    if misfit and (strict or not misfit.matched):
        unexpected = [file.spelled[name] for name in misfit.unexpected]
        adapters = sum(_ADAPTER.search(name) is not None for name in misfit.unexpected)
        base_file.refuse_misfit(
            file.path,
            f"the {type(model).__name__}",
            file.tensors,
            own,
            unexpected,
            hint=f"  {adapters} of them are of a LoRA, which is no part of a base" * bool(adapters),
        )
    skipped = {*misfit.unexpected, *misfit.other_shape}
    fitting = {name: t for name, t in file.tensors.items() if name not in skipped}
    base_file.refuse_nan(file.path, fitting)
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
    return misfit


def compare(file: OfficialFile, own: Mapping[str, Tensor]) -> Misfit:
    """A file beside the tensors of a model, by official names; meta tensors do."""
    missing = [name for name in own if name not in file.tensors]
    unexpected = [name for name in file.tensors if name not in own]
    other = [n for n, t in file.tensors.items() if n in own and own[n].shape != t.shape]
    return Misfit(len(own) - len(missing) - len(other), missing, unexpected, other)


def _described(misfit: Misfit) -> str:
    parts = {
        "missing": misfit.missing,
        "unexpected": misfit.unexpected,
        "of another shape": misfit.other_shape,
    }
    return "; ".join(
        f"{len(names)} {what}: {base_file.some(names)}" for what, names in parts.items() if names
    )


# -- writing back --------------------------------------------------------------------------------


def to_official(file: OfficialFile, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's content with its tensors replaced: same names, order and prefixes.

    Args:
        file: the base.
        state: of the model or its backbone, without adapters; its dtypes are kept.

    Raises:
        CheckpointError: a tensor that the base has no place for.
    """
    changed = {official_name(name): tensor for name, tensor in state.items()}
    strangers = [name for name in changed if name not in file.tensors]
    if strangers:
        raise CheckpointError(f"{file.path} has no tensors {base_file.some(strangers)}")
    return {
        _WRAPPED.sub(r"\1\2", file.spelled[name]): changed.get(name, tensor)
        for name, tensor in file.tensors.items()
    }


def write_official(path: str | Path, tensors: Mapping[str, Tensor], epoch: int = 0) -> Path:
    """Write a checkpoint that the official programs load, whole or not at all.

    Args:
        path: `.safetensors` for the bare tensors; otherwise `{"epoch", "state_dict"}`.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        write_tensors(path, tensors)
        return path
    # A view would drag its whole storage into the file.
    state = {name: plain(tensor).clone() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        torch.save({"epoch": epoch, "state_dict": state}, file)
    return path
