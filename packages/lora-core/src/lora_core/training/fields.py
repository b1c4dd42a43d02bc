"""Which fields of TrainingArguments, and which variables of `accelerate launch`, a run takes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal, get_origin, get_type_hints

import torch

from lora_core.errors import ConfigError, listing, near
from lora_core.settings import types as config_types

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
    "dataloader_persistent_workers": "workers always live through all epochs",
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
    "save_total_limit": "the command has its own setting for it, --keep_last",
    "save_strategy": "checkpoints are written every save_steps, at a new best, and at the end",
    "eval_strategy": "evaluation runs before training, every so many steps, and at the end",
    "eval_on_start": "the evaluation before training is always done",
}
REFUSED = {
    "auto_find_batch_size": "a smaller batch chosen in silence is another experiment",
    "batch_eval_metrics": "evaluation is the package's",
    "compute_loss_func": "the loss is the package's",
    "data_seed": "the order of the data follows the seed",
    "ddp_backend": "it is nccl on CUDA and gloo on the CPU",
    "deepspeed": "ZeRO-3 empties the weights that adapters read, and stages 1 and 2 save little of "
    "an adapter's few parameters: use torchrun, with --shard_base true for a large base",
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
    "fsdp": "start with torchrun and --shard_base true: adapters stay whole",
    "fsdp_config": "start with torchrun and --shard_base true: adapters stay whole",
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
# Variables by which `accelerate launch` would change a run -> what to do instead.
LAUNCHER = {
    "ACCELERATE_MIXED_PRECISION": "the command's precision setting decides; start with "
    "--mixed_precision no, or with torchrun",
    "ACCELERATE_DYNAMO_BACKEND": "set torch_compile for the run, and start with "
    "--dynamo_backend no, or with torchrun",
    "ACCELERATE_USE_CPU": "the command's device setting decides; use it instead",
    "ACCELERATE_USE_DEEPSPEED": REFUSED["deepspeed"],
    "ACCELERATE_USE_FSDP": REFUSED["fsdp"],
    "ACCELERATE_USE_MEGATRON_LM": "it is for language models",
    "ACCELERATE_USE_PARALLELISM_CONFIG": REFUSED["parallelism_config"],
}


def check_extra(
    extra: Mapping[str, Any],
    device: torch.device,
    metrics: Sequence[str] = (),
    section: str = "trainer.",
) -> dict[str, Any]:
    """Check the names and types of `--trainer.NAME value`, and give the values in their types.

    Args:
        metrics: names of what the package measures, the first of which the best follows.
        section: what stands before the names on the command line, for messages.

    Raises:
        ConfigError: all of them that are unknown, set elsewhere, or cannot work on this device.
    """
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    names = TrainingArguments.__dataclass_fields__
    allowed = [name for name in names if name not in SET_BY_US and name not in REFUSED]
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in extra.items():
        place = f"--{section}{name}"
        if name in SET_BY_US or name in REFUSED:
            measured = f" ({', '.join(metrics)})" if "first metric" in REFUSED.get(name, "") else ""
            why = f"{(SET_BY_US | REFUSED)[name]}{measured if metrics else ''}"
            problems.append(f"{place} cannot be set: {why}")
        elif name not in names:
            problems.append(f"unknown {place}; {near(name, allowed) or 'see TrainingArguments'}")
        elif name == "tf32" and value is True and device.type == "cpu":
            problems.append(f"{place} is for NVIDIA GPUs since Ampere, not for cpu: leave it out")
        elif name == "run_name" and re.search(r"[/\\\\\0]|\.\.", str(value)):
            problems.append(f"{place} {config_types.shown(value)}: a name, without / \\ and ..")
        elif name == "report_to":
            problems += _missing_reporters(value, place)
            checked[name] = value
        elif name in ("ddp_timeout", "save_steps") and isinstance(value, int) and value < 1:
            problems.append(f"{place} is {value}: it must be at least 1")
        elif name == "lr_scheduler_type" and value in ("reduce_lr_on_plateau", "greedy"):
            problems.append(f"{place} {value}: a resumed run could not continue it exactly")
        else:
            try:
                checked[name] = _typed(hints[name], value, place, _choices(name))
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(listing(problems))
    if "optim" in checked:
        from lora_core.training.optimizer import optimizer_of

        given = {name: checked[name] for name in checked if name.startswith("optim")}
        probe = {"output_dir": "nowhere", "use_cpu": True, "report_to": "none", **given}
        try:
            optimizer_of(TrainingArguments(**probe))
        except ConfigError as error:
            raise ConfigError(f"--{section}{error}") from error
    return checked


def check_environment(device: torch.device, precision: str, compiled: bool = False) -> None:
    """Refuse what `accelerate launch` hands over beside the command, where nobody sees it.

    Args:
        precision: fp32, bf16 or fp16; auto: it is not known yet.
        compiled: the run's own settings ask for torch.compile, which sets a variable, too.

    Raises:
        ConfigError: a variable that would change the run, and what to do instead.
    """
    problems = []
    for name, reason in LAUNCHER.items():
        value = os.environ.get(name, "no").lower()
        harmless = value in ("no", "0", "false", "f", "n", "off", "")
        if name == "ACCELERATE_MIXED_PRECISION":
            harmless |= precision in ("auto", value)
        elif name == "ACCELERATE_DYNAMO_BACKEND":
            harmless |= compiled
        elif name == "ACCELERATE_USE_CPU":
            harmless |= device.type == "cpu"
        if not harmless:
            problems.append(f"{name}={value} is set, as accelerate launch does: {reason}")
    if problems:
        raise ConfigError(listing(problems))


def _typed(hint: Any, value: Any, place: str, choices: Sequence[str]) -> Any:
    """Check a value where its type is a plain one: the dataclass itself checks nothing."""
    plain = {bool, int, float, str, type(None)}
    kinds = config_types.kinds(hint)
    names = choices or [
        str(item.value)
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, Enum)
        for item in kind
    ]
    if names and value not in names:
        hint = near(value, names) or f"expected one of {', '.join(names[:8])}, ..."
        raise ConfigError(f"{place}: unknown {config_types.shown(value)}; {hint}")
    if all(kind in plain or get_origin(kind) in (list, Literal) for kind in kinds):
        return config_types.accept(hint, value, place)
    return value


def _choices(name: str) -> list[str]:
    """The values of those fields that are text to the dataclass, and a choice to what reads it."""
    if name in ("log_level", "log_level_replica"):
        from transformers.training_args import trainer_log_levels

        return list(trainer_log_levels)
    if name == "torch_compile_backend":
        from accelerate.utils import DynamoBackend

        return [backend.value.lower() for backend in DynamoBackend]
    return []


def _missing_reporters(value: Any, place: str) -> list[str]:
    """What is wrong with the tools that the figures are to be reported to."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    here = get_available_reporting_integrations()
    problems = []
    for name in [value] if not isinstance(value, list) else value:
        if name not in INTEGRATION_TO_CALLBACK and name not in ("none", "all"):
            hint = near(name, INTEGRATION_TO_CALLBACK) or "try tensorboard, or leave it out"
            problems.append(f"{place}: unknown tool {config_types.shown(name)}; {hint}")
        elif name in INTEGRATION_TO_CALLBACK and name not in here:
            problems.append(f"{place} {name}: it is not installed; pip install {name}")
    return problems
