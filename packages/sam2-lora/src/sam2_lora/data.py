"""From a data folder to training batches and to pictures for evaluation.

    splits = load(cfg)          # reads and checks everything; str(splits) tells what there is
    batch = collate([splits.train[0], splits.train[1]])
    for record in splits.val: record.rgb, record.objects

A training sample is a function of (seed, epoch, index) alone: workers, resuming and validation do
not change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lora_core.errors import printable
from lora_core.frozen import FrozenImages, Picture
from lora_core.pictures import survey
from lora_core.pictures.files import read_image
from lora_core.pictures.masks import Object, Size, resized
from lora_core.pictures.survey import left_out, remarks, without
from lora_core.report import plural, table
from lora_core.training.loading import EpochDataset, retried
from lora_core.validate import Bad, Share, read_and_settle
from sam2_lora.config import Config
from sam2_lora.formats import SPLITS
from sam2_lora.image import as_tensor, to_model_boxes, to_model_points
from sam2_lora.prompts import Mask, box_of, jittered, random_pixel
from sam2_lora.records import Record
from sam2_lora.survey import Counts, counted, looking, objects_of, read_parts, settled

MAX_LISTED = 20  # classes in the printed table


# -- training --------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One picture with N objects and their first prompts: points, or else boxes."""

    key: str
    pixels: Picture  # uint8 [H, W, 3], at its own size; or of `TrainSet.frozen`
    points: Tensor | None  # float32 [N, 1, 2], model pixels
    boxes: Tensor | None  # float32 [N, 4], model pixels
    targets: Tensor  # uint8 [N, H, W], 0 and 1
    seed: int  # for what is drawn later, such as correction clicks


class TrainSet(EpochDataset[Record, Sample]):
    """Pictures as training samples: flipped, with at most `max_objects` objects and prompts.

    A picture without objects gives one empty target under a random click: it trains the object
    score. The click keeps off objects that were left out as too small.

    Attributes:
        frozen: gives samples features from its cache instead of pixels; None: no sample has any.
        counts: number of objects in each picture, where that is known.
    """

    def __init__(self, records: Sequence[Record], cfg: Config, counts: Sequence[int] = ()) -> None:
        super().__init__(records, cfg.seed)
        self.cfg, self.counts = cfg, counts
        self.frozen: FrozenImages | None = None

    def __getitem__(self, index: int) -> Sample:
        record, size, rng = self.records[index], self.cfg.size, self.rng(index)
        flip = self.cfg.hflip and bool(rng.random() < 0.5)
        found = retried(lambda: objects_of(record, self.cfg))
        if flip:
            kept, small = ([item.mirrored() for item in group] for group in found[:2])
            found = found._replace(kept=kept, small=small)
        chosen = found.kept
        if len(chosen) > self.cfg.max_objects:
            numbers = rng.choice(len(chosen), self.cfg.max_objects, replace=False)
            chosen = [chosen[number] for number in sorted(numbers)]
        points, boxes = self._prompts(record, chosen, found.small, rng)
        empty = np.zeros((1, *size), dtype=bool)
        targets = np.stack([resized(item, size) for item in chosen]) if chosen else empty
        return Sample(
            key=record.key,
            pixels=self._seen(record, flip),
            points=points,
            boxes=boxes,
            targets=torch.from_numpy(targets.astype(np.uint8)),
            seed=int(rng.integers(2**63)),
        )

    def _seen(self, record: Record, flip: bool) -> Picture:
        def pixels() -> Tensor:
            rgb = retried(lambda: pixels_of(record))
            return as_tensor(np.ascontiguousarray(rgb[:, ::-1]) if flip else rgb)

        if self.frozen is None:
            return pixels()
        return self.frozen.item(record.image, placement(self.cfg.size, flip), pixels)

    def _prompts(
        self,
        record: Record,
        chosen: Sequence[Object],
        small: Sequence[Object],
        rng: np.random.Generator,
    ) -> tuple[Tensor | None, Tensor | None]:
        """A click in each object or a box around each, in the model's pixels.

        One kind for the whole picture, as in official training: half clicks, half boxes.
        """
        by_box = rng.random() < {"mixed": 0.5, "box": 1.0, "point": 0.0}[self.cfg.prompts]
        if not chosen:
            xy = np.array([[_beside(small, record.size, rng)]], dtype=np.float32)
        elif by_box:
            boxes = np.stack([_box(item) for item in chosen])
            boxes = to_model_boxes(boxes, record.size, self.cfg.size)
            boxes = np.stack([jittered(b, self.cfg.box_jitter, self.cfg.size, rng) for b in boxes])
            return None, torch.from_numpy(boxes)
        else:
            pixels = [[_click(item, rng)] for item in chosen]
            xy = np.array(pixels, dtype=np.float32)
        return torch.from_numpy(to_model_points(xy, record.size, self.cfg.size)), None


