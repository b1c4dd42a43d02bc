"""From COCO files to training batches and to pictures for validation.

    splits = load(cfg)          # reads and checks everything; str(splits) tells what there is
    batch = collate([splits.train[0], splits.train[1]], tokenizer)
    for record in splits.val: record.pixels, record.phrases, record.truth

A training sample is a function of (seed, epoch, index) alone: workers, resuming and validation do
not change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lora_core.errors import printable
from lora_core.frozen import FrozenImages, Picture
from lora_core.pictures import survey as pictures
from lora_core.pictures.masks import Size
from lora_core.pictures.survey import left_out, remarks, without
from lora_core.report import plural, table
from lora_core.settings.types import shown
from lora_core.training.loading import EpochDataset, retried
from lora_core.validate import Bad, Share, read_and_settle
from sam3_lora.coco import Split
from sam3_lora.config import Config
from sam3_lora.queries import Query, absent, asked, drawn, fixed
from sam3_lora.records import Box, Record
from sam3_lora.samples import EvalRecord, Sample, annotation, collate, in_input
from sam3_lora.survey import (
    LOOK,
    Counts,
    Parts,
    counted,
    data_root,
    notes_on,
    read_parts,
    settled,
    trainable,
)
from sam3_lora.tokenizer import CONTEXT, Tokenizer
from sam3_lora.transforms import (
    Placement,
    drawn_placement,
    filling,
    jittered,
    place_picture,
)

__all__ = [
    "EvalRecord",
    "Sample",
    "Splits",
    "TrainSet",
    "ValSet",
    "collate",
    "fingerprint",
    "load",
    "notes_on_length",
    "updates_per_epoch",
]

MAX_LISTED = 20  # phrases in the printed table


# -- the sets --------------------------------------------------------------------------------------


class TrainSet(EpochDataset[Record, Sample]):
    """Pictures as training samples: at random size and place, with phrases that are absent, too.

    Attributes:
        records: the pictures, in the order of their names.
        phrases: all that can be asked for.
        frozen: gives samples features from its cache instead of pixels; None: no sample has any.
    """

    def __init__(self, records: Sequence[Record], phrases: Sequence[str], cfg: Config) -> None:
        super().__init__(records, cfg.seed)
        self.phrases, self.cfg = list(phrases), cfg
        self.frozen: FrozenImages | None = None

    def __getitem__(self, index: int) -> Sample:
        record, settings, rng = self.records[index], self.cfg.dataset, self.rng(index)
        masks = self.cfg.training.enable_segmentation
        negatives = drawn(absent(record, self.phrases), settings.max_negatives, rng)
        instances, _ = retried(lambda: record.instances(masks, crowds=False))
        queries = asked(instances, negatives, self.phrases, settings.max_ann_per_img)
        examples = [self._example(query, record.size, rng) for query in queries]
        place = filling(settings.size)
        if settings.enable_augmentation:
            place = drawn_placement(settings.size, rng)
        if settings.hflip and rng.random() < 0.5:
            place = place._replace(mirrored=True)
        pixels = _seen(record, place, self.frozen)
        placed = [
            in_input(query, record.size, place, masks, example)
            for query, example in zip(queries, examples, strict=True)
        ]
        return Sample(record.key, pixels, placed)

    def _example(self, query: Query, size: Size, rng: np.random.Generator) -> Box | None:
        """A jittered box of one of the objects, for a share of the queries that have any."""
        settings = self.cfg.dataset
        if not query.instances or rng.random() >= settings.exemplars:
            return None
        box = query.instances[int(rng.integers(len(query.instances)))].box
        return jittered(box, size, settings.box_noise_std, settings.box_noise_max, rng)


class ValSet(Dataset[EvalRecord]):
    """Pictures in the order of their names, read when they are asked for.

    Each is asked for all that is in it and for the same absent phrases in every epoch and run, so
    that their scores compare.

    Attributes:
        frozen: as for `TrainSet`.
    """

    def __init__(self, records: Sequence[Record], split: Split, cfg: Config) -> None:
        self.records, self.numbers, self.cfg = list(records), split.phrases.numbers, cfg
        self.frozen: FrozenImages | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EvalRecord:
        record, phrases = self.records[index], list(self.numbers)
        masks = self.cfg.training.enable_segmentation
        negatives = fixed(absent(record, phrases), self.cfg.dataset.max_val_negatives, record.key)
        instances, _ = retried(lambda: record.instances(masks))
        queries = asked(instances, negatives, phrases)
        return EvalRecord(
            key=record.key,
            image=record.image,
            image_id=record.image_id,
            pixels=_seen(record, filling(self.cfg.dataset.size), self.frozen),
            size=record.size,
            phrases=[query.phrase for query in queries],
            categories=[self.numbers[query.phrase] for query in queries],
            truth=[[annotation(one, masks) for one in query.instances] for query in queries],
            exhaustive=[query.phrase not in record.partial for query in queries],
        )

    def __iter__(self) -> Iterator[EvalRecord]:
        return (self[index] for index in range(len(self)))


def _seen(record: Record, place: Placement, frozen: FrozenImages | None) -> Picture:
    """A picture in the model's input, uint8 [H, W, 3], or its features."""

    def pixels() -> Tensor:
        return place_picture(retried(record.pixels), place)

    return pixels() if frozen is None else frozen.item(record.image, place, pixels)


