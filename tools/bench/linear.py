"""What one adapted Linear costs, forward and backward, against the frozen layer (the floor).

    OMP_NUM_THREADS=1 python tools/bench/linear.py
    OMP_NUM_THREADS=1 python tools/bench/linear.py --dtype bf16 --shapes 4096x576-1728,8

The floor computes y = x W^T + b and dx = g W and keeps nothing. The variants take turns in one
process; a figure is the median over the rounds of (variant's time / floor's time in that round).
`kept` counts what is saved for the backward pass in units of bytes(x); parameters do not count.
With `--dtype bf16` W and x are bf16 and the adapters fp32. Large arrays come from fresh pages each
time, as users see it; set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=8000000000 to leave glibc's
page faults out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import warnings

import peft
import torch
from measure import markdown, timed
from torch import Tensor, nn

import lora_core
from lora_core.memory import saved_bytes

SHAPES = (  # rows x in - out, rank
    "65536x144-432,8",  # Hiera large stage 1, qkv
    "16384x288-864,8",  # stage 2
    "4096x576-1728,8",  # stage 3
    "1024x1152-3456,8",  # stage 4
    "2048x2048-2048,16",  # a diffusion transformer
    "100000x32-96,8",  # the first stage of a point transformer
    "5184x1024-3072,8",  # a ViT-L
    "4096x576-576,16",  # Hiera large stage 3, proj
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Variant:
    """One way of training a Linear: a forward and a backward pass on given rows."""

    def __init__(self, layer: nn.Module, x: Tensor, g: Tensor) -> None:
        self.layer = layer.train()
        self.x = x.detach().clone().requires_grad_()
        self.g = g

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        """Forward and backward; gradients are new ones, as after `zero_grad`."""
        self.x.grad = None
        self.layer.zero_grad()
        self.forward().backward(self.g)

    def kept(self) -> float:
        """Saved for the backward pass, in units of bytes(x)."""
        saved, _ = saved_bytes(self.forward, self.layer.parameters())
        return saved / (self.x.numel() * self.x.element_size())


def variants(shape: str, args: argparse.Namespace) -> dict[str, Variant]:
    """All ways of training one shape, the floor first; each with a layer of its own."""
    rows, di, do, r = map(int, re.split("[x,-]", shape))
    options = {"dtype": DTYPES[args.dtype], "device": args.device}
    x, g = torch.randn(rows, di, **options), torch.randn(rows, do, **options)

    def base() -> nn.Sequential:
        return nn.Sequential(nn.Linear(di, do, **options))

    def ours(p: float) -> nn.Module:
        model = base()
        lora_core.inject(model, lora_core.LoraConfig(["0"], r=r, lora_alpha=2 * r, lora_dropout=p))
        return model

    def theirs(p: float) -> nn.Module:
        config = peft.LoraConfig(target_modules=["0"], r=r, lora_alpha=2 * r, lora_dropout=p)
        return peft.get_peft_model(base(), config)

    layers = {"floor": base().requires_grad_(False), "full": base()}
    for p in (0.0, args.dropout):
        layers |= {f"PEFT p={p:g}": theirs(p), f"lora_core p={p:g}": ours(p)}
    return {name: Variant(layer, x, g) for name, layer in layers.items()}


def measure(shape: str, args: argparse.Namespace) -> list[object]:
    """One row of the table."""
    found = variants(shape, args)
    kept = {name: variant.kept() for name, variant in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(args.rounds + 1):
        for name, variant in found.items():
            seconds, _ = timed(variant.step, args.device)
            if turn:  # the first one warms up
                times[name].append(seconds)
    ratio = {
        name: statistics.median(a / b for a, b in zip(each, times["floor"], strict=True))
        for name, each in times.items()
    }
    names = list(found)[1:]
    floor = 1000 * statistics.median(times["floor"])
    return [shape, floor, *(ratio[n] for n in names), *(kept[n] for n in names)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxIN-OUT,RANK")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--dropout", type=float, default=0.05, help="compared with dropout 0")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft")
    rows = [measure(shape, args) for shape in args.shapes]
    names = ["full", *(f"{n} p={p:g}" for p in (0.0, args.dropout) for n in ("PEFT", "lora_core"))]
    print(markdown(["shape, rank", "floor ms", *names, *(f"kept {n}" for n in names)], rows))


if __name__ == "__main__":
    main()
