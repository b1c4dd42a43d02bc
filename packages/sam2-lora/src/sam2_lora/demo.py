"""The embedded default: a tiny pretrained base, real photographs with masks, generated steel.

The photographs are those that scikit-image installs; their masks lie in `demo_data/`, whose
README says how they were made. The steel strips imitate the Severstal data in look and format.
Everything is a function of its arguments: the same call writes the same files.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_core.errors import DataError, UserError
from lora_core.pictures.write_coco import Annotated, write_coco

HERE = Path(__file__).parent
SPLITS = ("train", "val", "test")
VISIBLE = 0.7  # an object belongs to a cut-out that shows at least so much of it

Mask = NDArray[np.bool_]
Labelled = tuple[str, Mask]
Plane = NDArray[np.float32]


def write(folder: str | Path, seed: int = 0) -> Path:
    """Write `photos/`, `severstal/` and the tiny base `sam2_demo.safetensors` (+ `.json`).

    Returns:
        The folder.
    """
    folder = Path(folder)
    write_photos(folder / "photos", seed)
    write_severstal(folder / "severstal", seed)
    base = base_checkpoint()
    for file in (base, base.with_suffix(".json")):
        shutil.copyfile(file, folder / file.name)
    return folder


def base_checkpoint() -> Path:
    """The packaged tiny SAM 2 with official tensor names; its `Sam2Config` lies beside it."""
    return HERE / "demo_base" / "sam2_demo.safetensors"


# -- photographs -------------------------------------------------------------------------------


def write_photos(folder: str | Path, seed: int = 0) -> Path:
    """Write the photographs as COCO: `{train,val,test}/*.png` and `_annotations.coco.json`.

    Each picture is a cut-out of a photograph; a photograph and all its cut-outs are in one split.

    Args:
        folder: made if it does not exist.
        seed: only here so that all data sets are written alike; photographs do not depend on it.

    Returns:
        The folder.

    Raises:
        UserError: scikit-image is not installed.
        DataError: its photographs are not the ones the masks were drawn on.
    """
    folder, index = Path(folder), photo_index()
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
        pictures: list[Annotated] = []
        for name, facts in index.items():
            if facts["split"] != split:
                continue
            whole, everything = photo(name, facts["size"]), masks(facts)
            for number, (x, y, width, height) in enumerate(facts["boxes"]):
                file = f"{Path(name).stem}_{number}.png"
                whole.crop((x, y, x + width, y + height)).save(folder / split / file)
                shown = _inside(everything, (x, y, width, height))
                pictures.append(Annotated(file, (height, width), shown))
        write_coco(folder / split, pictures)
    return folder


def photo_index() -> dict[str, Any]:
    """The committed masks, `demo_data/photos.json`: file name of a photograph -> facts.

    split: "train", "val" or "test"; size: [H, W]; sha256: of the file; boxes: cut-outs
    [x, y, w, h]; objects: list of {label, area, counts}, where `counts` are run lengths down the
    columns of the photograph, beginning with background.
    """
    return json.loads((HERE / "demo_data" / "photos.json").read_text(encoding="utf-8"))


def decode(counts: Sequence[int], size: Sequence[int]) -> Mask:
    """Mask bool [H, W] from run lengths that alternate background, foreground down the columns."""
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return runs.reshape(size[1], size[0]).T


def masks(facts: dict[str, Any]) -> list[Labelled]:
    """Label and mask bool [H, W] of every object on a photograph."""
    return [(item["label"], decode(item["counts"], facts["size"])) for item in facts["objects"]]


def _inside(masks: Sequence[Labelled], box: Sequence[int]) -> list[Labelled]:
    """The objects of a cut-out: those with at least VISIBLE of their area in the box."""
    x, y, width, height = box
    cut = [(label, mask, mask[y : y + height, x : x + width]) for label, mask in masks]
    return [(label, crop) for label, mask, crop in cut if crop.sum() >= VISIBLE * mask.sum()]


def photo(name: str, size: Sequence[int]) -> Image.Image:
    """A photograph out of the installed scikit-image as RGB; its network cache is never asked."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError('the demo needs scikit-image: pip install "sam2-lora[demo]"')
    path = Path(found.origin).parent / "data" / name
    if not path.is_file():
        raise DataError(f"{path}: missing; the demo's masks belong to scikit-image 0.25 and 0.26")
    with Image.open(path) as image:
        photo = image.convert("RGB")
    if photo.size != (size[1], size[0]):
        raise DataError(
            f"{path}: {photo.width}x{photo.height} instead of {size[1]}x{size[0]} pixels; "
            "the demo's masks belong to scikit-image 0.25 and 0.26"
        )
    return photo


