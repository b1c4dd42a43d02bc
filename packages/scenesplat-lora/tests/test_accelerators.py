"""flash-attn and spconv in place of PyTorch's kernels: when, and that the results are equal."""

from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from tiny_network import tiny_backbone, voxels
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import ConfigError
from scenesplat_lora.network import accelerators
from scenesplat_lora.network.attention import SerializedAttention
from scenesplat_lora.network.point_set import PointSet, point_set
from scenesplat_lora.network.ptv3_config import CURVES
from scenesplat_lora.network.submanifold import (
    NeighbourMap,
    SubmanifoldConv,
    convolve,
    find_neighbours,
)

NAMES = sorted(accelerators.MODULES)
gpu = pytest.mark.gpu
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    accelerators.library.cache_clear()
    yield
    accelerators.library.cache_clear()


def ask(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv(accelerators.VARIABLE, words)


# -- the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_asked_for_is_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(accelerators.VARIABLE, raising=False)
    assert accelerators.library(name) is None
    ask(monkeypatch, " ".join(other for other in NAMES if other != name))
    accelerators.library.cache_clear()
    assert accelerators.library(name) is None
    assert capsys.readouterr().out == ""


@pytest.mark.fault("P30")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_for_and_missing_is_said_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    ask(monkeypatch, "flash_attn,spconv")
    assert accelerators.library(name) is None
    assert accelerators.library(name) is None
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith(f"{name} cannot be imported (No module named")


def test_another_word_is_refused_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "flash_atn")
    with pytest.raises(ConfigError, match=r"there are flash_attn and spconv.*flash_attn"):
        accelerators.library("spconv")


def test_the_processor_and_other_dtypes_compute_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither library is even looked for: a wrong word would be an error."""
    ask(monkeypatch, "another")
    network, batch = tiny_backbone(), voxels(60, 30)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(batch)
    assert not accelerators.flash_attention_fits(torch.zeros(4, 48).half(), 1)
    assert not accelerators.spconv_fits(batch.feat, neighbours_of(batch.grid_coord))


# -- flash-attn ------------------------------------------------------------------------------------


def documented_flash(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, softmax_scale: float
) -> Tensor:
    """What flash_attn_varlen_qkvpacked_func computes, sequence by sequence."""
    assert cu_seqlens.dtype == torch.int32
    lengths = cu_seqlens.diff().tolist()
    assert max(lengths) == max_seqlen
    parts = []
    for part in qkv.split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=softmax_scale)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def attention_and_points() -> tuple[SerializedAttention, Tensor, PointSet]:
    torch.manual_seed(0)
    batch = voxels(70, 5, 33, 16, 1, channels=32)
    return SerializedAttention(32, 2, patch_size=16), batch.feat, point_set(batch, CURVES)


@pytest.mark.parametrize("curve", [0, 3])
def test_patches_reach_flash_attn_as_its_documentation_has_them(
    curve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, feat, points = attention_and_points()
    plain = layer(feat, points, curve)
    stand_in = ModuleType("flash_attn")
    stand_in.flash_attn_varlen_qkvpacked_func = documented_flash
    monkeypatch.setattr(accelerators, "library", {"flash_attn": stand_in}.get)
    monkeypatch.setattr(accelerators, "flash_attention_fits", lambda *arguments: True)
    torch.testing.assert_close(layer(feat, points, curve), plain)


@gpu
@no_cuda
def test_flash_attn_gives_what_pytorch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flash_attn")
    layer, feat, _ = attention_and_points()
    points = point_set(voxels(70, 5, 33, 16, 1, channels=32).to("cuda"), CURVES)
    layer, feat = layer.cuda(), feat.cuda().requires_grad_()
    results = []
    for words in ("", "flash_attn"):
        ask(monkeypatch, words)
        accelerators.library.cache_clear()
        with torch.autocast("cuda", torch.bfloat16):
            assert accelerators.flash_attention_fits(layer.qkv(feat), 2) == bool(words)
            out = layer(feat, points, 1)
        results.append((out, torch.autograd.grad(out.float().square().sum(), feat)[0]))
    torch.testing.assert_close(*zip(*results, strict=True), rtol=3e-2, atol=3e-2)


# -- spconv ----------------------------------------------------------------------------------------


def neighbours_of(grid: Tensor, kernel_size: int = 3, clouds: int = 1) -> NeighbourMap:
    cloud = torch.arange(len(grid), device=grid.device) * clouds // len(grid)
    return find_neighbours(grid, cloud, kernel_size)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_spconv_computes_the_same_convolution(
    kernel_size: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its CPU build, which this package itself never uses."""
    pytest.importorskip("spconv")
    ask(monkeypatch, "spconv")
    torch.manual_seed(0)
    grid = voxels(60, 60).grid_coord
    layer = SubmanifoldConv(16, 32, kernel_size, bias)
    feat, neighbours = torch.randn(120, 16), neighbours_of(grid, kernel_size, clouds=2)
    with torch.no_grad():
        own = convolve(feat, layer.weight, layer.bias, neighbours)
        for _ in range(2):  # the second time with the table of the first
            theirs = accelerators.spconv_convolve(feat, layer.weight, layer.bias, neighbours)
            torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5)
    assert list(neighbours.spconv_tables) == [str(kernel_size)]


@gpu
@no_cuda
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_spconv_gives_what_pytorch_gives_on_cuda(
    kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("spconv")
    torch.manual_seed(0)
    grid = voxels(60, 60).grid_coord.cuda()
    layer = SubmanifoldConv(16, 32, kernel_size, bias=True).cuda().requires_grad_(False)
    feat = torch.randn(120, 16, device="cuda", requires_grad=True)
    neighbours = neighbours_of(grid, kernel_size, clouds=2)
    doubled = neighbours_of(torch.cat([grid, grid[:1]]))
    results = []
    for words in ("", "spconv"):
        ask(monkeypatch, words)
        accelerators.library.cache_clear()
        assert accelerators.spconv_fits(feat, neighbours) == bool(words)
        assert not accelerators.spconv_fits(feat, doubled)
        out = layer(feat, neighbours)
        results.append((out, torch.autograd.grad(out.square().sum(), feat)[0]))
    torch.testing.assert_close(*zip(*results, strict=True), rtol=1e-3, atol=1e-3)
