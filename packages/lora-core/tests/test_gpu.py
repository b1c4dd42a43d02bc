"""On a CUDA device: the same numbers, masks that are drawn again, what is kept."""

import pytest
import torch
from torch import nn

from lora_core import dropout
from lora_core.config import LoraConfig
from lora_core.functional import Branch, lora_linear
from lora_core.injection import inject, trainable_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_gradients_equal_those_of_the_cpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).double()
    inject(model, LoraConfig(["0", "2"], r=4))
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, results = torch.randn(50, 64, dtype=torch.float64), []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        y = model(x.to(device))
        y.square().sum().backward()
        results.append([y.cpu(), *(p.grad.cpu() for p in trainable_parameters(model))])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cpu, cuda)


def test_dropout_uses_one_mask_forward_and_backward(monkeypatch):
    monkeypatch.setattr(dropout, "DEVICE_BLOCK", 4096)  # several blocks
    p, device = 0.3, torch.device("cuda")
    shapes = ((300, 64), (32, 64), (4, 64), (32, 4))
    x, W, A, B = (
        torch.randn(*s, device=device, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    y = lora_linear(x, W.detach(), None, [Branch(A, B, 0.7, dropout=p, seed=5)])
    bits = torch.cat([bits for _, bits in dropout.random_bits(5, 300, 64, device)])
    D = (bits > dropout.threshold(p)).double() / dropout.keep_probability(p)
    expected = x @ W.detach().t() + 0.7 * ((x * D) @ A.t()) @ B.t()
    g = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    ours, plain = (torch.autograd.grad(out, (x, A, B), g) for out in (y, expected))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert abs((D > 0).double().mean() - (1 - p)) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains_fp32_adapters(dtype):
    model = nn.Sequential(nn.Linear(64, 64)).cuda()
    inject(model, LoraConfig(["0"], r=4, lora_dropout=0.1))
    x = torch.randn(128, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = model(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {p.grad.dtype for p in trainable_parameters(model)} == {torch.float32}
