"""midi3d-lora's part of the comparison with full fine-tuning: the demo's generated scenes.

Training and validation scenes are the demo's, and so are all settings that are not varied here. The
test scenes have a seed of their own, which neither the base, the demo nor the choice of its
settings has used. Beside the loss it measures the scenes that are generated from their pictures,
and what may be lost: the loss on scenes like those that the base was made with.

Both methods leave the autoencoder and the picture encoders as they are; full fine-tuning trains
every parameter of the transformer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from midi3d_lora.config import Config

if TYPE_CHECKING:
    from midi3d_lora.data import Splits
    from midi3d_lora.encoder_cache import Encodings

CPU = torch.device("cpu")

TEST_SEED, TEST_SCENES = 13, 60  # of these, GENERATED are generated as well
GENERATED = 24
OLD_SCENES = 60  # of the base's own kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this package, and its defaults of the others."""
    parser.add_argument("--layers", nargs="+", help="with adapters; default: those of the demo")
    parser.set_defaults(rates=[3e-4, 1e-3, 3e-3], steps=450, batch_size=4, rank=16)


def prepare(args: argparse.Namespace, folder: Path) -> Comparison:
    """Write the scenes and the base, and prepare them as the demo does."""
    from lora_core.demo_folder import words
    from midi3d_lora import demo, demo_run
    from midi3d_lora import prepare as verb
    from midi3d_lora.demo_base import scenes

    torch.set_num_threads(1)
    demo.write(folder / "data", {"train": demo.SPLITS["train"], "val": demo.SPLITS["val"]})
    for name, count, style in (
        ("unseen", TEST_SCENES, scenes.OUTDOORS),
        ("old", OLD_SCENES, scenes.INDOORS),
    ):
        made = {f"{n:03}": scenes.scene((TEST_SEED, n, 0), style) for n in range(count)}
        demo.write_meshes(folder / "data" / demo.MESHES / name, made)
    for split in ("train", "val", "unseen", "old"):
        verb.main(words(demo_run.preparing(folder, split)))
    return Comparison(args, folder)


