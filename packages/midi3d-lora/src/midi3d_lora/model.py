"""The transformer of a training run: its base from a model directory, and LoRA on it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lora_core import preflight
from lora_core.adapters import on_base
from lora_core.errors import CheckpointError, ConfigError
from lora_core.report import say
from midi3d_lora import lora, official
from midi3d_lora.adapter_files import load_adapter, read_adapter
from midi3d_lora.conditioning import clip, dino
from midi3d_lora.config import Config
from midi3d_lora.encoder_cache import check_encoders, token_count
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.lora_choice import LoraChoice
from midi3d_lora.official_model import check_folder, load_component
from midi3d_lora.pipeline import check_fit
from midi3d_lora.transformer.dit import TripoSGDiTModel
from midi3d_lora.vae.autoencoder import TripoSGVAEModel

TRANSFORMER, VAE = "transformer", "vae"


def folder_of(cfg: Config) -> Path:
    """The model directory.

    Raises:
        CheckpointError: there is none, or what it lacks.
    """
    return official.find_model(cfg.pretrained_model)


def choice_of(cfg: Config) -> LoraChoice:
    """The layers, ranks and multi-instance blocks of a configuration.

    Raises:
        ConfigError: values that cannot work.
    """
    return LoraChoice(
        rank=cfg.lora_rank,
        alpha=cfg.lora_alpha,
        dropout=cfg.lora_dropout,
        target_modules=tuple(cfg.lora_target_modules),
        multi_instance_blocks=blocks_of(cfg),
        seed=cfg.seed,
        last_blocks=cfg.lora_last_blocks,
    )


def blocks_of(cfg: Config) -> tuple[str, ...]:
    """The blocks with attention between instances; none where that is switched off."""
    return tuple(cfg.mi_attention_blocks) if cfg.enable_multi_instance_attention else ()


# -- the network -----------------------------------------------------------------------------------


def skeleton(cfg: Config) -> TripoSGDiTModel:
    """The transformer on the meta device: only settings are read.

    Raises:
        CheckpointError: settings that make no model.
    """
    place = folder_of(cfg) / TRANSFORMER
    settings = official.read_config(place, official.arguments_of(TripoSGDiTModel))
    try:
        with torch.device("meta"):
            return TripoSGDiTModel(**settings)
    except ConfigError as error:
        raise CheckpointError(f"{place / 'config.json'}: {error}") from None


def build(cfg: Config, dtype: torch.dtype = torch.float32) -> TripoSGDiTModel:
    """The base transformer: frozen, in evaluation mode, on the CPU.

    Args:
        dtype: of the weights. In mixed precision they are multiplied in half precision anyway, so
            that keeping them in it changes no number and halves their memory.

    Raises:
        CheckpointError: missing, damaged, or of another shape.
    """
    net = load_component(TripoSGDiTModel, folder_of(cfg), TRANSFORMER, dtype=dtype)
    if cfg.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    return net.requires_grad_(False)


def adapted(net: TripoSGDiTModel, cfg: Config) -> TripoSGDiTModel:
    """Put the adapters of a configuration on its base, train nothing else, and say what is adapted.

    Raises:
        CheckpointError: an adapter that does not fit. ConfigError: impossible LoRA settings.
    """
    if not cfg.adapter:
        say(lora.inject(net, choice_of(cfg)))
        return net
    adapter = read_adapter(cfg.adapter)
    if adapter.multi_instance_blocks is None:
        net.set_multi_instance_blocks(blocks_of(cfg))
    load_adapter(net, adapter, trainable=True)
    say(f"starting from {cfg.adapter}; its rank, alpha, layers and blocks are used")
    return net


def scheduler_of(cfg: Config) -> RectifiedFlowScheduler:
    """The base's scheduler, whose shift of the noise levels is used in training too.

    Raises:
        CheckpointError, ConfigError: settings that cannot be used.
    """
    scheduler: RectifiedFlowScheduler = RectifiedFlowScheduler.from_pretrained(
        folder_of(cfg), subfolder="scheduler"
    )
    scheduler.time_shift(torch.ones(1))  # refuses a shift that depends on the picture
    return scheduler


def fingerprint(cfg: Config) -> str:
    """SHA-256 of the transformer's files."""
    place = folder_of(cfg) / TRANSFORMER
    digest = hashlib.sha256()
    for path in (place / "config.json", *official.find_weights(place).files):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# -- sizes -----------------------------------------------------------------------------------------


def num_tokens(cfg: Config, net: TripoSGDiTModel) -> int:
    """N, latent tokens of an instance: as many as the transformer is wide, as officially."""
    return cfg.num_tokens or int(net.config.width)


def row_shapes(cfg: Config, net: TripoSGDiTModel) -> dict[str, tuple[int, ...]]:
    """Shapes of what is known of an instance, by the names of `encoder_cache.Encoded`."""
    config, tokens = net.config, token_count(folder_of(cfg), cfg.image_size)
    latents = (num_tokens(cfg, net), int(config.in_channels))
    return {
        "image_embeds_1": (1, int(config.cross_attention_dim)),
        "image_embeds_2": (tokens, int(config.cross_attention_2_dim)),
        "mean": latents,
        "logvar": latents,
    }


# -- before weights are read -----------------------------------------------------------------------


def glance(cfg: Config) -> None:
    """Look at the headers of all files of the model, and adapt a skeleton.

    Raises:
        CheckpointError: missing files, or those of another model; a missing adapter.
        ConfigError: layers or blocks that do not exist.
    """

    def fits() -> None:
        folder = folder_of(cfg)
        preflight.check_all(
            lambda: check_encoders(folder),
            lambda: check_folder(TripoSGDiTModel, folder / TRANSFORMER),
            lambda: check_folder(TripoSGVAEModel, folder / VAE),
            lambda: scheduler_of(cfg),
        )
        net = skeleton(cfg)
        _check_widths(folder, net)
        if not cfg.adapter:
            choice = choice_of(cfg)
            lora.adapted_layers(net, choice)
            net.set_multi_instance_blocks(choice.multi_instance_blocks)

    preflight.check_all(lambda: on_base.refuse_missing(cfg.adapter), fits)


def _check_widths(folder: Path, net: TripoSGDiTModel) -> None:
    """Compare what the encoders give with what the transformer takes, by their settings alone."""
    settings: dict[str, dict[str, Any]] = {
        "vae": {"latent_channels": 64}
        | official.read_config(folder / VAE, official.arguments_of(TripoSGVAEModel)),
        clip.FOLDER: {"projection_dim": 512} | clip.clip_settings(folder / clip.FOLDER),
        dino.FOLDER: {"hidden_size": 768} | dino.dino_settings(folder / dino.FOLDER),
    }
    parts: list[Any] = [SimpleNamespace(config=SimpleNamespace(**s)) for s in settings.values()]
    check_fit(net, *parts)
