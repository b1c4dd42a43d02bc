"""From folders of scenes to training batches and to scenes for validation.

    splits = load(cfg, needs)   # reads and checks every scene; str(splits) tells what there is
    batch = collate([splits.train[0], splits.train[1]], mix_prob=0.8)

A training sample is a function of (seed, epoch, index) alone: workers, resuming and validation do
not change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.errors import DataError, listing
from lora_core.pictures.survey import digest_of, file_length, left_out
from lora_core.report import plural, table
from lora_core.training.loading import EpochDataset, retried
from lora_core.validate import REPORT, Bad, Share, read_and_settle, samples, stop_or_skip, validate
from scenesplat_lora import collate as batches
from scenesplat_lora.config import Config
from scenesplat_lora.scene_facts import scene_facts
from scenesplat_lora.scene_files import list_scenes, read_scene
from scenesplat_lora.scene_values import LAYOUTS
from scenesplat_lora.transforms.pipeline import (
    LANGUAGE_KEYS,
    Transform,
    compose,
    training_transforms,
    validation_transforms,
)
from scenesplat_lora.transforms.tensors import GAUSSIAN_FEATURES

DRAWS = 5  # of a sample until one has a row to learn from
Facts = dict[tuple[str, str], Mapping[str, Any]]  # by split and scene


@dataclass(frozen=True)
class Needs:
    """What a network is trained and measured with.

    Attributes:
        language: trained on language features; otherwise on labels.
        channels: of the network's input: 11, or 14 with normals.
        width: of language features. classes: labels are below it; None: they are not looked at.
    """

    language: bool
    channels: int
    width: int | None = None
    classes: int | None = None

    @property
    def feat_keys(self) -> list[str]:
        """Arrays that are the network's input.

        Raises:
            DataError: there is no such input.
        """
        known = {11: [*GAUSSIAN_FEATURES], 14: [*GAUSSIAN_FEATURES, "normal"]}
        if self.channels not in known:
            raise DataError(
                f"the network takes {self.channels} channels; scenes give 11 (color, opacity, "
                "quat, scale), or 14 with normals"
            )
        return known[self.channels]

    def wanted(self, split: str) -> tuple[str, ...]:
        """Files that a scene of a split must have besides its Gaussians."""
        normal = ("normal",) if self.channels == 14 else ()
        if split == "val" and (self.classes is not None or not self.language):
            return ("segment", *normal)
        return ("lang_feat" if self.language else "segment", *normal)


@dataclass(frozen=True)
class SceneRecord:
    """A scene on disk: `key` is its folder below the data root."""

    folder: Path
    key: str

    def files(self) -> list[Path]:
        """Its arrays."""
        return sorted(self.folder.glob("*.npy"))


# -- the sets --------------------------------------------------------------------------------------


class TrainSet(EpochDataset[SceneRecord, dict[str, Any]]):
    """Scenes as training samples, augmented anew in every epoch."""

    def __init__(self, records: Sequence[SceneRecord], cfg: Config, needs: Needs) -> None:
        super().__init__(
            [record for record in records for _ in range(cfg.data.train.loop)], cfg.seed
        )
        self.cfg, self.needs = cfg, needs
        self.steps = transform(cfg, needs, "train")

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, rng = self.records[index], self.rng(index)
        layout, wanted = LAYOUTS[self.cfg.data.layout], self.needs.wanted("train")
        scene = retried(lambda: read_scene(record.folder, layout, wanted)) | {"name": record.key}
        for _ in range(DRAWS):
            sample = self.steps(scene, rng)
            if learnable(sample, self.needs):
                break
        progress = min(int(self._epoch) / self.cfg.epoch, 1.0)
        return sample | {"mix": float(rng.random()), "progress": progress}


class ValSet:
    """Scenes in the order of their names, read when they are asked for, always the same."""

    def __init__(self, records: Sequence[SceneRecord], cfg: Config, needs: Needs) -> None:
        self.records, self.cfg, self.needs = list(records), cfg, needs
        self.steps = transform(cfg, needs, "val")

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        layout, wanted = LAYOUTS[self.cfg.data.layout], self.needs.wanted("val")
        for number, record in enumerate(self.records):
            scene = retried(lambda: read_scene(record.folder, layout, wanted))  # noqa: B023 - now
            sample = self.steps(scene | {"name": record.key}, np.random.default_rng(number))
            yield collate([sample | {"mix": 1.0, "progress": 1.0}])


def transform(cfg: Config, needs: Needs, split: str) -> Transform:
    """The transforms of a split, its own or the official ones.

    Raises:
        ConfigError: an unknown transform or argument.
    """
    data = cfg.data
    own = data.train.transform if split == "train" else data.val.transform
    if own:
        return compose(own, f"data.{split}.transform")
    learned = ("lang_feat", "valid_feat_mask")
    features = "lang_feat" in needs.wanted(split)
    keys = [key for key in LANGUAGE_KEYS if features or key not in learned]
    specs = (
        training_transforms(keys, data.grid_size, data.point_max)
        if split == "train"
        else validation_transforms(keys, data.grid_size)
    )
    if split == "val":  # nothing is asked of a labelled cloud here
        specs = [spec for spec in specs if spec["type"] != "LabelledCloudSample"]
    specs[-1] = specs[-1] | {"feat_keys": needs.feat_keys}
    return compose(specs)


def learnable(sample: Mapping[str, Any], needs: Needs) -> bool:
    """Whether any row of a sample has something to learn from."""
    return learnable_rows(sample, needs) > 0


def learnable_rows(batch: Mapping[str, Any], needs: Needs) -> int:
    """How many rows of a sample or batch the loss is the mean over."""
    return int(batch["valid_feat_mask"].sum() if needs.language else (batch["segment"] != -1).sum())


def collate(samples: Sequence[dict[str, Any]], mix_prob: float = 0.0) -> dict[str, Any]:
    """One batch; with probability `mix_prob` neighbouring scenes are one cloud (Mix3D).

    Whether they are was drawn with the first sample, so that it does not depend on workers.

    Returns:
        Tensors with the rows of all scenes; `offset` i64 [B]; `keys`, the scenes' names; and
        `progress`, the share of the run's epochs that is over.
    """
    apart = ("mix", "progress", "name")
    batch = batches.collate(
        [{key: value for key, value in one.items() if key not in apart} for one in samples]
    )
    if samples[0]["mix"] < mix_prob:
        batch["offset"] = batches.mixed_offset(batch["offset"])
    keys = [str(one.get("name", "")) for one in samples]
    return batch | {"keys": keys, "progress": samples[0]["progress"]}


# -- the whole data set ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The scenes of a run. `str()` tells what they are, and what to be careful about."""

    train: TrainSet
    val: ValSet | None
    facts: Facts
    notes: tuple[str, ...]
    bad: tuple[Bad, ...] = ()  # what was left out, and why

    def __str__(self) -> str:
        rows = []
        for split in ("train", "val"):
            found = [facts for (name, _), facts in self.facts.items() if name == split]
            sums = [sum(one[what] for one in found) for what in ("rows", "valid", "labelled")]
            if found:
                rows.append((split, len(found), *(f"{count:,}" for count in sums)))
        header = ("split", "scenes", "Gaussians", "with language", "with label")
        return "\n".join([table(header, rows), *(f"note: {note}" for note in self.notes)])


