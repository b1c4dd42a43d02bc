"""Adapters as files: PEFT's directories, and single files of plain tensors.

A directory holds `adapter_model.safetensors` and `adapter_config.json` as PEFT has them. What PEFT
has no word for (slices, frozen A, facts of the caller) stands as JSON in the safetensors metadata,
together with a copy of the configuration: that file alone is the whole adapter, so that replacing
it is atomic. A single file (.pth, .pt, .torch) is one dict {format, config, metadata, tensors} of
tensors and plain values. The same adapter gives the same bytes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lora_core import adapter_layout
from lora_core.adapter_match import Match, match
from lora_core.errors import CheckpointError, ConfigError
from lora_core.injection import full_tensors, inject, known, lora_layers
from lora_core.module_names import Rename, clean, file_paths, unwrapped
from lora_core.tensor_file import (
    atomic_write,
    open_checkpoint,
    plain,
    read_safetensors,
    read_torch,
    safetensors_bytes,
)

__all__ = ["AdapterFile", "load_adapter", "read_adapter", "save_adapter"]

FORMAT = 1
SINGLE_FILES = frozenset({".pth", ".pt", ".torch"})
OTHER_FILES = frozenset({".safetensors", ".bin", ".ckpt"})  # names of files, yet none we write
PREFIX = "base_model.model."  # PEFT's name of the base model
TENSORS, CONFIG, README = "adapter_model.safetensors", "adapter_config.json", "README.md"
OWN = "lora_core"  # our entry in the metadata


@dataclass
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        path: where it was read.
        config: the fields of PEFT's `adapter_config.json`; empty for a bare dict of tensors.
        tensors: `<module>.lora_A.weight` and so on -> tensor on the CPU; modules as the file
            names them, without PEFT's prefix.
        metadata: the facts that `save_adapter` was given.
        extra: what only lora_core writes: `layers` (module -> rank, alpha, slices),
            `lora_dropout`, `freeze_A`; empty for files of others.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


# -- writing -----------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    metadata: Mapping[str, Any] | None = None,
    rename: Rename | None = None,
) -> Path:
    """Write one adapter; a crash at any moment leaves the old file or the new one.

    With sharded parameters (FSDP2) all ranks must call this: the shards are gathered, rank 0
    writes, and a failure there is raised everywhere. Otherwise the calling process writes.

    Args:
        path: ending in .pth, .pt or .torch: a single file; else a directory as PEFT has it.
        metadata: facts to keep with it, plain values that JSON can hold.
        rename: module path -> its path in the file. The suffixes (`lora_A.weight`) stay.

    Raises:
        ConfigError: no such adapter, another kind of file, or metadata that is not plain.
        CheckpointError: the file cannot be written.
    """
    model, path = unwrapped(model), Path(path)
    if path.suffix in OTHER_FILES:
        raise ConfigError(
            f"cannot save an adapter as {path.name}: name a folder, or a file ending in "
            f"{', '.join(sorted(SINGLE_FILES))}"
        )
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
    record = _record(
        adapter_layout.adapter_config(model, name, layers, paths),
        adapter_layout.extra(model, name, layers, paths),
        metadata or {},
    )

    def write() -> None:
        if path.suffix in SINGLE_FILES:
            _write_single(path, tensors, record)
        else:
            _write_folder(path, tensors, record, adapter_layout.notes(model, name, layers))

    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        _on_rank_zero(write)
    else:
        write()
    return path


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
    if distributed.get_rank() == 0:
        try:
            write()
        except CheckpointError as error:
            failure = [str(error)]
    distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def _record(
    config: dict[str, Any], extra: dict[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything but the tensors, as JSON would give it back."""
    record = {"format": FORMAT, "config": config, "extra": extra, "metadata": dict(metadata)}
    try:
        return dict(_interned(json.loads(json.dumps(record, sort_keys=True))))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must be plain values that JSON can hold: {error}") from error


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
    path: Path, tensors: dict[str, Tensor], record: dict[str, Any], notes: list[str]
) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"cannot write {path.absolute()}: a file has this name")
    config = (json.dumps(record["config"], indent=2, sort_keys=True) + "\n").encode()
    metadata = {"format": "pt", OWN: json.dumps(record, sort_keys=True)}
    data = safetensors_bytes({PREFIX + key: t for key, t in tensors.items()}, metadata)
    old = path / CONFIG
    # The tensors' file has its own copy of the configuration. So no configuration for a moment is
    # harmless, while the old one beside new tensors would be another adapter.
    if old.exists() and old.read_bytes() != config:
        old.unlink()
    for name, content in ((TENSORS, data), (CONFIG, config)):
        with atomic_write(path / name) as file:
            file.write(content)
    if notes:
        with atomic_write(path / README) as file:
            file.write("\n\n".join(["# LoRA adapter written by lora_core", *notes, ""]).encode())


