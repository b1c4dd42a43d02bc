"""`LoraTrainer`: transformers.Trainer runs the loop, this adds what it does not promise.

Adapter-only checkpoints and exact resume, a data order that is a function of (seed, epoch),
evaluation by the package's metrics that leaves training untouched, best and early stopping, and
checks that adapters learn. Import this module only to train: it costs seconds.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from lora_core import checkpoint
from lora_core.errors import ConfigError
from lora_core.report import Progress, RunLog, duration, figure, say
from lora_core.schedule import EpochSampler, lr_factor
from lora_core.training_arguments import (
    choose_device,
    choose_precision,
    first_rank_decides,
    training_arguments,
)
from lora_core.training_checks import check_samples, check_trainable, untouched
from lora_core.training_flow import Flow, Loss, LossModule

__all__ = [
    "LoraTrainer",
    "choose_device",
    "choose_precision",
    "first_rank_decides",
    "training_arguments",
]


class LoraTrainer(Trainer):
    """Trains the adapters of a model.

    Args:
        model: the adapted network; only parameters that require a gradient are trained.
        args: from `training_arguments`.
        train_set: map-style data set. If it has `set_epoch(epoch)`, it is told before an epoch's
            workers start; its samples should be functions of (seed, epoch, index).
        collate: list of samples -> batch, a dict of tensors, plain values, and dicts and lists.
        loss: `(model, batch) -> (scalar, parts)`; parts are numbers that are logged as means.
        evaluate: `model -> metrics`; best and early stopping follow the first one, larger is
            better. Runs on rank 0 in eval mode and without gradient.
        log: where figures go besides the terminal.
        patience: stop after so many evaluations in a row without a better value; None: never.
        min_delta: a value counts as better for `patience` if it is better by more than this.
        on_best: called as `(step, metrics)` on rank 0 after the checkpoint of a new best.
        on_latest: called as `(step)` on rank 0 after every checkpoint.
        save_adapter: `path -> None`, writes the adapter directory; default: `lora_core`'s.
        shown: names of the metrics that are printed; None: all. The log gets every one.
        referenced: gives steps whose checkpoints must stay because other files refer to them.
        b_lr_ratio: learning rate of B over that of A (LoRA+).

    Raises:
        ConfigError: no trainable parameter, or processes that do not see each other.
        DataError: no training sample, or fewer than a batch with `dataloader_drop_last`.
        NumericError: a loss or gradient that is not finite, before any weight has moved; or
            adapters that did not move in the first update.
    """

    # Trainer's own, whose types depend on the release.
    control: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_set: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        loss: Loss,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        *,
        log: RunLog | None = None,
        patience: int | None = None,
        min_delta: float = 0.0,
        on_best: Callable[[int, dict[str, float]], object] | None = None,
        on_latest: Callable[[int], object] | None = None,
        save_adapter: Callable[[Path], object] | None = None,
        shown: Collection[str] | None = None,
        referenced: Callable[[], Collection[int]] = tuple,
        b_lr_ratio: float = 1.0,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_samples(train_set, args)
        check_trainable(model)
        self.network = model
        self.run_log, self.patience, self.min_delta = log, patience, min_delta
        self.shown = shown
        self.on_best, self.on_latest = on_best, on_latest
        self.measure, self.referenced, self.b_lr_ratio = evaluate, referenced, b_lr_ratio
        self.write_adapter = save_adapter or self._write_adapter
        self.best: dict[str, Any] | None = None  # {"step", "value", "metrics"}
        self.without_gain = 0  # evaluations in a row
        self._new_best = False
        self._window: dict[str, list[Any]] = {}  # name -> [sum, count] since the last log row
        self._seconds_before, self._began = 0.0, time.monotonic()
        self._resumed: dict[str, Any] = {}
        self.progress: Progress | None = None  # while training
        self.sampler = EpochSampler(len(train_set), args.seed)  # type: ignore[arg-type]
        try:
            super().__init__(
                model=LossModule(model, loss),
                args=args,
                train_dataset=train_set,
                data_collator=collate,
                callbacks=[*(callbacks or []), Flow(self)],
            )
        except (ImportError, RuntimeError, ValueError) as error:
            if not args.report_to:
                raise
            raise ConfigError(f"--trainer.report_to {args.report_to}: {error}") from error
        self.remove_callback(PrinterCallback)  # transformers' prints; ours are in Flow
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.accelerator.num_processes != world:
            raise ConfigError(
                f"{world} processes were started, but each sees {self.accelerator.num_processes}:"
                " start with torchrun, one process per device"
            )

    # -- the loop: what Trainer leaves open ----------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or continue exactly from a checkpoint folder of this run (True: the latest)."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoint.latest(str(self.args.output_dir)))
        if resume_from_checkpoint and self._finished(resume_from_checkpoint):
            return TrainOutput(self.state.global_step, math.nan, {})
        # Dropout masks differ between ranks; the sampler has a generator of its own.
        set_seed(self.args.seed + self.args.process_index)
        modes = {module: module.training for module in self.network.modules()}
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self.progress:
                self.progress.close()
            for module, mode in modes.items():
                module.training = mode

    def _finished(self, path: str) -> bool:
        """Whether nothing is left to train; then the model is put as it was at the end."""
        state = checkpoint.load(path)
        total = self.args.max_steps
        if total <= 0:
            batches = len(self.get_train_dataloader())
            updates = math.ceil(batches / self.args.gradient_accumulation_steps)
            total = math.ceil(self.args.num_train_epochs * updates)
        stopped = self.patience is not None and state["without_gain"] >= self.patience
        if state["step"] < total and not stopped:
            return False
        self._load_from_checkpoint(path)
        self.state.global_step = state["step"]
        say("the training is already finished")
        return True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, parts = model(inputs)
        for name, value in {**parts, "loss": loss}.items():
            entry = self._window.setdefault(name, [0.0, 0])
            entry[0] = entry[0] + (value.detach() if isinstance(value, Tensor) else value)
            entry[1] += 1
        return (loss, parts) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or `--trainer.optim`, on the parameter groups of the adapters."""
        if self.optimizer is None:
            from lora_core.injection import parameter_groups

            cls, settings = self.get_optimizer_cls_and_kwargs(self.args)
            if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or (
                settings.keys() & {"params", "model", "optimizer_dict"}
            ):
                raise ConfigError(f"--trainer.optim {self.args.optim} does not train adapters only")
            groups = parameter_groups(
                self.network, self.args.learning_rate, self.args.weight_decay, self.b_lr_ratio
            )
            self.optimizer = cls(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Plain `cosine` is a warm-up from peak / w and one cosine to 1 % of the peak.

        transformers' own starts with an update at learning rate 0 and ends at 0.
        """
        if self.args.lr_scheduler_type != "cosine" or self.args.lr_scheduler_kwargs:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if self.lr_scheduler is None:
            self._created_lr_scheduler = True
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda update: lr_factor(update, warmup, num_training_steps),
            )
        return self.lr_scheduler

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the model as it is, follow the best, and stop when it stays away."""
        step = self.state.global_step
        began = time.monotonic()
        metrics = self._measure()
        note = self._follow_best(step, metrics) if step else ""
        took = time.monotonic() - began
        if self.run_log:
            epoch = self.state.epoch
            self.run_log.write(step, "val", epoch=epoch, **metrics, seconds=self.seconds)
        what = f"step {step}  validation" if step else "before training"
        shown = metrics if self.shown is None else [name for name in self.shown if name in metrics]
        figures = "  ".join(f"{name} {figure(metrics[name])}" for name in shown)
        say(f"{what}  {figures}  ({duration(took)}){note}")
        if self.patience is not None and self.without_gain >= self.patience:
            self._stop_early(next(iter(metrics)))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _measure(self) -> dict[str, float]:
        """Evaluate on rank 0; all ranks get its numbers, so that all decide alike."""
        answer: list[Any] = [None]
        if self.args.process_index == 0 and self.measure is not None:
            with untouched(self.network), torch.no_grad(), self.accelerator.autocast():
                answer = [{name: float(v) for name, v in self.measure(self.network).items()}]
        if self.args.world_size > 1:
            broadcast_object_list(answer)
        if not answer[0]:
            raise ConfigError("evaluation gave no metric: the first one is what best follows")
        return dict(answer[0])

    def _follow_best(self, step: int, metrics: dict[str, float]) -> str:
        """Compare with the best so far; NaN is no improvement, and of equals the first stays."""
        value = next(iter(metrics.values()))
        before = self.best["value"] if self.best else -math.inf
        self.without_gain = 0 if value > before + self.min_delta else self.without_gain + 1
        if not value > before:
            return ""
        self.best = {"step": step, "value": value, "metrics": metrics}
        self._new_best = self.control.should_save = True
        return "  best so far"

    def _stop_early(self, metric: str) -> None:
        best = f"{figure(self.best['value'])} at step {self.best['step']}" if self.best else "none"
        say(f"stopped: {self.without_gain} validations without a better {metric} (best: {best})")
        self.control.should_training_stop = self.control.should_save = True
        self._log_training_row(self._get_learning_rate(), None)

    # -- figures -------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:  # not the summary at the end
            self._log_training_row(logs["learning_rate"], logs.get("grad_norm"))

    def _log_training_row(self, lr: float, grad_norm: float | None) -> None:
        """Log the means since the last row, over all ranks and micro-batches."""
        own = [{name: (float(total), count) for name, (total, count) in self._window.items()}]
        self._window.clear()
        windows = gather_object(own) if self.args.world_size > 1 else own
        totals: dict[str, tuple[float, int]] = {}
        for name, (total, count) in (item for window in windows for item in window.items()):
            total_before, count_before = totals.get(name, (0.0, 0))
            totals[name] = (total_before + total, count_before + count)
        if not totals:
            return
        means = {name: total / count for name, (total, count) in totals.items()}
        step = self.state.global_step
        values = {"epoch": self.state.epoch, **means, "lr": lr, "grad_norm": grad_norm}
        if self.run_log:
            self.run_log.write(step, "train", **values, seconds=self.seconds)
        if self.progress:
            self.progress.report(step, **{name: means[name] for name in ("loss", *means)}, lr=lr)

    @property
    def seconds(self) -> float:
        """Time that the run has taken, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._began

    # -- checkpoints ---------------------------------------------------------------------------

    def _write_adapter(self, path: Path) -> None:
        from lora_core.adapter_file import save_adapter

        save_adapter(self.network, path)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write adapter, optimizer, schedule, random states and counters; nothing of the base."""
        step, run = self.state.global_step, str(self.args.output_dir)
        window = {name: [float(total), count] for name, (total, count) in self._window.items()}
        ranks = [{"random": checkpoint.random_state(), "window": window}]
        ranks = gather_object(ranks) if self.args.world_size > 1 else ranks
        if self.args.process_index == 0:

            def fill(folder: Path) -> None:
                self.write_adapter(folder / "adapter")
                self.state.save_to_json(str(folder / "trainer_state.json"))

            with untouched(self.network):
                checkpoint.save(run, step, self._state(ranks), fill)
                if self._new_best and self.best and self.on_best:
                    self.on_best(step, self.best["metrics"])
                if self.on_latest:
                    self.on_latest(step)
            keep = {*self.referenced(), *([self.best["step"]] if self.best else [])}
            checkpoint.prune(run, max(self.args.save_total_limit or 1, 1), keep)
        self._new_best = False
        self.accelerator.wait_for_everyone()

    def _state(self, ranks: list[Any]) -> dict[str, Any]:
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "tensors": checkpoint.tensors(self.network),
            "optimizer": checkpoint.optimizer_state(self._plain_optimizer(), self._names()),
            "schedule": self.lr_scheduler.last_epoch if self.lr_scheduler else 0,
            "scaler": scaler.state_dict() if scaler else None,
            "ranks": ranks,
            "best": self.best,
            "without_gain": self.without_gain,
            "seconds": self.seconds,
        }

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        wrapped: Any = self.optimizer
        return getattr(wrapped, "optimizer", wrapped)  # accelerate wraps it

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.network.named_parameters()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = checkpoint.load(resume_from_checkpoint)
        checkpoint.load_tensors(self.network, state["tensors"])
        self.best, self.without_gain = state["best"], state["without_gain"]
        self._seconds_before, self._began = state["seconds"], time.monotonic()
        own = state["ranks"][self.args.process_index % len(state["ranks"])]
        self._window = {name: list(entry) for name, entry in own["window"].items()}
        self._resumed = state
        if self.run_log:
            self.run_log.rewind(state["step"])
        say(f"continuing at step {state['step']} from {resume_from_checkpoint}")

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        """Restore the moments and the place in the schedule; its shape is this run's setting."""
        if checkpoint_path is None:
            return
        checkpoint.load_optimizer_state(
            self._plain_optimizer(), self._names(), self._resumed["optimizer"]
        )
        checkpoint.load_schedule(self.lr_scheduler, self._resumed["schedule"])

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint_path is not None and scaler and self._resumed["scaler"]:
            scaler.load_state_dict(self._resumed["scaler"])

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None:
            return
        ranks = self._resumed["ranks"]
        if len(ranks) != self.args.world_size:
            say(f"resumed on {self.args.world_size} processes instead of {len(ranks)}: not exact")
        checkpoint.set_random_state(ranks[self.args.process_index % len(ranks)]["random"])
