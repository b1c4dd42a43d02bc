"""What one adapted Linear costs, forward and backward, against the frozen layer (the floor).

    OMP_NUM_THREADS=1 python tools/bench/linear.py
    OMP_NUM_THREADS=1 python tools/bench/linear.py --shapes 4096x576-1728,8 --rounds 15
    OMP_NUM_THREADS=1 python tools/bench/linear.py --dtype bf16
    python tools/bench/linear.py --threads 2

The floor computes y = x W^T + b and dx = g W and keeps nothing. The variants take turns in one
process; a figure is the median over the rounds of (variant's time / floor's time in that round).
The goals are for one thread and memory that is reused, p = 0 and p = 0.05.

`kept` counts what is saved for the backward pass in units of bytes(x); parameters do not count.
`shared` has three Linears that read one x, as separate query, key and value projections do.

In bf16, W and x are bf16 and the adapters fp32. Without `--dtype` that is measured only where the
processor has instructions for it: elsewhere a product in the backward pass may take 100 times as
long as in fp32, whoever asks for it. Large arrays come from fresh pages each time, as users see it;
set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=8000000000 to leave glibc's page faults out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import peft
import torch
from measure import cell, interleaved, ratio
from results import Table, fast_in_bf16, publish
from torch import Tensor, nn

import lora_core
from lora_core.memory import saved_bytes

# Rows x in - out, rank -> what has such a layer, and the most that lora_core should cost with p = 0
# and p = 0.05, in units of the floor.
SHAPES = {
    "65536x144-432,8": ("Hiera large 1, qkv", 1.40, 1.75),
    "65536x144-576,16": ("Hiera large 1, MLP", 1.50, 1.85),
    "16384x288-864,8": ("Hiera large 2, qkv", 1.25, 1.45),
    "4096x576-1728,8": ("Hiera large 3, qkv", 1.17, 1.27),
    "4096x576-576,16": ("Hiera large 3, proj", 1.28, 1.56),
    "1024x1152-3456,8": ("Hiera large 4, qkv", 1.12, 1.15),
    "5184x1024-3072,8": ("SAM 3, qkv", 1.08, 1.15),
    "5184x1024-4736,16": ("SAM 3, fc1", 1.11, 1.16),
    "5184x4736-1024,16": ("SAM 3, fc2", 1.14, 1.24),
    "2048x2048-2048,16": ("TripoSG", 1.05, 1.10),
    "2048x2048-2048,64": ("TripoSG", 1.18, 1.27),
    "100000x32-96,8": ("PT-v3 1, qkv", 1.75, 2.50),
    "20000x256-768,8": ("PT-v3 4, qkv", 1.30, 1.60),
    "10000x512-1536,8": ("PT-v3 5, qkv", 1.20, 1.33),
    "10000x512-512,16": ("PT-v3 5, proj", 1.26, 1.62),
    "1024x2048-6144,16": ("Qwen3 1.7B, MLP", 1.06, 1.08),
    "1024x2048-6144,128": ("Qwen3 1.7B, MLP", 1.22, 1.23),
}
BF16_SHAPES = {
    "16384x288-864,8": ("Hiera large 2, qkv", 1.80, 3.80),
    "4096x576-1728,8": ("Hiera large 3, qkv", 1.55, 2.40),
    "5184x1024-3072,8": ("SAM 3, qkv", 1.25, 1.80),
    "2048x2048-2048,16": ("TripoSG", 1.28, 2.00),
    "1024x2048-6144,16": ("Qwen3 1.7B, MLP", 1.25, 1.48),
}
SHARED_SHAPES = ("4096x576-576,8", "5184x1024-1024,8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATES = (0.0, 0.05)  # of the adapters' dropout
KEPT_GOAL = 1.05  # x, of three Linears on it
METHODS = ("full", *(f"{name} p={p:g}" for p in RATES for name in ("PEFT", "lora_core")))


class Variant:
    """One way of training a layer: a forward and a backward pass on a given input.

    Args:
        x: input, any shape; gradients flow to it if it has such a dtype.
        g: gradient of the output.
    """

    def __init__(self, layer: nn.Module, x: Tensor, g: Tensor) -> None:
        self.layer = layer.train()
        self.x = x.detach().clone()
        if x.is_floating_point():
            self.x.requires_grad_()
        self.g = g

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        """Forward and backward; gradients are new ones, as after `zero_grad`."""
        self.x.grad = None
        self.layer.zero_grad()
        y = self.forward()
        if y.requires_grad:
            y.backward(self.g)

    def kept(self) -> float:
        """Saved for the backward pass, in units of bytes(x)."""
        saved, _ = saved_bytes(self.forward, self.layer.parameters())
        return saved / (self.x.numel() * self.x.element_size())


class Shared(nn.Module):
    """Three Linears that read one x; their outputs are added, which keeps nothing."""

    def __init__(self, make: Callable[[], nn.Linear]) -> None:
        super().__init__()
        self.q, self.k, self.v = (make() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def with_lora_core(model: nn.Module, names: list[str], r: int, p: float, **more: bool) -> nn.Module:
    """The model with our adapters on the named layers, as in training."""
    config = lora_core.LoraConfig(names, r=r, lora_alpha=2 * r, lora_dropout=p, **more)
    lora_core.inject(model, config)
    return with_values(model)


def with_peft(model: nn.Module, names: list[str], r: int, p: float, **more: bool) -> nn.Module:
    """The model with PEFT's adapters on the named layers, as in training."""
    config = peft.LoraConfig(target_modules=names, r=r, lora_alpha=2 * r, lora_dropout=p, **more)
    return with_values(peft.get_peft_model(model, config))


