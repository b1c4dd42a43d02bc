"""LoRA of a Point Transformer V3 as a file: {"lora_state_dict": name -> tensor, "metadata": dict}.

Names are those of the guide: `<module path>.lora_A` [r, in] and `<module path>.lora_B` [out, r],
with a prompt MLP also `.prompt_mlp.0.weight`, `.prompt_mlp.0.bias`, `.prompt_mlp.2.weight`,
`.prompt_mlp.2.bias` and `.prompt_weight`. Biases that were trained too, and the head of a
segmentation model (`seg_head.weight`, `seg_head.bias`), have their own names.
lora_core's own adapters (folders as PEFT has them, and single files) are read as well.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import injection
from lora_core.adapters import file as core_file
from lora_core.adapters.file import AdapterFile
from lora_core.adapters.layout import number
from lora_core.adapters.origin import base_print, versions
from lora_core.errors import CheckpointError, ConfigError, listing
from lora_core.layers import AdapterSpec, LoraLayer
from lora_core.module_names import Rename, clean, file_paths, join, unwrapped
from lora_core.tensor_file import atomic_write, plain
from scenesplat_lora.adapter_read import FACTS, FORMAT, STATE, head_classes, read_lora
from scenesplat_lora.names import adapted_part, layers_of, prefix, renaming, with_lora
from scenesplat_lora.network import prompt_mlp
from scenesplat_lora.network.frozen_norms import freeze_statistics
from scenesplat_lora.network.models import DefaultSegmentorV2, segmentor_in

ADAPTER = "default"  # name of the one adapter on a model
SAME = ("r", "lora_alpha", "target_modules", "enable_prompt", "encoder_only")
WEIGHT = f".{prompt_mlp.NAME}.prompt_weight"  # name in the model of what files have higher up

# -- writing ---------------------------------------------------------------------------------------


def save_lora_checkpoint(
    model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write LoRA, and prompt MLPs, biases and a head that were trained with it, without the base.

    A crash at any moment leaves the old file or the new one.

    Args:
        metadata: plain values to keep with it. What loading needs (rank, alpha, stages, a digest
            of the base ...) is added.

    Raises:
        ConfigError: no LoRA, metadata that is not plain or contradicts the adapter.
        CheckpointError: the file cannot be written.
    """
    path, part = Path(path), with_lora(model)
    if path.suffix == ".safetensors":
        raise ConfigError(f"cannot save {path.name}: name a file ending in .pth or .pt")
    layers = {p: la for p, la in injection.lora_layers(part).items() if ADAPTER in la.lora_adapters}
    tensors, scales = _file_tensors(part, layers)
    facts = _facts(part, layers, tensors, scales)
    content = {
        STATE: {name: plain(tensors[name]).clone() for name in sorted(tensors)},
        FACTS: _joined(dict(metadata or {}), facts),
    }
    with atomic_write(path) as file:
        torch.save(content, file)
    return path


