"""What a language or segmentation model is trained with.

Rows are voxels. p_i is the L2-normalised output of row i, t_i its language feature, M the number of
rows whose feature is valid.

    cosine       1/M sum (1 - cos(p_i, t_i))
    L2           1/M sum |p_i - t_i|^2             (for unit t twice the cosine term)
    contrastive  the rows of every class, split at random in two halves, find each other
    cross-entropy and Lovász softmax on the logits of a segmentation head

Each function gives the unweighted term in float32; the weights are in `Term`. A batch without any
row that counts gives 0, still connected to the prediction, with a gradient of zeros: all processes
of a distributed run then do the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import ConfigError, DataError, near
from lora_core.weights import without_autocast
from scenesplat_lora.lovasz import lovasz_softmax

Reduction = Literal["mean", "sum"]

COSINE_EPS = 1e-8  # least norm of a vector in a cosine
MIN_ROWS = 100  # rows of a class that the contrastive loss takes part with
IGNORED = -1  # class index of rows without a label
DISTILLATION = ("CosineSimilarity", "L2Loss", "AggregatedContrastiveLoss")
SEGMENTATION = ("CrossEntropyLoss", "LovaszLoss")


@dataclass(frozen=True)
class Term:
    """One term of the loss, with the names and defaults of the official configuration files.

    Attributes:
        type: one of `DISTILLATION` or `SEGMENTATION`.
        reduction: of the rows (cosine, L2) or of the classes (contrastive).
        temperature, schedule: of the contrastive loss; see `contrastive_loss`, `is_active`.
        ignore_index: class index of rows without a label.

    Raises:
        ConfigError: a value that cannot work.
    """

    type: str
    loss_weight: float = 1.0
    reduction: Reduction = "mean"
    temperature: float = 0.2
    schedule: str = "all"
    ignore_index: int = IGNORED

    def __post_init__(self) -> None:
        kinds = DISTILLATION + SEGMENTATION
        if self.type not in kinds:
            hint = near(self.type, kinds)
            raise ConfigError(
                f"loss {self.type!r}: it must be one of {', '.join(kinds)}{hint and '; ' + hint}"
            )
        if self.reduction not in ("mean", "sum"):
            raise ConfigError(f"{self.type}: reduction {self.reduction!r} is neither mean nor sum")
        if not 0 <= self.loss_weight < float("inf"):
            raise ConfigError(
                f"{self.type}: loss_weight is {self.loss_weight!r}: it must be a number, 0 or more"
            )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"{self.type}: temperature is {self.temperature!r}: it must be a number above 0"
            )
        _active_share(self.schedule)


# -- terms -----------------------------------------------------------------------------------------


def cosine_loss(pred: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """1/M sum of 1 - cos(p_i, t_i) over valid rows; "sum": without 1/M.

    Args:
        pred, target: [M, D] of any floating-point dtype.
    """
    # The target keeps its dtype: torch takes the length of a half-precision one in half precision,
    # as the recorded official values have it. Batches hold float32, which is exact.
    cosine = F.cosine_similarity(pred.float(), target, dim=1, eps=COSINE_EPS)
    return _reduced((1 - cosine).sum(), pred, reduction)


def l2_loss(pred: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """1/M sum of |p_i - t_i|^2 over valid rows, without a factor 1/2; "sum": without 1/M.

    Args:
        pred, target: [M, D] of any floating-point dtype.
    """
    return _reduced((pred.float() - target).square().sum(), pred, reduction)


def contrastive_loss(
    pred: Tensor,
    segment: Tensor,
    temperature: float = 0.2,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Two random halves of each class are each other's match among the classes.

    a_c and b_c are the normalised sums of p over the first floor(n/2) and the other rows of class
    c, in random order; with logits L = a b^T / temperature the loss is
    (CE(L, diagonal) + CE(L^T, diagonal)) / 2, over classes with at least `MIN_ROWS` rows.

    Args:
        pred: [M, D] valid rows. segment: integers [M], their classes.
        reduction: "sum" multiplies the mean by the number of classes.
        generator: of the CPU; None: torch's own. One permutation per class, classes ascending.
    """
    group, classes = _halves(segment, generator, ignore_index)
    if classes == 0:
        return _no_rows(pred)
    # Rows of no class go to a group of their own: no copy of the other rows has to be made.
    sums = pred.new_zeros(2 * classes + 1, pred.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, group, pred.float())
    a, b = F.normalize(sums[:-1], dim=1).view(classes, 2, -1).unbind(1)
    with without_autocast(pred.device):  # which would round the logits to half precision
        logits = a @ b.T / temperature
    diagonal = torch.arange(classes, device=pred.device)
    loss = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    return loss * classes if reduction == "sum" else loss


