"""The two files that `prepare lang-feat` writes into a scene, a block of Gaussians at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OUTPUTS = re.compile(r"lang_feat\.npy|valid_feat_mask\.npy")

Blocks = Iterable[tuple[NDArray[np.floating], NDArray[np.bool_]]]


def write_features(folder: Path, blocks: Blocks, shape: tuple[int, int]) -> int:
    """Write lang_feat.npy, float16 [N, D], and valid_feat_mask.npy; gives the number of valid rows.

    Args:
        blocks: features [n, D] and which are valid [n], of all Gaussians one after the other.
        shape: N, D.
    """
    from lora_core.tensor_file import atomic_write

    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    masks = []
    with atomic_write(folder / "lang_feat.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for features, valid in blocks:
            file.write(features.astype("<f2").tobytes())
            masks.append(valid)
    mask = np.concatenate(masks)
    with atomic_write(folder / "valid_feat_mask.npy") as file:
        np.save(file, mask)
    return int(mask.sum())
