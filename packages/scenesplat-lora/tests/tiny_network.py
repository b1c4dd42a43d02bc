"""A small network and batches of random voxels, for the tests of the model."""

from typing import Any

import torch
from torch import Tensor

from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.ptv3 import PointTransformerV3
from scenesplat_lora.network.ptv3_config import CURVES, PTv3Config

SETTINGS: dict[str, Any] = {
    "in_channels": 11,
    "order": CURVES,
    "stride": (2, 2),
    "enc_depths": (1, 1, 2),
    "enc_channels": (8, 12, 16),
    "enc_num_head": (2, 2, 4),
    "enc_patch_size": (16, 16, 16),
    "dec_depths": (1, 1),
    "dec_channels": (12, 8),
    "dec_num_head": (2, 2),
    "dec_patch_size": (16, 16),
}


def tiny_config(**changes: Any) -> PTv3Config:
    return PTv3Config(**{**SETTINGS, **changes})


def tiny_backbone(seed: int = 0, **changes: Any) -> PointTransformerV3:
    """In evaluation mode, with batch statistics that are not those of a new network."""
    torch.manual_seed(seed)
    network = PointTransformerV3(tiny_config(**changes)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def voxels(*sizes: int, extent: int = 12, channels: int = 11, seed: int = 0) -> PointBatch:
    """Clouds of these sizes, no two voxels of one alike, on noisy planes."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cat([_cloud(size, extent, generator) for size in sizes])
    offset = torch.cumsum(torch.tensor(sizes), 0)
    feat = torch.randn(len(grid), channels, generator=generator)
    return PointBatch(feat, grid, offset, grid * 0.02)


def _cloud(size: int, extent: int, generator: torch.Generator) -> Tensor:
    places = torch.cartesian_prod(*[torch.arange(extent)] * 3)
    places = places[(places % extent < 4).any(1)]
    assert len(places) >= size
    return places[torch.randperm(len(places), generator=generator)[:size]].int()
