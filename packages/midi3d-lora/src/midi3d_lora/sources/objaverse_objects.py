"""Objects of Objaverse as sources of scenes."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.data_file import open_regular
from lora_core.errors import DataError, listing, near, one_line
from midi3d_lora.meshes.mesh_loading import joined
from midi3d_lora.prepare import require
from midi3d_lora.prepare_run import Source
from midi3d_lora.scenes.prepared_scene import PreparedScene, scene_of_meshes
from midi3d_lora.sources.prepare_meshes import place, read_instances

if TYPE_CHECKING:
    from midi3d_lora.prepare_objaverse import Options

CATEGORIES = "lvis-annotations.json.gz"
MOST_TEXT = 2**28  # bytes of unpacked annotations; the published ones have 2 MB


# -- which objects ---------------------------------------------------------------------------------


def find_objects(options: Options) -> list[Source]:
    """The objects that are wanted, sorted by uid.

    Raises:
        DataError: no such folder, none in it, or objects and categories that are not there.
    """
    root = Path(options.source).expanduser()
    place = one_line(root.absolute())
    if not root.is_dir():
        raise DataError(f"--source: {place}: no such folder")
    files: dict[str, Path] = {}
    problems = []
    for path in sorted(root.rglob("*.glb")):
        if files.setdefault(path.stem, path) is not path:
            problems.append(f"{one_line(path)}: {one_line(files[path.stem])} has the same name")
    if problems:
        raise DataError(listing(problems))
    require(files, f"--source: {place}: no .glb files, expected glbs/000-000/<uid>.glb")
    wanted = [uids for uids in (_listed(options), _of_categories(root, options)) if uids]
    chosen = sorted(set(files).intersection(*wanted))
    if options.uids is not None:
        _refuse_missing(sorted(wanted[0] - set(files)))
    require(chosen, f"--source: {place}: none of its {len(files)} objects is among the wanted ones")
    return [Source(uid, (files[uid],), files[uid].parent, files[uid]) for uid in chosen]


def _refuse_missing(missing: Sequence[str]) -> None:
    if missing:
        shown = ", ".join(map(one_line, missing[:5]))
        raise DataError(f"--uids: {len(missing)} objects have no .glb file: {shown}")


def _listed(options: Options) -> set[str]:
    """The objects of --uids."""
    if options.uids is None:
        return set()
    path = Path(options.uids)
    try:
        with open_regular(path) as file:
            text = file.read(MOST_TEXT).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise DataError(f"--uids: {one_line(path)}: cannot be read: {reason}") from None
    uids = {line.strip().removesuffix(".glb") for line in text.splitlines()} - {""}
    require(sorted(uids), f"--uids: {one_line(path)} is empty")
    return uids


def _of_categories(root: Path, options: Options) -> set[str]:
    """The objects of --categories."""
    if not options.categories:
        return set()
    found = sorted(root.rglob(CATEGORIES))
    if not found:
        place = one_line(root.absolute())
        raise DataError(f"--categories: no {CATEGORIES} in {place}: download it beside glbs")
    known = _annotations(found[0])
    unknown = [name for name in options.categories if name not in known]
    if unknown:
        hints = [near(name, known) or f"there are {len(known)}" for name in unknown]
        pairs = zip(map(one_line, unknown), hints, strict=True)
        raise DataError(listing([f"--categories: no category {a!r}; {hint}" for a, hint in pairs]))
    return {str(uid) for name in options.categories for uid in known[name]}


def _annotations(path: Path) -> dict[str, list[Any]]:
    """Category -> uids."""
    try:
        with open_regular(path) as file, gzip.GzipFile(fileobj=file) as text:
            content = json.loads(text.read(MOST_TEXT))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        reason = one_line(str(error).partition("\n")[0])[:120]
        raise DataError(f"{one_line(path)}: cannot be read: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise DataError(f"{one_line(path)}: expected an object of categories with lists of uids")
    return content


# -- one object ------------------------------------------------------------------------------------


def build(source: Source, options: Options) -> PreparedScene:
    """The scene of an object: glTF, so y is up, and all its geometries are one instance.

    Raises:
        DataError: everything that is wrong with it.
    """
    where = one_line(source.place)
    notes: list[str] = []
    whole = joined(read_instances(source.files, notes), source.name)
    try:
        placed, frame = place([whole], "y", options.yaw, options.normalize)
        return scene_of_meshes(source.name, placed, frame, None, options.drawing(), notes)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
