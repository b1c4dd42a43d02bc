"""The mathematics: derivatives, dropout, what is kept for the backward pass, dtypes, shapes."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from lora_core import dropout, fast_linear, initialise
from lora_core.functional import (
    Branch,
    as_matrix,
    delta,
    dora,
    dora_ratio,
    double_differentiable,
    lora_conv,
    lora_embedding,
    lora_linear,
    lora_linear_plain,
    scaling,
    weight_norm,
)

ROWS = ((0, 3), (5, 6))  # slices of unequal width, a gap between them


def randn(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Derivatives


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [None, ROWS, ((4, 7), (0, 2))])
def test_linear_gradients(p, rows):
    x, W, b = randn(2, 4, 5, grad=True), randn(7, 5), randn(7, grad=True)
    blocks = 1 if rows is None else len(rows)
    width = 7 if rows is None else sum(stop - start for start, stop in rows)
    A, B = randn(2 * blocks, 5, grad=True), randn(width, 2, grad=True)
    A2, B2 = randn(3, 5, grad=True), randn(7, 3, grad=True)

    def run(x, b, A, B, A2, B2):
        first = Branch(A, B, 0.7, rows, p, seed=11)
        return lora_linear(x, W, b, [first, Branch(A2, B2, 1.3, dropout=p, seed=12)])

    assert gradcheck(run, (x, b, A, B, A2, B2))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("conv", "shape", "kernel"),
    [
        (partial(F.conv1d, stride=2, padding=2, dilation=2), (2, 4, 9), (3,)),
        (partial(F.conv2d, padding=1, groups=2), (2, 4, 5, 4), (3, 2)),
        (partial(F.conv3d, stride=(1, 2, 1)), (1, 4, 3, 4, 3), (2, 2, 1)),
    ],
)
def test_convolution_gradients(p, conv, shape, kernel):
    groups = conv.keywords.get("groups", 1)
    x, W = randn(*shape, grad=True), randn(6, shape[1] // groups, *kernel)
    A = randn(2 * groups, shape[1] // groups, *kernel, grad=True)
    B = randn(6, 2, *[1] * len(kernel), grad=True)

    def run(x, A, B):
        branch = Branch(A, B, 0.7, dropout=p, seed=5)
        return lora_conv(x, W, None, [branch], lambda x, w, b: conv(x, w, b), groups)

    assert gradcheck(run, (x, A, B))


def test_embedding_gradients():
    tokens, table = torch.tensor([[0, 3, 3], [5, 1, 0]]), randn(6, 4)
    A, B = randn(2, 6, grad=True), randn(4, 2, grad=True)

    def run(A, B):
        lookup = partial(F.embedding, padding_idx=0)
        return lora_embedding(lookup(tokens, table), tokens, [Branch(A, B, 0.7)], lookup)

    run(A, B).sum().backward()
    assert not A.grad[:, 0].any()
    assert A.grad[:, 1].all()
    A.grad = None
    with torch.no_grad():
        A[:, 0] = 0  # gradcheck would move the padding column, which has no gradient by intent
    check = torch.tensor([[4, 3, 3], [5, 1, 2]])

    def unpadded(A, B):
        return lora_embedding(F.embedding(check, table), check, [Branch(A, B, 0.7)], F.embedding)

    assert gradcheck(unpadded, (A, B))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dora_gradients(p):
    x, W, b = randn(3, 5, grad=True), randn(4, 5), randn(4)
    A, B, m = randn(2, 5, grad=True), randn(4, 2, grad=True), randn(4, grad=True)
    norm = weight_norm(W, A, B, 0.7)  # a constant of the backward pass, by definition

    def run(x, A, B, m):
        dropped = dropout.seeded_dropout(x, p, 3) if p else x
        adapted = lora_linear(dropped, W, b, [Branch(A, B, 0.7)])
        rest = F.linear(x - dropped, W) if p else None
        return dora(adapted, b, dora_ratio(m, norm), rest)

    assert gradcheck(run, (x, A, B, m))
    with torch.no_grad():
        ratio = (m / norm)[:, None]
        d = dropout.seeded_dropout(x, p, 3) if p else x
        expected = F.linear(x - d, W) + F.linear(d, ratio * (W + 0.7 * B @ A)) + b
        torch.testing.assert_close(run(x, A, B, m), expected)


def test_seeded_dropout_and_recomputation_gradients():
    x, A = randn(4, 6, grad=True), randn(2, 6, grad=True)
    assert gradcheck(lambda x: dropout.seeded_dropout(x, 0.4, 9), (x,))
    run = lambda x, A: torch.tanh(dropout.seeded_dropout(x, 0.4, 9) @ A.t())  # noqa: E731
    assert gradcheck(lambda x, A: dropout.recomputed(run, x, A), (x, A))


def test_a_second_derivative_is_an_error_or_right():
    x, W = randn(2, 3, grad=True), randn(4, 3)
    A, B = randn(2, 3, grad=True), randn(4, 2, grad=True)
    y = lora_linear(x, W, None, [Branch(A, B, 0.5)])
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()

    def run(x, A, B):
        with double_differentiable():
            return lora_linear(x, W, None, [Branch(A, B, 0.5)]) ** 2

    assert gradgradcheck(run, (x, A, B))


# Equal to the plain definition


def test_rank_stabilised_scale():
    assert scaling(4, 8.0) == 2
    assert scaling(4, 8.0, use_rslora=True) == 4


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5), (2, 0, 5), (2, 3, 4, 5)])
def test_any_number_of_input_axes(shape):
    x, W, b = randn(*shape, grad=True), randn(7, 5), randn(7)
    A, B = randn(2, 5, grad=True), randn(7, 2, grad=True)
    branches = [Branch(A, B, 0.7)]
    outs = []
    for form in (lora_linear, lora_linear_plain):
        y = form(x, W, b, branches)
        outs.append((y, *torch.autograd.grad(y.square().sum(), (x, A, B))))
    assert outs[0][0].shape == (*shape[:-1], 7)
    for ours, plain in zip(*outs, strict=True):
        torch.testing.assert_close(ours, plain)


def test_inputs_that_are_not_contiguous():
    W, A, B = randn(7, 5), randn(2, 5, grad=True), randn(7, 2, grad=True)
    whole = randn(5, 4, 6, grad=True)
    x = whole.permute(2, 1, 0)[::2]
    y = lora_linear(x, W, None, [Branch(A, B, 0.7)])
    g = randn(7, 4, 3).permute(2, 1, 0)
    grads = torch.autograd.grad(y, (whole, A, B), g)
    plain = lora_linear_plain(x, W, None, [Branch(A, B, 0.7)])
    for ours, expected in zip(grads, torch.autograd.grad(plain, (whole, A, B), g), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_equals_the_convolution_with_the_summed_weight(groups):
    x, W, b = randn(2, 4, 9, 8), randn(6, 4 // groups, 3, 3), randn(6)
    A, B = randn(2 * groups, 4 // groups, 3, 3), randn(6, 2, 1, 1)
    conv = partial(F.conv2d, stride=2, padding=2, dilation=2, groups=groups)
    y = lora_conv(x, W, b, [Branch(A, B, 0.7)], conv, groups)
    torch.testing.assert_close(y, conv(x, W + delta(A, B, 0.7, W.shape, groups=groups), b))


@pytest.mark.parametrize("groups", [1, 2])
def test_change_of_a_transposed_convolution_has_rank_r_per_group(groups):
    shape = (4, 6 // groups, 3, 2)  # (Cin, Cout / G, ..)
    A, B = randn(2 * groups, 4 // groups, 3, 2), randn(6, 2, 1, 1)
    change = delta(A, B, 0.7, shape, groups=groups, transposed=True)
    assert change.shape == shape
    matrix = as_matrix(change, groups, transposed=True)
    assert matrix.shape == (6, 4 // groups * 6)
    for part, A_g, B_g in zip(matrix.chunk(groups), A.chunk(groups), B.chunk(groups), strict=True):
        torch.testing.assert_close(part, 0.7 * B_g.flatten(1) @ A_g.flatten(1))


def test_rows_between_slices_stay_zero():
    A, B = randn(4, 5), randn(4, 2)
    change = delta(A, B, 0.7, (7, 5), rows=((4, 7), (1, 2)))
    torch.testing.assert_close(change[4:7], 0.7 * B[:3] @ A[:2])
    torch.testing.assert_close(change[1:2], 0.7 * B[3:] @ A[2:])
    assert not change[[0, 2, 3]].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_closed_form_norm(groups):
    W, A, B = randn(6, 4, 3), randn(2 * groups, 4, 3), randn(6, 2, 1)
    V = W + delta(A, B, 0.7, W.shape, groups=groups)
    torch.testing.assert_close(weight_norm(W, A, B, 0.7, groups), V.flatten(1).norm(dim=1))
    W[0], B[0] = 0, 0
    norm = weight_norm(W, A, B, 0.7, groups)
    assert dora_ratio(norm, norm).isfinite().all()


# Dropout


def mask(seed, p, rows, columns):
    """M of a (rows, columns) matrix, bool."""
    bits = dropout.random_bits(seed, rows, columns, torch.device("cpu"))
    return torch.cat([block > dropout.threshold(p) for _, block in bits])


def test_keep_rate_is_what_was_asked_for():
    n = 1_000_000
    for p in (0.05, 0.5, 0.9):
        kept = int(mask(3, p, n // 64, 64).sum())
        q = dropout.keep_probability(p)
        assert abs(q - (1 - p)) <= 2**-17
        assert abs(kept - n * q) <= 4 * math.sqrt(n * q * (1 - q))


def test_every_bit_lane_of_the_mask_is_random():
    # Four 16-bit lanes share one random word: a stuck sign bit would show in one of them.
    keep = mask(3, 0.5, 4096, 64)
    rates = keep.view(-1, 4).double().mean(0)
    assert ((rates - 0.5).abs() < 4 * 0.5 / math.sqrt(keep.numel() / 4)).all()


@pytest.mark.parametrize("first", [0, 2**61])
def test_masks_of_neighbouring_seeds_have_nothing_in_common(first):
    masks = [mask(first + i, 0.5, 512, 64) for i in range(6)]
    n = masks[0].numel()
    for one, other in itertools.combinations(masks, 2):
        assert abs(int((one == other).sum()) - n / 2) < 4.5 * math.sqrt(n / 4)
        assert abs(int((one[:-1] == other[1:]).sum()) - (n - 64) / 2) < 4.5 * math.sqrt(n / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_what_is_kept_is_the_product_with_the_mask(dtype, p):
    x = randn(60, 80).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, 1e-7, -3e4], dtype=dtype)  # subnormal in fp16
    ((_, bits),) = dropout.random_bits(5, 60, 80, x.device)
    keep = bits > dropout.threshold(p)
    assert 0 < keep.sum() < keep.numel()
    for t, at in ((x, keep), (x[:, 3:], keep[:, 3:]), (x.t(), keep.t())):
        part = bits[:, 3:] if t.shape[1] == 77 else bits.t() if t.shape[0] == 80 else bits
        found = dropout.kept(t, dropout.as_factors(part, dtype, p), p)
        assert found.dtype == dtype
        assert torch.equal(found, t * at)


def test_every_value_of_the_bits_falls_on_its_side_of_the_threshold():
    bits = torch.arange(-32768, 32768).to(torch.int16)[None]
    for p in (2**-16, 0.1, 0.5, 1 - 2**-16):
        for dtype in (torch.bfloat16, torch.float32):
            factors = dropout.as_factors(bits, dtype, p)
            found = dropout.kept(torch.ones(1, 65536, dtype=dtype), factors, p)
            assert int(found.sum(dtype=torch.int64)) == dropout.keep_count(p)
            assert torch.equal(found[0] != 0, bits[0].int() > dropout.threshold(p))


def test_dropout_keeps_mean_and_has_the_variance_of_dropout():
    p, x = 0.25, torch.full((2000, 100), 3.0)
    y = dropout.seeded_dropout(x, p, 4)
    assert abs(y.mean() - 3) < 4 * 3 * math.sqrt(p / (1 - p) / y.numel())
    torch.testing.assert_close(y.var(), torch.tensor(9 * p / (1 - p)), rtol=0.02, atol=0)
    assert set(y.unique().tolist()) == {0.0, 3.0 / dropout.keep_probability(p)}


def test_a_mask_is_a_function_of_its_seed():
    x = torch.ones(700, 300)  # two blocks, of 436 rows and the rest
    first, second = (dropout.seeded_dropout(x, 0.5, seed) for seed in (1, 2))
    assert torch.equal(first, dropout.seeded_dropout(x, 0.5, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:218], first[436:654])


@pytest.mark.parametrize("columns", [1, 7, 300])
def test_a_mask_does_not_depend_on_blocks_or_threads(columns, monkeypatch):
    expected, threads = mask(5, 0.5, 1500, columns), torch.get_num_threads()
    try:
        for block, count in ((1, 1), (1 << 12, 1), (1 << 12, 2)):
            monkeypatch.setattr(dropout, "CPU_BLOCK", block)
            torch.set_num_threads(count)
            assert torch.equal(mask(5, 0.5, 1500, columns), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_dropped_input_reaches_y_and_both_gradients():
    p, seed, x = 0.3, 8, randn(1800, 100, grad=True)  # two blocks of rows
    W, A, B = randn(6, 100), randn(3, 100, grad=True), randn(6, 3, grad=True)
    y = lora_linear(x, W, None, [Branch(A, B, 0.7, dropout=p, seed=seed)])
    assert dropout.CPU_BLOCK // 100 < 1800 < 2 * (dropout.CPU_BLOCK // 100)
    D = mask(seed, p, 1800, 100).double() / dropout.keep_probability(p)
    expected = x @ W.t() + 0.7 * ((x * D) @ A.t()) @ B.t()
    g = randn(1800, 6)
    torch.testing.assert_close(y, expected)
    for ours, plain in zip(
        torch.autograd.grad(y, (x, A, B), g),
        torch.autograd.grad(expected, (x, A, B), g),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_calls_differ_and_manual_seed_repeats_them():
    x, W, A, B = (randn(*s, dtype=torch.float32) for s in ((9, 8), (6, 8), (2, 8), (6, 2)))
    branch = [Branch(A, B, 1.0, dropout=0.5)]
    first, second = lora_linear(x, W, None, branch), lora_linear(x, W, None, branch)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    runs = [lora_linear(x, W, None, branch) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(runs[0], lora_linear(x, W, None, branch))
    assert torch.equal(runs[1], lora_linear(x, W, None, branch))


def test_dropped_columns_have_the_mean_of_a():
    A = torch.ones(4, 50, 2)
    samples = torch.stack([dropout.drop_columns(A, 0.5, groups=2) for _ in range(400)])
    assert (samples.mean(0) - 1).abs().max() < 5 / math.sqrt(400)
    sample = samples[0]
    assert torch.equal(sample[0], sample[1])
    assert torch.equal(sample[..., 0], sample[..., 1])
    assert not torch.equal(sample[0], sample[2])


# What is kept for the backward pass


def saved_bytes(run, parameters):
    """Bytes of the distinct storages that a forward pass keeps, parameters excluded."""
    storages, ours = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()  # alive, so that no two storages share an address
    assert kept is not None
    return sum(storages.values())


@pytest.fixture
def low_rank(monkeypatch):
    """The way that keeps h, too, see `fast_linear`."""
    monkeypatch.setattr(fast_linear, "MERGED_FROM", math.inf)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mode", ["fp32", "bf16 base", "autocast"])
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_only_x_and_h_are_kept(p, mode, layers, low_rank):
    N, di, do, r = 600, 96, 64, 8
    dtype = torch.bfloat16 if mode == "bf16 base" else torch.float32
    x = randn(N, di, dtype=dtype, grad=True)
    weights = [(randn(do, di, dtype=dtype), randn(do, dtype=dtype)) for _ in range(layers)]
    pairs = [
        (randn(r, di, dtype=torch.float32, grad=True), randn(do, r, dtype=torch.float32, grad=True))
        for _ in range(layers)
    ]

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            return [
                lora_linear(x, W, b, [Branch(A, B, 0.7, dropout=p)])
                for (W, b), (A, B) in zip(weights, pairs, strict=True)
            ]

    parameters = [t for group in (*weights, *pairs) for t in group]
    itemsize = 4 if mode == "fp32" else 2
    bound = x.numel() * x.element_size() + layers * N * r * itemsize
    assert saved_bytes(run, parameters) == bound


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_fused_slices_keep_x_and_their_h(p, low_rank):
    N, di, do, r = 600, 96, 90, 8
    x, W = randn(N, di, dtype=torch.float32, grad=True), randn(do, di, dtype=torch.float32)
    A = randn(2 * r, di, dtype=torch.float32, grad=True)
    B = randn(60, r, dtype=torch.float32, grad=True)
    branch = Branch(A, B, 0.7, ((0, 40), (70, 90)), p)
    kept = saved_bytes(lambda: lora_linear(x, W, None, [branch]), [W, A, B])
    assert kept == 4 * N * (di + 2 * r)


def test_frozen_factors_keep_less():
    N, di, do, r = 600, 96, 64, 8
    x, W = randn(N, di, dtype=torch.float32, grad=True), randn(do, di, dtype=torch.float32)
    for train_A, train_B, expected in [
        (False, True, 4 * N * r),
        (True, False, 4 * N * di),
        (False, False, 0),
    ]:
        A = randn(r, di, dtype=torch.float32, grad=train_A)
        B = randn(do, r, dtype=torch.float32, grad=train_B)
        for p in (0.0, 0.05):
            branch = Branch(A, B, 0.7, dropout=p)
            run = partial(lora_linear, x, W, None, [branch])
            assert saved_bytes(run, [W, A, B]) == expected
            run().sum().backward()
            assert (A.grad is not None, B.grad is not None) == (train_A, train_B)


def test_nothing_is_kept_without_gradients():
    x, W = randn(50, 8), randn(6, 8)
    A, B = randn(2, 8, grad=True), randn(6, 2, grad=True)
    branches = [Branch(A, B, 0.7, dropout=0.5)]
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            assert saved_bytes(lambda: lora_linear(x, W, None, branches), [W, A, B]) == 0


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_convolution_keeps_x_and_h(p):
    x = randn(4, 8, 20, 20, dtype=torch.float32, grad=True)
    W = randn(16, 8, 3, 3, dtype=torch.float32)
    A = randn(2, 8, 3, 3, dtype=torch.float32, grad=True)
    B = randn(16, 2, 1, 1, dtype=torch.float32, grad=True)
    conv = partial(F.conv2d, padding=1)
    branch = Branch(A, B, 0.7, dropout=p)
    kept = saved_bytes(lambda: lora_conv(x, W, None, [branch], conv), [W, A, B])
    assert kept == 4 * (x.numel() + 4 * 2 * 20 * 20)


def test_x_without_gradient_gets_none():
    x, W = randn(5, 8), randn(6, 8)
    A, B = randn(2, 8, grad=True), randn(6, 2, grad=True)
    lora_linear(x, W, None, [Branch(A, B, 0.7, dropout=0.5)]).sum().backward()
    assert x.grad is None
    assert A.grad.any()
    assert B.grad.any()


def test_x_and_g_are_left_as_they_are():
    x, W = randn(5, 8, grad=True), randn(6, 8)
    A, B = randn(2, 8, grad=True), randn(6, 2, grad=True)
    before = x.detach().clone()
    y = lora_linear(x, W, None, [Branch(A, B, 0.7, dropout=0.5)])
    g = randn(5, 6)
    kept = g.clone()
    y.backward(g)
    assert torch.equal(x, before)
    assert torch.equal(g, kept)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_the_output_may_be_changed_in_place(shape, p):
    x, W, b = randn(*shape, grad=True), randn(6, 5), randn(6)
    branch = Branch(randn(2, 5, grad=True), randn(6, 2, grad=True), 0.5, dropout=p, seed=3)
    grads = []
    for behind in (torch.relu_, torch.relu):
        y = behind(lora_linear(x, W, b, [branch]))
        grads.append(torch.autograd.grad(y.square().sum(), [x, branch.A, branch.B]))
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


# Dtypes


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("base", "autocast", "out"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_output_has_the_dtype_that_the_base_gives(base, autocast, out, p):
    x, W, b = randn(5, 8, dtype=base, grad=True), randn(6, 8, dtype=base), randn(6, dtype=base)
    factor = torch.float64 if base == torch.float64 else torch.float32
    A, B = randn(2, 8, dtype=factor, grad=True), randn(6, 2, dtype=factor, grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = lora_linear(x, W, b, [Branch(A, B, 0.7, dropout=p)])
        assert y.dtype == F.linear(x, W, b).dtype == out
    y.sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (base, factor, factor)


def test_autocast_has_the_accuracy_of_bf16_in_and_after_its_block():
    x, W = randn(64, 32, dtype=torch.float32, grad=True), randn(48, 32, dtype=torch.float32)
    A, B = (
        randn(4, 32, dtype=torch.float32, grad=True),
        randn(48, 4, dtype=torch.float32, grad=True),
    )
    g = randn(64, 48, dtype=torch.float32)
    exact = lora_linear(x, W, None, [Branch(A, B, 0.7)])
    wanted = [exact, *torch.autograd.grad(exact, (x, A, B), g)]
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = lora_linear(x, W, None, [Branch(A, B, 0.7)])
            if inside:
                found = [y, *torch.autograd.grad(y, (x, A, B), g.bfloat16())]
        if not inside:
            found = [y, *torch.autograd.grad(y, (x, A, B), g.bfloat16())]
        for ours, reference in zip(found, wanted, strict=True):
            assert (ours - reference).norm() < 6e-3 * reference.norm()


def test_wrong_input_dtype_fails_as_the_base_does():
    x, W = randn(5, 8, dtype=torch.float32), randn(6, 8, dtype=torch.bfloat16)
    A, B = randn(2, 8, dtype=torch.float32), randn(6, 2, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        F.linear(x, W)
    with pytest.raises(RuntimeError):
        lora_linear(x, W, None, [Branch(A, B, 0.7)])


# Starts


def test_starts_have_their_distributions():
    A = initialise.kaiming_A((64, 400), seed=1)
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    torch.testing.assert_close(A.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.02, atol=0)
    reference = nn.Linear(400, 64, bias=False)
    torch.testing.assert_close(A.std(), reference.weight.std(), rtol=0.03, atol=0)
    gaussian = initialise.gaussian_A((64, 400), 64, seed=1)
    torch.testing.assert_close(gaussian.std(), torch.tensor(1 / 64), rtol=0.02, atol=0)
    assert abs(initialise.normal_B((64, 400), seed=1).std() - 1) < 0.02


def test_starts_depend_on_seed_and_name_alone():
    seeds = {initialise.module_seed(seed, path) for seed in (0, 1) for path in ("a.b", "a.c")}
    assert len(seeds) == 4
    torch.manual_seed(1)
    first = initialise.kaiming_A((3, 4), initialise.module_seed(0, "a.b"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, initialise.kaiming_A((3, 4), initialise.module_seed(0, "a.b")))
    assert torch.equal(state, torch.get_rng_state())


def test_pissa_takes_the_principal_part():
    W = randn(9, 6)
    A, B = initialise.pissa(W, 2, 1.5)
    U, S, Vt = torch.linalg.svd(W)
    torch.testing.assert_close(1.5 * B @ A, (U[:, :2] * S[:2]) @ Vt[:2])
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
