"""From a data folder to training batches and to pictures for evaluation.

    splits = load(cfg)          # reads and checks everything; str(splits) tells what there is
    batch = collate([splits.train[0], splits.train[1]])
    for record in splits.val: record.rgb, record.objects

A training sample is a function of (seed, epoch, index) alone: workers, resuming and validation do
not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lora_core.errors import ConfigError, DataError, printable
from lora_core.report import table
from sam2_lora.config import Config
from sam2_lora.formats import SPLITS, find, read
from sam2_lora.image import preprocess, read_image, to_model_boxes, to_model_points
from sam2_lora.masks import Object, Size, resized
from sam2_lora.prompts import Mask, box_of, jittered, random_pixel
from sam2_lora.records import Reading, Record
from sam2_lora.survey import (
    Counts,
    Found,
    check,
    doubles,
    objects_of,
    split_by_name,
    subset,
)

MAX_LISTED = 20  # classes in the printed table


# -- training --------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One picture with N objects and their first prompts: points, or else boxes."""

    key: str
    inputs: dict[str, Tensor]  # pixel_values float32 [3, H, W], or cached features
    points: Tensor | None  # float32 [N, 1, 2], model pixels
    boxes: Tensor | None  # float32 [N, 4], model pixels
    targets: Tensor  # uint8 [N, H, W], 0 and 1
    seed: int  # for what is drawn later, such as correction clicks


