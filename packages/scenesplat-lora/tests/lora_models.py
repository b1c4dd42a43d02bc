"""A small backbone with random weights, and a batch for it."""

import torch
from torch import nn

from scenesplat_lora.network.models import LangPretrainer
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.ptv3_config import CURVES, PTv3Config

TINY = PTv3Config(
    in_channels=5,
    order=CURVES,
    stride=(2, 2),
    enc_depths=(1, 1, 2),
    enc_channels=(16, 16, 32),
    enc_num_head=(2, 2, 4),
    enc_patch_size=(32, 32, 32),
    dec_depths=(1, 1),
    dec_channels=(24, 16),
    dec_num_head=(2, 2),
    dec_patch_size=(32, 32),
    drop_path=0.0,
)


def tiny_model(seed: int = 0) -> LangPretrainer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LangPretrainer(TINY).eval()


def tiny_batch(rows: int = 150, seed: int = 0) -> PointBatch:
    draw = torch.Generator().manual_seed(seed)
    voxels = torch.randint(0, 12, (4 * rows, 3), generator=draw).unique(dim=0)
    voxels = voxels[torch.randperm(len(voxels), generator=draw)[:rows]]
    feat = torch.randn(len(voxels), 5, generator=draw)
    return PointBatch(feat, voxels, torch.tensor([len(voxels)]), voxels * 0.02)


def perturb(model: nn.Module, scale: float = 0.3, seed: int = 0) -> None:
    """Give every trained parameter another value, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
