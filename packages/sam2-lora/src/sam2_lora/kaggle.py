"""The layout of Kaggle's Severstal competition: `train.csv` with run lengths, and `train_images/`.

A row is a picture, a class and all that is annotated of it; a picture without a row has no defect.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from lora_core.data_file import open_regular
from lora_core.errors import DataError, one_line
from lora_core.pictures.encodings import Shape
from lora_core.pictures.masks import Size
from lora_core.pictures.reading import Reading, key_of, pictures_in
from lora_core.settings.types import shown
from sam2_lora.records import Record

HEADERS = ("ImageId,ClassId,EncodedPixels", "ImageId_ClassId,EncodedPixels")
MAX_FIELD = 2**26  # characters of run lengths in one row


def read_kaggle(folder: Path, reading: Reading) -> None:
    """Add the records of a folder, sorted by key; problems are collected.

    Raises:
        DataError: no pictures, or a table that cannot be used as a whole.
    """
    pictures = pictures_in(folder / "train_images", reading)
    refused = {Path(sample).name for sample, _ in reading.bad}
    sizes: dict[str, Size] = {}
    keys = {name: key_of(picture, reading.root) for name, picture in pictures.items()}
    reading.measure(pictures.values())
    for name, picture in pictures.items():
        with reading.collecting(sample=keys[name]):
            sizes[name] = reading.size_of(picture)
    shapes = _shapes(folder / "train.csv", keys, refused, reading)
    reading.records += [
        Record(keys[name], pictures[name], size, tuple(shapes[name]), merged=True)
        for name, size in sizes.items()
    ]


def _shapes(
    table: Path, keys: dict[str, str], refused: set[str], reading: Reading
) -> dict[str, list[Shape]]:
    """Annotations by the name of the picture.

    Args:
        keys: of the pictures' records, by name.
        refused: names of pictures that are there, but not to be used.
    """
    shapes: dict[str, list[Shape]] = {name: [] for name in keys}
    seen: dict[tuple[str, str, str], int] = {}
    for line, cells in _lines(table):
        where = f"{one_line(table)}: row {line}"
        # Without this row its picture would be one without that defect.
        with reading.collecting(where, sample=keys.get(cells[0].strip(), where)):
            name, class_id, runs = _row(cells)
            if name in refused:
                continue
            if name not in keys:
                folder = table.parent / "train_images"
                raise DataError(f"no picture {shown(name)} in {folder}{reading.hint(name, keys)}")
            if seen.setdefault((name, class_id, runs), line) != line:
                reading.problems.append(
                    f"{where}: repeats row {seen[name, class_id, runs]}: remove one of them"
                )
            elif runs:
                label = f"defect_{class_id}" if class_id.isdigit() else class_id
                shapes[name].append(Shape("runs", runs, label, where))
    return shapes


def _lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row after the header.

    Raises:
        DataError: not text, another header, or quotes that swallow the rows after them.
    """
    csv.field_size_limit(MAX_FIELD)
    try:
        with io.TextIOWrapper(open_regular(table), "utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = ",".join(name.strip() for name in next(rows, []))
            if header not in HEADERS:
                raise DataError(
                    f"{one_line(table)}: row 1 is {shown(header)}, expected {HEADERS[0]}"
                )
            for cells in rows:
                if any("\n" in cell or "\r" in cell for cell in cells):
                    raise csv.Error("a quoted cell goes over several rows")
                if cells:
                    yield rows.line_num, cells
    except UnicodeDecodeError:
        raise DataError(f"{one_line(table)}: not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{one_line(table)}: cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(
            f"{one_line(table)}: row {rows.line_num}: {error}; has every quote its partner?"
        ) from None


def _row(cells: list[str]) -> tuple[str, str, str]:
    """Picture, class and run lengths of a row in either form.

    Raises:
        DataError: another number of cells, or an empty name or class.
    """
    if len(cells) == 2:  # the older form: 0002cc93b.jpg_1
        name, _, class_id = cells[0].rpartition("_")
        cells = [name, class_id, cells[1]]
    if len(cells) != 3:
        raise DataError(f"{len(cells)} cells, expected picture, class and run lengths")
    name, class_id, runs = (cell.strip() for cell in cells)
    if not name or not class_id:
        raise DataError("the picture's name or the class is missing")
    return name, class_id, runs
