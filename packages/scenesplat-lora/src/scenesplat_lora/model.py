"""The network of a training run: its base from a checkpoint, and LoRA on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core import injection, preflight
from lora_core.adapters import on_base
from lora_core.cache import fingerprint
from lora_core.errors import CheckpointError, ConfigError
from lora_core.report import say
from scenesplat_lora import lora
from scenesplat_lora.adapter_file import ADAPTER
from scenesplat_lora.config import Config
from scenesplat_lora.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.official import (
    RELEASED,
    OfficialFile,
    build_model,
    compare,
    load_state,
    official_name,
    read_official,
    released_config,
)
from scenesplat_lora.ptv3_config import PTv3Config

Network = LangPretrainer | DefaultSegmentorV2
NEW_HEAD = ("seg_head.weight", "seg_head.bias")


@dataclass(frozen=True)
class Base:
    """Where a network's frozen weights came from; kept as `network.scenesplat_base`."""

    path: Path
    fingerprint: str


def shape(cfg: Config, file: OfficialFile) -> PTv3Config:
    """The backbone's settings: those of the checkpoint's released model, and what `cfg` changes.

    Raises:
        CheckpointError: a network of another shape, without settings for it.
        ConfigError: an unknown field or a value that cannot work.
    """
    own = {key: value for key, value in cfg.model.backbone.items() if key != "type"}
    PTv3Config.from_dict({key: value for key, value in cfg.model.backbone.items() if key == "type"})
    try:
        released = released_config(file)
    except CheckpointError:
        if not own:
            raise
        return PTv3Config.from_dict(own)
    unknown = {key: value for key, value in own.items() if not hasattr(released, key)}
    if unknown:
        PTv3Config.from_dict(unknown)  # tells the nearest name
    return replace(released, **own)


def empty(cfg: Config, file: OfficialFile) -> Network:
    """The network that a configuration asks of a checkpoint, with random weights.

    Raises:
        CheckpointError, ConfigError: see `shape`; or the file is of the other kind of model.
    """
    config, asked = shape(cfg, file), cfg.model.type
    has_head = NEW_HEAD[0] in file.tensors
    if asked == "LangPretrainer" and has_head:
        raise CheckpointError(
            f"{file.path} is a segmentation model (it has seg_head): --model.type "
            "DefaultSegmentorV2, or leave it out"
        )
    if asked == "DefaultSegmentorV2" and not has_head:
        raise CheckpointError(
            f"{file.path} is a language model, without seg_head: --model.type LangPretrainer, or "
            "leave it out"
        )
    classes = cfg.data.num_classes
    if has_head and classes not in (None, len(file.tensors[NEW_HEAD[0]])):
        raise ConfigError(
            f"--data.num_classes {classes}: {file.path} has {len(file.tensors[NEW_HEAD[0]])} "
            "classes. A new head is not trained by this program yet"
        )
    return build_model(file, config)


def skeleton(cfg: Config) -> Network:
    """The network of a configuration on the meta device: only headers are read.

    Raises:
        CheckpointError: as `build`, as far as headers tell.
    """
    file = read_official(cfg.lora_training.pretrained_path, "meta")
    with torch.device("meta"):
        net = empty(cfg, file)
    own = {official_name(name): tensor for name, tensor in net.state_dict().items()}
    if misfit := compare(file, own):
        wrong = [*misfit.missing, *misfit.unexpected, *misfit.other_shape]
        raise CheckpointError(
            f"{file.path}: {len(wrong)} tensors do not fit the model, such as {wrong[0]}: check "
            f"--model.backbone, or leave it out for the released models ({', '.join(RELEASED)})"
        )
    return net


def build(cfg: Config) -> Network:
    """The base network of a configuration: float32, frozen, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: missing, damaged, or of another shape, with the names that do not fit.
    """
    file = read_official(cfg.lora_training.pretrained_path)
    net = empty(cfg, file)
    load_state(net, file)
    base: Any = Base(file.path.absolute(), fingerprint(net))
    net.scenesplat_base = base
    return net.requires_grad_(False).eval()


def base_of(net: Network) -> Base:
    """Where the weights of a network that `build` made came from."""
    base: Any = net.scenesplat_base
    assert isinstance(base, Base)
    return base


def adapted(net: Network, cfg: Config) -> Network:
    """Put the adapters of a configuration on its base, train nothing else, and say what is adapted.

    Raises:
        CheckpointError: an adapter that does not fit. ConfigError: impossible LoRA settings.
    """
    if cfg.adapter:
        lora.load_lora_checkpoint(net, cfg.adapter)
        lora.mark_only_lora_as_trainable(net, injection.configs(net)[ADAPTER].bias)
        say(f"starting from {cfg.adapter}; its rank, alpha and layers are used")
    else:
        lora.inject_choice(net, cfg.lora.choice(cfg.seed))
        lora.mark_only_lora_as_trainable(net, cfg.lora.bias)
    say(lora.lora_summary(net))
    return net


def has_prompts(net: nn.Module) -> bool:
    """Whether the adapter has prompt MLPs, which no other program reads and nothing merges."""
    from scenesplat_lora import prompt_mlp

    return bool(prompt_mlp.with_prompt(net))


def glance(cfg: Config) -> None:
    """Look for the files of a configuration and at the header of its base, and adapt a skeleton.

    Raises:
        CheckpointError: a missing adapter or base, or one of another model.
        ConfigError: layers that do not exist.
    """

    def fits() -> None:
        net = skeleton(cfg)
        if not cfg.adapter:
            from scenesplat_lora.names import chosen_layers

            chosen_layers(net, cfg.lora.choice(cfg.seed))

    preflight.check_all(lambda: on_base.refuse_missing(cfg.adapter), fits)
