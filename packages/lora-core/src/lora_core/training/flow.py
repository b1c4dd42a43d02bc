"""What `LoraTrainer` does at the events of transformers' loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

from lora_core.errors import NumericError
from lora_core.report import Progress
from lora_core.training.checks import check_moved

if TYPE_CHECKING:
    from lora_core.trainer import LoraTrainer

SMALLEST_SCALE = 1e-4  # of fp16's gradient scaler, which starts at 65536 and halves


class Finished(Exception):
    """What was left of a resumed run was an evaluation."""


class Flow(TrainerCallback):
    """What happens at the events of the loop, in their order."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer
        self.before: dict[str, Tensor] | None = None  # the B matrices before the first update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        state.compute_steps(args, state.max_steps)  # a resumed run has its own intervals
        if state.global_step == 0:
            trainer.start_clock()
            self.before = {
                name: p.detach().clone()
                for name, p in trainer.network.named_parameters()
                if p.requires_grad and ("lora_B." in name or "lora_embedding_B." in name)
            }
        if trainer.measure is not None and (state.global_step == 0 or trainer.evaluation_due):
            self._evaluate(state, control)
        trainer.progress = Progress(state.max_steps, state.global_step)

    def _evaluate(self, state: Any, control: Any) -> None:
        """Evaluate before training, or make up for what a signal has cut off.

        Trainer's loop would do an update before it looks at what is decided here.
        """
        trainer = self.trainer
        if trainer.evaluation_due:
            trainer._load_rng_state("resumed")
        made_up = trainer.evaluation_due
        trainer.evaluate()
        if made_up or control.should_save:
            trainer._save_checkpoint(trainer.network)
            control.should_save = False
        if control.should_training_stop or (made_up and state.global_step >= state.max_steps):
            raise Finished

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate's own set_epoch does not reach the data set on several processes.
        batches = len(kwargs["train_dataloader"])
        epoch = state.global_step // math.ceil(batches / args.gradient_accumulation_steps)
        self.trainer.sampler.set_epoch(epoch)
        train_set: Any = self.trainer.train_dataset
        if hasattr(train_set, "set_epoch"):
            train_set.set_epoch(epoch)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step + 1
        if trainer.accelerator.optimizer_step_was_skipped:
            check_scale(trainer.scaler, step)
            return
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        moves = max(rates) > 0 and step not in trainer.dropped and not trainer.shares.nothing
        if self.before and moves:
            check_moved(trainer.network, self.before)
            self.before = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        step, last = state.global_step, state.global_step >= state.max_steps
        if trainer.progress:
            trainer.progress.update(step)
        control.should_log |= last
        due = trainer.measure is not None and (last or step % args.eval_steps == 0)
        if args.world_size == 1:  # several have agreed before the update
            trainer.stop_signal = trainer.signals.received
        if trainer.stop_signal:  # the evaluation is made up for by the resumed run
            trainer.evaluation_due = due
            control.should_save = control.should_training_stop = True
        elif due:
            control.should_evaluate = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= bool(self.trainer.stop_signal)


def check_scale(scaler: Any, step: int) -> None:
    """A scale this small means that it is not overflow what makes the gradients infinite."""
    scale = scaler.get_scale() if scaler else 1.0
    if scale < SMALLEST_SCALE:
        raise NumericError(
            f"step {step}: the fp16 gradients overflow even when scaled by {scale:.1e}, so no "
            "update can be done: compute in bf16 or fp32, or lower the learning rate"
        )
