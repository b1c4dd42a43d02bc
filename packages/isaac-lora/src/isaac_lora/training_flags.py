"""What `isaac-lora train` does with the fields of transformers' `TrainingArguments`: three lists.

- Supported: fields of `Config`. Those that are only handed on are here, in `TrainingFlags`; their
  names, types and defaults are those of the class.
- Set by this program (`SET_BY_US`), and
- refused (`REFUSED`), each with the reason. The value that holds anyway is taken in silence, so
  that the settings of an existing script still work.

All is written out here, so that `--help` does not wait for transformers; a test compares it with
the installed class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lora_core.config import option

_GROUP = "TrainingArguments"
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class Fixed(NamedTuple):
    """A field that cannot be chosen.

    Attributes:
        why: for the message.
        holds: values that hold anyway.
    """

    why: str
    holds: tuple[Any, ...]


@dataclass(kw_only=True)
class TrainingFlags:
    """Fields of `TrainingArguments` that are handed on as they are."""

    lr_scheduler_kwargs: dict[str, Any] | None = option(None, "More of the schedule.", _GROUP)
    optim: str = option(
        "adamw_torch_fused", "Optimizer of the adapters, as transformers names them.", _GROUP
    )
    optim_args: str | None = option(None, "More of the optimizer, as a=1,b=2.", _GROUP)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient.", _GROUP)
    adam_beta2: float = option(0.999, "AdamW's decay of the mean squared gradient.", _GROUP)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", _GROUP)
    tf32: bool | None = option(None, "TF32 in fp32 products on NVIDIA GPUs since Ampere.", _GROUP)
    torch_compile: bool = option(False, "Compile the model with torch.compile.", _GROUP)
    torch_compile_backend: str | None = option(None, "Of torch.compile.", _GROUP)
    torch_compile_mode: str | None = option(None, "Of torch.compile.", _GROUP)
    torch_empty_cache_steps: int | None = option(
        None, "Give unused GPU memory back every so many updates; slower.", _GROUP
    )
    logging_first_step: bool = option(False, "Log the first update, too.", _GROUP)
    log_level: str = option("passive", "Of transformers' own messages.", _GROUP)
    log_level_replica: str = option("warning", "The same in the other processes.", _GROUP)
    run_name: str | None = option(None, "What --report_to calls this run.", _GROUP)
    project: str = option("huggingface", "Project of --report_to trackio.", _GROUP)
    trackio_space_id: str | None = option(None, "Space of --report_to trackio.", _GROUP)
    trackio_bucket_id: str | None = option(None, "Bucket of --report_to trackio.", _GROUP)
    trackio_static_space_id: str | None = option(
        None, "Static Space of --report_to trackio.", _GROUP
    )
    full_determinism: bool = option(
        False, "The same bits on the same GPU each time; slower.", _GROUP
    )
    dataloader_drop_last: bool = option(False, "Leave out an incomplete last batch.", _GROUP)
    dataloader_pin_memory: bool = option(True, "Pinned memory for batches on their way.", _GROUP)
    dataloader_prefetch_factor: int | None = option(None, "Batches ahead per worker.", _GROUP)
    dataloader_multiprocessing_context: str | None = option(
        None, "How workers start: fork, spawn or forkserver.", _GROUP
    )
    ddp_find_unused_parameters: bool | None = option(
        None, "Of DistributedDataParallel; not needed, also where batches lack images.", _GROUP
    )
    ddp_bucket_cap_mb: int | None = option(None, "Of DistributedDataParallel.", _GROUP)
    ddp_broadcast_buffers: bool | None = option(None, "Of DistributedDataParallel.", _GROUP)
    ddp_static_graph: bool | None = option(None, "Of DistributedDataParallel.", _GROUP)
    ddp_timeout: int = option(1800, "Seconds that a process waits for the others.", _GROUP)
    skip_memory_metrics: bool = option(True, "Do not measure memory with tracemalloc.", _GROUP)


_CHECKPOINTING = "adapters need the non-reentrant form"
SET_BY_US = {
    "activation_checkpointing_kwargs": Fixed(_CHECKPOINTING, (None, {"use_reentrant": False})),
    "average_tokens_across_devices": Fixed(
        "the loss is a mean over the label tokens of all processes", (True,)
    ),
    "dataloader_in_order": Fixed("a resumed run sees batches in the same order", (True,)),
    "dataloader_persistent_workers": Fixed("workers live through all epochs", (False, True)),
    "disable_tqdm": Fixed("the progress line is this program's own", (None, True)),
    "do_train": Fixed("this command trains; --dry_run only checks", (True,)),
    "eval_on_start": Fixed(
        "where there is validation data, it is evaluated before training, too", (True,)
    ),
    "eval_strategy": Fixed(
        "validation data is evaluated every eval_steps and at the end; without --val_data_path "
        "and --val_fraction there is none",
        ("steps",),
    ),
    "gradient_checkpointing_kwargs": Fixed(_CHECKPOINTING, (None, {"use_reentrant": False})),
    "greater_is_better": Fixed("it follows from the metric", (None,)),
    "load_best_model_at_end": Fixed("the best adapter is what lies in output_dir then", (True,)),
    "local_rank": Fixed("torchrun sets it in the environment", (-1,)),
    "log_on_each_node": Fixed("the first process writes the log", (True,)),
    "logging_nan_inf_filter": Fixed("a loss that is not finite stops the run", (False,)),
    "logging_strategy": Fixed("figures are logged every logging_steps", ("steps",)),
    "metric_for_best_model": Fixed("the best follows the first metric of the log", (None,)),
    "remove_unused_columns": Fixed("batches are passed on as they are made", (False,)),
    "save_strategy": Fixed(
        "checkpoints are written every save_steps, at a new best, and at the end", ("steps",)
    ),
    "use_cache": Fixed("keys and values of a training step serve nobody afterwards", (False,)),
}

_UPLOAD = Fixed("nothing is uploaded", (None, False))
_EVALUATION = "evaluation is this program's own"
_KERNELS = "the loss is computed at label places only, and adapted layers have kernels of their own"
_SHARDED = "start with torchrun and --shard_base true: adapters stay whole"
REFUSED = {
    "accelerator_config": Fixed("how batches are divided among processes is settled here", (None,)),
    "auto_find_batch_size": Fixed(
        "a smaller batch chosen in silence is another experiment; see --auto_batch", (False,)
    ),
    "batch_eval_metrics": Fixed(_EVALUATION, (False,)),
    "bf16_full_eval": Fixed("evaluation runs in the precision of training", (False,)),
    "data_seed": Fixed("the order of the data follows --seed", (None,)),
    "ddp_backend": Fixed("it is nccl on CUDA and gloo on the CPU", (None,)),
    "debug": Fixed(
        "values that are not finite stop the run by themselves; --debug alone keeps the traceback "
        "of an error",
        ("", []),
    ),
    "deepspeed": Fixed(f"its optimizer does not know adapters; {_SHARDED}", (None,)),
    "do_eval": Fixed("it has no effect; validation data is named by --val_data_path", (False,)),
    "do_predict": Fixed("it has no effect; see isaac-lora predict", (False,)),
    "enable_jit_checkpoint": Fixed("a signal always ends with a whole checkpoint", (False,)),
    "eval_accumulation_steps": Fixed(_EVALUATION, (None,)),
    "eval_delay": Fixed("evaluation runs every eval_steps", (0,)),
    "eval_do_concat_batches": Fixed(_EVALUATION, (True,)),
    "eval_use_gather_object": Fixed(_EVALUATION, (False,)),
    "fp16_full_eval": Fixed("evaluation runs in the precision of training", (False,)),
    "fsdp": Fixed(_SHARDED, (None, "", False)),
    "fsdp_config": Fixed(_SHARDED, (None,)),
    "hub_always_push": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_strategy": Fixed("nothing is uploaded", ("every_save",)),
    "hub_token": Fixed("nothing is uploaded, and secrets do not belong into settings", (None,)),
    "ignore_data_skip": Fixed("a resumed run would see the same samples again", (False,)),
    "include_for_metrics": Fixed(_EVALUATION, ([],)),
    "include_num_input_tokens_seen": Fixed("it would count padding", ("no", False)),
    "label_names": Fixed("the loss is this program's own", (None,)),
    "label_smoothing_factor": Fixed("the loss is the cross entropy of label tokens", (0.0,)),
    "length_column_name": Fixed("lengths are known from the conversations", ("length",)),
    "liger_kernel_config": Fixed(_KERNELS, (None,)),
    "neftune_noise_alpha": Fixed("its noise would fall on the places of images, too", (None,)),
    "optim_target_modules": Fixed("adapters are what is trained", (None,)),
    "parallelism_config": Fixed("checkpoints need whole parameters", (None,)),
    "prediction_loss_only": Fixed(_EVALUATION, (False,)),
    "push_to_hub": _UPLOAD,
    "restore_callback_states_from_checkpoint": Fixed(
        "a resumed run restores all of its state", (False,)
    ),
    "save_on_each_node": Fixed("checkpoints are written once", (False,)),
    "save_only_model": Fixed("resuming needs the optimizer", (False,)),
    "use_liger_kernel": Fixed(_KERNELS, (False,)),
}

# Fields that transformers had in earlier releases, as scripts still have them.
EARLIER = {
    "dispatch_batches": REFUSED["accelerator_config"],
    "fp16_backend": Fixed("there is one way to compute in fp16", ("auto",)),
    "fp16_opt_level": Fixed("apex is not used", ("O1",)),
    "half_precision_backend": Fixed("there is one way to compute in fp16", ("auto",)),
    "include_inputs_for_metrics": Fixed(_EVALUATION, (False,)),
    "include_tokens_per_second": Fixed("the log has the speed", (False,)),
    "logging_dir": Fixed("TensorBoard's files lie in output_dir", (None,)),
    "overwrite_output_dir": Fixed("--overwrite replaces the run in output_dir", (False,)),
    "past_index": Fixed("it has no effect", (-1,)),
    "ray_scope": Fixed("there is no search of hyperparameters", ("last",)),
    "save_safetensors": Fixed("adapters are written as safetensors", (True,)),
    "split_batches": REFUSED["accelerator_config"],
    "tpu_num_cores": Fixed("there is no TPU code", (None,)),
    "use_ipex": Fixed("it is not used", (False,)),
    "use_mps_device": Fixed("CUDA and CPU are used", (False,)),
}
# A flag of the command line as such where no value follows, whatever is said of a field above.
BARE = "debug"
# Another name -> the one that it stands for.
ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "data_loader_num_workers": "dataloader_num_workers",
}
FIXED = SET_BY_US | REFUSED | EARLIER


def description() -> str:
    """What `--help` says first, and at its end about the fields that are no flags."""
    return (
        "Train a LoRA of Isaac on conversations about images.\n\n"
        "Of transformers' TrainingArguments this program sets by itself: "
        f"{', '.join(SET_BY_US)}. It refuses, and says why: {', '.join(REFUSED)}."
    )
