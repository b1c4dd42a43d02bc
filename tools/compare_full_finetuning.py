"""LoRA's share of the gain that full fine-tuning reaches, on a package's embedded default.

python tools/compare_full_finetuning.py sam2 --output table.md
python tools/compare_full_finetuning.py sam2 --data photos

Both methods train equally long on the same pictures in the same order, at each of the same
learning rates and from the same seeds. A method's rate is the one with the best mean IoU on the
validation pictures; the figures are those of the last step at that rate on the test pictures,
which play no part in any choice.

`--data parts`: the four photographs with many objects; their left half trains, the upper right
quarter chooses the rate, the lower right one is the test. No object is in two splits, and all three
are of one kind, as a user's own splits are. `--data photos`: the demo's data set, where each split
has photographs of its own: a rate that is chosen on some need not be good on others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sam2_lora.config import Config

METHODS = ("LoRA", "full")
SPLITS = ("val", "test")
# Side of a cut-out in pixels, for `--data parts`.
CUTOUTS = {"gravel.png": 160, "brick.png": 220, "coins.png": 150, "hubble_deep_field.jpg": 150}
# Left, top, right, bottom of a split's part, as shares of the photograph.
PARTS = {"train": (0, 0, 0.5, 1), "val": (0.5, 0, 1, 0.5), "test": (0.5, 0.5, 1, 1)}
ENOUGH = 5.0  # the full gain must be so many of its standard deviations over the seeds


@dataclass(frozen=True)
class Run:
    """One training: what was trained how, and mean IoU per object (0..1) from one click."""

    method: str
    rate: float
    seed: int
    share_trained: float  # of the parameters, 0..1
    val: float
    test: float
    test_box: float  # IoU from a box


def main(argv: Sequence[str] | None = None) -> int:
    """Train everything, print the table; 1 if the full gain is too small to compare with."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        base, runs = train_all(args, Path(folder))
    text, valid = report(base, runs, args)
    print(f"\n{text}")
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0 if valid else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", choices=["sam2"])
    parser.add_argument("--data", choices=["parts", "photos"], default="parts")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the table here as well")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: a deviation needs at least 2")
    return args


# -- training ----------------------------------------------------------------------------------


def train_all(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[Run]]:
    """Figures of the base {"val", "test", "test_box"}, and all runs, the LoRA ones first."""
    from sam2_lora import data, demo, metrics, model

    demo.write(folder)
    if args.data == "parts":
        write_parts(folder / "parts")
    cfg = settings(args, folder, rate=args.rates[0], seed=0)
    splits = data.load(cfg)
    network = model.build(cfg)
    scores = {name: metrics.evaluate(network, getattr(splits, name), cfg) for name in SPLITS}
    base = figures(scores)
    print("base", base, flush=True)
    runs = []
    for method in METHODS:
        for rate in args.rates:
            for seed in range(args.seeds):
                began = time.monotonic()
                runs.append(train(method, settings(args, folder, rate, seed), folder))
                print(f"{runs[-1]} {time.monotonic() - began:.0f} s", flush=True)
    return base, runs


def write_parts(folder: Path) -> None:
    """Write cut-outs of parts of photographs as COCO, each with the objects wholly inside it."""
    import json

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
                    pictures.append((file, objects))
        text = json.dumps(demo.coco(pictures))
        (folder / split / "_annotations.coco.json").write_text(text, encoding="utf-8")


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


def figures(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """What is compared, out of the metrics of both splits."""
    return {
        "val": scores["val"]["iou"],
        "test": scores["test"]["iou"],
        "test_box": scores["test"]["box_iou"],
    }


def settings(args: argparse.Namespace, folder: Path, rate: float, seed: int) -> Config:
    """The configuration of one run; both methods get the same."""
    return Config(
        data_root=str(folder / args.data),
        checkpoint=str(folder / "sam2_demo.safetensors"),
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


def train(method: str, cfg: Config, folder: Path) -> Run:
    """Train adapters ("LoRA") or every parameter ("full") for `cfg.steps`, and score the result."""
    from lora_core.trainer import LoraTrainer, choose_device, training_arguments
    from sam2_lora import data, losses, metrics, model, placement

    device = choose_device(cfg.device)
    splits, network = data.load(cfg), model.build(cfg)
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
            folder / f"{method}-{cfg.learning_rate:g}-{cfg.seed}",
            learning_rate=cfg.learning_rate,
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
        splits.train,
        data.collate,
        lambda net, batch: losses.loss(net, batch, cfg),
        save_adapter=Path.mkdir,  # nothing is read back
    )
    trainer.train()
    scores = {name: metrics.evaluate(network, getattr(splits, name), cfg) for name in SPLITS}
    return Run(method, cfg.learning_rate, cfg.seed, trained / total, **figures(scores))


# -- comparing ---------------------------------------------------------------------------------


def chosen(runs: Sequence[Run], method: str) -> list[Run]:
    """The runs of a method at its best rate on the validation photographs, by seed."""
    by_rate: dict[float, list[Run]] = {}
    for run in runs:
        if run.method == method:
            by_rate.setdefault(run.rate, []).append(run)
    best = max(by_rate.values(), key=lambda group: statistics.fmean(run.val for run in group))
    return sorted(best, key=lambda run: run.seed)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample)."""
    return statistics.fmean(values), statistics.stdev(values)


def report(
    base: dict[str, float], runs: Sequence[Run], args: argparse.Namespace
) -> tuple[str, bool]:
    """The markdown table with its conclusion, and whether the conclusion may be drawn."""
    lora, full = (chosen(runs, method) for method in METHODS)
    lines = [
        "| method | trained parameters | learning rate | val, click | test, click | test, box |",
        "|---|---|---|---|---|---|",
        f"| base | 0 % | | {base['val']:.3f} | {base['test']:.3f} | {base['test_box']:.3f} |",
    ]
    for group in (lora, full):
        cells = [
            "{:.3f} ± {:.3f}".format(*spread([getattr(run, name) for run in group]))
            for name in ("val", "test", "test_box")
        ]
        share = f"{100 * group[0].share_trained:.1f} %"
        lines.append(f"| {group[0].method} | {share} | {group[0].rate:g} | {' | '.join(cells)} |")
    gains = [[run.test - base["test"] for run in group] for group in (lora, full)]
    gain, deviation = spread(gains[1])
    valid = gain >= ENOUGH * deviation
    lines += [
        "",
        f"{args.steps} steps of {args.batch_size} pictures, {args.seeds} seeds, learning rates "
        f"{', '.join(f'{rate:g}' for rate in args.rates)}; mean IoU per object, ± standard "
        "deviation over the seeds.",
        f"Full fine-tuning gains {gain:.3f} ± {deviation:.3f} from a click; the gain must be "
        f"{ENOUGH:g} deviations or more.",
    ]
    if not valid:
        return "\n".join([*lines, "That is too little to compare with."]), False
    # Seed by seed: both methods saw the same pictures and prompts in the same order.
    mean, sd = spread([100 * a / b for a, b in zip(*gains, strict=True)])
    lines.append(f"LoRA reaches {mean:.0f} ± {sd:.0f} % of that gain.")
    return "\n".join(lines), True


if __name__ == "__main__":
    sys.exit(main())
