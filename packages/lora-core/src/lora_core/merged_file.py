"""A merged model on its way to the disk: it gets its name only after it was read back and compared.

What every package's `merge` needs around its own knowledge of names and outputs.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from lora_core.base_file import SUFFIXES, WEIGHTS
from lora_core.errors import CheckpointError, ConfigError, NumericError, one_line
from lora_core.tensor_file import atomic_write, plain

LARGEST_ADAPTER = 2**32  # bytes of an adapter of whose base nothing is known yet
STALE = 86400  # seconds after which an unverified file belongs to a merge that died


def refuse_existing(output: Path, overwrite: bool, others: Collection[str] = ()) -> None:
    """Never destroy an earlier result by accident.

    Args:
        others: files that a merge may have written into a folder, besides weights and JSON.

    Raises:
        ConfigError: there is something at `output`; or `overwrite` would delete more than a model.
    """
    if output.exists() and not overwrite:
        raise ConfigError(f"{output.absolute()} exists: choose another --output or add --overwrite")
    if not output.is_dir():
        return
    if output.suffix in SUFFIXES:
        raise ConfigError(f"{output.absolute()} is a folder: choose another --output")
    strange = sorted(path.name for path in output.iterdir() if not _of_a_model(path, others))
    if strange:
        raise ConfigError(
            f"{output.absolute()} holds {one_line(strange[0])!r}, which is not replaced: choose "
            "another --output, or remove it first"
        )


def _of_a_model(path: Path, others: Collection[str]) -> bool:
    """Whether a merge may have written it: a transformers folder holds its tensors and JSON."""
    settings = path.suffix == ".json" and "adapter" not in path.name
    return path.is_file() and (path.name == WEIGHTS or path.name in others or settings)


def refuse_inputs(output: Path, overwrite: bool, base: Path, *others: Path) -> None:
    """Never write over what is read, into the base, or unasked over anything.

    Args:
        base, others: what is read.

    Raises:
        ConfigError: it would.
    """
    target = output.resolve()
    for source in (base.resolve(), *(path.resolve() for path in others)):
        if target == source or target in source.parents:
            raise ConfigError(f"--output {output} is or holds {source}: choose another one")
    if base.resolve() in target.parents:
        raise ConfigError(f"--output {output} lies in the base, {base}: choose another one")
    if os.path.lexists(output) and not overwrite:
        raise ConfigError(f"{output.absolute()} exists: choose another --output or add --overwrite")


def recorded_base(adapter: str) -> str:
    """The name of the base that an adapter's metadata holds.

    Raises:
        ConfigError: it holds none.
        CheckpointError: no adapter.
    """
    from lora_core.adapters.file import read_adapter

    base = read_adapter(adapter, LARGEST_ADAPTER).metadata.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("file"), str):
        raise ConfigError(f"{adapter} does not say what it was trained on: add --checkpoint FILE")
    name: str = base["file"]
    return name


def find_base(adapter: str, find: Callable[[str], Path]) -> Path:
    """The base whose name an adapter holds.

    Args:
        find: the package's search for a file, folder or hub id.

    Raises:
        ConfigError: the adapter does not say.
        CheckpointError: no adapter, or the base is not where `find` looks.
    """
    base = recorded_base(adapter)
    try:
        return find(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{adapter} was trained on it: add --checkpoint FILE"
        ) from None


def refuse_changed(base: Path, now: str, then: str | None) -> None:
    """Require the weights of a base file that a model was built from.

    Args:
        now, then: fingerprints of what is in the file, and of what the model was built from.

    Raises:
        CheckpointError: they differ.
    """
    if now != then:
        raise CheckpointError(
            f"{base} has changed since the model was built from it: put the old file back"
        )


# -- writing -------------------------------------------------------------------------------------


@contextmanager
def private_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that only this user can enter; it goes in the end, as do old ones.

    Raises:
        CheckpointError: it, or something in it, cannot be written.
    """
    start = f".unverified-{output.name[:60]}-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.glob(f"{glob.escape(start)}????????"):
            old = time.time() - left.lstat().st_mtime > STALE
            if old and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=start, dir=output.parent) as folder:
            yield Path(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {output.absolute()}: {reason}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], wrapped: bool = False) -> None:
    """Write a state dict, as safetensors or with `torch.save` by its name, whole or not at all.

    Nothing is copied but views of larger memory, so that this takes no memory of its own.

    Args:
        wrapped: `{"model": state dict}`, for `torch.save`.
    """
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            _write_safetensors(file, tensors)
        else:
            content = {name: _compact(plain(tensor)) for name, tensor in tensors.items()}
            torch.save({"model": content} if wrapped else content, file)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor with a storage of its own size: a view drags its whole storage into the file."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """As the library writes it, tensor by tensor: it makes the whole file in memory first."""
    # Wide numbers first, as the library has them: every tensor starts at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": _dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(plain(tensors[name]).flatten().view(torch.uint8).numpy().data)


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    """What the format calls a dtype, from the header of a file that the library made."""
    data = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: str = header["x"]["dtype"]
    return found


def move(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give verified files and folders their names, in this order."""
    for source, target in zip(sources, targets, strict=True):
        if target.is_symlink():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)  # a folder cannot be replaced in one step
        os.replace(source, target)


# -- verifying -----------------------------------------------------------------------------------


def check_written(path: Path, found: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> None:
    """Require that a file was read back as it was meant, bit for bit.

    Raises:
        NumericError: other tensors or other values.
    """
    if found.keys() != meant.keys():
        raise NumericError(f"{path}: read back with other tensors than were written")
    for name, tensor in found.items():
        if not same_bits(tensor, meant[name]):
            raise NumericError(f"{path}: {name} was read back with other values")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same byte for byte: -0 is not 0, and NaN may be itself."""
    raw = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, true float32, no autocast, no gradient; all put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    # TF32 rounds products to 10 bits, which is more than a merge may change.
    switches = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    kept = [switch.fp32_precision for switch in switches]
    try:
        model.eval()
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, kept, strict=True):
            switch.fp32_precision = value
        for module, mode in modes.items():
            module.training = mode
