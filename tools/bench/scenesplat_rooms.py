"""Voxels as scenes have them: the surfaces of a room, with holes and noise."""

from __future__ import annotations

import torch
from torch import Tensor

SIDES = (177, 146, 123)  # voxels; of 2 cm, a room of 3.5 x 2.9 x 2.5 m
COUNT = 120_000  # voxels of such a room


def room(count: int) -> Tensor:
    """int64 [about `count`, 3]: walls, floor and ceiling of a room, in random order.

    A tenth is missing and a seventh stands one voxel beside its surface, so that a voxel has about
    eight neighbours within 3^3 voxels, itself included, whatever the size of the room.
    """
    generator = torch.Generator().manual_seed(0)
    sides = [round(side * (count / COUNT) ** 0.5) for side in SIDES]
    walls = []
    for axis in range(3):
        for level in (0, sides[axis] - 1):
            ranges = [torch.arange(side) for side in sides]
            ranges[axis] = torch.tensor([level])
            walls.append(torch.cartesian_prod(*ranges))
    places = torch.cat(walls)
    places = places[torch.rand(len(places), generator=generator) > 0.1]
    beside = torch.rand(len(places), 1, generator=generator) < 0.15
    places = places + 1 + torch.randint(-1, 2, places.shape, generator=generator) * beside
    places = places.unique(dim=0)
    return places[torch.randperm(len(places), generator=generator)]
