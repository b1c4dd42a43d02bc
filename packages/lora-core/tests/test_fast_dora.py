"""DoRA of a Linear by one weight: the same as in steps, and what it keeps."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from lora_core import LoraConfig, fast_dora, functional, inject
from lora_core.fast_dora import MergedDora, sum_of_products
from lora_core.functional import Branch, dora_linear
from lora_core.memory import saved_bytes

N, DI, DO, R = 300, 5, 7, 2  # many rows for few inputs and outputs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def merged(monkeypatch):
    """How often the one weight is built."""
    built = []
    original = fast_dora._adapted

    def counted(*words):
        built.append(words)
        return original(*words)

    monkeypatch.setattr(fast_dora, "_adapted", counted)
    return built


def layer(dtype=torch.float64, rows=N):
    """x, W, b, A, B, ratio, all with gradients but W."""
    shapes = [(rows, DI), (DO, DI), (DO,), (R, DI), (DO, R), (DO,)]
    made = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    return [t if i == 1 else t.requires_grad_() for i, t in enumerate(made)]


def passes(tensors, p=0.0, bias=True):
    """The output and the gradients of everything that has one."""
    x, W, b, A, B, ratio = tensors
    y = dora_linear(
        x.view(3, -1, DI), W, b if bias else None, Branch(A, B, 0.7, None, p, 11), ratio
    )
    asked = [t for t in (x, *([b] if bias else []), A, B, ratio) if t.requires_grad]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, asked, g)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [None, 0, 3, 4, 5])  # nothing, x, A, B, the magnitude
def test_one_weight_gives_what_the_steps_give(
    frozen, p, bias, dtype, tolerance, merged, monkeypatch
):
    tensors = layer(dtype)
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    found = passes(tensors, p, bias)
    count = len(merged)
    assert count == (1 if frozen == 0 else 2)
    monkeypatch.setattr(functional, "DORA_MERGED_FROM", math.inf)
    expected = passes(tensors, p, bias)
    assert len(merged) == count
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients(p):
    x, W, b, A, B, ratio = layer(rows=24)

    def run(x, b, A, B, ratio):
        return MergedDora.apply(x, W, b, A, B, ratio, Branch(A, B, 0.7, None, p, 11))

    assert gradcheck(run, (x, b, A, B, ratio))


def test_x_and_the_product_are_kept():
    x, W, b, A, B, ratio = layer(torch.float32)
    kept, _ = saved_bytes(
        lambda: dora_linear(x, W, b, Branch(A, B, 0.7, None, 0.1), ratio), [W, b, A, B, ratio]
    )
    assert kept == 4 * N * (DI + DO)


def test_behind_a_norm_x_is_made_again():
    norm = nn.LayerNorm(DI)
    x, W, b, A, B, ratio = layer(torch.float32)
    known = [x, W, b, A, B, ratio, *norm.parameters()]
    alone, _ = saved_bytes(lambda: norm(x), known)
    kept, y = saved_bytes(lambda: dora_linear(norm(x), W, b, Branch(A, B, 0.7), ratio), known)
    assert kept == alone + 4 * N * DO
    (found,) = torch.autograd.grad(y.square().sum(), A)
    y = dora_linear(norm(x).detach(), W, b, Branch(A, B, 0.7), ratio)
    (expected,) = torch.autograd.grad(y.square().sum(), A)
    torch.testing.assert_close(found, expected)


def test_steps_where_one_weight_does_not_pay_or_may_not_be_used(merged):
    few = layer(torch.float32, rows=3)
    passes(few)
    half = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in layer(torch.float32)]
    passes(half)
    trained = layer(torch.float32)
    trained[1].requires_grad_()
    passes(trained)
    with torch.autocast("cpu", torch.bfloat16):
        x, W, b, A, B, ratio = layer(torch.float32)
        assert dora_linear(x, W, b, Branch(A, B, 0.7), ratio).dtype == torch.bfloat16
    assert not merged


def test_a_layer_takes_the_fast_way_after_its_start(merged):
    net = nn.Sequential(nn.Linear(DI, DO))
    x = torch.randn(N, DI)
    expected = net(x)
    inject(net, LoraConfig(["0"], r=R, use_dora=True))
    assert torch.equal(net(x), expected)
    assert not merged
    nn.init.normal_(net[0].lora_B["default"].weight)
    found = net(x)
    assert merged
    weight = net[0].lora_merged_weights()["weight"]
    torch.testing.assert_close(found, F.linear(x, weight, net[0].bias))


def test_a_sum_of_products_needs_no_array_of_their_size():
    one, other = torch.randn(2, 70_000, 5, dtype=torch.float64)
    torch.testing.assert_close(sum_of_products(one, other), (one * other).sum(0))
    assert sum_of_products(one[:0], other[:0]).eq(0).all()
