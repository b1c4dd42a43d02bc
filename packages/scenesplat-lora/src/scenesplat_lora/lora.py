"""LoRA on Point Transformer V3: the functions of the guide.

A layer y = W x + b becomes y = W x + b + (lora_alpha / r) B A x (Hu et al., arXiv 2106.09685), in
place: state-dict keys of the base stay, `lora_A.default.weight` and `lora_B.default.weight` are
added. A is uniform as Kaiming's (a = sqrt 5), B is 0. qkv is one layer with one pair.

The running statistics of frozen batch norms stay as they are in training too. They are no part of
an adapter, so base and adapter together would otherwise differ from what was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from lora_core import injection, merging
from lora_core.config import Bias, LoraConfig
from lora_core.errors import ConfigError
from lora_core.last_blocks import Stack
from lora_core.module_names import join, only, unwrapped
from lora_core.report import say
from scenesplat_lora.adapter_file import ADAPTER
from scenesplat_lora.adapter_file import load_lora_checkpoint as load_lora_checkpoint
from scenesplat_lora.adapter_file import save_lora_checkpoint as save_lora_checkpoint
from scenesplat_lora.names import (
    Layer,
    adapted_part,
    blocks_of,
    chosen_layers,
    layers_of,
    with_lora,
)
from scenesplat_lora.network import prompt_mlp
from scenesplat_lora.network.frozen_norms import freeze_statistics, unfreeze_statistics
from scenesplat_lora.network.models import HEAD, segmentor_in
from scenesplat_lora.presets import PROMPT_WIDTH, LoraChoice, parts_of, preset_choice

Model = TypeVar("Model", bound=nn.Module)

# -- putting it on ---------------------------------------------------------------------------------


def inject_lora_to_ptv3(
    model: Model,
    r: int = 8,
    lora_alpha: float = 8,
    target_modules: Sequence[str] | None = None,
    enable_prompt: bool = False,
    encoder_only: bool = True,
    target_stages: Sequence[int] | None = None,
    *,
    lora_dropout: float = 0.0,
    prompt_width: int | None = PROMPT_WIDTH,
    seed: int = 0,
    train_head: bool | None = None,
) -> Model:
    """Put LoRA on a backbone, or on any model that contains one, in place; the base is frozen.

    The output does not change until the adapter is trained or loaded.

    Args:
        r: rank. lora_alpha: the update is scaled by lora_alpha / r.
        target_modules: ["attn"] (qkv and proj; default), ["mlp"] (fc1 and fc2), or both.
        enable_prompt: a prompt MLP beside every adapted layer; such a model cannot be merged.
        encoder_only: leave the decoder out.
        target_stages: s of enc{s} and, without encoder_only, dec{s}; None: all. Those that the
            model lacks are named in a warning.
        lora_dropout: share of the adapters' input that is dropped in training.
        prompt_width: largest hidden width of a prompt MLP; None: a quarter of its input.
        seed: of the initial values, together with each layer's name.
        train_head: train `seg_head` of a segmentation model in full, and keep it in the adapter;
            None: where it is new, see `load_official(..., num_classes=...)`.

    Returns:
        The model that was given.

    Raises:
        ConfigError: no backbone in the model, none of the stages, LoRA is there already, or values
            that cannot work. The model is as it was.
    """
    choice = LoraChoice(
        r,
        lora_alpha,
        ("attn",) if target_modules is None else tuple(_listed(target_modules)),
        enable_prompt,
        parts_of(encoder_only),
        None if target_stages is None else tuple(_listed(target_stages)),
        lora_dropout=lora_dropout,
        prompt_width=prompt_width,
        seed=seed,
    )
    return inject_choice(model, choice, train_head)


def inject_lora_to_stage(
    model: Model,
    stage_indices: Sequence[int],
    r: int = 8,
    lora_alpha: float = 8,
    target_modules: Sequence[str] | None = None,
    encoder: bool = True,
) -> Model:
    """As `inject_lora_to_ptv3` for stages of the encoder alone, or of the decoder alone."""
    names = ("attn",) if target_modules is None else tuple(_listed(target_modules))
    stages = tuple(_listed(stage_indices))
    parts = parts_of(encoder_only=True) if encoder else preset_choice("decoder_only").parts
    return inject_choice(model, LoraChoice(r, lora_alpha, names, False, parts, stages))


def inject_lora_with_preset(model: Model, preset: str = "standard", **overrides: Any) -> Model:
    """As `inject_lora_to_ptv3` with a preset: minimal, standard, full or decoder_only.

    Args:
        overrides: options of `inject_lora_to_ptv3` in place of the preset's.

    Raises:
        ConfigError: as there, or no such preset or option; the message lists the presets.
    """
    return inject_choice(model, preset_choice(preset, **overrides))


def inject_choice(model: Model, choice: LoraChoice, train_head: bool | None = None) -> Model:
    """Put LoRA on the layers of a choice; see `inject_lora_to_ptv3`."""
    root = unwrapped(model)
    if adapted_part(root) is not None:
        raise ConfigError(
            "the model has LoRA already: merge it (merge_lora_weights) or remove it (remove_lora) "
            "first, or begin with a copy of the base"
        )
    layers = chosen_layers(root, choice)
    config = LoraConfig(
        target_modules=only(layer.path for layer in layers),
        r=choice.r,
        lora_alpha=choice.lora_alpha,
        lora_dropout=choice.lora_dropout,
        seed=choice.seed,
        modules_to_save=_trained_head(root, train_head),
    )
    try:
        if choice.enable_prompt:
            paths = prompt_mlp.attach(root, _prompt_widths(root, layers, choice), choice.seed)
            prompts = prompt_mlp.modules_to_save(paths)
            config = replace(config, modules_to_save=[*config.modules_to_save, *prompts])
        injection.inject(root, config, ADAPTER)
    except BaseException:  # out of memory, Ctrl-C: no half-adapted model
        prompt_mlp.detach(root)
        raise
    freeze_statistics(root)
    return model


def stack(model: nn.Module) -> Stack:
    """The blocks with LoRA, the last of which `--lora.last_blocks` adapts."""
    known = {layer.path for layer in layers_of(model)}
    return Stack(
        "--lora.last_blocks", blocks_of(p for p in injection.lora_layers(model) if p in known)
    )


def _trained_head(model: nn.Module, train_head: bool | None) -> list[str]:
    """Entry of `LoraConfig.modules_to_save` for the head that trains with LoRA.

    Raises:
        ConfigError: `train_head` of a model without one.
    """
    found = segmentor_in(model)
    if found is None and train_head:
        raise ConfigError(
            "train_head: the model has no seg_head; load_official(path, num_classes=...) makes one"
        )
    if found is None or train_head is False or not (train_head or found[1].new_head):
        return []
    return [join(found[0], HEAD)]


def _prompt_widths(model: nn.Module, layers: Sequence[Layer], choice: LoraChoice) -> dict[str, int]:
    widths = {}
    for layer in layers:
        module = model.get_submodule(layer.path)
        assert isinstance(module, nn.Linear)
        widths[layer.path] = prompt_mlp.width(module.in_features, choice.prompt_width)
    return widths


def _listed(value: Any) -> Sequence[Any]:
    return (value,) if isinstance(value, (str, int)) else value


# -- training it -----------------------------------------------------------------------------------


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Let LoRA and prompt MLPs train, and nothing else.

    Biases that train besides are part of the adapter: they are saved and loaded with it.

    Args:
        bias: "all": every bias of the model trains too; "lora_only": those of adapted layers.

    Raises:
        ConfigError: the model has no LoRA, or another word for `bias`.
    """
    part = with_lora(model)
    injection.train_biases(part, ADAPTER, bias)
    full = injection.full_tensors(part, ADAPTER)
    wanted = {id(p) for key, p in part.named_parameters() if key in full or _is_lora(key)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


def get_lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of LoRA, of prompt MLPs and of a head that trains with them.

    In module order: those for the optimizer.

    Raises:
        ConfigError: the model has no LoRA.
    """
    part = with_lora(model)
    found = segmentor_in(part)
    saved = injection.configs(part)[ADAPTER].modules_to_save
    head = [] if found is None or join(found[0], HEAD) not in saved else [join(found[0], HEAD)]
    return [
        parameter
        for key, parameter in part.named_parameters()
        if _is_lora(key) or any(key.startswith(f"{path}.") for path in head)
    ]


def _is_lora(key: str) -> bool:
    return ".lora_" in key or f".{prompt_mlp.NAME}." in key


@dataclass(frozen=True)
class LoraSummary:
    """Numbers of parameters; printing it gives the table of the guide."""

    total: int
    lora: int
    trainable: int

    def __str__(self) -> str:
        line = "=" * 60
        return "\n".join(
            [
                line,
                "LoRA Parameter Summary",
                line,
                f"Total parameters: {self.total:,}",
                f"LoRA parameters: {self.lora:,}",
                f"Trainable parameters: {self.trainable:,}",
                f"LoRA ratio: {100 * self.lora / max(self.total, 1):.2f}%",
                line,
            ]
        )


def lora_summary(model: nn.Module) -> LoraSummary:
    """How many parameters a model has, and how many of them are LoRA's or train.

    Raises:
        ConfigError: the model has no LoRA.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return LoraSummary(
        sum(size for size, _ in sizes),
        sum(p.numel() for key, p in with_lora(model).named_parameters() if _is_lora(key)),
        sum(size for size, trains in sizes if trains),
    )


def print_lora_summary(model: nn.Module) -> None:
    """Print `lora_summary`."""
    say(lora_summary(model))


# -- taking it off ---------------------------------------------------------------------------------


def merge_lora_weights(model: nn.Module, force: bool = False) -> None:
    """W += (lora_alpha / r) B A for good; the model is plain again, with the base's keys alone.

    Args:
        force: leave prompt MLPs out, which changes the output.

    Raises:
        ConfigError: no LoRA (also after a first merge), or prompt MLPs without `force`.
        NumericError: values that are not finite; the model is as it was.
    """
    part = with_lora(model)
    prompts = prompt_mlp.with_prompt(part)
    if prompts and not force:
        raise ConfigError(
            f"{len(prompts)} layers have prompt MLPs, which cannot be merged into weights: keep "
            "the adapter beside the base (save_lora_checkpoint), or leave them out, which changes "
            "the output, with force=True"
        )
    merging.merge(part, keep=False)
    injection.remove(part)
    prompt_mlp.detach(part)
    unfreeze_statistics(part)
    if found := segmentor_in(part):
        found[1].keep_head()


def remove_lora(model: nn.Module) -> None:
    """Take LoRA off again: the base as it was before, bit for bit.

    Raises:
        ConfigError: the model has no LoRA.
    """
    part = with_lora(model)
    injection.remove(part)
    prompt_mlp.detach(part)
    unfreeze_statistics(part)
    if found := segmentor_in(part):
        found[1].restore_head()


def lora_deltas(model: nn.Module) -> dict[str, Tensor]:
    """State-dict key -> (lora_alpha / r) B A in float32, what LoRA adds to each weight."""
    return merging.deltas(with_lora(model))
