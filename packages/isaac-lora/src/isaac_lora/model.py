"""The model of a training run: its base from a model folder, depth for its images, LoRA on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from isaac_lora import lora, official
from isaac_lora.adapter_files import check_fit, find_adapter, load_adapter, read_adapter
from isaac_lora.config import Config
from isaac_lora.conversations.tokenizer_files import find_tokenizer
from isaac_lora.depth.checkpoint import find_depth_checkpoint
from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.settings import check_adapter, read_depth_settings, setting_problems
from isaac_lora.lora_choice import LoraChoice, names_of
from lora_core import injection, preflight
from lora_core.adapters import on_base
from lora_core.adapters.match import size_limit
from lora_core.errors import ConfigError, listing
from lora_core.report import say

if TYPE_CHECKING:
    from isaac_lora.network.isaac import IsaacForConditionalGeneration
    from lora_core.cache import FeatureCache


def folder_of(cfg: Config) -> Path:
    """The model folder.

    Raises:
        CheckpointError: there is none, or what it lacks.
    """
    return official.find_model(cfg.model_path)


def choice_of(cfg: Config) -> LoraChoice:
    """The layers and ranks of a configuration.

    Raises:
        ConfigError: values that cannot work.
    """
    return LoraChoice(
        r=cfg.lora_r,
        alpha=cfg.lora_alpha,
        dropout=cfg.lora_dropout,
        bias=cfg.lora_bias,
        target_modules=names_of(cfg.target_modules),
        seed=cfg.seed,
        last_blocks=cfg.last_blocks,
    )


# -- depth -----------------------------------------------------------------------------------------


def depths_of(
    cfg: Config, device: torch.device | str = "cpu", cache: FeatureCache | None = None
) -> DepthGrids | None:
    """The depth of images, as the configuration asks for it; None: without.

    The depth model is looked at, and read when it is first needed.

    Raises:
        CheckpointError: missing, or of another model.
        ConfigError: settings that do not go with it.
    """
    if not cfg.use_depth:
        return None
    checkpoint = find_depth_checkpoint(str(cfg.depth_checkpoint_path))
    if problems := setting_problems(cfg.depth_alpha, cfg.depth_input_size, checkpoint.patch):
        raise ConfigError(listing([f"--{line}" for line in problems]))
    return DepthGrids(checkpoint, cfg.depth_input_size, device, cache)


# -- the network -----------------------------------------------------------------------------------


def skeleton(cfg: Config) -> IsaacForConditionalGeneration:
    """The model on the meta device: only settings are read.

    Raises:
        CheckpointError: settings that make no model.
    """
    return official.empty_model(folder_of(cfg))


def build(
    cfg: Config, dtype: torch.dtype = torch.float32, depths: DepthGrids | None = None
) -> IsaacForConditionalGeneration:
    """The base model: frozen, in evaluation mode, on the CPU.

    With `use_depth` it refuses images without their depth.

    Args:
        dtype: of the weights. In mixed precision they are multiplied in half precision anyway, so
            that keeping them in it changes no number and halves their memory.
        depths: what the rest of the program has from `depths_of`; None: one of its own.

    Raises:
        CheckpointError: missing, damaged, of another shape, or merged with an adapter that was
            trained with other depth. Warns: that one used depth, and here is none.
    """
    folder = folder_of(cfg)
    depths = depths or depths_of(cfg)
    _check_depth(cfg, depths)
    model = official.load_model(folder, dtype)
    model.config.use_depth = cfg.use_depth
    if cfg.use_depth:
        model.config.depth_alpha = cfg.depth_alpha
        model.config.depth_input_size = cfg.depth_input_size
        model.depth = depths
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)
    return model.requires_grad_(False)


def checkpoint_activations(model: IsaacForConditionalGeneration) -> None:
    """Compute the layers' activations again in the backward pass instead of keeping them."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    # transformers lets the embeddings require gradients, for the reentrant kind: layers before the
    # first adapter would have a backward pass, too.
    model.disable_input_require_grads()


