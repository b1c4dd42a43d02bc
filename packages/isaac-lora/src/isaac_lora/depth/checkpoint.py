"""Depth-Anything-V2 as it lies on disk, read strictly.

Two forms: one file as its authors publish it (`depth_anything_v2_vitl.pth`), whose size is told
from its tensors, and a folder of transformers (`config.json` and `model.safetensors`). Nothing is
downloaded, and nothing in a file is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isaac_lora.depth.checkpoint_names import current_name, from_original, original_name
from isaac_lora.depth.variants import CUSTOM, VARIANTS, name_of, settings_of
from isaac_lora.json_words import in_json
from lora_core import base_file, preflight
from lora_core.errors import CheckpointError, one_line
from lora_core.tensor_file import read_safetensors, read_torch

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder, the first that is there
WRAPPERS = ("model", "state_dict")  # keys under which training scripts save a state dict
MODULE = "module."  # before each name that DistributedDataParallel saved
_ENCODER_SETTINGS = frozenset(settings_of(VARIANTS[0])["backbone_config"]) | {
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "hidden_act",
    "hidden_dropout_prob",
    "layer_norm_eps",
    "mlp_ratio",
    "num_channels",
    "out_features",
    "qkv_bias",
    "use_mask_token",
    "use_swiglu_ffn",
}
_CLASS_TOKEN = "pretrained.cls_token"
_WHERE_TO_GET = (
    ". Download one, for example with `hf download depth-anything/Depth-Anything-V2-Small "
    "depth_anything_v2_vits.pth --local-dir .` (Apache-2.0; Base and Large are CC-BY-NC-4.0)"
)


@dataclass(frozen=True)
class DepthCheckpoint:
    """A checkpoint that was looked at: its weights are known to fit, and have not been read.

    Attributes:
        path: file or folder. model: its published size, or "custom".
        settings: arguments of transformers' `DepthAnythingConfig`.
        patch: side of a patch in pixels, which divides the input size.
    """

    path: Path
    model: str
    settings: Mapping[str, Any]
    patch: int


def find_depth_checkpoint(
    path: str | Path, settings: Mapping[str, Any] | None = None
) -> DepthCheckpoint:
    """Look at a checkpoint: names and shapes of its tensors, without reading their values.

    Args:
        path: file or folder.
        settings: of an original file of another than the published sizes.

    Raises:
        CheckpointError: missing, damaged, of another model, or tensors that do not fit: the first
            names of all that are missing, unexpected or of another shape.
    """
    place = base_file.find_local(path, where_to_get=_WHERE_TO_GET)
    if place is None:
        raise CheckpointError(
            f"depth checkpoint {path}: no such file or folder, and nothing is downloaded here"
            f"{_WHERE_TO_GET}"
        )
    if place.is_dir():
        found = _of_folder(place)
    else:
        _refuse_other_models(place)
        found = _of_file(place, settings)
    _matched(found, device="meta")
    return found


def read_weights(checkpoint: DepthCheckpoint) -> dict[str, Tensor]:
    """The tensors under the names of transformers 5, float32, on the CPU.

    Raises:
        CheckpointError: damaged, other tensors than the model has, or values that are not finite.
    """
    tensors = _matched(checkpoint, device="cpu")
    base_file.refuse_nan(checkpoint.path, tensors)
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def empty_network(checkpoint: DepthCheckpoint) -> DepthAnythingForDepthEstimation:
    """The network without values, on the meta device.

    Raises:
        CheckpointError: impossible settings.
        ConfigError: a torchvision that does not work, over which transformers would stumble.
    """
    preflight.torchvision()
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    try:
        config = DepthAnythingConfig(**checkpoint.settings)
        with torch.device("meta"):
            return DepthAnythingForDepthEstimation(config)
    except Exception as error:  # transformers has no class of its own for bad settings
        raise CheckpointError(
            f"{checkpoint.path}: no possible settings: {one_line(str(error))[:200]}"
        ) from error


# -- the original's file ---------------------------------------------------------------------------


def _of_file(path: Path, settings: Mapping[str, Any] | None) -> DepthCheckpoint:
    if settings is None:
        settings = _published(path)
    return DepthCheckpoint(path, name_of(settings), settings, _patch(path, settings))


def _published(path: Path) -> dict[str, Any]:
    """The settings of the published size with this file's class token."""
    tensors = _file_tensors(path, "meta")
    if _CLASS_TOKEN not in tensors:
        raise CheckpointError(f"{path} is no Depth-Anything-V2: {_what_it_may_be(tensors)}")
    width = tensors[_CLASS_TOKEN].shape[-1]
    for variant in VARIANTS:
        if variant.hidden_size == width:
            return settings_of(variant)
    known = ", ".join(f"{variant.hidden_size} ({variant.name})" for variant in VARIANTS)
    raise CheckpointError(
        f"{path}: its encoder has {width} channels, expected {known}. Another size must be a "
        "folder of transformers, whose config.json says the number of heads"
    )


