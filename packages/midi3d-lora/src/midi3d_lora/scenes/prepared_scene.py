"""A scene that is ready to be trained on, and how it is written: pictures, map, points, facts.

<output>/<scene>/rgb.png, scene_rgb.png, seg.png       square
<output>/<scene>/surface.npy                           f32 [N, 6], or [K, N, 6] of K instances
<output>/<scene>/camera.json                           where the pictures were rendered here
<output>/<scene>/scene.json                            settings, source, frame, instances
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_core.data_file import read_json
from lora_core.errors import DataError, one_line
from midi3d_lora.conditioning.pictures import ScenePictures
from midi3d_lora.meshes.mesh_loading import Mesh
from midi3d_lora.meshes.render import Camera, render
from midi3d_lora.scenes.scene_frame import SceneFrame
from midi3d_lora.sources.prepare_meshes import Drawing, sample_mesh

RECORD = "scene.json"


@dataclass(frozen=True, eq=False)
class PreparedScene:
    """What is written of a scene.

    Attributes:
        rgb, scene_rgb: uint8 [S, S, 3].
        seg: uint8 or uint16 [S, S]; 0 is background.
        labels: those in `seg`, ascending; of every instance that can be seen.
        names: of these instances in the source.
        surfaces: f32 [K, N, 6], points and normals of these instances.
        facts: more about the scene for its record, plain values.
        camera: that the pictures were rendered with, or None.
        notes: what was repaired or left out, each as "what: how much".
    """

    rgb: NDArray[np.uint8]
    scene_rgb: NDArray[np.uint8]
    seg: NDArray[Any]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    surfaces: NDArray[np.float32]
    facts: Mapping[str, Any]
    camera: Camera | None
    notes: tuple[str, ...]


# -- from meshes -----------------------------------------------------------------------------------


def scene_of_meshes(
    name: str,
    meshes: Sequence[Mesh],
    frame: SceneFrame | None,
    pictures: ScenePictures | None,
    drawing: Drawing,
    notes: Sequence[str],
) -> PreparedScene:
    """The scene of meshes that stand in their common frame.

    Args:
        name: of the scene; with it and the seed the points are always the same.
        frame: the transform that brought them there, for the record.
        pictures: of the scene, square and of `image_size`, with one instance for each mesh; None:
            they are rendered.
        notes: of earlier steps.

    Raises:
        DataError: no instance can be seen, or a mesh reaches the camera.
    """
    camera = None
    if pictures is None:
        camera = Camera()
        try:
            drawn = render(meshes, drawing.image_size, camera)
        except ValueError as error:
            raise DataError(str(error)) from None
        rgb, scene_rgb, seg = drawn.rgb, drawn.rgb, drawn.instances
    else:
        rgb, scene_rgb = pictures.picture, pictures.scene
        seg = pictures.seg.index.astype(np.uint8 if len(meshes) < 256 else np.uint16)
    labels = tuple(int(label) for label in np.unique(seg) if label)
    if not labels:
        raise DataError("no instance can be seen in the picture")
    hidden = [mesh.name for k, mesh in enumerate(meshes, start=1) if k not in labels]
    notes = [*notes, *(f"instances left out that cannot be seen: {one_line(n)}" for n in hidden)]
    points = [
        sample_mesh(meshes[label - 1], drawing.num_samples, drawing.rng(name, label - 1))
        for label in labels
    ]
    names = tuple(meshes[label - 1].name for label in labels)
    facts = {"frame": None if frame is None else asdict(frame), "hidden": hidden}
    return PreparedScene(
        rgb, scene_rgb, seg, labels, names, np.stack(points), facts, camera, tuple(notes)
    )


# -- records --------------------------------------------------------------------------------------


def record_of(folder: Path) -> dict[str, Any]:
    """The record in a scene's folder; {} if nothing here has written one."""
    try:
        held = read_json(folder / RECORD)
    except DataError:
        return {}
    return held if isinstance(held, dict) and "source" in held else {}


# -- writing ---------------------------------------------------------------------------------------


def write_files(folder: Path, scene: PreparedScene, origin: Mapping[str, Any]) -> None:
    """Write a scene into a new folder, its record last.

    Args:
        origin: settings and source, by which the record is known again.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir()
    for name in ("rgb", "scene_rgb", "seg"):
        Image.fromarray(getattr(scene, name)).save(folder / f"{name}.png")
    surfaces = scene.surfaces
    np.save(folder / "surface.npy", surfaces[0] if len(surfaces) == 1 else surfaces)
    if scene.camera is not None:
        _write_json(folder / "camera.json", scene.camera.document(len(scene.rgb)))
    pixels = np.bincount(scene.seg.ravel(), minlength=max(scene.labels) + 1)
    low, high = (bound(surfaces[..., :3].reshape(-1, 3), axis=0) for bound in (np.min, np.max))
    record = {
        **origin,
        "instances": [
            {"label": label, "name": name, "pixels": int(pixels[label])}
            for label, name in zip(scene.labels, scene.names, strict=True)
        ],
        "points": surfaces.shape[1],
        "box": [[round(float(value), 6) for value in corner] for corner in (low, high)],
        **scene.facts,
        "notes": list(dict.fromkeys(scene.notes)),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    _write_json(folder / RECORD, record)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
