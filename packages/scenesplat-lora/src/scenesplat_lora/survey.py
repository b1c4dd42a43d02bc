"""A look at all scenes of a run before it begins: what is wrong, what to be careful of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.errors import DataError, listing, one_line
from lora_core.report import plural
from lora_core.shielded import Limits
from lora_core.validate import REPORT, Bad, stop_or_skip, validate
from scenesplat_lora.config import Config
from scenesplat_lora.scenes.facts import scene_facts
from scenesplat_lora.scenes.files import list_scenes
from scenesplat_lora.scenes.values import LAYOUTS
from scenesplat_lora.transforms.pipeline import Spec

Facts = dict[tuple[str, str], Mapping[str, Any]]  # by split and scene
SHOWN = 3  # names of scenes in a note


@dataclass(frozen=True)
class SceneRecord:
    """A scene on disk: `key` is its folder below the data root."""

    folder: Path
    key: str

    def files(self) -> list[Path]:
        """Its arrays."""
        return array_files(self.folder)


def array_files(folder: Path) -> list[Path]:
    """The arrays in a scene's folder."""
    return sorted(folder.glob("*.npy"))


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
            problems += [f"--data.{name}: {line}" for line in str(error).splitlines()]
            continue
        found[name] = [SceneRecord(f, f.relative_to(root).as_posix()) for f in folders]
    if problems:
        raise DataError(listing(problems))
    return found


class Expected(NamedTuple):
    """What the scenes of a split must be; arguments of `scene_facts`."""

    wanted: tuple[str, ...] = ()
    classes: int | None = None
    width: int | None = None
    specs: Sequence[Spec] = ()
    also: tuple[str, ...] = ()


# -- looking ---------------------------------------------------------------------------------------


def settled(
    parts: Mapping[str, Sequence[SceneRecord]], cfg: Config, expected: Mapping[str, Expected]
) -> tuple[Facts, list[Bad]]:
    """Facts of the good scenes, and the bad ones, if they may be left out.

    Args:
        expected: of the scenes of each split.

    Raises:
        DataError: there are bad scenes, and they may not be left out; all of them.
    """
    facts: Facts = {}
    bad: list[Bad] = []
    roots = {"train": Path(cfg.data.train.data_root), "val": Path(cfg.data.val_root)}
    for split, records in parts.items():
        for record, outcome in zip(
            records,
            look_at([r.folder for r in records], cfg.data.layout, expected[split], roots[split]),
            strict=True,
        ):
            if outcome.problem:
                bad.append(Bad(split, record.key, outcome.problem))
            else:
                facts[split, record.key] = outcome.value
    good = Counter(split for split, _ in facts)
    report = None if cfg.dry_run else Path(cfg.save_path) / REPORT
    stop_or_skip(bad, good, cfg.on_bad_sample, cfg.max_bad_fraction, roots["train"], report)
    return facts, bad


def look_at(folders: Sequence[Path], layout: str, expected: Expected, root: Path) -> list[Any]:
    """Facts of every scene or its problem, as `lora_core.validate.validate` gives them."""
    return validate(
        folders,
        lambda folder: scene_facts(folder, LAYOUTS[layout], *expected),
        kind=f"scenesplat scene 2 {layout} {expected}",
        root=root,
        files=array_files,
        what="scenes",
        limits=limits(folders),
    )


def limits(folders: Iterable[Path]) -> Limits:
    """Time and memory for the largest scene: a slow disk gives 10 MB/s.

    Files that are mapped count as memory, whether they are in it or not. Arrays of Gaussians are
    held a few times while they are checked.
    """
    seconds, memory = 60.0, 0
    for folder in folders:
        sizes = {f.name: f.stat().st_size for f in array_files(folder) if f.is_file()}
        whole, features = sum(sizes.values()), sizes.get("lang_feat.npy", 0)
        seconds = max(seconds, 60 + whole / 1e7)
        memory = max(memory, whole + 4 * (whole - features))
    return Limits(seconds, 4 * 2**30 + memory)


# -- remarks ---------------------------------------------------------------------------------------


def remarks(facts: Facts) -> list[str]:
    """What was repaired, once for each kind of repair, and scenes that two splits share."""
    kinds: dict[str, list[str]] = {}
    for (_, key), one in facts.items():
        for note in one["notes"]:
            what, _, much = note.partition(": ")
            place = f"{one_line(key)} ({much})" if much else one_line(key)
            kinds.setdefault(what, []).append(place)
    lines = [f"{what}: {_some(places)}" for what, places in kinds.items()]
    train = {one["same"] for (split, _), one in facts.items() if split == "train"}
    shared = [key for (split, key), one in facts.items() if split == "val" and one["same"] in train]
    if shared:
        names = ", ".join(map(one_line, shared[:SHOWN]))
        lines.append(
            f"{plural(len(shared), 'scene')} of val in train too, so that its scores flatter: "
            f"{names}{', ...' if len(shared) > SHOWN else ''}"
        )
    return lines


def _some(places: Sequence[str]) -> str:
    """All scenes that a note is about where they are few, else how many, and the first."""
    if len(places) <= SHOWN:
        return ", ".join(places)
    return f"{len(places)} scenes, such as {places[0]}"
