"""A model in the cache of the hub's library, as that library leaves it: nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

COMMITS = ("a" * 40, "b" * 40)  # revisions; main is the last one


def write_model(cache: Path, name: str, settings: bytes, weights: Sequence[bytes]) -> Path:
    """Write a model of several revisions; returns its folder in the cache.

    Args:
        cache: what `huggingface_hub.constants.HF_HUB_CACHE` must name.
        name: owner/model.
        settings: its config.json. weights: the model.safetensors of each of `COMMITS`.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit, data in zip(COMMITS, weights, strict=True):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(settings)
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        (folder / "model.safetensors").symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[-1])
    return repository
