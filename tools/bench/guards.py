"""What it costs that a training is guarded: updates per second, against transformers' plain loop.

    OMP_NUM_THREADS=1 python tools/bench/guards.py
    OMP_NUM_THREADS=1 python tools/bench/guards.py --image_size 256 --batch_size 2

Both train the packaged tiny base on the demo's photographs with the same loss, batches, optimizer
and clipping. `on` is `LoraTrainer`: every update is checked before it is done, batches are kept and
weighed, signals are listened to, figures are gathered. `off` is transformers' own `Trainer`, which
does none of that. Runs take turns; each gives the median time of an update, from the end of one to
the end of the next, and the figures are medians over the runs. On the CPU it is the process' own
time, which other programs disturb least. The promise is a ratio of at least 0.97.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from results import Table, publish
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lora_core.trainer import LoraTrainer
from lora_core.training.loss import LossModule
from sam2_lora import data, demo, losses, model, placement
from sam2_lora.config import Config
from sam2_lora.train import arguments

PROMISE = 0.97


class Clock(TrainerCallback):
    """Notes when updates end."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, list[float]()

    def on_step_end(self, *arguments: Any, **settings: Any) -> None:
        if self.device == "cpu":
            self.ends.append(time.process_time())
            return
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Of an update, the median without the first fifth, which warms up."""
        times = [after - before for before, after in pairwise(self.ends)]
        return statistics.median(times[len(times) // 5 :])


class Plain(Trainer):
    """transformers' loop as it is; only the loss and the data are ours."""

    def compute_loss(self, module: Any, inputs: Any, *rest: Any, **settings: Any) -> Any:
        return module(inputs)[0]

    def _save_checkpoint(self, *rest: Any) -> None:
        pass


def run(cfg: Config, train_set: data.TrainSet, guarded: bool) -> float:
    """Seconds of an update in one training."""
    network = model.build(cfg)
    placement.adapt(network, cfg)
    device, clock = torch.device(cfg.device), Clock(cfg.device)
    network.to(device)

    def loss(net: Any, batch: Any) -> Any:
        return losses.loss(net, batch, cfg)

    # What is printed would hide the figures, and the terminal's speed is not measured here.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        args = arguments(cfg, folder, device)
        if guarded:
            LoraTrainer(
                network, args, train_set, data.collate, loss, count=losses.object_count,
                guards=cfg, callbacks=[clock],
            ).train()  # fmt: skip
        else:
            plain = Plain(
                LossModule(network, loss), args, data.collate, train_set, callbacks=[clock]
            )
            plain.remove_callback(PrinterCallback)
            plain.train()
    return clock.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image_size", default="128", help="side, or HEIGHTxWIDTH")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="updates of one run")
    parser.add_argument("--runs", type=int, default=5, help="of each kind")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo.write(Path(folder))
        cfg = Config(
            data_root=f"{folder}/photos",
            checkpoint=f"{folder}/sam2_demo.safetensors",
            image_size=options.image_size,
            batch_size=options.batch_size,
            steps=options.steps,
            log_steps=10,
            eval_steps=10**6,
            num_workers=0,
            device=options.device,
            precision="fp32",
        )
        train_set = data.load(cfg).train
        pairs = []
        for _ in range(options.runs):
            pairs.append((run(cfg, train_set, True), run(cfg, train_set, False)))
    on, off = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(without / guarded for guarded, without in pairs)
    what = f"{options.image_size} pixels, batches of {options.batch_size}"
    header = ["input", "ms per update, with", "without", "throughput with / without", "goal"]
    row = [what, 1000 * on, 1000 * off, ratio, PROMISE]
    publish({"guards": Table(header, [row])}, options.json, options.device)


if __name__ == "__main__":
    main()