def _what_it_may_be(tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith(("backbone.", "neck.")) for name in tensors):
        return "it has transformers' names: pass the folder that holds it and its config.json"
    if any(name.startswith("blocks.") for name in tensors):
        return "it is a DINOv2 encoder without depth head"
    first = base_file.some(list(tensors), 3) or "nothing"
    return f"expected names such as {_CLASS_TOKEN}, found {one_line(first)}{_WHERE_TO_GET}"


def _refuse_other_models(path: Path) -> None:
    """Models with the same names and shapes, which only their file names tell apart."""
    name = path.name.lower()
    if "metric" in name:
        raise CheckpointError(
            f"{path} by its name is a metric model, whose depth grows with the distance: expected "
            f"the relative one, which grows with nearness{_WHERE_TO_GET}"
        )
    if re.fullmatch(r"depth_anything_vit[sbl]14\.\w+", name):
        raise CheckpointError(
            f"{path} by its name is Depth-Anything V1, which takes other layers of its encoder: "
            f"expected V2{_WHERE_TO_GET}"
        )


def _file_tensors(path: Path, device: str) -> dict[str, Tensor]:
    """The state dict in a file, wrapped or not."""
    content: Any
    if path.suffix == ".safetensors":
        content, _ = read_safetensors(path, device=device)
    else:
        content = read_torch(path, device=device)
        for key in WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(
            f'{path}: expected a state dict, or {{"model": ...}} or {{"state_dict": ...}} with one'
        )
    return {name.removeprefix(MODULE): tensor for name, tensor in sorted(content.items())}


# -- transformers' folder --------------------------------------------------------------------------


def _of_folder(folder: Path) -> DepthCheckpoint:
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    path = folder / "config.json"
    settings = base_file.read_settings(path)
    backbone = settings.get("backbone_config")
    kind = backbone.get("model_type") if isinstance(backbone, dict) else None
    if settings.get("model_type") != "depth_anything" or kind != "dinov2":
        raise CheckpointError(
            f"{path}: expected model_type 'depth_anything' with a 'dinov2' backbone, found "
            f"{in_json(settings.get('model_type'))} with {in_json(kind)}"
        )
    if settings.get("depth_estimation_type", "relative") != "relative":
        raise CheckpointError(
            f"{path}: depth_estimation_type is {in_json(settings['depth_estimation_type'])}: "
            "expected 'relative', whose depth grows with nearness"
        )
    patch = _patch(path, settings)
    return DepthCheckpoint(folder, name_of(settings), _architecture(settings), patch)


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the network is made of; others could name models on the hub."""
    kept = {name: settings[name] for name in settings_of(VARIANTS[0]) if name in settings}
    backbone = {n: v for n, v in settings["backbone_config"].items() if n in _ENCODER_SETTINGS}
    # transformers 4 wrote null where 1 was meant.
    return kept | {"backbone_config": backbone, "max_depth": 1}


def _no_config(folder: Path) -> CheckpointError:
    originals = sorted(path.name for path in folder.glob("*.pth"))
    if len(originals) == 1:
        return CheckpointError(f"{folder} is a folder: pass the file {folder / originals[0]}")
    return base_file.no_model_folder(folder, "config.json and model.safetensors")


def _folder_weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise base_file.no_model_folder(folder, WEIGHTS[0])


def _patch(path: Path, settings: Mapping[str, Any]) -> int:
    """The patch size, on which encoder and head must agree."""
    encoder, head = (
        settings["backbone_config"].get("patch_size", 14),
        settings.get("patch_size", 14),
    )
    if type(encoder) is not int or encoder != head or encoder < 1:
        raise CheckpointError(
            f"{path}: patch_size {in_json(head)} and backbone_config.patch_size "
            f"{in_json(encoder)}: expected the same whole number of pixels"
        )
    return encoder


# -- both ------------------------------------------------------------------------------------------


def _matched(checkpoint: DepthCheckpoint, device: str) -> dict[str, Tensor]:
    """The tensors under the names of transformers 5, all that the network has and no others."""
    wanted = empty_network(checkpoint).state_dict()
    folder = checkpoint.path.is_dir()
    if folder:
        path = _folder_weights(checkpoint.path)
        tensors = {current_name(n): t for n, t in _file_tensors(path, device).items()}
        unexpected = [name for name in tensors if name not in wanted]
    else:
        path = checkpoint.path
        tensors, unexpected = from_original(_file_tensors(path, device), wanted)
    model = "Depth-Anything-V2"
    if checkpoint.model != CUSTOM:
        model += f" {checkpoint.model}"
    spelled = str if folder else original_name
    base_file.refuse_misfit(path, model, tensors, wanted, unexpected, spelled)
    return {name: tensors[name] for name in wanted}
