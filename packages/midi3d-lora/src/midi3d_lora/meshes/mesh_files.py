"""Generated meshes to files: a scene with one named geometry for each instance, or a file for each.

Coordinates are written as they are, in the scene's frame: y up, as glTF has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError, NumericError
from lora_core.report import say
from lora_core.tensor_file import atomic_write, write_json
from midi3d_lora.meshes.extraction import Mesh

Label = int | str
Meshes = Mapping[int, Mesh | None] | Mapping[str, Mesh | None]  # None: an empty instance
FORMATS = ("glb", "obj", "ply", "stl")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def instance_name(label: Label) -> str:
    """What the instance with this label of the segmentation map is called in files.

    Raises:
        ConfigError: the label would not do as a part of a file's name.
    """
    if not _PLAIN.fullmatch(str(label)):
        raise ConfigError(
            f"instance label {label!r}: expected a number, or letters, digits, '_', '-' and '.'"
        )
    return f"instance_{label}"


def check_scene_path(path: str | Path) -> Path:
    """The path of a scene's file; to be asked before the scene is made.

    Raises:
        ConfigError: it does not end in .glb, or it is a folder.
    """
    path = Path(path)
    if path.suffix.lower() != ".glb":
        raise ConfigError(f"output {path}: scenes are written as .glb, so name it {path.stem}.glb")
    if path.is_dir():
        raise ConfigError(f"output {path}: there is a folder of this name; choose another one")
    return path


def write_scene(path: str | Path, meshes: Meshes, made: Mapping[str, object] | None = None) -> Path:
    """Write a scene as GLB, and beside it a .json with its instances in their order.

    Empty instances (None) are in the .json only, and one line says which. Both files appear whole
    or not at all.

    Args:
        path: ends in .glb.
        meshes: by label of the segmentation map.
        made: how, plain values for the .json.

    Returns:
        The path of the .json.

    Raises:
        ConfigError: a path or label that cannot be.
        NumericError: all instances are empty.
        CheckpointError: the disk refuses.
    """
    import trimesh
    from trimesh.exchange.gltf import export_glb

    path = check_scene_path(path)
    named = _named(meshes)
    empty = [name for name, mesh in named.items() if mesh is None]
    if len(empty) == len(named):
        raise NumericError(
            f"{path}: none of {len(named)} instances has a surface, so there is nothing to write. "
            "Try more inference steps, or an adapter of an earlier epoch"
        )
    scene = trimesh.Scene()
    for name, mesh in named.items():
        if mesh is not None:
            scene.add_geometry(_trimesh(mesh), node_name=name, geom_name=name)
    data = export_glb(scene, include_normals=True)
    with atomic_write(path) as file:
        file.write(data)
    description = path.with_suffix(".json")
    content: dict[str, object] = {"scene": path.name, "instances": _described(meshes)}
    write_json(description, content | ({"made": dict(made)} if made else {}))
    if empty:
        say(f"{path}: without {', '.join(empty)}, where the model left no surface")
    return description


def write_instances(folder: str | Path, meshes: Meshes, file_format: str = "glb") -> list[Path]:
    """Write each instance that is not empty as a file of its own, in the scene's frame.

    Args:
        folder: is made if it is not there; its other files stay.
        meshes: by label of the segmentation map.
        file_format: glb, obj, ply or stl.

    Raises:
        ConfigError: another format, or a label that cannot be.
        CheckpointError: the disk refuses.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"mesh format {file_format!r}: expected one of {', '.join(FORMATS)}")
    written = []
    for name, mesh in _named(meshes).items():
        if mesh is None:
            continue
        content = _trimesh(mesh).export(file_type=file_format)
        path = Path(folder) / f"{name}.{file_format}"
        with atomic_write(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        written.append(path)
    return written


def _named(meshes: Meshes) -> dict[str, Mesh | None]:
    named = {instance_name(label): mesh for label, mesh in meshes.items()}
    if len(named) < len(meshes):
        raise ConfigError(f"instance labels {list(meshes)}: two of them have the same name")
    return named


def _trimesh(mesh: Mesh) -> Any:
    """As trimesh has it, vertex for vertex: its processing would merge and reorder them."""
    import trimesh

    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def _described(meshes: Meshes) -> list[dict[str, object]]:
    """Plain values for JSON: label, name, counts, and the corners of the box of each instance."""
    described = []
    for label, mesh in meshes.items():
        entry: dict[str, object] = {"label": label, "name": instance_name(label)}
        entry["vertices"] = 0 if mesh is None else len(mesh.vertices)
        entry["faces"] = 0 if mesh is None else len(mesh.faces)
        if mesh is not None:
            corners = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
            entry["box"] = [corner.tolist() for corner in corners]
        described.append(entry)
    return described
