"""How near generated scenes are to the true ones: chamfer distance, F-score, box IoU, ICP.

With d(a, B) the distance from a point to the nearest of B, P predicted and G true points:

    chamfer    mean_{p ∈ P} d(p, G)² + mean_{g ∈ G} d(g, P)²          squared distances
    precision  share of P with d(p, G) < τ,  recall: share of G with d(g, P) < τ
    F-score    2 precision recall / (precision + recall)              0 ... 1, at τ = 0.1
    box IoU    volume IoU of the axis-aligned bounding boxes          0 ... 1

A scene is measured as the union of its instances, an object with both sides stretched per axis to
±0.95. Both are measured as they lie and after rigid alignment (ICP). The alignment of the official
evaluation applies the transposed rotation, so its published numbers compare with neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from lora_core.errors import DataError

Points = NDArray[np.float64]  # [N, 3] xyz

TAU = 0.1  # of the F-score, official evaluation
AT_ONCE = 10_000  # points from which threads are faster
HALF_EXTENT = 0.95  # of stretched objects, official evaluation


# -- two sets of points ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Two sets of points compared.

    Attributes:
        predicted_to_true: mean squared distance from predicted to true points.
        true_to_predicted: and back.
        precision: 0 ... 1.
        recall: 0 ... 1.
    """

    predicted_to_true: float
    true_to_predicted: float
    precision: float
    recall: float

    @property
    def chamfer(self) -> float:
        """The sum of both mean squared distances; NaN without predicted points."""
        return self.predicted_to_true + self.true_to_predicted

    @property
    def f_score(self) -> float:
        """The harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def compare(predicted: ArrayLike, true: ArrayLike, tau: float = TAU) -> Scores:
    """Chamfer distance and F-score as the points lie.

    Args:
        predicted: [P, 3], any number dtype. Without points there is no distance (NaN), and the
            F-score is 0: an instance without a surface is a miss.
        true: [G, 3].
        tau: distance at which a point counts as met, in the scene's units.

    Raises:
        DataError: other shapes, NaN or infinity, or no true points.
    """
    ours, theirs = points(predicted, "predicted"), _some(true)
    if not len(ours):
        return Scores(np.nan, np.nan, 0.0, 0.0)
    forward = _nearest(cKDTree(theirs), ours)[0]
    backward = _nearest(cKDTree(ours), theirs)[0]
    return Scores(
        float((forward**2).mean()),
        float((backward**2).mean()),
        float((forward < tau).mean()),
        float((backward < tau).mean()),
    )


def _nearest(tree: cKDTree, some: Points) -> tuple[Points, NDArray[np.intp]]:
    """Distance and number of the nearest point, [N] each; by all processors if that is worth it."""
    distances, numbers = tree.query(some, workers=-1 if len(some) >= AT_ONCE else 1)
    return distances, numbers


def box_iou(predicted: ArrayLike, true: ArrayLike) -> float:
    """Volume IoU of the axis-aligned boxes around two sets of points; 0 without predicted points.

    Two flat sets have no volume: 1 if their boxes are equal, else 0.

    Raises:
        DataError: see `compare`.
    """
    ours, theirs = points(predicted, "predicted"), _some(true)
    if not len(ours):
        return 0.0
    low = np.stack([ours.min(0), theirs.min(0)])
    high = np.stack([ours.max(0), theirs.max(0)])
    shared = np.prod(np.clip(high.min(0) - low.max(0), 0, None))
    union = np.prod(high - low, axis=1).sum() - shared
    if union <= 0:
        return float(np.array_equal(low[0], low[1]) and np.array_equal(high[0], high[1]))
    return float(shared / union)


def points(values: ArrayLike, name: str) -> Points:
    """Finite float64 [N, 3].

    Raises:
        DataError: another shape, or NaN and infinity.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.shape[1] != 3:
        raise DataError(f"{name} points: shape {list(array.shape)}, expected [N, 3]")
    bad = int((~np.isfinite(array).all(1)).sum())
    if bad:
        raise DataError(f"{name} points: {bad} of {len(array)} are NaN or infinite")
    return array


def _some(true: ArrayLike) -> Points:
    array = points(true, "true")
    if not len(array):
        raise DataError("true points: there are none, so there is nothing to compare with")
    return array


# -- alignment -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rigid:
    """x ↦ R x + t.

    Attributes:
        rotation: R [3, 3], orthogonal with determinant 1.
        translation: t [3].
    """

    rotation: Points
    translation: Points

    def __call__(self, values: Points) -> Points:
        """Moved points [N, 3]."""
        moved: Points = values @ self.rotation.T + self.translation
        return moved


