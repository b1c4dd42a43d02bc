"""Submanifold convolution of scenesplat-lora, beside the CPU build of spconv where it is installed.

    OMP_NUM_THREADS=1 python tools/bench/scenesplat_convolution.py
    OMP_NUM_THREADS=1 python tools/bench/scenesplat_convolution.py --voxels 30000 --channels 256

spconv is no dependency of anything here; `pip install spconv` brings the CPU build (Linux, x86),
and without it there is no table of it. The kernel has 3^3 offsets, all is float32. A convolution
needs to know the neighbours of each voxel: a network finds them once per stage and step (`table`),
spconv within the first convolution of an `indice_key`. Both ways are in the ratios, with the table
and without it; `in a stage` is one table and two convolutions, which a stage of the released
networks has at least. The weight is frozen, as with LoRA: the backward pass gives the gradient of
the features alone. (The CPU build of spconv has no backward pass.)

The variants take turns: a round is one of each. Seconds are medians over the rounds, ratios medians
of each round's ratio; on the CPU they are the process' own time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, ratio
from results import Table, publish
from scenesplat_rooms import room
from torch import Tensor

from scenesplat_lora.network.submanifold import convolve, find_neighbours

GOAL = 2.0  # forward passes, of both passes in a stage
Variants = dict[str, Callable[[], Any]]


def ours(grid: Tensor, feat: Tensor, weight: Tensor) -> Variants:
    """Table, forward, forward with backward."""
    cloud = torch.zeros(len(grid), dtype=torch.long, device=grid.device)
    neighbours = find_neighbours(grid, cloud, 3)
    trained = feat.clone().requires_grad_()
    gradient = torch.randn_like(feat)

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = convolve(trained, weight, None, neighbours)
        return out, *torch.autograd.grad(out, trained, gradient)

    return {
        "table": lambda: find_neighbours(grid, cloud, 3),
        "forward": lambda: convolve(feat, weight, None, neighbours),
        "both": both,
    }


def theirs(grid: Tensor, feat: Tensor, weight: Tensor) -> Variants:
    """spconv's forward with the same weight, with its table and without; {} where it is absent.

    Raises:
        SystemExit: the results differ.
    """
    try:
        import spconv.pytorch as spconv
    except ImportError:
        return {}
    conv = spconv.SubMConv3d(feat.shape[1], len(weight), 3, bias=False, indice_key="room")
    conv.weight = torch.nn.Parameter(weight, requires_grad=False)
    conv = conv.to(feat.device).train()  # its CPU build refuses a bias in evaluation
    indices = torch.nn.functional.pad(grid, (1, 0)).int()
    shape = (grid.amax(0) + 1).tolist()
    known: dict[str, Any] = {}

    def forward(tables: dict[str, Any]) -> Any:
        sparse = spconv.SparseConvTensor(feat, indices, shape, 1)
        sparse.indice_dict = tables
        return conv(sparse)

    known.update(forward({}).indice_dict)
    cloud = torch.zeros(len(grid), dtype=torch.long, device=grid.device)
    own = convolve(feat, weight, None, find_neighbours(grid, cloud, 3))
    error = (forward(known).features - own).abs().max().item()
    if error > 1e-4:
        raise SystemExit(f"spconv differs by {error}")
    return {"spconv": lambda: forward(known), "spconv, table": lambda: forward({})}


def own_row(seconds: dict[str, list[float]]) -> list[float]:
    """Milliseconds of table, forward and both, then ratios of both to forward."""
    table, forward, both = (seconds[name] for name in ("table", "forward", "both"))
    stages = [[t + 2 * c for t, c in zip(table, one, strict=True)] for one in (both, forward)]
    values = [1000 * statistics.median(each) for each in (table, forward, both)]
    return [*values, ratio(both, forward), ratio(*stages)]


def spconv_row(seconds: dict[str, list[float]]) -> list[float]:
    """Milliseconds of spconv without and with its table, then ratios of ours to them."""
    table, forward = seconds["table"], seconds["forward"]
    spconv, whole = seconds["spconv"], seconds["spconv, table"]
    with_table = [a + b for a, b in zip(table, forward, strict=True)]
    values = [1000 * statistics.median(each) for each in (spconv, whole)]
    return [*values, ratio(forward, spconv), ratio(with_table, whole)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voxels", type=int, default=120_000)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    grid = room(args.voxels).to(args.device)
    own, beside_spconv = [], []
    for channels in args.channels:
        feat = torch.randn(len(grid), channels, device=args.device)
        weight = torch.randn(channels, 3, 3, 3, channels, device=args.device) / channels**0.5 / 5
        spconv = theirs(grid, feat, weight)
        with torch.no_grad():
            run = {**ours(grid, feat, weight), **spconv}
            seconds = interleaved(run, args.rounds, args.device)
        what = f"{len(grid):,} x {channels}"
        own.append([what, *own_row(seconds), GOAL])
        if spconv:
            beside_spconv.append([what, *spconv_row(seconds)])
    first = "voxels x channels"
    header = [first, "table ms", "forward ms", "forward + backward ms", "both / forward"]
    tables = {"convolution": Table([*header, "in a stage", "goal"], own)}
    if beside_spconv:
        header = [first, "spconv ms", "spconv with table ms", "ours / spconv", "with tables"]
        tables["spconv"] = Table(header, beside_spconv)
    else:
        print("spconv is not installed: there is no table of it.")
    publish(tables, args.json, args.device)


if __name__ == "__main__":
    main()
