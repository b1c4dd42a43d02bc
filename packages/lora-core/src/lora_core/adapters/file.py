"""Adapters as files: PEFT's directories, and single files of plain tensors.

A directory holds `adapter_model.safetensors` and `adapter_config.json` as PEFT has them. What PEFT
has no word for (slices, frozen A, facts of the caller) stands as JSON in the safetensors metadata,
together with a copy of the configuration: that file alone is the whole adapter, so that replacing
it is atomic. A single file (.pth, .pt, .torch) is one dict {format, config, metadata, tensors} of
tensors and plain values. Both hold a SHA-256 of all their content, since neither container notices
a flipped bit, and a digest of the base. The same adapter gives the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lora_core.adapters import layout as adapter_layout
from lora_core.adapters import origin as adapter_origin
from lora_core.adapters.match import Match, match, size_limit
from lora_core.adapters.read import (
    CONFIG,
    FORMAT,
    OWN,
    PREFIX,
    README,
    TENSORS,
    AdapterFile,
    digest,
    read_adapter,
)
from lora_core.errors import CheckpointError, ConfigError, listing
from lora_core.injection import full_tensors, inject, known, lora_layers
from lora_core.module_names import Rename, file_paths, in_time, unwrapped
from lora_core.settings import plain as without_secrets
from lora_core.tensor_file import atomic_write, plain, safetensors_bytes

__all__ = ["AdapterFile", "load_adapter", "read_adapter", "save_adapter", "write_adapter"]

SINGLE_FILES = frozenset({".pth", ".pt", ".torch"})
OTHER_FILES = frozenset({".safetensors", ".bin", ".ckpt"})  # names of files, yet none we write


# -- writing -----------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    metadata: Mapping[str, Any] | None = None,
    rename: Rename | None = None,
    *,
    task_type: str | None = None,
    remarks: Sequence[str] = (),
) -> Path:
    """Write one adapter; a crash at any moment leaves the old file or the new one.

    With sharded parameters (FSDP2) all ranks must call this: the shards are gathered, rank 0
    writes, and a failure there is raised everywhere. Otherwise the calling process writes.

    Args:
        path: ending in .pth, .pt or .torch: a single file; else a directory as PEFT has it.
        metadata: facts to keep with it, plain values that JSON can hold.
        rename: module path -> its path in the file. The suffixes (`lora_A.weight`) stay.
        task_type: tells PEFT which wrapper to take, such as CAUSAL_LM for one that generates.
        remarks: for the model card of a directory.

    Raises:
        ConfigError: no such adapter, another kind of file, or metadata that is not plain.
        CheckpointError: the file cannot be written.
    """
    model, path = unwrapped(model), Path(path)
    _refuse_ending(path)
    known(model, name)
    layers = {live: la for live, la in lora_layers(model).items() if name in la.lora_adapters}
    paths = file_paths(model, rename)
    tensors: dict[str, Tensor] = {}
    for live, layer in layers.items():
        with _gathered(layer):
            values = layer.lora_file_tensors(name)
        tensors |= adapter_layout.file_tensors(model, live, paths, values)
    for key, value in full_tensors(model, name).items():
        tensors[adapter_layout.full_file_key(model, key, paths, layers)] = value
    tensors = {key: plain(value) for key, value in tensors.items()}
    specs = {live: layer.lora_adapters[name] for live, layer in layers.items()}
    extra = adapter_layout.extra(model, name, layers, paths) | {
        "base": adapter_origin.base_print(model, specs, paths),
        "made": adapter_origin.versions(),
    }
    config = adapter_layout.adapter_config(model, name, layers, paths) | {"task_type": task_type}
    file = AdapterFile(path, config, tensors, dict(metadata or {}), extra)

    def write() -> None:
        write_adapter(file, path, [*adapter_layout.notes(model, name, layers), *remarks])

    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        _on_rank_zero(write)
    else:
        write()
    return path


def write_adapter(file: AdapterFile, path: str | Path, notes: Sequence[str] = ()) -> Path:
    """Write an adapter without a model: what `read_adapter` read, into a file of another form.

    Args:
        file: with `layers` and `made` in its `extra`, as files of ours have them.
        path: as for `save_adapter`.
        notes: for the model card of a directory.

    Raises:
        ConfigError: another kind of file, or metadata that is not plain.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    _refuse_ending(path)
    record = record_of(file)
    if path.suffix in SINGLE_FILES:
        _write_single(path, file.tensors, record)
    else:
        _write_folder(path, file.tensors, record, adapter_origin.card(record, file.tensors, notes))
    return path


