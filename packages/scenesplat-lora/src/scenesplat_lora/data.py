"""From folders of scenes to training batches and to scenes for validation.

    splits = load(cfg, needs)   # reads and checks every scene; str(splits) tells what there is
    batch = collate([splits.train[0], splits.train[1]], mix_prob=0.8)

A training sample is a function of (seed, epoch, index) alone: workers, resuming and validation do
not change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lora_core.errors import ConfigError, DataError
from lora_core.pictures.survey import digest_of, file_length, left_out
from lora_core.report import plural, table
from lora_core.training.loading import EpochDataset, retried
from lora_core.validate import Bad, Share, read_and_settle, samples
from scenesplat_lora.config import Config
from scenesplat_lora.scenes import collate as batches
from scenesplat_lora.scenes.files import read_scene
from scenesplat_lora.scenes.manifests import manifest_notes
from scenesplat_lora.scenes.scene import deferred
from scenesplat_lora.scenes.values import LAYOUTS
from scenesplat_lora.survey import Expected, Facts, SceneRecord, records_of, remarks, settled
from scenesplat_lora.transforms.pipeline import (
    LANGUAGE_KEYS,
    Transform,
    compose,
    training_transforms,
    validation_transforms,
)
from scenesplat_lora.transforms.tensors import GAUSSIAN_FEATURES
from scenesplat_lora.transforms.trial import try_out

DRAWS = 5  # of a sample until one has a row to learn from


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

    def wanted(self, split: str, normals: bool = False) -> tuple[str, ...]:
        """Files that a scene of a split must have besides its Gaussians.

        Args:
            normals: whether transforms ask for normals that the network does not need.
        """
        normal = ("normal",) if normals or self.channels == 14 else ()
        if split == "val" and (self.classes is not None or not self.language):
            return ("segment", *normal)
        return ("lang_feat" if self.language else "segment", *normal)


# -- the sets --------------------------------------------------------------------------------------


class TrainSet(EpochDataset[SceneRecord, dict[str, Any]]):
    """Scenes as training samples, augmented anew in every epoch.

    A sample in which nothing can be learned, as where a crop has no row with a feature, is drawn
    again from the same generator, up to `DRAWS` times.
    """

    def __init__(self, records: Sequence[SceneRecord], cfg: Config, needs: Needs) -> None:
        super().__init__(
            [record for record in records for _ in range(cfg.data.train.loop)], cfg.seed
        )
        self.cfg, self.needs = cfg, needs
        self.steps, self.wanted = transform(cfg, needs, "train"), wanted_of(cfg, needs, "train")
        # By index: draws that were thrown away, and samples without anything to learn all the same.
        # Shared memory: workers count for the process that they load for.
        self.counts = torch.zeros(2, len(self.records), dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, thrown, empty = self.drawn(index)
        self.counts[:, index] += torch.tensor([thrown, empty])
        return sample

    def drawn(self, index: int) -> tuple[dict[str, Any], int, bool]:
        """A sample, the draws before it, and whether there is nothing to learn in it."""
        record, rng = self.records[index], self.rng(index)
        layout = LAYOUTS[self.cfg.data.layout]
        scene = deferred(retried(lambda: read_scene(record.folder, layout, self.wanted)))
        scene["name"] = record.key
        sample, thrown = self.steps(scene, rng), 0
        while not learnable(sample, self.needs) and thrown < DRAWS - 1:
            sample, thrown = self.steps(scene, rng), thrown + 1
        progress = min(int(self._epoch) / self.cfg.epoch, 1.0)
        done = sample | {"mix": float(rng.random()), "progress": progress}
        return done, thrown, not learnable(sample, self.needs)

    def remarks(self) -> list[str]:
        """What happened to samples since the beginning, if anything did."""
        thrown, empty = self.counts.sum(dim=1).tolist()
        lines = []
        if thrown:
            lines.append(
                f"{plural(thrown, 'sample')} drawn again: no row was left to learn from, as where "
                "a crop has none with a feature or label"
            )
        if empty:
            lines.append(f"{plural(empty, 'sample')} had no such row in {DRAWS} draws: no update")
        return lines


class ValSet:
    """Scenes in the order of their names, read when they are asked for, always the same.

    Where labels are what counts, those that have language features are given with them.
    """

    def __init__(self, records: Sequence[SceneRecord], cfg: Config, needs: Needs) -> None:
        self.records, self.cfg, self.needs = list(records), cfg, needs
        kinds = (needs, replace(needs, classes=None))  # without language features, and with them
        self.ways = [(transform(cfg, kind, "val"), wanted_of(cfg, kind, "val")) for kind in kinds]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        layout = LAYOUTS[self.cfg.data.layout]
        for number, record in enumerate(self.records):
            steps, wanted = self.ways[(record.folder / "lang_feat.npy").exists()]
            scene = retried(lambda: read_scene(record.folder, layout, wanted))  # noqa: B023 - now
            sample = steps(deferred(scene) | {"name": record.key}, np.random.default_rng(number))
            yield collate([sample | {"mix": 1.0, "progress": 1.0}])


def specs_of(cfg: Config, needs: Needs, split: str) -> list[dict[str, Any]]:
    """The transforms of a split as files write them, its own or the official ones."""
    data = cfg.data
    own = data.train.transform if split == "train" else data.val.transform
    if own:
        return own
    learned = ("lang_feat", "valid_feat_mask")
    features = "lang_feat" in needs.wanted(split)
    keys = [key for key in LANGUAGE_KEYS if features or key not in learned]
    specs = (
        training_transforms(keys, data.voxels, data.point_max)
        if split == "train"
        else validation_transforms(keys, data.voxels)
    )
    if split == "val":  # nothing is asked of a labelled cloud here
        specs = [spec for spec in specs if spec["type"] != "LabelledCloudSample"]
    specs[-1] = specs[-1] | {"feat_keys": needs.feat_keys}
    return specs


def wanted_of(cfg: Config, needs: Needs, split: str) -> tuple[str, ...]:
    """Files that a scene of a split must have besides its Gaussians."""
    specs = specs_of(cfg, needs, split)
    asked = [spec.get(name, ()) for spec in specs for name in ("keys", "feat_keys", "keys_dict")]
    return needs.wanted(split, any("normal" in names for names in asked))


def transform(cfg: Config, needs: Needs, split: str) -> Transform:
    """The transforms of a split, tried on a made scene.

    Raises:
        ConfigError: an unknown transform or argument, one that cannot work, or a list whose end is
            not what the network is trained with.
    """
    specs, place = specs_of(cfg, needs, split), f"data.{split}.transform"
    steps, wanted = compose(specs, place), wanted_of(cfg, needs, split)
    sample = try_out(specs, place, wanted)
    ends = ("feat", "grid_coord", "offset", *(n for n in wanted if n in ("segment", "lang_feat")))
    missing = [name for name in ends if name not in sample]
    if missing:
        raise ConfigError(
            f"{place}: samples have no {', '.join(missing)}: end with ToTensor and a Collect with "
            f"keys={[*LANGUAGE_KEYS]} and feat_keys={needs.feat_keys}"
        )
    if sample["feat"].shape[1] != needs.channels:
        raise ConfigError(
            f"{place}: feat_keys of Collect give {sample['feat'].shape[1]} channels, the network "
            f"takes {needs.channels}: feat_keys={needs.feat_keys}"
        )
    return steps


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
        counts = {"Gaussians": "rows", "with language": "valid", "with label": "labelled"}
        # What a run has no use for is not counted.
        shown = {
            title: key for title, key in counts.items() if any(f[key] for f in self.facts.values())
        }
        rows = []
        for split in ("train", "val"):
            found = [facts for (name, _), facts in self.facts.items() if name == split]
            if found:
                sums = [sum(one[key] for one in found) for key in shown.values()]
                rows.append((split, len(found), *(f"{count:,}" for count in sums)))
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([table(("split", "scenes", *shown), rows), *notes])


def load(cfg: Config, needs: Needs, share: Share = lambda make: make()) -> Splits:
    """Find the scenes of a configuration, and look at every one wholly.

    Bad scenes stop this, or are left out, as `cfg.on_bad_sample` says.

    Args:
        share: calls its argument in the first process of the run and gives its value in all.

    Raises:
        DataError: no scenes, or faults in them: all of them together.
    """
    parts, (facts, bad) = read_and_settle(
        lambda: records_of(cfg), lambda found: settled(found, cfg, expected(cfg, needs)), share
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
    notes = [*remarks(facts), *manifest_notes(cfg), *left_out(bad)]
    if idle := len(good["train"]) - len(chosen):
        notes.append(f"{plural(idle, 'scene')} of train with nothing to learn from are left out")
    val = ValSet(good["val"], cfg, needs) if good.get("val") else None
    if val is None:
        notes.append("no validation scenes: the best adapter is the last")
    return Splits(TrainSet(chosen, cfg, needs), val, facts, tuple(notes), tuple(bad))


def expected(cfg: Config, needs: Needs) -> dict[str, Expected]:
    """What the scenes of each split must be."""
    found = {}
    for split in ("train", "val"):
        wanted = wanted_of(cfg, needs, split)
        also = ("lang_feat",) if needs.language else ()
        found[split] = Expected(
            wanted, needs.classes, needs.width, specs_of(cfg, needs, split), also
        )
    return found


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
    return collate([train.drawn(order[k % len(order)])[0] for k in range(count)])
