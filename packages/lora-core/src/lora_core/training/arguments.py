"""From a package's plain settings to transformers.TrainingArguments, device and precision."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lora_core import distributed
from lora_core.errors import ConfigError, listing
from lora_core.report import say
from lora_core.training.fields import check_environment, check_extra

if TYPE_CHECKING:
    from transformers import TrainingArguments

Precision = Literal["fp32", "bf16", "fp16"]


def choose_device(name: str = "auto") -> torch.device:
    """Give the device for `auto`, `cuda` or `cpu`.

    Raises:
        ConfigError: `cuda` where torch sees none.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "torch sees no CUDA device here"
        if torch.version.cuda is None and torch.version.hip is None:
            why = f"torch {torch.__version__} is a build without CUDA"
        elif hidden is not None:
            why = f"CUDA_VISIBLE_DEVICES is {hidden!r}, which leaves torch no device"
        if name == "cuda":
            raise ConfigError(f"device cuda: {why}; use auto or cpu")
        if hidden is not None:
            warnings.warn(f"{why}: running on the CPU", stacklevel=2)
        return torch.device("cpu")
    own, devices = distributed.local_rank(), torch.cuda.device_count()
    if own >= devices:
        raise ConfigError(
            f"more processes than GPUs: this is number {own + 1} of its machine, and torch sees "
            f"{devices}; start one process per GPU (--nproc-per-node {devices})"
        )
    return torch.device("cuda", own)


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
    section: str = "trainer.",
) -> TrainingArguments:
    """Build TrainingArguments from plain settings, and the rest from `--trainer.NAME value`.

    Args:
        steps, epochs: the length of the training, in optimizer updates or in passes; one of them.
        warmup_steps: updates of linear warm-up.
        eval_steps: updates between evaluations and, by default, checkpoints; None: at the end.
        trainer: further fields of TrainingArguments, by name.
        section: what stands before these names in messages.

    Raises:
        ConfigError: an unknown field, one that is set here, or one that cannot work, and why.
    """
    if (steps is None) == (epochs is None):
        raise ConfigError("give the length of the training as steps or as epochs")
    _check_numbers(
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_steps=log_steps,
        eval_steps=eval_steps,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
    )
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
        "warmup_steps": warmup_steps,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "logging_steps": log_steps,
        "eval_steps": eval_steps or end,
        "save_steps": eval_steps or end,
        "dataloader_num_workers": num_workers,
        "dataloader_pin_memory": device.type == "cuda",
        "bf16": chosen == "bf16",
        "fp16": chosen == "fp16",
        "use_cpu": device.type == "cpu",
        "optim": "adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        "lr_scheduler_type": "cosine",
        "ddp_timeout": distributed.TIMEOUT,
        "report_to": "none",
        "log_level": "error",
        "eval_strategy": "no",  # the trainer asks for evaluations itself
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    settings |= check_extra(trainer or {}, device, section=section)
    check_environment(device, chosen, bool(settings.get("torch_compile")))
    distributed.join(device, settings["ddp_timeout"])
    return _build(settings)


def _check_numbers(
    epochs: float | None, learning_rate: float, seed: int, **counts: int | None
) -> None:
    """Refuse numbers with which no run can be meant, for callers without a `Guards`."""
    problems = [
        f"{name} is {value}: it must be at least 1"
        for name, value in counts.items()
        if value is not None and value < 1
    ]
    if epochs is not None and not 0 < epochs < float("inf"):
        problems.append(f"epochs is {epochs}: it must be a finite number above 0")
    if not 0 < learning_rate < float("inf"):
        problems.append(f"learning_rate is {learning_rate}: it must be a finite number above 0")
    if not 0 <= seed < 2**32:
        problems.append(f"seed is {seed}: it must be 0 to {2**32 - 1}")
    if problems:
        raise ConfigError(listing(problems))
    if learning_rate > 0.1:
        warnings.warn(
            f"learning rate {learning_rate:g} is very high for adapters: 1e-4 to 1e-2 is usual",
            stacklevel=3,
        )


def check_device(
    device: str,
    precision: str,
    extra: Mapping[str, Any],
    metrics: Sequence[str] = (),
    dry_run: bool = False,
    section: str = "trainer.",
) -> None:
    """Check what a command asks of its device, before data and weights, and without waking a GPU.

    Args:
        device, precision: as for `choose_device` and `choose_precision`.
        extra, metrics, section: as for `check_extra`.
        dry_run: the device need not be there: the run itself may be done elsewhere.

    Raises:
        ConfigError: no such device, a precision that it does not compute in, or settings of the
            trainer or of `accelerate launch` that cannot work.
    """
    elsewhere = dry_run and device != "cpu"
    found = torch.device("cuda") if elsewhere else choose_device(device)
    chosen = choose_precision(precision, found) if found.type == "cpu" else precision
    check_environment(found, chosen, "torch_compile" in extra)
    check_extra(extra, found, metrics, section)


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
