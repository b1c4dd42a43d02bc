"""Normals of bare points: planes through neighbours, made consistent along a spanning tree.

H. Hoppe et al., Surface Reconstruction from Unorganized Points, SIGGRAPH 1992, sections 3.2, 3.3.
They are good enough for clouds without normals; the faces of a mesh have exact ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 16
FEWEST = 4  # distinct points that a plane with two sides needs


def estimate_normals(points: NDArray[Any], neighbours: int = NEIGHBOURS) -> NDArray[np.float32]:
    """Unit normals that point outward.

    n_i is the eigenvector of the smallest eigenvalue of the covariance of the `neighbours` points
    nearest to p_i, itself among them. Its sign goes along the minimum spanning tree of the
    neighbour graph with weights 1 - |n_i . n_j|, from the point of each connected part that is
    farthest from the part's centroid, where outward is away from the centroid.

    Args:
        points: [N, 3], any floating type; points that coincide get the same normal.

    Returns:
        f32 [N, 3].

    Raises:
        ValueError: fewer than 4 distinct points.
    """
    # Copies of one point would be all of its neighbours and leave the plane open.
    distinct, inverse = np.unique(points, axis=0, return_inverse=True)
    if len(distinct) < FEWEST:
        raise ValueError(f"{len(distinct)} distinct points, expected at least {FEWEST}")
    distinct = distinct.astype(np.float64)
    near = _nearest(distinct, min(neighbours, len(distinct)))
    normals = _plane_normals(distinct, near)
    signs = _outward_signs(distinct, normals, near)
    return (normals * signs[:, None]).astype(np.float32)[inverse.reshape(-1)]


def _nearest(points: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """[N, count] indices of the nearest points, itself among them."""
    from scipy.spatial import cKDTree

    return cKDTree(points).query(points, k=count)[1].astype(np.int64)


def _plane_normals(
    points: NDArray[np.float64], near: NDArray[np.int64], rows: int = 65_536
) -> NDArray[np.float64]:
    """[N, 3] unit normals of either sign; `rows` points at a time bound the memory."""
    normals = np.empty_like(points)
    for begin in range(0, len(points), rows):
        patch = points[near[begin : begin + rows]]  # [rows, k, 3]
        patch = patch - patch.mean(axis=1, keepdims=True)
        covariance = np.einsum("nki,nkj->nij", patch, patch)
        normals[begin : begin + rows] = np.linalg.eigh(covariance)[1][:, :, 0]
    return normals


def _outward_signs(
    points: NDArray[np.float64], normals: NDArray[np.float64], near: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[N] of +1 and -1 that turn the normals outward."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import (
        breadth_first_order,
        connected_components,
        minimum_spanning_tree,
    )

    count, width = near.shape
    source, target = np.repeat(np.arange(count), width), near.reshape(-1)
    weight = 1 - np.abs((normals[source] * normals[target]).sum(axis=1)).clip(max=1)
    # An entry of zero would be no edge, and an edge in both directions would count twice as one.
    low, high = np.minimum(source, target), np.maximum(source, target)
    edges, first = np.unique(low * count + high, return_index=True)
    edge = (edges // count, edges % count)
    graph = coo_array((weight[first] + 1e-9, edge), shape=(count, count)).tocsr()
    tree = minimum_spanning_tree(graph)
    parts, part = connected_components(tree, directed=False)
    parent = np.arange(count)
    signs = np.ones(count)
    for root, outward in _roots(points, part, parts):
        _, before = breadth_first_order(tree, root, directed=False)
        reached = before >= 0
        parent[reached] = before[reached]
        signs[root] = 1.0 if normals[root] @ outward >= 0 else -1.0
    child = parent != np.arange(count)
    agree = (normals * normals[parent]).sum(axis=1) >= 0
    signs[child] = np.where(agree, 1.0, -1.0)[child]
    return _multiplied_to_root(signs, parent)


def _roots(
    points: NDArray[np.float64], part: NDArray[Any], parts: int
) -> list[tuple[int, NDArray[np.float64]]]:
    """For each part, the index of its point farthest from its centroid, and the way there."""
    order = np.argsort(part, kind="stable")
    found = []
    for members in np.split(order, np.cumsum(np.bincount(part, minlength=parts))[:-1]):
        away = points[members] - points[members].mean(axis=0)
        farthest = int((away**2).sum(axis=1).argmax())
        found.append((int(members[farthest]), away[farthest]))
    return found


def _multiplied_to_root(signs: NDArray[np.float64], parent: NDArray[np.int64]) -> NDArray[Any]:
    """Products of the signs on the way from each node to its root, which is its own parent.

    Every round doubles the length of the way, so that log2(depth) rounds do.
    """
    own = signs.copy()
    own[parent == np.arange(len(parent))] = 1.0  # counted once, at the end
    while (parent[parent] != parent).any():
        own = own * own[parent]
        parent = parent[parent]
    return own * signs[parent]
