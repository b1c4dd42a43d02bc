"""Evaluation while training: what is measured, which step is the best, and when to give up."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from lora_core.distributed import wait_for_first
from lora_core.errors import ConfigError
from lora_core.report import duration, figure, say
from lora_core.training import sharding
from lora_core.training.checks import untouched
from lora_core.training.out_of_memory import is_out_of_memory
from lora_core.training.signals import Interrupted

if TYPE_CHECKING:
    from lora_core.trainer import LoraTrainer


def evaluate(trainer: LoraTrainer) -> dict[str, float]:
    """Measure the model, log it, follow the best, and ask for a stop when it stays away.

    Returns:
        The metrics; {} if a signal breaks it off, or if it fails.
    """
    step, began = trainer.state.global_step, time.monotonic()
    with sharding.whole(trainer.sharded):
        outcome = _from_first(trainer, _measure(trainer))
    trainer.phase = "training"
    trainer.evaluation_due = bool(outcome["signal"])
    if outcome["signal"]:
        trainer.stop_signal = outcome["signal"]
        trainer.control.should_save = trainer.control.should_training_stop = True
    metrics: dict[str, float] = outcome["metrics"]
    if not metrics:
        return {}
    note = _follow_best(trainer, step, metrics) if step else ""
    took = time.monotonic() - began
    trainer.write_row(step, "val", {"epoch": trainer.state.epoch, **metrics})
    what = f"step {step}  validation" if step else "before training"
    shown = [name for name in trainer.shown or metrics if name in metrics]
    figures = "  ".join(f"{name} {figure(metrics[name])}" for name in shown)
    say(f"{what}  {figures}  ({duration(took)}){note}")
    if trainer.patience is not None and trainer.without_gain >= trainer.patience:
        _stop_early(trainer, next(iter(metrics)))
    with sharding.whole(trainer.sharded):
        _draw(trainer, step)
    return metrics


def _measure(trainer: LoraTrainer) -> dict[str, Any]:
    """On rank 0 {"metrics", "signal"}: what was measured, or the signal that broke it off."""
    answer: dict[str, Any] = {"metrics": {}, "signal": 0}
    trainer.phase = "validation"
    if trainer.args.process_index != 0 or trainer.measure is None:
        return answer
    step = trainer.state.global_step
    try:
        with (
            untouched(trainer.network),
            torch.no_grad(),
            trainer.accelerator.autocast(),
            trainer.signals.interruptible(),
        ):
            measured = trainer.measure(trainer.network)
            answer["metrics"] = {name: float(value) for name, value in measured.items()}
        if not answer["metrics"]:
            raise ConfigError("evaluation gave no metric: the first one is what best follows")
        trainer.setbacks.counts.pop("the validation", None)
    except Interrupted:
        answer["signal"] = trainer.signals.received
    except Exception as error:
        error.add_note(f"in the validation at step {step}")
        # At step 0 nothing is lost yet.
        if step == 0 or isinstance(error, ConfigError) or is_out_of_memory(error):
            raise
        trainer.setbacks.note("the validation", step, error)
    return answer


def _from_first(trainer: LoraTrainer, answer: dict[str, Any]) -> dict[str, Any]:
    """Give all ranks what rank 0 has, however long they have to wait for it."""
    answers: list[Any] = [answer]
    if trainer.args.world_size > 1:
        wait_for_first()
        broadcast_object_list(answers)
    shared: dict[str, Any] = answers[0]
    return shared


def _draw(trainer: LoraTrainer, step: int) -> None:
    if trainer.draw is None or trainer.args.process_index != 0:
        return
    try:
        with (
            trainer.setbacks.tolerated("drawing pictures", step),
            untouched(trainer.network),
            trainer.signals.interruptible(),
        ):
            trainer.draw(step)
    except Interrupted:
        pass  # the signal is noted, and pictures are no loss


def _follow_best(trainer: LoraTrainer, step: int, metrics: dict[str, float]) -> str:
    """Compare with the best so far; NaN is no improvement, and of equals the first stays."""
    value = next(iter(metrics.values()))
    before = trainer.best["value"] if trainer.best else -math.inf
    gain = value > before + trainer.min_delta
    trainer.without_gain = 0 if gain else trainer.without_gain + 1
    if not value > before:
        return ""
    trainer.best = {"step": step, "value": value, "metrics": metrics}
    trainer.new_best = trainer.control.should_save = True
    return "  best so far"


def _stop_early(trainer: LoraTrainer, metric: str) -> None:
    best = trainer.best
    what = f"{figure(best['value'])} at step {best['step']}" if best else "none"
    say(f"stopped: {trainer.without_gain} validations without a better {metric} (best: {what})")
    trainer.control.should_training_stop = trainer.control.should_save = True
    trainer.log_training_row(trainer._get_learning_rate(), None)
