"""What a training run takes of memory and disk, and what makes it take less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_core.errors import one_line
from lora_core.report import plural
from sam2_lora import data, losses, placement
from sam2_lora.config import STRIDE, Config
from sam2_lora.survey import objects_of

if TYPE_CHECKING:
    from transformers import Sam2Model

    from lora_core.training.out_of_memory import Advice

LISTED = 4  # names of pictures in a message
ROW_BYTES = 1000  # a line in the CSV and the same figures for TensorBoard
SHEETS, SHEET_BYTES = 4, 2_000_000  # pictures for TensorBoard at each validation
SMALLEST = 256  # pixels: below, a smaller picture is no advice


def largest(train_set: data.TrainSet, count: int) -> list[int]:
    """Numbers of the `count` samples with the most objects, in their order.

    All pictures are brought to one size, so objects are what samples differ in.
    """
    cfg = train_set.cfg
    counts = train_set.counts or [len(objects_of(r, cfg).kept) for r in train_set.records]
    order = sorted(range(len(counts)), key=lambda number: -min(counts[number], cfg.max_objects))
    return sorted(order[:count])


def largest_batch(train_set: data.TrainSet, count: int) -> dict[str, Any]:
    """A batch of the `count` largest samples; clicks where there may be either, as they take more.

    With fewer samples than that, some come twice.
    """
    cfg = train_set.cfg
    numbers = largest(train_set, count)
    if cfg.prompts == "mixed":
        clicks = data.TrainSet(train_set.records, replace(cfg, prompts="point"), train_set.counts)
        clicks.frozen = train_set.frozen
        train_set = clicks
    return data.collate([train_set[numbers[k % len(numbers)]] for k in range(count)])


def advice(cfg: Config, network: Sam2Model | None = None) -> Advice:
    """What to do when memory runs out with this configuration, and with this adapted network."""
    from lora_core.training.out_of_memory import Advice

    return Advice(remedies(cfg, network), lambda batch: describe(batch, cfg))


def describe(batch: dict[str, Any], cfg: Config) -> str:
    """How many pictures of which size with how many objects a batch holds, and their names."""
    keys: Sequence[str] = batch["keys"]
    height, width = cfg.size
    objects = sum(len(bucket["targets"]) for bucket in batch["buckets"])
    names = ", ".join(map(one_line, keys[:LISTED])) + (", ..." if len(keys) > LISTED else "")
    pictures = f"{plural(len(keys), 'picture')} of {height}x{width}"
    return f"{pictures} with {plural(objects, 'object')}: {names}"


def remedies(cfg: Config, network: Sam2Model | None = None) -> list[str]:
    """Flags that make a step smaller, those first that cost least; only ones not in use.

    Args:
        network: adapted; None: without advice on the number of blocks.
    """
    found = []
    if not cfg.gradient_checkpointing and not cfg.cache_dir:
        found.append("--gradient_checkpointing")
    if network is not None and cfg.last_blocks is None and not cfg.adapter:
        found += placement.stack(network).remedies(network)
    if not cfg.decoder_only:
        found.append("--targets decoder (the encoder then keeps nothing)")
    if min(cfg.size) > SMALLEST:
        smaller = [max(STRIDE, round(0.75 * side / STRIDE) * STRIDE) for side in cfg.size]
        found.append(f"--image_size {'x'.join(map(str, dict.fromkeys(smaller)))}")
    if cfg.max_objects > 1:
        found.append(f"--max_objects {cfg.max_objects // 2}")
    if cfg.correction_clicks:
        found.append("--correction_clicks 0")
    if cfg.batch_size > 1:
        found.append("--auto_batch (smaller batches, as many more accumulation steps)")
    return found


def fitted(network: Sam2Model, train_set: data.TrainSet, cfg: Config) -> Config:
    """Try the largest batch before the run begins; with `--auto_batch` take one that fits.

    A resumed run keeps its batch.

    Raises:
        ConfigError: memory runs out.
    """
    from lora_core.training.arguments import choose_precision
    from lora_core.training.out_of_memory import fit_batch

    batch_size, accumulation = fit_batch(
        network,
        lambda net, batch: losses.loss(net, batch, cfg),
        lambda count: largest_batch(train_set, count),
        cfg.batch_size,
        cfg.gradient_accumulation_steps,
        precision=choose_precision(cfg.precision, next(network.parameters()).device),
        auto=cfg.auto_batch and not cfg.resume,
        advice=advice(cfg, network),
    )
    return replace(cfg, batch_size=batch_size, gradient_accumulation_steps=accumulation)


def disk_use(network: Sam2Model, cfg: Config) -> dict[str, int]:
    """Bytes that a run writes below `--output_dir`, by kind, when most is there."""
    from lora_core.disk import checkpoint_bytes, folder_bytes
    from lora_core.memory import adapter_bytes

    base = network.sam2_base.path
    merged = folder_bytes(base) if base.is_dir() else base.stat().st_size
    validations = -(-cfg.steps // cfg.eval_steps) + 1
    shown = cfg.tensorboard and find_spec("tensorboard") is not None
    return {
        # The last ones, those of the best adapters and of the best step, and the one being written.
        "training checkpoints": (cfg.keep_last + cfg.keep_best + 2) * checkpoint_bytes(network),
        "adapters": (cfg.keep_best + 3) * adapter_bytes(network),
        "merged models": (cfg.keep_best + 1) * merged,  # a new best before the worst is deleted
        "figures": (cfg.steps // cfg.log_steps + validations) * ROW_BYTES,
        "pictures for TensorBoard": shown * validations * SHEETS * SHEET_BYTES,
    }
