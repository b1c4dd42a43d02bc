"""A whole scene to labels, as the official tester does it.

One Gaussian of every 1 cm cell goes through the network in overlapping fragments of one Gaussian
per 2 cm voxel; probabilities are summed over fragments, and every Gaussian gets the label of the
one that stands for its cell.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lora_core.training.inference import autocast, evaluating
from scenesplat_lora.point_batch import PointBatch
from scenesplat_lora.scene import GAUSSIAN, Scene
from scenesplat_lora.text_embeddings import TextEmbeddings
from scenesplat_lora.transforms import compose, evaluation_fragments, evaluation_transforms
from scenesplat_lora.zero_shot import FragmentSum, probabilities


@dataclass(frozen=True)
class Labelling:
    """How a scene is labelled.

    Attributes:
        first_grid: metres; of each such cell one Gaussian, drawn at random, is looked at.
        grid_size: metres; voxels of the network.
        threshold: labels with a lower sigmoid(p . t) are rejected.
        precision: "fp32", "bf16", "fp16" or "auto".
        seed: of the draws, together with the scene's name.
    """

    first_grid: float = 0.01
    grid_size: float = 0.02
    threshold: float = 0.1
    precision: str = "fp32"
    seed: int = 0


def label_scene(
    model: nn.Module, scene: Scene, text: TextEmbeddings, how: Labelling | None = None
) -> NDArray[np.int64]:
    """The class of every Gaussian, [N]; -1: rejected.

    Args:
        model: gives features [V, D] of a `PointBatch`, such as `LangPretrainer`.
        scene: at least its Gaussians, as `read_scene` gives them.

    Raises:
        DataError: features of another width than the texts, or a scene too large for its voxels.
    """
    how = how or Labelling()
    name = str(scene.get("name", ""))
    rng = np.random.default_rng([how.seed, zlib.crc32(name.encode("utf-8", "surrogateescape"))])
    device = next(model.parameters()).device
    gaussians: Scene = {"name": name} | {key: scene[key] for key in GAUSSIAN}
    thinned = compose(evaluation_transforms(how.first_grid, copied=()))(gaussians, rng)
    total = FragmentSum(len(thinned["coord"]), len(text.features), device)
    with evaluating(model), autocast(device, how.precision):
        for fragment in evaluation_fragments(thinned, rng, how.grid_size):
            batch = PointBatch.from_mapping(fragment).to(device)
            total.add(fragment["index"].to(device), probabilities(model(batch), text))
    labels = total.label(text.classes, how.threshold).cpu().numpy()
    inverse: NDArray[np.int64] = thinned["inverse"]
    result: NDArray[np.int64] = labels[inverse]
    return result
