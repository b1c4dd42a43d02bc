"""The network with its files: build it from a checkpoint, find its vocabulary, load and save LoRA.

How it is run is in `network`. Adapters have transformers' module names in all their files: these
name q, k and v on their own, which the official model keeps in one tensor, so that only with them
an adapter means the same in every program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core import base_file, preflight
from lora_core.adapters import file as adapter_file
from lora_core.adapters import on_base
from lora_core.cache import fingerprint
from lora_core.errors import ConfigError
from sam3_lora import official
from sam3_lora.config import PATCH, Config, Lora
from sam3_lora.network import build_network, set_gradient_checkpointing
from sam3_lora.placement import adapt as adapt
from sam3_lora.tokenizer import ADVICE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import Sam3Model

# -- building it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base(base_file.Base):
    """Where a network's frozen weights came from; `model.sam3_base`."""

    has_tracker: bool  # whether the file holds the video tracker too


def build(cfg: Config) -> Sam3Model:
    """The base network of a configuration on its device, float32, frozen, in evaluation mode.

    Half precision is a matter of autocast; the weights that adapters are added to stay exact.

    Raises:
        CheckpointError: missing, damaged or of another model: see `official.read_official`.
        ConfigError: there is no such device.
    """
    from lora_core.training.arguments import choose_device

    model = load(cfg.paths.sam3_checkpoint, cfg.dataset.size)
    set_gradient_checkpointing(model, cfg.training.gradient_checkpointing)
    return model.to(choose_device(cfg.device))


def load(
    checkpoint: str | Path,
    size: tuple[int, int] | None = None,
    adapter: str | Path | None = None,
    allow_partial: bool = False,
) -> Sam3Model:
    """A base network, with an adapter on it if one is given: evaluation mode, float32, on the CPU.

    Args:
        checkpoint: file, folder or hub id: see `official.find_checkpoint`.
        size: (height, width) of its input; None: that of the adapter's training, else that of the
            checkpoint.
        adapter: PEFT directory or single file: see `load_adapter`.
        allow_partial: use what fits of an adapter that is incomplete.

    Raises:
        CheckpointError: missing, damaged or of another model: see `official.read_official`.
        ConfigError: an impossible size.
    """
    path = official.find_checkpoint(checkpoint)
    model = from_file(official.read_official(path))
    name = base_file.lasting_name(checkpoint, path)
    model.sam3_base = replace(model.sam3_base, name=name)
    if adapter is not None:
        metadata = load_adapter(model, adapter, allow_partial)
        size = size or base_file.recorded_size(metadata)
    if size is not None:
        set_image_size(model, size)
    return model.eval()


def from_file(file: official.OfficialFile) -> Sam3Model:
    """The network of a checkpoint that has been read; half-precision weights become float32.

    Raises:
        CheckpointError: the tensors do not fit the model, with their names, or are not finite.
    """
    model = build_network(official.network_config(file), "meta")
    official.check_fit(file, model.state_dict())
    state = file.state
    base_file.refuse_nan(file.path, state)
    base = _base(file, None)
    del file  # with the caller's last use of it, each tensor goes when it is copied
    model.load_state_dict(_own_copies(state), strict=True, assign=True)
    model.sam3_base = replace(base, fingerprint=fingerprint(model))
    return model.requires_grad_(False).eval()


