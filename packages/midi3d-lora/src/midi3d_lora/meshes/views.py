"""Pictures of generated scenes: from the camera's side, from above, and all the way round.

They are drawn by `render`, without GL. A mesh from a fine grid has a million faces of less than a
pixel, so what is drawn is a coarser copy of it; files are never made from these copies.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_core.errors import ConfigError
from lora_core.pictures.overlay import panels, save
from lora_core.tensor_file import atomic_write
from midi3d_lora.conditioning.pictures import ScenePictures, resized_map, resized_picture, to_square
from midi3d_lora.meshes import mesh_loading
from midi3d_lora.meshes.extraction import Mesh
from midi3d_lora.meshes.render import Camera, render

Picture = NDArray[np.uint8]  # [S, S, 3]
ABOVE = (35.0, 25.0)  # yaw and pitch in degrees
TINT = 0.6  # opacity of an instance's colour over the picture
FOV = 40.0  # degrees


def instance_colours(count: int) -> NDArray[np.float64]:
    """[count, 3] 0..1: hues the golden angle apart, the same in all pictures of a scene."""
    hues = [colorsys.hsv_to_rgb((0.58 + 0.618034 * k) % 1, 0.55, 0.95) for k in range(count)]
    return np.array(hues).reshape(-1, 3)


# -- what is drawn ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Meshes around the origin that fit into the picture however they are turned.

    Attributes:
        meshes: those that are not empty.
        colours: [K, 3] 0..1 of these.
        camera: sees the ball around them.
        size: pixels.
    """

    meshes: tuple[mesh_loading.Mesh, ...]
    colours: NDArray[np.float64]
    camera: Camera
    size: int

    def view(self, yaw: float, pitch: float = 0.0) -> Picture:
        """As seen after a turn around the scene's y axis and a look from above, in degrees."""
        rotation = _looked_at(yaw, pitch)
        turned = [
            mesh_loading.Mesh(mesh.name, mesh.vertices @ rotation.T, mesh.faces)
            for mesh in self.meshes
        ]
        if not turned:
            return np.full((self.size, self.size, 3), 255, np.uint8)
        return render(turned, self.size, self.camera, self.colours).rgb


def _looked_at(yaw: float, pitch: float) -> NDArray[np.float64]:
    """[3, 3]: around y by `yaw`, then around x by `pitch`, so that more is seen from above."""
    a, b = math.radians(yaw), math.radians(pitch)
    around_y = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    around_x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    return around_x @ around_y


def stage(meshes: Sequence[Mesh | None], size: int, detail: float = 1.0) -> Stage:
    """Put up a scene for pictures of `size` pixels; empty instances keep their colour's place.

    Args:
        detail: pixels; what is smaller may be left out. Twice as many, a quarter of the time.
    """
    colours = instance_colours(len(meshes))
    there = [k for k, mesh in enumerate(meshes) if mesh is not None and len(mesh.faces)]
    shown = [mesh for mesh in meshes if mesh is not None and len(mesh.faces)]
    if not shown:
        return Stage((), colours[:0], Camera(FOV, 1.0), size)
    low = np.min([mesh.vertices.min(axis=0) for mesh in shown], axis=0).astype(np.float64)
    high = np.max([mesh.vertices.max(axis=0) for mesh in shown], axis=0).astype(np.float64)
    centre = (low + high) / 2
    radius = max(float(np.linalg.norm(mesh.vertices - centre, axis=1).max()) for mesh in shown)
    radius = max(radius, 1e-6)
    # A ball of radius R at the origin touches the edges of the picture from R / sin(fov / 2).
    camera = Camera(FOV, 1.04 * radius / math.sin(math.radians(FOV) / 2))
    placed, cell = [], 2 * detail * radius / size
    for k, mesh in zip(there, shown, strict=True):
        vertices, faces = clustered(mesh.vertices - centre, mesh.faces, cell)
        placed.append(mesh_loading.Mesh(str(k), vertices, faces))
    return Stage(tuple(placed), colours[there], camera, size)


