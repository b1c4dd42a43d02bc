"""Text embeddings of class names, as files.

Official: a tensor [classes, 768] in a `.pt` beside a `.txt` with one name per line. `.npz`: arrays
`names` (text) and `embeddings`, and optionally `classes`. They are made with the text tower of
SigLIP 2 (base, patch 16, 512) from prompts such as "this is a chair".
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import DataError, one_line
from lora_core.tensor_file import atomic_write, open_checkpoint, read_torch

LARGEST = 1_000_000_000  # bytes of a file of embeddings


@dataclass(frozen=True)
class TextEmbeddings:
    """What rows are compared with.

    Attributes:
        names: of the classes.
        features: float32 [P, D], L2-normalised, one per prompt.
        classes: the class index of each prompt; as a rule 0 ... P - 1, one prompt per class.
    """

    names: tuple[str, ...]
    features: Tensor
    classes: tuple[int, ...]


def text_embeddings(
    names: Sequence[str], features: Tensor, classes: Sequence[int] | None = None, where: str = ""
) -> TextEmbeddings:
    """Check and normalise text embeddings.

    Args:
        features: [P, D] of any length. classes: class index of each prompt; None: one per class.
        where: begin of messages, such as the file.

    Raises:
        DataError: everything that is wrong, in one message.
    """
    where = where and f"{where}: "
    names = tuple(names)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if features.dim() != 2 or 0 in features.shape or not features.is_floating_point():
        raise DataError(
            f"{where}text embeddings are {features.dtype} {tuple(features.shape)}: expected "
            "floating-point numbers, a row for each prompt"
        )
    problems = []
    if repeated or not names:
        problems.append(f"class names must be different and at least one: {repeated[:10]}")
    if classes is None:
        classes = range(len(features))
        if len(names) != len(features):
            problems.append(
                f"{len(names)} class names for {len(features)} embeddings: give as many, or "
                "`classes`, the class index of every embedding"
            )
    elif len(classes) != len(features):
        problems.append(f"classes has {len(classes)} entries for {len(features)} embeddings")
    elif set(classes) != set(range(len(names))):
        problems.append(
            f"classes must hold every index from 0 to {len(names) - 1}, found {classes}"
        )
    features = features.detach().float().cpu()
    norms = features.norm(dim=1)
    bad = torch.nonzero(~((norms > 0) & norms.isfinite())).flatten().tolist()
    if bad:
        problems.append(f"embeddings {bad[:10]} are zero or not finite")
    if problems:
        raise DataError("\n".join(where + problem for problem in problems))
    return TextEmbeddings(names, F.normalize(features, dim=1), tuple(classes))


def read_text_embeddings(
    path: str | Path,
    names: str | Path | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
) -> TextEmbeddings:
    """Read a `.pt` or `.npz` of text embeddings; nothing in it is executed.

    Args:
        names: the class names, or a text file with one per line; None: from the `.npz`, or from
            the file of the same name that ends in `.txt`.
        classes: class index of each prompt, where several stand for one class.

    Raises:
        DataError: no such names, or embeddings that cannot be used.
        CheckpointError: a file that is missing or damaged.
    """
    path = Path(path)
    if path.suffix == ".npz":
        features, own_names, own_classes = _read_npz(path)
        names, classes = own_names if names is None else names, classes or own_classes
    elif path.suffix in (".pt", ".pth"):
        features = read_torch(path, LARGEST)
        if not isinstance(features, Tensor):
            raise DataError(f"{path} holds a {type(features).__name__}, expected one tensor")
    else:
        raise DataError(f"{path}: text embeddings are read from .pt and .npz files")
    names = path.with_suffix(".txt") if names is None else names
    if isinstance(names, (str, Path)):
        names = read_names(names)
    return text_embeddings(names, features, classes, str(path))


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
    """Write an `.npz` that `read_text_embeddings` reads."""
    with atomic_write(path) as file:
        np.savez(
            file,
            names=np.array(text.names),
            embeddings=text.features.numpy(),
            classes=np.array(text.classes, np.int64),
        )


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
