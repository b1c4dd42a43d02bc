"""LoRA on the transformer of MIDI-3D.

A layer y = W x + b becomes y = W x + b + (alpha / rank) B A x (Hu et al., arXiv 2106.09685), in
place: state-dict keys of the base stay, `lora_A.default.weight` and `lora_B.default.weight` are
added. A is uniform as Kaiming's (a = sqrt 5), B is 0, so that nothing changes at first.

The default targets are 231 of the 308 Linear layers of the released model: `attn2.to_q` of its 21
blocks is left out, since no output depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lora_core import injection, mechanisms
from lora_core.errors import ConfigError
from lora_core.injection import Summary
from lora_core.last_blocks import Stack
from lora_core.module_names import in_time, unwrapped
from lora_core.report import say
from lora_core.targets import resolve
from midi3d_lora.lora_choice import BLOCKS, ROLES, WITHOUT_EFFECT, LoraChoice
from midi3d_lora.transformer.dit import TripoSGDiTModel

__all__ = ["ADAPTER", "LoraChoice", "adapted_layers", "inject", "lora_parameters", "remove"]

ADAPTER = "default"  # name of the one adapter on a model
THIRDS = ("to_q", "to_k", "to_v")


def inject(transformer: TripoSGDiTModel, choice: LoraChoice | None = None) -> Summary:
    """Put LoRA on a transformer, in place, and choose its multi-instance blocks.

    The base is frozen: only LoRA requires gradients. The mode (train, eval) stays.

    Args:
        transformer: it may be on the meta device.
        choice: None: the guide's defaults.

    Returns:
        what was adapted; printing it gives a table.

    Raises:
        ConfigError: names of layers or blocks that the model lacks, or LoRA is there already. The
            model is as it was.
    """
    choice = LoraChoice() if choice is None else choice
    refuse_adapted(transformer)
    paths = adapted_layers(transformer, choice)
    summary = injection.inject(transformer, choice.config(), ADAPTER, ROLES)
    try:
        transformer.set_multi_instance_blocks(choice.multi_instance_blocks)
    except ConfigError:
        injection.remove(transformer)
        raise
    if note := interleaving_note(paths):
        say(note)
    return summary


def adapted_layers(transformer: TripoSGDiTModel, choice: LoraChoice) -> list[str]:
    """Paths of the layers that a choice means, in module order.

    Raises:
        ConfigError: names that mean no layer.
    """
    with in_time("the names in lora_target_modules"):
        return resolve(transformer, choice.config(), ROLES)


def stack(transformer: nn.Module) -> Stack:
    """The blocks, the last of which `--lora_last_blocks` adapts."""
    return Stack.of(transformer, "--lora_last_blocks", BLOCKS)


def lora_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, in module order: those for the optimizer."""
    return injection.trainable_parameters(unwrapped(transformer))


def remove(transformer: TripoSGDiTModel) -> None:
    """Take LoRA off again: the base as it was before, bit for bit."""
    injection.remove(transformer)


def is_adapted(transformer: nn.Module) -> bool:
    """Whether there is LoRA on it."""
    return bool(injection.lora_layers(transformer))


def refuse_adapted(transformer: nn.Module) -> None:
    """Raise ConfigError if a transformer has LoRA."""
    if is_adapted(transformer):
        raise ConfigError("the transformer has LoRA already: remove(transformer) takes it off")


def freeze_without_effect(transformer: nn.Module) -> list[str]:
    """Let no adapter train that has no effect, as those of `attn2.to_q` in files of others.

    They would never get a gradient, for which processes that train together wait.

    Returns:
        their paths.
    """
    found = []
    for path, layer in injection.lora_layers(transformer).items():
        if re.fullmatch(WITHOUT_EFFECT, path) and ADAPTER in layer.lora_adapters:
            spec = layer.lora_adapters[ADAPTER]
            layer.lora_adapters[ADAPTER] = replace(spec, trainable=False)
            mechanisms.set_trainable(layer, ADAPTER, False)
            found.append(path)
    return found


def interleaving_note(paths: Sequence[str]) -> str:
    """What is really adapted where not all of to_q, to_k and to_v of self-attention are; or ""."""
    names = [path.rpartition(".")[2] for path in paths if ".attn1." in path]
    found = [name for name in THIRDS if name in names]
    if not found or len({names.count(name) for name in THIRDS}) == 1:
        return ""
    return (
        "Note: in self-attention to_q, to_k and to_v each make query, key and value of a third of "
        f"the heads. Where only {', '.join(found)} is adapted, the other heads stay as they are"
    )