def _refuse_ending(path: Path) -> None:
    if path.suffix in OTHER_FILES:
        raise ConfigError(
            f"cannot save an adapter as {path.name}: name a folder, or a file ending in "
            f"{', '.join(sorted(SINGLE_FILES))}"
        )


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[None]:
    """Within the block the adapter's parameters are whole tensors, where they were shards."""
    places = [
        (module, key, parameter)
        for path, module in layer.named_modules()
        if path.startswith("lora_")
        for key, parameter in module._parameters.items()
        if hasattr(parameter, "full_tensor")
    ]
    for module, key, parameter in places:
        module._parameters[key] = nn.Parameter(plain(parameter), requires_grad=False)
    try:
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter


def _on_rank_zero(write: Callable[[], None]) -> None:
    """Let rank 0 write; every rank returns when it is done, or raises what went wrong there."""
    failure: list[str | None] = [None]
    try:
        if distributed.get_rank() == 0:
            write()
    except Exception as error:  # of any kind: the others must not wait for ever
        failure = [str(error) or type(error).__name__]
        raise
    finally:
        distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def record_of(file: AdapterFile) -> dict[str, Any]:
    """Everything of an adapter but the tensors, as JSON would give it back, with its digest.

    Raises:
        ConfigError: metadata that is not plain.
    """
    record = _plain(file)
    record["extra"]["sha256"] = digest(record, file.tensors)
    return record


