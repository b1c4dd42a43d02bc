"""Files of tensors: written whole or not at all, read without trusting them.

No byte of a file is executed: safetensors holds data only, and `torch.load` is called with
`weights_only=True` and nothing added to what that allows.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from lora_core import torch_archive
from lora_core.errors import CheckpointError, near
from lora_core.run_lock import flock

HEADER_LIMIT = 25_000_000  # bytes: 200,000 tensors. Parsed, it takes thirty times as much memory
NAME_LIMIT = 1000  # characters of a tensor's name, which messages repeat
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.ASCII)
DEPTH_LIMIT = 100  # of containers inside each other


@contextmanager
def atomic_write(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a new file that becomes `path` when the block ends, and vanishes if the block fails.

    The bytes go to a hidden sibling of `path`, which only its owner can read. It is flushed to the
    disk and then renamed: a reader, or a crash at any moment, sees the old file or the new one.
    `sync=False` leaves out the flush, for files that can be made again. The name of the sibling is
    the file's `.name`.

    Raises:
        CheckpointError: the file cannot be written; the old one is as it was. Its `__cause__` is
            the system's error.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb", opener=_private) as file:
            flock(file.fileno())  # for `remove_partial`
            yield file
            file.flush()
            with suppress(OSError):  # a file system without permissions
                os.chmod(part, 0o666 & ~_umask())
            if sync:
                os.fsync(file.fileno())
        os.replace(part, path)
        if sync and os.name == "posix":
            sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save hides the system's error behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise CheckpointError(f"cannot write {path.absolute()}: {reason}") from cause
    finally:
        with suppress(OSError):  # it is gone when all went well
            part.unlink()


def write_json(path: str | Path, content: object, indent: int | None = 2) -> None:
    """Write plain values as JSON, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=indent).encode())


