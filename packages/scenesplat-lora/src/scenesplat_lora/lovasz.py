"""Lovász softmax: a convex surrogate of the mean IoU (Berman, Triki, Blaschko, CVPR 2018).

For class c let m_i = 1 - f_ic where row i is of class c, else f_ic, be the error of row i, sorted
in descending order. With J(k) the Jaccard loss 1 - |truth minus k first| / |truth or k first| of
the k rows with the largest errors,

    loss_c = sum over k of m_(k) (J(k) - J(k - 1)),

and the loss is the mean over the classes that occur.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lovasz_softmax(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Lovász softmax loss over all rows together.

    Args:
        probabilities: [N, C], N at least 1. labels: int64 [N], class indices.
    """
    losses = []
    for index in labels.unique().tolist():
        truth = labels == index
        errors = (truth.to(probabilities.dtype) - probabilities[:, index]).abs()
        errors, order = torch.sort(errors, descending=True, stable=True)
        losses.append((errors * jaccard_steps(truth[order]).to(errors.dtype)).sum())
    return torch.stack(losses).mean()


def jaccard_steps(truth: Tensor) -> Tensor:
    """J(k) - J(k - 1) for k = 1 ... N, with J(0) = 0, as float64 [N].

    Args:
        truth: bool [N], rows of the class, in the order of their errors.
    """
    # Whole numbers: in float32 a cumulative sum is wrong beyond 16.7 million rows.
    hits = truth.cumsum(0)
    misses = (~truth).cumsum(0)
    total = hits[-1]
    jaccard = 1 - (total - hits).double() / (total + misses).double()
    return torch.diff(jaccard, prepend=jaccard.new_zeros(1))