def fit_rigid(source: Points, target: Points) -> Rigid:
    """The rigid motion with the least Σ |R s_i + t - d_i|², for points that correspond.

    With H = Σ (s_i - s̄)(d_i - d̄)ᵀ = U S Vᵀ: R = V diag(1, 1, det(V Uᵀ)) Uᵀ, t = d̄ - R s̄
    (Kabsch 1976, Umeyama 1991). Trap: `numpy.linalg.svd` gives Vᵀ where `torch.svd` gives V.

    Args:
        source: s [N, 3].
        target: d [N, 3].
    """
    source_centre, target_centre = source.mean(0), target.mean(0)
    u, _, vt = np.linalg.svd((source - source_centre).T @ (target - target_centre))
    no_mirror = np.diag([1.0, 1.0, np.sign(np.linalg.det(vt.T @ u.T))])
    rotation = vt.T @ no_mirror @ u.T
    return Rigid(rotation, target_centre - rotation @ source_centre)


def icp(
    source: ArrayLike, target: ArrayLike, iterations: int = 50, tolerance: float = 1e-5
) -> Rigid:
    """Iterative closest point (Besl and McKay 1992): the nearest local alignment, not the best one.

    Args:
        source: points to be moved [N, 3].
        target: points that stay [M, 3].
        iterations: at most.
        tolerance: end when the mean nearest distance changes by less.

    Raises:
        DataError: see `compare`; also without source points.
    """
    moving, fixed = points(source, "predicted"), _some(target)
    if not len(moving):
        raise DataError("predicted points: there are none, so there is nothing to align")
    tree = cKDTree(fixed)
    motion, before = Rigid(np.eye(3), np.zeros(3)), np.inf
    for _ in range(iterations):
        distances, nearest = _nearest(tree, motion(moving))
        residual = float(distances.mean())
        if abs(before - residual) < tolerance:
            break
        before = residual
        motion = fit_rigid(moving, fixed[nearest])  # from the start, so that rounding never adds up
    return motion


def compare_aligned(predicted: ArrayLike, true: ArrayLike, tau: float = TAU) -> Scores:
    """As `compare`, after the predicted points were moved by `icp`.

    Raises:
        DataError: see `compare`.
    """
    ours = points(predicted, "predicted")
    return compare(icp(ours, true)(ours) if len(ours) else ours, true, tau)


def stretch(values: ArrayLike) -> Points:
    """Points [N, 3] with every axis stretched to ±0.95; an axis without extent becomes 0.

    x ↦ 1.9 (x - min) / (max - min) - 0.95

    Raises:
        DataError: see `compare`.
    """
    array = points(values, "object")
    if not len(array):
        return array
    low, extent = array.min(0), np.ptp(array, axis=0)
    flat = extent == 0
    unit = (array - low) / np.where(flat, 1, extent)
    stretched: Points = np.where(flat, 0, HALF_EXTENT * (2 * unit - 1))
    return stretched


# -- scenes ----------------------------------------------------------------------------------------


def score_scene(
    predicted: Sequence[ArrayLike], true: Sequence[ArrayLike], tau: float = TAU
) -> dict[str, float]:
    """All numbers of a scene.

    Args:
        predicted: surface points of every instance [P_k, 3]; [0, 3] for one without a surface.
        true: of the same instances in the same order [G_k, 3].
        tau: see `compare`.

    Returns:
        `scene_` and `object_` with `chamfer`, `f_score`, `chamfer_icp`, `f_score_icp`; `box_iou`;
        `empty_objects`, a count. Those of objects are means: chamfer over objects with a surface
        (NaN if there is none), the others over all, where one without a surface has 0.

    Raises:
        DataError: other numbers of instances, or see `compare`.
    """
    if len(predicted) != len(true) or not true:
        raise DataError(f"{len(predicted)} predicted instances for {len(true)} true ones")
    ours = [points(p, f"predicted instance {k}") for k, p in enumerate(predicted)]
    theirs = [points(p, f"true instance {k}") for k, p in enumerate(true)]
    if not all(len(p) for p in theirs):
        raise DataError("a true instance has no points")
    scene = _both(np.concatenate(ours), np.concatenate(theirs), tau)
    objects = mean_scores(
        [_both(stretch(p), stretch(g), tau) for p, g in zip(ours, theirs, strict=True)]
    )
    scores = {f"scene_{name}": value for name, value in scene.items()}
    scores |= {f"object_{name}": value for name, value in objects.items()}
    boxes = [box_iou(p, g) for p, g in zip(ours, theirs, strict=True)]
    scores["box_iou"] = float(np.mean(boxes))
    scores["empty_objects"] = float(sum(not len(p) for p in ours))
    return scores


def _both(ours: Points, theirs: Points, tau: float) -> dict[str, float]:
    plain, aligned = compare(ours, theirs, tau), compare_aligned(ours, theirs, tau)
    return {
        "chamfer": plain.chamfer,
        "f_score": plain.f_score,
        "chamfer_icp": aligned.chamfer,
        "f_score_icp": aligned.f_score,
    }


def mean_scores(scored: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number over scenes or objects, without those that have none (NaN).

    Chamfer distances alone would reward a model for giving up hard objects; F-scores, which count
    them as 0, and `empty_objects` show it.

    Raises:
        DataError: nothing to take a mean of.
    """
    if not scored:
        raise DataError("no scores to take the mean of")
    means = {}
    for name in scored[0]:
        values = np.array([scores[name] for scores in scored])
        known = values[~np.isnan(values)]
        means[name] = float(known.mean()) if len(known) else float("nan")
    return means