def clustered(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], cell: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The mesh with all vertices of a cube of side `cell` made one, at their mean.

    Rossignac and Borrel 1993. Faces that become lines or points are dropped, and of equal ones all
    but the first. If nothing would remain the mesh stays as it is.

    Args:
        vertices: [V, 3].
        faces: [F, 3].
    """
    places = np.floor((vertices - vertices.min(axis=0)) / cell).astype(np.int64)
    sides = places.max(axis=0) + 1
    keys = (places[:, 0] * sides[1] + places[:, 1]) * sides[2] + places[:, 2]
    _, cluster, counts = np.unique(keys, return_inverse=True, return_counts=True)
    coarse = cluster[faces]
    a, b, c = coarse.T
    coarse = coarse[(a != b) & (b != c) & (c != a)]
    if not len(coarse):
        return vertices.astype(np.float64), faces.astype(np.int64)
    _, first = np.unique(np.sort(coarse, axis=1), axis=0, return_index=True)
    sums = [np.bincount(cluster, weights=vertices[:, axis]) for axis in range(3)]
    return np.stack(sums, axis=1) / counts[:, None], coarse[np.sort(first)]


# -- turntables ------------------------------------------------------------------------------------


def check_turntable_path(path: str | Path) -> Path:
    """The path of a turntable; to be asked before the scene is made.

    Raises:
        ConfigError: it does not end in .gif.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        hint = ""
        if path.suffix.lower() in (".mp4", ".webm", ".mov", ".mkv"):
            hint = (
                "; no library that this package uses writes videos, ffmpeg makes one of it: "
                f"ffmpeg -i {path.stem}.gif -pix_fmt yuv420p {path.name}"
            )
        raise ConfigError(
            f"turntable {path}: they are written as .gif, so name it {path.stem}.gif{hint}"
        )
    return path


def turntable(scene: Stage, frames: int) -> Iterator[Picture]:
    """Views all the way round, from slightly above."""
    for number in range(frames):
        yield scene.view(360 * number / frames, ABOVE[1])


def write_turntable(
    path: str | Path,
    scene: Stage,
    frames: int,
    seconds: float,
    on_frame: Callable[[int], None] | None = None,
) -> None:
    """Write a GIF that turns for ever, once in `seconds`; whole or not at all.

    Args:
        on_frame: called with their number as pictures are drawn.

    Raises:
        ConfigError: another kind of file.
        CheckpointError: the disk refuses.
    """
    path = check_turntable_path(path)
    pictures = []
    for picture in turntable(scene, frames):
        pictures.append(Image.fromarray(picture))
        if on_frame is not None:
            on_frame(len(pictures))
    some = pictures[:: max(1, len(pictures) // 8)]
    joined = Image.fromarray(np.concatenate([np.asarray(one) for one in some]))
    # One palette for all: colours would flicker with those of single frames.
    palette = joined.quantize(256, method=Image.Quantize.MEDIANCUT)
    indexed = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in pictures]
    with atomic_write(path) as file:
        indexed[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=max(20, round(1000 * seconds / frames)),  # browsers slow down faster ones
            loop=0,
        )


# -- picture and scene beside each other -----------------------------------------------------------


def scene_sheet(
    pictures: ScenePictures, meshes: Sequence[Mesh | None], size: int, title: str = ""
) -> Picture:
    """The picture, its instances, and the scene from the front and from above, [H, W, 3].

    Args:
        meshes: of the instances in the order of the map.
    """
    square = to_square(pictures)
    photograph = resized_picture(square.scene, (size, size))
    index = resized_map(square.seg.index, (size, size))
    colours = np.concatenate([np.ones((1, 3)), instance_colours(len(pictures))])
    tint = np.where((index > 0)[..., None], TINT, 0.0)
    marked = (1 - tint) * photograph + 255 * tint * colours[index]
    scene = stage(meshes, size)
    return panels(
        [
            ("picture", photograph),
            ("instances", marked.round().astype(np.uint8)),
            ("generated", scene.view(0.0)),
            ("from above", scene.view(*ABOVE)),
        ],
        title,
    )


def write_sheet(path: Path, sheet: Picture) -> None:
    """Write a PNG, whole or not at all."""
    save(path, sheet)
