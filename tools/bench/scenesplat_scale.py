"""How the cost of a training step of scenesplat-lora grows with the number of voxels.

    OMP_NUM_THREADS=1 python tools/bench/scenesplat_scale.py --picture docs/scenesplat_scale.png

One room of 10,000 to 300,000 voxels, the released language model with its patches of 1024 voxels, a
sixteenth of its channels and one block per stage, so that 300,000 voxels fit on a processor; LoRA
of rank 8 on qkv and proj of the encoder, default loss, AdamW. The sizes take turns: a round is one
step of each. Seconds are medians over the rounds, on the CPU the process' own time; `peak` and
`kept` are those of step.py. The exponent is the slope of the line of least squares
through the logarithms: 1 is linear, 2 would be attention among all voxels. The picture needs
matplotlib.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import numpy as np
import scenesplat_methods
import torch
from results import Table, publish
from scenesplat_methods import DEPTHS, Case
from scenesplat_rooms import room
from training_step import MB, contenders

COLUMNS = ("seconds", "peak MB", "kept MB")


def measure(cases: list[Case], rounds: int) -> list[tuple[int, float, float, float]]:
    """Voxels, seconds of a step, peak MB and kept MB of each case."""
    compared = [contenders(scenesplat_methods, case, ["lora_core"])["lora_core"] for case in cases]
    for one in compared:
        one.measure_memory()
    for _ in range(rounds):
        for one in compared:
            one.cost.rounds.append(one.step())
    return [
        (
            len(room(case.voxels)),
            statistics.median(one.cost.steps),
            one.cost.peak / MB,
            one.cost.kept / MB,
        )
        for case, one in zip(cases, compared, strict=True)
    ]


def exponent(voxels: np.ndarray, values: np.ndarray) -> float:
    """The power of the number of voxels that the values grow with."""
    return float(np.polyfit(np.log(voxels), np.log(values), 1)[0])


def draw(figures: np.ndarray, powers: list[float], path: Path) -> None:
    """Seconds and peak memory over the number of voxels, beside lines of slope 1."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(7, 3), layout="constrained")
    voxels = figures[:, 0]
    for axis, column, title in zip(axes, (1, 2), ("seconds per step", "peak MB"), strict=True):
        values = figures[:, column]
        axis.loglog(voxels, values, "o-", label=f"measured, exponent {powers[column - 1]:.2f}")
        axis.loglog(voxels, values[0] * voxels / voxels[0], ":", color="gray", label="linear")
        axis.set(xlabel="voxels", title=title)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=100)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [10_000, 30_000, 100_000, 300_000]
    parser.add_argument("--voxels", type=int, nargs="+", default=sizes)
    parser.add_argument("--depth", choices=DEPTHS, default="short")
    parser.add_argument("--width", type=int, default=16, help="what channels are divided by")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="where to write a plot (PNG)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="a rank above")  # 2 channels at this width
    cases = [
        Case(voxels, args.depth, args.width, device=args.device) for voxels in sorted(args.voxels)
    ]
    figures = np.array(measure(cases, args.rounds))
    powers = [exponent(figures[:, 0], figures[:, column]) for column in (1, 2, 3)]
    rows = [[f"{int(voxels):,}", *rest] for voxels, *rest in figures.tolist()]
    table = Table(("voxels", *COLUMNS), [*rows, ["exponent", *powers]])
    publish({"growth": table}, args.json, args.device)
    if args.picture is not None:
        draw(figures, powers, args.picture)


if __name__ == "__main__":
    main()