def with_values(model: nn.Module) -> nn.Module:
    """The model with values in all B; while these are zero, DoRA takes another way."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            nn.init.normal_(parameter, std=1e-2)
    return model


def sizes(shape: str) -> tuple[int, int, int, int]:
    """Rows, input and output features, rank."""
    rows, di, do, r = map(int, re.split("[x,-]", shape))
    return rows, di, do, r


def variants(shape: str, args: argparse.Namespace, dtype: str, shared: bool) -> dict[str, Variant]:
    """All ways of training one shape, the floor first; each with a layer of its own."""
    rows, di, do, r = sizes(shape)
    options = {"dtype": DTYPES[dtype], "device": args.device}
    x, g = torch.randn(rows, di, **options), torch.randn(rows, do, **options)
    linear = partial(nn.Linear, di, do, **options)
    names = ["q", "k", "v"] if shared else ["0"]

    def base() -> nn.Module:
        return Shared(linear) if shared else nn.Sequential(linear())

    layers = {"floor": base().requires_grad_(False), "full": base()}
    for p in RATES:
        layers[f"PEFT p={p:g}"] = with_peft(base(), names, r, p)
        layers[f"lora_core p={p:g}"] = with_lora_core(base(), names, r, p)
    return {name: Variant(layer, x, g) for name, layer in layers.items()}


def costs(
    found: Mapping[str, Variant], rounds: int, device: str
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Milliseconds of the floor; of the others the ratio to it, and what they keep."""
    kept = {name: variant.kept() for name, variant in found.items()}
    steps = {name: variant.step for name, variant in found.items()}
    seconds = interleaved(steps, rounds, device)
    floor = seconds["floor"]
    ratios = {name: ratio(each, floor) for name, each in seconds.items()}
    return 1000 * statistics.median(floor), ratios, kept


def linear_tables(args: argparse.Namespace, dtype: str) -> dict[str, Table]:
    """Times and kept bytes of all shapes in one dtype."""
    known = SHAPES if dtype == "fp32" else BF16_SHAPES
    times, bytes_kept = [], []
    for shape in args.shapes or known:
        what, *goals = known.get(shape, ("", "-", "-"))
        floor, ratios, kept = costs(variants(shape, args, dtype, False), args.rounds, args.device)
        values = [ratios[name] for name in METHODS]
        times.append([shape, what, floor, *values[:3], goals[0], *values[3:], goals[1]])
        bytes_kept.append([shape, *(kept[name] for name in METHODS)])
        print(*map(cell, times[-1]), flush=True)
    header = ["shape, rank", "of", "floor ms", *METHODS[:3], "goal", *METHODS[3:], "goal p=0.05"]
    return {
        dtype: Table(header, times),
        f"{dtype} kept": Table(["shape, rank", *METHODS], bytes_kept),
    }


def shared_table(args: argparse.Namespace) -> Table:
    """Kept bytes and times of three Linears on one x."""
    rows = []
    for shape in SHARED_SHAPES:
        _, ratios, kept = costs(variants(shape, args, "fp32", True), args.rounds, args.device)
        for name in METHODS:
            goal = KEPT_GOAL if name == "lora_core p=0.05" else "-"
            rows.append([shape, name, ratios[name], kept[name], goal])
    return Table(["shape, rank", "method", "time / floor", "kept, x", "goal"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxIN-OUT,RANK", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="also where it is slow")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft")
    dtypes = [args.dtype] if args.dtype else list(DTYPES)
    if not args.dtype and not fast_in_bf16(args.device):
        dtypes.remove("bf16")
        print("bf16 is left out: this processor has no instructions for it (--dtype bf16 asks)")
    tables: dict[str, Table] = {}
    for dtype in dtypes:
        tables |= linear_tables(args, dtype)
    if "fp32" in dtypes and not args.shapes:
        tables["shared"] = shared_table(args)
    publish(tables, args.json, args.device)


if __name__ == "__main__":
    main()
