"""Merged models as folders: the base with LoRA in its weights, verified before it gets its name.

W' = W + (alpha / r) B A, in float32, rounded once to the dtype of the file. The folder has the
layout of the base: the same files with the same tensors, so that everything that reads the base
reads it. What LoRA does not change keeps its bits.

The base is mapped into memory and not read: of weights in float32 only the changed ones of one
file are in memory at a time, those in half precision are there once more in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn

from isaac_lora import official
from isaac_lora.adapter_files import Adapter, load_adapter
from isaac_lora.lora import ADAPTER
from isaac_lora.merged_folder import refuse_output, write_rest
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core import base_file
from lora_core.errors import CheckpointError, NumericError
from lora_core.injection import full_tensors, lora_layers
from lora_core.merged_file import check_written, exact, move, private_folder, write_tensors
from lora_core.merging import TOLERANCE, merged_state_dict
from lora_core.report import plural
from lora_core.state_keys import changed_names, keys_of_weights, refuse_ties
from lora_core.tensor_file import write_json
from lora_core.weight_files import WeightFiles

Dtype = Literal["keep", "fp32"]
TEXT, SIDE = 12, 2  # of the probe: places of text, and tokens along a side of its picture


@dataclass(frozen=True)
class Merged:
    """A merged model on disk.

    Attributes:
        path: its folder.
        tensors, changed: how many it has, and how many differ from the base's.
        difference: the largest one of a logit of the folder read back and of the live adapted
            model, as a share of the largest logit.
        rounded: whether changed tensors are in half precision.
        left_out: files of the base that were not copied.
    """

    path: Path
    tensors: int
    changed: int
    difference: float
    rounded: bool = False
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.path}: {plural(self.tensors, 'tensor')}, {self.changed} of them changed; read "
            f"back, its logits differ from the adapted model by at most {self.difference:.1e} of "
            "the largest"
        )


def export(
    base: Path,
    adapter: Adapter,
    output: str | Path,
    *,
    dtype: Dtype = "keep",
    allow_partial: bool = False,
    overwrite: bool = False,
) -> Merged:
    """Write a base with an adapter merged into it, and verify what was written.

    Args:
        base: model folder. adapter: trained on it, as `read_adapter` gives it.
        output: folder of the merged model.
        dtype: "keep": that of each tensor in the base. "fp32": exact.
        allow_partial: use what fits of the adapter.
        overwrite: replace what an earlier merge wrote there.

    Raises:
        ConfigError: an `output` that may not be written, or tied weights.
        CheckpointError: a base or adapter that cannot be used, or the output not be written.
        NumericError: values that are not finite, or a folder with other logits than the model.
    """
    output = Path(output)
    refuse_output(output, overwrite, base, adapter.path)
    found = official.find_weights(official.find_model(base))
    model = official.load_model(base)
    load_adapter(model, adapter, depth=adapter.depth, allow_partial=allow_partial)
    refuse_ties(model)
    wanted, tensors = probe(model), mapped(found.files)
    if lost := [name for name in full_tensors(model, ADAPTER) if name not in tensors]:
        raise CheckpointError(f"{base} has no place for what was trained: {base_file.some(lost)}")
    with private_folder(output) as folder:
        trial = folder / "model"
        trial.mkdir()
        changed = [
            kind for path in found.files for kind in _merge_file(model, path, tensors, trial, dtype)
        ]
        _write_settings(base, found, tensors, trial, dtype)
        del model
        difference = _verified(trial, wanted, changed)
        left = write_rest(base, adapter, trial)
        move([trial], [output])
    rounded = any(kind.itemsize < 4 for kind in changed)
    return Merged(output, len(tensors), len(changed), difference, rounded, tuple(left))


# -- the weights -----------------------------------------------------------------------------------


def mapped(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files that were checked before; the system reads what is used."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _merge_file(
    model: IsaacForConditionalGeneration,
    path: Path,
    base: Mapping[str, Tensor],
    folder: Path,
    dtype: Dtype,
) -> list[torch.dtype]:
    """Write one file of the base again, with the adapter in it, and compare what was written.

    Args:
        base: the tensors of all files.

    Returns:
        the dtype of each tensor that has other values now.
    """
    names = list(mapped([path]))
    layers = [keys for keys in _weights_of_layers(model) if not keys.isdisjoint(names)]
    part = {name: base[name] for name in {*names}.union(*layers) & base.keys()}
    if dtype == "fp32":
        part = {name: tensor.float() for name, tensor in part.items()}
    changed = _changed(model, names, part)
    content = {name: changed.get(name, part[name]) for name in names}
    write_tensors(folder / path.name, content)
    check_written(folder / path.name, mapped([folder / path.name]), content)
    return [
        tensor.dtype
        for name, tensor in content.items()
        if not torch.equal(tensor, base[name].to(tensor.dtype))
    ]


def _changed(
    model: IsaacForConditionalGeneration, names: Collection[str], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors among `names` that the adapter changes, in the dtypes of `base`."""
    merged = merged_state_dict(_layers_of(model, set(names)), base)
    found = {name: merged[name] for name in names if merged[name] is not base[name]}
    full = full_tensors(model, ADAPTER)
    return found | {name: full[name].to(base[name].dtype) for name in names if name in full}


