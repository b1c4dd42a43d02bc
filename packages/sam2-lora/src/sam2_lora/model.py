"""The network: build it from a checkpoint, set its input size, say where LoRA goes, run it.

`encode` and `decode` are the image path of transformers' `Sam2Model` with gradient and flat over
objects: each object names the picture that it lies in, so pictures with different numbers of
objects share a batch without padding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_core import preflight
from lora_core.adapters import file as adapter_file
from lora_core.adapters.match import size_limit
from lora_core.cache import fingerprint
from lora_core.errors import CheckpointError, ConfigError
from lora_core.report import say
from sam2_lora import names, official
from sam2_lora.config import STRIDE, Config

if TYPE_CHECKING:
    from transformers import Sam2Model

# -- running it ----------------------------------------------------------------------------------


class Features(NamedTuple):
    """What the decoder needs of B pictures of H x W pixels; C is 256 in the published models."""

    image_embed: Tensor  # [B, C, H/16, W/16]
    feat_s0: Tensor  # [B, C/8, H/4, W/4]
    feat_s1: Tensor  # [B, C/4, H/8, W/8]


class Decoded(NamedTuple):
    """Prediction for N objects, float32: M = 3 masks, or 1."""

    masks: Tensor  # [N, M, H/4, W/4] logits
    iou: Tensor  # [N, M] predicted IoU, 0..1
    object_score: Tensor  # [N, 1] logit: is there an object at all


def encode(model: Sam2Model, pixel_values: Tensor) -> Features:
    """Image features, with gradient.

    Args:
        model: a network whose image size (`set_image_size`) is that of the pictures.
        pixel_values: f32 [B, 3, H, W], normalised (`image.preprocess`).

    Raises:
        ValueError: the pictures have another size.
    """
    batch, size = pixel_values.shape[0], tuple(pixel_values.shape[-2:])
    if size != image_size(model):
        raise ValueError(f"pictures of {size} pixels, but the model is set to {image_size(model)}")
    levels = model.get_image_features(pixel_values, return_dict=True).fpn_hidden_states
    feat_s0, feat_s1, embed = (
        level.permute(1, 2, 0).reshape(batch, -1, size[0] // stride, size[1] // stride)
        for level, stride in zip(levels, (4, 8, 16), strict=True)
    )
    # The decoder was trained on features that say "there is no earlier frame".
    return Features(embed + model.no_memory_embedding.reshape(1, -1, 1, 1), feat_s0, feat_s1)


def decode(
    model: Sam2Model,
    features: Features,
    image: Tensor,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    mask_input: Tensor | None = None,
    multimask: bool = True,
    stability: bool = False,
) -> Decoded:
    """Masks of N objects, with gradient; the same in training and in evaluation mode.

    All objects of one call have equally many points: a padding point would not be neutral.

    Args:
        model: the network.
        features: of B pictures.
        image: int64 [N], the row of `features` in which each object lies.
        points: [N, P, 2] (x, y) in model pixels.
        labels: int64 [N, P]: 1 foreground, 0 background; None: all foreground.
        boxes: [N, 4] corners (x0, y0, x1, y1) in model pixels.
        mask_input: [N, 1, H/4, W/4] logits of an earlier prediction.
        multimask: three masks (for a single click) instead of one (for a box or several clicks).
        stability: with one mask: where its border moves much between the logits -0.05 and 0.05,
            take the best-scored of the three instead, as the official predictor does.

    Raises:
        ValueError: neither points nor boxes.
    """
    if points is None and boxes is None:
        raise ValueError("decode needs points or boxes")
    if points is not None and labels is None:
        labels = torch.ones(points.shape[:2], dtype=torch.int64, device=points.device)
    # Positions in half precision are off by whole pixels, so autocast stays out of here.
    with torch.autocast(features.image_embed.device.type, enabled=False):
        sparse, dense = model.prompt_encoder(
            input_points=None if points is None else _on_square(model, points)[:, None],
            input_labels=None if labels is None else labels[:, None],
            input_boxes=None if boxes is None else _on_square(model, boxes)[:, None],
            input_masks=mask_input,
        )
        positions = model.get_image_wide_positional_embeddings()
    with _single_mask_rule(model.mask_decoder, stability):
        masks, iou, _, score = model.mask_decoder(
            image_embeddings=features.image_embed[image],
            image_positional_embeddings=positions.expand(len(image), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=[features.feat_s0[image], features.feat_s1[image]],
        )
    return Decoded(masks[:, 0].float(), iou[:, 0].float(), score[:, 0].float())


@contextmanager
def _single_mask_rule(decoder: Any, stability: bool) -> Iterator[None]:
    """Let the caller, not the training mode, decide on the stability fallback.

    Only the decoder's own flag changes: its submodules keep their mode.
    """
    kept = decoder.training, decoder.dynamic_multimask_via_stability
    decoder.training = decoder.training and not stability
    decoder.dynamic_multimask_via_stability = stability
    try:
        yield
    finally:
        decoder.training, decoder.dynamic_multimask_via_stability = kept


# -- image size ----------------------------------------------------------------------------------


def image_size(model: Sam2Model) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model takes."""
    height, width = model.prompt_encoder.mask_input_size  # a quarter of the picture
    return 4 * height, 4 * width


