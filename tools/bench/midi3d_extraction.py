"""What it takes to make the mesh of one instance: dense, and coarse to fine.

    OMP_NUM_THREADS=1 python tools/bench/midi3d_extraction.py

The field is that of a chair-like solid, on 257^3 points. Its values cost nothing; but every so many
calls the released decoder (random weights, 2048 tokens) runs on the same points, so that its memory
is part of the peak, and its time for all points is reckoned from those calls. `peak` is what the
process' resident memory rises above that before the extraction, decoder weights excluded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from results import Table, publish
from torch import Tensor

from midi3d_lora.meshes.extraction import ExtractionSettings, extract_mesh
from midi3d_lora.vae.autoencoder import TripoSGVAEModel
from midi3d_lora.vae.decoder import DecodedField

MB = 1e6
BOXES = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.5, 0.05, 0.5],  # centre and half sides: the seat
        [0.0, 0.5, -0.45, 0.5, 0.5, 0.05],
        *([x, -0.45, z, 0.05, 0.4, 0.05] for x in (-0.45, 0.45) for z in (-0.45, 0.45)),
    ]
)


def chair(points: Tensor) -> Tensor:
    """Distance to the nearest box, negative inside: [Q, 3] -> [Q]."""
    nearest = torch.full((len(points),), torch.inf)
    for box in BOXES:
        outside = (points - box[:3]).abs() - box[3:]
        beyond = outside.clamp(min=0).norm(dim=1)
        nearest = torch.minimum(nearest, beyond + outside.amax(dim=1).clamp(max=0))
    return nearest


@dataclass
class Counted:
    """The field, with the decoder beside it.

    Attributes:
        every: how many calls there are for each of the decoder's.
        points: asked so far. rates: the decoder's seconds for a point.
        spent: seconds of the decoder.
    """

    decoder: DecodedField
    every: int
    calls: int = 0
    points: int = 0
    spent: float = 0.0
    rates: list[float] = field(default_factory=list)

    def __call__(self, points: Tensor) -> Tensor:
        if self.calls % self.every == 0:
            start = time.process_time()
            self.decoder(points)
            seconds = time.process_time() - start
            self.spent += seconds
            self.rates.append(seconds / len(points))
        self.calls += 1
        self.points += len(points)
        return chair(points)


def resident(name: str) -> int:
    """Bytes of resident memory: "VmRSS" now, "VmHWM" the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not say {name}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured(name: str, settings: ExtractionSettings, every: int) -> list[object]:
    """A row of the table."""
    vae = TripoSGVAEModel(width_encoder=8, num_layers_decoder=1).requires_grad_(False)
    one = Counted(DecodedField(vae.decoder, torch.randn(1, 2048, 1024)), every)
    forget_peak()
    before, start = resident("VmRSS"), time.process_time()
    mesh = extract_mesh(one, settings)
    seconds, peak = time.process_time() - start - one.spent, resident("VmHWM") - before
    assert mesh is not None
    decoding = statistics.median(one.rates) * one.points
    return [
        name, f"{one.points:,}", seconds, decoding, peak / MB, f"{len(mesh.faces):,}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=8, help="2^depth + 1 points a side")
    parser.add_argument("--every", type=int, default=60, help="calls for each of the decoder's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    depth = args.depth
    ways = {
        "dense": ExtractionSettings(depth=depth, coarse_depth=depth, fit_box=False),
        "coarse to fine": ExtractionSettings(depth=depth, fit_box=False),
        "coarse to fine, in the instance's box": ExtractionSettings(depth=depth),
    }
    rows = [
        measured(name, settings, args.every * (10 if name == "dense" else 1))
        for name, settings in ways.items()
    ]
    header = ["way", "points", "seconds", "decoder, s", "peak MB", "faces"]
    publish({"meshes": Table(header, rows)}, args.json)


if __name__ == "__main__":
    main()
