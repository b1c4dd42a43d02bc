"""Results of frozen networks, kept on disk: image embeddings, depth maps, text features.

An entry's file name is the digest of everything that its value depends on, so that nothing in the
cache can ever be out of date; its first bytes are the digest of the rest, so that a damaged entry
is noticed and computed again, as is one that lies under the name of another. Several processes may
share one folder.

A process compares an entry with its digest when it first reads it, and again whenever the file is
another one or its length or time of modification has changed: digests take most of a reading's
time. What changes a file and leaves all of these as they were, as a failing disk or memory may do,
is noticed by processes that have not read it yet, and not by those that have.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_core.errors import CheckpointError
from lora_core.report import say
from lora_core.tensor_file import atomic_write, plain, safetensors_bytes

DIGEST = hashlib.sha256().digest_size
STALE = 3600  # seconds after which an unfinished file belongs to a process that died
# Until a file is so old it may change again within one step of its time of modification: 2 s on
# FAT, the coarsest in use.
SETTLED = 3_000_000_000  # ns
ALIGNED = 64  # bytes, as torch allocates: the last bits of a product may depend on it
DTYPES = {  # as files name them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# What an adapter adds to a base model's state dict.
ADAPTER_PARTS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
)


class FeatureCache:
    """Named tensors on disk, found by what they were computed from; the oldest in use go first.

    Values come back bit for bit and with their dtype, always as contiguous CPU tensors, so that a
    first and a later pass over the data compute the same.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Keep at most `max_bytes` in `folder`.

        Each process counts what it writes and looks at the whole folder now and then, so that the
        folder may be larger for a moment by 1/64 of `max_bytes` for each process that writes.
        """
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.hits = self.misses = self.healed = 0
        self._unseen = max_bytes  # bytes written since the last look: look at the first write
        self._total = 0  # bytes at the last look
        self._warned = False
        self._began = time.time_ns()
        self._checked = set[int]()  # files that equal their digests, see `_mark`
        self._said_small = False

    def get(
        self, key_parts: Mapping[str, str], compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The value for these parts, from disk, or else from `compute()`, which is then kept.

        Args:
            key_parts: everything the value depends on, by name: fingerprints of the network and
                of the sample, and the settings of the preprocessing.
            compute: makes the value. A name keeps its tensor's shape and dtype.
        """
        found = self.find(key_parts)
        return self.keep(key_parts, compute()) if found is None else found

    def find(self, key_parts: Mapping[str, str]) -> dict[str, Tensor] | None:
        """The value for these parts from disk; None: it is not there, or damaged."""
        found = self._read(self.path(key_parts), _text(key_parts))
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def keep(self, key_parts: Mapping[str, str], value: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a value, and give it as it will be read."""
        tensors = {name: plain(tensor) for name, tensor in value.items()}
        self._write(self.path(key_parts), tensors, key_parts)
        return tensors

    def path(self, key_parts: Mapping[str, str]) -> Path:
        """The file of an entry, whether it exists or not."""
        if not all(isinstance(word, str) for pair in key_parts.items() for word in pair):
            raise TypeError(f"key parts must be strings, not {dict(key_parts)}")
        digest = hashlib.sha256(_text(key_parts).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.features"

    def _read(self, path: Path, key: str) -> dict[str, Tensor] | None:
        now = time.time_ns()
        try:
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                data = _aligned(file, before.st_size)
                after = os.fstat(file.fileno())
        except OSError:  # never written, evicted by another process, or nowhere to be read from
            return None
        mark = _mark(path, before)
        quiet = len(data) == before.st_size and mark == _mark(path, after)  # while it was read
        known = quiet and mark in self._checked
        tensors = _tensors(data, key) if known or _whole(data) else None
        if tensors is None:
            self._heal(path)
            return None
        if quiet and now - before.st_mtime_ns > SETTLED:
            self._checked.add(mark)
        with contextlib.suppress(OSError):  # evicted meanwhile, or of another user: it is good
            # The time of last use. That of modification stays: it tells whether the file changed.
            os.utime(path, ns=(now, before.st_mtime_ns))
        return tensors

    def _heal(self, path: Path) -> None:
        self.healed += 1
        if self.healed == 1:
            say(f"{path.absolute()} is damaged: it is computed again, and so are others like it")
        _delete(path)

    def _write(
        self, path: Path, tensors: Mapping[str, Tensor], key_parts: Mapping[str, str]
    ) -> None:
        data = safetensors_bytes(tensors, {"key": _text(key_parts)})
        size = DIGEST + len(data)
        if size > self.max_bytes:
            return
        try:
            with atomic_write(path, sync=False) as file:  # the digest notices a lost write
                file.write(hashlib.sha256(data).digest())
                file.write(data)
        except CheckpointError as error:
            self._go_on_without(error)
            return
        self._unseen += size
        if self._unseen > self.max_bytes / 64 or self._total + self._unseen > self.max_bytes:
            self._evict(keep=path)

    def _go_on_without(self, error: CheckpointError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{error}; going on without storing features", stacklevel=5)

    def _evict(self, keep: Path) -> None:
        """Delete the entries that were not used for longest, down to 15/16 of the bound."""
        entries = []
        for path in self.folder.glob("*/.*.tmp"):
            if _age(path) > STALE:
                _delete(path)
        for path in self.folder.glob("*/*.features"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicts too
                continue
            used = max(status.st_atime_ns, status.st_mtime_ns)
            entries.append((used, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        if total > self.max_bytes:
            for used, size, path in sorted(entries):
                if total <= self.max_bytes * 15 // 16:
                    break
                if path != keep:
                    _delete(path)
                    total -= size
                    self._say_small(used)
        self._total, self._unseen = total, 0

    def _say_small(self, used: int) -> None:
        """Say once that an entry goes which was used in this run, at the time `used` in ns."""
        if used > self._began and not self._said_small:
            self._said_small = True
            say(
                f"note: the features in use take more than the {self.max_bytes / 1e9:g} GB that "
                f"{self.folder.absolute()} may hold: some are computed again and again; allow more"
            )


def _text(key_parts: Mapping[str, str]) -> str:
    """Key parts as the names and the headers of entries have them."""
    return json.dumps(dict(key_parts), sort_keys=True)


def _mark(path: Path, status: os.stat_result) -> int:
    """A number for a file as it is now; a set of many takes little memory."""
    return hash((path.name, status.st_ino, status.st_size, status.st_mtime_ns))


def _aligned(file: io.BufferedReader, size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of an entry, or all; its first tensor lies at a multiple of `ALIGNED`.

    In memory of numpy, which asks for large pages: torch's takes four times as long to be filled.
    """
    start = file.read(min(size, DIGEST + 8))
    begin = DIGEST + 8 + int.from_bytes(start[DIGEST:], "little")  # of the tensors
    memory = np.empty(size + ALIGNED, np.uint8)
    shift = -(memory.ctypes.data + begin) % ALIGNED
    found = memory[shift : shift + size]
    found[: len(start)] = np.frombuffer(start, np.uint8)
    return found[: len(start) + file.readinto(found[len(start) :].data)]


def _whole(data: NDArray[np.uint8]) -> bool:
    """Whether an entry begins with the digest of its other bytes."""
    return hashlib.sha256(data[DIGEST:].data).digest() == data[:DIGEST].tobytes()


def _tensors(data: NDArray[np.uint8], key: str) -> dict[str, Tensor] | None:
    """The tensors of an entry that is whole, in its memory; None: they belong to another key."""
    begin = DIGEST + 8 + int.from_bytes(data[DIGEST : DIGEST + 8].tobytes(), "little")
    header = json.loads(data[DIGEST + 8 : begin].tobytes())
    if header.pop("__metadata__")["key"] != key:
        return None
    found = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        # Each with a storage of its own, so that a process that is sent one tensor is sent no more.
        tensor = torch.from_numpy(data[begin + first : begin + end]).view(DTYPES[entry["dtype"]])
        if tensor.data_ptr() % ALIGNED:
            tensor = tensor.clone()
        found[name] = tensor.view(entry["shape"])
    return found


def _delete(path: Path) -> None:
    """Delete a file unless it is gone already, or belongs to another user."""
    with contextlib.suppress(OSError):
        path.unlink()


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def fingerprint(source: nn.Module | str | Path | Mapping[str, Tensor]) -> str:
    """SHA-256 of the content, as 64 hexadecimal digits.

    Of a module: names, dtypes, shapes and bits of its state dict without the adapters, so that a
    frozen base has the same fingerprint before and after injection. Of a path: the bytes of the
    file, or of all files of the folder with their names below it.
    """
    digest = hashlib.sha256()
    if isinstance(source, nn.Module):
        state = source.state_dict()
        _add_tensors(digest, {k: v for k, v in state.items() if not _of_adapter(k)})
    elif isinstance(source, Mapping):
        _add_tensors(digest, source)
    else:
        _add_files(digest, Path(source))
    return digest.hexdigest()


def _of_adapter(key: str) -> bool:
    return not ADAPTER_PARTS.isdisjoint(key.split("."))


def _add_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        tensor = plain(tensors[name])
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)


def _add_files(digest: hashlib._Hash, path: Path) -> None:
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    try:
        for file in files:
            if path.is_dir():
                name = file.relative_to(path).as_posix()
                digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.absolute()}: {error.strerror}") from error
