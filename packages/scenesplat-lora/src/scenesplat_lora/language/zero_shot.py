"""Zero-shot semantic segmentation: labels from the nearest text, and votes among neighbours.

    prob_ic = sigmoid(p_i . t_c)
    label_i = arg max_c prob_ic, rejected (-1) where that probability is below the threshold

with the normalised output p_i of row i and the normalised text embedding t_c of class c. There is
neither temperature nor bias, so that prob lies between 0.27 and 0.73 and the official threshold of
0.1 rejects nothing. Overlapping fragments of a scene add up their probabilities first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import DataError
from lora_core.weights import without_autocast
from scenesplat_lora.language.text_embeddings import TextEmbeddings

Labels = NDArray[np.integer]

REJECTED = -1  # label of a row without a prediction
THRESHOLD = 0.1  # official confidence threshold
NEIGHBOURS = 25  # official number of votes
ROWS_AT_ONCE = 65_536  # bounds the memory of [rows, neighbours] and [rows, classes]


def probabilities(feat: Tensor, text: TextEmbeddings) -> Tensor:
    """sigmoid(p . t^T) as float32 [N, P], P prompts.

    Args:
        feat: [N, D], of any length and floating-point dtype.

    Raises:
        DataError: another D than that of the texts.
    """
    if feat.dim() != 2 or feat.shape[1] != text.features.shape[1]:
        raise DataError(
            f"features {tuple(feat.shape)} and text embeddings {tuple(text.features.shape)} have "
            "different widths: they are of different models"
        )
    texts = text.features.to(feat.device)
    with without_autocast(feat.device):
        return torch.sigmoid(F.normalize(feat.float(), dim=1) @ texts.T)


def label(prob: Tensor, classes: Sequence[int], threshold: float = THRESHOLD) -> Tensor:
    """Class of each row's most probable prompt as int64 [N], `REJECTED` below the threshold.

    Args:
        prob: [N, P]. classes: class index of each prompt.
    """
    best, prompt = prob.max(dim=1)
    found = torch.tensor(classes, device=prob.device)[prompt]
    return found.where(best >= threshold, REJECTED)


class FragmentSum:
    """Probabilities of a scene's rows, summed over the fragments that contain them."""

    def __init__(self, rows: int, prompts: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(rows, prompts, device=device)
        self.count = torch.zeros(rows, dtype=torch.long, device=device)

    def add(self, index: Tensor, prob: Tensor) -> None:
        """Add a fragment: `prob` [n, P] belongs to the scene's rows `index`, int64 [n]."""
        self.total.index_add_(0, index, prob.to(self.total))
        self.count.index_add_(0, index, torch.ones_like(index))

    def label(self, classes: Sequence[int], threshold: float = THRESHOLD) -> Tensor:
        """As the function `label`; the threshold is compared with the mean over fragments.

        Rows in no fragment are rejected. (The official program compares the sum: the same for the
        official threshold.)
        """
        mean = self.total / self.count.clamp_min(1).unsqueeze(1)
        return label(mean, classes, threshold).where(self.count > 0, REJECTED)


# -- votes -----------------------------------------------------------------------------------------


def vote(
    labels: Labels,
    coord: NDArray[np.floating],
    query: NDArray[np.floating] | None = None,
    valid: NDArray[np.bool_] | None = None,
    k: int = NEIGHBOURS,
    workers: int = 1,
) -> NDArray[np.int64]:
    """The most frequent label among the k nearest rows of every point, as [Q].

    Rejected rows have no vote; of equally frequent labels the smallest wins. Without any vote the
    point is rejected.

    Args:
        labels: integers [N]. coord: [N, 3], metres.
        query: [Q, 3], points of a labelled cloud; None: the rows themselves.
        valid: [N], the rows that may vote; None: all.
        k: neighbours; all rows where there are fewer.
        workers: threads of the search; -1: all cores.
    """
    from scipy.spatial import cKDTree

    query = coord if query is None else query
    if valid is not None:
        labels, coord = labels[valid], coord[valid]
    if not len(labels):
        return np.full(len(query), REJECTED, np.int64)
    tree = cKDTree(coord)
    near = range(1, min(k, len(labels)) + 1)  # a list: [Q, 1] for one neighbour too
    size = max(int(labels.max()) + 1, 1)
    result = np.zeros(len(query), np.int64)
    for start in range(0, len(query), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        _, rows = tree.query(query[some], near, workers=workers)
        result[some] = _majority(labels[rows], size)
    return result


def instance_vote(labels: Labels, instance: Labels) -> NDArray[np.int64]:
    """Give every instance its most frequent label; rows of no instance (-1) keep theirs.

    Other than in `vote`, rejected rows count: an instance of mostly rejected rows is rejected. Ties
    go to the smaller label, with `REJECTED` the smallest.

    Args:
        labels, instance: integers [N].
    """
    result = labels.astype(np.int64)
    member = instance != REJECTED
    if not member.any():
        return result
    _, number = np.unique(instance[member], return_inverse=True)
    shifted = result[member] - REJECTED  # from 0 on
    size = shifted.max() + 1
    counts = np.bincount(number * size + shifted, minlength=(number.max() + 1) * size)
    result[member] = counts.reshape(-1, size).argmax(1)[number] + REJECTED
    return result


def _majority(votes: Labels, size: int) -> NDArray[np.int64]:
    """The most frequent label of each row of `votes` [Q, k], of `size` possible ones."""
    rows, columns = np.nonzero(votes != REJECTED)
    flat = rows * size + votes[rows, columns]
    counts = np.bincount(flat, minlength=len(votes) * size).reshape(-1, size)
    return np.where(counts.any(1), counts.argmax(1), REJECTED)
