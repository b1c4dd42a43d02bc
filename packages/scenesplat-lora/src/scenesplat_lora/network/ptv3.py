"""Point Transformer V3 as SceneSplat uses it (PT-v3m1): the official network, key for key.

Wu et al., "Point Transformer V3: Simpler, Faster, Stronger" (CVPR 2024); SceneSplat (ICCV 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError, DataError
from scenesplat_lora.network.blocks import Block, BlockSettings
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.point_set import PointSet, point_set
from scenesplat_lora.network.pooling import (
    Clusters,
    SerializedPooling,
    SerializedUnpooling,
    batch_norm,
)
from scenesplat_lora.network.ptv3_config import PTv3Config
from scenesplat_lora.network.submanifold import SubmanifoldConv


class PointTransformerV3(nn.Module):
    """The backbone: voxels with features -> as many rows of `config.out_channels` features.

    In evaluation the result depends on nothing but weights and batch. In training the curves are
    permuted at random, once for the stem and once per pooling, where `config.shuffle_orders` is on;
    the official network does so in evaluation too, and its results vary.
    """

    def __init__(
        self, config: PTv3Config | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        """Build it with random weights.

        Args:
            compute_dtype: of attention; None: that of the features. See `SerializedAttention`.
        """
        super().__init__()
        self.config = config = config or PTv3Config()
        settings = _block_settings(config, compute_dtype)
        self.embedding = Embedding(config.in_channels, config.enc_channels[0])
        self.enc = nn.ModuleDict(
            {f"enc{s}": stage for s, stage in enumerate(_encoder(config, settings))}
        )
        if not config.cls_mode:
            stages = dict(enumerate(_decoder(config, settings)))
            self.dec = nn.ModuleDict({f"dec{s}": stages[s] for s in reversed(stages)})

    def forward(
        self,
        batch: PointBatch | Mapping[str, Any],
        permutations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Features of every row, in the order of the batch.

        Args:
            batch: or a collated mapping, as `PointBatch.from_mapping` takes it.
            permutations: of the curves, each int64 [K]: one for the stem, one per pooling. None: at
                random in training (torch's CPU generator), unchanged in evaluation.

        Returns:
            [N, out_channels]; with `cls_mode` [M, channels of the last encoder stage].

        Raises:
            DataError: a batch that does not fit together or has another number of features.
            ConfigError: another number of permutations.
        """
        points = batch if isinstance(batch, PointBatch) else PointBatch.from_mapping(batch)
        if points.feat.shape[1] != self.config.in_channels:
            raise DataError(
                f"feat has {points.feat.shape[1]} columns, the network expects "
                f"in_channels = {self.config.in_channels}"
            )
        draws = iter(self._permutations(permutations))
        stage = point_set(points, self.config.order, next(draws))
        feat = self.embedding(points.feat, stage)
        skips: list[tuple[Tensor, PointSet, Clusters]] = []
        for encoder in stages_of(self.enc):
            if encoder.down is not None:
                fine = stage
                skip = feat
                feat, stage, clusters = encoder.down(feat, fine, next(draws))
                skips.append((skip, fine, clusters))
            feat = encoder(feat, stage)
        if self.config.cls_mode:
            return feat
        for decoder in stages_of(self.dec):
            assert decoder.up is not None
            skip, stage, clusters = skips.pop()
            feat, branch = decoder.up(feat, skip, clusters)
            feat = decoder(feat, stage, conv_input=branch)
        return feat

    def _permutations(self, given: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
        count, curves = self.config.stages, len(self.config.order)
        if given is not None:
            expected = list(range(curves))
            if len(given) != count or any(sorted(p.tolist()) != expected for p in given):
                raise ConfigError(
                    f"permutations: expected {count} (stem and {count - 1} poolings), each of "
                    f"{expected}"
                )
            return given
        if self.training and self.config.shuffle_orders:
            return [torch.randperm(curves, device="cpu") for _ in range(count)]
        return [None] * count


class Embedding(nn.Module):
    """The stem: submanifold convolution over 5^3 voxels, batch norm, GELU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.ModuleDict(
            {
                "conv": SubmanifoldConv(in_channels, channels, kernel_size=5, bias=False),
                "norm": batch_norm(channels),
                "act": nn.GELU(),
            }
        )

    def forward(self, feat: Tensor, points: PointSet) -> Tensor:
        """[N, in] -> [N, C]."""
        conv, norm, act = self.stem.values()
        out: Tensor = act(norm(conv(feat, points.neighbours(5))))
        return out


class Stage(nn.Module):
    """Blocks at one resolution, behind a pooling (`down`) or an unpooling (`up`)."""

    def __init__(
        self,
        blocks: Sequence[Block],
        down: SerializedPooling | None = None,
        up: SerializedUnpooling | None = None,
    ) -> None:
        super().__init__()
        self.down = down
        self.up = up
        for index, block in enumerate(blocks):
            self.add_module(f"block{index}", block)

    def blocks(self) -> Iterator[Block]:
        """The blocks in order."""
        return (module for module in self.children() if isinstance(module, Block))

    def forward(self, feat: Tensor, points: PointSet, conv_input: Tensor | None = None) -> Tensor:
        """[N, C] -> [N, C] through the blocks; `conv_input` is for the first block alone."""
        for block in self.blocks():
            feat = block(feat, points, conv_input)
            conv_input = None
        return feat


def stages_of(group: nn.Module) -> Iterator[Stage]:
    """The stages of `enc` or `dec` in the order in which they run."""
    return (module for module in group.children() if isinstance(module, Stage))


def _block_settings(config: PTv3Config, compute_dtype: torch.dtype | None) -> BlockSettings:
    return BlockSettings(
        config.mlp_ratio,
        config.qkv_bias,
        config.qk_scale,
        config.attn_drop,
        config.proj_drop,
        config.pre_norm,
        varlen=config.enable_flash,
        enable_rpe=config.enable_rpe,
        # torch's kernels have the softmax in float32 whatever the dtype of q and k.
        compute_dtype=torch.float32 if config.upcast else compute_dtype,
    )


def _encoder(config: PTv3Config, settings: BlockSettings) -> Iterator[Stage]:
    rates = _drop_rates(config.drop_path, sum(config.enc_depths))
    for s, depth in enumerate(config.enc_depths):
        channels = config.enc_channels[s]
        down = None
        if s:
            before = config.enc_channels[s - 1]
            down = SerializedPooling(before, channels, config.stride[s - 1])
        size = channels, config.enc_num_head[s], config.enc_patch_size[s]
        stage_rates, rates = rates[:depth], rates[depth:]
        yield Stage([Block(*size, r, i, settings) for i, r in enumerate(stage_rates)], down=down)


def _decoder(config: PTv3Config, settings: BlockSettings) -> Iterator[Stage]:
    rates = _drop_rates(config.drop_path, sum(config.dec_depths))
    widths = [*config.dec_channels, config.enc_channels[-1]]
    for s, depth in enumerate(config.dec_depths):
        up = SerializedUnpooling(widths[s + 1], config.enc_channels[s], widths[s])
        size = widths[s], config.dec_num_head[s], config.dec_patch_size[s]
        stage_rates, rates = rates[:depth][::-1], rates[depth:]  # the rate falls towards the end
        yield Stage([Block(*size, r, i, settings) for i, r in enumerate(stage_rates)], up=up)


def _drop_rates(last: float, blocks: int) -> list[float]:
    """From 0 to `last` in equal steps."""
    return torch.linspace(0, last, blocks, device="cpu").tolist()
