"""The block of Point Transformer V3, and the stages that it forms.

Wu et al., "Point Transformer V3", figure 6: conditional positional encoding by a submanifold
convolution, attention along a curve, MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scenesplat_lora.network.attention import SerializedAttention
from scenesplat_lora.network.point_set import PointSet
from scenesplat_lora.network.submanifold import SubmanifoldConv


@dataclass(frozen=True)
class BlockSettings:
    """What the blocks of a network have in common; as in `PTv3Config`."""

    mlp_ratio: float = 4
    qkv_bias: bool = True
    qk_scale: float | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    pre_norm: bool = True
    varlen: bool = True
    enable_rpe: bool = False
    compute_dtype: torch.dtype | None = None


class DropPath(nn.Module):
    """Stochastic depth of each voxel by itself: 0 with probability p, else x / (1 - p).

    The official one drops rows of an [N, C] matrix, so voxels and not scenes.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), 1, device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with dropout after both."""

    def __init__(self, channels: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class Block(nn.Module):
    """Positional encoding, attention, MLP, each with a residual; keys as the official ones."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        patch_size: int,
        drop_path: float,
        curve: int,
        settings: BlockSettings,
    ) -> None:
        super().__init__()
        self.curve = curve
        self.pre_norm = settings.pre_norm
        self.cpe = nn.Sequential(
            SubmanifoldConv(channels, channels, kernel_size=3, bias=True),
            nn.Linear(channels, channels),
            nn.LayerNorm(channels),
        )
        self.norm1 = nn.Sequential(nn.LayerNorm(channels))
        self.attn = SerializedAttention(
            channels,
            num_heads,
            patch_size,
            settings.qkv_bias,
            settings.qk_scale,
            settings.attn_drop,
            settings.proj_drop,
            settings.varlen,
            settings.enable_rpe,
            settings.compute_dtype,
        )
        self.norm2 = nn.Sequential(nn.LayerNorm(channels))
        hidden = int(channels * settings.mlp_ratio)
        self.mlp = nn.Sequential(MLP(channels, hidden, settings.proj_drop))
        self.drop_path = nn.Sequential(DropPath(drop_path))

    def forward(self, feat: Tensor, points: PointSet, conv_input: Tensor | None = None) -> Tensor:
        """[N, C] -> [N, C].

        Args:
            conv_input: what the positional encoding convolves; None: `feat`.
        """
        feat = feat + self.position(feat if conv_input is None else conv_input, points)
        if self.pre_norm:
            feat = feat + self.drop_path(self.attn(self.norm1(feat), points, self.curve))
            return feat + self.drop_path(self.mlp(self.norm2(feat)))
        feat = self.norm1(feat + self.drop_path(self.attn(feat, points, self.curve)))
        out: Tensor = self.norm2(feat + self.drop_path(self.mlp(feat)))
        return out

    def position(self, feat: Tensor, points: PointSet) -> Tensor:
        """The positional encoding alone, without its residual."""
        conv, linear, norm = self.cpe
        out: Tensor = norm(linear(conv(feat, points.neighbours(3))))
        return out
