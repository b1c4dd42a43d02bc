"""The ways of computing an adapted Linear: which one is taken, and that all are one."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lora_core import dropout, fast_linear, row_blocks
from lora_core.functional import Branch, lora_linear
from lora_core.memory import saved_bytes
from lora_core.weights import delta

SLICES = ((0, 3), (5, 6))
N, DI, DO, R = 300, 5, 7, 2  # many rows for few inputs and outputs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def merged(monkeypatch):
    """How often a merged weight is built."""
    built = []
    original = fast_linear._merged_weight

    def counted(*words):
        built.append(words)
        return original(*words)

    monkeypatch.setattr(fast_linear, "_merged_weight", counted)
    return built


def layer(rows=None, dtype=torch.float64, factors=torch.float64):
    """x, W, b, A, B, all with gradients but W."""
    blocks = 1 if rows is None else len(rows)
    width = DO if rows is None else sum(stop - start for start, stop in rows)
    shapes = [(N, DI), (DO, DI), (DO,), (R * blocks, DI), (width, R)]
    kinds = [dtype, dtype, dtype, factors, factors]
    made = [torch.randn(*s, dtype=kind) for s, kind in zip(shapes, kinds, strict=True)]
    return [t if i == 1 else t.requires_grad_() for i, t in enumerate(made)]


def passes(tensors, rows=None, p=0.0, bias=True):
    """The output and the gradients of x, b, A and B, those that are asked for."""
    x, W, b, A, B = tensors
    y = lora_linear(x, W, b if bias else None, [Branch(A, B, 0.7, rows, p, seed=11)])
    asked = [t for t in (x, *([b] if bias else []), A, B) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, asked, gradient_of(y))]


def gradient_of(y):
    """The same whole numbers in each dtype."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-8, 9, y.shape, generator=generator).to(y.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, SLICES, ((4, 7), (0, 2))])
@pytest.mark.parametrize("frozen", [None, 0, 4])  # nothing, x, B
def test_the_merged_way_gives_what_the_low_rank_way_gives(
    frozen, rows, bias, dtype, tolerance, merged, monkeypatch
):
    tensors = layer(rows, dtype, dtype)
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    found = passes(tensors, rows, bias=bias)
    assert len(merged) == (1 if frozen == 0 else 2)
    monkeypatch.setattr(fast_linear, "MERGED_FROM", math.inf)
    expected = passes(tensors, rows, bias=bias)
    assert len(merged) == (1 if frozen == 0 else 2)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("rows", [None, SLICES, ((4, 7), (0, 2))])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_products_with_wide_ranks_are_those_with_narrow_ones(p, rows, monkeypatch):
    tensors = layer(rows)
    found = []
    monkeypatch.setattr(fast_linear, "MERGED_FROM", math.inf)
    for least in (1, math.inf):
        for name in ("UP_FROM", "DOWN_FROM"):
            monkeypatch.setattr(row_blocks, name, least)
        found.append(passes(tensors, rows, p))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[0][-1].is_contiguous()


@pytest.mark.parametrize("way", ["low-rank", "merged"])
@pytest.mark.parametrize("rows", [None, SLICES, ((4, 7), (0, 2))])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [None, 0, 3, 4])  # nothing, x, A, B
def test_blocks_of_rows_give_what_autograd_gives(frozen, p, rows, way, monkeypatch):
    tensors = layer(rows)
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    expected = plain_passes(tensors, rows, p)
    if way == "low-rank":
        monkeypatch.setattr(fast_linear, "MERGED_FROM", math.inf)
    blocks = counted_blocks(monkeypatch)
    for least, narrow in [(300, 0), (37, 0), (37, math.inf)]:
        monkeypatch.setattr(row_blocks, "ELEMENTS", 1)
        monkeypatch.setattr(row_blocks, "ROWS", least)
        monkeypatch.setattr(row_blocks, "NARROW", narrow)
        assert_all_close(passes(tensors, rows, p), expected)
    assert set(blocks) == {300, 40, 20}


@pytest.mark.parametrize("rows", [None, SLICES])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_products_as_on_other_devices_give_what_autograd_gives(p, rows, monkeypatch):
    """One piece without dropout, products as they are written, and bool masks."""
    tensors = layer(rows)
    monkeypatch.setattr(row_blocks, "measured", lambda device, dtype: False)
    monkeypatch.setattr(dropout, "in_one_pass", lambda t: False)
    blocks = counted_blocks(monkeypatch)
    for least in (300, 37):
        monkeypatch.setattr(row_blocks, "ELEMENTS", 1)
        monkeypatch.setattr(row_blocks, "ROWS", least)
        assert_all_close(passes(tensors, rows, p), plain_passes(tensors, rows, p))
    assert set(blocks) == ({300, 40, 20} if p else {300})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_summed_over_blocks_in_fp32(dtype, monkeypatch):
    tensors = layer(None, dtype, torch.float32)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    *_, dA, dB = plain_passes(exact, None, 0.3)
    errors = []
    for least in (N, 4):
        monkeypatch.setattr(row_blocks, "ELEMENTS", 1)
        monkeypatch.setattr(row_blocks, "ROWS", least)
        *_, found_A, found_B = passes(tensors, None, 0.3)
        assert found_A.dtype == found_B.dtype == torch.float32
        errors.append(((found_A - dA).norm() / dA.norm(), (found_B - dB).norm() / dB.norm()))
    eps = torch.finfo(dtype).eps
    assert max(max(error) for error in errors) < 2 * eps


