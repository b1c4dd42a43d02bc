"""The prompt MLP beside an adapted layer: y += w (P2 gelu(P1 x + p1) + p2).

PointLoRA (Wang et al., CVPR 2025) as SceneSplat's LoRA has it: one for every adapted Linear, with
a learnable scalar w. P2 and p2 start at 0, so that nothing changes at first; w starts at 0.1. The
hidden width is a quarter of the input, at most 32 by default: in the wide layers a full quarter
would have ten times the parameters of LoRA itself.

It cannot be merged into the weight. Like LoRA's factors it is float32 whatever the base is, and it
acts only while the layer's adapter does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.initialise import module_seed
from lora_core.injection import configs, full_tensors
from lora_core.module_names import only

NAME = "prompt_mlp"  # of the child of an adapted layer
INITIAL_WEIGHT = 0.1  # w of the original code, where it was never trained


class PromptMLP(nn.Sequential):
    """w (P2 gelu(P1 x + p1) + p2); keys `0.weight`, `0.bias`, `2.weight`, `2.bias` as published."""

    def __init__(self, layer: nn.Linear, hidden: int, seed: int) -> None:
        """For one layer, on its device; P1 and p1 uniform in ±1 / sqrt(in), as torch's Linear."""
        device = layer.weight.device
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        first = nn.utils.skip_init(nn.Linear, layer.in_features, hidden, device=device, dtype=dtype)
        last = nn.utils.skip_init(nn.Linear, hidden, layer.out_features, device=device, dtype=dtype)
        super().__init__(first, nn.GELU(), last)
        self.prompt_weight = nn.Parameter(torch.tensor(INITIAL_WEIGHT, device=device, dtype=dtype))
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(layer.in_features)
        with torch.no_grad():
            for parameter in first.parameters():
                values = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((2 * values - 1) * bound)
            for parameter in last.parameters():
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.prompt_weight * super().forward(x.to(self.prompt_weight.dtype))
        return out


def add_output(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
    """Forward hook of an adapted layer. It has no state, so that copies of a model are their own.

    Without an active adapter, or with merged ones, the output stays as it is.
    """
    if not getattr(layer, "lora_active", None) or getattr(layer, "lora_merged", None):
        return None
    prompt: nn.Module = layer.get_submodule(NAME)
    return y + prompt(inputs[0]).to(y.dtype)


def accept_base_checkpoint(model: nn.Module, result: Any) -> None:
    """Let `load_state_dict` take a checkpoint of the base as complete, as lora_core does for LoRA.

    Not where biases of the base train as well: the base's own values are kept aside then.
    """
    for adapter in configs(model):
        if any(f".{NAME}." not in key for key in full_tensors(model, adapter)):
            return
    added = {key for key in model.state_dict() if _is_added(key)}
    if added <= set(result.missing_keys):
        result.missing_keys[:] = [key for key in result.missing_keys if key not in added]


def _is_added(key: str) -> bool:
    return ".lora_" in f".{key}" or f".{NAME}." in f".{key}"


def _drop(hooks: MutableMapping[int, Any], hook: Any) -> None:
    for handle in [handle for handle, held in hooks.items() if held is hook]:
        del hooks[handle]


def attach(model: nn.Module, hidden: Mapping[str, int], seed: int = 0) -> list[str]:
    """Give Linear layers a prompt MLP each.

    Args:
        hidden: path of the layer -> hidden width. seed: with the path, of the initial values.

    Returns:
        The paths of the MLPs.
    """
    for path, width in hidden.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        prompt = PromptMLP(layer, width, module_seed(seed, f"{path}.{NAME}"))
        layer.add_module(NAME, prompt.train(layer.training))
        layer.register_forward_hook(add_output)
    if hidden:
        model.register_load_state_dict_post_hook(accept_base_checkpoint)
    return [f"{path}.{NAME}" for path in hidden]


def detach(model: nn.Module) -> None:
    """Take every prompt MLP off a model."""
    for layer in with_prompt(model).values():
        delattr(layer, NAME)
        _drop(layer._forward_hooks, add_output)
    _drop(model._load_state_dict_post_hooks, accept_base_checkpoint)


def with_prompt(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer that has a prompt MLP."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module._modules.get(NAME), PromptMLP)
    }


def width(in_features: int, largest: int | None) -> int:
    """Hidden width: a quarter of the input, at least 1 and at most `largest`."""
    quarter = max(in_features // 4, 1)
    return quarter if largest is None else min(quarter, largest)


def modules_to_save(paths: Iterable[str]) -> list[str]:
    """Entry of `LoraConfig.modules_to_save` for these MLPs: they train and are saved with LoRA."""
    paths = list(paths)
    return [f"re:{only(paths)}"] if paths else []
