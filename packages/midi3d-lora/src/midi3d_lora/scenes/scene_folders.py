"""Scenes to train on: `<data_dir>/<scene>/{rgb.png, seg.png, scene_rgb.png, surface.npy}`.

    folders = list_scenes(data_dir)
    outcomes = look_at(folders, settings, data_dir)        # facts or problems, before weights load
    scene = read_scene(folders[0], settings, np.random.default_rng(0))

rgb.png shows the instances and is cut out by seg.png whatever its background is; scene_rgb.png is
the whole photograph; seg.png tells instances apart by value, 0 is background. Each instance is a
row of the model: its picture, its mask, its points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_core.errors import DataError, listing, one_line
from lora_core.pictures.files import read_image
from lora_core.validate import validate
from midi3d_lora.conditioning.pictures import ScenePictures, split, to_square
from midi3d_lora.conditioning.seg_maps import MAX_INSTANCES, SMALLEST_SHARE, SegMap, read_seg_map
from midi3d_lora.scenes.scene_frame import SceneFrame
from midi3d_lora.scenes.surfaces import (
    Part,
    Surface,
    check_parts,
    draw_surface,
    open_parts,
    surface_files,
)

PICTURES = ("rgb.png", "seg.png", "scene_rgb.png")


@dataclass(frozen=True)
class SceneSettings:
    """How scenes are read.

    Attributes:
        image_size: pixels of the square pictures.
        num_points: of each instance.
        normalize: bring points outside of [-1, 1] into it, a scene as a whole, instead of refusing.
        max_instances: of a scene.
        smallest_share: of the pixels (0..1); smaller instances are left out.
    """

    image_size: int = 512
    num_points: int = 20480
    normalize: bool = False
    max_instances: int = MAX_INSTANCES
    smallest_share: float = SMALLEST_SHARE


@dataclass(frozen=True, eq=False)
class TrainingScene:
    """One scene of K instances.

    Attributes:
        name: of its folder.
        pictures: square, of `image_size`; K instances.
        surfaces: K of `num_points` points each.
    """

    name: str
    pictures: ScenePictures
    surfaces: tuple[Surface, ...]

    def __len__(self) -> int:
        return len(self.surfaces)


# -- folders ---------------------------------------------------------------------------------------


def list_scenes(data_dir: str | Path) -> list[Path]:
    """The folders that hold at least one file of a scene, sorted by name; others are passed over.

    Raises:
        DataError: no such folder, or none with a scene.
    """
    root = Path(data_dir)
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"{one_line(root.absolute())}: {error.strerror}") from None
    # A point begins what a writer has not finished, and what systems hide.
    found = [e for e in entries if not e.name.startswith(".") and e.is_dir() and scene_files(e)]
    if found:
        return found
    hint = ""
    if scene_files(root):
        hint = (
            f"; it looks like one scene itself: give its parent, {one_line(root.absolute().parent)}"
        )
    raise DataError(
        f"{one_line(root.absolute())}: no scenes, expected folders with {', '.join(PICTURES)} and "
        f"surface.npy{hint}"
    )


def scene_files(folder: Path) -> list[Path]:
    """Those files of a scene that are there."""
    pictures = [folder / name for name in PICTURES if (folder / name).exists()]
    return pictures + surface_files(folder)


def look_at(folders: Sequence[Path], settings: SceneSettings, root: Path) -> list[Any]:
    """Facts of every scene (`scene_facts`) or its problem, as `lora_core.validate` gives them."""
    return validate(
        folders,
        lambda folder: scene_facts(folder, settings),
        kind=f"midi3d scene 1 {settings}",
        root=root,
        files=scene_files,
        what="scenes",
    )


# -- one scene -------------------------------------------------------------------------------------


def scene_facts(folder: Path, settings: SceneSettings) -> dict[str, Any]:
    """Look at a scene wholly: its instances, and what was repaired, each as "what: how much".

    Raises:
        DataError: everything that is wrong with it, a line for each problem.
    """
    notes: list[str] = []
    problems = _missing(folder)
    seg = _seg_of(folder, settings, problems) if (folder / "seg.png").exists() else None
    for name in ("rgb.png", "scene_rgb.png"):
        if (folder / name).exists():
            _check_picture(folder / name, seg, settings, problems, notes)
    kept: list[Part] = []
    if seg is not None and surface_files(folder):
        try:
            parts = open_parts(folder, seg.labels, notes)
            check_parts(parts, settings.normalize, notes)
            kept = _kept(seg, parts, settings, notes)
            if not kept:
                least = f"{settings.smallest_share:.2%} of seg.png's pixels"
                problems.append(f"{one_line(folder)}: every instance has less than {least}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listing(problems))
    return {
        "labels": [list(part.labels) for part in kept],
        "points": [len(part) for part in kept],
        "notes": list(dict.fromkeys(notes)),
    }


def _missing(folder: Path) -> list[str]:
    missing = [name for name in PICTURES if not (folder / name).exists()]
    if not surface_files(folder):
        missing.append("surface.npy")
    return [f"{one_line(folder)}: misses {', '.join(missing)}"] if missing else []


def _seg_of(folder: Path, settings: SceneSettings, problems: list[str]) -> SegMap | None:
    """The map with all instances: those that are small have points, too."""
    try:
        return read_seg_map(folder / "seg.png", settings.max_instances, 0.0)
    except DataError as error:
        problems.append(str(error))
        return None


def _check_picture(
    path: Path,
    seg: SegMap | None,
    settings: SceneSettings,
    problems: list[str],
    notes: list[str],
) -> None:
    """Decode a picture; note if it is brought to another size."""
    try:
        height, width = read_image(path).shape[:2]
    except DataError as error:
        problems.append(str(error))
        return
    side = settings.image_size
    if (height, width) != (side, side):
        notes.append(f"{path.name} brought to {side} x {side} pixels: {width} x {height}")
    if seg is not None and seg.size != (height, width):
        if height * seg.size[1] != width * seg.size[0]:
            problems.append(
                f"{one_line(path)}: {width} x {height} pixels, but seg.png has {seg.size[1]} x "
                f"{seg.size[0]}, of other proportions: they must show the same"
            )
        else:
            notes.append(
                f"seg.png brought to the size of {path.name}: {seg.size[1]} x {seg.size[0]}"
            )


def _kept(
    seg: SegMap, parts: Sequence[Part], settings: SceneSettings, notes: list[str]
) -> list[Part]:
    """The parts whose instances are large enough to be seen."""
    pixels = dict(zip(seg.labels, np.bincount(seg.index.ravel())[1:].tolist(), strict=False))
    kept = []
    for part in parts:
        area = sum(pixels.get(label, 0) for label in part.labels)
        if area >= settings.smallest_share * seg.index.size and area:
            kept.append(part)
        else:
            notes.append(f"instances left out, too small to be seen: label {part.labels[0]}")
    return kept


def read_scene(folder: Path, settings: SceneSettings, rng: np.random.Generator) -> TrainingScene:
    """A scene that `scene_facts` has passed.

    Args:
        rng: draws the points; make it from (seed, scene, epoch), so that runs can be resumed.

    Raises:
        DataError: it was changed meanwhile.
    """
    seg = read_seg_map(folder / "seg.png", settings.max_instances, 0.0)
    parts = open_parts(folder, seg.labels, [])
    frame = check_parts(parts, True, []) if settings.normalize else None
    kept = _kept(seg, parts, settings, [])
    if not kept:
        raise DataError(f"{one_line(folder)}: no instance is large enough")
    pictures = _read_pictures(folder, _united(seg, kept), settings.image_size)
    return TrainingScene(folder.name, pictures, _surfaces(kept, frame, settings, rng))


def _surfaces(
    parts: Sequence[Part],
    frame: SceneFrame | None,
    settings: SceneSettings,
    rng: np.random.Generator,
) -> tuple[Surface, ...]:
    return tuple(draw_surface(part, frame, settings.num_points, rng) for part in parts)


def _united(seg: SegMap, parts: Sequence[Part]) -> SegMap:
    """The map with one index for each part; a union is called by its first label."""
    number = {label: k for k, part in enumerate(parts, start=1) for label in part.labels}
    table = np.array([0, *(number.get(label, 0) for label in seg.labels)], dtype=np.int32)
    return replace(seg, index=table[seg.index], labels=tuple(part.labels[0] for part in parts))


def _read_pictures(folder: Path, seg: SegMap, side: int) -> ScenePictures:
    """rgb.png and scene_rgb.png with the map, square and `side` pixels wide."""
    rgb, scene = (read_image(folder / name) for name in ("rgb.png", "scene_rgb.png"))
    return square_pictures(rgb, seg, scene, side)


def square_pictures(
    rgb: NDArray[np.uint8], seg: SegMap, scene: NDArray[np.uint8], side: int
) -> ScenePictures:
    """Pictures and map of one scene, square and `side` pixels wide.

    Map and scene are brought to the size of `rgb` first, whose proportions they must have.
    """
    height, width = rgb.shape[:2]
    square = to_square(
        split(rgb, resized_map(seg, height, width), resized_picture(scene, height, width))
    )
    return split(
        resized_picture(square.picture, side, side),
        resized_map(square.seg, side, side),
        resized_picture(square.scene, side, side),
    )


def resized_picture(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """RGB uint8 [height, width, 3], by Lanczos."""
    if picture.shape[:2] == (height, width):
        return picture
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def resized_map(seg: SegMap, height: int, width: int) -> SegMap:
    """The map by nearest pixel: between two instances there is no third."""
    if seg.size == (height, width):
        return seg
    rows = ((np.arange(height) + 0.5) * seg.size[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * seg.size[1] / width).astype(np.int64)
    return replace(seg, index=seg.index[rows[:, None], columns])


def remarks(facts: Mapping[str, Mapping[str, Any]], shown: int = 3) -> list[str]:
    """What was repaired in all scenes, by name: one line for each kind, with the first scenes."""
    kinds: dict[str, list[str]] = {}
    for name, one in facts.items():
        for note in one["notes"]:
            what, _, much = note.partition(": ")
            kinds.setdefault(what, []).append(f"{one_line(name)} ({much})" if much else name)
    lines = []
    for what, places in kinds.items():
        more = f", ... ({len(places)})" if len(places) > shown else ""
        lines.append(f"{what}: {', '.join(places[:shown])}{more}")
    return lines
