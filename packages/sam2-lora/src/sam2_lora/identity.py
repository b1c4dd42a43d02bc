"""Which pictures and annotations are the same, wherever they lie and whenever they were copied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.errors import DataError, one_line
from sam2_lora.records import Record


def identity(record: Record) -> str:
    """Digest of what is annotated on a picture, wherever the data lies: 32 hexadecimal digits.

    It covers the picture's size and its annotations as they were read, not the content of files.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, [*record.size, record.mask_kind, record.merged])
    for shape in record.shapes:
        _add(digest, [shape.kind, shape.label, shape.data])
    return digest.hexdigest()


def file_length(path: Path) -> int:
    """Bytes of a file.

    Raises:
        DataError: it is gone.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{one_line(path.absolute())}: {error.strerror}") from error


def _add(digest: hashlib.blake2b, value: Any) -> None:
    """Add lists, tuples, arrays, numbers and text; type and length keep them apart."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        if len(value) > 32 and all(type(item) is int for item in value):  # run lengths: quick
            digest.update(repr(value).encode())
            return
        for item in value:
            _add(digest, item)
    else:
        text = repr(value).encode("utf-8", "surrogateescape")
        digest.update(f"{len(text)}:".encode() + text)


def doubles(some: Sequence[Record], others: Sequence[Record]) -> list[str]:
    """Keys of `some` whose picture is, byte for byte, among `others` too.

    What does not agree in length is never opened, what does not begin alike never read wholly.
    """
    for fingerprint in (_length, _beginning, _content):
        mine, theirs = [[fingerprint(r) for r in records] for records in (some, others)]
        both = set(mine) & set(theirs)
        some = [record for record, mark in zip(some, mine, strict=True) if mark in both]
        others = [record for record, mark in zip(others, theirs, strict=True) if mark in both]
    return [record.key for record in some]


def _length(record: Record) -> object:
    return _read(record, lambda path: path.stat().st_size)


def _beginning(record: Record) -> object:
    return _read(record, lambda path: _head(path, 2**12))


def _content(record: Record) -> object:
    return _read(record, lambda path: hashlib.sha256(path.read_bytes()).digest())


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _read(record: Record, get: Callable[[Path], object]) -> object:
    """What `get` gives; of a file that is gone meanwhile, something that equals nothing else."""
    try:
        return get(record.image)
    except OSError:
        return object()
