"""Which side a picture is on, and which number a class has: the same in every run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from sam3_lora.formats.annotated import Part
from sam3_lora.records import Record


def split_by_name(
    records: Sequence[Record], share: float, seed: int
) -> tuple[list[Record], list[Record], str]:
    """Training and validation pictures, and what is to be said about it.

    A picture is validated if the hash of its name says so. Both sides get one at least.

    Args:
        share: of the pictures, for validation.
    """
    if len(records) < 2:
        return list(records), [], "a single picture: none is left for validation"
    by_rank = sorted(records, key=lambda record: (rank(record.image.name, seed), record.key))
    chosen = {record.key for record in records if rank(record.image.name, seed) < share}
    note = ""
    if not chosen or len(chosen) == len(records):
        chosen = chosen - {by_rank[-1].key} or {by_rank[0].key}
        note = (
            f"of {len(records)} pictures --val_fraction {share:g} leaves one side empty: it gets "
            "one, which may change sides when pictures are added"
        )
    train = [record for record in records if record.key not in chosen]
    return train, [record for record in records if record.key in chosen], note


def rank(name: str, seed: int) -> float:
    """A number in [0, 1) that follows from a picture's name without its suffix.

    Roboflow's copies of one picture (x_jpg.rf.0a1b....jpg) have the same, so that an augmented
    copy of a training picture is never validated with.
    """
    stem = re.sub(r"\.rf\.[0-9A-Za-z]{16,}$", "", PurePath(name).stem)
    text = f"{seed}\0{stem}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / 2**64


def numbered(parts: Mapping[str, Part]) -> dict[str, int]:
    """Class -> its number in all files: its own where that is free, else the next."""
    numbers: dict[str, int] = {}
    taken: set[int] = set()
    wanted = [pair for part in parts.values() for pair in part.numbers.items()]
    for name, number in wanted:
        if name not in numbers and number not in taken:
            numbers[name] = number
            taken.add(number)
    for name, _ in wanted:
        if name not in numbers:
            numbers[name] = max(taken, default=0) + 1
            taken.add(numbers[name])
    return numbers
