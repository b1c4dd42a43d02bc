"""From a package's plain settings to transformers.TrainingArguments, device and precision."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_origin, get_type_hints

import torch

from lora_core import config_types, errors
from lora_core.errors import ConfigError, UserError, listing, near
from lora_core.report import say

if TYPE_CHECKING:
    from transformers import TrainingArguments

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")

# What every package sets from settings of its own, or the trainer by itself.
SET_BY_US = {
    "output_dir": "the run's folder is made from the command's settings",
    "max_steps": "the command has its own setting for the length of the training",
    "num_train_epochs": "the command has its own setting for the length of the training",
    "per_device_train_batch_size": "the command has its own setting for the batch size",
    "gradient_accumulation_steps": "the command has its own setting for it",
    "learning_rate": "the command has its own setting for it",
    "weight_decay": "the command has its own setting for it",
    "warmup_steps": "the command has its own setting for it",
    "max_grad_norm": "the command has its own setting for it",
    "seed": "the command has its own setting for it",
    "logging_steps": "the command has its own setting for it",
    "eval_steps": "the command has its own setting for it",
    "dataloader_num_workers": "the command has its own setting for it",
    "bf16": "use the command's precision setting",
    "fp16": "use the command's precision setting",
    "use_cpu": "use the command's device setting",
    "gradient_checkpointing": "the command has its own setting for it",
    "gradient_checkpointing_kwargs": "adapters need the non-reentrant form, which is set",
    "activation_checkpointing": "use the command's setting for gradient checkpointing",
    "activation_checkpointing_kwargs": "adapters need the non-reentrant form, which is set",
    "resume_from_checkpoint": "use the command's --resume",
    "remove_unused_columns": "batches are passed on as the package makes them",
    "disable_tqdm": "the progress bar is ours",
    "logging_strategy": "figures are logged every so many steps",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "save_strategy": "checkpoints are written every save_steps, at a new best, and at the end",
    "eval_strategy": "evaluation runs before training, every so many steps, and at the end",
    "eval_on_start": "the evaluation before training is always done",
}
REFUSED = {
    "auto_find_batch_size": "a smaller batch chosen in silence is another experiment",
    "batch_eval_metrics": "evaluation is the package's",
    "compute_loss_func": "the loss is the package's",
    "data_seed": "the order of the data follows the seed",
    "dataloader_persistent_workers": "the workers would keep the first epoch's augmentation",
    "deepspeed": "checkpoints need whole parameters; start with torchrun for several GPUs",
    "do_eval": "it has no effect",
    "do_predict": "it has no effect",
    "do_train": "it has no effect",
    "enable_jit_checkpoint": "checkpoints are ours",
    "eval_accumulation_steps": "evaluation is the package's",
    "eval_delay": "evaluation runs every so many steps",
    "eval_do_concat_batches": "evaluation is the package's",
    "eval_use_gather_object": "evaluation is the package's",
    "fp16_full_eval": "evaluation runs in the training precision",
    "bf16_full_eval": "evaluation runs in the training precision",
    "fsdp": "checkpoints need whole parameters; start with torchrun for several GPUs",
    "fsdp_config": "checkpoints need whole parameters; start with torchrun for several GPUs",
    "greater_is_better": "the best is the highest value of the package's first metric",
    "hub_always_push": "nothing is uploaded",
    "hub_model_id": "nothing is uploaded",
    "hub_private_repo": "nothing is uploaded",
    "hub_revision": "nothing is uploaded",
    "hub_strategy": "nothing is uploaded",
    "hub_token": "nothing is uploaded, and secrets do not belong into settings",
    "ignore_data_skip": "a resumed run would see the same samples again",
    "include_for_metrics": "evaluation is the package's",
    "include_num_input_tokens_seen": "batches have no tokens",
    "label_names": "the loss is the package's",
    "label_smoothing_factor": "the loss is the package's",
    "length_column_name": "the order of the data is a function of the seed and the epoch",
    "liger_kernel_config": "those kernels are for language models",
    "load_best_model_at_end": "the best adapter is kept in a file of its own",
    "local_rank": "torchrun sets it",
    "metric_for_best_model": "the best follows the package's first metric",
    "neftune_noise_alpha": "it is for language models",
    "parallelism_config": "checkpoints need whole parameters",
    "per_device_eval_batch_size": "evaluation is the package's",
    "prediction_loss_only": "evaluation is the package's",
    "push_to_hub": "nothing is uploaded",
    "restore_callback_states_from_checkpoint": "checkpoints are ours",
    "save_on_each_node": "checkpoints are written once",
    "save_only_model": "resuming needs the optimizer",
    "train_sampling_strategy": "the order of the data is a function of the seed and the epoch",
    "use_liger_kernel": "those kernels are for language models",
}


def choose_device(name: str = "auto") -> torch.device:
    """Give the device for `auto`, `cuda` or `cpu`.

    Raises:
        ConfigError: `cuda` where torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no CUDA device here; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def first_rank_decides(make: Callable[[], T], device: torch.device) -> T:
    """Call `make` in the first process of a run only, and give its result to all of them.

    For what must not be done twice, such as making the folder of a run. A `UserError` is raised in
    all processes, so that none waits for the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return make()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=device.type == "cpu")  # alone it would not see the other processes
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def choose_precision(name: str, device: torch.device | str) -> Precision:
    """Give fp32, bf16 or fp16 for a setting and a device.

    `auto`: bf16 where the device computes in it, else fp16 on CUDA, else fp32.

    Raises:
        ConfigError: a precision that the device does not compute in, with those that it does.
    """
    works: list[Precision] = ["fp32"]
    if torch.device(device).type == "cuda":
        works.append("fp16")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            works.append("bf16")
    if name == "auto":
        return works[-1]
    for precision in works:
        if precision == name:
            return precision
    if name in ("bf16", "fp16"):
        raise ConfigError(f"precision {name} does not run on {device}: use auto or {works[-1]}")
    raise ConfigError(f"precision {name!r} is not one of auto, fp32, bf16, fp16")


def training_arguments(
    output_dir: str | Path,
    *,
    learning_rate: float,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 1,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    max_grad_norm: float = 1.0,
    gradient_accumulation_steps: int = 1,
    log_steps: int = 100,
    eval_steps: int | None = None,
    seed: int = 42,
    num_workers: int = 0,
    precision: str = "auto",
    device: torch.device | str = "auto",
    trainer: dict[str, Any] | None = None,
) -> TrainingArguments:
    """Build TrainingArguments from plain settings, and the rest from `--trainer.NAME value`.

    Args:
        steps, epochs: the length of the training, in optimizer updates or in passes; one of them.
        warmup_steps: updates of linear warm-up; at most a tenth of `steps` is used.
        eval_steps: updates between evaluations and, by default, checkpoints; None: at the end.
        trainer: further fields of TrainingArguments, by name.

    Raises:
        ConfigError: an unknown field, one that is set here, or one that cannot work, and why.
    """
    if (steps is None) == (epochs is None):
        raise ConfigError("give the length of the training as steps or as epochs")
    device = choose_device(device) if isinstance(device, str) else device
    chosen = choose_precision(precision, device)
    end = 10**12  # a step that no run reaches: at the end only
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": -1 if steps is None else steps,
        "num_train_epochs": 1.0 if epochs is None else epochs,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps if steps is None else min(warmup_steps, steps // 10),
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "logging_steps": log_steps,
        "eval_steps": eval_steps or end,
        "save_steps": eval_steps or end,
        "save_total_limit": 2,
        "dataloader_num_workers": num_workers,
        "dataloader_pin_memory": device.type == "cuda",
        "bf16": chosen == "bf16",
        "fp16": chosen == "fp16",
        "use_cpu": device.type == "cpu",
        "optim": "adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        "lr_scheduler_type": "cosine",
        "ddp_timeout": 7200,  # seconds: the other ranks wait while the first one evaluates
        "report_to": "none",
        "log_level": "error",
        "eval_strategy": "no",  # the trainer asks for evaluations itself
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    settings |= _checked(trainer or {})
    atexit.register(_leave_group)
    return _build(settings)


def _leave_group() -> None:
    """End the process group before the interpreter ends.

    gloo's threads can outlive even the group and then abort the interpreter (SIGABRT, one run of
    25), so a command that is through leaves at once with its own status.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gloo = torch.distributed.get_backend() == "gloo"
    torch.distributed.destroy_process_group()
    if gloo and errors.last_status is not None:
        with contextlib.suppress(OSError, ValueError):  # a reader that has left
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(errors.last_status)


