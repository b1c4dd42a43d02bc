"""`sam3-lora demo`: the main job on a packaged model and generated pictures: base, LoRA, merged.

Each stage is a command that a user would type. The test pictures play no part in training or in
choosing the best epoch; the merged model is scored from its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core import demo_folder
from lora_core.config import option
from lora_core.demo_folder import run_verb
from lora_core.report import say, table

if TYPE_CHECKING:
    from sam3_lora.evaluate import Result

RESOLUTION = 112  # pixels, of the packaged model
COLUMNS = {
    "segm_mAP": "mask mAP", "bbox_mAP": "box mAP", "cgF1": "cgF1", "pmF1": "pmF1",
    "IL_FPR": "own absent found", "absent_FPR": "others found",
}  # fmt: skip


@dataclass
class Options(demo_folder.Demo):
    """Settings of `sam3-lora demo`."""

    epochs: int = option(8, "Passes over the training pictures.", "training")
    batch_size: int = option(8, "Pictures per update.", "training")
    seed: int = option(0, "Fixes adapters, data order and negatives.", "training")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam3-lora demo` with these words; returns the exit code.

    Raises:
        UserError: the output exists.
    """
    return demo_folder.main("sam3-lora", Options, run, argv)


def run(options: Options, folder: Path) -> None:
    """All stages, in an empty folder."""
    from sam3_lora import demo, merge
    from sam3_lora.train import train

    demo.write(folder / "data")
    say(f"{folder / 'data'}: generated pictures with phrases, a tiny SAM 3")
    run_verb("sam3-lora", "train", train, training(options, folder))
    adapter, merged = folder / "checkpoints" / "best.pt", folder / "merged.pt"
    base = {"checkpoint": base_of(folder), "adapter": adapter}
    run_verb("sam3-lora", "merge", merge.main, {**base, "output": merged})
    evaluate(folder, adapter, merged)
    say(f"\nadapter:          {adapter}")
    say(f"adapter for PEFT: {folder / 'checkpoints' / 'adapter'}")
    say(f"merged model:     {merged}")


def base_of(folder: Path) -> Path:
    """The tiny base in a demo folder."""
    return folder / "data" / "sam3_demo.safetensors"


def training(options: Options, folder: Path) -> dict[str, object]:
    """Settings of `sam3-lora train`."""
    data = folder / "data"
    return {
        "paths.sam3_checkpoint": base_of(folder),
        "dataset.train_img_folder": data / "train",
        "dataset.train_ann_file": data / "train" / "_annotations.coco.json",
        "dataset.val_img_folder": data / "valid",
        "dataset.val_ann_file": data / "valid" / "_annotations.coco.json",
        "dataset.resolution": RESOLUTION,
        "dataset.num_workers": 0,
        "dataset.max_negatives": 4,
        "dataset.enable_augmentation": False,  # objects are a few tokens large as they are
        "training.enable_segmentation": True,
        "training.learning_rate": options.learning_rate,
        "training.batch_size": options.batch_size,
        "training.max_epochs": options.epochs,
        "training.val_epoch_freq": max(1, options.epochs // 4),
        "checkpoint.save_dir": folder / "checkpoints",
        "checkpoint.save_freq": options.epochs,
        "logging.log_dir": folder / "logs",
        "seed": options.seed,
    }


def evaluate(folder: Path, adapter: Path, merged: Path) -> None:
    """Score base, adapter and merged file on the test pictures; draw some of them."""
    from sam3_lora import evaluate as verb
    from sam3_lora.predictor import Predictor

    options = verb.Options(
        img_folder=str(folder / "data" / "test"),
        checkpoint=str(base_of(folder)),
        adapter=str(adapter),
        output=str(folder / "evaluation"),
    )
    pictures = verb.ready(options)
    val = pictures.set_for((RESOLUTION, RESOLUTION))
    adapted = Predictor.load(base_of(folder), adapter=adapter)
    found = {name: verb.measured(adapted, name, val, pictures, options) for name in options.models}
    plain = replace(options, checkpoint=str(merged), adapter=None)
    alone = Predictor.load(merged, bpe_path=base_of(folder).with_name("vocabulary.txt"))
    found["merged"] = verb.measured(alone, "model", val, pictures, plain)
    say(f"\n{len(val)} test pictures, the merged model from its file:\n")
    say(table(["", *COLUMNS.values()], [row(name, one) for name, one in found.items()]))
    verb.write_examples(folder / "overlays", adapted, val, options)
    say(f"\nbefore and after: {folder / 'overlays'}{'/'}*.png")


def row(name: str, result: Result) -> list[object]:
    return [name, *(result.figures[column] for column in COLUMNS)]
