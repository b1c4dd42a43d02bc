"""Which pictures validate, where a data set does not say: the same ones in every run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TypeVar

from lora_core.pictures.survey import PictureRecord

R = TypeVar("R", bound=PictureRecord)


def split_by_name(records: Sequence[R], share: float, seed: int) -> tuple[list[R], list[R], str]:
    """Training and validation pictures, and what is to be said about it.

    A picture is validated if the hash of its name says so, so that it never changes sides, whatever
    is added later. Both sides get one at least.

    Args:
        share: of the pictures, for validation.
        seed: another one chooses others.
    """
    if len(records) < 2:
        return list(records), [], "a single picture: none is left for validation"
    ranks = {record.key: rank(record.image.name, seed) for record in records}
    by_rank = sorted(ranks, key=lambda key: (ranks[key], key))
    chosen = {key for key, value in ranks.items() if value < share}
    note = ""
    if not chosen or len(chosen) == len(records):
        chosen = chosen - {by_rank[-1]} or {by_rank[0]}
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