def _file_tensors(
    part: nn.Module, layers: Mapping[str, LoraLayer]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(name in the file -> tensor, layer -> scale of B A)."""
    tensors, scales = {}, {}
    for live, layer in layers.items():
        values = layer.lora_file_tensors(ADAPTER)
        if set(values) != {"lora_A.weight", "lora_B.weight"}:
            raise ConfigError(
                f"{live} has {', '.join(values)}, more than this file can hold: use "
                "lora_core.save_adapter(model, folder)"
            )
        scales[clean(live)] = layer.lora_adapters[ADAPTER].scale
        for suffix, value in values.items():
            tensors[join(clean(live), suffix.removesuffix(".weight"))] = value
    for key, value in injection.full_tensors(part, ADAPTER).items():
        tensors[clean(key).replace(WEIGHT, ".prompt_weight")] = value
    return tensors, scales


def _facts(
    part: nn.Module,
    layers: Mapping[str, LoraLayer],
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
) -> dict[str, Any]:
    """What is known about an adapter."""
    ranks = {path: len(tensors[f"{path}.lora_A"]) for path in scales}
    alphas = {path: number(scales[path] * rank) for path, rank in ranks.items()}
    adapted = [layer for layer in layers_of(part) if layer.path in layers]
    config = injection.configs(part)[ADAPTER]
    return {
        "format": FORMAT,
        "r": Counter(ranks.values()).most_common(1)[0][0],
        "lora_alpha": Counter(alphas.values()).most_common(1)[0][0],
        "target_modules": sorted({layer.role for layer in adapted}),
        "encoder_only": all(layer.part == "enc" for layer in adapted),
        "target_stages": sorted({layer.stage for layer in adapted}),
        "enable_prompt": bool(prompt_mlp.with_prompt(part)),
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        **_class_facts(part, tensors),
        "layers": {path: {"r": ranks[path], "alpha": alphas[path]} for path in scales},
        "base": _print(part, {p: la.lora_adapters[ADAPTER] for p, la in layers.items()}),
        "made": versions(),
    }


def _class_facts(part: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names of the classes of a head in the adapter, where they are known."""
    found = segmentor_in(part)
    if found is None or found[1].class_names is None or head_classes(tensors) is None:
        return {}
    return {"classes": list(found[1].class_names)}


def _joined(given: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The caller's metadata and ours, as JSON would give them back; ours win."""
    try:
        given = json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must be plain values that JSON can hold: {error}") from error
    wrong = [
        f"metadata has {name} = {given[name]!r}, the adapter {facts[name]!r}: leave it out"
        for name in SAME
        if name in given and _plain(given[name]) != _plain(facts[name])
    ]
    if wrong:
        raise ConfigError(listing(wrong))
    return given | {k: v for k, v in facts.items() if k != "target_stages" or k not in given}


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _print(part: nn.Module, specs: Mapping[str, AdapterSpec]) -> str | None:
    """A digest of the base under an adapter, the same wherever in a model the backbone lies."""
    paths = file_paths(part)
    start = prefix(paths[path] for path in specs) or ""
    return base_print(part, specs, {live: path.removeprefix(start) for live, path in paths.items()})


# -- loading ---------------------------------------------------------------------------------------


def load_lora_checkpoint(
    model: nn.Module, path: str | Path, lora_alpha: float | None = None, allow_partial: bool = False
) -> dict[str, Any]:
    """Put saved LoRA on a model, in place. Everything is checked before the model is touched.

    A base model gets the layers and ranks of the file, and a segmentation model its head, also of
    another number of classes; the base is frozen. Where LoRA is there
    already, its layers, ranks and alpha must be those of the file, and get its values. Names may
    have `backbone.` or `module.` in front or not.

    Args:
        lora_alpha: for a file that does not say it. Without either it is r, with a warning.
        allow_partial: use the layers that are complete where tensors are missing or unknown, with
            a warning that lists them.

    Returns:
        The metadata in the file.

    Raises:
        CheckpointError: a file that is missing, damaged or does not fit, with names and shapes.
    """
    root = unwrapped(model)
    part = adapted_part(root)
    target = root if part is None else part
    file = read_lora(Path(path), target, lora_alpha)
    rename = renaming(target, file.tensors)
    alpha = None if file.config else lora_alpha
    if part is None:
        prompt_mlp.attach(target, _prompt_widths(file, target, rename))
    try:
        segmentor = _with_head(target, file, fresh=part is None)
        core_file.load_adapter(target, file, ADAPTER, True, rename, alpha, allow_partial)
    except BaseException:
        if part is None:
            prompt_mlp.detach(target)
            if found := segmentor_in(target):
                found[1].restore_head()
        raise
    freeze_statistics(target)
    if segmentor is not None:
        segmentor.class_names = _class_names(file, segmentor)
    _warn_other_base(target, file)
    return file.metadata


def _with_head(target: nn.Module, file: AdapterFile, fresh: bool) -> DefaultSegmentorV2 | None:
    """The segmentation model that takes the head in a file, with room for its classes.

    Args:
        fresh: the model has no LoRA yet: its head may be exchanged.

    Returns:
        None: the file has no head.

    Raises:
        CheckpointError: the model has no place for it.
    """
    classes, found = head_classes(file.tensors), segmentor_in(target)
    if classes is None:
        return None
    if found is None:
        raise CheckpointError(
            f"{file.path} has a segmentation head of {classes} classes, and this model is a "
            f"{type(target).__name__} without one: load_official(checkpoint, num_classes={classes})"
        )
    if fresh and found[1].seg_head.out_features != classes:
        found[1].renew_head(classes, keep_old=True)
    return found[1]


def _class_names(file: AdapterFile, segmentor: DefaultSegmentorV2) -> tuple[str, ...] | None:
    names = file.metadata.get("classes")
    count = segmentor.seg_head.out_features
    return tuple(map(str, names)) if isinstance(names, list) and len(names) == count else None


def _prompt_widths(file: AdapterFile, target: nn.Module, rename: Rename) -> dict[str, int]:
    """Live path -> hidden width, for every layer of the model that has a prompt MLP in the file."""
    names = {
        layer.path: f"{rename(clean(layer.path))}.{prompt_mlp.NAME}.0.weight"
        for layer in layers_of(target)
    }
    return {
        live: max(len(file.tensors[name]), 1)
        for live, name in names.items()
        if name in file.tensors and file.tensors[name].dim() == 2
    }


def _warn_other_base(target: nn.Module, file: AdapterFile) -> None:
    specs = {
        path: layer.lora_adapters[ADAPTER]
        for path, layer in injection.lora_layers(target).items()
        if ADAPTER in layer.lora_adapters
    }
    if len(specs) != len(file.extra.get("layers", specs)):  # loaded in part, which is told
        return
    trained, here = file.metadata.get("base"), _print(target, specs)
    if isinstance(trained, str) and here is not None and trained != here:
        warnings.warn(
            f"{file.path} was trained on another base: the weights under it differ from this "
            "model's. It will not act as in its training; load it on its own base",
            stacklevel=3,
        )
