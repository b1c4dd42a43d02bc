"""From folders of scenes to training batches and to scenes for validation.

    splits = load(cfg)                     # looks at every scene; str(splits) tells what there is
    train = TrainSet(splits.train, encodings, cfg, latent_channels)
    batch = collate([train[0], train[1]])

A training sample is a function of (seed, epoch, index) alone: workers, resuming and the cache do
not change it. A scene gives its instances as rows, of which all share a noise level.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.errors import DataError, listing
from lora_core.pictures.survey import digest_of, left_out
from lora_core.report import plural, table
from lora_core.training.loading import EpochDataset, retried
from lora_core.validate import REPORT, Bad, Share, read_and_settle, samples, stop_or_skip, validate
from midi3d_lora.config import Config
from midi3d_lora.encoder_cache import Encodings, Scene, content_digest
from midi3d_lora.flow.losses import Weighting, draw_dropped_scenes
from midi3d_lora.scenes.scene_folders import (
    SceneSettings,
    list_scenes,
    remarks,
    scene_facts,
    scene_files,
)

FEWEST_FOR_VALIDATION = 10  # scenes from which some are kept out of training
Facts = dict[tuple[str, str], Mapping[str, Any]]  # by split and scene


def scene_settings(cfg: Config) -> SceneSettings:
    """How the scenes of a configuration are read."""
    return SceneSettings(cfg.image_size, cfg.num_points, cfg.normalize)


# -- the scenes ------------------------------------------------------------------------------------


def folders_of(cfg: Config) -> dict[str, list[Path]]:
    """The scenes' folders, of train, and of val if there is any.

    Raises:
        DataError: folders that are missing or empty; all of them together.
    """
    places = {"train": cfg.data_dir} | ({"val": cfg.val_data_dir} if cfg.val_data_dir else {})
    found, problems = {}, []
    for split, place in places.items():
        try:
            found[split] = list_scenes(place)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listing(problems))
    if not cfg.val_data_dir:
        found |= _divided(found["train"], cfg.val_fraction)
    return found


def _divided(folders: Sequence[Path], share: float) -> dict[str, list[Path]]:
    """Scenes for training and validation: by the digests of their names.

    More scenes leave most of those that were kept out where they are.
    """
    count = int(share * len(folders)) if len(folders) >= FEWEST_FOR_VALIDATION else 0
    order = sorted(folders, key=lambda folder: hashlib.sha256(folder.name.encode()).digest())
    kept_out = set(order[:count])
    parts = {"train": [f for f in folders if f not in kept_out]}
    return parts | ({"val": [f for f in folders if f in kept_out]} if kept_out else {})


@dataclass(frozen=True)
class Splits:
    """The scenes of a run. `str()` tells what they are, and what to be careful about."""

    train: list[Scene]
    val: list[Scene]
    notes: tuple[str, ...] = ()
    bad: tuple[Bad, ...] = ()  # what was left out, and why

    def __str__(self) -> str:
        rows = [
            (name, len(scenes), sum(s.rows for s in scenes), max(s.rows for s in scenes))
            for name, scenes in (("train", self.train), ("val", self.val))
            if scenes
        ]
        head = ("split", "scenes", "instances", "most in a scene")
        return "\n".join([table(head, rows), *(f"note: {note}" for note in self.notes)])


def load(cfg: Config, share: Share = lambda make: make()) -> Splits:
    """Find the scenes of a configuration, and look at every one wholly.

    Bad scenes stop this, or are left out, as `cfg.on_bad_sample` says.

    Args:
        share: calls its argument in the first process of the run and gives its value in all.

    Raises:
        DataError: no scenes, or faults in them: all of them together.
    """
    parts, (facts, bad) = read_and_settle(
        lambda: folders_of(cfg), lambda found: _settled(found, cfg), share
    )
    gone = samples(bad)
    good = {
        (split, folder.name): folder
        for split, folders in parts.items()
        for folder in folders
        if (split, folder.name) not in gone
    }
    if other := sorted(good.keys() ^ facts.keys()):
        raise DataError(
            f"{cfg.data_dir}: not the scenes that the first process of the run sees, such as "
            f"{other[0][1]}; all machines need the same data set"
        )
    found: dict[str, list[Scene]] = {"train": [], "val": []}
    for (split, name), folder in good.items():
        one = facts[split, name]
        found[split].append(Scene(folder, name, len(one["labels"]), one["content"]))
    if not found["train"]:
        raise DataError(f"{cfg.data_dir}: no scene is left to train on")
    notes = [*remarks({name: one for (_, name), one in facts.items()}), *left_out(bad)]
    if not found["val"]:
        notes.append("no validation scenes: lora-final is the last step")
    notes += _shared(found)
    return Splits(found["train"], found["val"], tuple(notes), tuple(bad))


def _settled(parts: Mapping[str, Sequence[Path]], cfg: Config) -> tuple[Facts, list[Bad]]:
    """Facts of the good scenes, and the bad ones, if they may be left out.

    Raises:
        DataError: there are bad scenes, and they may not be left out; all of them.
    """
    settings, facts, bad = scene_settings(cfg), Facts(), list[Bad]()
    for split, folders in parts.items():
        root = Path(cfg.val_data_dir if split == "val" and cfg.val_data_dir else cfg.data_dir)
        outcomes = validate(
            folders,
            lambda folder: scene_facts(folder, settings) | {"content": content_digest(folder)},
            kind=f"midi3d training scene 1 {settings}",
            root=root,
            files=scene_files,
            what="scenes",
        )
        for folder, outcome in zip(folders, outcomes, strict=True):
            if outcome.problem:
                bad.append(Bad(split, folder.name, outcome.problem))
            else:
                facts[split, folder.name] = outcome.value
    good = Counter(split for split, _ in facts)
    report = None if cfg.dry_run else Path(cfg.output_dir) / REPORT
    stop_or_skip(bad, good, cfg.on_bad_sample, cfg.max_bad_fraction, Path(cfg.data_dir), report)
    return facts, bad


def _shared(found: Mapping[str, Sequence[Scene]]) -> list[str]:
    """A line about scenes that are in both splits, if there are any."""
    train = {scene.content for scene in found["train"]}
    both = [scene.key for scene in found["val"] if scene.content in train]
    if not both:
        return []
    return [
        f"{plural(len(both), 'scene')} of val in train too, so that the validation loss flatters: "
        f"{', '.join(both[:3])}"
    ]


def fingerprint(splits: Splits) -> str:
    """Identity of what is trained on and validated with: 32 hexadecimal digits."""
    parts = (("train", splits.train), ("val", splits.val))
    return digest_of(*([name, s.key, s.content] for name, scenes in parts for s in scenes))


def updates_per_epoch(cfg: Config, splits: Splits) -> int:
    """Optimizer updates of one pass over the training scenes, over all processes."""
    from lora_core.distributed import world_size

    batches = math.ceil(len(splits.train) / (cfg.batch_size * world_size()))
    return math.ceil(batches / cfg.gradient_accumulation_steps)


# -- samples and batches ---------------------------------------------------------------------------


class TrainSet(EpochDataset[Scene, dict[str, Any]]):
    """Scenes with what is random in a step of training: noise, its level, who sees whom.

    Args:
        latent_channels: C of an instance's latents.
    """

    def __init__(
        self, scenes: Sequence[Scene], encodings: Encodings, cfg: Config, latent_channels: int
    ) -> None:
        super().__init__(scenes, cfg.seed)
        self.encodings, self.cfg = encodings, cfg
        self.weighting = Weighting(cfg.weighting_scheme, cfg.logit_mean, cfg.logit_std)
        self.latents = (encodings.plan.num_tokens, latent_channels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, rng = self.records[index], self.rng(index)
        draw = int(self._epoch) % self.encodings.plan.draws
        chosen = chosen_rows(scene.rows, self.cfg.max_instances, rng)
        apart = bool(rng.random() < self.cfg.single_object_ratio)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        shape = (len(chosen), *self.latents)
        return {
            "key": scene.key,
            "encoding": retried(lambda: self.encodings.sample(scene, draw)),
            "chosen": chosen,
            "apart": apart,
            "sigma": self.weighting.draw(1, generator),
            "dropped": draw_dropped_scenes(1, self.cfg.guidance_dropout, generator),
            "posterior_noise": torch.randn(shape, generator=generator),
            "noise": torch.randn(shape, generator=generator),
        }


def chosen_rows(rows: int, most: int, rng: np.random.Generator) -> Tensor:
    """Which instances of a scene are trained, int64 ascending: all, or `most` of them."""
    if rows <= most:
        return torch.arange(rows)
    return torch.from_numpy(np.sort(rng.choice(rows, most, replace=False)))


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of S scenes with R rows together.

    Returns:
        `encodings` and `chosen` by scene; `sigmas` f32 [S] before the shift, `dropped` bool [S];
        `noise` and `posterior_noise` f32 [R, N, C]; `scene_of_row` i64 [R]; `instance_groups`, R
        numbers: rows with equal ones see each other; `keys`, the scenes' names.
    """
    counts = [len(one["chosen"]) for one in samples]
    groups: list[int] = []
    for one, count in zip(samples, counts, strict=True):
        first = len(groups)
        groups += range(first, first + count) if one["apart"] else [first] * count
    return {
        "keys": [one["key"] for one in samples],
        "encodings": [one["encoding"] for one in samples],
        "chosen": [one["chosen"] for one in samples],
        "sigmas": torch.cat([one["sigma"] for one in samples]),
        "dropped": torch.cat([one["dropped"] for one in samples]),
        "posterior_noise": torch.cat([one["posterior_noise"] for one in samples]),
        "noise": torch.cat([one["noise"] for one in samples]),
        "scene_of_row": torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)),
        "instance_groups": groups,
    }


def rows_of(batch: Mapping[str, Any]) -> float:
    """Rows of a batch, which its loss is the mean over."""
    return float(len(batch["instance_groups"]))


def largest_batch(
    rows: Iterable[int], scenes: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """A batch of the scenes with most rows, with zeros for their encodings.

    Args:
        rows: of every scene, at most as many as are trained at a time.
        shapes: of one row's `Encoded`, by name.
    """
    most = sorted(rows, reverse=True)[:scenes]
    latents = shapes["mean"]
    return collate(
        [
            {
                "key": f"scene of {plural(count, 'instance')}",
                "encoding": {name: torch.zeros(count, *shape) for name, shape in shapes.items()},
                "chosen": torch.arange(count),
                "apart": False,
                "sigma": torch.full((1,), 0.5),
                "dropped": torch.zeros(1, dtype=torch.bool),
                "posterior_noise": torch.zeros(count, *latents),
                "noise": torch.zeros(count, *latents),
            }
            for count in most
        ]
    )