def _plain(file: AdapterFile) -> dict[str, Any]:
    record = {
        "format": FORMAT,
        "config": file.config,
        "extra": file.extra,
        "metadata": file.metadata,
    }
    try:
        record = json.loads(json.dumps(record, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must be plain values that JSON can hold: {error}") from error
    return dict(_interned({**record, "metadata": without_secrets(record["metadata"])}))


def _interned(value: Any) -> Any:
    """Equal strings as one object: pickle writes an object once and refers to it afterwards."""
    if isinstance(value, dict):
        return {sys.intern(key): _interned(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_interned(child) for child in value]
    return sys.intern(value) if isinstance(value, str) else value


def _write_single(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    content = {
        "format": record["format"],
        "config": {**record["config"], OWN: record["extra"]},
        "metadata": record["metadata"],
        "tensors": {sys.intern(key): tensors[key].clone() for key in sorted(tensors)},
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def _write_folder(
    path: Path, tensors: dict[str, Tensor], record: dict[str, Any], card: str
) -> None:
    if os.path.lexists(path) and not os.path.isdir(path):  # Path.exists may raise
        raise CheckpointError(f"cannot write into {path.absolute()}: it is no folder")
    config = (json.dumps(record["config"], indent=2, sort_keys=True) + "\n").encode()
    metadata = {"format": "pt", OWN: json.dumps(record, sort_keys=True)}
    data = safetensors_bytes({PREFIX + key: t for key, t in tensors.items()}, metadata)
    old = path / CONFIG
    # The tensors' file has its own copy of the configuration. So no configuration for a moment is
    # harmless, while the old one beside new tensors would be another adapter.
    try:
        if old.exists() and old.read_bytes() != config:
            old.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot replace {old.absolute()}: {error.strerror}") from error
    for name, content in ((TENSORS, data), (CONFIG, config), (README, card.encode())):
        with atomic_write(path / name) as file:
            file.write(content)


# -- loading -----------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    path: str | Path | AdapterFile,
    name: str = "default",
    trainable: bool = True,
    rename: Rename | None = None,
    lora_alpha: float | None = None,
    allow_partial: bool = False,
) -> AdapterFile:
    """Put a saved adapter, ours or PEFT's, on a model, in place, and make it the active one.

    Rank, alpha, dropout, slices and whatever else was trained come back; the values are fp32
    however the file has them. Where the model already has an adapter of this name with the same
    layout, only its values change, so that nothing is compiled again; which adapters are active and
    which train stays as it is. Everything is checked before the model is touched.

    Args:
        path: the file, or what `read_adapter` read from it.
        trainable: False for a new adapter that is only used.
        rename: as for `save_adapter`. A file whose names are the model's own is taken as well.
        lora_alpha: for a bare dict of tensors, which does not have it.
        allow_partial: where tensors are missing, or belong to no module, load the layers that are
            complete, with one warning that lists the rest.

    Raises:
        CheckpointError: a file that is unusable or does not fit this model; the message has the
            keys, the nearest names, and what to do. On another base than it was trained on there
            is a warning.
    """
    model = unwrapped(model)
    file = path if isinstance(path, AdapterFile) else read_adapter(path, size_limit(model))
    path = file.path
    merged = [live for live, layer in lora_layers(model).items() if layer.lora_merged]
    if merged:
        raise CheckpointError(
            f"cannot load {path}: the model has merged adapters (in {merged[0]} and so on). Call "
            "unmerge(model) first"
        )
    paths = _names(model, file, rename)
    with in_time(f"the names in {file.path}", CheckpointError):
        found = match(file, model, paths, lora_alpha, allow_partial)
    _warn(file, model, paths, found)
    if name in getattr(model, "_lora_configs", {}):
        _check_same(path, model, name, found)
    else:
        inject(model, found.config, name, trainable=trainable)
    for live, layer in lora_layers(model).items():
        if live in found.factors:
            layer.lora_load_file_tensors(name, found.factors[live])
    with torch.no_grad():
        for key, value in full_tensors(model, name).items():
            if key in found.full:
                value.copy_(found.full[key])
    return file


def _names(model: nn.Module, file: AdapterFile, rename: Rename | None) -> dict[str, str]:
    """Live path -> path in the file: as `rename` has it, or the model's own names."""
    own = file_paths(model)
    if rename is None:
        return own
    renamed = file_paths(model, rename)
    used = {key.partition(".lora_")[0] for key in file.tensors}
    return max(renamed, own, key=lambda paths: len(used & set(paths.values())))


def _warn(file: AdapterFile, model: nn.Module, paths: Mapping[str, str], found: Match) -> None:
    """Say what of a file is not used, and that its base was another one."""
    if found.gaps:
        warnings.warn(
            f"{file.path} is loaded in part, on {len(found.plan)} layers:\n{listing(found.gaps)}",
            stacklevel=3,
        )
        return
    trained, here = file.extra.get("base"), adapter_origin.base_print(model, found.plan, paths)
    if trained is not None and here is not None and trained != here:
        warnings.warn(
            f"{file.path} was trained on another base: the weights under it differ from this "
            "model's. It will not act as in its training; load it on its own base",
            stacklevel=3,
        )


def _check_same(path: str | Path, model: nn.Module, name: str, found: Match) -> None:
    """Whether the live adapter differs from the file's in its values only."""
    live = {
        key: adapter_layout.plain_spec(layer.lora_adapters[name])
        for key, layer in lora_layers(model).items()
        if name in layer.lora_adapters
    }
    facts = [
        {key: adapter_layout.layout(s) for key, s in specs.items()} for specs in (live, found.plan)
    ]
    odd = sorted(key for key in {*live, *found.plan} if facts[0].get(key) != facts[1].get(key))
    full = full_tensors(model, name).keys() ^ found.full.keys()
    if odd or full:
        raise CheckpointError(
            f"the model already has an adapter {name!r}, and {path} has another layout than that "
            f"(in {', '.join([*odd, *sorted(full)][:3])}): give another name, or call "
            f"remove(model, {name!r}) first"
        )
