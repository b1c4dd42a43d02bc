"""A whole scene to labels, as the official tester does it.

One Gaussian of every 1 cm cell goes through the network in overlapping fragments of one Gaussian
per 2 cm voxel; probabilities are summed over fragments, and every Gaussian gets the label of the
one that stands for its cell.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_core.errors import NumericError, one_line
from lora_core.training.inference import autocast, evaluating
from lora_core.weights import without_autocast
from scenesplat_lora.language.text_embeddings import TextEmbeddings
from scenesplat_lora.language.zero_shot import FragmentSum, probabilities
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.transforms import compose, evaluation_fragments, evaluation_transforms
from scenesplat_lora.transforms.tensors import GAUSSIAN_FEATURES


@dataclass(frozen=True)
class Labelling:
    """How a scene is labelled.

    Attributes:
        first_grid: metres; of each such cell one Gaussian, drawn at random, is looked at.
        grid_size: metres; voxels of the network.
        threshold: labels with a lower sigmoid(p . t) are rejected.
        precision: "fp32", "bf16", "fp16" or "auto".
        seed: of the draws, together with the scene's name.
        normals: the network takes them too (14 channels).
    """

    first_grid: float = 0.01
    grid_size: float = 0.02
    threshold: float = 0.1
    precision: str = "fp32"
    seed: int = 0
    normals: bool = False


def label_scene(
    model: nn.Module, scene: Scene, text: TextEmbeddings | None, how: Labelling | None = None
) -> NDArray[np.int64]:
    """The class of every Gaussian, [N]; -1: rejected.

    Args:
        model: gives features [V, D] of a `PointBatch`, such as `LangPretrainer`.
        scene: at least its Gaussians, as `read_scene` gives them.
        text: of the classes; None: of a segmentation model, whose softmax over its logits is
            summed over fragments, and no label is rejected.

    Raises:
        DataError: features of another width than the texts, or a scene too large for its voxels.
        NumericError: the model gives NaN or infinity, in float32 too.
    """
    how = how or Labelling()

    def likeness(out: Tensor) -> Tensor:
        return out.float().softmax(dim=1) if text is None else probabilities(out, text)

    total, cell_of = summed(model, scene, how, likeness)
    classes = range(total.total.shape[1]) if text is None else text.classes
    threshold = how.threshold if text is not None else 0.0
    result: NDArray[np.int64] = total.label(classes, threshold).cpu().numpy()[cell_of]
    return result


def summed(
    model: nn.Module, scene: Scene, how: Labelling, value: Callable[[Tensor], Tensor]
) -> tuple[FragmentSum, NDArray[np.int64]]:
    """Run the network over a scene, and sum what it gives for each cell over the fragments.

    Args:
        value: the network's output [V, D] -> what is summed, [V, C].

    Returns:
        The sums of all cells, and the cell of every Gaussian, [N].

    Raises:
        DataError, NumericError: as `label_scene`.
    """
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
            found = value(_finite(model, batch, name))
            total = total or FragmentSum(len(thinned["coord"]), found.shape[1], device)
            total.add(fragment["index"].to(device), found)
    assert total is not None  # every scene has a fragment
    cell_of: NDArray[np.int64] = thinned["inverse"]
    return total, cell_of


def _finite(model: nn.Module, batch: PointBatch, name: str) -> Tensor:
    """The model's features; in float32 where mixed precision gives NaN, as float16 attention may.

    Rows with NaN would be rejected silently: no probability reaches any threshold.
    """
    feat: Tensor = model(batch)
    if feat.isfinite().all():
        return feat
    device = batch.feat.device
    if torch.is_autocast_enabled(device.type):
        warnings.warn("mixed precision gave NaN: such parts are labelled in float32", stacklevel=2)
        with without_autocast(device):
            feat = model(batch)
    wrong = int((~feat.isfinite()).any(dim=1).sum())
    if wrong:
        raise NumericError(
            f"{one_line(name)}: the model gives NaN or infinity for {wrong} of {len(feat)} voxels "
            "in float32: are base and adapter of one training, and finite?"
        )
    return feat
