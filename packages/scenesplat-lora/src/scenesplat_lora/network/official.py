"""Official SceneSplat checkpoints in all their packings: reading, checking, writing back.

The official trainer saves `{"epoch", "state_dict", "optimizer", "scheduler", "scaler",
"best_metric_value"}`, with `module.` before every name when it ran on several GPUs. Backbones also
travel alone, without `backbone.`, and as safetensors. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import base_file
from lora_core.errors import CheckpointError, ConfigError
from lora_core.merged_file import write_tensors
from lora_core.module_names import unwrapped
from lora_core.report import say
from lora_core.state_keys import own_state
from lora_core.tensor_file import atomic_write, plain, read_safetensors, safetensors_bytes
from scenesplat_lora.network.description import KEY, Description, described, network_config
from scenesplat_lora.network.description import RELEASED as RELEASED
from scenesplat_lora.network.description import released_config as released_config
from scenesplat_lora.network.models import HEAD, DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.ptv3 import PointTransformerV3
from scenesplat_lora.network.ptv3_config import PTv3Config
from scenesplat_lora.network.training_archive import read_archive

HEAD_TENSORS = (f"{HEAD}.weight", f"{HEAD}.bias")
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
        description: of its network, where the file says; official ones do not.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor] = field(repr=False)
    spelled: dict[str, str] = field(repr=False)
    epoch: int = 0
    best_metric: float | None = None
    description: Description | None = None


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
        state, content = read_safetensors(path, device=device)
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
    said = described(path, content) if kind in ("safetensors", "checkpoint") else None
    return OfficialFile(path, kind, tensors, spelled, epoch, best, said)


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
    num_classes: int | None = None,
) -> nn.Module:
    """Read a checkpoint into a model.

    Args:
        model: filled in place, a backbone or a model around one, also with adapters on it; None:
            build the one that the file is of.
        config: of a new model; None: what the file says, else the released one of its widths.
        strict: False: tensors that do not fit are named on the screen and left as they are.
        num_classes: make a segmentation model with so many classes of the file's backbone; if the
            file has another number, or is of the language model, with a new head for LoRA to train.

    Returns:
        The model; a new one is in evaluation mode.

    Raises:
        CheckpointError: as `read_official`, `build_model` and `load_state`.
    """
    file = read_official(path)
    if model is None:
        model = build_model(file, config, num_classes).eval()
    if misfit := load_state(model, file, strict):
        say(f"{file.path}: {_described(misfit)}; these stay as they were")
    return model


def build_model(
    file: OfficialFile,
    config: PTv3Config | None = None,
    num_classes: int | None = None,
    new_head: bool = False,
    seed: int = 0,
) -> LangPretrainer | DefaultSegmentorV2:
    """The model that a file is of, with random weights.

    Args:
        num_classes: of a segmentation model; None: as the file has, which may be none.
        new_head: even if the file has as many classes. seed: of a new head.

    Raises:
        CheckpointError: without `config`, a file that is of no released shape and says nothing.
        ConfigError: `num_classes` below 1.
    """
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes}: it must be 1 or more")
    config = config or network_config(file)
    own = head_of(file)
    if own is None and num_classes is None:
        return LangPretrainer(config)
    model = DefaultSegmentorV2(config, own or num_classes or 1)
    said = file.description and file.description.classes
    model.class_names = said if said and len(said) == own else None
    if own is None or new_head or num_classes not in (None, own):
        model.renew_head(num_classes or own or 1, seed)
    return model


def head_of(file: OfficialFile) -> int | None:
    """The number of classes of a file's head; None: it has none."""
    head = file.tensors.get(HEAD_TENSORS[0])
    return None if head is None or head.ndim == 0 else len(head)


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
    if isinstance(model, DefaultSegmentorV2) and model.new_head:
        file, own = without_head(file, own)
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


def without_head(
    file: OfficialFile, own: Mapping[str, Tensor]
) -> tuple[OfficialFile, dict[str, Tensor]]:
    """Both without the tensors of the head, which is not taken from the file."""
    kept = {name: tensor for name, tensor in file.tensors.items() if name not in HEAD_TENSORS}
    return replace(file, tensors=kept), {n: t for n, t in own.items() if n not in HEAD_TENSORS}


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

    The head of a segmentation model may be new: it comes first, as in official files.

    Args:
        file: the base.
        state: of the model or its backbone, without adapters; its dtypes are kept.

    Raises:
        CheckpointError: a tensor that the base has no place for.
    """
    changed = {official_name(name): tensor for name, tensor in state.items()}
    start = "module." if all(n.startswith("module.") for n in file.spelled.values()) else ""
    new = head_of(file) is None and all(name in changed for name in HEAD_TENSORS)
    head = {start + name: changed.pop(name) for name in HEAD_TENSORS} if new else {}
    strangers = [name for name in changed if name not in file.tensors]
    if strangers:
        raise CheckpointError(f"{file.path} has no tensors {base_file.some(strangers)}")
    return head | {
        _WRAPPED.sub(r"\1\2", file.spelled[name]): changed.get(name, tensor)
        for name, tensor in file.tensors.items()
    }


def write_official(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    epoch: int = 0,
    description: Description | None = None,
) -> Path:
    """Write a checkpoint that the official programs load, whole or not at all.

    Args:
        path: `.safetensors` for the bare tensors; otherwise `{"epoch", "state_dict"}`.
        description: of the network, so that the file is read without its settings later.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        if description is None:
            write_tensors(path, tensors)
            return path
        metadata = {"format": "pt", KEY: json.dumps(description.entry())}
        data = safetensors_bytes(tensors, metadata)
        with atomic_write(path) as file:
            file.write(data)
        return path
    # A view would drag its whole storage into the file.
    content: dict[str, Any] = {"epoch": epoch}
    content["state_dict"] = {name: plain(tensor).clone() for name, tensor in tensors.items()}
    if description is not None:
        content[KEY] = description.entry()
    with atomic_write(path) as file:
        torch.save(content, file)
    return path
