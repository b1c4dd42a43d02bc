"""Submanifold convolution: recorded results of spconv, brute force, duplicates, what is saved."""

from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_network import voxels
from torch import Tensor

from lora_core.errors import DataError
from lora_core.testing import load_golden
from scenesplat_lora.network import submanifold
from scenesplat_lora.network.submanifold import (
    NeighbourMap,
    SubmanifoldConv,
    convolve,
    find_neighbours,
)

CASE = load_golden(Path(__file__).parent / "goldens" / "subm_conv")
RECORDED = {case["tag"]: case for case in CASE.config["cases"]}


def recorded_layer(tag: str) -> SubmanifoldConv:
    case = RECORDED[tag]
    layer = SubmanifoldConv(
        case["in_channels"], case["out_channels"], case["kernel_size"], case["bias"]
    )
    layer.load_state_dict(
        {n.removeprefix(f"{tag}."): t for n, t in CASE.weights.items() if n.startswith(f"{tag}.")}
    )
    return layer


def recorded_neighbours(tag: str) -> NeighbourMap:
    return find_neighbours(CASE.io["grid_coord"], CASE.io["batch"], RECORDED[tag]["kernel_size"])


@pytest.mark.parametrize("tag", RECORDED)
@pytest.mark.parametrize("block", [7, 4096])
def test_outputs_and_gradients_are_the_recorded_ones(
    tag: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submanifold, "BLOCK", block)
    layer = recorded_layer(tag)
    feat = CASE.io[f"{tag}.feat"].clone().requires_grad_()
    out = layer(feat, recorded_neighbours(tag))
    torch.testing.assert_close(out, CASE.io[f"{tag}.out"], rtol=0, atol=1e-5)
    out.backward(CASE.io[f"{tag}.grad_out"])
    found = {"feat": feat.grad} | {name: p.grad for name, p in layer.named_parameters()}
    for name, grad in found.items():
        torch.testing.assert_close(grad, CASE.io[f"{tag}.grad_{name}"], rtol=1e-5, atol=1e-5)


def brute_force(grid: Tensor, batch: Tensor, feat: Tensor, weight: Tensor) -> Tensor:
    """Row by row; a place's row is the lowest one there, but the centre's is the row itself."""
    places: dict[tuple[int, ...], int] = {}
    rows = [(*g, b) for g, b in zip(grid.tolist(), batch.tolist(), strict=True)]
    for row, place in enumerate(rows):
        places.setdefault(place, row)
    radius = weight.shape[1] // 2
    out = []
    for row, (x, y, z, b) in enumerate(rows):
        total = torch.zeros(weight.shape[0], dtype=feat.dtype)
        for i, j, k in product(range(2 * radius + 1), repeat=3):
            offset = (i - radius, j - radius, k - radius)
            there = places.get((x + offset[0], y + offset[1], z + offset[2], b))
            source = row if offset == (0, 0, 0) else there
            if source is not None:
                total = total + weight[:, i, j, k] @ feat[source]
        out.append(total)
    return torch.stack(out)


def sample(coincident: bool) -> tuple[Tensor, Tensor]:
    batch = voxels(40, 30, extent=6)
    grid, cloud = batch.grid_coord, torch.tensor([0] * 40 + [1] * 30)
    if coincident:
        rows = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:20]
        grid, cloud = torch.cat([grid[rows], grid]), torch.cat([cloud[rows], cloud])
    return grid, cloud


