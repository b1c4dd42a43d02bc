"""`scenesplat-lora prepare import`: labels of raw data sets, with or without your splats.

With --splats, a scene folder for every scan that has a splat: the Gaussians' five files, the
labelled cloud (`pc_coord`, `pc_segment*`), and `segment*` and `instance` of every Gaussian from the
nearest labelled vertex. Without, the cloud alone, written into scene folders that are there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, near, one_line
from lora_core.guards import unnamed
from lora_core.preflight import writable
from lora_core.report import plural, say
from scenesplat_lora.prepare import ShardOptions, tell
from scenesplat_lora.raw.scans import Cloud, RawDataset, read_lines
from scenesplat_lora.scenes.files import ON_DISK, write_scene
from scenesplat_lora.scenes.ply import read_gaussians
from scenesplat_lora.scenes.records import Job, Ledger, run_all, unfinished
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.scenes.sources import find_sources
from scenesplat_lora.scenes.values import LAYOUTS, Layout

TEXT = "Bring the labels of ScanNet, ScanNet++ or Matterport3D to scenes of Gaussians."
FEWEST = 0.01  # share of labelled Gaussians below which splat and mesh cannot be of one frame
EXPECTED = {
    "scannet": "scans/scene0000_00",
    "scannetpp": "data/<id>/scans",
    "matterport": "v1/scans/<house>/region_segmentations/region0.ply",
}


@dataclass(kw_only=True)
class Options(ShardOptions):
    """Settings of `scenesplat-lora prepare import`."""

    dataset: Literal["scannet", "scannetpp", "matterport"] = option(
        MISSING, "Whose folders --source holds.", "data"
    )
    source: str = option(MISSING, "The data set as its authors distribute it.", "data")
    splats: str | None = option(
        None,
        "Folder of 3D Gaussian .ply files, named as the scans, in the frame of their meshes; "
        "without it, clouds are written into scene folders that are there.",
        "data",
    )
    output: str = option("data", "Folder of the splits.", "data")
    split: str = option("train", "Folder in it for these scenes.", "data")
    scenes: str | None = option(
        None, "List of scans, one per line, such as scannetv2_train.txt; default: all.", "data"
    )
    classes: str | None = option(
        None, "ScanNet++: list of classes, one per line; default: its top100.txt.", "classes"
    )
    label_map: str | None = option(
        None,
        "ScanNet++: map_benchmark.csv; Matterport3D: category_mapping.tsv; default: in the data "
        "set's metadata.",
        "classes",
    )
    max_distance: float = option(
        0.1, "Metres; a Gaussian farther from every labelled vertex has no label.", "data"
    )

    def __post_init__(self) -> None:
        problems = self.shard_problems()
        problems += unnamed(self, ("source", "splats", "output", "scenes", "classes", "label_map"))
        if not 0 < self.max_distance < 100:
            problems.append(f"--max_distance is {self.max_distance}: it must be metres above 0")
        if Path(self.split).name != self.split or self.split.startswith("."):
            problems.append(f"--split is {self.split!r}: it must be the name of one folder")
        if self.classes is not None and self.dataset != "scannetpp":
            problems.append(f"--classes is for scannetpp: {self.dataset} has classes of its own")
        if self.label_map is not None and self.dataset == "scannet":
            problems.append("--label_map: the labels of scannet need none")
        if problems:
            raise ConfigError(listing(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    options = parse(Options, argv or [], prog="scenesplat-lora prepare import", description=TEXT)
    writable(options.output, "--output")
    data = raw_dataset(options)
    folder, layout = Path(options.output) / options.split, LAYOUTS[options.dataset]
    names = chosen(data, options)
    listed = options.scenes is not None
    settings = {"dataset": options.dataset, "splats": options.splats is not None, **data.settings}
    splats: dict[str, Path] = {}
    if options.splats is None:
        jobs = cloud_jobs(data, names, folder, layout, listed)
    else:
        splats = {s.name: s.path for s in find_sources([options.splats], folders=False)}
        jobs = scene_jobs(data, names, folder, splats, listed)
        settings["max_distance"] = options.max_distance
    work = Work(data, layout, splats, options.max_distance)
    ledger = Ledger(folder, "import", settings)
    write = work.write_scene if splats else work.write_cloud
    done = run_all(ledger, jobs, options.shard(), write, options.overwrite)
    if work.unlabelled:
        count = plural(len(work.unlabelled), "scene")
        say(f"import: {count} without a labelled vertex: {some(work.unlabelled)}")
    tell("import", *done, folder.absolute())
    return 0


def raw_dataset(options: Options) -> RawDataset:
    """The scans at --source.

    Raises:
        DataError: there are none, or a list of classes cannot be used.
    """
    from scenesplat_lora.raw.matterport import matterport
    from scenesplat_lora.raw.scannet import scannet
    from scenesplat_lora.raw.scannetpp import scannetpp

    source = Path(options.source)
    classes = Path(options.classes) if options.classes else None
    label_map = Path(options.label_map) if options.label_map else None
    if not source.is_dir():
        raise DataError(f"--source: {one_line(source.absolute())}: no such folder")
    match options.dataset:
        case "scannet":
            data = scannet(source)
        case "scannetpp":
            data = scannetpp(source, classes, label_map)
        case "matterport":
            data = matterport(source, label_map)
    if not data.scans:
        raise DataError(
            f"--source: {one_line(source.absolute())}: no scans of {options.dataset}; expected "
            f"{EXPECTED[options.dataset]}"
        )
    return data


# -- which scenes ----------------------------------------------------------------------------------


def chosen(data: RawDataset, options: Options) -> list[str]:
    """Names of the scans of --scenes, or all.

    Raises:
        DataError: names that the data set does not have, all of them; or an empty list.
    """
    if options.scenes is None:
        return sorted(data.scans)
    lines = read_lines(Path(options.scenes))
    unknown = [name for name in lines if name not in data.scans and name not in data.groups]
    if unknown or not lines:
        hints = [near(name, data.scans) for name in unknown]
        found = [f"{one_line(n)}{h and f'; {h}'}" for n, h in zip(unknown, hints, strict=True)]
        problems = [f"--scenes: no scan {problem}" for problem in found] or ["--scenes: is empty"]
        raise DataError(listing(problems))
    return sorted({scan for name in lines for scan in data.groups.get(name, [name])})


def scene_jobs(
    data: RawDataset, names: list[str], folder: Path, splats: dict[str, Path], listed: bool
) -> list[Job]:
    """A job for every scan with a splat.

    Raises:
        DataError: a scan of --scenes has no splat, or no scan has one.
    """
    lacking = [name for name in names if name not in splats]
    if len(lacking) == len(names):
        raise DataError(
            f"--splats: no splat has the name of a scan: there are {some(splats)}, expected "
            f"{some(names)} (office.ply, office/point_cloud.ply are both called office)"
        )
    if lacking and listed:
        raise DataError(listing([f"--splats: no splat of {name}" for name in lacking]))
    foreign = [name for name in splats if name not in data.scans]
    if foreign:
        say(f"import: {plural(len(foreign), 'splat')} of no scan left out: {some(foreign)}")
    if lacking:
        say(f"import: {plural(len(lacking), 'scan')} without splat left out: {some(lacking)}")
    return [
        Job(name, (*_files(data, name), splats[name]), folder, _place(name))
        for name in names
        if name in splats
    ]


def cloud_jobs(
    data: RawDataset, names: list[str], folder: Path, layout: Layout, listed: bool
) -> list[Job]:
    """A job for every scan with a scene folder.

    Raises:
        DataError: a scan of --scenes has no scene folder, or no scan has one.
    """
    lacking = [name for name in names if not (folder / name / "coord.npy").exists()]
    if lacking and (listed or len(lacking) == len(names)):
        raise DataError(
            f"{one_line(folder.absolute())}: no scene folders {some(lacking)}: give --splats, or "
            "`scenesplat-lora prepare ply` first"
        )
    if lacking:
        say(f"import: {plural(len(lacking), 'scan')} without folder left out: {some(lacking)}")
    outputs = re.compile(rf"pc_coord\.npy|pc_{layout.segment}\.npy")
    there = [name for name in names if name not in lacking]
    return [Job(name, _files(data, name), folder / name, outputs) for name in there]


def some(names: Sequence[str] | dict[str, Path]) -> str:
    """The first few of these names."""
    listed = sorted(names)
    return ", ".join(one_line(name) for name in listed[:3]) + ", ..." * (len(listed) > 3)


def _files(data: RawDataset, name: str) -> tuple[Path, ...]:
    return tuple(path for path in data.scans[name].files.values() if path.exists())


def _place(name: str) -> re.Pattern[str]:
    name = re.escape(name)
    return re.compile(f"{name}|{unfinished(name)}")


# -- one scene -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What turns a scan into files.

    Attributes:
        splats: .ply files by scan. reach: metres of labels.
        unlabelled: takes the names of scans without a labelled vertex.
    """

    data: RawDataset
    layout: Layout
    splats: dict[str, Path]
    reach: float
    unlabelled: list[str] = field(default_factory=list)

    def write_scene(self, job: Job) -> dict[str, Any]:
        """Write a scene; gives its Gaussians, those with a label, and its cloud's points."""
        splat = self.splats[job.name]
        scene, cloud = read_gaussians(splat), self.data.read(self.data.scans[job.name])
        facts = {"rows": len(scene["coord"]), "labelled": 0, "points": 0}
        if cloud is not None:
            scene |= {"pc_coord": cloud.coord, "pc_segment": cloud.segment}
            scene |= labels_of(scene["coord"], cloud, self.reach)
            facts |= {"labelled": known(scene["segment"]), "points": len(cloud.coord)}
        if cloud is None or not known(cloud.segment):
            self.unlabelled.append(job.name)
        elif facts["labelled"] < FEWEST * facts["rows"]:
            raise DataError(
                f"{one_line(splat)}: {facts['labelled']} of {facts['rows']} Gaussians are within "
                f"{self.reach} m of a labelled vertex of {job.name}: splats must be in the frame "
                "of the mesh, in metres"
            )
        write_scene(job.place / job.name, scene, self.layout)
        return facts

    def write_cloud(self, job: Job) -> dict[str, Any]:
        """Write a scan's cloud into its scene folder; gives points, and those with a label."""
        from lora_core.tensor_file import atomic_write

        cloud = self.data.read(self.data.scans[job.name])
        if cloud is None:
            raise DataError(f"{one_line(job.name)}: the data set has no labels of it")
        if not known(cloud.segment):
            self.unlabelled.append(job.name)
        files = {"pc_coord": cloud.coord, "pc_segment": cloud.segment}
        for name, values in files.items():
            stem = name.replace("segment", self.layout.segment)
            with atomic_write(job.place / f"{stem}.npy") as file:
                np.save(file, values.astype(ON_DISK[name], copy=False))
        return {"points": len(cloud.coord), "labelled": known(cloud.segment)}


def labels_of(coord: NDArray[np.float32], cloud: Cloud, reach: float) -> Scene:
    """`segment` and `instance` of Gaussians: those of the nearest labelled vertex, or -1.

    Args:
        coord: [N, 3]. reach: metres; vertices farther away do not count.
    """
    from scipy.spatial import cKDTree

    rows = np.flatnonzero(first_column(cloud.segment) >= 0)
    nearest = np.full(len(coord), len(rows))  # the tree's number of "none" is its size
    if len(rows):
        _, nearest = cKDTree(cloud.coord[rows]).query(coord, distance_upper_bound=reach)
    found = {}
    for name, values in (("segment", cloud.segment), ("instance", cloud.instance)):
        if values is not None:
            none = np.full((1, *values.shape[1:]), -1, values.dtype)
            found[name] = np.concatenate([values[rows], none])[nearest]
    return found


def known(labels: NDArray[np.int32]) -> int:
    """How many rows have a label."""
    return int((first_column(labels) >= 0).sum())


def first_column(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """The labels that count, [P], of [P] or [P, k]."""
    return labels if labels.ndim == 1 else labels[:, 0]
