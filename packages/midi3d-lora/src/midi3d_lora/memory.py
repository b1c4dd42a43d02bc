"""What a training run takes of memory and disk, and what makes it take less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from lora_core.report import say
from midi3d_lora import data, lora, model
from midi3d_lora.config import Config

if TYPE_CHECKING:
    from lora_core.training.loss import Loss
    from lora_core.training.out_of_memory import Advice
    from midi3d_lora.transformer.dit import TripoSGDiTModel

LISTED = 4  # names of scenes in a message
ROW_BYTES = 1000  # a line in the CSV and the same figures for TensorBoard
NUMBER = 4  # bytes


def advice(cfg: Config, net: TripoSGDiTModel | None = None) -> Advice:
    """What to do when memory runs out with this configuration.

    Args:
        net: adapted; None: without advice on the number of blocks.
    """
    from lora_core.training.out_of_memory import Advice

    remedies = []
    if not cfg.gradient_checkpointing:
        remedies.append("--gradient_checkpointing (slower; 0.6 GB per instance instead of 3.5)")
    if cfg.batch_size > 1 and not cfg.auto_batch:
        remedies.append("--auto_batch (smaller batches, as many more accumulation steps)")
    if cfg.cache == "off":
        remedies.append("--cache on (the encoders are not in memory)")
    if net is not None and cfg.lora_last_blocks is None and not cfg.adapter:
        remedies += lora.stack(net).remedies(net)
    if cfg.max_instances > 1:
        remedies.append(f"--max_instances {max(1, cfg.max_instances // 2)}")
    if cfg.mixed_precision == "no" and cfg.device != "cpu":
        remedies.append("--mixed_precision bf16")
    return Advice(remedies or ["a larger device"], describe)


def describe(batch: dict[str, Any]) -> str:
    """How many instances of which scenes."""
    names = batch["keys"]
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return f"{len(batch['instance_groups'])} instances of {len(names)} scenes: {shown}"


def largest_batch(
    cfg: Config, splits: data.Splits, net: TripoSGDiTModel
) -> Callable[[int], dict[str, Any]]:
    """Number of scenes -> a batch of those with most instances, without their contents."""
    rows = [min(scene.rows, cfg.max_instances) for scene in splits.train]
    return partial(_largest, rows, model.row_shapes(cfg, net))


def _largest(rows: list[int], shapes: dict[str, tuple[int, ...]], scenes: int) -> dict[str, Any]:
    return data.largest_batch(rows, scenes, shapes)


def fitted(
    net: TripoSGDiTModel,
    loss: Loss,
    make: Callable[[int], dict[str, Any]],
    cfg: Config,
    precision: str,
) -> Config:
    """Try the largest batch before the run begins; with `--auto_batch` take one that fits.

    Args:
        make: see `largest_batch`. precision: fp32, bf16 or fp16.

    Raises:
        ConfigError: memory runs out.
    """
    from lora_core.training.out_of_memory import fit_batch

    batch_size, accumulation = fit_batch(
        net,
        loss,
        make,
        cfg.batch_size,
        cfg.gradient_accumulation_steps,
        precision=precision,
        auto=cfg.auto_batch and not cfg.resume,
        advice=advice(cfg, net),
    )
    return replace(cfg, batch_size=batch_size, gradient_accumulation_steps=accumulation)


def disk_use(
    net: TripoSGDiTModel, cfg: Config, updates: int, validated: bool, cached: int = 0
) -> dict[str, int]:
    """Bytes that a run writes, by kind, when most is there.

    Args:
        updates: of one epoch. validated: whether there are validation scenes.
        cached: bytes of the encoder cache that are still to be written.
    """
    from lora_core.disk import checkpoint_bytes
    from lora_core.memory import adapter_bytes

    epochs = cfg.num_epochs // cfg.save_every_n_epochs
    rows = updates * cfg.num_epochs // cfg.log_steps
    rows += validated * (cfg.num_epochs // cfg.eval_every_n_epochs + 1)
    return {
        # Those of the epoch files, the last ones, that of the best, and the one being written.
        "training checkpoints": (epochs + cfg.keep_last + 2) * checkpoint_bytes(net),
        # One per epoch file, lora-best, lora-final, adapter, and the one being written.
        "adapters": (epochs + 4) * adapter_bytes(net),
        "encoder cache": cached,
        "figures": rows * ROW_BYTES,
    }


def cache_bytes(cfg: Config, splits: data.Splits, net: TripoSGDiTModel, number: int) -> int:
    """Bytes of all encodings of a run's scenes.

    Args:
        number: bytes of a number of the picture embeddings.
    """
    if cfg.cache == "off":
        return 0
    shapes = model.row_shapes(cfg, net)
    pictures = number * (prod(shapes["image_embeds_1"]) + prod(shapes["image_embeds_2"]))
    latents = 2 * NUMBER * prod(shapes["mean"])
    train, val = (sum(s.rows for s in scenes) for scenes in (splits.train, splits.val))
    return (train + val) * pictures + (train * cfg.surface_draws + val) * latents


def check_cache(cfg: Config, splits: data.Splits, net: TripoSGDiTModel, number: int) -> None:
    """Insist on room for the encodings; say so if the cache may not hold them all.

    Args:
        number: see `cache_bytes`.

    Raises:
        ConfigError: the disk is too full.
    """
    from lora_core.disk import check_space, folder_bytes
    from lora_core.memory import size

    if cfg.cache == "off":
        return
    needed, most, folder = (
        cache_bytes(cfg, splits, net, number),
        cfg.cache_gb * 1e9,
        cfg.cache_place,
    )
    if needed > most:
        say(
            f"note: the encodings of all scenes take {size(needed)}, --cache_gb allows "
            f"{size(most)}: what does not fit is computed again in every epoch, slower"
        )
    check_space({"encoder cache": min(needed, int(most))}, folder, folder_bytes(folder))