def _own_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32 tensors with memory of their own (q, k and v are views of one); empties `state`."""
    return {
        name: state.pop(name)
        .detach()
        .to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        for name in list(state)
    }


def _base(file: official.OfficialFile, weights: str | None) -> Base:
    return Base(
        path=file.path.absolute(),
        name=file.path.name,
        format=file.format,
        variant="sam3" if official.is_published(file) else "custom",
        fingerprint=weights,
        has_tracker=any(map(official.of_tracker, file.tensors)),
    )


def base_fingerprint(file: official.OfficialFile) -> str:
    """SHA-256 of the detector in float32: equal for all packings of equal weights."""
    return fingerprint({name: tensor.float() for name, tensor in file.state.items()})


# -- before any value is read --------------------------------------------------------------------


def skeleton(cfg: Config) -> Sam3Model:
    """The base network of a configuration on the meta device: only headers are read.

    Raises:
        CheckpointError: as `build`, as far as headers tell.
    """
    file = official.read_official(official.find_checkpoint(cfg.paths.sam3_checkpoint), "meta")
    model = build_network(official.network_config(file), "meta").requires_grad_(False)
    official.check_fit(file, model.state_dict())
    model.sam3_base = _base(file, None)
    set_image_size(model, cfg.dataset.size)
    set_gradient_checkpointing(model, cfg.training.gradient_checkpointing)
    return model


def glance(cfg: Config, *checks: Callable[[Sam3Model], object]) -> None:
    """Look for the files of a configuration, at the header of its base, and at its vocabulary.

    Nothing is downloaded.

    Args:
        checks: more of them, given the `skeleton`, where the base is on this machine.

    Raises:
        CheckpointError: a missing adapter, or what `skeleton` raises.
        ConfigError: no vocabulary, or that of another model.
    """
    preflight.check_all(
        lambda: on_base.refuse_missing(cfg.adapter), lambda: _base_fits(cfg, checks)
    )


def _base_fits(cfg: Config, checks: Sequence[Callable[[Sam3Model], object]]) -> None:
    if official.find_local(cfg.paths.sam3_checkpoint):
        model = skeleton(cfg)
        words = partial(tokenizer, model, cfg.paths.bpe_path)
        preflight.check_all(words, *(partial(check, model) for check in checks))
    elif cfg.paths.bpe_path:
        load_tokenizer(cfg.paths.bpe_path)


# -- its input -----------------------------------------------------------------------------------


def image_size(model: Sam3Model) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model is given.

    The network itself runs at any size of whole patches; this is the one that it was trained for.
    """
    size = getattr(model, "sam3_size", None)
    if size is None:
        side = model.config.vision_config.backbone_config.image_size
        size = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    height, width = size
    return height, width


def set_image_size(model: Sam3Model, size: tuple[int, int]) -> None:
    """Set what `image_size` gives.

    Raises:
        ConfigError: a side that is no multiple of the patch.
    """
    if any(side < PATCH or side % PATCH for side in size):
        raise ConfigError(
            f"image size {size[0]}x{size[1]}: both sides must be multiples of {PATCH}"
        )
    model.sam3_size = (int(size[0]), int(size[1]))


def tokenizer(model: Sam3Model, bpe_path: str | Path | None = None) -> Tokenizer:
    """The vocabulary of a network: the given one, else what lies in or beside its base.

    Args:
        bpe_path: `bpe_simple_vocab_16e6.txt.gz`, or whatever `load_tokenizer` reads.

    Raises:
        ConfigError: there is none, or it is not the one that the text encoder was trained with.
        CheckpointError: its file is damaged.
    """
    base = model.sam3_base.path
    place = Path(bpe_path) if bpe_path else base if base.is_dir() else base.parent
    words = load_tokenizer(place)
    rows = model.config.text_config.vocab_size
    if words.size != rows:
        raise ConfigError(
            f"tokenizer: {place.absolute()} has {words.size} tokens, while the text encoder of "
            f"{base} knows {rows}: phrases would mean something else. {ADVICE}"
        )
    return words


# -- adapters as files ---------------------------------------------------------------------------


def adapter_metadata(model: Sam3Model) -> dict[str, Any]:
    """What an adapter must remember to be used correctly: its base and its image size."""
    return on_base.metadata(model.sam3_base, image_size(model))


def save_adapter(
    model: Sam3Model, path: str | Path, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter, with `adapter_metadata` and further facts of the caller.

    A name ending in `.pt`, `.pth` or `.torch` gives one file {format, config, metadata, tensors};
    any other gives a PEFT directory, which PEFT loads on a `Sam3Model`. Both have transformers'
    module names.
    """
    return adapter_file.save_adapter(
        model, path, metadata={**adapter_metadata(model), **(facts or {})}
    )


def load_adapter(model: Sam3Model, path: str | Path, allow_partial: bool = False) -> dict[str, Any]:
    """Put a saved adapter on its base network, trainable; returns the adapter's metadata.

    A bare dict of tensors has no alpha: the default of `Config` is taken, and said.

    Raises:
        CheckpointError: unusable file, or the adapter of another base.
    """
    return on_base.load(model, path, model.sam3_base, Lora.alpha, allow_partial=allow_partial)