def _checked(extra: dict[str, Any]) -> dict[str, Any]:
    """Check the names and types of `--trainer.NAME value`."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    names = TrainingArguments.__dataclass_fields__
    allowed = [name for name in names if name not in SET_BY_US and name not in REFUSED]
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in extra.items():
        place = f"--trainer.{name}"
        if name in SET_BY_US or name in REFUSED:
            problems.append(f"{place} cannot be set: {(SET_BY_US | REFUSED)[name]}")
        elif name not in names:
            problems.append(f"unknown {place}; {near(name, allowed) or 'see TrainingArguments'}")
        elif name == "lr_scheduler_type" and value in ("reduce_lr_on_plateau", "greedy"):
            problems.append(f"{place} {value}: a resumed run could not continue it exactly")
        else:
            try:
                checked[name] = _typed(hints[name], value, place)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(listing(problems))
    return checked


def _typed(hint: Any, value: Any, place: str) -> Any:
    """Check a value where its type is a plain one: the dataclass itself checks nothing."""
    plain = {bool, int, float, str, type(None)}
    kinds = config_types.kinds(hint)
    if all(kind in plain or get_origin(kind) in (list, Literal) for kind in kinds):
        return config_types.accept(hint, value, place)
    return value


def _build(settings: dict[str, Any]) -> TrainingArguments:
    from transformers import TrainingArguments

    try:
        args = TrainingArguments(**settings)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"TrainingArguments: {error}") from error
    if args.n_gpu > 1:
        # transformers would wrap the model in nn.DataParallel, which copies it at every step.
        say(f"{args.n_gpu} GPUs are visible and one is used; start with torchrun to use all")
        args._n_gpu = 1
    return args
