"""Results of frozen networks, kept on disk: image embeddings, depth maps, text features.

An entry's file name is the digest of everything that its value depends on, so that nothing in the
cache can ever be out of date; its first bytes are the digest of the rest, so that a damaged entry
is noticed and computed again. Several processes may share one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from lora_core.errors import CheckpointError
from lora_core.report import say
from lora_core.tensor_file import atomic_write, plain, safetensors_bytes

DIGEST = hashlib.sha256().digest_size
STALE = 3600  # seconds after which an unfinished file belongs to a process that died
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
        found = self._read(self.path(key_parts))
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
        digest = hashlib.sha256(json.dumps(dict(key_parts), sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.features"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        try:
            data = path.read_bytes()
        except OSError:  # never written, evicted by another process, or nowhere to be read from
            return None
        if hashlib.sha256(memoryview(data)[DIGEST:]).digest() != data[:DIGEST]:
            self._heal(path)
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or of another user: it is good
            os.utime(path)  # the time of last use
        tensors: dict[str, Tensor] = safetensors.torch.load(data[DIGEST:])
        return tensors

    def _heal(self, path: Path) -> None:
        self.healed += 1
        if self.healed == 1:
            say(f"{path.absolute()} is damaged: it is computed again, and so are others like it")
        _delete(path)

    def _write(
        self, path: Path, tensors: Mapping[str, Tensor], key_parts: Mapping[str, str]
    ) -> None:
        data = safetensors_bytes(tensors, {"key": json.dumps(dict(key_parts), sort_keys=True)})
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
            entries.append((status.st_mtime_ns, status.st_size, path))
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
