"""What a folder of posed images holds besides its cameras: masks, and features of the masks.

    office/transforms.json      or another file of cameras: see `cameras`
    office/images/0001.jpg
    office/masks/0001.png       or .npy: integers [H, W], the image's size; 0: no mask, 1 ... M
    office/features/0001.npy    [M, D]: row m - 1 is of mask m; zeros: none
    office/confidence/0001.npy  [M], optional: how much masks count; 0: not at all

Everything is looked at before work begins, and all that is wrong is told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, one_line
from lora_core.npy_file import read_array
from lora_core.pictures.files import read_mask, read_size
from lora_core.pictures.reading import Reading
from lora_core.validate import validate
from scenesplat_lora.posed.cameras import camera_file, read_views
from scenesplat_lora.posed.pinhole import View

MOST_MASKS = 65_535  # of an image
Source = Literal["given", "model", "text"]  # where the feature of a mask comes from


@dataclass(frozen=True)
class Shot:
    """An image of a scene with its masks.

    Attributes:
        view: with its size. mask: the label map. features: [M, D]; None: made or looked up.
        confidence: [M]; None: masks count alike.
        highest: the largest number of a mask in it; 0: it has none.
    """

    view: View
    mask: Path
    features: Path | None
    confidence: Path | None
    highest: int = 0

    def labels(self) -> NDArray[np.int64]:
        """The label map, int64 [H, W]; 0: no mask."""
        return _label_map(self.mask).astype(np.int64)

    def weighted(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features of the masks, [M, D], times their confidence."""
        if self.confidence is None:
            return features
        given = read_array(self.confidence).astype(np.float32)[: len(features)]
        result: NDArray[np.float32] = features[: len(given)] * given[:, None]
        return np.pad(result, ((0, len(features) - len(given)), (0, 0)))


@dataclass(frozen=True)
class Capture:
    """The images of a scene.

    Attributes:
        cameras: the file of cameras.
        width: D of the given features; 0: none are given.
    """

    folder: Path
    cameras: Path
    shots: tuple[Shot, ...]
    width: int = 0


def read_captures(
    folders: Sequence[Path],
    source: Source,
    every: int = 1,
    classes: int = 0,
    follow_links: bool = False,
) -> dict[str, Capture]:
    """The images of several scenes, by name of folder, with every file looked at.

    Args:
        source: "given": features lie beside the masks; "model": images are needed; "text": mask m
            is class m - 1.
        every: only each so many-th image, in the order of their names.
        classes: for "text": their number.
        follow_links: take files that links outside of a scene's folder lead to.

    Raises:
        DataError: everything that is wrong with all of them, in one message.
    """
    problems: list[str] = []
    captures = []
    for folder in folders:
        try:
            captures.append(_found(folder, source, every, follow_links))
        except DataError as error:
            problems.append(str(error))
    checked = {one.folder.name: _looked_at(one, source, classes, problems) for one in captures}
    widths = {one.width: name for name, one in checked.items() if one.width}
    if len(widths) > 1:
        each = ", ".join(f"{width} in {one_line(name)}" for width, name in sorted(widths.items()))
        problems.append(f"features have different widths: {each}: they are of different models")
    if problems:
        raise DataError(listing(problems))
    return checked


def _found(folder: Path, source: Source, every: int, follow_links: bool) -> Capture:
    """Cameras, and which files are missing.

    Raises:
        DataError: what is wrong with cameras; files that are not there, or elsewhere.
    """
    reading = Reading(folder, follow_links=follow_links)
    weighted = (folder / "confidence").is_dir()
    shots: list[Shot] = []
    missing: list[Path] = []
    for view in read_views(folder, follow_links)[::every]:
        mask = _mask_file(folder, view.key)
        names = ["features"] if source == "given" else []
        names += ["confidence"] if weighted else []
        arrays = {name: folder / name / f"{view.key}.npy" for name in names}
        wanted = [mask, *arrays.values()]
        if source == "model" or view.size is None:
            wanted.append(view.image)
        missing += [file for file in wanted if not file.is_file()]
        for file in wanted:
            reading.stay_inside(file, folder)
        shots.append(Shot(view, mask, arrays.get("features"), arrays.get("confidence")))
    if missing:
        some = ", ".join(one_line(file.relative_to(folder)) for file in missing[:3])
        hint = "; --model makes features" if source == "given" else ""
        raise DataError(
            f"{one_line(folder.absolute())}: {len(missing)} files of {len(shots)} images are "
            f"missing: {some}{' ...' if len(missing) > 3 else ''}{hint}"
        )
    return Capture(folder, camera_file(folder), tuple(shots))


