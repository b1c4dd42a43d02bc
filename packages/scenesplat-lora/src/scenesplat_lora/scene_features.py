"""The language feature of every Gaussian of a scene, and how near it is to any text.

Fragments are those of `labelling`. A cell's feature is the mean of its unit vectors over fragments,

    f = (1 / K) sum_k p_k,    s(t) = f . t = the mean of the cosines p_k . t

so that a text that comes later costs one product instead of another run of the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import DataError
from scenesplat_lora.labelling import Labelling, summed
from scenesplat_lora.scenes.scene import Scene

ROWS_AT_ONCE = 65_536  # bounds the memory of [rows, D] in float32


@dataclass(frozen=True)
class SceneFeatures:
    """Features of a scene's Gaussians, one per cell.

    Attributes:
        cells: float16 [V, D], means of unit vectors. inverse: int64 [N], the cell of a Gaussian.
    """

    cells: Tensor
    inverse: NDArray[np.int64]

    def similarity(self, texts: Tensor) -> NDArray[np.float32]:
        """f . t of every Gaussian and text, float32 [N, P] in -1 ... 1.

        Args:
            texts: [P, D], unit vectors.

        Raises:
            DataError: another width than that of the features.
        """
        if texts.shape[1] != self.cells.shape[1]:
            raise DataError(
                f"texts of width {texts.shape[1]}, features of width {self.cells.shape[1]}: they "
                "are of different models"
            )
        columns = texts.to(self.cells.device, torch.float32).T
        parts = [part.float() @ columns for part in self.cells.split(ROWS_AT_ONCE)]
        found: NDArray[np.float32] = torch.cat(parts).cpu().numpy()[self.inverse]
        return found

    def take(self, rows: NDArray[np.integer]) -> SceneFeatures:
        """Those of some Gaussians, in the order of `rows`."""
        used, inverse = np.unique(self.inverse[rows], return_inverse=True)
        return SceneFeatures(self.cells[torch.from_numpy(used).to(self.cells.device)], inverse)


def scene_features(model: nn.Module, scene: Scene, how: Labelling | None = None) -> SceneFeatures:
    """Run the network over a scene.

    Args:
        model: gives features [V, D] of a `PointBatch`, such as `LangPretrainer`.
        scene: at least its Gaussians, as `read_scene` gives them.
        how: its threshold does not count.

    Raises:
        DataError: a scene too large for its voxels.
        NumericError: NaN or infinity, in float32 too.
    """
    total, cell_of = summed(
        model, scene, how or Labelling(), lambda out: F.normalize(out.float(), dim=1)
    )
    mean = total.total.div_(total.count.clamp_min(1).unsqueeze(1))
    return SceneFeatures(mean.half(), cell_of)
