"""mIoU and mAcc of semantic segmentation, in the two definitions that SceneSplat publishes.

Everything comes from one table over all scenes: rows true class, columns predicted class, a last
column for points without a prediction. Points without a label do not count. With I_c the hits of
class c, T_c its labelled points, P_c the points predicted as c, R_c its rejected points:

    U_c = T_c + P_c - I_c
    tester      IoU_c = I_c / (U_c + 1e-10)     mean over classes with U_c > 0
                Acc_c = I_c / (T_c + 1e-10)     mean over classes with T_c > 0
    evaluator   IoU_c = I_c / U_c               mean over classes with T_c > 0
                Acc_c = I_c / (T_c - R_c)       mean over classes with T_c > R_c

The tester is the final evaluation, the evaluator what official training prints after an epoch: it
forgives rejected points in the accuracies, and does not count a class that is only predicted.
"Foreground" leaves out classes such as wall, floor and ceiling.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import ConfigError, DataError, near

Labels = NDArray[np.integer]

EPS = 1e-10  # of the tester's definition


@dataclass
class Confusion:
    """Counts of (true class, predicted class) pairs, summed over scenes.

    Attributes:
        classes: their names.
        ignored: label of points without a class, in truth and prediction.
        counts: int64 [C, C + 1]; the last column are points without a prediction.
    """

    classes: Sequence[str]
    ignored: int = -1
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes) or not self.classes:
            raise ConfigError(f"class names must be different and at least one: {self.classes}")
        self.counts = np.zeros((len(self.classes), len(self.classes) + 1), np.int64)

    def add(self, truth: Labels, predicted: Labels) -> None:
        """Count the points of a scene; both are integers [N], class indices or `ignored`.

        Raises:
            DataError: other shapes, or an index that no class has; nothing is counted then.
        """
        if truth.shape != predicted.shape or truth.ndim != 1:
            raise DataError(f"{predicted.shape} predictions for {truth.shape} labels")
        size = len(self.classes)
        for name, labels in (("labels", truth), ("predictions", predicted)):
            known = labels[labels != self.ignored]
            if known.size and not 0 <= known.min() <= known.max() < size:
                raise DataError(
                    f"{name} from {known.min()} to {known.max()} for {size} classes (0 to "
                    f"{size - 1}; {self.ignored}: none)"
                )
        labelled = truth != self.ignored
        rows = truth[labelled].astype(np.int64)
        columns = predicted[labelled].astype(np.int64)
        columns = np.where(columns == self.ignored, size, columns)
        pairs = np.bincount(rows * (size + 1) + columns, minlength=self.counts.size)
        self.counts += pairs.reshape(self.counts.shape)

    def foreground(self, excluded: Collection[str]) -> NDArray[np.bool_]:
        """Which classes are not among `excluded`.

        Raises:
            ConfigError: a name that no class has.
        """
        for name in excluded:
            if name not in self.classes:
                hint = near(name, self.classes)
                raise ConfigError(f"excluded class {name!r} is no class; {hint}".rstrip("; "))
        return np.array([name not in excluded for name in self.classes])

    @property
    def hits(self) -> NDArray[np.int64]:
        """I_c."""
        return self.counts.diagonal()

    @property
    def target(self) -> NDArray[np.int64]:
        """T_c."""
        counted: NDArray[np.int64] = self.counts.sum(1)
        return counted

    @property
    def rejected(self) -> NDArray[np.int64]:
        """R_c."""
        return self.counts[:, -1]

    @property
    def union(self) -> NDArray[np.int64]:
        """U_c."""
        union: NDArray[np.int64] = self.target + self.counts[:, :-1].sum(0) - self.hits
        return union


def final_scores(table: Confusion, excluded: Collection[str] = ()) -> dict[str, float]:
    """mIoU, mAcc and allAcc of the final tester, and the same with "fg_" for the foreground.

    Rejected points are misses. All are 0 ... 1, and 0 without any labelled point.
    """
    scores = _tester(table, np.ones(len(table.classes), bool), "")
    return scores | _tester(table, table.foreground(excluded), "fg_")


def _tester(table: Confusion, chosen: NDArray[np.bool_], prefix: str) -> dict[str, float]:
    hits, target = table.hits, table.target
    return {
        f"{prefix}mIoU": _mean(hits, table.union, chosen, EPS),
        f"{prefix}mAcc": _mean(hits, target, chosen, EPS),
        f"{prefix}allAcc": float(hits[chosen].sum() / (target[chosen].sum() + EPS)),
    }


def epoch_scores(table: Confusion, excluded: Collection[str] = ()) -> dict[str, float]:
    """The figures that official training prints after an epoch; "fg_mIoU" chooses the best one.

    mIoU, fg_mIoU, global_acc, mean_class_acc, fg_mAcc, all 0 ... 1.
    """
    foreground, accepted = table.foreground(excluded), table.target - table.rejected
    hits, union, present = table.hits, table.union, table.target > 0
    return {
        "mIoU": _mean(hits, union, present),
        "fg_mIoU": _mean(hits, union, present & foreground),
        "global_acc": float(hits.sum() / max(accepted.sum(), 1)),
        "mean_class_acc": _mean(hits, accepted, present),
        "fg_mAcc": _mean(hits, accepted, present & foreground),
    }


def class_scores(table: Confusion) -> dict[str, dict[str, float]]:
    """Class name -> its IoU and accuracy as the tester has them, and its labelled points.

    NaN where a class does not occur.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = table.hits / table.union, table.hits / table.target
    return {
        name: {"IoU": float(iou[c]), "Acc": float(accuracy[c]), "points": int(table.target[c])}
        for c, name in enumerate(table.classes)
    }


def _mean(
    part: NDArray[np.int64],
    whole: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    eps: float = 0.0,
) -> float:
    """Mean of part / (whole + eps) over the chosen classes whose whole is not 0."""
    chosen = chosen & (whole > 0)
    return float((part[chosen] / (whole[chosen] + eps)).mean()) if chosen.any() else 0.0