def remove_partial(folder: Path) -> None:
    """Delete the siblings that killed processes left behind in `atomic_write`, and no others."""
    for part in folder.iterdir():
        if _PARTIAL.fullmatch(part.name) and part.is_file() and not part.is_symlink():
            with suppress(OSError), open(part, "r+b") as file:
                if flock(file.fileno()):  # otherwise somebody may be writing it
                    part.unlink()


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _umask() -> int:
    """The permissions that new files go without. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, without which a power cut may undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise  # otherwise the file system, on a network, has no such thing
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
def open_checkpoint(path: str | Path, max_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a checkpoint file for reading.

    Args:
        max_bytes: refuse a larger file before anything of it is read.

    Raises:
        CheckpointError: it is missing, no regular file, empty, too large, or what a failed download
            leaves behind; or reading it fails, in the block too.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode  # asked once: the file may be replaced meanwhile
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            what = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
            raise CheckpointError(f"{path.absolute()} is {what}, expected a file")
        file = open(path, "rb")  # noqa: SIM115 - closed below, after the block of the caller
    except FileNotFoundError:
        if path.is_symlink():
            to = os.readlink(path)
            raise CheckpointError(f"{path.absolute()} is a link to {to}, which is gone") from None
        siblings: list[str] = []
        with suppress(OSError):  # there may be no such folder, or none that we may list
            siblings = os.listdir(path.parent)
        hint = near(path.name, siblings)
        raise CheckpointError(f"{path.absolute()} does not exist{hint and '; ' + hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(path, error) from error
    with file:
        try:
            _refuse_what_it_is_not(path, file.read(512).lstrip().lower())
            size = os.fstat(file.fileno()).st_size
            if max_bytes is not None and size > max_bytes:
                raise CheckpointError(
                    f"{path} has {size:,} bytes, where at most {max_bytes:,} can be right: it is "
                    "another file, or damaged"
                )
            file.seek(0)
            yield file
        except OSError as error:  # the disk or the network, here or in the block of the caller
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"cannot read {path.absolute()}: {reason}")


def _refuse_what_it_is_not(path: Path, start: bytes) -> None:
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


def read_safetensors(
    path: str | Path, max_bytes: int | None = None, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file as (name -> tensor, metadata).

    Args:
        device: "cpu", or "meta": tensors without values, which only the header is read for.

    Raises:
        CheckpointError: the file is missing, damaged, or no safetensors file.
    """
    with open_checkpoint(path, max_bytes) as file:
        try:
            header = _header(file)
            file.seek(0)
            tensors = (
                _without_values(path) if device == "meta" else safetensors.torch.load(file.read())
            )
        except KeyError as error:
            raise _damaged(path, "safetensors", f"dtype {error} is unknown to torch") from error
        except (ValueError, RecursionError, safetensors.SafetensorError) as error:
            raise _damaged(path, "safetensors", _first_line(error)) from error
    metadata = header.get("__metadata__", {})
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _without_values(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the meta device; the file is mapped, and its values are never looked at."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118


def _damaged(path: str | Path, kind: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or no {kind} file ({reason}): copy or download it again"
    )


def _header(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file.

    Raises:
        ValueError: it is cut off, or says what the library takes and we do not: a name twice, a
            name with control characters or `..`, a shape beyond any tensor.
    """
    length = os.fstat(file.fileno()).st_size - 8  # of all behind the header's size
    start = file.read(9)
    size = int.from_bytes(start[:8], "little")
    if not 1 < size <= HEADER_LIMIT or start[8:] != b"{":
        raise ValueError("it does not begin as one")
    if size > length:
        raise ValueError(f"cut off: the header alone has {size} bytes, the file {length + 8}")
    try:
        header = json.loads(start[8:] + file.read(size - 1), object_pairs_hook=_no_twins)
    except json.JSONDecodeError:
        raise ValueError("its header is no JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its header is no dictionary")
    _check_spans({k: v for k, v in header.items() if k != "__metadata__"}, length - size)
    return header


def _check_spans(entries: Mapping[str, Any], length: int) -> None:
    """Whether the tensors lie one behind the other and fill the `length` bytes of data."""
    spans = []
    for name, entry in entries.items():
        if not name.isprintable() or ".." in name or len(name) > NAME_LIMIT:
            raise ValueError(f"unfit name {name[:80]!r}")
        span = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(span, list) or [type(n) for n in span] != [int, int]:
            raise ValueError(f"no place is given for {name[:80]!r}")
        shape = entry.get("shape")
        if not isinstance(shape, list) or any(type(n) is not int or n >> 63 for n in shape):
            raise ValueError(f"no possible shape is given for {name[:80]!r}")
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end or stop < start:
            raise ValueError(f"{name[:80]!r} overlaps another tensor or leaves a hole")
        end = stop
    if end != length:
        what = "cut off" if end > length else "bytes behind the last tensor"
        raise ValueError(f"{what}: {length} bytes of tensors, the header says {end}")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice in the header")
    return table


def read_torch(path: str | Path, max_bytes: int | None = None, device: str = "cpu") -> Any:
    """Read what `torch.save` wrote without running anything in it.

    There is no way around this, also not on request: what needs an unrestricted load is converted
    by the program that wrote it.

    Args:
        device: of the tensors: "cpu", or "meta": without values, which are not read then.

    Raises:
        CheckpointError: the file is missing, damaged, holds objects other than tensors, numbers,
            strings and their containers, or a tensor larger than the file itself.
    """
    with open_checkpoint(path, max_bytes) as file:
        size = os.fstat(file.fileno()).st_size
        if reason := torch_archive.fault(file, size, values=device != "meta"):
            raise _damaged(path, "torch", reason)
        file.seek(0)
        content = _load(file, path, device)
    for way, tensor in _tensors(path, content):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != device:
            raise CheckpointError(
                f"{path}: {_spelled(way)} is no ordinary dense tensor: save it as one"
            )
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: {_spelled(way)} claims the shape {tuple(tensor.shape)}, more than the "
                "file holds: it is damaged or was made to deceive"
            )
    return content


def _load(file: BinaryIO, path: str | Path, device: str) -> Any:
    try:
        with warnings.catch_warnings():  # about pickles of other protocols, refused anyway
            warnings.simplefilter("ignore")
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # damaged or hostile bytes raise whatever they like
        if torch_archive.of_disk(error):
            raise
        named = re.search(r"(?:GLOBAL|global) ([^\s()]+)", str(error))
        unsafe = dict.fromkeys([named[1]] if named else [])
        unsafe |= dict.fromkeys(torch_archive.foreign(file))
        if unsafe:
            classes = ", ".join(name[:80] for name in list(unsafe)[:5])
            raise CheckpointError(
                f"{path} holds objects of class {classes}, which only an unrestricted load could "
                "read, and that could run a program.\nIf you trust its maker: where it was made, "
                'save its tensors and numbers alone, torch.save({name: tensor}, "plain.pt")'
            ) from error
        raise _damaged(path, "torch", "its content cannot be read") from error


def _tensors(path: str | Path, content: Any) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, with the keys that lead to it.

    A container that occurs again is not entered again: it may hold itself.
    """
    entered: set[int] = set()

    def below(value: Any, way: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        getattr(value, "__dict__", {}).clear()  # what a pickle sets there may hide a method
        if isinstance(value, Tensor):
            yield way, value
        elif id(value) not in entered:
            entered.add(id(value))
            if len(way) > DEPTH_LIMIT:
                raise CheckpointError(f"{path} is nested too deeply, over {DEPTH_LIMIT} levels")
            for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
                if isinstance(child, Tensor | Mapping | list | tuple):
                    yield from below(child, (*way, key))

    if isinstance(content, Tensor | Mapping | list | tuple):
        yield from below(content, ())


def _spelled(way: tuple[Any, ...]) -> str:
    """`content['a'][0]`; a key of another kind, which may have any length, as its type."""
    keys = [
        f"{key!r:.82}" if isinstance(key, str | int) else f"<{type(key).__name__}>" for key in way
    ]
    return "content" + "".join(f"[{key}]" for key in keys)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__