def load(cfg: Config, needs: Needs, share: Share = lambda make: make()) -> Splits:
    """Find the scenes of a configuration, and look at every one wholly.

    Bad scenes stop this, or are left out, as `cfg.on_bad_sample` says.

    Args:
        share: calls its argument in the first process of the run and gives its value in all.

    Raises:
        DataError: no scenes, or faults in them: all of them together.
    """
    parts, (facts, bad) = read_and_settle(
        lambda: records_of(cfg), lambda found: _settled(found, cfg, needs), share
    )
    gone = samples(bad)
    good = {
        split: [record for record in records if (split, record.key) not in gone]
        for split, records in parts.items()
    }
    if other := {(split, r.key) for split, part in good.items() for r in part} ^ facts.keys():
        raise DataError(
            f"{cfg.data.train.data_root}: not the scenes that the first process of the run sees, "
            f"such as {sorted(other)[0][1]}; all machines need the same data set"
        )
    what = "valid" if needs.language else "labelled"
    chosen = [record for record in good["train"] if facts["train", record.key][what]]
    if not chosen:
        row = "language features (valid_feat_mask)" if needs.language else "labels"
        raise DataError(f"{cfg.data.train.data_root}: no scene of train has rows with {row}")
    val_labels = [facts["val", record.key]["labelled"] for record in good.get("val", [])]
    if needs.classes is not None and val_labels and not any(val_labels):
        raise DataError(
            f"{cfg.data.val_root}: no row of val has a label, so that no mIoU can be measured: add "
            "labels, or train without --data.text_embeddings"
        )
    notes = [
        *(f"{key}: {note}" for (_, key), one in facts.items() for note in one["notes"]),
        *left_out(bad),
    ][:20]
    if idle := len(good["train"]) - len(chosen):
        notes.append(f"{plural(idle, 'scene')} of train with nothing to learn from are left out")
    val = ValSet(good["val"], cfg, needs) if good.get("val") else None
    if val is None:
        notes.append("no validation scenes: the best adapter is the last")
    return Splits(TrainSet(chosen, cfg, needs), val, facts, tuple(notes), tuple(bad))


