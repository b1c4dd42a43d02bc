"""The two official models around the backbone; their names are those of the official configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.initialise import module_seed
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.ptv3 import PointTransformerV3
from scenesplat_lora.network.ptv3_config import PTv3Config

HEAD = "seg_head"  # name of the segmentation model's last layer
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
    """The segmentation model: one logit per class.

    Attributes:
        class_names: where they are known.
        new_head: `seg_head` has no trained values; LoRA trains it besides.
    """

    def __init__(
        self, config: PTv3Config, num_classes: int, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.seg_head = nn.Linear(config.out_channels, num_classes)
        self.backbone = PointTransformerV3(config, compute_dtype)
        self.class_names: tuple[str, ...] | None = None
        self.new_head = False
        self._replaced: tuple[nn.Linear, tuple[str, ...] | None, bool] | None = None

    def forward(self, batch: PointBatch | Mapping[str, Any]) -> Tensor:
        """Logits [N, num_classes]."""
        out: Tensor = self.seg_head(self.backbone(batch))
        return out

    def renew_head(self, num_classes: int, seed: int = 0, keep_old: bool = False) -> None:
        """Put a head for other classes in place of this one.

        Its values are uniform in ±1 / sqrt(inputs), as torch's Linear, and a function of the seed.

        Args:
            keep_old: for `restore_head`.
        """
        old = self.seg_head
        head = nn.utils.skip_init(
            nn.Linear,
            old.in_features,
            num_classes,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        if not head.weight.is_meta:
            generator = torch.Generator().manual_seed(module_seed(seed, HEAD))
            with torch.no_grad():
                for parameter in head.parameters():
                    values = torch.rand(parameter.shape, generator=generator, device="cpu")
                    parameter.copy_((2 * values - 1) / math.sqrt(old.in_features))
        self._replaced = (old, self.class_names, self.new_head) if keep_old else None
        self.seg_head, self.class_names, self.new_head = head, None, True

    def restore_head(self) -> None:
        """Put back the head that `renew_head` has kept; without one nothing changes."""
        if self._replaced is not None:
            device = self.seg_head.weight.device
            head, self.class_names, self.new_head = self._replaced
            self.seg_head, self._replaced = head.to(device), None

    def keep_head(self) -> None:
        """The head is a trained one from now on, and the one before it is forgotten."""
        self.new_head, self._replaced = False, None


def segmentor_in(model: nn.Module) -> tuple[str, DefaultSegmentorV2] | None:
    """Path and module of the segmentation model that a model is or holds; None: there is none."""
    for path, module in model.named_modules():
        if isinstance(module, DefaultSegmentorV2):
            return path, module
    return None
