"""Which picture it is: a digest of its pixels, under which results for it are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # RGB [H, W, 3], as it lies in its file


@dataclass(frozen=True)
class KnownPicture:
    """A picture that was looked at.

    Attributes:
        name: for messages. content: see `content_digest`.
        grid: rows and columns of its tokens, after the pixel shuffle.
        read: gives it; called only where something must be computed from it.
    """

    name: str
    content: str
    grid: tuple[int, int]
    read: Callable[[], Picture]

    def once(self) -> KnownPicture:
        """The same picture, decoded when it is first read and kept for the second use."""
        return replace(self, read=cache(self.read))


def content_digest(picture: Picture) -> str:
    """SHA-256 of a picture's size and pixels, uint8 [H, W, 3]; not of its file's format."""
    digest = hashlib.sha256(f"{tuple(picture.shape)}\0".encode())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()
