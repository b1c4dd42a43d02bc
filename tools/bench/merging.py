"""How fast adapters become part of the weights, and a merged model a file, beside PEFT.

    OMP_NUM_THREADS=1 python tools/bench/merging.py
    OMP_NUM_THREADS=1 python tools/bench/merging.py --layers 8 --dtypes bf16

A model of square Linears, all adapted (rank 16), fp32 adapters. MB/s are bytes of the model's
weights over seconds; the ways take turns, medians over the rounds.

    merge         `lora_core.merge`: before the first weight changes, all sums are computed and
                  checked, and what rounding did to each; the old weights are copied for `unmerge`
    PEFT          `merge_adapter()`, which is how `merge_and_unload()` begins
    PEFT, safe    with `safe_merge=True`: it checks each layer for NaN before it changes it

A file: `lora_core.merged_state_dict` and `lora_core.merged_file.write_tensors`, in bounded memory
and whole or not at all (flushed to the disk); with PEFT `merge_adapter()` and safetensors'
`save_file`, not flushed. Those are seconds of the clock, since a disk takes part.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from linear import DTYPES, with_lora_core, with_peft
from measure import timed
from results import Table, publish
from safetensors.torch import save_file
from torch import nn

import lora_core
from lora_core.merged_file import write_tensors

MB = 1e6
RANK = 16


def network(layers: int, width: int, dtype: torch.dtype) -> nn.Module:
    """Linears without bias, in which every value is drawn."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)))


def clock(run: Callable[[], Any]) -> float:
    """Seconds that pass."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Ways:
    """All ways of merging one model, each of which gives seconds and leaves the model as it was."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        names = [str(number) for number in range(args.layers)]
        build = partial(network, args.layers, args.width, dtype)
        self.ours = with_lora_core(build(), names, RANK, 0.0)
        self.theirs: Any = with_peft(build(), names, RANK, 0.0)
        self.bytes = args.layers * args.width**2 * dtype.itemsize

    def merge(self) -> float:
        seconds, _ = timed(lambda: lora_core.merge(self.ours), "cpu")
        lora_core.unmerge(self.ours)
        return seconds

    def peft_merge(self, safe: bool) -> float:
        seconds, _ = timed(lambda: self.theirs.merge_adapter(safe_merge=safe), "cpu")
        self.theirs.unmerge_adapter()
        return seconds

    def write(self, folder: str) -> float:
        file = Path(folder) / "ours.safetensors"
        return clock(lambda: write_tensors(file, lora_core.merged_state_dict(self.ours)))

    def peft_write(self, folder: str) -> float:
        def run() -> None:
            self.theirs.merge_adapter()
            state = self.theirs.get_base_model().state_dict()
            weights = {name: value for name, value in state.items() if "lora_" not in name}
            save_file(weights, Path(folder) / "peft.safetensors")

        seconds = clock(run)
        self.theirs.unmerge_adapter()
        return seconds


def rows(args: argparse.Namespace, dtype: str) -> list[list[object]]:
    """Seconds and MB/s of all ways."""
    ways = Ways(args, DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "merge": ways.merge,
            "PEFT": partial(ways.peft_merge, False),
            "PEFT, safe": partial(ways.peft_merge, True),
            "merge to a file": partial(ways.write, folder),
            "PEFT to a file": partial(ways.peft_write, folder),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.rounds + 1):
            for name, run in runs.items():
                taken = run()
                if turn:  # the first one warms up
                    seconds[name].append(taken)
    size = ways.bytes / MB
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return [[dtype, size, name, taken, size / taken] for name, taken in medians.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft")
    warnings.filterwarnings("ignore", message=".*merge into an fp32 base")  # random adapters
    found = [row for dtype in args.dtypes for row in rows(args, dtype)]
    publish({"merging": Table(["weights", "MB", "way", "s", "MB/s"], found)}, args.json)


if __name__ == "__main__":
    main()
