"""What a training run takes of memory and disk, and what makes it take less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sam3_lora import data, placement
from sam3_lora.config import PATCH, Config
from sam3_lora.queries import absent, usable
from sam3_lora.records import Record

if TYPE_CHECKING:
    from transformers import Sam3Model

    from lora_core.training.loss import Loss
    from lora_core.training.out_of_memory import Advice
    from sam3_lora.tokenizer import Tokenizer

LISTED = 4  # names of pictures in a message
# A query keeps the activations of the DETR encoder over the whole picture, an object its mask.
OBJECTS_PER_QUERY = 200
ROW_BYTES = 1000  # a line in the CSV and the same figures for TensorBoard
SHEETS, SHEET_BYTES = 4, 2_000_000  # pictures for TensorBoard at each validation
USUAL_POINTS = 12544  # of each mask, as in PointRend
SMALLEST = 336  # pixels: below, a smaller picture is no advice


# -- the largest batch -----------------------------------------------------------------------------


def query_counts(record: Record, train_set: data.TrainSet) -> tuple[int, int]:
    """Queries and objects that a training picture has at most, in any epoch."""
    settings = train_set.cfg.dataset
    objects = Counter(entry.phrase for entry in record.entries if not entry.crowd)
    present = usable(objects, settings.max_ann_per_img)
    negatives = min(settings.max_negatives, len(absent(record, train_set.phrases)))
    return len(present) + negatives, sum(objects[phrase] for phrase in present)


def largest(train_set: data.TrainSet, count: int) -> list[int]:
    """Numbers of the `count` samples with the most queries and objects, in their order.

    All pictures are brought to one size, so these are what samples differ in.
    """

    def cost(number: int) -> float:
        queries, objects = query_counts(train_set.records[number], train_set)
        return queries + objects / OBJECTS_PER_QUERY

    order = sorted(range(len(train_set)), key=lambda number: -cost(number))
    return sorted(order[:count])


def largest_batch(train_set: data.TrainSet, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """A batch of the `count` largest samples; with fewer than that, some come twice."""
    numbers = largest(train_set, count)
    return data.collate([train_set[numbers[k % len(numbers)]] for k in range(count)], tokenizer)


# -- when memory runs out --------------------------------------------------------------------------


def advice(cfg: Config, network: Sam3Model | None = None) -> Advice:
    """What to do when memory runs out with this configuration, and with this adapted network."""
    from lora_core.training.out_of_memory import Advice

    return Advice(remedies(cfg, network), partial(describe, cfg=cfg))


def describe(batch: dict[str, Any], cfg: Config) -> str:
    """How many pictures of which size with how many queries and objects, and their names."""
    names: Sequence[str] = batch["pictures"]
    height, width = cfg.dataset.size
    queries, objects = len(batch["keys"]), len(batch["targets"]["boxes"])
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    size = f"{_counted(len(names), 'picture')} of {height}x{width}"
    what = f"{queries} {'query' if queries == 1 else 'queries'} and {_counted(objects, 'object')}"
    return f"{size} with {what}: {shown}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def remedies(cfg: Config, network: Sam3Model | None = None) -> list[str]:
    """Flags that make a step smaller, the best first; only ones that are not in use.

    First what costs time alone, then what changes the training, last what the network sees.

    Args:
        network: adapted; None: without advice on the number of layers.
    """
    training, dataset = cfg.training, cfg.dataset
    found = []
    if not training.gradient_checkpointing:
        found.append("--training.gradient_checkpointing")
    if training.batch_size > 1 and not cfg.auto_batch:
        found.append("--auto_batch (smaller batches, as many more accumulation steps)")
    if training.enable_segmentation and not training.mask_points:
        found.append(f"--training.mask_points {USUAL_POINTS}")
    if dataset.max_negatives > 1:
        found.append(f"--dataset.max_negatives {dataset.max_negatives // 2}")
    if training.o2m_weight:
        found.append("--training.o2m_weight 0")
    if network is not None and cfg.lora.last_blocks is None and not cfg.adapter:
        found += placement.stack(network).remedies(network)
    if "vision_encoder" in cfg.lora.components(training.enable_segmentation):
        found.append("--lora.apply_to_vision_encoder false (the image encoder then keeps nothing)")
    if min(dataset.size) > SMALLEST:
        found.append(f"--dataset.resolution {'x'.join(map(str, smaller(dataset.size)))}")
    return found


def smaller(size: tuple[int, int]) -> list[int]:
    """About two thirds of both sides, in multiples of 336 (whole windows) where these fit."""
    unit = SMALLEST if all(side % SMALLEST == 0 for side in size) else PATCH
    return list(dict.fromkeys(max(unit, side * 2 // 3 // unit * unit) for side in size))


def fitted(
    network: Sam3Model,
    loss: Loss,
    make: Callable[[int], dict[str, Any]],
    cfg: Config,
    precision: str,
) -> Config:
    """Try the largest batch before the run begins; with `--auto_batch` take one that fits.

    A resumed run keeps its batch.

    Args:
        make: number of pictures -> `largest_batch`.
        precision: fp32, bf16 or fp16.

    Raises:
        ConfigError: memory runs out.
    """
    from lora_core.training.out_of_memory import fit_batch

    batch_size, accumulation = fit_batch(
        network,
        loss,
        make,
        cfg.training.batch_size,
        cfg.training.gradient_accumulation_steps,
        precision=precision,
        auto=cfg.auto_batch and not cfg.resume,
        advice=advice(cfg, network),
        settings=("training.batch_size", "training.gradient_accumulation_steps"),
    )
    training = replace(
        cfg.training, batch_size=batch_size, gradient_accumulation_steps=accumulation
    )
    return replace(cfg, training=training)


# -- disk ------------------------------------------------------------------------------------------


def disk_use(network: Sam3Model, cfg: Config, updates: int, validated: bool) -> dict[str, int]:
    """Bytes that a run writes, by kind, when most is there.

    Args:
        updates: of one epoch. validated: whether there is validation data.
    """
    from lora_core.disk import checkpoint_bytes
    from lora_core.memory import adapter_bytes

    training = cfg.training
    epochs = training.max_epochs // cfg.checkpoint.save_freq
    validations = validated * (-(-training.max_epochs // training.val_epoch_freq) + 1)
    rows = updates * training.max_epochs // cfg.logging.log_steps + validations
    shown = cfg.tensorboard and find_spec("tensorboard") is not None
    return {
        # Those of the epoch files, the last ones, that of the best, and the one being written.
        "training checkpoints": (epochs + cfg.keep_last + 2) * checkpoint_bytes(network),
        # One per epoch file, best.pt, adapter/, and the one being written.
        "adapters": (epochs + 3) * adapter_bytes(network),
        "figures": rows * ROW_BYTES,
        "pictures for TensorBoard": shown * validations * SHEETS * SHEET_BYTES,
    }