def _check_depth(cfg: Config, depths: DepthGrids | None) -> None:
    """Compare the depth of a run with that of the merged model or the adapter that it begins with.

    Raises:
        CheckpointError: they differ. Warns: one uses depth and the other does not.
    """
    folders = []
    if read_depth_settings(folder_of(cfg)) is not None:  # merged with an adapter that used depth
        folders.append(folder_of(cfg))
    if cfg.adapter:
        place = find_adapter(cfg.adapter)
        folders.append(place if place.is_dir() else place.parent)
    for folder in folders:
        check_adapter(folder, None if depths is None else depths.settings(cfg.depth_alpha))


def planned(cfg: Config, dtype: torch.dtype = torch.float32) -> IsaacForConditionalGeneration:
    """What a run trains, on the meta device, as far as names and shapes tell.

    Raises:
        CheckpointError, ConfigError: as `adapted`.
    """
    model = skeleton(cfg).to(dtype).requires_grad_(False)
    if cfg.adapter:
        check_fit(model, read_adapter(cfg.adapter, size_limit(model)))
    else:
        lora.inject(model, choice_of(cfg))
    return model


def as_planned(cfg: Config, empty: IsaacForConditionalGeneration) -> Config:
    """The configuration with the figures, biases and layers of the adapters that a model has.

    They are those of `--adapter` in a warm start, and are kept in the files of the run: with them
    another run has the same adapters.

    Args:
        empty: see `planned`.
    """
    found = injection.configs(empty)[lora.ADAPTER]
    layers = list(injection.lora_layers(empty))
    as_default = layers == lora.adapted_layers(empty, LoraChoice())
    return replace(
        cfg,
        lora_r=found.r,
        lora_alpha=found.lora_alpha,
        lora_dropout=found.lora_dropout,
        lora_bias=found.bias,
        target_modules=None if as_default else layers,
        last_blocks=None,
    )


def adapted(model: IsaacForConditionalGeneration, cfg: Config) -> IsaacForConditionalGeneration:
    """Put the adapters of a configuration on its base, train nothing else, and say what is adapted.

    Raises:
        CheckpointError: an adapter that does not fit, or was trained with other depth.
        ConfigError: impossible LoRA settings.
    """
    if cfg.adapter:
        found = read_adapter(cfg.adapter, size_limit(model))
        load_adapter(model, found, depth=found.depth, trainable=True)  # its depth: see `glance`
        summary = injection.summary(model)
    else:
        summary = lora.inject(model, choice_of(cfg))
    say(summary)
    say(f"adapted layers: {lora.by_part([row.path for row in summary.rows])}")
    if cfg.adapter:
        say(
            f"starting from {cfg.adapter}: its rank {found.r}, alpha {found.alpha:g}, dropout, "
            "biases and layers are used; settings of LoRA given here do not count"
        )
    return model


def fingerprint(cfg: Config) -> str:
    """SHA-256 of the model's settings and weight files."""
    folder = folder_of(cfg)
    digest = hashlib.sha256()
    for path in (folder / official.SETTINGS, *official.find_weights(folder).files):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# -- before weights are read -----------------------------------------------------------------------


def glance(cfg: Config) -> None:
    """Look at the headers of all files of the model, and choose layers on a skeleton.

    Raises:
        CheckpointError: missing files, or those of another model; a missing adapter.
        ConfigError: layers that do not exist; depth settings that do not go with its model.
    """
    if cfg.depth_checkpoint_path and not cfg.use_depth:
        say(
            "warning: --depth_checkpoint_path is given, but without --use_depth True images have "
            "no depth"
        )
    preflight.check_all(
        lambda: on_base.refuse_missing(cfg.adapter), lambda: _base_fits(cfg), lambda: depths_of(cfg)
    )
    _check_depth(cfg, depths_of(cfg))


def _base_fits(cfg: Config) -> None:
    folder = folder_of(cfg)
    model = official.check_folder(folder)
    checks: list[Callable[[], object]] = [
        lambda: find_tokenizer(folder),
        lambda: read_depth_settings(folder),
    ]
    if not cfg.adapter:
        checks.append(lambda: lora.adapted_layers(model, choice_of(cfg)))
    elif os.path.exists(cfg.adapter):  # told otherwise
        adapter = cfg.adapter
        checks.append(lambda: check_fit(model, read_adapter(adapter, size_limit(model))))
    preflight.check_all(*checks)
