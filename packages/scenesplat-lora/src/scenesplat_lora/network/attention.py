"""Attention within patches along a space-filling curve.

Wu et al., "Point Transformer V3", section 4.2. Patches of one length are one batch of torch's
scaled dot product attention, which never holds the matrix of all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scenesplat_lora.network import accelerators
from scenesplat_lora.network.point_set import PatchRows, PointSet


class SerializedAttention(nn.Module):
    """Multi-head attention among the voxels of each patch.

    Keys `qkv`, one Linear whose rows are q, k and v, each by heads; `proj`; and `rpe.rpe_table`.

    Attributes:
        varlen: small clouds are patches of their own. False: the smallest one limits all patches.
        compute_dtype: of q, k and v outside of autocast; None: that of the features. The official
            flash path is `torch.float16` whatever the model's dtype. Sums are in float32 anyway.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        patch_size: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        varlen: bool = True,
        enable_rpe: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.scale = (channels // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.varlen = varlen
        self.compute_dtype = compute_dtype
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe = RelativePositions(patch_size, num_heads) if enable_rpe else None

    def forward(self, feat: Tensor, points: PointSet, curve: int) -> Tensor:
        """[N, C] -> [N, C], along curve `curve` of the points."""
        patches = points.patch_rows(curve, self.patch_size, self.varlen)
        # The rows are gathered before the projection, three times fewer numbers than after it.
        qkv = self.qkv(feat.index_select(0, patches.gather))
        out = self._attend_all(qkv, patches, points)
        # The projection comes before the way back: what its adapter keeps for the backward pass is
        # then what attention keeps anyway, and no copy of it.
        result: Tensor = self.proj_drop(self.proj(out).index_select(0, patches.back))
        return result

    def _attend_all(self, qkv: Tensor, patches: PatchRows, points: PointSet) -> Tensor:
        """Of all patches, one after the other: [N', 3 C] -> [N', C]."""
        dtype = qkv.dtype
        if self.compute_dtype is not None:
            qkv = qkv.to(self.compute_dtype)
        sizes, bias = patches.sizes, None
        if self.rpe is not None:  # its bias is a matrix of all pairs: one patch at a time
            sizes = tuple((1, length) for count, length in sizes for _ in range(count))
        elif accelerators.flash_attention_fits(qkv, self.num_heads):
            drop = self.attn_drop if self.training else 0.0
            return accelerators.flash_attention(qkv, self.num_heads, sizes, drop, self.scale).to(
                dtype
            )
        parts = []
        start = 0
        for count, length in sizes:
            stop = start + count * length
            if self.rpe is not None:
                bias = self.rpe(points.grid_coord[patches.gather[start:stop]])
            parts.append(self._attend(qkv[start:stop], count, length, bias))
            start = stop
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)

    def _attend(self, qkv: Tensor, count: int, length: int, bias: Tensor | None) -> Tensor:
        """softmax(scale q k^T + bias) v of `count` patches: [count * length, 3 C] -> [.., C]."""
        q, k, v = qkv.view(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if bias is None else bias.to(q.dtype),
            dropout_p=self.attn_drop if self.training else 0.0,
            scale=self.scale,
        )  # [count, heads, length, d]
        return out.transpose(1, 2).reshape(count * length, -1)


class RelativePositions(nn.Module):
    """A learned bias per head for each distance along x, y and z; key `rpe_table` [3 R, heads].

    With the bound b = int((4 patch_size)^(1/3) 2) on the distance, R = 2 b + 1.
    """

    def __init__(self, patch_size: int, num_heads: int) -> None:
        super().__init__()
        self.bound = int((4 * patch_size) ** (1 / 3) * 2)
        self.rpe_table = nn.Parameter(torch.empty(3 * (2 * self.bound + 1), num_heads))
        nn.init.trunc_normal_(self.rpe_table, std=0.02)

    def forward(self, places: Tensor) -> Tensor:
        """Voxels of a patch, integer [L, 3] -> bias of query i and key j, [heads, L, L]."""
        distance = (places[:, None] - places[None]).clamp(-self.bound, self.bound).long()
        axis = torch.arange(3, device=places.device) * (2 * self.bound + 1)
        return self.rpe_table[distance + self.bound + axis].sum(2).permute(2, 0, 1)
