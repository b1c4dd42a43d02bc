"""The operation that compilers see: no bit differs, and the graph has no breaks."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core import LoraConfig, inject
from lora_core.compiled_linear import compiled_linear
from lora_core.functional import Branch, lora_linear

N, DI, DO, R = 12, 5, 7, 2
SLICES = ((0, 3), (5, 6))


@pytest.fixture(autouse=True)
def _seed():
    torch._dynamo.reset()
    torch.manual_seed(0)


def layer(rows=None, count=N):
    """x, W, b, A, B, all with gradients but W."""
    blocks = 1 if rows is None else len(rows)
    width = DO if rows is None else sum(stop - start for start, stop in rows)
    shapes = [(2, count // 2, DI), (DO, DI), (DO,), (R * blocks, DI), (width, R)]
    return [torch.randn(*s).requires_grad_(i != 1) for i, s in enumerate(shapes)]


def passes(run, tensors):
    """The output of `run(*tensors)` and the gradients of those that have one."""
    y = run(*tensors)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    asked = [t for t in tensors if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, asked, g)]


def compiled(run):
    return torch.compile(run, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [None, SLICES])
@pytest.mark.parametrize("frozen", [None, 0, 3, 4])  # nothing, x, A, B
@pytest.mark.parametrize("count", [N, 200])  # in both ways of `fast_linear`
def test_no_bit_differs_from_the_layer_that_is_not_compiled(count, frozen, rows, p, autocast):
    tensors = layer(rows, count)
    if frozen is not None:
        tensors[frozen].requires_grad_(False)

    def run(x, W, b, A, B):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return lora_linear(x, W, b, [Branch(A, B, 0.7, rows, p, seed=11)])

    found, expected = passes(compiled(run), tensors), passes(run, tensors)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_two_adapters_without_a_bias():
    x, W, _, A, B = layer(SLICES)
    A2, B2 = torch.randn(3, DI, requires_grad=True), torch.randn(DO, 3, requires_grad=True)

    def run(x, A, B, A2, B2):
        branches = [Branch(A, B, 0.7, SLICES, 0.2, seed=4), Branch(A2, B2, 1.3)]
        return lora_linear(x, W, None, branches)

    tensors = [x, A, B, A2, B2]
    found, expected = passes(compiled(run), tensors), passes(run, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [None, SLICES])
@pytest.mark.parametrize("keeps_h", [True, False])
def test_the_operation_keeps_its_promises(keeps_h, rows, p):
    x, W, b, A, B = layer(rows)
    words = ([0.7], [p], [0] if rows is None else [2, 0, 3, 5, 6], torch.float32, False, keeps_h)
    seeds = torch.tensor([5]) if p else None
    torch.library.opcheck(
        torch.ops.lora_core.linear, (x, W.detach(), b, [A, B], seeds, *words), atol=1e-5, rtol=1e-5
    )


def test_each_call_draws_a_mask_of_its_own_and_a_seed_repeats_it():
    x, W, b, A, B = layer()
    run = compiled(lambda: lora_linear(x, W, b, [Branch(A, B, 0.7, None, 0.5)]))
    torch.manual_seed(1)
    one, two = run(), run()
    assert not torch.equal(one, two)
    torch.manual_seed(1)
    assert torch.equal(run(), one)


def test_checkpointing_draws_the_same_mask_again():
    x, W, b, A, B = layer()

    def run(x):
        return lora_linear(x, W, b, [Branch(A, B, 1.0, None, 0.5)]).square()

    def gradients(run, seed):
        torch.manual_seed(seed)
        return torch.autograd.grad(compiled(run)(x).sum(), (x, A, B))

    for seed in (1, 2):
        found = gradients(lambda x: checkpoint(run, x, use_reentrant=False), seed)
        for one, other in zip(found, gradients(run, seed), strict=True):
            assert torch.equal(one, other)


def test_other_numbers_of_rows_need_no_other_code():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    _, W, b, A, B = layer()
    run = torch.compile(
        lambda x: lora_linear(x, W, b, [Branch(A, B, 0.7, None, 0.1)]),
        backend=backend, fullgraph=True, dynamic=True,
    )  # fmt: skip
    for count in (4, 6, 9):
        assert run(torch.randn(count, DI)).shape == (count, DO)
    assert len(graphs) == 1


def test_an_exported_program_has_ordinary_operations_only():
    model = nn.Sequential(nn.Linear(DI, DO))
    inject(model, LoraConfig(["0"], r=R))
    nn.init.normal_(model[0].lora_B["default"].weight)
    x = torch.randn(N, DI)
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert all(name.startswith("aten.") for name in called)


def test_called_directly_it_is_the_layer():
    x, W, b, A, B = layer()
    branches = [Branch(A, B, 0.7, None, 0.3, seed=9)]
    assert torch.equal(compiled_linear(x, W, b, branches), lora_linear(x, W, b, branches))
