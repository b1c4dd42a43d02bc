"""The two official models around the backbone; their names are those of the official configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scenesplat_lora.point_batch import PointBatch
from scenesplat_lora.ptv3 import PointTransformerV3
from scenesplat_lora.ptv3_config import PTv3Config

CHUNK_SIZE = 600_000  # voxels; the official value, from a limit of spconv


class LangPretrainer(nn.Module):
    """The language model: unit vectors comparable with SigLIP 2's text embeddings.

    Attributes:
        chunk_size: with more rows, evaluation runs consecutive ranges of this many by themselves,
            each as one cloud; None: never.
    """

    def __init__(
        self,
        config: PTv3Config,
        chunk_size: int | None = CHUNK_SIZE,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.backbone = PointTransformerV3(config, compute_dtype)

    def forward(self, batch: PointBatch | Mapping[str, Any]) -> Tensor:
        """Rows [N, C] of length 1."""
        points = batch if isinstance(batch, PointBatch) else PointBatch.from_mapping(batch)
        rows = len(points.feat)
        if self.training or self.chunk_size is None or rows <= self.chunk_size:
            return F.normalize(self.backbone(points), dim=1)
        starts = range(0, rows, self.chunk_size)
        parts = [self.backbone(points.rows(start, start + self.chunk_size)) for start in starts]
        return F.normalize(torch.cat(parts), dim=1)


class DefaultSegmentorV2(nn.Module):
    """The segmentation model: one logit per class."""

    def __init__(
        self, config: PTv3Config, num_classes: int, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.seg_head = nn.Linear(config.out_channels, num_classes)
        self.backbone = PointTransformerV3(config, compute_dtype)

    def forward(self, batch: PointBatch | Mapping[str, Any]) -> Tensor:
        """Logits [N, num_classes]."""
        out: Tensor = self.seg_head(self.backbone(batch))
        return out
