"""`scenesplat-lora prepare lang-feat`: language features of Gaussians, written into the scenes.

From labels:

    lang_feat_i = t_c / |t_c|,  valid_feat_mask_i = 1   for the label c of Gaussian i
    lang_feat_i = 0,            valid_feat_mask_i = 0   without a label

with the text embedding t_c of class c (the mean of several). With --images, from the masks of posed
images: see `back_projection`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.guards import count_problem, unnamed
from scenesplat_lora.model_options import LayoutName
from scenesplat_lora.posed.lang_feat_files import OUTPUTS, write_features
from scenesplat_lora.prepare import ShardOptions, tell
from scenesplat_lora.scenes.files import list_scenes, read_scene
from scenesplat_lora.scenes.records import Job, Ledger, run_all
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.scenes.values import LAYOUTS

if TYPE_CHECKING:
    from scenesplat_lora.language.text_embeddings import TextEmbeddings

TEXT = (
    "Give scenes language features: the text embedding of each Gaussian's class, or with --images "
    "the features of the masks that it falls into."
)
ROWS_AT_ONCE = 65_536  # 100 MB of features


@dataclass(kw_only=True)
class Options(ShardOptions):
    """Settings of `scenesplat-lora prepare lang-feat`."""

    data_root: str = option("data", "Folder of the splits.", "data")
    split: str = option("train", "Split whose scenes get features.", "data")
    layout: LayoutName = option("generic", "Which data set's files a scene folder holds.", "data")
    text: str | None = option(
        None,
        "Text embeddings of the class names: .pt, .npz, or a SigLIP 2 folder; with --images: mask "
        "m is class m - 1.",
        "classes",
    )
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
    images: str | None = option(
        None,
        "Folder with a folder of posed images per scene: transforms.json or other cameras, masks/, "
        "and features/ of the masks unless --model or --text gives them.",
        "images",
    )
    model: str | None = option(
        None, "Model folder of SigLIP 2: makes the features of masks from images/.", "images"
    )
    crop: Literal["both", "box", "masked"] = option(
        "both", "With --model: the box around a mask, the mask alone on black, or both.", "images"
    )
    up: Literal["z", "z_down", "y", "y_down", "x", "x_down"] = option(
        "z", "Axis of the cameras' world that points up or down: as for `prepare ply`.", "images"
    )
    unit: float = option(1.0, "Metres per unit of the cameras: as for `prepare ply`.", "images")
    every: int = option(1, "Use each so many-th image, in the order of their names.", "images")
    min_views: int = option(1, "Images that must give a Gaussian a feature.", "images")
    depth_side: int = option(
        192, "Pixels of the longer side of the maps of depth that decide what is hidden.", "images"
    )
    depth_tolerance: float = option(
        0.05, "Metres behind the scene's depth at which a Gaussian is hidden.", "images"
    )
    follow_links: bool = option(
        False, "Take files that links outside of an image folder lead to.", "images"
    )
    device: Literal["auto", "cuda", "cpu"] = option(
        "auto", "Where --images and --model compute.", "images"
    )

    def __post_init__(self) -> None:
        problems = [*self.shard_problems(), *unnamed(self, ("text", "names", "images", "model"))]
        for name in ("max_distance", "unit"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                problems.append(f"--{name} is {value}: it must be metres above 0")
        if not 0 <= self.depth_tolerance < math.inf:
            problems.append(f"--depth_tolerance is {self.depth_tolerance}: it must be metres")
        for name, least in (("every", 1), ("min_views", 1), ("depth_side", 16)):
            problems += count_problem(self, name, least)
        if self.depth_side > 4096:
            problems.append(f"--depth_side is {self.depth_side}: it must be at most 4096")
        problems += self.source_problems()
        if problems:
            raise ConfigError(listing(problems))

    def source_problems(self) -> list[str]:
        """What does not go together."""
        if self.images is None and self.model is not None:
            return ["--model makes features of masks in images: give --images too"]
        if self.images is None and self.text is None:
            return ["give --text (features from labels) or --images (from masks of posed images)"]
        if self.text is not None and self.model is not None:
            return ["--text and --model: the features of masks come from one of them"]
        return []

    def source(self) -> Literal["given", "model", "text"]:
        """Where the features of masks come from."""
        if self.text is not None:
            return "text"
        return "given" if self.model is None else "model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    options = parse(Options, argv or [], prog="scenesplat-lora prepare lang-feat", description=TEXT)
    from scenesplat_lora.language.text_embeddings import read_text_embeddings

    text = table = None
    if options.text is not None:
        text = read_text_embeddings(options.text, options.names, options.prompt_classes or None)
        table = class_features(text)
    if options.images is not None:
        from scenesplat_lora.posed.lang_feat_images import run_images

        done = run_images(options, table)
    else:
        assert text is not None
        assert table is not None
        done = _run_labels(options, text, table)
    tell("lang-feat", *done, (Path(options.data_root) / options.split).absolute())
    return 0


# -- from labels -----------------------------------------------------------------------------------


def _run_labels(
    options: Options, text: TextEmbeddings, table: NDArray[np.float16]
) -> tuple[int, int]:
    folder = Path(options.data_root) / options.split
    jobs = [_job(scene, options) for scene in list_scenes(options.data_root, options.split)]
    ledger = Ledger(folder, "lang-feat", _settings(options, text, table))
    work = partial(_write, table=table, names=text.names, options=options)
    return run_all(ledger, jobs, options.shard(), work, options.overwrite)


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
    labels = scene_labels(job.place, options)
    highest = int(labels.max(initial=-1))
    if highest >= len(table):
        raise DataError(
            f"{one_line(job.place)}: label {highest}, but there are {len(table)} classes (0 is "
            f"{one_line(names[0])})"
        )
    if highest < 0:
        raise DataError(f"{one_line(job.place)}: no Gaussian has a label: nothing to learn from")
    valid = write_features(job.place, _blocks(labels, table), (len(labels), table.shape[1]))
    return {"rows": len(labels), "valid": valid}


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


def _blocks(
    labels: NDArray[np.integer], table: NDArray[np.float16]
) -> Iterator[tuple[NDArray[np.float16], NDArray[np.bool_]]]:
    """The class's row, or zeros, and whether there is a label."""
    rows = np.concatenate([table, np.zeros((1, table.shape[1]), np.float16)])  # -1 is its last
    for begin in range(0, len(labels), ROWS_AT_ONCE):
        some = labels[begin : begin + ROWS_AT_ONCE]
        yield rows[some], some >= 0
