"""From conversation files to training batches and to conversations for validation.

    splits = load(cfg, processor)          # looks at everything; str(splits) tells what there is
    train = TrainSet(training_rows(cfg, splits), processor, cfg.seed)
    batch = collate([train[0], train[1]], processor, cfg.packing)

A training sample is a function of its conversation alone, so that workers, resuming and the caches
of vision features and depth do not change it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from isaac_lora.batches import (
    OrderByLength,
    collate_packed,
    collate_padded,
    num_label_tokens,
)
from isaac_lora.conversations.records import Conversation
from isaac_lora.conversations.samples import Sample, with_pictures
from isaac_lora.data_survey import Facts, example_of, folder_of, read_parts, settled
from isaac_lora.examples import Example, Row, packed_rows, single_rows
from lora_core.errors import DataError
from lora_core.pictures.survey import digest_of, left_out
from lora_core.report import plural, table
from lora_core.settings.types import shown
from lora_core.training.loading import EpochDataset
from lora_core.validate import Bad, Share, read_and_settle, samples

if TYPE_CHECKING:
    from isaac_lora.config import Config
    from isaac_lora.depth.controls import DepthSource
    from isaac_lora.processing import IsaacProcessor
    from isaac_lora.vision_cache import VisionFeatures

__all__ = [
    "Example",
    "Row",
    "Splits",
    "TrainSet",
    "collate",
    "fingerprint",
    "largest_batch",
    "load",
    "num_label_tokens",
    "order_of",
    "read_parts",
    "training_rows",
    "updates_per_epoch",
]

NO_VALIDATION = "no conversations for validation: the last step is taken for the best"


# -- the conversations -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The conversations of a run. `str()` tells what they are, and what to be careful about."""

    train: list[Example]
    val: list[Example]
    notes: tuple[str, ...] = ()
    bad: tuple[Bad, ...] = ()  # what was left out, and why

    def __str__(self) -> str:
        head = ("split", "conversations", "images", "tokens", "of images", "learned", "longest")
        rows = [
            (
                name,
                len(part),
                sum(len(one.sizes) for one in part),
                sum(one.tokens for one in part),
                sum(one.image_tokens for one in part),
                sum(one.label_tokens for one in part),
                max(one.tokens for one in part),
            )
            for name, part in (("train", self.train), ("val", self.val))
            if part
        ]
        return "\n".join([table(head, rows), *(f"note: {note}" for note in self.notes)])


def load(cfg: Config, processor: IsaacProcessor, share: Share = lambda make: make()) -> Splits:
    """Read the conversations of a configuration, and look at each with all of its pictures.

    Bad ones stop this, or are left out, as `cfg.on_bad_sample` says.

    Args:
        share: calls its argument in the first process of the run and gives its value in all.

    Raises:
        DataError: no conversations, or faults in them: all of them together.
    """
    # Fast tokenizers warn in every worker that is forked after they have used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts, (found, bad) = read_and_settle(
        lambda: read_parts(cfg), lambda read: settled(read, cfg, processor), share
    )
    gone = samples(bad)
    records = {
        (split, record.key): record
        for split, reading in parts.items()
        for record in reading.records
        if (split, record.key) not in gone
    }
    if other := sorted(records.keys() ^ found.keys()):
        raise DataError(
            f"{cfg.data_path}: not the conversations that the first process of the run reads, such "
            f"as {other[0][1]}; all machines need the same data set"
        )
    splits: dict[str, list[Example]] = {"train": [], "val": []}
    for (split, name), record in records.items():
        splits[split].append(example_of(record, folder_of(cfg), found[split, name]))
    if not splits["train"]:
        raise DataError(f"{cfg.data_path}: no conversation is left to train on")
    notes = [*left_out(bad), *_cut(records, found), *_shared(splits)]
    if not splits["val"]:
        notes.append(NO_VALIDATION)
    return Splits(splits["train"], splits["val"], tuple(notes), tuple(bad))


# -- remarks ---------------------------------------------------------------------------------------


def _cut(records: Mapping[tuple[str, str], Conversation], found: Facts) -> list[str]:
    """A line about conversations that were too long, if any were cut."""
    cut = [(key, len(one.turns) - found[key]["turns"]) for key, one in records.items()]
    cut = [(key, lost) for key, lost in cut if lost]
    if not cut:
        return []
    (_, name), lost = cut[0]
    turns = sum(lost for _, lost in cut)
    return [
        f"{plural(len(cut), 'conversation')} cut at --max_seq_length after an answer, "
        f"{plural(turns, 'turn')} left out; the first: {shown(name)}, {plural(lost, 'turn')}"
    ]