# -- reading -----------------------------------------------------------------------------------


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter without a model: a PEFT directory, a single file, or a bare dict of tensors.

    Nothing in the file is executed.

    Raises:
        CheckpointError: missing, damaged, of a later program, or no adapter.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _read_folder(path)
    content = read_torch(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an adapter")
    if {"format", "config", "tensors"} <= content.keys():
        _check_format(path, content["format"])
        config, metadata = content["config"], content.get("metadata", {})
        _check_types(path, config=config, metadata=metadata, tensors=content["tensors"])
        extra = config.pop(OWN, {})
        _check_types(path, extra=extra, layers=extra.get("layers", {}))
        return AdapterFile(path, config, _tensors(path, content["tensors"]), metadata, extra)
    return AdapterFile(path, {}, _tensors(path, content))


def _read_folder(path: Path) -> AdapterFile:
    folder, weights = (path, path / TENSORS) if path.is_dir() else (path.parent, path)
    if not weights.exists() and (folder / "adapter_model.bin").exists():  # older PEFT
        tensors, record = read_torch(folder / "adapter_model.bin"), None
        _check_types(path, tensors=tensors)
    elif not weights.exists():
        held = ", ".join(sorted(entry.name for entry in folder.glob("*"))[:8]) or "nothing"
        raise CheckpointError(f"{path.absolute()} is no adapter: no {TENSORS} in it, but {held}")
    else:
        tensors, metadata = read_safetensors(weights)
        record = _parse(weights, metadata[OWN]) if OWN in metadata else None
    config = _read_config(folder / CONFIG)
    if record is None:
        if config is None and path.is_dir():
            raise CheckpointError(
                f"{folder / CONFIG} is missing: without it the scale of the adapter is unknown"
            )
        return AdapterFile(path, config or {}, _tensors(path, tensors))
    _check_format(weights, record.get("format"))
    _check_types(weights, **{k: record.get(k) for k in ("config", "extra", "metadata")})
    extra = record["extra"]
    _check_types(weights, layers=extra.get("layers", {}))
    if config is not None and config != record["config"]:
        changed = [
            k for k in {*config, *record["config"]} if config.get(k) != record["config"].get(k)
        ]
        warnings.warn(
            f"{folder / CONFIG} was changed after saving ({', '.join(sorted(changed))}): it is "
            "loaded as it says now, without what only lora_core knew (slices, frozen A)",
            stacklevel=4,
        )
        extra = {}
    config = config or record["config"]
    return AdapterFile(path, config, _tensors(path, tensors), record["metadata"], extra)


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with open_checkpoint(path) as file:
        return _parse(path, file.read())


def _parse(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its settings are no valid JSON: {error}") from error
    _check_types(path, settings=value)
    return dict(value)


def _check_types(path: Path, **parts: Any) -> None:
    for name, value in parts.items():
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"{path}: {name} is no dictionary with names as keys")


def _check_format(path: Path, version: Any) -> None:
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: format {version!r} is none of lora_core's")
    if version > FORMAT:
        raise CheckpointError(
            f"{path} was written as format {version}, this program reads up to {FORMAT}: update "
            "lora-core"
        )


def _tensors(path: Path, tensors: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors without PEFT's prefix and the traces of wrappers."""
    wrong = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong or not all(isinstance(key, str) for key in tensors):
        some = ", ".join(f"{key!r} ({type(tensors[key]).__name__})" for key in wrong[:5])
        raise CheckpointError(f"{path} is no adapter: expected tensors by name, found {some}")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors at all")
    return {clean(key.removeprefix(PREFIX)): value for key, value in tensors.items()}


# -- loading -----------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    trainable: bool = True,
    rename: Rename | None = None,
    lora_alpha: float | None = None,
) -> AdapterFile:
    """Put a saved adapter, ours or PEFT's, on a model, in place, and make it the active one.

    Rank, alpha, dropout, slices and whatever else was trained come back; the values are fp32
    however the file has them. Where the model already has an adapter of this name with the same
    layout, only its values change, so that nothing is compiled again; which adapters are active and
    which train stays as it is. Everything is checked before the model is touched.

    Args:
        trainable: False for a new adapter that is only used.
        rename: as for `save_adapter`. A file whose names are the model's own is taken as well.
        lora_alpha: for a bare dict of tensors, which does not have it.

    Raises:
        CheckpointError: a file that is unusable or does not fit this model; the message has the
            keys, the nearest names, and what to do.
    """
    model, file = unwrapped(model), read_adapter(path)
    merged = [live for live, layer in lora_layers(model).items() if layer.lora_merged]
    if merged:
        raise CheckpointError(
            f"cannot load {path}: the model has merged adapters (in {merged[0]} and so on). Call "
            "unmerge(model) first"
        )
    found = match(file, model, _names(model, file, rename), lora_alpha)
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
