"""Reading adapter files, of ours, of PEFT and of older programs, without a model."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.cache import fingerprint
from lora_core.errors import CheckpointError
from lora_core.module_names import clean
from lora_core.settings.types import shown
from lora_core.tensor_file import open_checkpoint, read_safetensors, read_torch

FORMAT = 1
PREFIX = "base_model.model."  # PEFT's name of the base model
TENSORS, CONFIG, README = "adapter_model.safetensors", "adapter_config.json", "README.md"
OWN = "lora_core"  # our entry in the metadata
ATTEMPTS = 20  # at reading a directory that another process writes meanwhile
CONFIG_LIMIT = 10_000_000  # bytes of settings
NAME_LIMIT = 1000  # characters of a tensor's name, which messages repeat


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
            `lora_dropout`, `freeze_A`, `base` (see `adapter_origin.base_print`), `made` (versions
            of the programs), `sha256`; empty for files of others.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in an adapter but itself."""
    extra = {key: value for key, value in record["extra"].items() if key != "sha256"}
    text = json.dumps({**record, "extra": extra}, sort_keys=True)
    return hashlib.sha256(f"{text}{fingerprint(tensors)}".encode()).hexdigest()


def read_adapter(path: str | Path, max_bytes: int | None = None) -> AdapterFile:
    """Read an adapter without a model: a PEFT directory, a single file, or a bare dict of tensors.

    Nothing in the file is executed. While another process replaces it, either the old or the new
    one is read.

    Args:
        max_bytes: refuse a larger file of tensors before it is read.

    Raises:
        CheckpointError: missing, damaged, of a later program, or no adapter.
    """
    path = Path(path)
    if os.path.isdir(path) or path.suffix == ".safetensors":  # Path.is_dir may raise
        return _read_folder(path, max_bytes)
    content = read_torch(path, max_bytes)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an adapter")
    if not {"format", "config", "tensors"} <= content.keys():
        return AdapterFile(path, {}, _tensors(path, content))
    _check_types(path, config=content["config"], tensors=content["tensors"])
    config = dict(content["config"])
    record = {key: content.get(key, {}) for key in ("format", "metadata")}
    return _checked(path, record | {"extra": config.pop(OWN, {}), "config": config}, content)


def _checked(path: Path, record: dict[str, Any], content: Mapping[str, Any]) -> AdapterFile:
    """The adapter in a file of ours, whose `content` has the tensors."""
    _check_format(path, record.get("format"))
    _check_types(path, **{key: record.get(key) for key in ("config", "extra", "metadata")})
    extra = record["extra"]
    _check_types(path, layers=extra.get("layers", {}))
    tensors = _tensors(path, content["tensors"])
    try:
        found = digest(record, tensors)  # fails where a file of torch has tensors as settings
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its settings are no plain values: {error}") from error
    if extra.get("sha256", found) != found:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one that was saved with it, so values were "
            "changed on the disk or on the way. Copy or download it again"
        )
    return AdapterFile(path, record["config"], tensors, record["metadata"], extra)


def _read_folder(path: Path, max_bytes: int | None) -> AdapterFile:
    """Read a directory; again where another process replaced its tensors in between.

    `_write_folder` removes the old configuration, replaces the tensors, then writes the new
    configuration: with the same tensors before and after, what lies between belongs to them.
    """
    folder, weights = (path, path / TENSORS) if os.path.isdir(path) else (path.parent, path)
    for _ in range(ATTEMPTS):
        before = _identity(weights)
        try:
            parts = _read_tensors(path, folder, weights, max_bytes)
            config = _read_config(folder / CONFIG)
        except CheckpointError:
            if _identity(weights) == before:
                raise
            continue
        if _identity(weights) == before:
            return _from_folder(path, folder, *parts, config)
    raise CheckpointError(f"{path} is being written again and again: load it when that has ended")


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_tensors(
    path: Path, folder: Path, weights: Path, max_bytes: int | None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, and where we wrote them our record of everything else."""
    if path == weights or not _absent(weights):
        tensors, metadata = read_safetensors(weights, max_bytes)
        return tensors, _parse(weights, metadata[OWN]) if OWN in metadata else None
    old = folder / "adapter_model.bin"  # older PEFT
    if not _absent(old):
        content = read_torch(old, max_bytes)
        _check_types(old, tensors=content)
        return content, None
    held = ", ".join(sorted(entry.name for entry in folder.glob("*"))[:8]) or "nothing"
    raise CheckpointError(f"{path.absolute()} is no adapter: no {TENSORS} in it, but {held}")


def _absent(path: Path) -> bool:
    """Whether nothing has this name. What is there and cannot be read, is there."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _from_folder(
    path: Path,
    folder: Path,
    tensors: Mapping[str, Tensor],
    record: dict[str, Any] | None,
    config: dict[str, Any] | None,
) -> AdapterFile:
    if record is None:
        if config is None and path == folder:
            raise CheckpointError(
                f"{folder / CONFIG} is missing: without it the scale of the adapter is unknown"
            )
        return AdapterFile(path, config or {}, _tensors(path, tensors))
    file = _checked(path, record, {"tensors": tensors})
    if config is not None and config != file.config:
        changed = [
            f"{key} {shown(file.config.get(key))} -> {shown(config.get(key))}"
            for key in sorted({*config, *file.config})
            if config.get(key) != file.config.get(key)
        ]
        warnings.warn(
            f"{folder / CONFIG} was changed after saving ({', '.join(changed[:5])}): it is "
            "loaded as it says now, without what only lora_core knew (slices, frozen A)",
            stacklevel=5,
        )
        file.config, file.extra = config, {}
    return file


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        with open_checkpoint(path, CONFIG_LIMIT) as file:
            return _parse(path, file.read())
    except CheckpointError as error:
        if isinstance(error.__context__, FileNotFoundError):
            return None
        raise


def _parse(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        reason = "a number is too long"
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        elif isinstance(error, UnicodeDecodeError):
            reason = "no UTF-8 text"
        elif isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} in line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"{path}: its settings are no valid JSON: {reason}") from error
    _check_types(path, settings=value)
    return dict(value)


def _check_types(path: Path, **parts: Any) -> None:
    for name, value in parts.items():
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"{path}: {name} is no dictionary with names as keys")


def _check_format(path: Path, version: Any) -> None:
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format {version!r:.80} is none of lora_core's")
    if version > FORMAT:
        raise CheckpointError(
            f"{path} was written as format {version}, this program reads up to {FORMAT}: update "
            "lora-core"
        )


def _tensors(path: Path, tensors: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors without PEFT's prefix and the traces of wrappers."""
    wrong = [
        f"{key!r:.80} ({type(value).__name__})"
        if isinstance(key, str)
        else f"a name of type {type(key).__name__}"
        for key, value in tensors.items()
        if not (isinstance(key, str) and len(key) <= NAME_LIMIT and isinstance(value, Tensor))
    ]
    if wrong:
        some = ", ".join(wrong[:5])
        raise CheckpointError(f"{path} is no adapter: expected tensors by name, found {some}")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors at all: save it again from its training")
    return {clean(key.removeprefix(PREFIX)): value for key, value in tensors.items()}
