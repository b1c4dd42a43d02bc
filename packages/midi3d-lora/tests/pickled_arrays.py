"""Pickled .npy files for tests, such as people have, and hostile ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def pickled(path: Path, value: Any, protocol: int = 4) -> Path:
    """As `np.save` does it, which has changed its protocol over the years."""
    held = np.empty((), object)
    held[()] = value
    with path.open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(held, file, protocol=protocol)
    return path


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sprung),)
