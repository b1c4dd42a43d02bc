"""Inputs of adapted layers that are made again instead of kept."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_core import LoraConfig, inject, remade
from lora_core.memory import saved_bytes

N, C, R = 64, 32, 4


def windows(x):
    """Windows of 4 x 4 of an image of 8 x 8, as in Hiera and Swin: [64, C] -> [4, 16, C]."""
    return x.view(2, 4, 2, 4, C).permute(0, 2, 1, 3, 4).reshape(4, 16, C)


def rms_norm(m, h):
    """As transformers write it: statistics in float32, the frozen weight in the layer's dtype."""
    wide = h.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return m.norm.weight.detach() * wide.to(h.dtype)


PRODUCERS = {
    "layer norm": lambda m, h: m.norm(h),
    "layer norm without weights": lambda m, h: F.layer_norm(h, (C,)),
    "gelu": lambda m, h: F.gelu(h),
    "gelu by tanh": lambda m, h: F.gelu(h, approximate="tanh"),
    "silu": lambda m, h: F.silu(h),
    "gated": lambda m, h: F.silu(h) * (h + 1),
    "rms norm": rms_norm,
    "a frozen factor in front": lambda m, h: m.norm.weight.detach() * F.gelu(h),
    "a frozen factor behind, for every row": lambda m, h: (
        F.silu(h) * torch.linspace(0, 1, N)[:, None]
    ),
    "dropped": lambda m, h: F.dropout(F.gelu(h), 0.5),
    "rounded on the way": lambda m, h: m.norm(h).to(torch.bfloat16).to(h.dtype),
    "rows of a layer norm": lambda m, h: m.norm(h).index_select(0, torch.arange(N).flip(0)),
    "columns": lambda m, h: F.gelu(h).index_select(-1, torch.arange(C).flip(0)),
    "windows of a layer norm": lambda m, h: windows(m.norm(h)),
    "padded by nothing": lambda m, h: windows(F.pad(m.norm(h), (0, 0, 0, 0))),
    "several axes": lambda m, h: m.norm(h).view(4, -1, C),
    "permuted": lambda m, h: F.gelu(h).view(4, 16, C).permute(1, 0, 2),
}
KEPT = {
    "a sum": lambda m, h: h + 1,
    "relu, which keeps its result": lambda m, h: F.relu(h),
    "transposed": lambda m, h: m.norm(h).view(C, N).t().contiguous(),
    "a number times": lambda m, h: 2 * h,
    "one factor not kept": lambda m, h: h * torch.ones(C),
    "in another dtype, of something not kept": lambda m, h: (h + 1).half().float(),
    "padded": lambda m, h: F.pad(m.norm(h), (0, 0, 2, 0), value=1.0),
    "nothing before": lambda m, h: h.detach(),
}


class Layer(nn.Module):
    """A producer between two Linears; the second one is adapted."""

    def __init__(self, produce):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.produce = produce

    def forward(self, x):
        return self.second(self.produce(self, self.first(x)))


