"""What one training step of sam2-lora costs: seconds, peak memory, bytes kept for the backward.

    OMP_NUM_THREADS=1 python tools/bench/sam2_step.py --variant tiny --image_size 512
    OMP_NUM_THREADS=1 python tools/bench/sam2_step.py --variant tiny --targets decoder

The network has a published architecture and random weights; pictures and targets are random too,
each object has one click, the loss is the official one and AdamW makes the update. Three methods:

    floor      nothing is trained: the frozen network, where the gradient graph begins at the
               outputs of the same target Linears (the earliest ones; behind them it exists anyway).
               It keeps what any method needs that sends gradients to these layers.
    lora_core  the adapters of `sam2-lora train`
    PEFT       `peft.get_peft_model` on the same network with the same targets, rank and dropout

`kept` counts the storages saved for the backward pass at the end of the forward pass, each once,
parameters and buffers of the network excluded. Each configuration runs in a process of its own;
`peak` is how far its peak memory lies above the one after building the adapted network, over all
steps, AdamW's state included. On the CPU that holds what glibc keeps of freed arrays, up to half of
it; MALLOC_MMAP_THRESHOLD_=1000000 makes it give them back, and the steps slower. Seconds are
medians over the steps after the first: on the CPU the process' own time, see `measure.timed`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from measure import markdown, timed

from sam2_lora.config import Config

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("floor", "lora_core", "PEFT")
MB = 1e6


@dataclass(frozen=True)
class Cost:
    """Of one training step: seconds, bytes, and the number of trained parameters."""

    trained: int
    forward: float
    backward: float
    update: float
    peak: int
    kept: int


def peak_memory(device: str) -> int:
    """Highest memory of this process so far, in bytes; on CUDA that of its tensors."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux


def measure(method: str, cfg: Config, args: argparse.Namespace) -> Cost:
    """Run `args.steps` training steps and one before them that warms up and counts bytes."""
    import torch
    from sam2_methods import build, random_batch

    from lora_core.memory import saved_bytes
    from sam2_lora import losses

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    network = build(method, args.variant, cfg, args.device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained or [torch.zeros(1, requires_grad=True)])
    batch = random_batch(cfg, args.objects, args.device)
    built = peak_memory(args.device)

    def forward() -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            return losses.loss(network, batch, cfg)[0]

    tensors = list(network.state_dict().values())
    kept, loss = saved_bytes(forward, tensors)
    loss.backward()
    optimizer.step()
    del loss
    times = []
    for _ in range(args.steps):
        optimizer.zero_grad()
        first, loss = timed(forward, args.device)
        second, _ = timed(loss.backward, args.device)
        third, _ = timed(optimizer.step, args.device)
        times.append((first, second, third))
        del loss
    seconds = (statistics.median(part) for part in zip(*times, strict=True))
    return Cost(sum(p.numel() for p in trained), *seconds, peak_memory(args.device) - built, kept)


def table(costs: dict[str, Cost]) -> str:
    """Figures of each method, and ours against PEFT's above the floor."""
    header = ("method", "trained", "forward s", "backward s", "update s", "peak MB", "kept MB")
    rows = [
        [name, f"{c.trained:,}", c.forward, c.backward, c.update, c.peak / MB, c.kept / MB]
        for name, c in costs.items()
    ]
    floor, ours, theirs = (costs[name] for name in METHODS)
    above, limit = ours.kept - floor.kept, theirs.kept - floor.kept
    text = f"kept above the floor: lora_core {above / MB:.1f} MB, PEFT {limit / MB:.1f} MB"
    return f"{markdown(header, rows)}\n\n{text}, ratio {above / limit:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variant", choices=["tiny", "small", "base_plus", "large"], default="tiny"
    )
    parser.add_argument("--image_size", default="512", help="side, or HEIGHTxWIDTH")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--objects", type=int, default=1, help="per picture")
    parser.add_argument("--targets", default="default", help="as for sam2-lora train")
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--lora_dropout", type=float, default=0.05)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    shared = ("image_size", "batch_size", "targets", "lora_rank", "lora_dropout")
    shared += ("gradient_checkpointing",)
    cfg = Config(**{name: getattr(args, name) for name in shared})
    fresh = multiprocessing.get_context("spawn")
    costs = {}
    for method in METHODS:
        with ProcessPoolExecutor(1, mp_context=fresh) as process:
            costs[method] = process.submit(measure, method, cfg, args).result()
    print(table(costs))


if __name__ == "__main__":
    main()
