"""Depth for a loaded model: which depth model, and the encoding of the pictures of a batch.

The depth model is no part of the network: its weights are in no state dict and no adapter, it does
not follow `half()`, and it computes where the network is. Where depth is wanted and cannot be had,
that is an error; no answer is given without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from isaac_lora.depth.checkpoint import find_depth_checkpoint
from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.fusion import depth_encoding_of
from isaac_lora.depth.settings import (
    FILE,
    DepthSettings,
    check_adapter,
    read_depth_settings,
    setting_problems,
)
from isaac_lora.network.configuration import IsaacConfig
from lora_core.base_file import read_settings
from lora_core.errors import ConfigError, DataError, listing
from lora_core.report import plural

ARGUMENTS = ("use_depth", "depth_checkpoint_path", "depth_alpha", "depth_input_size")


# -- which depth model -----------------------------------------------------------------------------


def local_folder(place: Any) -> Path | None:
    """The folder that `from_pretrained` was given; None: a name on the hub, or nothing."""
    found = isinstance(place, str | os.PathLike) and os.path.isdir(place)
    return Path(place) if found else None


def planned_depth(
    folder: Path | None, config: Any, asked: Mapping[str, Any]
) -> tuple[dict[str, Any], DepthGrids | None]:
    """What to change in a model's configuration, and its depth model, before its weights load.

    What was asked for counts before `depth.json` in the folder (of an adapter, or of a model that
    one was merged into), and this before `config.json`.

    Args:
        folder: of the model or adapter. config: as `from_pretrained` was given it, or None.
        asked: values of `ARGUMENTS`; None: not given.

    Returns:
        the changes, and the depth model on the CPU. None: no depth, as far as files at hand tell.

    Raises:
        ConfigError: depth is wanted without a checkpoint, a checkpoint without depth, or
            impossible settings.
        CheckpointError: the depth checkpoint is missing, damaged, of another model, or not what
            the folder's adapter was trained with.
    """
    given = {name: asked[name] for name in ARGUMENTS if asked[name] is not None}
    if "depth_checkpoint_path" in given:
        given["depth_checkpoint_path"] = os.fspath(given["depth_checkpoint_path"])
    trained = read_depth_settings(folder) if folder else None
    changes = _of_adapter(trained) | given
    planned = _configured(folder, config) | changes
    if planned["use_depth"]:
        depths = read_depth(planned, trained)
        if folder and trained:
            check_adapter(folder, depths.settings(planned["depth_alpha"]))
        return changes, depths
    if "depth_checkpoint_path" in given and "use_depth" not in given:
        raise ConfigError(
            f"depth_checkpoint_path is {given['depth_checkpoint_path']}, but use_depth is not "
            "given; write use_depth=True, or False to go without depth"
        )
    return changes, None


def _of_adapter(trained: DepthSettings | None) -> dict[str, Any]:
    if trained is None:
        return {}
    sizes = {"depth_alpha": trained.alpha, "depth_input_size": trained.input_size}
    return {"use_depth": True, **sizes}


def _configured(folder: Path | None, config: Any) -> dict[str, Any]:
    """What a configuration says of depth, as far as it is at hand."""
    written: Mapping[str, Any] = {}
    if isinstance(config, IsaacConfig):
        written = vars(config)
    elif config is None and folder and (folder / "config.json").is_file():
        written = read_settings(folder / "config.json")
    return {name: written.get(name, getattr(IsaacConfig, name)) for name in ARGUMENTS}


def read_depth(settings: Mapping[str, Any], trained: DepthSettings | None = None) -> DepthGrids:
    """Read the depth model that settings with `use_depth` name, on the CPU.

    Args:
        settings: values of `ARGUMENTS`. trained: of the adapter, for the message.

    Raises:
        ConfigError: none is named, or impossible settings.
        CheckpointError: missing, damaged, of another model.
    """
    path = settings["depth_checkpoint_path"]
    if path is None:
        reason = "use_depth is on"
        if trained is not None:
            reason = f"it was trained with depth from {trained.checkpoint} ({FILE})"
        raise ConfigError(
            f"{reason}, but no depth_checkpoint_path is given: name a file such as "
            "depth_anything_v2_vits.pth, or write use_depth=False"
        )
    checkpoint = find_depth_checkpoint(path)
    size = settings["depth_input_size"]
    if problems := setting_problems(settings["depth_alpha"], size, checkpoint.patch):
        raise ConfigError(listing(problems))
    depths = DepthGrids(checkpoint, size)
    depths.estimator()  # damaged values are told now and not at the first question
    return depths


def check_folder(folder: Path, here: DepthSettings | None) -> None:
    """Compare the depth that a folder's adapter was trained with with that of the model.

    Raises:
        CheckpointError: another depth. Warns: depth on one side only.
    """
    if (folder / "adapter_config.json").exists() or os.path.lexists(folder / FILE):
        check_adapter(folder, here)


# -- its encoding ----------------------------------------------------------------------------------


def encoding_of_pictures(
    depths: DepthGrids, pictures: Sequence[Any], grids: Tensor, config: IsaacConfig
) -> Tensor:
    """Give the `depth_encoding` of a batch, (tokens of all images, C) float32.

    Args:
        depths: where it computes is where the result is.
        pictures: RGB, uint8 [H, W, 3], as in their files, in the order of `grids`.
        grids: (images, 2), before the shuffle.

    Raises:
        DataError: another number of pictures than of grids.
    """
    if len(pictures) != len(grids):
        raise DataError(
            f"`pictures` has {plural(len(pictures), 'picture')} for the depth of the "
            f"{plural(len(grids), 'image')} of `grids`; give the picture of every "
            "image, in the same order"
        )
    return depth_encoding_of(
        pictures,
        grids.tolist(),
        config.pixel_shuffle_scale,
        depths,
        config.hidden_size,
        config.depth_alpha,
    )
