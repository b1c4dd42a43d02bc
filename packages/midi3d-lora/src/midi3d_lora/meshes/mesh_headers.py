"""What a mesh file promises against what it holds, looked at before a library decodes it.

trimesh gives an empty mesh, or one of four vertices, for headers that promise billions of elements,
and takes a file beside the mesh for one that a glTF names outside of its folder.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from lora_core.data_file import open_regular
from lora_core.errors import DataError, one_line

MOST_HEADER = 2**16  # bytes of a PLY header
MOST_JSON = 2**28  # bytes of a glTF's scene graph
WIDTHS = {
    "char": 1, "int8": 1, "uchar": 1, "uint8": 1, "short": 2, "int16": 2, "ushort": 2, "uint16": 2,
    "int": 4, "int32": 4, "uint": 4, "uint32": 4, "float": 4, "float32": 4, "double": 8,
    "float64": 8,
}  # fmt: skip


def check_header(path: Path) -> None:
    """Refuse a mesh file that is cut off, is no mesh, or names files outside of its folder.

    Raises:
        DataError: with the counts that its header has, and the bytes that there are.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(256)
        reason = _no_mesh(begin)
        if not reason:
            file.seek(0)
            reason = CHECKS[path.suffix.lower()](file, size, path)
    if reason:
        raise DataError(f"{one_line(path)}: {reason}")


def _no_mesh(begin: bytes) -> str:
    if not begin.strip():
        return "the file is empty"
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the file itself, `git lfs pull`"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a mesh: download the file itself"
    return ""


def _text(file: BinaryIO, size: int, path: Path) -> str:
    return "binary data, expected text" if b"\0" in file.read(4096) else ""


def _off(file: BinaryIO, size: int, path: Path) -> str:
    """`OFF`, the numbers of vertices, faces and edges, then a line for each vertex and face."""
    text = re.sub(rb"#[^\n]*", b"", file.read())
    found = re.match(rb"\s*[A-Z4n]*OFF\s+(\d{1,18})\s+(\d{1,18})[^\n]*", text)
    if found is None:
        return "no OFF file: expected OFF and the numbers of vertices and faces"
    vertices, faces = int(found[1]), int(found[2])
    lines = len(re.findall(rb"\n[ \t]*[^\s]", text[found.end() :]))
    if lines >= vertices + faces:
        return ""
    return (
        f"its header promises {vertices} vertices and {faces} faces, a line each, but {lines} "
        "follow: copied incompletely?"
    )


def _promise(what: str, least: int, held: int) -> str:
    if held >= least:
        return ""
    return (
        f"its header promises {what}, at least {least} bytes, but {held} follow: "
        "copied incompletely?"
    )


def _stl(file: BinaryIO, size: int, path: Path) -> str:
    """80 bytes and the number of triangles with 50 bytes each; or text from `solid` on."""
    begin = file.read(512)
    count = struct.unpack("<I", begin[80:84])[0] if len(begin) >= 84 else 0
    if len(begin) >= 84 and size == 84 + 50 * count:
        return ""
    if begin.lstrip().startswith(b"solid") and b"\0" not in begin:
        file.seek(max(0, size - 512))
        whole = b"endsolid" in file.read()
        return "" if whole else "text without its end, `endsolid`: copied incompletely?"
    return _promise(f"{count} triangles", 84 + 50 * count, size) or (
        f"its header promises {count} triangles, {84 + 50 * count} bytes, but the file has {size}"
    )


def _ply(file: BinaryIO, size: int, path: Path) -> str:
    """Elements with a count and properties, whose smallest size must be there."""
    begin = file.read(MOST_HEADER)
    head, end, _ = begin.partition(b"end_header")
    if not begin.startswith(b"ply") or not end:
        return "no PLY file: expected `ply` ... `end_header`"
    binary = b"format ascii" not in head
    least, counts, count = 0, [], 0
    for line in head.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["element"] and len(words) == 3:
            count = int(words[2]) if re.fullmatch(r"\d{1,18}", words[2]) else -1
            if count < 0:
                return f"its header promises {one_line(words[2])} of {one_line(words[1])}"
            counts.append(f"{count} of {words[1]}")
        elif words[:1] == ["property"] and len(words) > 2:
            kind = words[2] if words[1] == "list" else words[1]  # of a list, its length at least
            least += count * (WIDTHS.get(kind, 1) if binary else 2)
    held = size - len(head) - len(end) - 1
    return _promise(" and ".join(counts), least - (not binary), held)


# -- glTF ------------------------------------------------------------------------------------------


def _glb(file: BinaryIO, size: int, path: Path) -> str:
    """12 bytes (glTF, version, length of the file), then chunks: length, kind, content."""
    head = file.read(20)
    if len(head) < 20 or head[:4] != b"glTF":
        return "no binary glTF: expected to begin with `glTF`"
    version, length, first, kind = struct.unpack("<4xII2I", head)
    if version != 2:
        return f"binary glTF of version {version}, expected 2"
    if length > size:
        return _promise("a file", length, size)
    if kind != 0x4E4F534A or 20 + first > length or first > MOST_JSON:
        return f"its first chunk of {first} bytes is no scene graph in JSON that fits into it"
    return _graph(file.read(first), path)


def _gltf(file: BinaryIO, size: int, path: Path) -> str:
    if size > MOST_JSON:
        return f"{size / 1e6:.0f} MB of JSON are more than is read"
    return _graph(file.read(), path)


def _graph(data: bytes, path: Path) -> str:
    """What is wrong with the files that a scene graph names."""
    try:
        graph = json.loads(data)
    except (ValueError, RecursionError):
        return "its scene graph is no JSON: copied incompletely?"
    if not isinstance(graph, dict):
        return "its scene graph is no JSON object"
    problems = []
    for kind in ("buffers", "images"):
        entries = graph.get(kind, [])
        for entry in entries if isinstance(entries, list) else []:
            uri = entry.get("uri") if isinstance(entry, dict) else None
            if uri is not None and (reason := _bad_uri(uri, path.parent, kind == "buffers")):
                problems.append(f"{kind[:-1]} {one_line(str(uri)[:80])!r}: {reason}")
    return "; ".join(problems)


def _bad_uri(uri: Any, folder: Path, needed: bool) -> str:
    """Why a glTF may not name this file, or ""."""
    if not isinstance(uri, str):
        return "expected text"
    if uri.startswith("data:"):
        return ""
    name = unquote(uri)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        return "only files inside the mesh's folder are read"
    target = (folder / name).resolve()
    if name.startswith(("/", "\\")) or not target.is_relative_to(folder.resolve()):
        return "only files inside the mesh's folder are read"
    return "no such file" if needed and not target.is_file() else ""


CHECKS: dict[str, Callable[[BinaryIO, int, Path], str]] = {
    ".obj": _text, ".off": _off, ".stl": _stl, ".ply": _ply, ".glb": _glb, ".gltf": _gltf,
}  # fmt: skip
