"""sam3-lora's part of the comparison with full fine-tuning: the demo's generated pictures.

Test pictures are others than the demo's, which were seen while its settings were chosen. Beside
what is to be gained it measures what may be lost: how often phrases are found that are not there,
and how well the network still does on pictures like those that its base was made with.

`--text_encoder frozen` adapts what `sam3-lora train` adapts by default.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sam3_lora.config import Config, Dataset, Lora, Paths, Training

SPLITS = {"train": 240, "valid": 100}  # pictures
TEST_SEED, TEST_PICTURES = 5, 200
RESOLUTION = 112  # pixels
OLD_PICTURES = 200  # of the base's own kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this package, and its defaults of the others."""
    parser.add_argument("--text_encoder", choices=["adapted", "frozen"], default="adapted")
    parser.set_defaults(rates=[1e-4, 3e-4, 1e-3], steps=240, batch_size=8)


def prepare(args: argparse.Namespace, folder: Path) -> Comparison:
    """Write the pictures and the base."""
    from sam3_lora import demo
    from sam3_lora.demo_base import scenes

    torch.set_num_threads(1)
    demo.write(folder, SPLITS)
    test = (scenes.scene((TEST_SEED, number, 0), scenes.SHIFTED) for number in range(TEST_PICTURES))
    demo.write_pictures(folder / "test", test, demo.PHRASES)
    return Comparison(args, folder)


@dataclass
class Comparison:
    """See `compare_full_finetuning.Comparison`."""

    args: argparse.Namespace
    folder: Path
    chooses: str = "val, mask mAP"
    compared: tuple[str, ...] = ("test, mask mAP", "test, box mAP", "test, cgF1")
    falling: frozenset[str] = frozenset()
    about: str = "scores as `sam3-lora evaluate` has them"
    sample: str = "picture"

    def base(self) -> dict[str, float]:
        from sam3_lora import model

        cfg = self.settings(self.args.rates[0], 0)
        network = model.build(cfg)
        return self.figures(network, model.tokenizer(network), cfg)

    def train(self, method: str, rate: float, seed: int) -> tuple[float, dict[str, float]]:
        from lora_core.trainer import LoraTrainer
        from lora_core.training.arguments import training_arguments
        from sam3_lora import data, model, objective
        from sam3_lora.train import schedule

        cfg = self.settings(rate, seed)
        splits, network = data.load(cfg), model.build(cfg)
        total = sum(p.numel() for p in network.parameters())
        if method == "LoRA":
            model.adapt(network, cfg)
        else:
            network.requires_grad_(True)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        words = model.tokenizer(network)
        trainer = LoraTrainer(
            network,
            training_arguments(
                self.folder / f"{method}-{rate:g}-{seed}",
                learning_rate=rate,
                weight_decay=cfg.training.weight_decay,
                steps=self.args.steps,
                batch_size=cfg.training.batch_size,
                max_grad_norm=cfg.training.max_grad_norm,
                log_steps=self.args.steps,
                seed=cfg.seed,
                device=torch.device("cpu"),
                trainer={"save_steps": 10**12},
            ),
            splits.train,
            partial(data.collate, tokenizer=words),
            objective.loss_of(cfg, None),
            save_adapter=Path.mkdir,  # nothing is read back
            schedule=schedule(cfg),
        )
        trainer.train()
        return trained / total, self.figures(network, words, cfg)

    def settings(self, rate: float, seed: int) -> Config:
        """The configuration of one run; both methods get the same."""
        data = {split: self.folder / split for split in ("train", "valid")}
        return Config(
            lora=Lora(
                rank=self.args.rank,
                alpha=2 * self.args.rank,
                apply_to_text_encoder=self.args.text_encoder == "adapted",
            ),
            dataset=Dataset(
                train_img_folder=str(data["train"]),
                train_ann_file=str(data["train"] / "_annotations.coco.json"),
                val_img_folder=str(data["valid"]),
                val_ann_file=str(data["valid"] / "_annotations.coco.json"),
                resolution=str(RESOLUTION),
                max_negatives=4,
                enable_augmentation=False,  # as in the demo
                num_workers=0,
            ),
            training=Training(
                learning_rate=rate, batch_size=self.args.batch_size, enable_segmentation=True
            ),
            paths=Paths(sam3_checkpoint=str(self.folder / "sam3_demo.safetensors")),
            seed=seed,
            device="cpu",
        )

    def figures(self, network: Any, words: Any, cfg: Config) -> dict[str, float]:
        """Figures of the validation and the test pictures, and of pictures like the base's own."""
        from sam3_base import scoring
        from sam3_base.batches import phrases_of

        from sam3_lora.demo_base import scenes

        network.eval()
        val = self.scores(network, words, cfg)
        test_folder = self.folder / "test"
        dataset = replace(
            cfg.dataset,
            val_img_folder=str(test_folder),
            val_ann_file=str(test_folder / "_annotations.coco.json"),
        )
        test = self.scores(network, words, replace(cfg, dataset=dataset))
        cpu = torch.device("cpu")
        old = scoring.score(
            network, phrases_of(words, cpu), scenes.held_out(OLD_PICTURES), cpu, masks=True
        )
        return {
            "val, mask mAP": val["segm_mAP"],
            "test, mask mAP": test["segm_mAP"],
            "test, box mAP": test["bbox_mAP"],
            "test, cgF1": test["cgF1"],
            "own absent found": test["IL_FPR"],
            "others found": test["absent_FPR"],
            "old pictures, mask F1@50": old["segm_F1@50"],
            "old, absent found": old["false_fire"],
        }

    @torch.no_grad()
    def scores(self, network: Any, words: Any, cfg: Config) -> dict[str, float]:
        """Figures of the split that `cfg` validates on."""
        from sam3_lora import data
        from sam3_lora.objective import texts_of
        from sam3_lora.scoring import ABSENT_IMAGES, EncodedPhrases, false_positives, score

        splits = data.load(cfg)
        phrases = EncodedPhrases(network, words, texts_of(splits))
        figures = score(network, splits.val, phrases, masks=True).figures()
        asked = islice(splits.val, ABSENT_IMAGES)
        figures["absent_FPR"] = false_positives(network, phrases, asked, splits.phrases)
        return figures