def cross_entropy_loss(logits: Tensor, segment: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Mean cross-entropy of labelled rows.

    Args:
        logits: [N, C]. segment: integers [N], class indices or `ignore_index`.
    """
    if not (segment != ignore_index).any():
        return _no_rows(logits)
    return F.cross_entropy(logits.float(), segment.long(), ignore_index=ignore_index)


def lovasz_loss(logits: Tensor, segment: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Lovász softmax of labelled rows; arguments as for `cross_entropy_loss`."""
    labelled = segment != ignore_index
    if not labelled.any():
        return _no_rows(logits)
    return lovasz_softmax(logits[labelled].float().softmax(dim=1), segment[labelled].long())


def _reduced(total: Tensor, rows: Tensor, reduction: Reduction) -> Tensor:
    return total / max(len(rows), 1) if reduction == "mean" else total


def _no_rows(pred: Tensor) -> Tensor:
    """0 with a gradient of zeros."""
    return pred[:0].float().sum()


def _halves(
    segment: Tensor, generator: torch.Generator | None, ignore_index: int
) -> tuple[Tensor, int]:
    """Group of every row, and the number C of classes that take part.

    Rows of the c-th class are in group 2c (first half) or 2c + 1, all others in group 2C.
    """
    present, counts = segment[segment != ignore_index].unique(return_counts=True)
    classes = present[counts >= MIN_ROWS]
    group = torch.full(segment.shape, 2 * len(classes), dtype=torch.long, device=segment.device)
    for number, index in enumerate(classes.tolist()):
        rows = torch.nonzero(segment == index).squeeze(1)
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        half = len(rows) // 2
        group[rows[order[:half]]] = 2 * number
        group[rows[order[half:]]] = 2 * number + 1
    return group, len(classes)


# -- schedule --------------------------------------------------------------------------------------


def is_active(schedule: str, progress: float) -> bool:
    """Whether a term counts in this epoch.

    Args:
        schedule: "all", "skip", or "last_X": once progress > 1 - X/100, not when it is equal.
        progress: current epoch / all epochs, constant within an epoch.

    Raises:
        ConfigError: another schedule.
    """
    share = _active_share(schedule)
    return share == 1 or progress > 1 - share


def _active_share(schedule: str) -> float:
    """The share of the epochs, the last ones, in which a term counts."""
    if schedule in ("all", "skip"):
        return float(schedule == "all")
    found = re.fullmatch(r"last_(\d{1,3})", schedule) if isinstance(schedule, str) else None
    if found is None or not 0 < int(found[1]) <= 100:
        raise ConfigError(
            f"loss schedule {schedule!r}: it must be all, skip, or last_X with X from 1 to 100 "
            "percent of the epochs, as in last_75"
        )
    return int(found[1]) / 100


# -- sums ------------------------------------------------------------------------------------------


def distillation_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    segment: Tensor | None,
    terms: Sequence[Term],
    progress: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a language model's terms, and each term by its type.

    Args:
        pred: [N, D], L2-normalised. target: [N, D]. valid: bool [N], rows with a target.
        segment: integers [N]; without it contrastive terms are 0.
        progress: current epoch / all epochs. generator: see `contrastive_loss`.

    Raises:
        DataError: tensors that do not belong together. ConfigError: a term of segmentation.
    """
    _check_rows(pred, target, valid, segment)
    if not valid.all():
        pred, target = pred[valid], target[valid]
        segment = None if segment is None else segment[valid]

    def value(term: Term) -> Tensor:
        if term.type == "CosineSimilarity":
            return cosine_loss(pred, target, term.reduction)
        if term.type == "L2Loss":
            return l2_loss(pred, target, term.reduction)
        if term.type != "AggregatedContrastiveLoss":
            raise ConfigError(f"{term.type} needs a segmentation head: not for a language model")
        if segment is None or not is_active(term.schedule, progress):
            return _no_rows(pred)
        return contrastive_loss(
            pred, segment, term.temperature, term.reduction, generator, term.ignore_index
        )

    return _weighted(terms, value, pred)


def segmentation_loss(
    logits: Tensor, segment: Tensor, terms: Sequence[Term]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a segmentation model's terms, and each term by its type.

    Args:
        logits: [N, C]. segment: integers [N], class indices or `ignore_index`.

    Raises:
        DataError: labels beyond the classes. ConfigError: a term of distillation.
    """
    if len(segment) != len(logits):
        raise DataError(f"{len(segment)} labels for {len(logits)} rows of logits")
    for ignored in {term.ignore_index for term in terms}:
        labels = segment[segment != ignored]
        if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
            raise DataError(
                f"segment has labels from {labels.min()} to {labels.max()}, the model "
                f"{logits.shape[1]} classes (0 to {logits.shape[1] - 1}; {ignored}: no label): set "
                "num_classes to that of the data"
            )

    def value(term: Term) -> Tensor:
        if term.type == "CrossEntropyLoss":
            return cross_entropy_loss(logits, segment, term.ignore_index)
        if term.type == "LovaszLoss":
            return lovasz_loss(logits, segment, term.ignore_index)
        raise ConfigError(f"{term.type} needs language features: not for a segmentation model")

    return _weighted(terms, value, logits)


def _weighted(
    terms: Sequence[Term], value: Callable[[Term], Tensor], pred: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    total = _no_rows(pred)
    parts: dict[str, Tensor] = {}
    for term in terms:
        weighted = term.loss_weight * value(term)
        total = total + weighted
        before = parts.get(term.type)
        parts[term.type] = weighted.detach() if before is None else before + weighted.detach()
    return total, parts


def _check_rows(pred: Tensor, target: Tensor, valid: Tensor, segment: Tensor | None) -> None:
    shapes = {"lang_feat": target, "valid_feat_mask": valid, "segment": segment}
    wrong = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in shapes.items()
        if tensor is not None and len(tensor) != len(pred)
    ]
    if target.dim() != 2 or target.shape[1:] != pred.shape[1:]:
        wrong.append(f"lang_feat {tuple(target.shape)} in place of (N, {pred.shape[1]})")
    if valid.dtype != torch.bool:
        wrong.append(f"valid_feat_mask {valid.dtype} in place of bool")
    if wrong:
        raise DataError(f"for {len(pred)} predicted rows the batch has " + "; ".join(wrong))
