"""Language features of Gaussians from the masks of posed images.

    f_i = normalise( sum over views v that see Gaussian i of  w_m g_m,  m = m(i, v) )

with the unit feature g_m of the mask m that the centre of Gaussian i falls into in view v, and its
confidence w_m, 1 where none is given. What a view sees: `splat_depth.visible`.

Only (Gaussian, mask) pairs are kept, 8 bytes each, and features are summed for a block of Gaussians
at a time: a million Gaussians with features of width 768 would be 3 GB as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scenesplat_lora.posed.pinhole import View
from scenesplat_lora.posed.splat_depth import Splats, depth_map, splats, visible
from scenesplat_lora.scenes.scene import Scene

ROWS_AT_ONCE = 65_536  # 200 MB of float32 features
SHORT = 1e-4  # length of a mean of unit vectors that point in all directions


class Labelled(NamedTuple):
    """A view with its masks.

    Attributes:
        view: with its size.
        labels: integers [H, W]; 0: no mask.
        features: w g, float32 [M, D]; row m - 1 is of mask m. Zeros: none.
    """

    view: View
    labels: NDArray[np.integer]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class Sight:
    """How it is decided what a view sees.

    Attributes:
        side: pixels of the longer side of the map of depths.
        tolerance: metres that a Gaussian may lie behind the scene's depth.
    """

    side: int = 192
    tolerance: float = 0.05


@dataclass
class Votes:
    """Which masks the Gaussians of a scene fall into.

    Attributes:
        count: N, Gaussians.
        rows, masks: for each view int32 [n]: Gaussians, ascending, and rows of all tables.
        table: features of the masks of the views. used: rows of them all.
    """

    count: int
    rows: list[NDArray[np.int32]] = field(default_factory=list)
    masks: list[NDArray[np.int32]] = field(default_factory=list)
    table: list[NDArray[np.float32]] = field(default_factory=list)
    used: int = 0

    def add(self, rows: NDArray[np.int64], labels: NDArray[np.integer],
            features: NDArray[np.float32]) -> None:  # fmt: skip
        """Let a view vote: Gaussian rows[k] falls into mask labels[k], 0 for none."""
        held = np.zeros(len(features) + 1, np.bool_)
        held[1:] = features.any(axis=1)
        some = held[labels]
        if not self.table or features is not self.table[-1]:  # classes are the same in every view
            self.table.append(features)
            self.used += len(features)
        self.rows.append(rows[some].astype(np.int32))
        self.masks.append((labels[some] - 1 + self.used - len(features)).astype(np.int32))

    def seen(self) -> NDArray[np.int64]:
        """Views that vote for each Gaussian, [N]."""
        total = np.zeros(self.count, np.int64)
        for rows in self.rows:
            total[rows] += 1  # a view has each Gaussian once
        return total

    def features(self, least: int = 1) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Blocks of unit features float32 [n, D] and which of them are valid [n]; zero where not.

        Args:
            least: views that must vote for a Gaussian.
        """
        from scipy.sparse import csr_array

        table = np.concatenate(self.table)
        weight = np.linalg.norm(table, axis=1)
        for begin in range(0, self.count, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, self.count)
            rows, masks = self._between(begin, end)
            order = np.argsort(rows, kind="stable")
            starts = np.searchsorted(rows[order], np.arange(end - begin + 1))
            ones = np.ones(len(rows), np.float32)
            votes = csr_array((ones, masks[order], starts), (end - begin, len(table)))
            total = votes @ table
            counts = np.diff(starts)
            length = np.linalg.norm(total, axis=1)
            valid = (counts >= least) & (length > SHORT * (votes @ weight))
            total[~valid] = 0
            total[valid] /= length[valid, None]
            yield total, valid

    def _between(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Votes for the Gaussians begin ... end - 1, which are counted from 0."""
        rows, masks = [], []
        for own, voted in zip(self.rows, self.masks, strict=True):
            low, high = np.searchsorted(own, (begin, end))
            rows.append(own[low:high].astype(np.int64) - begin)
            masks.append(voted[low:high])
        return np.concatenate(rows), np.concatenate(masks)


def collect_votes(
    scene: Scene, views: Iterable[Labelled], sight: Sight, device: torch.device | str = "cpu"
) -> Votes:
    """Look from every view at the Gaussians of a scene as `read_scene` gives it."""
    gaussians = splats(scene, device)
    votes = Votes(len(scene["coord"]))
    for view, labels, features in views:
        rows, pixel = seen_from(gaussians, view, sight)
        votes.add(rows, labels[pixel[:, 0], pixel[:, 1]], features)
    return votes


def seen_from(
    gaussians: Splats, view: View, sight: Sight
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Gaussians that a view sees, int64 [n] ascending, and their (row, column) in it, [n, 2]."""
    depth = depth_map(gaussians, view, sight.side)
    rows, pixel = visible(gaussians, view, depth, sight.tolerance)
    return rows.cpu().numpy(), pixel.cpu().numpy()


def unit_rows(features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length 1, float32 [M, D]; rows of zeros stay."""
    values = features.astype(np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    length[length == 0] = 1
    return (values / length).astype(np.float32, copy=False)
