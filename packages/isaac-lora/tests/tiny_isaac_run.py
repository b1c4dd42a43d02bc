"""Training runs of a second: the recorded tiny Isaac as a model folder, and a few conversations.

Not a test: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import tiny_depth
from isaac_texts import record, write_picture, write_records
from recorded_isaac import GOLDENS, recorded_model

ANSWERS = ("A car.", "Two red cars and a dog.", "It is near.", "Nothing at all.")


def write_model(folder: Path) -> Path:
    """The recorded model with its tokenizer, in the original's layout."""
    recorded_model().save_pretrained(folder)
    for file in (GOLDENS / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def write_all(root: Path, train: int = 5, val: int = 2) -> Path:
    """A model, a depth model, and conversations with zero, one and two pictures in turn."""
    write_model(root / "isaac_model")
    tiny_depth.write_folder(root / "depth")
    return write_conversations(root, train, val)


def write_conversations(root: Path, train: int = 5, val: int = 2) -> Path:
    """`train.json` and `val.json`, with their pictures in `images`."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("val", val)):
        write_records(root / f"{name}.json", [_record(root, name, n) for n in range(count)])
    return root


def _record(root: Path, split: str, number: int) -> dict[str, Any]:
    """Conversation of a file; the lengths of questions and answers differ."""
    names = [f"{split}{number}_{k}.png" for k in range((number + (split == "val") + 1) % 3)]
    for k, name in enumerate(names):
        write_picture(root / "images" / name, 16 + 4 * number, 24, seed=7 * number + k)
    question = "What is it?" + " <image>" * len(names) + " Say more." * number
    found = record(question, ANSWERS[number % len(ANSWERS)], id=f"{split}_{number}")
    return found | ({"images": names} if names else {})


def settings(root: Path, output: Path, **given: Any) -> dict[str, Any]:
    """Settings of two epochs over five conversations, three updates each."""
    found: dict[str, Any] = {
        "model_path": root / "isaac_model",
        "data_path": root / "train.json",
        "val_data_path": root / "val.json",
        "image_folder": root / "images",
        "output_dir": output,
        "cache_dir": output.parent / "cache",
        "lora_r": 2,
        "lora_alpha": 4,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "eval_steps": 3,
        "logging_steps": 1,
        "eval_max_new_tokens": 4,
        "tensorboard": "false",
        "use_cpu": "true",
    }
    return found | given


def depth(root: Path) -> dict[str, Any]:
    """Settings that add depth."""
    return {
        "use_depth": "true",
        "depth_checkpoint_path": root / "depth",
        "depth_input_size": tiny_depth.SIZE,
    }


def command(root: Path, output: Path, **given: Any) -> list[str]:
    """Flags of `settings`; None leaves one out."""
    words = []
    for name, value in settings(root, output, **given).items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def rows(output: Path, split: str = "") -> list[dict[str, str]]:
    """The figures of a run, without what time decides."""
    with (output / "metrics.csv").open(newline="") as file:
        found = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    return [row for row in found if split in ("", row["split"])]
