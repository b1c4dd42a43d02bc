"""A survey of annotated pictures: each is looked at wholly, bad ones stop the run or are left out.

A package brings its own records, anything with a `key` and an `image`, and a `Look` at them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from lora_core.errors import DataError, one_line
from lora_core.report import plural
from lora_core.validate import Bad, samples, stop_or_skip, validate

Facts = Mapping[str, Any]  # plain values, as JSON has them
Surveyed: TypeAlias = dict[tuple[str, str], Facts]  # by split and key: splits may share pictures


class PictureRecord(Protocol):
    """A picture and what is annotated on it."""

    @property
    def key(self) -> str:
        """Its name, unique in its split."""

    @property
    def image(self) -> Path:
        """Its file."""


R = TypeVar("R", bound=PictureRecord)


@dataclass(frozen=True)
class Look(Generic[R]):
    """How a package looks at a record.

    Attributes:
        at: decodes the picture and all that is annotated on it, wholly; gives facts about it, or
            raises DataError with a line for each problem.
        kind: name and version of `at` with the settings that change its facts.
        files: those that it decodes.
        identity: digest of what is annotated, wherever the data lies.
    """

    at: Callable[[R], dict[str, Any]]
    kind: str
    files: Callable[[R], Iterable[Path]]
    identity: Callable[[R], str]


class Rules(NamedTuple):
    """What is done about bad pictures: the settings of these names, and where the data lies."""

    root: Path
    on_bad_sample: str
    max_bad_fraction: float
    report: Path | None  # lists them when they are too many; None: none is written


def look_at(
    parts: Mapping[str, Sequence[R]], look: Look[R], root: Path
) -> tuple[Surveyed, list[Bad]]:
    """Facts of every good record, and the bad ones.

    Args:
        parts: records by split.
        root: folder of the data set.
    """
    pairs = [(split, record) for split, records in parts.items() for record in records]
    outcomes = validate(
        pairs,
        lambda pair: look.at(pair[1]),
        kind=look.kind,
        root=root,
        files=lambda pair: look.files(pair[1]),
        name=lambda pair: str(pair[1].image),
        content=lambda pair: look.identity(pair[1]),
        what="pictures and annotations",
    )
    facts: Surveyed = {}
    bad = []
    for (split, record), outcome in zip(pairs, outcomes, strict=True):
        if outcome.problem:
            bad.append(Bad(split, record.key, outcome.problem))
        else:
            facts[split, record.key] = outcome.value
    return facts, bad


def settled(
    parts: Mapping[str, Sequence[R]], known: Sequence[Bad], look: Look[R], rules: Rules
) -> tuple[Surveyed, list[Bad]]:
    """Facts of the good pictures, and those that are left out.

    Args:
        known: what is known to be bad already.

    Raises:
        DataError: there are bad ones, and they may not be left out.
    """
    facts, found = look_at(parts, look, rules.root)
    for one in known:
        facts.pop((one.split, one.sample), None)
    bad = [*known, *found]
    good = Counter(split for split, _ in facts)
    stop_or_skip(bad, good, rules.on_bad_sample, rules.max_bad_fraction, rules.root, rules.report)
    return facts, bad


def without(
    parts: Mapping[str, Sequence[R]], bad: Sequence[Bad], facts: Surveyed, root: Path
) -> dict[str, list[R]]:
    """The records without the bad ones.

    Raises:
        DataError: a record that the first process has not looked at.
    """
    gone = samples(bad)
    rest = {
        split: [record for record in records if (split, record.key) not in gone]
        for split, records in parts.items()
    }
    here = {(split, record.key) for split, records in rest.items() for record in records}
    if other := sorted(here ^ facts.keys()):
        raise DataError(
            f"{root.absolute()}: not the pictures that the first process of the run "
            f"sees: {len(other)} differ, such as {other[0][1]}; all machines need the same data set"
        )
    return rest


# -- remarks ---------------------------------------------------------------------------------------


def left_out(bad: Sequence[Bad]) -> list[str]:
    """A line for each split with bad samples."""
    per_split = Counter(split for split, _ in samples(bad))
    first = {one.split: one.reason.splitlines()[0] for one in reversed(bad)}
    return [
        f"{plural(number, 'bad sample')} of {split} left out, the first: {first[split]}"
        for split, number in per_split.items()
    ]


def remarks(parts: Mapping[str, Sequence[PictureRecord]]) -> list[str]:
    """What to be careful about: pictures of the other splits that are in "train" too."""
    found = []
    for name in ("val", "test"):
        keys = doubles(parts.get(name, []), parts["train"])
        if keys:
            found.append(
                f"{plural(len(keys), 'picture')} of {name} in train too, so that its scores flatter"
                + ": "
                + ", ".join(keys[:3])
                + (", ..." if len(keys) > 3 else "")
            )
    return found


def doubles(some: Sequence[PictureRecord], others: Sequence[PictureRecord]) -> list[str]:
    """Keys of `some` whose picture is, byte for byte, among `others` too.

    What does not agree in length is never opened, what does not begin alike never read wholly.
    """
    for fingerprint in (_length, _beginning, _content):
        mine, theirs = [[fingerprint(r) for r in records] for records in (some, others)]
        both = set(mine) & set(theirs)
        some = [record for record, mark in zip(some, mine, strict=True) if mark in both]
        others = [record for record, mark in zip(others, theirs, strict=True) if mark in both]
    return [record.key for record in some]


def _length(record: PictureRecord) -> object:
    return _read(record, lambda path: path.stat().st_size)


def _beginning(record: PictureRecord) -> object:
    return _read(record, lambda path: _head(path, 2**12))


def _content(record: PictureRecord) -> object:
    return _read(record, lambda path: hashlib.sha256(path.read_bytes()).digest())


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _read(record: PictureRecord, get: Callable[[Path], object]) -> object:
    """What `get` gives; of a file that is gone meanwhile, something that equals nothing else."""
    try:
        return get(record.image)
    except OSError:
        return object()


# -- identity --------------------------------------------------------------------------------------


def fingerprint(parts: Mapping[str, Sequence[R]], look: Look[R]) -> str:
    """Identity of pictures and annotations, in their order: 32 hexadecimal digits.

    Names in the data set, lengths of the files and annotations; not where the data lies, when it
    was copied, or the settings of the run.

    Raises:
        DataError: a file that was there is gone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, records in parts.items():
        digest.update(f"{name} {len(records)}\n".encode())
        for record in records:
            lengths = [file_length(path) for path in look.files(record)]
            line = f"{record.key}\0{lengths}\0{look.identity(record)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
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


def digest_of(*values: Any) -> str:
    """Digest of lists, tuples, arrays, numbers and text: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


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
