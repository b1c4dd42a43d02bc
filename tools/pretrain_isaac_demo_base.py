"""Pretrain the tiny base that isaac-lora carries, from random weights on generated scenes.

    python tools/pretrain_isaac_demo_base.py --output runs/isaac_demo_base

Four stages: Isaac's vision tower on what is where; all of Isaac on questions about pictures in
which near boxes are large, never with depth; the same with smaller image tokens; Depth Anything V2
on pictures in which near boxes have wide ribs. A run is a function of its seed.
One that was stopped goes on where its last checkpoint was when the same command is given again.
The end are two folders, `model` and `depth`, and their figures on scenes that no training has used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from isaac_base import figures
from isaac_base.answers import Answers, Smaller
from isaac_base.distances import Distances
from isaac_base.looks import Looks, new_head
from isaac_base.networks import new_depth, new_isaac, write_half, write_tokenizer
from isaac_base.pool import Pool
from isaac_base.rows import Rows
from isaac_base.stages import Stages

from isaac_lora.conversations.tokenizer_files import load_tokenizer
from isaac_lora.processing import IsaacProcessor

SEED = 71260  # of initial weights, and of everything that training shows


def prepared(output: Path, steps: tuple[int, int, int, int], pictures: int) -> Stages:
    """The tokenizer in its folder, new networks, or those of the run in `output`."""
    folder = output / "model"
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    isaac, depth = new_isaac(SEED, tokenizer), new_depth(SEED)
    head = new_head(isaac.model.vision_embedding[1].in_features, SEED)
    isaac.config.save_pretrained(folder)
    processor = IsaacProcessor.from_pretrained(folder)
    pool = Pool(output / "pictures.safetensors", SEED + 1, pictures, processor.rules)
    stages = (
        Looks(isaac, head, pool, SEED + 2),
        Answers(isaac, Rows(processor), pool, SEED + 3),
        Smaller(isaac, Rows(processor), pool, SEED + 5),
        Distances(depth, SEED + 4),
    )
    networks = {"isaac": isaac, "head": head, "depth": depth}
    return Stages(output / "checkpoint.pt", networks, list(zip(stages, steps, strict=True)), SEED)


def write(run: Stages, output: Path) -> int:
    """Write both networks in half precision; returns the bytes of their folders."""
    for name, folder in (("isaac", "model"), ("depth", "depth")):
        write_half(run.networks[name], output / folder)
    return sum(path.stat().st_size for path in output.glob("*/*"))


def main() -> None:
    """Train what is left, then write the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoints and result")
    parser.add_argument(
        "--steps", type=int, nargs=4, default=(2500, 4540, 900, 1500), help="of the stages"
    )
    parser.add_argument("--pictures", type=int, default=6000, help="of 1, 2, 3 boxes each")
    parser.add_argument("--measured", type=int, default=200, help="scenes of each style at the end")
    parser.add_argument("--log_every", type=int, default=250, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    run = prepared(args.output, tuple(args.steps), args.pictures)
    run.train(args.log_every)
    size = write(run, args.output)
    print(f"{args.output}: {size} bytes, {run.spent:.0f} CPU seconds of training", flush=True)
    print(figures.answers(args.output / "model", args.measured), flush=True)
    print(figures.depths(args.output / "depth", args.measured), flush=True)


if __name__ == "__main__":
    main()
