"""What a training run takes of memory and disk, and what makes it take less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from isaac_lora.config import Config
from lora_core.report import plural

if TYPE_CHECKING:
    from isaac_lora.examples import Row
    from isaac_lora.network.isaac import IsaacForConditionalGeneration
    from isaac_lora.processing import IsaacProcessor
    from lora_core.training.loss import Loss
    from lora_core.training.out_of_memory import Advice

LISTED = 4  # names of conversations in a message
ROW_BYTES = 1000  # a line in the CSV and the same figures for TensorBoard
PICTURE_BYTES = 1_000_000  # of pictures with answers in TensorBoard, each validation


def advice(cfg: Config, net: IsaacForConditionalGeneration | None = None) -> Advice:
    """What to do when memory runs out with this configuration.

    Args:
        net: adapted; None: without advice on the number of layers.
    """
    from isaac_lora import lora
    from lora_core.training.out_of_memory import Advice

    remedies = []
    if not cfg.gradient_checkpointing:
        remedies.append("--gradient_checkpointing True (slower)")
    if cfg.per_device_train_batch_size > 1 and not cfg.auto_batch:
        remedies.append("--auto_batch (smaller batches, as many more accumulation steps)")
    if net is not None and cfg.last_blocks is None and not cfg.adapter:
        remedies += lora.stack(net).remedies(net)
    remedies.append(
        "a smaller --max_seq_length, with --on_bad_sample skip or --cut_long_samples True for "
        "what is longer; tokens of images count"
    )
    if cfg.precision == "fp32" and cfg.device != "cpu":
        remedies.append("--bf16 True")
    return Advice(remedies, describe)


def describe(batch: dict[str, Any]) -> str:
    """How many tokens and pictures of which conversations."""
    names, tokens = batch["keys"], tuple(batch["input_ids"].shape)
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    pictures = plural(len(batch.get("grids", ())), "picture")
    return f"{tokens[0]} x {tokens[1]} tokens, {pictures}, of {shown}"


# -- the largest batch -----------------------------------------------------------------------------


def largest_batch(
    cfg: Config, rows: Sequence[Row], processor: IsaacProcessor
) -> Callable[[int], dict[str, Any]]:
    """Number of rows -> a batch of the longest, without the contents of their pictures.

    The tower gets all pictures at once, in a training one by one; both is over when the decoder,
    which takes far more, begins.

    Args:
        rows: as `data.training_rows` gives them.
    """
    return partial(_largest, cfg, rows, processor)


def _largest(
    cfg: Config, rows: Sequence[Row], processor: IsaacProcessor, count: int
) -> dict[str, Any]:
    import torch

    from isaac_lora import data

    batch = data.largest_batch(rows, count, processor, cfg.packing)
    if cfg.use_depth and "grids" in batch:
        tokens = batch["grids"].prod(1) // processor.rules.pixel_shuffle_scale**2
        batch["depth_parts"] = [torch.zeros(int(number)) for number in tokens]
    return batch


def fitted(
    net: IsaacForConditionalGeneration,
    loss: Loss,
    make: Callable[[int], dict[str, Any]],
    cfg: Config,
    number_format: str,
) -> Config:
    """Try the largest batch before the run begins; with `--auto_batch` take one that fits.

    Args:
        make: see `largest_batch`. number_format: fp32, bf16 or fp16.

    Raises:
        ConfigError: memory runs out.
    """
    from lora_core.training.out_of_memory import fit_batch

    batch_size, accumulation = fit_batch(
        net,
        loss,
        make,
        cfg.per_device_train_batch_size,
        cfg.gradient_accumulation_steps,
        precision=number_format,
        auto=cfg.auto_batch and not cfg.resume,
        advice=advice(cfg, net),
        settings=("per_device_train_batch_size", "gradient_accumulation_steps"),
    )
    return replace(
        cfg, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation
    )


# -- the disk --------------------------------------------------------------------------------------


def disk_use(
    net: IsaacForConditionalGeneration, cfg: Config, steps: int, validated: bool
) -> dict[str, int]:
    """Bytes that a run writes, by kind, when most is there; caches are counted where they are.

    Args:
        steps: optimizer updates of the whole run. validated: whether there is validation.
    """
    from lora_core.disk import checkpoint_bytes
    from lora_core.memory import adapter_bytes

    checks = validated * (steps // (cfg.eval_steps or cfg.save_steps) + 1)
    rows = steps // cfg.logging_steps + checks
    return {
        # The last ones, that of the best, and the one being written.
        "training checkpoints": (cfg.keep_last + 2) * checkpoint_bytes(net),
        # The one to use, and while it is replaced the next one.
        "adapters": 2 * adapter_bytes(net),
        "figures": rows * ROW_BYTES + (checks * PICTURE_BYTES if cfg.tensorboard else 0),
    }