def _layers_of(model: nn.Module, names: set[str]) -> nn.Module:
    """A module with those adapted layers of a model alone that change one of these tensors."""
    part = nn.Module()
    for keys in _weights_of_layers(model):
        if names.isdisjoint(keys):
            continue
        for key in keys:  # of all its places, where the head is the embedding
            path = key.rpartition(".")[0]
            _put(part, path, model.get_submodule(path))
    return part


def _weights_of_layers(model: nn.Module) -> Iterator[set[str]]:
    """Yield the names of the tensors that the adapter of each layer changes."""
    keys = keys_of_weights(model)
    for layer in lora_layers(model).values():
        yield {key for name in changed_names(layer) for key in keys[id(layer.lora_raw(name))]}


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the one at a path, with plain modules on the way."""
    *way, last = path.split(".")
    for name in way:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)


def _write_settings(
    base: Path, found: WeightFiles, tensors: Mapping[str, Tensor], folder: Path, dtype: Dtype
) -> None:
    """The settings and the list of shards; as they are, but for another dtype."""
    names = [official.SETTINGS] + ([official.INDEX] if found.index is not None else [])
    for name in names:
        shutil.copyfile(base / name, folder / name)
    if dtype == "keep":
        return
    settings = base_file.read_settings(base / official.SETTINGS)
    named = [name for name in ("dtype", "torch_dtype") if name in settings]
    write_json(folder / official.SETTINGS, settings | dict.fromkeys(named, "float32"))
    if found.index is not None:
        listed = base_file.read_settings(base / official.INDEX)
        about = dict(listed.get("metadata") or {})
        about["total_size"] = 4 * sum(tensor.numel() for tensor in tensors.values())
        write_json(folder / official.INDEX, listed | {"metadata": about})


# -- verifying -------------------------------------------------------------------------------------


def _verified(folder: Path, wanted: Tensor, changed: Sequence[torch.dtype]) -> float:
    """Read the folder back; returns the largest difference of a logit.

    Args:
        wanted: the logits of the live model. changed: dtypes of the merged tensors.

    Raises:
        NumericError: other logits than rounding to these dtypes explains.
    """
    allowed = max([TOLERANCE.get(kind, 0.1) for kind in changed], default=TOLERANCE[torch.float32])
    difference = compare(wanted, probe(official.load_model(folder)))
    if not difference <= allowed:
        raise NumericError(
            f"the merged model gives other logits than the adapted one: {difference:.1e} of the "
            f"largest, allowed {allowed:.0e}. It was not kept"
            + ("; try --dtype fp32" if allowed > TOLERANCE[torch.float32] else "")
        )
    return difference


def compare(wanted: Tensor, found: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-30))


def probe(model: IsaacForConditionalGeneration) -> Tensor:
    """The logits [1, L, vocabulary] of fixed random tokens around a fixed random picture."""
    config, random = model.config, torch.Generator().manual_seed(0)
    vision: Any = config.vision_config  # the configuration has made it an IsaacVisionConfig
    rows = SIDE * config.pixel_shuffle_scale
    image_mask = torch.zeros(1, TEXT + SIDE**2, dtype=torch.bool)
    image_mask[:, 3 : 3 + SIDE**2] = True
    values = vision.num_channels * vision.patch_size**2
    with exact(model):
        out: Tensor = model(
            input_ids=torch.randint(config.vocab_size, image_mask.shape, generator=random),
            image_mask=image_mask,
            patches=torch.randn(rows**2, values, generator=random),
            grids=torch.tensor([[rows, rows]]),
        ).logits
    return out
