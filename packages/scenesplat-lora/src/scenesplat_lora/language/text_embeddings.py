"""Text embeddings of class names, as files.

Official: a tensor [classes, 768] in a `.pt` beside a `.txt` with one name per line. `.npz`: arrays
`names` (text) and `embeddings`, and optionally `classes`. They are made with the text tower of
SigLIP 2 (base, patch 16, 512) from prompts such as "this is a chair": see `siglip`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_core.errors import DataError, one_line
from lora_core.tensor_file import atomic_write, open_checkpoint, read_torch
from scenesplat_lora.language.class_texts import (
    TextEmbeddings,
    check_names,
    grouped,
    text_embeddings,
)

__all__ = [
    "TextEmbeddings",
    "check_names",
    "grouped",
    "read_names",
    "read_text_embeddings",
    "text_embeddings",
    "write_text_embeddings",
]

LARGEST = 1_000_000_000  # bytes of a file of embeddings


def read_text_embeddings(
    path: str | Path,
    names: str | Path | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
) -> TextEmbeddings:
    """Read a `.pt` or `.npz` of text embeddings, or make them with the text tower in a folder.

    Nothing in a file is executed.

    Args:
        path: the file, or the model folder of a SigLIP 2 (then `names` must be given).
        names: the class names, or a text file with one per line; None: from the `.npz`, or from
            the file of the same name that ends in `.txt`.
        classes: class index of each prompt, where several stand for one class.

    Raises:
        DataError: no such names, or embeddings that cannot be used.
        CheckpointError: a file that is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, names, classes)
    if path.suffix == ".npz":
        features, own_names, own_classes = _read_npz(path)
        names, classes = own_names if names is None else names, classes or own_classes
    elif path.suffix in (".pt", ".pth"):
        features = read_torch(path, LARGEST)
        if not isinstance(features, Tensor):
            raise DataError(f"{path} holds a {type(features).__name__}, expected one tensor")
    else:
        raise DataError(
            f"{path}: text embeddings are read from .pt and .npz files, or made by the SigLIP 2 in "
            "a model folder"
        )
    names = path.with_suffix(".txt") if names is None else names
    if isinstance(names, (str, Path)):
        names = read_names(names)
    return text_embeddings(names, features, classes, str(path))


def _from_folder(
    folder: Path, names: str | Path | Sequence[str] | None, classes: Sequence[int] | None
) -> TextEmbeddings:
    from scenesplat_lora.language.siglip import embed_texts

    if names is None:
        raise DataError(
            f"{folder} is a folder: give the class names too, a text file with one per line"
        )
    found = embed_texts(folder, read_names(names) if isinstance(names, (str, Path)) else names)
    return found if classes is None else grouped(found, classes)


def read_names(path: str | Path) -> list[str]:
    """Class names from a text file, one per line; empty lines at its end do not count.

    Raises:
        DataError: it is no UTF-8 text, or a line is empty. CheckpointError: it is missing.
    """
    with open_checkpoint(path, LARGEST) as file:
        try:
            lines = file.read().decode("utf-8-sig").rstrip().split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: class names must be UTF-8 text: {error.reason}") from None
    found = [line.strip() for line in lines]
    if "" in found:
        raise DataError(f"{path}: line {found.index('') + 1} is empty: one class name per line")
    return found


def write_text_embeddings(path: str | Path, text: TextEmbeddings) -> None:
    """Write a file that `read_text_embeddings` reads.

    `.npz`; or, by its ending, the official `.pt` with a `.txt` of names beside it, which has no
    place for classes.

    Raises:
        DataError: several texts of one class in a `.pt`.
    """
    path = Path(path)
    if path.suffix == ".pt":
        _write_official(path, text)
        return
    with atomic_write(path) as file:
        np.savez(
            file,
            names=np.array(text.names),
            embeddings=text.features.numpy(),
            classes=np.array(text.classes, np.int64),
        )


def _write_official(path: Path, text: TextEmbeddings) -> None:
    if text.classes != tuple(range(len(text.names))):
        raise DataError(f"{path}: a .pt has no place for several texts of a class: write an .npz")
    names = path.with_suffix(".txt")
    if not names.exists() or tuple(read_names(names)) != text.names:  # the user's own file stays
        with atomic_write(names) as file:
            file.write("".join(f"{name}\n" for name in text.names).encode())
    with atomic_write(path) as file:
        torch.save(text.features.contiguous(), file)


def _read_npz(path: Path) -> tuple[Tensor, list[str] | None, list[int] | None]:
    with open_checkpoint(path, LARGEST) as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                held = {name: arrays[name] for name in arrays.files}
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            reason = one_line(str(error))[:200]
            raise DataError(
                f"{path} is no file of plain arrays ({reason}): save it again"
            ) from None
    if "embeddings" not in held or held["embeddings"].dtype.kind != "f":
        raise DataError(
            f"{path}: expected an array of floating-point numbers `embeddings`, found "
            f"{', '.join(f'{name} {array.dtype}' for name, array in held.items()) or 'nothing'}"
        )
    names, classes = held.get("names"), held.get("classes")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise DataError(f"{path}: names is {names.dtype} {names.shape}: expected a list of texts")
    if classes is not None and (classes.dtype.kind not in "iu" or classes.ndim != 1):
        raise DataError(f"{path}: classes is {classes.dtype} {classes.shape}: expected integers")
    return (
        torch.from_numpy(held["embeddings"].astype(np.float32)),
        None if names is None else names.tolist(),
        None if classes is None else classes.tolist(),
    )