def plain_passes(tensors, rows, p):
    """`passes` by autograd, with the same mask."""
    x, W, b, A, B = tensors
    bits = torch.cat([bits for _, bits in dropout.random_bits(11, N, DI, x.device)])
    mask = (bits > dropout.threshold(p)).double() / dropout.keep_probability(p) if p else 1
    y = x @ W.t() + b + (x * mask) @ delta(A, B, 0.7, W.shape, rows).t()
    asked = [t for t in (x, b, A, B) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, asked, gradient_of(y))]


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def counted_blocks(monkeypatch):
    """How many rows the blocks have that are worked on from now on."""
    seen = []
    original = row_blocks._row_blocks

    def counted(*words):
        found = original(*words)
        seen.extend(N if rows is None else rows.stop - rows.start for rows in found)
        return found

    monkeypatch.setattr(row_blocks, "_row_blocks", counted)
    return seen


def test_two_adapters_with_masks_of_their_own(monkeypatch):
    x, W, b, A, B = layer(SLICES)
    A2, B2 = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, DI), (DO, 3)))
    branches = [Branch(A, B, 0.7, SLICES, 0.3, seed=4), Branch(A2, B2, 1.3, None, 0.6, seed=5)]
    g, expected = torch.randn(N, DO, dtype=torch.float64), None
    for least in (math.inf, 37):
        monkeypatch.setattr(row_blocks, "ROWS", least if least < math.inf else 1000)
        monkeypatch.setattr(row_blocks, "ELEMENTS", 1)
        found = torch.autograd.grad(lora_linear(x, W, b, branches), [x, b, A, B, A2, B2], g)
        for one, other in zip(found, expected or found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        expected = found


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_of_blocks_are_those_of_random_bits(p, monkeypatch):
    """So that a run does not depend on the way, nor on the number of threads."""
    monkeypatch.setattr(row_blocks, "ELEMENTS", 1)
    monkeypatch.setattr(row_blocks, "ROWS", 37)
    x, W, b, A, B = layer()
    bits = torch.cat([bits for _, bits in dropout.random_bits(11, N, DI, x.device)])
    dropped = x * (bits > dropout.threshold(p)) / dropout.keep_probability(p)
    y = lora_linear(x, W, b, [Branch(A, B, 0.7, None, p, seed=11)])
    torch.testing.assert_close(y, x @ W.t() + b + 0.7 * dropped @ A.t() @ B.t())


def test_gradients_of_a_merged_pair_of_adapters(merged):
    x, W, b, A, B = layer(SLICES)
    A2, B2 = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, DI), (DO, 3)))

    def run(x, b, A, B, A2, B2):
        return lora_linear(x, W, b, [Branch(A, B, 0.7, SLICES), Branch(A2, B2, 1.3)])

    assert gradcheck(run, (x[:48].detach().requires_grad_(), b, A, B, A2, B2))
    assert merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_merged_way_keeps_x_alone(dtype):
    x, W, b, A, B = layer(None, dtype, dtype)
    kept, _ = saved_bytes(lambda: lora_linear(x, W, b, [Branch(A, B, 0.7)]), [W, b, A, B])
    assert kept == x.numel() * x.element_size()


def test_a_start_of_zero_changes_no_bit(merged):
    x, W, b, A, _ = layer(None, torch.float32, torch.float32)
    y = lora_linear(x, W, b, [Branch(A, torch.zeros(DO, R, requires_grad=True), 0.7)])
    assert merged
    assert torch.equal(y, torch.nn.functional.linear(x, W, b))


@pytest.mark.parametrize(
    ("rows", "p", "dtype", "trains_A"),
    [
        (3, 0.0, torch.float32, True),  # less work over x than over W
        (N, 0.1, torch.float32, True),  # the base sees the clean x
        (N, 0.0, torch.bfloat16, True),  # W' would round small updates away
        (N, 0.0, torch.float32, False),  # h is kept in place of x
    ],
)
def test_where_merging_does_not_pay_the_low_rank_way_is_taken(rows, p, dtype, trains_A, merged):
    x, W, b, A, B = layer(None, dtype, torch.float32)
    A.requires_grad_(trains_A)
    passes([x[:rows].detach().requires_grad_(), W, b, A, B], p=p)
    assert not merged
