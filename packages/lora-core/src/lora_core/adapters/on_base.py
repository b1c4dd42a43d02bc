"""An adapter on its base model: what it remembers of it, and the check that it is the right one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lora_core import base_file
from lora_core.adapters import file as adapter_file
from lora_core.adapters.match import size_limit
from lora_core.base_file import Base
from lora_core.errors import CheckpointError
from lora_core.report import say


def metadata(base: Base, image_size: tuple[int, int]) -> dict[str, Any]:
    """What an adapter must remember to be used correctly: its base and its input's (H, W)."""
    return {
        "base": {"file": base.name, "variant": base.variant, "fingerprint": base.fingerprint},
        "image_size": list(image_size),
    }


def refuse_missing(adapter: str | None) -> None:
    """Look for the file or folder of `--adapter`, if one is given.

    Raises:
        CheckpointError: there is none.
    """
    if adapter and not os.path.exists(adapter):
        raise CheckpointError(f"--adapter {Path(adapter).absolute()} does not exist")


def load(
    model: nn.Module,
    path: str | Path,
    base: Base,
    default_alpha: float,
    *,
    rename: Callable[[str], str] | None = None,
    allow_partial: bool = False,
) -> dict[str, Any]:
    """Put a saved adapter on its base network, trainable; returns the adapter's metadata.

    Args:
        base: of `model`.
        default_alpha: that of a bare dict of tensors, as older programs wrote it, which has none.
        rename: live module path -> path in files.
        allow_partial: use what fits of an adapter that is incomplete.

    Raises:
        CheckpointError: unusable file, or the adapter of another base.
    """
    file = adapter_file.read_adapter(path, size_limit(model))
    here = f"{base.path} ({base.variant})"
    base_file.refuse_other_base(path, file.metadata, here, base.fingerprint)
    alpha = None if file.config else default_alpha
    adapter_file.load_adapter(
        model, file, rename=rename, lora_alpha=alpha, allow_partial=allow_partial
    )
    if alpha is not None:
        say(f"{path} holds tensors only: lora_alpha is taken to be {alpha}, the default")
    return file.metadata
