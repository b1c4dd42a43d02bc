"""sam2-lora's part of the comparison with full fine-tuning: photographs, IoU per object.

`--data parts`: the four photographs with many objects; their left half trains, the upper right
quarter chooses the rate, the lower right one is the test. No object is in two splits, and all three
are of one kind, as a user's own splits are. `--data photos`: the demo's data set, where each split
has photographs of its own: a rate that is chosen on some need not be good on others.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam2_lora.config import Config

SPLITS = ("val", "test")
# Side of a cut-out in pixels, for `--data parts`.
CUTOUTS = {"gravel.png": 160, "brick.png": 220, "coins.png": 150, "hubble_deep_field.jpg": 150}
# Left, top, right, bottom of a split's part, as shares of the photograph.
PARTS = {"train": (0, 0, 0.5, 1), "val": (0.5, 0, 1, 0.5), "test": (0.5, 0.5, 1, 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this package, and its defaults of the others."""
    parser.add_argument("--data", choices=["parts", "photos"], default="parts")
    parser.set_defaults(rates=[3e-4, 1e-3, 3e-3], steps=600, batch_size=4)


def prepare(args: argparse.Namespace, folder: Path) -> Comparison:
    """Write the pictures and the base."""
    from sam2_lora import demo

    demo.write(folder)
    if args.data == "parts":
        write_parts(folder / "parts")
    return Comparison(args, folder)


def write_parts(folder: Path) -> None:
    """Write cut-outs of parts of photographs as COCO, each with the objects wholly inside it."""
    from lora_core.pictures.write_coco import Annotated, write_coco
    from sam2_lora import demo

    index = demo.photo_index()
    for split, share in PARTS.items():
        (folder / split).mkdir(parents=True)
        pictures = []
        for name, side in CUTOUTS.items():
            photo, masks = demo.photo(name, index[name]["size"]), demo.masks(index[name])
            for number, (left, top) in enumerate(windows(photo.size, share, side)):
                area = (slice(top, top + side), slice(left, left + side))
                objects = [
                    (label, mask[area]) for label, mask in masks if mask[area].sum() == mask.sum()
                ]
                if objects:
                    file = f"{Path(name).stem}_{number}.png"
                    photo.crop((left, top, left + side, top + side)).save(folder / split / file)
                    pictures.append(Annotated(file, (side, side), objects))
        write_coco(folder / split, pictures)


def windows(
    size: tuple[int, int], share: tuple[float, float, float, float], side: int
) -> list[tuple[int, int]]:
    """Left and top of squares of `side` pixels that cover a part, about half a side apart."""
    starts = []
    for extent, begin, end in zip(size, share[:2], share[2:], strict=True):
        first, last = round(begin * extent), round(end * extent) - side
        steps = max(1, -(-2 * (last - first) // side))
        starts.append(sorted({first + (last - first) * k // steps for k in range(steps + 1)}))
    return [(left, top) for left in starts[0] for top in starts[1]]


@dataclass
class Comparison:
    """See `compare_full_finetuning.Comparison`."""

    args: argparse.Namespace
    folder: Path
    chooses: str = "val, click"
    compared: tuple[str, ...] = ("test, click",)
    falling: frozenset[str] = frozenset()
    about: str = "mean IoU per object"
    sample: str = "picture"

    def base(self) -> dict[str, float]:
        from sam2_lora import model

        cfg = self.settings(self.args.rates[0], 0)
        return self.figures(model.build(cfg), cfg)

    def train(self, method: str, rate: float, seed: int) -> tuple[float, dict[str, float]]:
        from lora_core.trainer import LoraTrainer
        from lora_core.training.arguments import choose_device, training_arguments
        from sam2_lora import data, losses, model, placement

        cfg = self.settings(rate, seed)
        device = choose_device(cfg.device)
        network = model.build(cfg)
        total = sum(p.numel() for p in network.parameters())
        if method == "LoRA":
            placement.adapt(network, cfg)
        else:
            network.requires_grad_(True)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        network.to(device)
        trainer = LoraTrainer(
            network,
            training_arguments(
                self.folder / f"{method}-{rate:g}-{seed}",
                learning_rate=rate,
                weight_decay=cfg.weight_decay,
                steps=cfg.steps,
                batch_size=cfg.batch_size,
                warmup_steps=cfg.warmup_steps,
                max_grad_norm=cfg.max_grad_norm,
                log_steps=cfg.steps,
                seed=cfg.seed,
                precision=cfg.precision,
                device=device,
                trainer={"save_steps": 10**12},
            ),
            data.load(cfg).train,
            data.collate,
            lambda net, batch: losses.loss(net, batch, cfg),
            save_adapter=Path.mkdir,  # nothing is read back
        )
        trainer.train()
        return trained / total, self.figures(network, cfg)

    def settings(self, rate: float, seed: int) -> Config:
        """The configuration of one run; both methods get the same."""
        args = self.args
        return Config(
            data_root=str(self.folder / args.data),
            checkpoint=str(self.folder / "sam2_demo.safetensors"),
            image_size="128",
            learning_rate=rate,
            steps=args.steps,
            batch_size=args.batch_size,
            lora_rank=args.rank,
            lora_alpha=2 * args.rank,
            warmup_steps=args.steps // 20,
            seed=seed,
            num_workers=0,
            precision="fp32",
        )

    def figures(self, network: Any, cfg: Config) -> dict[str, float]:
        """Mean IoU from a click on both splits, and from a box on the test pictures."""
        from sam2_lora import data, metrics

        splits = data.load(cfg)
        val, test = (metrics.evaluate(network, getattr(splits, name), cfg) for name in SPLITS)
        return {"val, click": val["iou"], "test, click": test["iou"], "test, box": test["box_iou"]}