@pytest.mark.parametrize("coincident", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_convolution_is_the_sum_over_neighbours(kernel_size: int, coincident: bool) -> None:
    torch.manual_seed(0)
    grid, cloud = sample(coincident)
    feat = torch.randn(len(grid), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, *[kernel_size] * 3, 3, dtype=torch.float64, requires_grad=True)
    out = convolve(feat, weight, None, find_neighbours(grid, cloud, kernel_size))
    slow = brute_force(grid, cloud, feat, weight)
    torch.testing.assert_close(out, slow)
    direction = torch.randn_like(out)
    grads = torch.autograd.grad((out * direction).sum(), (feat, weight))
    slow_grads = torch.autograd.grad((slow * direction).sum(), (feat, weight))
    torch.testing.assert_close(grads, slow_grads)


def test_rows_in_another_order_give_the_same_convolution() -> None:
    grid, cloud = sample(coincident=False)
    feat, weight = torch.randn(70, 4), torch.randn(5, 3, 3, 3, 4)
    out = convolve(feat, weight, None, find_neighbours(grid, cloud, 3))
    order = torch.randperm(70)
    moved = convolve(feat[order], weight, None, find_neighbours(grid[order], cloud[order], 3))
    torch.testing.assert_close(moved, out[order])


def test_voxels_at_the_edge_of_the_box_have_no_neighbours_on_the_other_side() -> None:
    corners = torch.tensor(list(product([0, 3], repeat=3)))
    neighbours = find_neighbours(corners.repeat(3, 1), torch.arange(3).repeat_interleave(8), 5)
    assert sum(len(targets) for _, targets, _ in neighbours.pairs) == 0


def saved_numbers(train_weight: bool) -> int:
    """Numbers of [N, C] tensors that autograd keeps between forward and backward."""
    grid, cloud = sample(coincident=False)
    layer = SubmanifoldConv(4, 4, 3, bias=True).requires_grad_(train_weight)
    feat = torch.randn(70, 4, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(feat, find_neighbours(grid, cloud, 3))
    out.sum().backward()
    assert (layer.weight.grad is None) == (not train_weight)
    assert feat.grad is not None
    return sum(t.numel() for t in kept if t.shape[:1] == (70,))


def test_a_frozen_convolution_keeps_no_features_for_backward() -> None:
    assert saved_numbers(train_weight=True) == 70 * 4
    assert saved_numbers(train_weight=False) == 0


def test_the_convolution_is_in_float32_under_autocast() -> None:
    layer = recorded_layer("k3")
    neighbours = recorded_neighbours("k3")
    feat = CASE.io["k3.feat"]
    with torch.autocast("cpu", torch.bfloat16):
        exact = layer(feat, neighbours)
        rounded = layer(feat.bfloat16(), neighbours)
    torch.testing.assert_close(exact, CASE.io["k3.out"], rtol=0, atol=1e-5)
    assert rounded.dtype == torch.bfloat16
    with torch.no_grad():
        again = layer(feat.bfloat16().float(), neighbours).bfloat16()
    assert torch.equal(rounded, again)


def test_new_weights_are_spread_as_those_of_torch() -> None:
    torch.manual_seed(0)
    layer = SubmanifoldConv(16, 32, 3, bias=True)
    bound = (27 * 16) ** -0.5
    for tensor in layer.parameters():
        assert tensor.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.fault("R47")
def test_a_box_that_int64_cannot_number_is_refused() -> None:
    grid = torch.tensor([[0, 0, 0], [2**22, 2**22, 2**22]])
    with pytest.raises(DataError, match="more than can be numbered"):
        find_neighbours(grid, torch.zeros(2).long(), 3)


def test_pairs_come_block_by_block_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submanifold, "BLOCK", 16)
    grid, cloud = sample(coincident=False)
    whole, blocks = find_neighbours(grid, cloud, 3), []
    place = torch.argsort(torch.argsort(submanifold._keys(grid, cloud, 1)[0]))
    for index, targets, sources in whole.pairs:
        assert len(targets) == len(sources) > 0
        assert len(targets.unique()) == len(targets)
        (block,) = (place[targets] // 16).unique().tolist()
        blocks.append((block, index))
    assert [block for block, _ in blocks] == sorted(block for block, _ in blocks)
    assert len(set(blocks)) == len(blocks)
    monkeypatch.setattr(submanifold, "BLOCK", 10**6)
    total = sum(len(targets) for _, targets, _ in find_neighbours(grid, cloud, 3).pairs)
    assert sum(len(targets) for _, targets, _ in whole.pairs) == total > 0
