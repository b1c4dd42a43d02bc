"""scenesplat-lora's part of the comparison with full fine-tuning: the demo's rooms by night.

The training rooms are the demo's. The test rooms have a seed of their own, which neither the base,
the demo nor the choice of its settings has used. Beside what is to be gained it measures what may
be lost: how well the network still does on the same test rooms by day, as its base knows rooms.

Both methods leave the batch norms' running statistics as they are, which is what the package does
with LoRA; full fine-tuning trains their weights and biases.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scenesplat_lora.config import Config, Data, Lora, LoraTraining, Optimizer, TrainData

SPLITS = {"train": 24, "val": 20}  # rooms; training has the demo's own
TEST_SEED, TEST_ROOMS = 12, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this package, and its defaults of the others."""
    parser.add_argument(
        "--target_modules", nargs="+", choices=["attn", "mlp"], default=["attn", "mlp"]
    )
    parser.add_argument("--parts", choices=["encoder", "all"], default="all")
    parser.set_defaults(rates=[1e-3, 3e-3, 1e-2], steps=240, batch_size=1)


def prepare(args: argparse.Namespace, folder: Path) -> Comparison:
    """Write the rooms and the texts."""
    from scenesplat_lora import demo

    torch.set_num_threads(1)
    demo.write(folder, SPLITS)
    return Comparison(args, folder)


@dataclass
class Comparison:
    """See `compare_full_finetuning.Comparison`."""

    args: argparse.Namespace
    folder: Path
    chooses: str = "val, mIoU"
    compared: tuple[str, ...] = ("test, mIoU", "test, mAcc")
    falling: frozenset[str] = frozenset()
    about: str = "scores over all voxels in the definition of the official tester"
    sample: str = "room"

    def base(self) -> dict[str, float]:
        from scenesplat_lora import model

        return self.figures(model.build(self.settings(self.args.rates[0], 0)))

    def train(self, method: str, rate: float, seed: int) -> tuple[float, dict[str, float]]:
        from scenesplat_lora import model

        cfg = self.settings(rate, seed)
        network = model.build(cfg)
        total = sum(p.numel() for p in network.parameters())
        if method == "LoRA":
            model.adapted(network, cfg)
        else:
            network.requires_grad_(True)
            keep_statistics(network)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        fit(network, cfg, self.args.steps, self.folder / f"{method}-{rate:g}-{seed}")
        return trained / total, self.figures(network)

    def settings(self, rate: float, seed: int) -> Config:
        """The configuration of one run; both methods get the same."""
        from scenesplat_lora import demo
        from scenesplat_lora.demo_base import rooms

        args = self.args
        return Config(
            lora=Lora(
                r=args.rank,
                lora_alpha=2 * args.rank,
                target_modules=list(args.target_modules),
                encoder_only=args.parts == "encoder",
            ),
            lora_training=LoraTraining(pretrained_path=str(demo.base_checkpoint())),
            data=Data(
                grid_size=rooms.GRID_SIZE,
                train=TrainData(data_root=str(self.folder)),
                text_embeddings=str(self.folder / demo.TEXTS),
            ),
            optimizer=Optimizer(lr=rate),
            epoch=-(-args.steps * args.batch_size // SPLITS["train"]),
            batch_size=args.batch_size,
            num_worker=0,
            seed=seed,
            device="cpu",
        )

    def figures(self, network: nn.Module) -> dict[str, float]:
        """Scores of validation and test rooms by night, and of the test rooms by day."""
        from pretrain_scenesplat_demo_base import score

        from scenesplat_lora import demo
        from scenesplat_lora.demo_base import rooms

        val, _ = score(network, (demo.room_of("val", n) for n in range(SPLITS["val"])))
        (night, _), (day, _) = (
            score(network, (rooms.room((TEST_SEED, n, 0), style) for n in range(TEST_ROOMS)))
            for style in (rooms.NIGHT, rooms.DAY)
        )
        return {
            "val, mIoU": val["mIoU"],
            "test, mIoU": night["mIoU"],
            "test, mAcc": night["mAcc"],
            "test by day, mIoU": day["mIoU"],
        }


def keep_statistics(network: nn.Module) -> None:
    """Batch norms compute with their running statistics and leave them, whoever is trained."""

    def stay(norm: nn.Module, inputs: Any) -> None:
        norm.eval()  # the trainer has put the whole network into training mode

    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            module.register_forward_pre_hook(stay)


def fit(network: nn.Module, cfg: Config, steps: int, folder: Path) -> None:
    """Train what is not frozen as `scenesplat-lora train` does, without its files."""
    from lora_core.trainer import LoraTrainer
    from lora_core.training.arguments import training_arguments
    from scenesplat_lora import data, objective, validation

    needs = objective.needs_of(network, validation.texts(cfg))
    splits = data.load(cfg, needs)
    trainer = LoraTrainer(
        network,
        training_arguments(
            folder,
            learning_rate=cfg.optimizer.lr,
            weight_decay=cfg.optimizer.weight_decay,
            steps=steps,
            batch_size=cfg.batch_size,
            max_grad_norm=cfg.clip_grad or 0.0,
            log_steps=steps,
            seed=cfg.seed,
            device=torch.device("cpu"),
            trainer={"save_steps": 10**12},
        ),
        splits.train,
        partial(data.collate, mix_prob=cfg.mix_prob),
        objective.loss_of(cfg, needs),
        save_adapter=Path.mkdir,  # nothing is read back
        schedule=objective.schedule(cfg, data.updates_per_epoch(cfg, splits)),
    )
    trainer.train()