def set_image_size(model: Sam2Model, size: tuple[int, int]) -> None:
    """Let the model take pictures of another size, rectangles too; no weight changes.

    Positions are interpolated by the network itself. `model.config` keeps the size it was read
    with. With a rectangle call `decode`, not the model's own forward, which knows only squares.

    Args:
        model: the network.
        size: (height, width), both multiples of 32: 4-pixel patches in windows of 8.

    Raises:
        ConfigError: a side that is no multiple of 32.
    """
    height, width = size
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        raise ConfigError(f"image size {height}x{width}: both sides must be multiples of {STRIDE}")
    model.backbone_feature_sizes = [[height // s, width // s] for s in (4, 8, 16)]
    prompts = model.prompt_encoder
    prompts.image_embedding_size = (height // 16, width // 16)
    prompts.mask_input_size = (height // 4, width // 4)
    prompts.input_image_size = width  # the class knows one side only: see _on_square


def _on_square(model: Sam2Model, xy: Tensor) -> Tensor:
    """Stretch y so that dividing by the width gives the share of the height.

    The prompt encoder computes (x + 0.5) / S and (y + 0.5) / S with one S, which is the width here:
    y' = (y + 0.5) W / H - 0.5. Takes points [..., 2] and boxes [..., 4]; float32.
    """
    height, width = image_size(model)
    xy = xy.float()
    if height == width:
        return xy
    x, y = xy.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([x, (y + 0.5) * (width / height) - 0.5], -1).flatten(-2)


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


# -- building it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """Where a network's frozen weights came from; `model.sam2_base`."""

    path: Path  # absolute
    name: str  # without folders; a hub id as it was given
    format: str  # see official.OfficialFile
    variant: str  # published name or "custom"
    fingerprint: str | None  # see base_fingerprint; None: the values were not read
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
    if path.name != Path(checkpoint).name:  # the hub's cache has other names
        repository = str(checkpoint).partition("@")[0]
        model.sam2_base = replace(model.sam2_base, name=f"{repository}@{path.name}")
    if adapter is not None:
        metadata = load_adapter(model, adapter, allow_partial)
        size = size or _trained_size(metadata)
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
    _refuse_nan(file)
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
    """
    if cfg.adapter and not os.path.exists(cfg.adapter):
        raise CheckpointError(f"--adapter {Path(cfg.adapter).absolute()} does not exist")
    if official.find_local(cfg.checkpoint):
        skeleton(cfg)


def _refuse_nan(file: official.OfficialFile) -> None:
    bad = [
        name
        for name, tensor in file.image.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if bad:
        raise CheckpointError(
            f"{file.path}: {len(bad)} tensors hold NaN or infinite values ({', '.join(bad[:5])}): "
            "copy or download it again"
        )


def base_fingerprint(file: official.OfficialFile) -> str:
    """SHA-256 of the image part in float32: equal for all containers of equal weights."""
    state = names.to_transformers(file.image)
    return fingerprint({name: tensor.float() for name, tensor in state.items()})


def network(variant: official.Variant) -> Sam2Model:
    """The network without weights (on the meta device)."""
    preflight.torchvision()
    from transformers import Sam2Config, Sam2Model

    try:
        config = Sam2Config(**variant.config)
        with torch.device("meta"):
            return Sam2Model._from_config(config, attn_implementation="sdpa")
    except Exception as error:  # a wrong config fails anywhere in the library
        raise CheckpointError(f"not the config of a SAM 2: {error}") from error


# -- adapters as files ---------------------------------------------------------------------------


def adapter_metadata(model: Sam2Model) -> dict[str, Any]:
    """What an adapter must remember to be used correctly: its base and its image size."""
    base = model.sam2_base
    return {
        "base": {"file": base.name, "variant": base.variant, "fingerprint": base.fingerprint},
        "image_size": list(image_size(model)),
    }


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
    file = adapter_file.read_adapter(path, size_limit(model))
    check_base(model, path, file.metadata)
    alpha = None if file.config else Config.lora_alpha
    adapter_file.load_adapter(
        model,
        file,
        rename=names.module_to_official,
        lora_alpha=alpha,
        allow_partial=allow_partial,
    )
    if alpha is not None:
        say(f"{path} holds tensors only: lora_alpha is taken to be {alpha}, the default")
    return file.metadata


def check_base(model: Sam2Model, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter that was trained on other weights; without a record there is no check.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    trained, base = metadata.get("base"), model.sam2_base
    if not isinstance(trained, Mapping) or base.fingerprint is None:
        return
    if trained.get("fingerprint") in (None, base.fingerprint):
        return
    raise CheckpointError(
        f"{path} was trained on {trained.get('file')} ({trained.get('variant')}), whose weights "
        f"differ from those of {base.path} ({base.variant}): pass its own base as --checkpoint"
    )


def _trained_size(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    size = metadata.get("image_size")
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) for n in size):
        return size[0], size[1]
    return None
