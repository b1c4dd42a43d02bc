"""`scenesplat-lora prepare lang-feat`: language features of Gaussians from their labels.

    lang_feat_i = t_c / |t_c|,  valid_feat_mask_i = 1   for the label c of Gaussian i
    lang_feat_i = 0,            valid_feat_mask_i = 0   without a label

with the text embedding t_c of class c (the mean of several). Both files are written into the scene
folders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from scenesplat_lora.model_options import LayoutName
from scenesplat_lora.prepare import ShardOptions, tell
from scenesplat_lora.records import Job, Ledger, run_all
from scenesplat_lora.scene import Scene
from scenesplat_lora.scene_files import list_scenes, read_scene
from scenesplat_lora.scene_values import LAYOUTS

if TYPE_CHECKING:
    from scenesplat_lora.text_embeddings import TextEmbeddings

TEXT = "Give labelled scenes language features: the text embedding of each Gaussian's class."
ROWS_AT_ONCE = 65_536  # 100 MB of features
OUTPUTS = re.compile(r"lang_feat\.npy|valid_feat_mask\.npy")


@dataclass(kw_only=True)
class Options(ShardOptions):
    """Settings of `scenesplat-lora prepare lang-feat`."""

    data_root: str = option("data", "Folder of the splits.", "data")
    split: str = option("train", "Split whose scenes get features.", "data")
    layout: LayoutName = option("generic", "Which data set's files a scene folder holds.", "data")
    text: str = option(MISSING, "Text embeddings of the class names: .pt or .npz.", "classes")
    names: str | None = option(
        None,
        "Class names, one per line; default: in the .npz, or the .txt beside the .pt.",
        "classes",
    )
    prompt_classes: list[int] = option(
        [], "Class number of each text, where several are of one class.", "classes"
    )
    labels: Literal["auto", "gaussians", "cloud"] = option(
        "auto",
        "Where labels come from: those of Gaussians, or the nearest point of the labelled cloud "
        "(pc_coord, pc_segment), which auto takes where Gaussians have no file of labels.",
        "data",
    )
    max_distance: float = option(
        0.1, "Metres; a Gaussian farther from every labelled point of the cloud has none.", "data"
    )

    def __post_init__(self) -> None:
        problems = self.shard_problems()
        if not self.max_distance > 0:
            problems.append(f"--max_distance is {self.max_distance}: it must be metres above 0")
        if problems:
            raise ConfigError(listing(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    options = parse(Options, argv or [], prog="scenesplat-lora prepare lang-feat", description=TEXT)
    from scenesplat_lora.text_embeddings import read_text_embeddings

    text = read_text_embeddings(options.text, options.names, options.prompt_classes or None)
    table = class_features(text)
    folder = Path(options.data_root) / options.split
    jobs = [_job(scene, options) for scene in list_scenes(options.data_root, options.split)]
    ledger = Ledger(folder, "lang-feat", _settings(options, text, table))
    work = partial(_write, table=table, names=text.names, options=options)
    tell(
        "lang-feat",
        *run_all(ledger, jobs, options.shard(), work, options.overwrite),
        folder.absolute(),
    )
    return 0


def _settings(options: Options, text: TextEmbeddings, table: NDArray[np.float16]) -> dict[str, Any]:
    import hashlib

    return {
        "classes": list(text.names),
        "features": hashlib.blake2b(table.tobytes(), digest_size=16).hexdigest(),
        "layout": options.layout,
        "labels": options.labels,
        "max_distance": options.max_distance,
    }


def class_features(text: TextEmbeddings) -> NDArray[np.float16]:
    """Unit vector of every class, float16 [C, D]: the mean of its texts, normalised."""
    classes, texts = np.array(text.classes), text.features.numpy()
    means = np.stack([texts[classes == c].mean(axis=0) for c in range(len(text.names))])
    length = np.linalg.norm(means, axis=1, keepdims=True)
    if (length < 1e-3).any():
        lost = ", ".join(text.names[c] for c in np.flatnonzero(length < 1e-3))
        raise DataError(f"the texts of {lost} point in opposite directions: their mean is 0")
    return (means / length).astype(np.float16)


def _job(scene: Path, options: Options) -> Job:
    stem = LAYOUTS[options.layout].segment
    names = ("coord", stem, "pc_coord", f"pc_{stem}")
    files = [scene / f"{name}.npy" for name in names]
    return Job(scene.name, tuple(f for f in files if f.exists()), scene, OUTPUTS)


def _write(
    job: Job, table: NDArray[np.float16], names: Sequence[str], options: Options
) -> dict[str, Any]:
    """Write the features of a scene; gives its Gaussians, and those with a feature."""
    from lora_core.tensor_file import atomic_write

    labels = scene_labels(job.place, options)
    highest = int(labels.max(initial=-1))
    if highest >= len(table):
        raise DataError(
            f"{one_line(job.place)}: label {highest}, but there are {len(table)} classes (0 is "
            f"{one_line(names[0])})"
        )
    if highest < 0:
        raise DataError(f"{one_line(job.place)}: no Gaussian has a label: nothing to learn from")
    with atomic_write(job.place / "lang_feat.npy") as file:
        _write_rows(file, labels, table)
    with atomic_write(job.place / "valid_feat_mask.npy") as file:
        np.save(file, labels >= 0)
    return {"rows": len(labels), "valid": int((labels >= 0).sum())}


def scene_labels(folder: Path, options: Options) -> NDArray[np.integer]:
    """The class of every Gaussian of a scene, [N]; -1: none.

    Raises:
        DataError: what is wrong with the scene, or it has no labels.
    """
    layout = LAYOUTS[options.layout]
    own = (folder / f"{layout.segment}.npy").exists()
    if options.labels == "gaussians" or (options.labels == "auto" and own):
        labels: NDArray[np.integer] = read_scene(folder, layout, ("segment",))["segment"]
        return labels
    if options.labels == "auto" and not (folder / "pc_coord.npy").exists():
        raise DataError(
            f"{one_line(folder)}: no labels: expected {layout.segment}.npy (one class number per "
            f"Gaussian), or pc_coord.npy and pc_{layout.segment}.npy (a labelled point cloud)"
        )
    return nearest_labels(read_scene(folder, layout, ("pc",)), options.max_distance)


def nearest_labels(scene: Scene, max_distance: float) -> NDArray[np.integer]:
    """Label of the nearest labelled point of the cloud within `max_distance` metres; -1: none."""
    from scipy.spatial import cKDTree

    labelled = scene["pc_segment"] >= 0
    if not labelled.any():
        return np.full(len(scene["coord"]), -1)
    tree = cKDTree(scene["pc_coord"][labelled])
    _, nearest = tree.query(scene["coord"], distance_upper_bound=max_distance)
    known = np.append(scene["pc_segment"][labelled], -1)  # the tree's number of "none" is its size
    found: NDArray[np.integer] = known[nearest]
    return found


def _write_rows(file: BinaryIO, labels: NDArray[np.integer], table: NDArray[np.float16]) -> None:
    """Write float16 [N, D] as .npy: the class's row, or zeros; a block of rows at a time."""
    zeros = np.zeros((1, table.shape[1]), np.float16)
    rows = np.concatenate([table, zeros])  # -1 is its last
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(labels), table.shape[1])}
    np.lib.format.write_array_header_1_0(file, header)
    for begin in range(0, len(labels), ROWS_AT_ONCE):
        file.write(rows[labels[begin : begin + ROWS_AT_ONCE]].astype("<f2").tobytes())
