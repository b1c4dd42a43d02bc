"""What other adapted layers cost than a plain Linear: DoRA, LoRA-FA, convolution, embedding.

    OMP_NUM_THREADS=1 python tools/bench/layers.py
    OMP_NUM_THREADS=1 python tools/bench/layers.py --tables dora --rounds 15

Times and kept bytes are those of `linear.py`, fp32. LoRA-FA trains B alone; PEFT has it as LoRA
whose A an optimizer of its own freezes, which is done here. A convolution has rank 8 as its Linear;
its x are pictures. An embedding has no gradient to x and its floor no backward pass, so that its
times are milliseconds, and what it keeps is in units of its output.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from linear import RATES, Variant, costs, sizes, with_lora_core, with_peft
from measure import cell, interleaved
from results import Table, publish
from torch import Tensor, nn

DORA_GOAL = 1.4  # of the floor, without dropout
DORA_SHAPES = (
    "2048x1024-1024,8",
    "4096x576-1728,8",
    "16384x288-864,8",
    "5184x1024-3072,8",
    "2048x2048-2048,16",
)
FA_SHAPES = ("16384x288-864,8", "4096x576-1728,8", "2048x2048-2048,16")
# channels in, channels out, kernel, side of the picture
CONVOLUTIONS = ((256, 256, 3, 64), (32, 256, 1, 128), (3, 144, 7, 256))
EMBEDDINGS = ((50_000, 1024, 1024),)  # words, width, tokens
RANK = 8


def contenders(
    base: Callable[[], nn.Module], x: Tensor, g: Tensor, r: int, **more: bool
) -> dict[str, Variant]:
    """The floor, full fine-tuning, PEFT and lora_core with both rates of dropout."""
    layers = {"floor": base().requires_grad_(False), "full": base()}
    for p in RATES:
        layers[f"PEFT p={p:g}"] = with_peft(base(), ["0"], r, p, **more)
        layers[f"lora_core p={p:g}"] = with_lora_core(base(), ["0"], r, p, **more)
    return {name: Variant(layer, x, g) for name, layer in layers.items()}


def of_linear(shape: str, device: str, **more: bool) -> dict[str, Variant]:
    """Contenders for one Linear."""
    rows, di, do, r = sizes(shape)
    x, g = torch.randn(rows, di, device=device), torch.randn(rows, do, device=device)
    return contenders(lambda: nn.Sequential(nn.Linear(di, do, device=device)), x, g, r, **more)


def row(what: str, found: Mapping[str, Variant], args: argparse.Namespace, goal: object) -> list:
    """A row of `HEADER`."""
    floor, ratios, kept = costs(found, args.rounds, args.device)
    names = [name for name in ratios if name not in ("floor", "full")]
    full = ratios.get("full", "-")
    values = [what, floor, full, *(ratios[n] for n in names[:2]), goal]
    values += [*(ratios[n] for n in names[2:]), *(kept[n] for n in names)]
    print(*map(cell, values), flush=True)
    return values


def header(what: str) -> list[str]:
    """The columns of `row`."""
    names = [f"{name} p={p:g}" for p in RATES for name in ("PEFT", "lora_core")]
    kept = [f"kept: {name}" for name in names]
    return [what, "floor ms", "full", *names[:2], "goal", *names[2:], *kept]


def dora(args: argparse.Namespace) -> Table:
    """DoRA on Linears."""
    rows = [
        row(shape, of_linear(shape, args.device, use_dora=True), args, DORA_GOAL)
        for shape in DORA_SHAPES
    ]
    return Table(header("shape, rank"), rows)


def lora_fa(args: argparse.Namespace) -> Table:
    """LoRA with a frozen A; the goal is for the kept bytes, r / in."""
    rows = []
    for shape in FA_SHAPES:
        found = of_linear(shape, args.device)
        for name, variant in found.items():
            if name != "full":
                freeze_A(variant.layer)
        rows.append(row(shape, found, args, "-"))
    return Table(header("shape, rank"), rows)


def freeze_A(layer: nn.Module) -> None:
    """Train B alone."""
    for name, parameter in layer.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def convolution(args: argparse.Namespace) -> Table:
    """Convolutions of one picture."""
    rows = []
    for channels, out, kernel, side in CONVOLUTIONS:
        x = torch.randn(1, channels, side, side, device=args.device)

        def base(i: int = channels, o: int = out, k: int = kernel) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, device=args.device))

        g = torch.randn(1, out, side, side, device=args.device)
        what = f"{channels}-{out}, {kernel}x{kernel}, {side}x{side}"
        rows.append(row(what, contenders(base, x, g, RANK), args, "-"))
    return Table(header("channels, kernel, picture"), rows)


def embedding(args: argparse.Namespace) -> Table:
    """Milliseconds of a lookup and its gradients."""
    rows = []
    for words, width, tokens in EMBEDDINGS:
        x = torch.randint(words, (1, tokens), device=args.device)
        g = torch.randn(1, tokens, width, device=args.device)
        base = nn.Embedding(words, width, device=args.device).weight.detach()

        def layer(weight: Tensor = base) -> nn.Module:
            return nn.Sequential(nn.Embedding.from_pretrained(weight, freeze=False))

        layers = {
            "floor": layer().requires_grad_(False),
            "full": layer(),
            "PEFT": with_peft(layer(), ["0"], RANK, 0.0),
            "lora_core": with_lora_core(layer(), ["0"], RANK, 0.0),
        }
        found = {name: Variant(one, x, g) for name, one in layers.items()}
        kept = {name: v.kept() * x.nbytes / g.nbytes for name, v in found.items()}
        steps = {name: variant.step for name, variant in found.items()}
        seconds = interleaved(steps, args.rounds, args.device)
        for name, each in seconds.items():
            rows.append(
                [f"{words:,} x {width}, {tokens}", name, 1000 * statistics.median(each), kept[name]]
            )
    return Table(["words x width, tokens", "method", "ms", "kept, of the output"], rows)


TABLES = {"dora": dora, "lora_fa": lora_fa, "convolution": convolution, "embedding": embedding}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft")
    publish({name: TABLES[name](args) for name in args.tables}, args.json, args.device)


if __name__ == "__main__":
    main()