@dataclass
class Comparison:
    """See `compare_full_finetuning.Comparison`."""

    args: argparse.Namespace
    folder: Path
    chooses: str = "val, loss"
    compared: tuple[str, ...] = ("test, loss", "test, chamfer", "test, F@0.1")
    falling: frozenset[str] = frozenset(
        ["val, loss", "test, loss", "test, chamfer", "test indoors, loss"]
    )
    about: str = "losses at fixed noise, chamfer distance and F-score of unaligned scenes"
    sample: str = "scene"

    def base(self) -> dict[str, float]:
        cfg = self.settings(self.args.rates[0], 0)
        return self.figures(self.base_network(cfg), cfg)

    def train(self, method: str, rate: float, seed: int) -> tuple[float, dict[str, float]]:
        from midi3d_lora import model

        cfg = self.settings(rate, seed)
        network = self.base_network(cfg)
        total = sum(p.numel() for p in network.parameters())
        if method == "LoRA":
            model.adapted(network, cfg)
        else:
            network.requires_grad_(True)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        self.fit(network, cfg, self.folder / f"{method}-{rate:g}-{seed}")
        return trained / total, self.figures(network, cfg)

    def base_network(self, cfg: Config) -> nn.Module:
        """The base, in which the instances of a scene see each other."""
        from midi3d_lora import model

        network = model.build(cfg)
        network.set_multi_instance_blocks(cfg.mi_attention_blocks)
        return network

    def settings(self, rate: float, seed: int) -> Config:
        """The configuration of one run, the demo's; both methods get the same."""
        from midi3d_lora import demo_run

        args = self.args
        options = demo_run.Options(learning_rate=rate, batch_size=args.batch_size, seed=seed)
        found = demo_run.training(options, self.folder)
        values = {name: str(v) if isinstance(v, Path) else v for name, v in found.items()}
        values |= {"lora_rank": args.rank, "lora_alpha": 2 * args.rank}
        if args.layers:
            values["lora_target_modules"] = args.layers
        return Config(**values)

    # -- training ----------------------------------------------------------------------------------

    def fit(self, network: nn.Module, cfg: Config, folder: Path) -> None:
        """Train what is not frozen as `midi3d-lora train` does, without its files."""
        from lora_core.trainer import LoraTrainer
        from lora_core.training.arguments import training_arguments
        from midi3d_lora import data, model, objective

        splits, encodings = self.encoded(cfg)
        steps = self.args.steps
        trainer = LoraTrainer(
            network,
            training_arguments(
                folder,
                learning_rate=cfg.learning_rate,
                weight_decay=cfg.weight_decay,
                steps=steps,
                batch_size=cfg.batch_size,
                max_grad_norm=cfg.max_grad_norm,
                log_steps=steps,
                seed=cfg.seed,
                device=CPU,
                trainer={"save_steps": 10**12},
            ),
            data.TrainSet(splits.train, encodings, cfg, network.config.in_channels),
            data.collate,
            objective.loss_of(cfg, encodings, model.scheduler_of(cfg)),
            save_adapter=Path.mkdir,  # nothing is read back
            schedule=objective.schedule(cfg),
            count=data.rows_of,
        )
        trainer.train()

    def encoded(self, cfg: Config) -> tuple[Splits, Encodings]:
        """The scenes of a configuration, and what the frozen encoders make of them."""
        from midi3d_lora import data, model, scene_encodings

        splits = data.load(cfg)
        encodings = scene_encodings.encodings_of(cfg, model.skeleton(cfg), CPU, torch.float32)
        scene_encodings.fill(encodings, splits, CPU)
        return splits, encodings

    # -- measuring ---------------------------------------------------------------------------------

    def figures(self, network: nn.Module, cfg: Config) -> dict[str, float]:
        """Losses of validation, test and the base's own scenes, and scores of generated ones."""
        network.eval()
        return {
            "val, loss": self.loss(network, cfg, "val"),
            "test, loss": self.loss(network, cfg, "unseen"),
            **self.generated(network),
            "test indoors, loss": self.loss(network, cfg, "old"),
        }

    def loss(self, network: nn.Module, cfg: Config, split: str) -> float:
        """What `midi3d-lora train` measures after an epoch."""
        from midi3d_lora import model, objective

        cfg = replace(cfg, val_data_dir=str(self.folder / "scenes" / split))
        splits, encodings = self.encoded(cfg)
        measure = objective.evaluation(cfg, splits.val, encodings, model.scheduler_of(cfg))
        assert measure is not None
        with torch.no_grad():
            return measure(network)["loss"]

    def generated(self, network: nn.Module) -> dict[str, float]:
        """What `midi3d-lora evaluate` finds."""
        from midi3d_lora import demo, demo_run
        from midi3d_lora.evaluate import Options
        from midi3d_lora.meshes.metrics import mean_scores
        from midi3d_lora.scene_scores import score_folder
        from midi3d_lora.scenes.scene_folders import list_scenes

        found = demo_run.evaluating(self.folder)
        aside = ("merged_model", "save_meshes", "data_dir", "output")
        values = {name: v for name, v in found.items() if name not in aside}
        options = Options(
            pretrained_model=str(self.folder / "data" / demo.MODEL),
            mi_attention_blocks=list(demo.BLOCKS),
            data_dir=str(self.folder / "scenes" / "unseen"),
            **values | {"smooth": False},
        )
        pipeline = options.load(adapter=False)
        pipeline.transformer = network
        folders = list_scenes(options.data_dir)[:GENERATED]
        with torch.no_grad():
            means = mean_scores([score_folder(pipeline, "", f, options) for f in folders])
        return {"test, chamfer": means["scene_chamfer"], "test, F@0.1": means["scene_f_score"]}
