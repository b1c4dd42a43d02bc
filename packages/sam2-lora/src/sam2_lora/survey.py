"""What the records of a data set hold: objects, counts, faults, splits, doubles."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_core.errors import DataError
from sam2_lora.config import Config
from sam2_lora.masks import Object, components, union
from sam2_lora.records import Record

# Mask files are decoded to be counted and checked: some seconds. Of a larger set, an even part is.
MASK_PIXELS = 500_000_000


class Found(NamedTuple):
    """The objects of a picture."""

    kept: list[Object]
    small: list[Object]  # fewer pixels than --min_object_area: neither learned nor scored


def objects_of(record: Record, cfg: Config) -> Found:
    """Decode a record's masks and make objects of them by `cfg.objects` and `cfg.min_object_area`.

    Raises:
        DataError: a mask cannot be decoded.
    """
    items = record.objects
    rule = cfg.objects
    if rule == "auto":
        rule = "components" if record.merged else "annotations"
    if rule == "components":
        items = [part for item in items for part in components(item)]
    elif rule == "union":
        items = union(items)
    kept = [item for item in items if item.area >= cfg.min_object_area]
    return Found(kept, [item for item in items if item.area < cfg.min_object_area])


@dataclass
class Counts:
    """What was found in the pictures of one split."""

    pictures: int = 0
    looked_at: int = 0  # fewer than `pictures` if only a part was decoded
    empty: int = 0  # pictures without any annotation
    small: int = 0  # objects left out
    objects: Counter[str] = field(default_factory=Counter)  # per class
    problems: list[str] = field(default_factory=list)


def check(records: Sequence[Record], cfg: Config) -> Counts:
    """Decode the annotations of records, count the objects and collect what cannot be decoded.

    Every annotation is decoded; of mask files, as many as `MASK_PIXELS` allows, evenly spread.
    Pictures are known by their headers only: a picture that is cut off is found when it is read.
    """
    pixels = sum(record.size[0] * record.size[1] for record in records if record.mask is not None)
    step = -(-pixels // MASK_PIXELS) or 1
    counts = Counts(pictures=len(records))
    for record in records[::step]:
        try:
            found = objects_of(record, cfg)
        except DataError as error:
            counts.problems += str(error).splitlines()
            continue
        counts.looked_at += 1
        counts.empty += not found.kept and not found.small
        counts.small += len(found.small)
        counts.objects.update(item.label for item in found.kept)
    return counts


# -- splits ----------------------------------------------------------------------------------------


def rank(record: Record) -> float:
    """A number in [0, 1) from a picture's file name: the same on every machine and in every run."""
    digest = hashlib.sha256(record.image.name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_name(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Training and validation records: a picture is validated if the hash of its name says so.

    A picture never changes sides when others are added. Both sides get one at least; a single
    picture is on both.

    Args:
        share: of the pictures, for validation.
    """
    chosen = {record.key for record in records if rank(record) < share}
    by_rank = sorted(records, key=rank)
    if not chosen:
        chosen = {record.key for record in by_rank[:1]}
    elif len(chosen) == len(records):
        chosen -= {by_rank[-1].key}
    held_out = [record for record in records if record.key in chosen]
    rest = [record for record in records if record.key not in chosen]
    return rest or held_out, held_out or rest


def subset(records: Sequence[Record], count: int) -> list[Record]:
    """The `count` records whose names rank first, in their order; smaller subsets lie in larger."""
    chosen = {record.key for record in sorted(records, key=rank)[:count]}
    return [record for record in records if record.key in chosen]


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


def _length(record: Record) -> int:
    return record.image.stat().st_size


def _beginning(record: Record) -> bytes:
    with record.image.open("rb") as file:
        return file.read(2**12)


def _content(record: Record) -> bytes:
    return hashlib.sha256(record.image.read_bytes()).digest()
