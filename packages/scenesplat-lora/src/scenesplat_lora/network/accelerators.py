"""Kernels of flash-attn and spconv in place of PyTorch's, where they are asked for.

    export SCENESPLAT_ACCELERATORS="flash_attn spconv"

names the libraries to use; without it neither is imported. Each is used on CUDA only:

    flash_attn  attention in float16 or bfloat16, as under autocast, without relative positions
    spconv      submanifold convolution in float32, where no two voxels coincide: its result for
                those depends on its hash table

Everywhere else, and where a library is not installed, PyTorch computes the same function; which of
them runs is said once. The results agree up to rounding.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import ConfigError, near
from lora_core.report import say

if TYPE_CHECKING:
    from scenesplat_lora.network.submanifold import NeighbourMap

VARIABLE = "SCENESPLAT_ACCELERATORS"
MODULES = {"flash_attn": "flash_attn", "spconv": "spconv.pytorch"}
HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256  # channels, of flash-attn's kernels
MOST_ROWS = 600_000  # voxels; spconv's limit is about 698,000


@functools.cache
def library(name: str) -> ModuleType | None:
    """A library that is asked for and installed; what is used is said at the first call.

    Raises:
        ConfigError: the environment variable names another library.
    """
    asked = os.environ.get(VARIABLE, "").replace(",", " ").split()
    for word in asked:
        if word not in MODULES:
            raise ConfigError(
                f"{VARIABLE} names {word!r}: there are {' and '.join(MODULES)}. "
                f"{near(word, MODULES)}".rstrip()
            )
    if name not in asked:
        return None
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        say(f"{name} cannot be imported ({error}): PyTorch computes the same, more slowly")
        return None
    say(f"{name} is used on CUDA, as {VARIABLE} asks")
    return module


# -- attention -------------------------------------------------------------------------------------


def flash_attention_fits(qkv: Tensor, heads: int) -> bool:
    """Whether `flash_attention` is to compute: qkv [N', 3 C] of a kind that its kernels take."""
    width = qkv.shape[1] // (3 * heads)
    kind = qkv.is_cuda and qkv.dtype in HALF and width <= WIDEST_HEAD
    return kind and library("flash_attn") is not None


def flash_attention(
    qkv: Tensor, heads: int, sizes: tuple[tuple[int, int], ...], dropout: float, scale: float
) -> Tensor:
    """softmax(scale q k^T) v of consecutive patches: [N', 3 C] -> [N', C].

    Args:
        sizes: (patches, length) of each group.
    """
    flash = library("flash_attn")
    assert flash is not None
    lengths = torch.tensor([length for count, length in sizes for _ in range(count)])
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(qkv.device, torch.int32)
    out: Tensor = flash.flash_attn_varlen_qkvpacked_func(
        qkv.view(len(qkv), 3, heads, -1),
        ends,
        int(lengths.max()),
        dropout_p=dropout,
        softmax_scale=scale,
    )  # [N', heads, d]
    return out.flatten(1)


# -- convolution -----------------------------------------------------------------------------------


def spconv_fits(feat: Tensor, neighbours: NeighbourMap) -> bool:
    """Whether `spconv_convolve` is to compute: feat [N, in] and voxels of a kind that it takes."""
    kind = feat.is_cuda and feat.dtype == torch.float32 and len(feat) <= MOST_ROWS
    return kind and neighbours.unique and library("spconv") is not None


def spconv_convolve(
    feat: Tensor, weight: Tensor, bias: Tensor | None, neighbours: NeighbourMap
) -> Tensor:
    """As `submanifold.convolve`; spconv's own table is made once and kept with the neighbours."""
    spconv = library("spconv")
    assert spconv is not None
    size, tables = neighbours.kernel_size, neighbours.spconv_tables
    with torch.device("meta"):  # its parameters are replaced
        layer = spconv.SubMConv3d(
            feat.shape[1], len(weight), size, bias=bias is not None, indice_key=str(size)
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            delattr(layer, name)
            setattr(layer, name, value)
    grid = neighbours.grid_coord
    indices = torch.cat([neighbours.batch[:, None], grid], 1).int()
    shape = (grid.amax(0) + 1).tolist()
    clouds = int(neighbours.batch.max()) + 1
    out = layer(spconv.SparseConvTensor(feat, indices, shape, clouds, indice_dict=tables))
    tables.update(out.indice_dict)
    result: Tensor = out.features
    return result
