"""The language feature of every Gaussian of a scene, and how near it is to any text.

Fragments are those of `labelling`. A cell's feature is the mean of its unit vectors over fragments,

    f = (1 / K) sum_k p_k,    s(t) = f . t = the mean of the cosines p_k . t

so that a text that comes later costs one product instead of another run of the network.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import DataError, NumericError, one_line
from lora_core.training.inference import autocast, evaluating
from scenesplat_lora.labelling import Labelling
from scenesplat_lora.language.zero_shot import FragmentSum
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.transforms import compose, evaluation_fragments, evaluation_transforms
from scenesplat_lora.transforms.tensors import GAUSSIAN_FEATURES

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
        DataError: a scene too large for its voxels. NumericError: NaN or infinity.
    """
    how = how or Labelling()
    name = str(scene.get("name", ""))
    rng = np.random.default_rng([how.seed, zlib.crc32(name.encode("utf-8", "surrogateescape"))])
    device = next(model.parameters()).device
    columns = (*GAUSSIAN_FEATURES, "normal") if how.normals else GAUSSIAN_FEATURES
    gaussians: Scene = {"name": name} | {key: scene[key] for key in ("coord", *columns)}
    thinned = compose(evaluation_transforms(how.first_grid, copied=()))(gaussians, rng)
    total: FragmentSum | None = None
    with evaluating(model), autocast(device, how.precision):
        for fragment in evaluation_fragments(thinned, rng, how.grid_size, feat_keys=columns):
            batch = PointBatch.from_mapping(fragment).to(device)
            feat = F.normalize(model(batch).float(), dim=1)
            total = total or FragmentSum(len(thinned["coord"]), feat.shape[1], device)
            total.add(fragment["index"].to(device), feat)
    if total is None or not total.total.isfinite().all():
        raise NumericError(
            f"{one_line(name)}: the model gives NaN or infinity: is it finite? if --precision is "
            "not fp32, leave that out"
        )
    mean = total.total.div_(total.count.clamp_min(1).unsqueeze(1))
    return SceneFeatures(mean.half(), thinned["inverse"])