# -- steel -------------------------------------------------------------------------------------

HEIGHT, WIDTH = 256, 1600  # pixels of a strip
SHARES = (0.2, 0.15, 0.45, 0.2)  # of the classes 1..4; in the real data class 3 dominates as well
ROWS, COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)


def write_severstal(
    folder: str | Path, seed: int = 0, train: int = 24, val: int = 8, test: int = 8
) -> Path:
    """Write steel strips as Supervisely splits: `<split>_split/{img/*.jpg, ann/*.jpg.json}`.

    Strips are grey JPEGs of 1600 x 256 with defects of the classes 1 pits, 2 cracks, 3 scratches
    and 4 patches; every fourth strip has none.

    Args:
        folder: made if it does not exist.
        seed: another seed gives other strips.
        train, val, test: strips per split.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for split, count in enumerate((train, val, test)):
        images = folder / f"{SPLITS[split]}_split" / "img"
        for path in (images, images.parent / "ann"):
            path.mkdir(parents=True, exist_ok=True)
        for k in range(count):
            rng = np.random.default_rng((seed, split, k))
            # Nine hexadecimal digits as in the real data; the number keeps them unique.
            name = f"{rng.integers(16**5):05x}{split:x}{k:03x}.jpg"
            strip, defects = steel(rng, defects=0 if k % 4 == 3 else int(rng.integers(1, 4)))
            Image.fromarray(strip).convert("RGB").save(images / name, quality=95)
            text = json.dumps({"size": {"height": HEIGHT, "width": WIDTH}, "objects": [
                _annotation(kind, mask) for kind, mask in defects
            ]})  # fmt: skip
            (images.parent / "ann" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return folder


def steel(
    rng: np.random.Generator, defects: int
) -> tuple[NDArray[np.uint8], list[tuple[int, Mask]]]:
    """One strip uint8 [256, 1600] and its (class 1..4, mask) pairs, which do not overlap."""
    light = rng.uniform(80, 125) + 18 * _noise(rng, 2, 9)
    streaks = 5 * _noise(rng, 3, 420) + 3 * _noise(rng, 40, 12)  # rolled along the rows
    image = light + streaks + 4 * _noise(rng, 90, 560) + rng.normal(0, 3, (HEIGHT, WIDTH))
    found: list[tuple[int, Mask]] = []
    free = np.ones((HEIGHT, WIDTH), dtype=bool)
    for kind in rng.choice(4, size=defects, p=SHARES) + 1:
        for mask, depth in DEFECTS[kind](rng):
            if mask.sum() < 40 or not free[mask].all():
                continue
            image += depth
            found.append((int(kind), mask))
            free &= ~mask
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), found


def _annotation(kind: int, mask: Mask) -> dict[str, Any]:
    """A Supervisely bitmap object: the cut-out as a palette PNG, index 0 transparent."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    crop = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    image = Image.fromarray(crop.astype(np.uint8))
    image.putpalette([0, 0, 0, 255, 255, 255])  # makes it a palette image
    png = io.BytesIO()
    image.save(png, format="PNG", transparency=0)
    data = base64.b64encode(zlib.compress(png.getvalue())).decode("ascii")
    return {
        "classTitle": f"defect_{kind}",
        "geometryType": "bitmap",
        "bitmap": {"data": data, "origin": [left, top]},
    }


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Plane:
    """Smooth noise [256, 1600] of unit nodes on a grid of rows x columns, bicubically enlarged."""
    nodes = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    return np.asarray(nodes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def _edge(distance: Plane, softness: float) -> Plane:
    """1 inside (distance < 0), 0 outside, a linear ramp of `softness` around the border."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _pits(rng: np.random.Generator) -> Iterator[tuple[Mask, Plane]]:
    """Class 1: a loose group of small dark dents with a bright lower rim; one object each."""
    x, y = rng.uniform(80, WIDTH - 80), rng.uniform(50, HEIGHT - 50)
    for _ in range(rng.integers(3, 8)):
        dx, dy = COLUMNS - x - rng.normal(0, 50), ROWS - y - rng.normal(0, 30)
        rho = np.hypot(dx / rng.uniform(6, 13), dy / rng.uniform(5, 10))  # 1 at the border
        rim = np.exp(-(((rho - 0.95) / 0.25) ** 2)) * (dy > 0)
        yield rho < 1.05, -rng.uniform(35, 65) * _edge(rho - 0.8, 0.5) + 25 * rim


def _crack(rng: np.random.Generator) -> Iterator[tuple[Mask, Plane]]:
    """Class 2: a thin, dark, wavering line across the strip."""
    x, top = rng.uniform(40, WIDTH - 40), rng.uniform(5, 110)
    bottom = top + rng.uniform(70, 140)
    path = x + 0.1 * (ROWS - top) * rng.normal() + 4 * _noise(rng, 7, 1)
    width = rng.uniform(3.0, 5.0) * (1 + 0.3 * _noise(rng, 12, 1))
    distance = np.maximum(np.abs(COLUMNS - path) - width, np.maximum(top - ROWS, ROWS - bottom))
    yield distance < 1, -rng.uniform(40, 60) * _edge(distance, 4)


def _scratch(rng: np.random.Generator) -> Iterator[tuple[Mask, Plane]]:
    """Class 3: a long slanted abrasion of bright and dark hairlines, tapering at its ends."""
    angle = rng.uniform(-0.35, 0.35) + np.pi / 2 * (rng.random() < 0.6)
    dx, dy = COLUMNS - rng.uniform(120, WIDTH - 120), ROWS - rng.uniform(70, HEIGHT - 70)
    along = np.cos(angle) * dx + np.sin(angle) * dy
    across = np.cos(angle) * dy - np.sin(angle) * dx + 3 * _noise(rng, 5, 30)
    half = rng.uniform(50, 120)  # of the length
    taper = np.sqrt(np.clip(1 - (along / half) ** 2, 0, 1))
    width = rng.uniform(7, 18) * taper * (1 + 0.25 * _noise(rng, 10, 60))
    inside = _edge(np.abs(across) - width, 3) * np.clip(width / 3, 0, 1)
    # A brightness per distance from the axis, fading in and out along it.
    hairs = np.interp(across, np.arange(-40, 41, 1.5), rng.normal(0, 1, 54))
    strength = rng.uniform(12, 30) + 24 * hairs * (0.7 + 0.5 * _noise(rng, 12, 70))
    yield np.abs(across) < width, inside * strength


def _patch(rng: np.random.Generator) -> Iterator[tuple[Mask, Plane]]:
    """Class 4: a ragged field of rolled-in scale, mottled and mostly dark."""
    dx, dy = COLUMNS - rng.uniform(90, WIDTH - 90), ROWS - rng.uniform(60, HEIGHT - 60)
    rho = np.hypot(dx / rng.uniform(35, 90), dy / rng.uniform(30, 60))
    rho = rho * (1 + 0.22 * _noise(rng, 8, 50))
    mottle = 20 * _noise(rng, 40, 250) + 10 * _noise(rng, 110, 700)
    yield rho < 1, _edge(rho - 1, 0.15) * (mottle - rng.uniform(22, 42))


DEFECTS = {1: _pits, 2: _crack, 3: _scratch, 4: _patch}
