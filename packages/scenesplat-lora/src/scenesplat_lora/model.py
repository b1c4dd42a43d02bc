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
from scenesplat_lora.adapter_read import read_facts
from scenesplat_lora.config import Config
from scenesplat_lora.network.description import base_grid_size, network_config
from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.official import (
    RELEASED,
    OfficialFile,
    build_model,
    compare,
    head_of,
    load_state,
    official_name,
    read_official,
    without_head,
)
from scenesplat_lora.network.ptv3_config import PTv3Config

Network = LangPretrainer | DefaultSegmentorV2


@dataclass(frozen=True)
class Base:
    """Where a network's frozen weights came from; kept as `network.scenesplat_base`."""

    path: Path
    fingerprint: str


def with_grid_size(cfg: Config) -> Config:
    """The settings with the base's voxels where they name none, which is said."""
    if cfg.data.grid_size is not None:
        return cfg
    try:
        trained = read_facts(cfg.adapter).grid_size if cfg.adapter else None
        base = read_official(cfg.lora_training.pretrained_path, "meta")
    except CheckpointError:
        return cfg  # refused when everything is checked
    size = trained or base_grid_size(base)
    say(f"voxels of {size:g} m, as the {'adapter' if trained else 'base'} has them")
    return replace(cfg, data=replace(cfg.data, grid_size=size))


def shape(cfg: Config, file: OfficialFile) -> PTv3Config:
    """The backbone's settings: those of the checkpoint, and what `cfg` changes in them.

    Raises:
        CheckpointError: a network that neither the file nor the settings describe.
        ConfigError: an unknown field or a value that cannot work.
    """
    own = {key: value for key, value in cfg.model.backbone.items() if key != "type"}
    PTv3Config.from_dict({key: value for key, value in cfg.model.backbone.items() if key == "type"})
    try:
        known = network_config(file)
    except CheckpointError:
        if not own:
            raise
        return PTv3Config.from_dict(own)
    unknown = {key: value for key, value in own.items() if not hasattr(known, key)}
    if unknown:
        PTv3Config.from_dict(unknown)  # tells the nearest name
    return replace(known, **own)


def class_names(cfg: Config) -> tuple[str, ...] | None:
    """Names of a segmentation model's classes, of `data.class_names`; None: they are not given.

    Raises:
        DataError, CheckpointError: see `read_names`.
        ConfigError: another number of names than `data.num_classes`.
    """
    if cfg.data.class_names is None or cfg.data.text_embeddings is not None:
        return None
    from scenesplat_lora.language.text_embeddings import read_names

    names = tuple(read_names(cfg.data.class_names))
    if cfg.data.num_classes not in (None, len(names)):
        raise ConfigError(
            f"--data.num_classes {cfg.data.num_classes}: {cfg.data.class_names} has {len(names)} "
            "names; leave one of the two out"
        )
    return names


def _classes(cfg: Config) -> tuple[int | None, tuple[str, ...] | None]:
    """Number and names of the classes that are asked for, or that the adapter to go on from has."""
    names = class_names(cfg)
    asked = cfg.data.num_classes if names is None else len(names)
    if not cfg.adapter or not Path(cfg.adapter).exists():
        return asked, names
    held = read_facts(cfg.adapter)
    if held.classes is not None and asked not in (None, held.classes):
        raise ConfigError(f"{asked} classes are asked for, {cfg.adapter} has {held.classes}")
    return asked or held.classes, names or held.names


def _refuse_other_kind(cfg: Config, file: OfficialFile, classes: int | None) -> None:
    """Refuse settings that make no model of this checkpoint.

    Args:
        classes: that are asked for.

    Raises:
        CheckpointError, ConfigError: with what to set instead.
    """
    asked, language = cfg.model.type, head_of(file) is None
    if asked == "LangPretrainer" and not language:
        raise CheckpointError(
            f"{file.path} is a segmentation model (it has seg_head): --model.type "
            "DefaultSegmentorV2, or leave it out"
        )
    if asked == "LangPretrainer" and classes is not None:
        raise ConfigError(
            "--data.num_classes and class names without text embeddings are of a segmentation "
            "model: add --model.type DefaultSegmentorV2 for a new head, or --data.text_embeddings"
        )
    if asked is None and language and cfg.data.num_classes is None and class_names(cfg):
        raise ConfigError(
            f"--data.class_names: {file.path} is a language model: add --data.text_embeddings, or "
            "--model.type DefaultSegmentorV2 to train a head for these classes"
        )
    if asked == "DefaultSegmentorV2" and language and classes is None:
        raise ConfigError(
            f"{file.path} is a language model, without seg_head: --data.num_classes gives it a new "
            "one; --model.type LangPretrainer, or leave it out, trains on language features"
        )


def empty(cfg: Config, file: OfficialFile) -> Network:
    """The network that a configuration asks of a checkpoint, with random weights.

    Another number of classes than the checkpoint's gives a segmentation model with a new head.

    Raises:
        CheckpointError, ConfigError: see `shape`; or the file is of the other kind of model.
    """
    config, (classes, names) = shape(cfg, file), _classes(cfg)
    _refuse_other_kind(cfg, file, classes)
    net = build_model(file, config, classes, cfg.model.new_head, cfg.seed)
    if not isinstance(net, DefaultSegmentorV2):
        return net
    if net.new_head and cfg.adapter and read_facts(cfg.adapter).classes is None:
        raise ConfigError(
            f"--adapter {cfg.adapter} has no head to go on with: merge it into its base first "
            "(scenesplat-lora merge), and train a head on that"
        )
    net.class_names = names or net.class_names
    return net


def skeleton(cfg: Config) -> Network:
    """The network of a configuration on the meta device: only headers are read.

    Raises:
        CheckpointError: as `build`, as far as headers tell.
    """
    file = read_official(cfg.lora_training.pretrained_path, "meta")
    with torch.device("meta"):
        net = empty(cfg, file)
    own = {official_name(name): tensor for name, tensor in net.state_dict().items()}
    if isinstance(net, DefaultSegmentorV2) and net.new_head:
        file, own = without_head(file, own)
    if misfit := compare(file, own):
        wrong = [*misfit.missing, *misfit.unexpected, *misfit.other_shape]
        raise CheckpointError(
            f"{file.path}: tensors do not fit the model ({len(wrong)}, such as {wrong[0]}): check "
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
    if isinstance(net, DefaultSegmentorV2) and net.new_head:
        say(f"a new head of {net.seg_head.out_features} classes is trained in full besides")
    say(lora.lora_summary(net))
    return net


def has_prompts(net: nn.Module) -> bool:
    """Whether the adapter has prompt MLPs, which no other program reads and nothing merges."""
    from scenesplat_lora.network import prompt_mlp

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
