"""`sam2-lora find-lr`: a learning rate for your data, from a hundred updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_core.config import parse
from lora_core.preflight import writable
from lora_core.ramp import Ramp, ramp_problems
from lora_core.report import say
from sam2_lora.config import Config


@dataclass
class Options(Ramp, Config):
    """Settings of `sam2-lora find-lr`: those of a training, and the ramp's."""

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from super().problems()
        yield from ramp_problems(self, "sam2-lora train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam2-lora find-lr` with these words; returns the exit code.

    Raises:
        UserError: settings, data or checkpoints that cannot be used, or no rate that works.
    """
    cfg = parse(
        Options,
        argv or [],
        prog="sam2-lora find-lr",
        description="Raise the learning rate over a short training, and suggest one.",
    )
    from lora_core import find_lr
    from lora_core.training.arguments import choose_device, choose_precision
    from lora_core.training.out_of_memory import explained
    from sam2_lora import data, losses, memory, model, placement
    from sam2_lora.train import ready, warm_start

    writable(cfg.ramp_dir, "--ramp_dir")  # not after a hundred updates
    ready(cfg, None)
    device = choose_device(cfg.device)
    splits = data.load(cfg)
    say(f"{splits}\n")
    precision = choose_precision(cfg.precision, device)  # wakes a GPU, so after the data
    network = model.build(cfg)
    if cfg.adapter:
        warm_start(network, cfg)
    else:
        say(placement.adapt(network, cfg))
    network.to(device)
    with explained(network, lambda: "the ramp", memory.advice(cfg)):
        curve = find_lr.ramp(
            network,
            lambda net, batch: losses.loss(net, batch, cfg),
            splits.train,
            data.collate,
            batch_size=cfg.batch_size,
            accumulation=cfg.gradient_accumulation_steps,
            steps=cfg.ramp_steps,
            low=cfg.ramp_from,
            high=cfg.ramp_to,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
            seed=cfg.seed,
            precision=precision,
            num_workers=cfg.num_workers,
        )
    numbers, picture = find_lr.write(curve, cfg.ramp_dir)
    say(f"\n{picture}\n{numbers}")
    say(f"{curve.end}, at learning rate {curve.rates[-1]:.1e}")
    say(f"suggestion: --learning_rate {find_lr.rounded(curve.suggestion):.0e}")
    return 0