class TrainSet(Dataset[Sample]):
    """Pictures as training samples: flipped, with at most `max_objects` objects and prompts.

    A picture without objects gives one empty target under a random click: it trains the object
    score. The click keeps off objects that were left out as too small.

    Attributes:
        features: record -> features to use instead of the picture; None reads the picture.
    """

    def __init__(self, records: Sequence[Record], cfg: Config) -> None:
        self.records = list(records)
        self.cfg = cfg
        self.features: Callable[[Record], dict[str, Tensor]] | None = None
        # Shared memory: workers that outlive an epoch must hear of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose flips, prompts and choices of objects the samples show."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, size = self.records[index], self.cfg.size
        rng = np.random.default_rng([self.cfg.seed % 2**32, int(self._epoch), index])
        flip = self.cfg.hflip and bool(rng.random() < 0.5)
        found = objects_of(record, self.cfg)
        if flip:
            found = Found(*([item.mirrored() for item in group] for group in found))
        chosen = found.kept
        if len(chosen) > self.cfg.max_objects:
            numbers = rng.choice(len(chosen), self.cfg.max_objects, replace=False)
            chosen = [chosen[number] for number in sorted(numbers)]
        points, boxes = self._prompts(record, chosen, found.small, rng)
        empty = np.zeros((1, *size), dtype=bool)
        targets = np.stack([resized(item, size) for item in chosen]) if chosen else empty
        return Sample(
            key=record.key,
            inputs=self._inputs(record, flip),
            points=points,
            boxes=boxes,
            targets=torch.from_numpy(targets.astype(np.uint8)),
            seed=int(rng.integers(2**63)),
        )

    def _inputs(self, record: Record, flip: bool) -> dict[str, Tensor]:
        if self.features is not None:
            return self.features(record)
        rgb = read_image(record.image)
        if flip:
            rgb = np.ascontiguousarray(rgb[:, ::-1])
        return {"pixel_values": preprocess(rgb, self.cfg.size)}

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
        pixel_values: float32 [B, 3, H, W]; or "features", a dict of tensors [B, ...].
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
    inputs = default_collate([sample.inputs for sample in samples])
    return {
        **(inputs if "pixel_values" in inputs else {"features": inputs}),
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


class EvalSet(Dataset[EvalRecord]):
    """Pictures in the order of their keys, read when they are asked for."""

    def __init__(self, records: Sequence[Record], cfg: Config, notes: Sequence[str] = ()) -> None:
        self.records = list(records)
        self.cfg = cfg
        self.notes = tuple(notes)  # what was passed over in reading

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EvalRecord:
        record = self.records[index]
        found = objects_of(record, self.cfg)
        return EvalRecord(record.key, read_image(record.image), found.kept, found.small)

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


def load(cfg: Config) -> Splits:
    """Read a data set as `cfg` describes it, and check all of it that can be checked early.

    Without a validation split, `cfg.val_fraction` of the training pictures become one.

    Raises:
        DataError: no data, or faults in it: all of them together, the first 20 in full.
        ConfigError: `cfg.dataset_size` names a subset that does not exist.
    """
    parts, reading = _read(cfg, ("train", "val", "test"))
    counts = _checked(parts, reading, cfg)
    notes = reading.said() + _remarks(parts, counts)
    if cfg.loss == "legacy":
        parts["train"] = _with_objects(parts["train"], cfg)
        notes.append(f"--loss legacy trains on the {len(parts['train'])} pictures with objects")
    classes = sorted({label for part in counts.values() for label in part.objects})
    test = EvalSet(parts["test"], cfg) if "test" in parts else None
    train, val = TrainSet(parts["train"], cfg), EvalSet(parts["val"], cfg)
    return Splits(train, val, test, tuple(classes), counts, tuple(notes))


def load_split(cfg: Config, split: str) -> EvalSet | None:
    """Read "val" or "test" alone, for evaluation; None if the data set has no such split.

    Raises:
        DataError, ConfigError: as `load`.
    """
    parts, reading = _read(cfg, (split,))
    if split not in parts:
        return None
    _checked({split: parts[split]}, reading, cfg)
    return EvalSet(parts[split], cfg, reading.said())


def _with_objects(records: Sequence[Record], cfg: Config) -> list[Record]:
    """Without an object score there is nothing to learn from a picture that holds no object."""
    return [record for record in records if objects_of(record, cfg).kept]


def _read(cfg: Config, wanted: Sequence[str]) -> tuple[dict[str, list[Record]], Reading]:
    """Records of the wanted splits, and the problems and notes of reading them."""
    root = Path(cfg.data_root)
    kind, sources = find(root, cfg.data_format)
    if cfg.dataset_size != "full":
        sources["train"] = _subset_folder(cfg, kind)
    whole = "train" if "train" in sources else "all"
    if "train" in wanted and whole not in sources:
        names = " or ".join(SPLITS["train"])
        raise DataError(f"{root.absolute()}: the training split ({names}) is missing")
    to_split = "val" in wanted and "val" not in sources
    to_read = {*wanted, whole} if to_split or "train" in wanted else set(wanted)
    parts: dict[str, list[Record]] = {}
    total = Reading()
    for name in sorted(to_read & sources.keys()):
        reading = read(sources[name], kind, root, cfg.mask_kind)
        total.problems += reading.problems
        total.notes += reading.notes
        parts[name] = reading.records
    if to_split and whole in parts:
        parts["train"], parts["val"] = split_by_name(parts.pop(whole), cfg.val_fraction)
    elif whole == "all" and whole in parts:
        parts["train"] = parts.pop(whole)
    if cfg.max_val_images and "val" in parts:
        parts["val"] = subset(parts["val"], cfg.max_val_images)
    return {name: parts[name] for name in SPLITS if name in parts}, total


def _subset_folder(cfg: Config, kind: str) -> Path:
    folder = Path(cfg.data_root) / "subsets" / f"{cfg.dataset_size}_subset"
    if kind != "severstal" or not folder.is_dir():
        raise ConfigError(
            f"--dataset_size {cfg.dataset_size}: {folder.absolute()}: no such folder; "
            "`sam2-lora prepare` makes the Severstal splits with their subsets"
        )
    return folder


def _checked(parts: dict[str, list[Record]], reading: Reading, cfg: Config) -> dict[str, Counts]:
    """Counts of each split.

    Raises:
        DataError: anything wrong so far, or a split without pictures or without objects.
    """
    counts = {name: check(records, cfg) for name, records in parts.items()}
    reading.problems += [problem for part in counts.values() for problem in part.problems]
    reading.stop_if_wrong(str(Path(cfg.data_root).absolute()))
    for name, part in counts.items():
        if not part.pictures:
            raise DataError(f"{Path(cfg.data_root).absolute()}: no pictures in the {name} split")
        all_seen = part.looked_at == part.pictures
        if not part.objects and all_seen and name != "test":
            raise DataError(
                f"{Path(cfg.data_root).absolute()}: no objects in the {part.pictures} pictures of "
                f"the {name} split ({part.small} are smaller than --min_object_area): add pictures "
                "with objects to it, or set --val_fraction if it is cut from the training pictures"
            )
    return counts


def _remarks(parts: dict[str, list[Record]], counts: dict[str, Counts]) -> list[str]:
    """What to be careful about."""
    remarks = [
        f"objects of {name} were counted on {part.looked_at} of its pictures"
        for name, part in counts.items()
        if part.looked_at < part.pictures
    ]
    for name in ("val", "test"):
        keys = doubles(parts.get(name, []), parts["train"])
        if keys:
            remarks.append(
                f"{len(keys)} pictures of {name} are in train too, so that its scores flatter: "
                + ", ".join(keys[:3])
                + (", ..." if len(keys) > 3 else "")
            )
    return remarks
