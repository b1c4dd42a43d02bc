"""What a training run takes of memory and disk, and what makes it take less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scenesplat_lora.config import Config

if TYPE_CHECKING:
    from lora_core.training.loss import Loss
    from lora_core.training.out_of_memory import Advice
    from scenesplat_lora.model import Network

LISTED = 4  # names of scenes in a message
ROW_BYTES = 1000  # a line in the CSV and the same figures for TensorBoard


def advice(cfg: Config, net: Network | None = None) -> Advice:
    """What to do when memory runs out with this configuration.

    Args:
        net: adapted; None: without advice on the number of blocks.
    """
    from lora_core.training.out_of_memory import Advice
    from scenesplat_lora import lora

    remedies = []
    if cfg.batch_size > 1 and not cfg.auto_batch:
        remedies.append("--auto_batch (smaller batches, as many more accumulation steps)")
    if net is not None and cfg.lora.last_blocks is None and not cfg.adapter:
        remedies += lora.stack(net).remedies(net)
    if not cfg.data.train.transform:
        remedies.append(f"--data.point_max {cfg.data.point_max // 2} (smaller parts of scenes)")
    if not cfg.enable_amp and cfg.device != "cpu":
        remedies.append("--enable_amp true")
    remedies.append("chunks of the scenes, as the data preparation cuts them")
    return Advice(remedies, describe)


def describe(batch: dict[str, Any]) -> str:
    """How many voxels of which scenes."""
    names = batch["keys"]
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return f"{len(batch['feat']):,} voxels of {shown}"


def fitted(
    net: Network, loss: Loss, make: Callable[[int], dict[str, Any]], cfg: Config, precision: str
) -> Config:
    """Try the largest batch before the run begins; with `--auto_batch` take one that fits.

    Args:
        make: number of scenes -> a batch of the largest. precision: fp32, bf16 or fp16.

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


def disk_use(net: Network, cfg: Config, updates: int, validated: bool) -> dict[str, int]:
    """Bytes that a run writes, by kind, when most is there.

    Args:
        updates: of one epoch. validated: whether there are validation scenes.
    """
    from lora_core.disk import checkpoint_bytes
    from lora_core.memory import adapter_bytes

    plan = cfg.lora_training
    epochs = cfg.epoch // plan.save_epoch
    rows = updates * cfg.epoch // cfg.log_steps + validated * (cfg.epoch // plan.eval_epoch + 1)
    whole = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    return {
        # Those of the epoch files, the last ones, that of the best, and the one being written.
        "training checkpoints": (epochs + cfg.keep_last + 2) * checkpoint_bytes(net),
        # One per epoch file, lora_best.pth, adapter/, and the one being written.
        "adapters": (epochs + 3) * adapter_bytes(net),
        "merged model": plan.merges * whole,
        "figures": rows * ROW_BYTES,
    }
