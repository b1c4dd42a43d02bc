"""Guards around training: nothing runs for hours in vain, nothing is spoiled in silence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core import checkpoint
from lora_core.errors import ConfigError, DataError, NumericError
from lora_core.report import say

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_samples(train_set: Any, args: TrainingArguments, order: Sized) -> None:
    needed = args.per_device_train_batch_size * args.world_size if args.dataloader_drop_last else 1
    if len(train_set) < needed:
        raise DataError(
            f"0 batches per epoch: {len(train_set)} training samples make no batch, at least "
            f"{needed} are needed: add samples, or lower the batch size"
        )
    if len(order) != len(train_set):
        raise ConfigError(
            f"the order has {len(order)} indices and there are {len(train_set)} training samples: "
            "an epoch shows each sample once"
        )


def check_trainable(model: nn.Module) -> None:
    """Insist on something to train, in fp32: half precision would lose the small updates."""
    from lora_core.injection import lora_layers

    merged = {name for layer in lora_layers(model).values() for name in layer.lora_merged}
    if merged:
        raise ConfigError(
            f"the adapters {', '.join(sorted(merged))} are merged into the weights, where they "
            "would be trained on top of themselves: call unmerge(model) first"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("nothing to train: no parameter of the model requires a gradient")
    for parameter in trainable:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def check_depends(loss: Tensor, step: int) -> None:
    """Insist on a loss that some trained parameter has a part in."""
    if not loss.requires_grad:
        raise NumericError(
            f"step {step}: the loss has no gradient, as no trained parameter takes part in it. "
            "Part of the model runs under no_grad, or in reentrant checkpointing"
        )


def check_identity(model: nn.Module, loss: Callable[[], float]) -> None:
    """Before the first update the adapted model gives what its base gives.

    Not asked of adapters that have learnt before (a warm start).

    Args:
        loss: computes the loss of the first batch with the model as it is.

    Raises:
        NumericError: the losses with and without adapters differ.
    """
    from lora_core.injection import adapters_off

    with untouched(model):
        adapted = loss()
    with untouched(model), adapters_off(model):
        base = loss()
    # fp32 differs in the last digits where an initial pair is subtracted again; autocast more.
    close = math.isclose(adapted, base, rel_tol=1e-2, abs_tol=1e-4)
    if close or not (math.isfinite(adapted) and math.isfinite(base)) or not is_initial(model):
        return
    raise NumericError(
        f"before the first update the adapted model must equal its base, but the loss of the first "
        f"batch is {adapted:.6g} with adapters and {base:.6g} without: a layer computes something "
        "else since it was adapted, or its weights were changed afterwards"
    )


def is_initial(model: nn.Module) -> bool:
    """Whether no adapter has learnt: B (of embeddings A) is zero, or the pair the initial one."""
    from lora_core.injection import lora_layers

    for layer in lora_layers(model).values():
        for adapter in layer.lora_live():
            for weight in layer.lora_adapters[adapter].weight_names:
                A, B = layer.lora_factors(adapter, weight)
                initial = layer.lora_initial(adapter, weight)
                if initial is None and bool(A.any()) and bool(B.any()):
                    return False
                if initial and not all(map(torch.equal, (A, B), initial)):
                    return False
    return True


def check_moved(model: nn.Module, before: dict[str, Tensor]) -> None:
    """After the first update every B that saw a gradient has left its initial value."""
    now = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(now[name], value)]
    if len(still) == len(before):
        raise NumericError(
            "no adapter moved in the first update: no gradient reaches any lora_B. "
            "Part of the model runs under no_grad, or in reentrant checkpointing"
        )
    if still:
        say(f"{len(still)} of {len(before)} adapters did not move in the first update:")
        say("  " + ", ".join(still[:3]) + (", ..." if len(still) > 3 else ""))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate inside: eval mode; modes and all random generators are put back after it."""
    modes = {module: module.training for module in model.modules()}
    randoms = checkpoint.random_state()
    model.eval()
    try:
        yield
    finally:
        checkpoint.set_random_state(randoms)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Train inside: afterwards weights, gradients, modes and generators are as before, bit for bit.

    There are no gradients before.
    """
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors(model).items()}
    with untouched(model):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            checkpoint.load_tensors(model, tensors)