def records_of(cfg: Config) -> dict[str, list[SceneRecord]]:
    """The scenes of train, and of val unless it names no folders.

    Raises:
        DataError: folders that are missing or empty; all of them together.
    """
    data = cfg.data
    places = {"train": (data.train.data_root, data.train.split, data.train.filtered_scene)}
    if data.val.split:
        places["val"] = (data.val_root, data.val.split, data.val.filtered_scene)
    found, problems = {}, []
    for name, (root, split, filtered) in places.items():
        try:
            folders = list_scenes(root, split, filtered)
        except DataError as error:
            problems.append(f"--data.{name}: {error}")
            continue
        found[name] = [SceneRecord(f, f.relative_to(root).as_posix()) for f in folders]
    if problems:
        raise DataError(listing(problems))
    return found


def _settled(
    parts: Mapping[str, Sequence[SceneRecord]], cfg: Config, needs: Needs
) -> tuple[Facts, list[Bad]]:
    """Facts of the good scenes, and the bad ones, if they may be left out."""
    layout, root = LAYOUTS[cfg.data.layout], Path(cfg.data.train.data_root)
    facts: Facts = {}
    bad: list[Bad] = []
    for split, records in parts.items():
        wanted = needs.wanted(split)
        width = needs.width if "lang_feat" in wanted else None

        def look(record: SceneRecord) -> dict[str, Any]:
            return scene_facts(record.folder, layout, wanted, needs.classes, width)  # noqa: B023

        outcomes = validate(
            records,
            look,
            kind=f"scenesplat scene 1 {cfg.data.layout} {wanted} {needs.classes} {width}",
            root=root if split == "train" else Path(cfg.data.val_root),
            files=SceneRecord.files,
            name=lambda record: str(record.folder),
            what="scenes",
        )
        for record, outcome in zip(records, outcomes, strict=True):
            if outcome.problem:
                bad.append(Bad(split, record.key, outcome.problem))
            else:
                facts[split, record.key] = outcome.value
    good = {split: sum(name == split for name, _ in facts) for split in parts}
    report = None if cfg.dry_run else Path(cfg.save_path) / REPORT
    stop_or_skip(bad, good, cfg.on_bad_sample, cfg.max_bad_fraction, root, report)
    return facts, bad


def fingerprint(splits: Splits) -> str:
    """Identity of what is trained on and validated with: 32 hexadecimal digits.

    Names of the scenes, lengths of their files and counts; not where they lie.

    Raises:
        DataError: a file that was there is gone.
    """
    parts = {"train": list(dict.fromkeys(splits.train.records))}
    if splits.val is not None:
        parts["val"] = splits.val.records
    entries = [
        [split, r.key, splits.facts[split, r.key]["valid"], splits.facts[split, r.key]["labelled"]]
        + [[path.name, file_length(path)] for path in r.files()]
        for split, records in parts.items()
        for r in records
    ]
    return digest_of(*entries)


def updates_per_epoch(cfg: Config, splits: Splits) -> int:
    """Optimizer updates of one pass over the training scenes, over all processes."""
    from lora_core.distributed import world_size

    count = math.ceil(len(splits.train) / (cfg.batch_size * world_size()))
    return math.ceil(count / cfg.gradient_accumulation_steps)


def largest_batch(splits: Splits, count: int) -> dict[str, Any]:
    """A batch of the `count` scenes with the most Gaussians; with fewer, some come twice."""
    train = splits.train
    order = sorted(
        range(len(train)), key=lambda i: -splits.facts["train", train.records[i].key]["rows"]
    )
    return collate([train[order[k % len(order)]] for k in range(count)])