def placement(size: Size, mirrored: bool) -> tuple[object, ...]:
    """What decides how a picture becomes the model's input, as part of a cache's key."""
    return (*size, "mirrored" if mirrored else "as it is")


def pixels_of(record: Record) -> NDArray[np.uint8]:
    """The picture, uint8 [H, W, 3], of the size that its annotations mean.

    Raises:
        DataError: it cannot be read, or was exchanged for one of another size.
    """
    rgb = read_image(record.image)
    record.check_size(rgb)
    return rgb


def _box(item: Object) -> NDArray[np.float32]:
    return box_of(item.crop) + np.array([*item.origin, *item.origin], dtype=np.float32)


def _click(item: Object, rng: np.random.Generator) -> tuple[int, int]:
    x, y = random_pixel(item.crop, rng)
    return item.origin[0] + x, item.origin[1] + y


def _beside(small: Sequence[Object], size: Size, rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel of the picture where nothing is annotated; any pixel if all is."""
    free: Mask = np.ones(size, dtype=bool)
    for item in small:
        free[item.window] &= ~item.crop
    return random_pixel(free if free.any() else ~free, rng)


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples to one batch of B pictures.

    Padding a prompt with neutral points is impossible, the network attends to them: so objects are
    put together by the structure of their prompts.

    Returns:
        images: B pictures, uint8 [H, W, 3], each of its own size; with a cache, what it gave.
        keys: B names. seed: B integers.
        buckets: one dict for clicks and one for boxes, each if there are any, with
            image: int64 [N], rows of the batch; targets: uint8 [N, H, W];
            points: float32 [N, 1, 2] and labels: int64 [N, 1], or boxes: float32 [N, 4].
    """
    rows = list(enumerate(samples))
    buckets = []
    for group in (
        [row for row in rows if row[1].points is not None],
        [row for row in rows if row[1].boxes is not None],
    ):
        if group:
            buckets.append(_bucket(group))
    return {
        "images": [sample.pixels for sample in samples],
        "keys": [sample.key for sample in samples],
        "seed": [sample.seed for sample in samples],
        "buckets": buckets,
    }


def _bucket(group: Sequence[tuple[int, Sample]]) -> dict[str, Tensor]:
    counts = torch.tensor([len(sample.targets) for _, sample in group])
    bucket = {
        "image": torch.tensor([row for row, _ in group]).repeat_interleave(counts),
        "targets": torch.cat([sample.targets for _, sample in group]),
    }
    points = [sample.points for _, sample in group if sample.points is not None]
    boxes = [sample.boxes for _, sample in group if sample.boxes is not None]
    if points:
        bucket["points"] = torch.cat(points)
        bucket["labels"] = torch.ones(bucket["points"].shape[:2], dtype=torch.int64)
    else:
        bucket["boxes"] = torch.cat(boxes)
    return bucket


# -- evaluation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalRecord:
    """A picture at its own size, with everything that is to be found in it."""

    key: str
    rgb: NDArray[np.uint8]  # [H, W, 3]
    objects: list[Object]
    small: list[Object]  # left out: neither hits nor, without other objects, an empty picture
    item: Picture | None = None  # of `EvalSet.frozen`


class EvalSet(Dataset[EvalRecord]):
    """Pictures in the order of their keys, read when they are asked for.

    Attributes:
        frozen: gives records features from its cache; None: they have none.
    """

    def __init__(self, records: Sequence[Record], cfg: Config, notes: Sequence[str] = ()) -> None:
        self.records = list(records)
        self.cfg = cfg
        self.frozen: FrozenImages | None = None
        self.notes = tuple(notes)  # what was passed over in reading

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EvalRecord:
        record = self.records[index]
        found = retried(lambda: objects_of(record, self.cfg))
        rgb = retried(lambda: pixels_of(record))
        item = None
        if self.frozen is not None:
            place = placement(self.cfg.size, mirrored=False)
            item = self.frozen.item(record.image, place, lambda: as_tensor(rgb))
        return EvalRecord(record.key, rgb, found.kept, found.small, item)

    def __iter__(self) -> Iterator[EvalRecord]:
        return (self[index] for index in range(len(self)))


# -- the whole data set ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The pictures of a run. `str()` tells what they are, and what to be careful about."""

    train: TrainSet
    val: EvalSet
    test: EvalSet | None
    classes: tuple[str, ...]  # sorted
    counts: dict[str, Counts]  # by split name
    notes: tuple[str, ...]
    bad: tuple[Bad, ...] = ()  # what was left out, and why

    def use(self, frozen: FrozenImages | None) -> None:
        """Let pictures come as features from a cache, if there is one."""
        self.train.frozen = self.val.frozen = frozen
        if self.test is not None:
            self.test.frozen = frozen

    def __str__(self) -> str:
        header = ("split", "pictures", "without objects", "objects", "too small")
        rows = [
            (name, part.pictures, part.empty, part.objects.total(), part.small)
            for name, part in self.counts.items()
        ]
        classes = [
            (" ".join(label.split())[:40], *(part.objects[label] for part in self.counts.values()))
            for label in self.classes[:MAX_LISTED]
        ]
        lines = [table(header, rows), "", table(("class", *self.counts), classes)]
        if len(self.classes) > MAX_LISTED:
            lines.append(f"... and {len(self.classes) - MAX_LISTED} more classes")
        return printable("\n".join([*lines, *(f"note: {note}" for note in self.notes)]))


def fingerprint(splits: Splits) -> str:
    """Identity of the pictures that are trained on and validated with: 32 hexadecimal digits.

    Names in the data set, lengths of the files, sizes and annotations, in the order of training;
    not where the data lies, when it was copied, or the settings of the run. Pictures that were
    left out as bad are no part of it: without them the others have other numbers.

    Raises:
        DataError: a file that was there is gone.
    """
    parts = {"train": splits.train.records, "val": splits.val.records}
    return survey.fingerprint(parts, looking(splits.train.cfg))


def load(cfg: Config, share: Share = lambda make: make()) -> Splits:
    """Read a data set as `cfg` describes it, and look at every picture and annotation.

    Without a validation split, `cfg.val_fraction` of the training pictures become one. Bad samples
    stop this, or are left out, as `cfg.on_bad_sample` says.

    Args:
        share: calls its argument in the first process of the run and gives its value in all, such
            as `first_rank_decides`. The pictures are looked at once, and all leave out the same.

    Raises:
        DataError: no data, or faults in it: all of them together, the first 20 in full; or other
            pictures here than in the first process.
        ConfigError: `cfg.dataset_size` names a subset that does not exist.
    """
    (parts, _, reading), (facts, bad) = read_and_settle(
        lambda: read_parts(cfg, tuple(SPLITS)),
        lambda found: settled(found[0], found[1], cfg),
        share,
    )
    parts = without(parts, bad, facts, Path(cfg.data_root))
    counts = counted(parts, facts, cfg, reading)
    notes = reading.said() + remarks(parts) + left_out(bad)
    if cfg.loss == "legacy":
        # Without an object score there is nothing to learn from a picture that holds no object.
        parts["train"] = [r for r in parts["train"] if facts["train", r.key]["objects"]]
        trained = plural(len(parts["train"]), "picture")
        notes.append(f"--loss legacy trains on the {trained} with objects")
    classes = sorted({label for part in counts.values() for label in part.objects})
    test = EvalSet(parts["test"], cfg) if "test" in parts else None
    objects = [sum(facts["train", r.key]["objects"].values()) for r in parts["train"]]
    train, val = TrainSet(parts["train"], cfg, objects), EvalSet(parts["val"], cfg)
    return Splits(train, val, test, tuple(classes), counts, tuple(notes), tuple(bad))


def load_split(cfg: Config, split: str) -> EvalSet | None:
    """Read "val" or "test" alone, for evaluation; None if the data set has no such split.

    Raises:
        DataError, ConfigError: as `load`.
    """
    parts, known, reading = read_parts(cfg, (split,))
    if split not in parts:
        return None
    parts = {split: parts[split]}
    facts, bad = settled(parts, [one for one in known if one.split == split], cfg)
    parts = without(parts, bad, facts, Path(cfg.data_root))
    counted(parts, facts, cfg, reading)
    return EvalSet(parts[split], cfg, reading.said() + left_out(bad))
