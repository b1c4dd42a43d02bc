"""Settings of Point Transformer V3 (PT-v3m1), with the official field names and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lora_core.errors import ConfigError, listing, near

CURVES = ("z", "z-trans", "hilbert", "hilbert-trans")
_UNSUPPORTED = ("pdnorm_bn", "pdnorm_ln")  # off in every released SceneSplat model
_SEQUENCES = (
    "order",
    "stride",
    "enc_depths",
    "enc_channels",
    "enc_num_head",
    "enc_patch_size",
    "dec_depths",
    "dec_channels",
    "dec_num_head",
    "dec_patch_size",
    "pdnorm_conditions",
)


@dataclass(frozen=True)
class PTv3Config:
    """Size and switches of one backbone.

    Tuples of the encoder and decoder are indexed by stage: `dec_channels[s]` is the width of
    decoder stage `dec{s}`, which works at the resolution of encoder stage s; `dec0` runs last.

    Attributes:
        in_channels: columns of `feat`.
        order: space-filling curves; block i of a stage attends along curve i mod len(order).
        stride: of each pooling, a power of two; one less than there are encoder stages.
        enc_patch_size, dec_patch_size: voxels that attend to each other.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        shuffle_orders: permute the curves at random in training. Evaluation never does.
        enable_rpe: relative position table in attention; needs `enable_flash=False`.
        enable_flash: patches of varying length, as in every released model. False: the patch size
            of a batch is that of its smallest cloud, where this is smaller. No kernel is chosen by
            this: the two give different results with the same weights.
        upcast_attention, upcast_softmax: compute attention in float32; need `enable_flash=False`.
        cls_mode: no decoder; the result is the last encoder stage.

    Raises:
        ConfigError: all fields that cannot work together.
    """

    in_channels: int = 6
    order: tuple[str, ...] = ("z", "z-trans")
    stride: tuple[int, ...] = (2, 2, 2, 2)
    enc_depths: tuple[int, ...] = (2, 2, 2, 6, 2)
    enc_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    enc_num_head: tuple[int, ...] = (2, 4, 8, 16, 32)
    enc_patch_size: tuple[int, ...] = (48, 48, 48, 48, 48)
    dec_depths: tuple[int, ...] = (2, 2, 2, 2)
    dec_channels: tuple[int, ...] = (64, 64, 128, 256)
    dec_num_head: tuple[int, ...] = (4, 4, 8, 16)
    dec_patch_size: tuple[int, ...] = (48, 48, 48, 48)
    mlp_ratio: float = 4
    qkv_bias: bool = True
    qk_scale: float | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    drop_path: float = 0.3
    pre_norm: bool = True
    shuffle_orders: bool = True
    enable_rpe: bool = False
    enable_flash: bool = True
    upcast_attention: bool = False
    upcast_softmax: bool = False
    cls_mode: bool = False
    pdnorm_bn: bool = False
    pdnorm_ln: bool = False
    pdnorm_decouple: bool = True
    pdnorm_adaptive: bool = False
    pdnorm_affine: bool = True
    pdnorm_conditions: tuple[str, ...] = ("ScanNet", "S3DIS", "Structured3D")

    def __post_init__(self) -> None:
        for name in _SEQUENCES:
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        problems = [*self._wrong_lengths(), *self._wrong_widths(), *self._wrong_switches()]
        if problems:
            raise ConfigError(listing([f"backbone: {problem}" for problem in problems]))

    @property
    def stages(self) -> int:
        """How many encoder stages there are."""
        return len(self.enc_depths)

    @property
    def out_channels(self) -> int:
        """Columns of the result."""
        return self.enc_channels[-1] if self.cls_mode else self.dec_channels[0]

    @property
    def upcast(self) -> bool:
        """Whether attention is computed in float32."""
        return self.upcast_attention or self.upcast_softmax

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PTv3Config:
        """From a section `model.backbone` of a config file; its `type` is checked and left out.

        Raises:
            ConfigError: another type of backbone, an unknown field, or values that cannot work.
        """
        known = [field.name for field in fields(cls)]
        values = dict(settings)
        kind = values.pop("type", "PT-v3m1")
        problems = [] if kind == "PT-v3m1" else [f"type is {kind!r}, expected 'PT-v3m1'"]
        problems += [
            f"unknown field {name!r}. {near(name, known)}".rstrip()
            for name in values
            if name not in known
        ]
        if problems:
            raise ConfigError(listing([f"backbone: {problem}" for problem in problems]))
        return cls(**values)

    def _wrong_lengths(self) -> list[str]:
        expected = {"stride": self.stages - 1}
        expected |= {name: self.stages for name in _SEQUENCES if name.startswith("enc_")}
        if not self.cls_mode:
            expected |= {name: self.stages - 1 for name in _SEQUENCES if name.startswith("dec_")}
        return [
            f"{name} has {len(getattr(self, name))} entries, expected {count} "
            f"(enc_depths has {self.stages})"
            for name, count in expected.items()
            if len(getattr(self, name)) != count
        ]

    def _wrong_widths(self) -> list[str]:
        problems = []
        for side in ("enc",) if self.cls_mode else ("enc", "dec"):
            channels = getattr(self, f"{side}_channels")
            heads = getattr(self, f"{side}_num_head")
            for name in ("depths", "channels", "num_head", "patch_size"):
                values: Sequence[int] = getattr(self, f"{side}_{name}")
                if any(type(value) is not int or value < 1 for value in values):
                    problems.append(f"{side}_{name} is {values}, expected positive whole numbers")
                    return problems
            problems += [
                f"{side}_channels[{s}] = {c} is no multiple of {side}_num_head[{s}] = {h}"
                for s, (c, h) in enumerate(zip(channels, heads, strict=False))
                if c % h
            ]
        problems += [
            f"stride {value} is no power of two"
            for value in self.stride
            if type(value) is not int or value < 1 or value & (value - 1)
        ]
        if type(self.in_channels) is not int or self.in_channels < 1:
            problems.append(f"in_channels is {self.in_channels}, expected a positive whole number")
        return problems

    def _wrong_switches(self) -> list[str]:
        problems = [
            f"order {name!r} is unknown, there are {', '.join(CURVES)}"
            for name in self.order
            if name not in CURVES
        ]
        if not self.order:
            problems.append(f"order is empty, there are {', '.join(CURVES)}")
        for name in ("attn_drop", "proj_drop", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, expected 0 <= {name} < 1")
        if self.mlp_ratio <= 0:
            problems.append(f"mlp_ratio is {self.mlp_ratio}, expected more than 0")
        if self.enable_flash and (self.enable_rpe or self.upcast):
            problems.append(
                "enable_rpe, upcast_attention and upcast_softmax need enable_flash=False"
            )
        problems += [
            f"{name} is not supported: no released SceneSplat model uses it"
            for name in _UNSUPPORTED
            if getattr(self, name)
        ]
        return problems


# The two released shapes.
LANGUAGE = PTv3Config(
    in_channels=11,  # color 3, opacity 1, quat 4, scale 3
    order=CURVES,
    stride=(2, 2, 2),
    enc_depths=(2, 2, 2, 6),
    enc_channels=(32, 64, 128, 256),
    enc_num_head=(2, 4, 8, 16),
    enc_patch_size=(1024,) * 4,
    dec_depths=(2, 2, 2),
    dec_channels=(768, 512, 256),
    dec_num_head=(16, 16, 16),
    dec_patch_size=(1024,) * 3,
)
SEGMENTATION = PTv3Config(
    in_channels=14,  # the same, and normal 3
    order=CURVES,
    enc_patch_size=(1024,) * 5,
    dec_patch_size=(1024,) * 4,
)
