"""The network: build it from a checkpoint, set its input size, put adapters on it and save them.

How it is run is in `forward`, whose names are here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_core import base_file, preflight
from lora_core.adapters import file as adapter_file
from lora_core.adapters import on_base
from lora_core.cache import fingerprint
from lora_core.errors import CheckpointError
from sam2_lora import names, official, placement
from sam2_lora.config import Config
from sam2_lora.forward import Decoded as Decoded
from sam2_lora.forward import Features as Features
from sam2_lora.forward import decode as decode
from sam2_lora.forward import encode as encode
from sam2_lora.forward import encode_pictures as encode_pictures
from sam2_lora.forward import image_size as image_size
from sam2_lora.forward import set_image_size as set_image_size

if TYPE_CHECKING:
    from transformers import Sam2Model

# -- building it ---------------------------------------------------------------------------------


def enable_gradient_checkpointing(model: Sam2Model) -> None:
    """Recompute the blocks' activations in the backward pass: about 2.6 times less memory.

    It acts in training mode only.
    """
    # transformers builds the blocks for it, but does not declare so for this model.
    model.supports_gradient_checkpointing = True
    newest = getattr(model, "activation_checkpointing_enable", None)
    enable = newest or model.gradient_checkpointing_enable  # its name in earlier releases
    # The reentrant kind would leave the first blocks' adapters without gradient.
    enable({"use_reentrant": False})


@dataclass(frozen=True)
class Base(base_file.Base):
    """Where a network's frozen weights came from; `model.sam2_base`."""

    has_video: bool  # whether the file holds the video memory too


def build(cfg: Config) -> Sam2Model:
    """The base network of a configuration, in evaluation mode, float32, on the CPU.

    Raises:
        CheckpointError: missing, damaged or of another model: see `official.read_official`.
    """
    model = load(cfg.checkpoint, cfg.size)
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def load(
    checkpoint: str | Path,
    size: tuple[int, int] | None = None,
    adapter: str | Path | None = None,
    allow_partial: bool = False,
) -> Sam2Model:
    """A base network, with an adapter on it if one is given: evaluation mode, float32, on the CPU.

    Args:
        checkpoint: file, folder or hub id: see `official.find_checkpoint`.
        size: (height, width) of the pictures; None: that of the adapter's training, else that of
            the checkpoint.
        adapter: PEFT directory or `.torch` file: see `load_adapter`.
        allow_partial: use what fits of an adapter that is incomplete.

    Raises:
        CheckpointError: missing, damaged or of another model: see `official.read_official`.
    """
    path = official.find_checkpoint(checkpoint)
    model = from_file(official.read_official(path))
    model.sam2_base = replace(model.sam2_base, name=base_file.lasting_name(checkpoint, path))
    if adapter is not None:
        metadata = load_adapter(model, adapter, allow_partial)
        size = size or base_file.recorded_size(metadata)
    if size is not None:
        set_image_size(model, size)
    return model.eval()


def from_file(file: official.OfficialFile) -> Sam2Model:
    """The network of a checkpoint that has been read; half-precision weights become float32.

    Raises:
        CheckpointError: the tensors do not fit the variant, with their names.
    """
    model = network(file.variant)
    official.check_fit(file, names.to_official(model.state_dict()))
    base_file.refuse_nan(file.path, file.image)
    state = names.to_transformers(file.image)
    # A copy each, so that the two positional matrices are two tensors.
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.sam2_base = _base(file, fingerprint(model))
    return model.requires_grad_(False).eval()


def _base(file: official.OfficialFile, weights: str | None) -> Base:
    return Base(
        path=file.path.absolute(),
        name=file.path.name,
        format=file.format,
        variant=file.variant.name,
        fingerprint=weights,
        has_video=len(file.image) < len(file.tensors),
    )


def skeleton(cfg: Config) -> Sam2Model:
    """The base network of a configuration on the meta device: only headers are read.

    Raises:
        CheckpointError: as `build`, as far as headers tell.
    """
    path = official.find_checkpoint(cfg.checkpoint)
    file = official.read_official(path, "meta")
    model = network(file.variant).requires_grad_(False)
    official.check_fit(file, names.to_official(model.state_dict()))
    model.sam2_base = _base(file, None)
    set_image_size(model, cfg.size)
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.eval()


def glance(cfg: Config) -> None:
    """Look for the files of a configuration, and at the header of its base; nothing is downloaded.

    Raises:
        CheckpointError: a missing adapter, or what `skeleton` raises.
        ConfigError: `--last_blocks` is more than the image encoder has.
    """
    on_base.refuse_missing(cfg.adapter)
    if official.find_local(cfg.checkpoint):
        empty = skeleton(cfg)
        if cfg.last_blocks is not None and not cfg.adapter:
            placement.adapt(empty, cfg)


def base_fingerprint(file: official.OfficialFile) -> str:
    """SHA-256 of the image part in float32: equal for all containers of equal weights."""
    state = names.to_transformers(file.image)
    return fingerprint({name: tensor.float() for name, tensor in state.items()})


def network(variant: official.Variant) -> Sam2Model:
    """The network without weights (on the meta device)."""
    preflight.torchvision()
    from transformers import Sam2Config, Sam2Model

    from sam2_lora.image_encoder import lighten

    try:
        config = Sam2Config(**variant.config)
        with torch.device("meta"):
            model = Sam2Model._from_config(config, attn_implementation="sdpa")
    except Exception as error:  # a wrong config fails anywhere in the library
        raise CheckpointError(f"not the config of a SAM 2: {error}") from error
    lighten(model.vision_encoder)
    return model


# -- adapters as files ---------------------------------------------------------------------------


def adapter_metadata(model: Sam2Model) -> dict[str, Any]:
    """What an adapter must remember to be used correctly: its base and its image size."""
    return on_base.metadata(model.sam2_base, image_size(model))


def save_adapter(
    model: Sam2Model, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter, with `adapter_metadata` and further facts of the caller.

    A name ending in `.torch`, `.pth` or `.pt` gives one file with official module names; any other
    gives a PEFT directory with transformers names, which PEFT loads on a `Sam2Model`.
    """
    facts = {**adapter_metadata(model), **(metadata or {})}
    rename = names.module_to_official if Path(path).suffix in adapter_file.SINGLE_FILES else None
    return adapter_file.save_adapter(model, path, metadata=facts, rename=rename)


def load_adapter(model: Sam2Model, path: str | Path, allow_partial: bool = False) -> dict[str, Any]:
    """Put a saved adapter on its base network, trainable; returns the adapter's metadata.

    Official and transformers module names are both understood. A bare dict of tensors, as older
    programs wrote it, has no alpha: the default of `Config` is taken, and said.

    Raises:
        CheckpointError: unusable file, or the adapter of another base.
    """
    return on_base.load(
        model,
        path,
        model.sam2_base,
        Config.lora_alpha,
        rename=names.module_to_official,
        allow_partial=allow_partial,
    )
