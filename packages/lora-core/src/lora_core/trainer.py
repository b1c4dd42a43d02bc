"""`LoraTrainer`: transformers.Trainer runs the loop, this adds what it does not promise.

Adapter-only checkpoints and exact resume, a data order that is a function of (seed, epoch),
evaluation by the package's metrics that leaves training untouched, best and early stopping, a
check of every update before it is done, and an orderly end when a signal comes. Import this module
only to train: it costs seconds.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from lora_core import checkpoint
from lora_core.distributed import first_rank_decides, world_size
from lora_core.errors import ConfigError
from lora_core.guards import Guards
from lora_core.report import Progress, RunLog, say
from lora_core.settings import plain
from lora_core.training import evaluation as training_evaluation
from lora_core.training import numerics, session, sharding, update
from lora_core.training import saves as training_saves
from lora_core.training.arguments import choose_device, choose_precision, training_arguments
from lora_core.training.checks import (
    check_depends,
    check_identity,
    check_samples,
    check_trainable,
)
from lora_core.training.figures import COLUMNS, Means, Setbacks, on_a_line
from lora_core.training.flow import Finished, Flow
from lora_core.training.loading import Watched, data_loader
from lora_core.training.loss import Loss, LossModule
from lora_core.training.optimizer import create_optimizer, create_schedule
from lora_core.training.out_of_memory import Advice
from lora_core.training.schedule import EpochSampler
from lora_core.training.shares import Counts, Shares
from lora_core.training.signals import Signals, shield_worker

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
        train_set: map-style data set. If it has `set_epoch(epoch)`, it is told before each epoch,
            in all workers; its samples should be functions of (seed, epoch, index).
        collate: list of samples -> batch, a dict of tensors, plain values, and dicts and lists.
            Its "keys", if any, are the samples' names in messages.
        loss: `(model, batch) -> (scalar, parts)`; parts are numbers that are logged as means.
        evaluate: `model -> metrics`; best and early stopping follow the first one, larger is
            better. Runs on rank 0 in eval mode and without gradient. Should it fail after the
            first time, that is a warning; three times in a row end the run.
        log: where figures go besides the terminal.
        draw: called as `(step)` on rank 0 after every evaluation, to put pictures into the log.
        patience: stop after so many evaluations in a row without a better value; None: never.
        min_delta: a value counts as better for `patience` if it is better by more than this.
        on_best: called as `(step, metrics)` on rank 0 after the checkpoint of a new best.
        on_latest: called as `(step)` on rank 0 after every checkpoint.
        save_adapter: `path -> None`, writes the adapter directory; default: `lora_core`'s.
        shown: names of the metrics that are printed; None: all. The log gets every one.
        referenced: gives steps whose checkpoints must stay because other files refer to them.
        b_lr_ratio: learning rate of B over that of A (LoRA+).
        schedule: (update, updates) -> share of the peak learning rate, in place of the cosine.
        order: indices of an epoch, a function of (seed, epoch), in place of a random permutation.
        count: `batch -> items` that the loss of a batch is the mean over; None: its samples; or
            several numbers by name, see `lora_core.training.shares`.
        sharded: blocks whose frozen parameters are divided among the processes, see
            `lora_core.training.sharding`; after `train` they are whole.
        guards: what is done when something is wrong, and how many checkpoints are kept.
        settings: the run's, by name, as plain values; they go into every checkpoint, and a resumed
            run must have the same, but for those in `may_change`.
        fingerprints: of what settings only point to: "base" weights, "data".
        resume_with: for messages: the command that continues this run.
        advice: for messages: what helps when memory runs out.

    Raises:
        ConfigError: no trainable parameter, an order of more or fewer samples than there are, or
            processes that do not see each other.
        DataError: no training sample, or fewer than a batch with `dataloader_drop_last`.
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
        draw: Callable[[int], object] | None = None,
        patience: int | None = None,
        min_delta: float = 0.0,
        on_best: Callable[[int, dict[str, float]], object] | None = None,
        on_latest: Callable[[int], object] | None = None,
        save_adapter: Callable[[Path], object] | None = None,
        shown: Collection[str] | None = None,
        referenced: Callable[[], Collection[int]] = tuple,
        b_lr_ratio: float = 1.0,
        schedule: Callable[[int, int], float] | None = None,
        order: EpochSampler | None = None,
        count: Callable[[Any], Counts] | None = None,
        sharded: Sequence[nn.Module] = (),
        guards: Guards | None = None,
        settings: Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        may_change: Collection[str] = (),
        resume_with: str = "",
        advice: Advice | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.sampler = order or EpochSampler(len(train_set), args.seed)  # type: ignore[arg-type]
        check_samples(train_set, args, self.sampler)
        check_trainable(model)
        self.network = model
        self.run_log, self.draw, self.shown = log, draw, shown
        self.patience, self.min_delta = patience, min_delta
        self.on_best, self.on_latest = on_best, on_latest
        self.measure, self.referenced, self.b_lr_ratio = evaluate, referenced, b_lr_ratio
        self.write_adapter = save_adapter or self._write_adapter
        self.guards = guards or Guards()
        self.settings, self.may_change = plain(dict(settings or {})), may_change  # no secrets
        self.fingerprints, self.resume_with = dict(fingerprints or {}), resume_with
        self.advice, self.schedule = advice or Advice(), schedule
        self.already_done = False  # a resumed run had nothing left to do
        self.best: dict[str, Any] | None = None  # {"step", "value", "metrics"}
        self.best_before: dict[str, Any] | None = None  # the one whose files are written
        self.new_best = False
        self.without_gain = 0  # evaluations in a row
        self.dropped: list[int] = []  # updates that were not finite
        self.means, self.setbacks = Means(), Setbacks()
        self.signals, self.stop_signal = Signals(), 0  # the signal that all ranks know of
        self.evaluation_due = False  # a signal came before the evaluation of this step
        self.phase = "training"  # or "validation", "saving": for messages
        self._seconds_before, self._began = 0.0, time.monotonic()
        self._resumed: dict[str, Any] = {}
        self._batches: list[Any] = []  # of the update now under way
        self._random: dict[str, Any] = {}  # torch's, when it began
        self.leaving = multiprocessing.RawValue("b", 0)  # workers may end
        self.progress: Progress | None = None  # while training
        self.samples = Watched(train_set)
        self.sharded = sharding.shard(sharded, args.device)
        self.shares = Shares(self.sampler, args, count)
        try:
            super().__init__(
                model=LossModule(model, loss),
                args=args,
                train_dataset=self.samples,
                data_collator=collate,
                callbacks=[*(callbacks or []), Flow(self)],
            )
        except (ImportError, RuntimeError, ValueError) as error:
            if not args.report_to:
                raise
            raise ConfigError(f"report_to {args.report_to}: {error}") from error
        self.remove_callback(PrinterCallback)  # transformers' prints; ours are in Flow
        world = world_size()
        if self.accelerator.num_processes != world:
            raise ConfigError(
                f"{world} processes were started, but each sees {self.accelerator.num_processes}:"
                " start with torchrun, one process per device"
            )

    # -- the loop: what Trainer leaves open ----------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or continue exactly from a checkpoint folder of this run (True: the latest).

        SIGTERM, SIGINT, SIGHUP and SIGUSR1 end it with a complete checkpoint after the update that
        is under way; an evaluation is broken off, and made up for after the resume.

        Raises:
            Stopped: a signal came.
            CheckpointError: the checkpoint is damaged or of another run, or nothing can be saved.
            NumericError: a loss or gradient that is not finite, before any weight has moved; an
                adapter that changes the base's output at the start or that does not move.
        """
        return session.run(
            self, resume_from_checkpoint, lambda folder: self._train(folder, **kwargs)
        )

    def _train(self, path: str | None, **kwargs: Any) -> TrainOutput:
        if path:
            self._resumed = checkpoint.load(path)
            if self._finished():
                training_saves.restore(self, path, self._resumed, with_log=False)
                self.state.global_step = self._resumed["step"]
                self.already_done = True
                say("the training is already finished")
                return TrainOutput(self.state.global_step, math.nan, {})
        # Dropout masks differ between ranks; the sampler has a generator of its own.
        set_seed(self.args.seed + self.args.process_index)
        try:
            return super().train(resume_from_checkpoint=path, **kwargs)
        except Finished:  # by the evaluation at the beginning
            return TrainOutput(self.state.global_step, math.nan, {})

    def _finished(self) -> bool:
        """Whether nothing is left to train and to evaluate."""
        state, total = self._resumed, self.args.max_steps
        if total <= 0:
            batches = len(self.get_train_dataloader())
            updates = math.ceil(batches / self.args.gradient_accumulation_steps)
            total = math.ceil(self.args.num_train_epochs * updates)
        stopped = self.patience is not None and state["without_gain"] >= self.patience
        return not state.get("evaluation_due") and (state["step"] >= total or stopped)

    def how_to_resume(self) -> str:
        return f"; continue with: {self.resume_with}" if self.resume_with else ""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        if not self.sharded or model is not self.model:
            return super()._wrap_model(model, training, dataloader)
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        settings = self.accelerator.ddp_handler.to_kwargs() if self.accelerator.ddp_handler else {}
        return sharding.data_parallel(model, self.args.device, **settings)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Take the micro-batches of one update, and find what each counts in it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.shares.begin(self.state.global_step, batches, device)
        return batches, None

    def get_train_dataloader(self) -> DataLoader[Any]:
        args: Any = self.args
        return data_loader(
            self.samples,
            self.shares.batches,
            self.data_collator,
            workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch=args.dataloader_prefetch_factor,
            start_method=getattr(args, "dataloader_multiprocessing_context", None),
            worker_init=partial(shield_worker, init=None, leaving=self.leaving),
        )

    def _prepare_input(self, data: Any) -> Any:
        """Move a batch to the device; from pinned memory without waiting for what runs there."""
        if isinstance(data, Tensor) and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._batches.append(inputs)
        if len(self._batches) == 1:
            self._random = numerics.torch_random()
            if self.state.global_step == 0:
                check_identity(self.network, lambda: self._plain_loss(inputs))
        loss = super().training_step(model, inputs, *args, **kwargs)
        # Trainer sums the losses for its own log; one NaN would stay in that sum for ever.
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0)

    def _plain_loss(self, inputs: Any) -> float:
        with torch.no_grad(), self.accelerator.autocast():
            module: Any = self.model
            return float(module.loss(self.network, self._prepare_inputs(inputs))[0])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, parts = model(inputs)
        check_depends(loss, self.state.global_step + 1)
        items, weight = self.shares.next()
        self.means.add(loss, parts, items)
        loss = loss * weight
        return (loss, parts) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Agree with all ranks that the update is finite, then clip; nothing was touched before."""
        return update.clip(self)

    def _gather(self, value: Any) -> list[Any]:
        """Give the values of all ranks, in their order."""
        gathered: list[Any] = gather_object([value]) if self.args.world_size > 1 else [value]
        return gathered

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = create_optimizer(self.network, self.args, self.b_lr_ratio)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self._created_lr_scheduler = True
            self.lr_scheduler = create_schedule(
                optimizer or self.optimizer, self.args, num_training_steps, self.schedule
            )
        return self.lr_scheduler

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the model as it is, follow the best, and stop when it stays away.

        Gives nothing if a signal breaks it off, or if it fails.
        """
        metrics = training_evaluation.evaluate(self)
        self.control.should_evaluate = False
        if metrics:
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
        return metrics

    # -- figures -------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # not the summary at the end
            self.log_training_row(logs["learning_rate"], logs.get("grad_norm"))
        super().log(logs, start_time)

    def log_training_row(self, lr: float, grad_norm: float | None) -> None:
        """Log the means since the last row, over all ranks and micro-batches."""
        means = self.means.take(self._gather)
        if not means:
            return
        step = self.state.global_step
        figures = {"epoch": self.state.epoch, **means, "lr": lr, "grad_norm": grad_norm}
        self.write_row(step, "train", figures)
        if progress := self.progress:
            columns = shutil.get_terminal_size().columns - 1 if progress.live else COLUMNS
            shown = on_a_line(means, {"lr": lr}, progress.total, min(columns, COLUMNS))
            progress.report(step, **shown)

    def write_row(self, step: int, split: str, figures: dict[str, Any]) -> None:
        if self.run_log:
            with self.setbacks.tolerated("writing the log", step):
                self.run_log.write(step, split, **figures, seconds=self.seconds)

    @property
    def seconds(self) -> float:
        """Time that the run has taken, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._began

    def start_clock(self, before: float = 0.0) -> None:
        self._seconds_before, self._began = before, time.monotonic()

    # -- checkpoints; what is in them: `training_saves` ------------------------------------------

    def _write_adapter(self, path: Path) -> None:
        from lora_core.adapters.file import save_adapter

        save_adapter(self.network, path)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self.phase = "saving"
        training_saves.save(self)
        # All wait here, and hear of a signal that came meanwhile.
        update.all_agree(self, torch.tensor(True, device=self.args.device))
        self.phase = "training"

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16, or None."""
        return getattr(self.accelerator, "scaler", None)

    def plain_optimizer(self) -> torch.optim.Optimizer:
        wrapped: Any = self.optimizer
        return getattr(wrapped, "optimizer", wrapped)  # accelerate wraps it

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        training_saves.restore(self, resume_from_checkpoint, self._resumed)

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            training_saves.restore_optimizer(self, self._resumed)

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None and self.scaler and self._resumed["scaler"]:
            self.scaler.load_state_dict(self._resumed["scaler"])

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            training_saves.restore_random(self, self._resumed)
