"""PLY files: 3D Gaussian splats to scenes, meshes, and points with properties back.

Elements are read by their names, in ASCII and in both binary orders. Counts are compared with the
size of the file before anything is allocated.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import open_regular
from lora_core.errors import DataError, listing, one_line
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.scenes.values import recentred

Array = NDArray[Any]
SH_C0 = 0.28209479177387814  # of the constant spherical harmonic, 1 / (2 sqrt(pi))
MAX_HEADER = 65_536  # bytes; 3D Gaussian splats have 1.5 KB
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_NAMES = {"i1": "char", "u1": "uchar", "i2": "short", "u2": "ushort", "i4": "int", "u4": "uint",
          "f4": "float", "f8": "double"}  # fmt: skip
_PLURAL = {"vertex": "vertices", "face": "faces"}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "="}
_NEEDED = (
    "x",
    "y",
    "z",
    "opacity",
    "f_dc_0",
    "f_dc_1",
    "f_dc_2",
    "rot_0",
    "rot_1",
    "rot_2",
    "rot_3",
)


class Element(NamedTuple):
    """One table of the file: its name, its rows, its columns (name, type, type of the length).

    A column without a type of the length is one number, the others are lists.
    """

    name: str
    rows: int
    columns: tuple[tuple[str, str, str | None], ...]

    def dtype(self, order: str) -> np.dtype[Any]:
        """Of one row; raises ValueError for a list or a name that stands twice."""
        if any(length is not None for *_, length in self.columns):
            raise ValueError(f"the element {self.name!r} has a list, which has no fixed size")
        return np.dtype([(name, f"{order}{kind}") for name, kind, _ in self.columns])

    def triangles(self, order: str) -> np.dtype[Any]:
        """Of one row whose lists have three entries; `#name` is the length of the list `name`."""
        fields: list[Any] = []
        for name, kind, length in self.columns:
            if length is None:
                fields.append((name, f"{order}{kind}"))
            else:
                fields += [(f"#{name}", f"{order}{length}"), (name, f"{order}{kind}", (3,))]
        return np.dtype(fields)


# -- reading ---------------------------------------------------------------------------------------


def read_vertices(path: str | Path) -> Array:
    """The table `vertex` of a PLY file, a structured array [N] with its properties as fields.

    Binary files stay on disk until a field is used.

    Raises:
        DataError: not PLY, no vertices, lists where rows must have one size, or another number of
            rows than the header promises.
    """
    return _element(Path(path), "vertex", Element.dtype)


def read_triangles(path: str | Path) -> Array:
    """The table `face` of a mesh of triangles, a structured array [F] as `read_vertices` gives it.

    Its list of corners is a field [F, 3] under its own name, as a rule `vertex_indices`.

    Raises:
        DataError: as `read_vertices`; or lists of another length than three.
    """
    path = Path(path)
    rows = _element(path, "face", Element.triangles)
    for name in rows.dtype.names or ():
        if name.startswith("#") and (rows[name] != 3).any():
            raise DataError(
                f"{one_line(path)}: faces that are no triangles ({name[1:]}): triangulate the mesh"
            )
    return rows


def _element(path: Path, name: str, dtype_of: Callable[[Element, str], np.dtype[Any]]) -> Array:
    try:
        with open_regular(path) as file:
            form, elements = _header(file)
            names = [element.name for element in elements]
            if name not in names:
                raise ValueError(f"no element {name!r}, only {', '.join(names) or 'none'}")
            before, order = elements[: names.index(name)], _ORDERS[form]
            element = elements[len(before)]
            dtype = dtype_of(element, order)
            if form == "ascii":
                return _ascii_rows(file, before, element, dtype)
            begin = file.tell() + sum(e.rows * e.dtype(order).itemsize for e in before)
            last = len(before) == len(elements) - 1
            return _binary_rows(file, begin, element, dtype, last)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{one_line(path)}: {one_line(error)}") from None


def _header(file: BinaryIO) -> tuple[str, list[Element]]:
    """Format and elements; leaves the file at the first byte of the data."""
    lines = _header_lines(file)
    form = ""
    elements: list[Element] = []
    for line in lines:
        match line.split():
            case ["format", form, "1.0"] if form in _ORDERS:
                pass
            case ["element", name, count] if count.isdecimal() and len(count) < 16:
                elements.append(Element(name, int(count), ()))
            case ["property", "list", length, kind, name] if (
                elements and length in _TYPES and kind in _TYPES
            ):
                elements[-1] = _with_column(elements[-1], (name, _TYPES[kind], _TYPES[length]))
            case ["property", kind, name] if elements and kind in _TYPES:
                elements[-1] = _with_column(elements[-1], (name, _TYPES[kind], None))
            case ["comment" | "obj_info", *_] | []:
                pass
            case _:
                raise ValueError(f"header line {line[:80]!r} is not understood")
    if not form:
        raise ValueError("the header names no format")
    return form, elements


def _with_column(element: Element, column: tuple[str, str, str | None]) -> Element:
    return element._replace(columns=(*element.columns, column))


def _header_lines(file: BinaryIO) -> list[str]:
    lines: list[str] = []
    while (line := file.readline(MAX_HEADER)).strip() != b"end_header":
        if not lines and line.strip() != b"ply":
            raise ValueError("not a PLY file: it does not begin with 'ply'")
        if not line.endswith(b"\n") or file.tell() > MAX_HEADER:
            raise ValueError("its header has no end")
        lines.append(line.decode("utf-8", "replace").strip())
    if not lines:
        raise ValueError("not a PLY file: it does not begin with 'ply'")
    return lines[1:]


def _binary_rows(
    file: BinaryIO, begin: int, element: Element, dtype: np.dtype[Any], last: bool
) -> Array:
    needed = element.rows * dtype.itemsize
    held = os.fstat(file.fileno()).st_size - begin
    if held < needed or (last and held != needed):
        raise ValueError(
            f"its header promises {element.rows} {_PLURAL[element.name]}, {needed} bytes, but "
            f"{max(held, 0)} follow: copied incompletely{_other_lists(element)}?"
        )
    if not element.rows:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r", offset=begin, shape=(element.rows,))


def _other_lists(element: Element) -> str:
    return ", or not all of them triangles" if element.name == "face" else ""


def _ascii_rows(
    file: BinaryIO, before: Sequence[Element], element: Element, dtype: np.dtype[Any]
) -> Array:
    what = _PLURAL[element.name]
    if element.rows > os.fstat(file.fileno()).st_size:
        raise ValueError(f"its header promises {element.rows} {what}, more than it has bytes")
    for _ in range(sum(e.rows for e in before)):
        if not file.readline():
            break
    if not element.rows:
        return np.empty(0, dtype)
    lines: list[bytes] = list(islice(file, element.rows))
    if len(lines) < element.rows:
        raise ValueError(f"its header promises {element.rows} {what}, but {len(lines)} follow")
    table = np.loadtxt(lines, dtype=np.float64, ndmin=2, comments=None)
    width = sum(int(np.prod(dtype[name].shape)) for name in dtype.names or ())
    if table.shape != (element.rows, width):
        raise ValueError(f"{what} of {table.shape[1]} numbers, expected {width}")
    rows, column = np.empty(element.rows, dtype), 0
    for name in dtype.names or ():
        size = int(np.prod(dtype[name].shape))
        rows[name] = table[:, column : column + size].reshape(rows[name].shape)
        column += size
    return rows


# -- 3D Gaussian splats ----------------------------------------------------------------------------


def read_gaussians(path: str | Path) -> Scene:
    """The scene in a 3D Gaussian splatting .ply file.

        opacity = sigmoid(opacity)                 scale = exp(scale_i), i by number
        color = trunc(255 clip(1/2 + C0 f_dc))     quat = sign(w) rot / (|rot| + 1e-9), sign(0) = 1

    Higher spherical harmonics and normals (zeros in such files) are left out.

    Raises:
        DataError: no such splats, or values that are not finite; all of it together.
    """
    path = Path(path)
    rows = read_vertices(path)
    names = set(rows.dtype.names or ())
    scales = sorted((n for n in names if n[6:].isdecimal() and n[:6] == "scale_"), key=_number)
    _check_properties(path, names, len(scales))
    raw = {
        "coord": _columns(rows, ("x", "y", "z")),
        "opacity": _columns(rows, ("opacity",)),
        "scale": _columns(rows, scales),
        "quat": _columns(rows, ("rot_0", "rot_1", "rot_2", "rot_3")),
        "color": _columns(rows, ("f_dc_0", "f_dc_1", "f_dc_2")),
    }
    problems = _value_problems(raw)
    if problems or not len(rows):
        problems = problems or ["it holds no Gaussians"]
        raise DataError(listing([f"{one_line(path)}: {problem}" for problem in problems]))
    color = np.clip(0.5 + SH_C0 * raw["color"], 0, 1) * 255
    quat = raw["quat"] / (np.linalg.norm(raw["quat"], axis=1, keepdims=True) + 1e-9)
    quat = np.where(quat[:, :1] < 0, -quat, quat)
    notes: list[str] = []
    coord = recentred({"coord": raw["coord"]}, notes)["coord"]  # before float32 rounds it
    for note in notes:
        warnings.warn(f"{one_line(path)}: {note}", stacklevel=2)
    return {
        "name": path.stem,
        "coord": coord.astype(np.float32),
        "color": color.astype(np.uint8).astype(np.float32),
        "opacity": _sigmoid(raw["opacity"]).astype(np.float32),
        "scale": np.exp(raw["scale"]).astype(np.float32),
        "quat": quat.astype(np.float32),
    }


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _columns(rows: Array, names: list[str] | tuple[str, ...]) -> NDArray[np.float64]:
    return np.stack([rows[name].astype(np.float64) for name in names], axis=1)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -x))


def _check_properties(path: Path, names: set[str], scales: int) -> None:
    missing = [name for name in _NEEDED if name not in names]
    if not missing and scales == 3:
        return
    if "packed_position" in names:
        why = "a compressed splat file: save it again uncompressed"
    elif len(missing) > 5 and "opacity" in missing:
        why = "a mesh or point cloud, no 3D Gaussians"
    elif scales != 3 and not missing:
        why = f"{scales} scales per Gaussian, expected scale_0, scale_1, scale_2"
    else:
        why = "the file of a 3D Gaussian splatting program has them"
    lacks = f"no properties {', '.join(missing)}: " if missing else ""
    raise DataError(f"{one_line(path)}: {lacks}{why}")


def _value_problems(raw: Mapping[str, NDArray[np.float64]]) -> list[str]:
    problems = []
    for name, values in raw.items():
        wrong = int((~np.isfinite(values)).any(axis=1).sum())
        if wrong:
            problems.append(f"{name}: {wrong} of {len(values)} Gaussians hold NaN or infinity")
    largest = float(raw["scale"].max(initial=0))
    if not problems and largest > 80:
        problems.append(f"scale: exp({largest:.4g}) is no length in metres: expected logarithms")
    zero = int((raw["quat"] == 0).all(axis=1).sum())
    if zero:
        problems.append(f"rot: {zero} of {len(raw['quat'])} Gaussians have no rotation, all zeros")
    return problems


# -- writing ---------------------------------------------------------------------------------------


def write_vertices(path: str | Path, columns: Mapping[str, Array]) -> None:
    """Write arrays [N] as the properties of a binary little-endian PLY file; replace atomically.

    Types stay as they are: f32 or f64, and whole numbers of 8 to 32 bits.
    """
    path = Path(path)
    kinds = [(name, values.dtype.newbyteorder("<").str[1:]) for name, values in columns.items()]
    unknown = [f"{name} {kind}" for name, kind in kinds if kind not in _NAMES]
    lengths = {values.shape for values in columns.values()}
    if unknown or len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise DataError(f"{one_line(path)}: no PLY of {', '.join(unknown) or lengths}")
    rows = np.empty(next(iter(lengths)), dtype=[(name, f"<{kind}") for name, kind in kinds])
    for name, values in columns.items():
        rows[name] = values
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    lines += [f"property {_NAMES[kind]} {name}" for name, kind in kinds]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes("\n".join([*lines, "end_header", ""]).encode() + rows.tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_points(path: str | Path, coord: Array, color: Array) -> None:
    """Write coloured points: coord [N, 3] in metres, color [N, 3] in 0..255."""
    columns: dict[str, Array] = {n: coord[:, i].astype(np.float32) for i, n in enumerate("xyz")}
    rounded = np.clip(np.round(color), 0, 255).astype(np.uint8)
    columns |= {"red": rounded[:, 0], "green": rounded[:, 1], "blue": rounded[:, 2]}
    write_vertices(path, columns)


def write_gaussians(path: str | Path, scene: Scene) -> None:
    """Write a scene as a 3D Gaussian splatting file, without higher spherical harmonics.

    Opacities of exactly 0 or 1 are moved to 1e-6 and 1 - 1e-6: their logits are infinite.
    """
    opacity = np.clip(scene["opacity"].astype(np.float64)[:, 0], 1e-6, 1 - 1e-6)
    # The middle of the step that `read_gaussians` truncates to this colour.
    share = np.clip((np.round(scene["color"].astype(np.float64)) + 0.5) / 255, 0, 1)
    harmonics = (share - 0.5) / SH_C0
    scale = np.log(np.maximum(scene["scale"].astype(np.float64), 1e-12))
    columns = {name: scene["coord"][:, i] for i, name in enumerate("xyz")}
    columns |= {name: np.zeros(len(opacity)) for name in ("nx", "ny", "nz")}
    columns |= {f"f_dc_{i}": harmonics[:, i] for i in range(3)}
    columns |= {"opacity": np.log(opacity / (1 - opacity))}
    columns |= {f"scale_{i}": scale[:, i] for i in range(3)}
    columns |= {f"rot_{i}": scene["quat"][:, i] for i in range(4)}
    write_vertices(path, {name: values.astype(np.float32) for name, values in columns.items()})
