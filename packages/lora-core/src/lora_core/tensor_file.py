"""Files of tensors: written whole or not at all, read without trusting them.

No byte of a file is executed: safetensors holds data only, and `torch.load` is called with
`weights_only=True` and nothing added to what that allows.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from lora_core.errors import CheckpointError, near

HEADER_LIMIT = 100_000_000  # bytes, as the safetensors library has it


@contextmanager
def atomic_write(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a new file that becomes `path` when the block ends, and vanishes if the block fails.

    The bytes go to a hidden sibling of `path`, which is flushed to the disk and then renamed: a
    reader, or a crash at any moment, sees the old file or the new one. `sync=False` leaves out the
    flush, for files that can be made again. The name of the sibling is the file's `.name`.

    Raises:
        CheckpointError: the file cannot be written; the old one is as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(part, path)
        if sync and os.name == "posix":
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save hides the system's error behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise CheckpointError(f"cannot write {path.absolute()}: {reason}") from error
    finally:
        with suppress(OSError):  # it is gone when all went well
            part.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, without which a power cut may undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, without gradient; shards are gathered (all ranks call)."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor, as FSDP2 keeps parameters
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, the same bytes for the same values in every process."""
    # The clone parts tensors that share memory, which the library refuses.
    data = safetensors.torch.save({k: plain(t).clone() for k, t in tensors.items()}, dict(metadata))
    # The library writes the metadata in the order of a hash map: another one in each process.
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[BinaryIO]:
    """Open a checkpoint file for reading.

    Raises:
        CheckpointError: it is missing, a folder, empty, or what a failed download leaves behind.
    """
    path = Path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, after the block of the caller
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = near(path.name, siblings)
        raise CheckpointError(f"{path.absolute()} does not exist{hint and '; ' + hint}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path.absolute()}: {error.strerror}") from error
    with file:
        start = file.read(512).lstrip().lower()
        if not start:
            raise CheckpointError(f"{path} is empty: copy or download it again")
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
            )
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            raise CheckpointError(
                f"{path} is a web page, not a checkpoint: the download failed or needs a login"
            )
        file.seek(0)
        yield file


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file as (name -> tensor on the CPU, metadata).

    Raises:
        CheckpointError: the file is missing, damaged, or no safetensors file.
    """
    with open_checkpoint(path) as file:
        data = file.read()
    try:
        header = _header(data)
        tensors = safetensors.torch.load(data)
    except (ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({_first_line(error)}): "
            "copy or download it again"
        ) from error
    metadata = header.get("__metadata__", {})
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file; a name given twice, which the library takes, is refused."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, HEADER_LIMIT):
        raise ValueError(f"header of {size} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + size], object_pairs_hook=_no_twins)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("header is no dictionary")
    return header


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice in the header")
    return table


def read_torch(path: str | Path) -> Any:
    """Read what `torch.save` wrote, tensors on the CPU, without running anything in it.

    Raises:
        CheckpointError: the file is missing, damaged, holds objects other than tensors, numbers,
            strings and their containers, or a tensor larger than the file itself.
    """
    with open_checkpoint(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = _load(file, path)
    for name, tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{path}: {name} is no ordinary dense tensor")
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: {name} claims the shape {tuple(tensor.shape)}, more than the file holds"
            )
    return content


def _load(file: BinaryIO, path: str | Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile bytes raise whatever they like
        unsafe = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if unsafe:
            raise CheckpointError(
                f"{path} holds an object of class {unsafe[1]}, which only an unrestricted load "
                "could read, and that could run a program. Save it again as plain tensors and "
                "numbers"
            ) from error
        raise CheckpointError(
            f"{path} is damaged or no torch file ({_first_line(error)}): copy or download it again"
        ) from error


def _tensors(value: Any, name: str = "content") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, with the way to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _tensors(child, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from _tensors(child, f"{name}[{index}]")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__