def _mask_file(folder: Path, key: str) -> Path:
    array = folder / "masks" / f"{key}.npy"
    return array if array.is_file() else folder / "masks" / f"{key}.png"


def _looked_at(capture: Capture, source: Source, classes: int, problems: list[str]) -> Capture:
    """The same with sizes and highest masks; adds what is wrong to `problems`."""
    outcomes = validate(
        capture.shots,
        _look,
        kind="masks and features of an image 1",
        root=capture.folder,
        files=_files,
        name=lambda shot: str(shot.mask),
        content=lambda shot: f"{shot.view.size}",
        what="masks",
    )
    shots, widths = [], set()
    for shot, outcome in zip(capture.shots, outcomes, strict=True):
        if outcome.problem:
            problems.append(outcome.problem)
            continue
        height, width, highest, columns = outcome.value
        widths.add(columns)
        if source == "text" and highest > classes:
            problems.append(
                f"{one_line(shot.mask)}: mask {highest}, but there are {classes} classes: mask m "
                "is class m - 1"
            )
        shots.append(replace(shot, view=shot.view.sized((height, width)), highest=highest))
    if len(widths) > 1:
        problems.append(
            f"{one_line(capture.folder)}: features have different widths: {sorted(widths)}"
        )
    if shots and not any(shot.highest for shot in shots) and len(shots) == len(outcomes):
        problems.append(f"{one_line(capture.folder)}: no image has a mask: nothing to learn from")
    return Capture(capture.folder, capture.cameras, tuple(shots), max(widths, default=0))


def _files(shot: Shot) -> list[Path]:
    files = (shot.mask, shot.features, shot.confidence, shot.view.image)
    return [file for file in files if file is not None and file.is_file()]


def _look(shot: Shot) -> list[int]:
    """Height, width, highest mask, and width of features (0: none given) of an image.

    Raises:
        DataError: what is wrong with its files.
    """
    size = read_size(shot.view.image) if shot.view.image.is_file() else shot.view.size
    declared = shot.view.size or size
    if size != declared:
        raise DataError(
            f"{one_line(shot.view.image)}: {_pixels(size)}, but its camera has {_pixels(declared)}"
        )
    labels = _label_map(shot.mask)
    if labels.shape != size:
        raise DataError(
            f"{one_line(shot.mask)}: {_pixels(labels.shape)}, but the image has {_pixels(size)}"
        )
    highest = int(labels.max(initial=0))
    columns = _check_features(shot.features, highest) if shot.features else 0
    if shot.confidence:
        _check_confidence(shot.confidence, highest)
    return [*labels.shape, highest, columns]


def _pixels(size: Any) -> str:
    return f"{size[1]} x {size[0]} pixels (width x height)"


def _label_map(path: Path) -> NDArray[np.integer]:
    labels = read_mask(path) if path.suffix == ".png" else read_array(path)
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or not labels.size:
        raise DataError(
            f"{one_line(path)}: {labels.dtype} {list(labels.shape)}, expected integers [H, W]"
        )
    if labels.min() < 0 or labels.max() > MOST_MASKS:
        raise DataError(
            f"{one_line(path)}: {labels.min()} ... {labels.max()}: expected 0 for no mask, then "
            f"1 ... M, at most {MOST_MASKS}"
        )
    return labels


def _check_features(path: Path, highest: int) -> int:
    features = read_array(path)
    if features.ndim != 2 or features.dtype.kind != "f" or not features.shape[1]:
        raise DataError(
            f"{one_line(path)}: {features.dtype} {list(features.shape)}, expected floating-point "
            "numbers [M, D], a row for each mask"
        )
    _check_rows(path, features, highest)
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(wrong):
        raise DataError(
            f"{one_line(path)}: rows {wrong[:5].tolist()} of {len(wrong)} hold NaN or infinity"
        )
    return int(features.shape[1])


def _check_confidence(path: Path, highest: int) -> None:
    values = read_array(path)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise DataError(f"{one_line(path)}: {values.dtype} {list(values.shape)}, expected [M]")
    _check_rows(path, values, highest)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise DataError(f"{one_line(path)}: confidences must be finite and not below 0")


def _check_rows(path: Path, values: NDArray[Any], highest: int) -> None:
    if len(values) < highest:
        raise DataError(
            f"{one_line(path)}: {len(values)} rows, but its masks go up to {highest}: row m - 1 is "
            "of mask m"
        )
