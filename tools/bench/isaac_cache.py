"""What `--cache_vision` saves in a training step of isaac-lora.

    python tools/bench/isaac_cache.py --flops
    OMP_NUM_THREADS=1 python tools/bench/isaac_cache.py

With `--flops` the operations of a step (forward, backward; adapters of rank 128) and of the vision
tower are counted at the released size, from the modules themselves, on tensors without values:
products of matrices and attention, two for a multiplication with its addition. One conversation
about one square picture, whose tokens are a quarter of its patches, with 128 tokens of text.

Without it everything runs, in fp32: all widths are Isaac-0.1's, with 3 of 27 layers of the tower, 3
of 28 of the decoder, and 4096 words; one picture. A step without cache cuts the picture into
patches and runs the tower, one with cache reads the features from the disk; the adapters have no
dropout, so that both compute the same loss: the program compares them bit for bit. Steps take
turns; seconds are medians of the process' own CPU time, the speed-up the median of the rounds'.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isaac_methods import (
    PATCH,
    RELEASED,
    SHUFFLE,
    Case,
    adapted,
    build,
    loss_of,
    random_batch,
    random_weights,
    skeleton,
)
from measure import timed
from midi3d_cache import operations
from results import Table, publish
from torch import Tensor

from isaac_lora.pictures.content import KnownPicture, content_digest
from isaac_lora.pictures.target_size import PictureRules
from isaac_lora.vision_cache import VisionFeatures
from lora_core.cache import FeatureCache
from lora_core.memory import simulate

TEXT = 128  # tokens
DISK = 10**9  # bytes of the cache


def case_of(side: int, **sizes: int) -> Case:
    """One conversation about a picture of side x side patches; its features are given."""
    tokens = side**2 // SHUFFLE**2 + TEXT
    return Case(tokens=tokens, side=side, cached=True, dropout=0.0, **sizes)


# -- operations ------------------------------------------------------------------------------------


def counted(sides: list[int], sizes: dict[str, int]) -> dict[str, Table]:
    """A table, 10^12 operations."""
    rows = []
    for side in sides:
        case = case_of(side, **sizes)
        step, tower = step_and_tower(case)
        pixels = f"{side * PATCH} x {side * PATCH}"
        rows.append([pixels, side**2, case.tokens, step, tower, (step + tower) / step])
    header = ["pixels", "patches", "tokens", "step", "tower", "without / with cache"]
    return {"operations": Table(header, rows)}


def step_and_tower(case: Case) -> list[float]:
    """10^12 operations of a step with the features at hand, and of the tower that makes them."""
    found = []

    def count(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        found.append(operations(lambda: loss_of(model, batch, case).backward()))
        patches = torch.zeros(case.side**2, 3 * PATCH**2)
        found.append(operations(lambda: model.model.get_vision_features(patches, batch["grids"])))
        return torch.zeros((), requires_grad=True), {}

    simulate(adapted("lora_core", skeleton(case), case), count, random_batch(case))
    return found


# -- seconds ---------------------------------------------------------------------------------------


class Comparison:
    """Training steps on one picture whose features come from the tower, or from a cache."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case, self.batch = case, random_batch(case)
        del self.batch["vision_features"]
        self.model = build("lora_core", case, random_weights(case))
        side = case.side * PATCH
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        grid = (case.side // SHUFFLE, case.side // SHUFFLE)
        self.picture = KnownPicture("a picture", content_digest(pixels), grid, lambda: pixels)
        tower, rules = self.model.get_submodule("model.vision_embedding.0"), PictureRules()
        self.ways = {
            "without cache": VisionFeatures(tower, rules),
            "with cache": VisionFeatures(tower, rules, FeatureCache(folder, DISK)),
        }

    def step(self, way: str) -> float:
        """Forward and backward pass of a batch; gives the loss."""
        features = self.ways[way]
        found = features.joined([features.part(self.picture)])
        loss = loss_of(self.model, self.batch | {"vision_features": found}, self.case)
        loss.backward()
        self.model.zero_grad()
        return loss.item()


def measured(case: Case, rounds: int) -> dict[str, Table]:
    """A table of the scaled sizes.

    Raises:
        SystemExit: the losses differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        compared = Comparison(case, folder)
        filling, _ = timed(lambda: compared.ways["with cache"].fill([compared.picture]), "cpu")
        seconds: dict[str, list[float]] = {way: [] for way in compared.ways}
        losses = {compared.step(way) for way in compared.ways}  # warms up as well
        for _ in range(rounds):
            for way in compared.ways:
                taken, loss = timed(lambda way=way: compared.step(way), "cpu")
                seconds[way].append(taken)
                losses.add(loss)
    if len(losses) > 1:
        sys.exit(f"the losses differ: {sorted(losses)}")
    without, cached = seconds.values()
    speed_up = statistics.median(a / b for a, b in zip(without, cached, strict=True))
    header = ["patches", "tokens", "filling s", *seconds, "without / with cache", "loss of all"]
    row = [case.side**2, case.tokens, filling, *map(statistics.median, (without, cached)), speed_up]
    return {"seconds": Table(header, [[*row, f"{losses.pop():.9f}"]])}


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flops", action="store_true", help="count at the released size")
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64], help="with --flops")
    parser.add_argument("--side", type=int, default=24, help="patches of a picture's side")
    parser.add_argument("--layers", type=int, default=3, help="without --flops")
    parser.add_argument("--tower_layers", type=int, default=3, help="without --flops")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.flops:
        publish(counted(args.sides, RELEASED), args.json)
    else:
        case = case_of(args.side, layers=args.layers, tower_layers=args.tower_layers)
        publish(measured(case, args.rounds), args.json)


if __name__ == "__main__":
    main()