# -- the whole data set ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The pictures of a run. `str()` tells what they are, and what to be careful about."""

    train: TrainSet
    val: ValSet | None
    phrases: tuple[str, ...]  # of both, those of train first
    counts: dict[str, Counts]  # by split name
    notes: tuple[str, ...]
    bad: tuple[Bad, ...] = ()  # what was left out, and why

    def use(self, frozen: FrozenImages | None) -> None:
        """Let samples come from a cache of features, if there is one.

        Training pictures at random sizes and places do not: no two are equal.
        """
        if not self.train.cfg.dataset.enable_augmentation:
            self.train.frozen = frozen
        if self.val is not None:
            self.val.frozen = frozen

    def __str__(self) -> str:
        header = ("split", "pictures", "empty", "objects", "with mask", "absent phrases")
        rows = [
            (name, part.pictures, part.empty, part.objects.total(), part.masks, part.absent)
            for name, part in self.counts.items()
        ]
        phrases = [
            (" ".join(one.split())[:40], *(part.objects[one] for part in self.counts.values()))
            for one in self.phrases[:MAX_LISTED]
        ]
        lines = [table(header, rows), "", table(("phrase", *self.counts), phrases)]
        if len(self.phrases) > MAX_LISTED:
            lines.append(f"... and {len(self.phrases) - MAX_LISTED} more phrases")
        return printable("\n".join([*lines, *(f"note: {note}" for note in self.notes)]))


def notes_on_length(phrases: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """What is lost of phrases that are longer than the model reads."""
    long = tokenizer.too_long(phrases)
    if not long:
        return []
    return [f"{plural(len(long), 'phrase')} cut to {CONTEXT} tokens, such as {shown(long[0])}"]


def fingerprint(splits: Splits) -> str:
    """Identity of what is trained on and validated with: 32 hexadecimal digits.

    Phrases, names in the data set, lengths of the files, sizes and annotations, in the order of
    training; not where the data lies, when it was copied, or the settings of the run. Pictures
    that were left out as bad are no part of it: without them the others have other numbers.

    Raises:
        DataError: a file that was there is gone.
    """
    parts = {"train": splits.train.records}
    if splits.val is not None:
        parts["val"] = splits.val.records
    phrases = [splits.train.phrases, list(splits.val.numbers) if splits.val else []]
    return pictures.digest_of(pictures.fingerprint(parts, LOOK), *phrases)


def updates_per_epoch(cfg: Config, splits: Splits) -> int:
    """Optimizer updates of one pass over the training pictures, over all processes."""
    from lora_core.distributed import world_size

    batches = math.ceil(len(splits.train) / (cfg.training.batch_size * world_size()))
    return math.ceil(batches / cfg.training.gradient_accumulation_steps)


def load(cfg: Config, share: Share = lambda make: make()) -> Splits:
    """Read a data set as `cfg` describes it, and look at every picture and annotation.

    Bad samples stop this, or are left out, as `cfg.on_bad_sample` says.

    Args:
        share: calls its argument in the first process of the run and gives its value in all, such
            as `first_rank_decides`. The pictures are looked at once, and all leave out the same.

    Raises:
        DataError: no data, or faults in it: all of them together, the first 20 in full; or other
            pictures here than in the first process.
        ConfigError: `dataset.prompts` names a category that no file has.
    """
    (parts, _, reading), (facts, bad) = read_and_settle(
        lambda: read_parts(cfg), lambda found: settled(found[0], found[1], cfg), share
    )
    every = {name: split.records for name, split in parts.items()}
    good = without(every, bad, facts, data_root(cfg.dataset))
    counts = counted(good, parts, facts, cfg)
    chosen = trainable(good["train"], parts["train"], facts, cfg)
    notes = [
        *(note for split in parts.values() for note in split.phrases.notes),
        *reading.said(),
        *notes_on(counts, cfg),
        *remarks(good),
        *left_out(bad),
    ]
    if unasked := len(good["train"]) - len(chosen):
        notes.append(f"{plural(unasked, 'picture')} of train left out that can be asked nothing")
    phrases = tuple(dict.fromkeys(one for split in parts.values() for one in split.phrases.numbers))
    notes += _notes_on_phrases(parts, counts)
    train = TrainSet(chosen, list(parts["train"].phrases.numbers), cfg)
    val = ValSet(good["val"], parts["val"], cfg) if "val" in parts else None
    return Splits(train, val, phrases, counts, tuple(notes), tuple(bad))


def _notes_on_phrases(parts: Parts, counts: dict[str, Counts]) -> list[str]:
    """What to be careful about in what is asked."""
    notes = []
    if not counts["train"].absent:
        notes.append(
            "train asks for nothing in vain: the model may come to find its phrases everywhere; "
            "add pictures without objects, or raise --dataset.max_negatives"
        )
    if "val" not in parts:
        return [
            *notes,
            "no validation pictures: there are no scores, and best.pt is the last epoch",
        ]
    if not counts["val"].absent:
        notes.append("val asks for nothing in vain: cgF1 is 0 without absent phrases")
    train = parts["train"].phrases.numbers
    if new := [one for one in counts["val"].objects if one not in train]:
        notes.append(f"phrases of val that train does not have: {', '.join(map(shown, new[:5]))}")
    return notes
