"""`sam2-lora demo`: the main job on packaged pictures: base, LoRA, merged model.

Every figure is measured with the exported files through `Predictor`, as a user would get it: the
test photographs play no part in training or in choosing the best step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core import demo_folder
from lora_core.config import option
from lora_core.demo_folder import run_verb
from lora_core.report import say, table

if TYPE_CHECKING:
    from sam2_lora.artifacts import Run
    from sam2_lora.data import EvalSet
    from sam2_lora.predictor import Predictor

COLUMNS = ("IoU point", "Dice point", "IoU box", "Dice box")


@dataclass
class Options(demo_folder.Demo):
    """Settings of `sam2-lora demo`."""

    steps: int = option(200, "Optimizer updates.", "training")
    batch_size: int = option(4, "Photographs per update.", "training")
    seeds: int = option(
        1, "Train so often, each time with another seed, and show the mean.", "training"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam2-lora demo` with these words; returns the exit code.

    Raises:
        UserError: the output exists, or the demo extra is not installed.
    """
    return demo_folder.main("sam2-lora", Options, run, argv)


def run(options: Options, folder: Path) -> None:
    """All stages, in an empty folder."""
    from sam2_lora import demo

    demo.write(folder / "data")
    say(f"{folder / 'data'}: photographs with masks, generated steel strips, a tiny SAM 2")
    runs = [train(options, folder, seed) for seed in range(options.seeds)]
    report(folder, runs)


def base_of(folder: Path) -> Path:
    """The tiny base in a demo folder."""
    return folder / "data" / "sam2_demo.safetensors"


def train(options: Options, folder: Path, seed: int) -> Run:
    """Train one LoRA on the photographs, with the command that a user would type."""
    from sam2_lora.artifacts import find_run
    from sam2_lora.train import train as run

    runs = folder / "runs" / f"seed{seed}"
    settings = {
        "data_root": folder / "data" / "photos",
        "checkpoint": base_of(folder),
        "image_size": 128,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "seed": seed,
        "eval_steps": max(1, options.steps // 5),
        "log_steps": max(1, options.steps // 10),
        "warmup_steps": options.steps // 20,
        "num_workers": 0,
        "output_dir": runs,
        "logs_dir": runs / "logs",
    }
    run_verb("sam2-lora", "train", run, settings)
    return find_run(str(next(path for path in runs.iterdir() if path.name != "logs")))


def report(folder: Path, runs: Sequence[Run]) -> None:
    """Score base, adapters and merged files on the test photographs; draw them."""
    from PIL import Image

    from sam2_lora import data
    from sam2_lora.config import Config
    from sam2_lora.evaluate import compare
    from sam2_lora.predictor import Predictor

    base = base_of(folder)
    pictures = data.load(Config(data_root=str(folder / "data" / "photos"), image_size="128")).test
    assert pictures is not None  # the demo's photographs have a test split
    plain = Predictor.load(base, image_size=(128, 128))
    adapted = [Predictor.load(base, adapter=run.folder / "adapter") for run in runs]
    merged = [Predictor.load(merged_file(run), image_size=(128, 128)) for run in runs]
    rows: list[list[object]] = [
        ["filled box", *score_boxes(pictures)],
        ["base", *score(plain, pictures)],
        ["LoRA", *mean_of([score(predictor, pictures) for predictor in adapted])],
        ["merged", *mean_of([score(predictor, pictures) for predictor in merged])],
    ]
    times = f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
    say(f"\ntest photographs{times}, from the exported files:\n")
    say(table(["", *COLUMNS], rows))
    overlays = folder / "overlays"
    overlays.mkdir()
    for record in pictures:
        sheet = compare(adapted[0], record, ("base", "LoRA"))
        Image.fromarray(sheet).save(overlays / f"{Path(record.key).stem}.png")
    say(f"\nbefore and after: {overlays}{'/'}*.png")
    say(f"adapter for PEFT: {runs[0].folder / 'adapter'}")
    say(f"merged model:     {merged_file(runs[0])}")


def merged_file(run: Run) -> Path:
    """The best merged model of a run: the last one written."""
    files = list(run.folder.glob("*_merged_step*.torch"))
    return max(
        files, key=lambda path: int(path.name.partition("_step")[2].split("_")[0].split(".")[0])
    )


def score(predictor: Predictor, pictures: EvalSet) -> list[float]:
    """Mean IoU and Dice over all objects, from a click in the middle and from a box (0..1)."""
    import numpy as np
    import torch

    from sam2_lora.metrics import Tally
    from sam2_lora.prompts import box_of, center_click

    clicked, boxed = Tally(), Tally()
    for record in pictures:
        truth = np.stack([item.mask for item in record.objects])
        predictor.set_image(record.rgb)
        clicks = [[center_click(mask).xy] for mask in truth]
        boxes = np.stack([box_of(mask) for mask in truth])
        for tally, prompts in ((clicked, {"points": clicks}), (boxed, {"boxes": boxes})):
            masks = predictor.predict(**prompts).masks
            tally.add(torch.from_numpy(masks), torch.from_numpy(truth))
    return [tally.summary()[name] for tally in (clicked, boxed) for name in ("iou", "dice")]


def score_boxes(pictures: EvalSet) -> list[float | str]:
    """What the true boxes score when they are filled: knowing nothing but the prompt."""
    import numpy as np
    import torch

    from sam2_lora.metrics import Tally, filled
    from sam2_lora.prompts import box_of

    tally = Tally()
    for record in pictures:
        truth = np.stack([item.mask for item in record.objects])
        masks = filled(np.stack([box_of(mask) for mask in truth]), truth.shape[1:])
        tally.add(torch.from_numpy(masks), torch.from_numpy(truth))
    return ["-", "-", tally.summary()["iou"], tally.summary()["dice"]]


def mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column means."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]