def _shared(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """A line about validation with what is trained on, if there is any."""
    known = {content for one in splits["train"] for content in one.contents}
    said = {one.content for one in splits["train"]}
    both = [
        one.key
        for one in splits["val"]
        if not known.isdisjoint(one.contents) or one.content in said
    ]
    if not both:
        return []
    return [
        f"{plural(len(both), 'conversation')} of val with an image or a whole text of train, so "
        f"that scores flatter: {', '.join(map(shown, both[:3]))}"
    ]


# -- what a run needs to know ----------------------------------------------------------------------


def fingerprint(splits: Splits) -> str:
    """Identity of what is trained on and validated with: 32 hexadecimal digits.

    Names, texts and pixels; not where the files lie.
    """
    parts = (("train", splits.train), ("val", splits.val))
    return digest_of(*([name, one.key, one.content] for name, part in parts for one in part))


def training_rows(cfg: Config, splits: Splits) -> list[Row]:
    """What the training takes its batches from; all processes have the same."""
    if cfg.packing:
        return packed_rows(splits.train, cfg.max_seq_length, cfg.seed)
    return single_rows(splits.train)


def updates_per_epoch(cfg: Config, rows: Sequence[Row]) -> int:
    """Optimizer updates of one pass over the training, over all processes.

    Raises:
        DataError: not one batch with `dataloader_drop_last`.
    """
    from lora_core.distributed import world_size

    size = cfg.per_device_train_batch_size * world_size()
    batches, rest = divmod(len(rows), size)
    batches += bool(rest and not cfg.dataloader_drop_last)
    if not batches:
        raise DataError(
            f"0 batches per epoch: {plural(len(rows), 'row')} of conversations, and "
            f"--dataloader_drop_last leaves out a batch of fewer than {size}: lower "
            "--per_device_train_batch_size, or leave --dataloader_drop_last out"
        )
    return math.ceil(batches / cfg.gradient_accumulation_steps)


def order_of(cfg: Config, rows: Sequence[Row]) -> OrderByLength | None:
    """The order of an epoch where settings ask for another than a random one.

    It is that of whole updates, whose batches are then of similar length, too, so that a resumed
    run may divide an update among other numbers of processes and batches.
    """
    from lora_core.distributed import world_size

    if not cfg.by_length:
        return None
    size = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * world_size()
    return OrderByLength([row.tokens for row in rows], size, cfg.seed)


# -- samples and batches ---------------------------------------------------------------------------


class TrainSet(EpochDataset[Row, list[dict[str, Any]]]):
    """Rows of conversations as samples, with what has been made of their pictures.

    Args:
        vision: gives the vision features of pictures in place of their patches.
        depth: gives their depth.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: IsaacProcessor,
        seed: int = 0,
        vision: VisionFeatures | None = None,
        depth: DepthSource | None = None,
    ) -> None:
        super().__init__(rows, seed)
        self.processor, self.vision, self.depth = processor, vision, depth

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """Give the samples of a row, as `sample`.

        Raises:
            DataError: a picture that cannot be read any more, or is another one now.
        """
        return [self.sample(example) for example in self.records[index].examples]

    def sample(self, example: Example) -> dict[str, Any]:
        """Give {"key", "sample"}, and lists of parts for `VisionFeatures` and `DepthGrids`."""
        rules = self.processor.rules
        pictures = [picture.once() for picture in example.pictures(rules)]
        sample = example.outline(self.processor)
        found: dict[str, Any] = {"key": example.key}
        if self.vision is not None:
            found["vision_parts"] = [self.vision.part(picture) for picture in pictures]
        else:
            sample = with_pictures(sample, [picture.read() for picture in pictures], rules)
        if self.depth is not None:
            found["depth_parts"] = [self.depth.part(picture) for picture in pictures]
        return found | {"sample": sample}


def collate(
    rows: Sequence[Sequence[Mapping[str, Any]]], processor: IsaacProcessor, packed: bool = False
) -> dict[str, Any]:
    """One batch of all samples in rows of `TrainSet`: padded on the right, or packed into one row.

    Returns:
        As `collate_padded` or `collate_packed`; with `keys`, the samples' names, and, where they
        have them, `vision_parts` and `depth_parts` of all pictures in the order of their places.
    """
    samples = [sample for row in rows for sample in row]
    sequences: list[Sample] = [one["sample"] for one in samples]
    shuffle = processor.rules.pixel_shuffle_scale
    if packed:
        batch = collate_packed(sequences, pixel_shuffle_scale=shuffle)
    else:
        pad = processor.tokenizer.pad_token_id
        batch = collate_padded(sequences, pad_id=pad, pixel_shuffle_scale=shuffle)
    batch["keys"] = [one["key"] for one in samples]
    for name in ("vision_parts", "depth_parts"):
        if name in samples[0]:
            batch[name] = [part for one in samples for part in one[name]]
    return batch


def largest_batch(
    rows: Sequence[Row], count: int, processor: IsaacProcessor, packed: bool = False
) -> dict[str, Any]:
    """The batch of the `count` longest rows, with zeros for their patches."""
    width = 3 * processor.rules.patch_size**2

    def zeros(example: Example) -> dict[str, Any]:
        sample = example.outline(processor)
        patches = torch.zeros(int(sample.grids.prod(1).sum()), width, dtype=torch.uint8)
        return {"key": example.key, "sample": replace(sample, patches=patches)}

    longest = sorted(rows, key=lambda row: -row.tokens)[:count]
    return collate([[zeros(one) for one in row.examples] for row in longest], processor, packed)
