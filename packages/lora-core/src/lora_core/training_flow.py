"""The two parts of `LoraTrainer` that transformers calls: the module it wraps, and the events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback

from lora_core.report import Progress
from lora_core.training_checks import check_finite, check_moved

if TYPE_CHECKING:
    from lora_core.trainer import LoraTrainer

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Any]]]


class LossModule(nn.Module):
    """The loss as a module, so that DDP and autocast see one forward.

    In training mode frozen layers with running statistics stay in eval mode: their statistics
    are part of the base.
    """

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.loss(self.network, batch)

    def train(self, mode: bool = True) -> LossModule:
        super().train(mode)
        for module in self.network.modules():
            has_statistics = getattr(module, "running_mean", None) is not None
            if has_statistics and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self


class Flow(TrainerCallback):
    """What happens at the events of the loop, in their order."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer
        self.before: dict[str, Tensor] | None = None  # the B matrices before the first update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if state.global_step == 0:
            trainer._began = time.monotonic()
            self.before = {
                name: p.detach().clone()
                for name, p in trainer.network.named_parameters()
                if p.requires_grad and ("lora_B." in name or "lora_embedding_B." in name)
            }
            if trainer.measure is not None:
                trainer.evaluate()
        trainer.progress = Progress(state.max_steps, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate's own set_epoch does not reach the data set on several processes.
        batches = len(kwargs["train_dataloader"])
        epoch = state.global_step // math.ceil(batches / args.gradient_accumulation_steps)
        self.trainer.sampler.set_epoch(epoch)
        train_set: Any = self.trainer.train_dataset
        if hasattr(train_set, "set_epoch"):
            train_set.set_epoch(epoch)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A gradient scaler looks for infinities itself, and skips the update.
        if getattr(self.trainer.accelerator, "scaler", None) is None:
            check_finite(self.trainer.network, self.trainer._window, state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        if (
            self.before
            and max(rates) > 0
            and not self.trainer.accelerator.optimizer_step_was_skipped
        ):
            check_moved(self.trainer.network, self.before)
            self.before = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        if self.trainer.progress:
            self.trainer.progress.update(step)
        control.should_log |= last
        if self.trainer.measure is not None and (last or step % args.eval_steps == 0):
            control.should_evaluate = True
