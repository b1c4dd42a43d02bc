"""One update: all processes agree that it is finite before any weight is touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.errors import CheckpointError, NumericError
from lora_core.report import say
from lora_core.training import numerics
from lora_core.training.saves import record

if TYPE_CHECKING:
    from lora_core.trainer import LoraTrainer


def clip(trainer: LoraTrainer) -> Tensor:
    """The norm of the gradients, f32 [], after which they are clipped or the update is dropped.

    Raises:
        NumericError: it is not finite, and the guards do not let it be dropped.
    """
    optimizer = trainer.plain_optimizer()
    if trainer.scaler:
        trainer.scaler.unscale_(optimizer)
    # Those of the optimizer: walking through a large network takes longer than the check.
    updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = numerics.total_norm([p.grad for p in updated])
    finite = torch.isfinite(sum(part["loss"] for part in trainer.means.update))
    if not trainer.scaler:  # which expects overflows, drops the update and lowers its scale
        finite = finite & torch.isfinite(norm)
    if all_agree(trainer, finite):
        trainer.means.accept()
        if trainer.args.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(updated, trainer.args.max_grad_norm, norm)
    else:
        _drop(trainer)
    trainer._batches.clear()
    return norm


def all_agree(trainer: LoraTrainer, finite: Tensor) -> bool:
    """Whether it is finite on all ranks; tells of signals on the way, for the same price."""
    if trainer.args.world_size == 1:
        trainer.stop_signal = trainer.signals.received
        return bool(finite)
    received = torch.tensor(trainer.signals.received, device=finite.device)
    flags = torch.stack([(~finite).to(received.dtype), received])
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    broken, trainer.stop_signal = (int(flag) for flag in flags.tolist())
    return not broken


def _drop(trainer: LoraTrainer) -> None:
    """Leave out the update under way on all ranks, if the guards allow it; or end the training.

    A dropped update counts as a step and the learning rate goes on (with fp16 it waits, as when
    the scaler drops one); weights and moments stay as they are, and its loss is not logged.

    Raises:
        NumericError: the message has the samples, and the folder that reproduces the update.
    """
    step, guards = trainer.state.global_step + 1, trainer.guards
    own = numerics.facts(trainer.network, trainer._batches, trainer.means.update)
    what = numerics.explain(step, trainer._gather(own))
    if not guards.skip_nonfinite or len(trainer.dropped) >= guards.max_nonfinite:
        if guards.skip_nonfinite:
            advice = f"--max_nonfinite {guards.max_nonfinite} updates were dropped before"
        else:
            advice = "or leave such updates out with --skip_nonfinite true"
        raise NumericError(
            f"{what}. No weight was changed{_bundle(trainer, step, own)}\n"
            f"Look at these samples, lower the learning rate, use fp32 or bf16; {advice}"
        )
    trainer.dropped.append(step)
    trainer.means.clear()
    for parameter in trainer.network.parameters():
        parameter.grad = None  # the optimizer leaves such parameters and their moments alone
    say(f"{what}. Update dropped ({len(trainer.dropped)} of at most {guards.max_nonfinite})")


def _bundle(trainer: LoraTrainer, step: int, found: dict[str, Any]) -> str:
    """Write what reproduces the update; gives the words that say where it is."""
    rank = f"-rank{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
    folder = Path(str(trainer.args.output_dir)) / f"nonfinite-step{step}{rank}"
    about = {"step": step, "seed": trainer.args.seed, **found, **record(trainer)}
    try:
        numerics.write_bundle(
            folder, trainer._batches, trainer._random, about, trainer.write_adapter
        )
    except (OSError, CheckpointError) as error:
        return f"; its batch could not be written: {error}"
    return f"; batch, adapter and random state: {folder.absolute()}"