def layer(produce, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    model = Layer(produce).to(dtype)
    inject(model, LoraConfig(["second"], r=R, lora_alpha=8, lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.train()


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, C, generator=generator).to(dtype).requires_grad_()


def unchanged(tensor):
    return tensor


def looking(tensor):
    return tensor


def gradients(model, run=None, hooks=None):
    """Gradients of all trained tensors and of the input; the same seeds of dropout."""
    x = batch(model.first.weight.dtype)
    torch.manual_seed(2)
    with hooks or nullcontext():
        loss = (run or model)(x).square().mean()
    loss.backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def kept_gradients(model):
    """The same where every input is kept, as under hooks that may change what is saved."""
    return gradients(model, hooks=torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", PRODUCERS)
def test_an_input_that_can_be_made_again_is_not_kept_and_gradients_are_the_same(name, dropout):
    model = layer(PRODUCERS[name], dropout)
    close(gradients(model), kept_gradients(copy.deepcopy(model)))
    x, known = batch(), [*model.parameters()]
    kept, _ = saved_bytes(lambda: model(x), known)
    alone, _ = saved_bytes(lambda: model.produce(model, model.first(x)), known)
    h = N * R * x.element_size() if dropout else 0  # without a mask it is made again, too
    assert kept == alone + h


@pytest.mark.parametrize("name", KEPT)
def test_any_other_input_is_kept(name):
    model = layer(KEPT[name])
    x = model.produce(model, model.first(batch()))
    assert remade.recipe(x) is None
    close(gradients(model), kept_gradients(copy.deepcopy(model)))


@pytest.mark.parametrize("name", PRODUCERS)
def test_what_is_made_again_is_the_input(name):
    model = layer(PRODUCERS[name])
    x = model.produce(model, model.first(batch()))
    again = remade.recipe(x)()
    assert again.dtype == x.dtype
    torch.testing.assert_close(again, x, rtol=1e-6, atol=1e-6)


def test_rounded_statistics_are_not_enough():
    """A LayerNorm in bfloat16 on the CPU keeps mean and deviation in bfloat16."""
    model = layer(PRODUCERS["layer norm"], dtype=torch.bfloat16)
    assert remade.recipe(model.norm(model.first(batch(torch.bfloat16)))) is None
    close(gradients(model), kept_gradients(copy.deepcopy(model)))


def test_rms_norm_is_made_again_in_its_own_dtype():
    model = layer(rms_norm, dtype=torch.bfloat16)
    x = rms_norm(model, model.first(batch(torch.bfloat16)))
    assert torch.equal(remade.recipe(x)(), x)
    torch.testing.assert_close(gradients(model), kept_gradients(copy.deepcopy(model)))


def test_autocast_changes_nothing():
    model = layer(PRODUCERS["layer norm"])

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    ours = gradients(model, run)
    model.zero_grad()
    hooks = torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged)
    torch.testing.assert_close(ours, gradients(model, run, hooks), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_may_be_around_the_layer(reentrant):
    model = layer(PRODUCERS["rows of a layer norm"], dropout=0.3)
    again = copy.deepcopy(model)
    run = gradients(again, lambda x: checkpoint(again, x, use_reentrant=reentrant))
    close(run, gradients(model))


def test_kept_tensors_may_be_offloaded():
    model = layer(PRODUCERS["windows of a layer norm"])
    again = copy.deepcopy(model)
    ours = gradients(again, hooks=torch.autograd.graph.save_on_cpu())
    close(ours, gradients(model))


def test_a_graph_may_be_kept_and_run_again():
    model = layer(PRODUCERS["gelu"])
    factors = [p for p in model.parameters() if p.requires_grad]
    loss = model(batch()).square().mean()
    first = torch.autograd.grad(loss, factors, retain_graph=True)
    assert all(
        torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, factors), strict=True)
    )


def test_what_hooks_have_taken_is_not_read():
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(unchanged, remade.only_looks(looking)):
        assert remade.recipe(F.gelu(batch())) is not None
        with hooks(unchanged, unchanged):
            x = F.gelu(batch())
        assert remade.recipe(x) is None
    assert remade.recipe(x) is None


@pytest.mark.parametrize("name", ["layer norm", "gated", "gelu", "rows of a layer norm"])
def test_what_comes_out_of_a_checkpointed_block_is_not_read(name):
    """Its tensors may be unpacked only once, by the block itself."""
    model = layer(PRODUCERS[name])

    def run(x):
        inside = lambda h: model.produce(model, model.first(h))  # noqa: E731
        return model.second(checkpoint(inside, x, use_reentrant=False))

    again = gradients(copy.deepcopy(model))
    close(gradients(model, run), again)
    kept, _ = saved_bytes(lambda: run(batch()), [*model.parameters()])
    assert kept >= N * C * 4  # the layer's input
