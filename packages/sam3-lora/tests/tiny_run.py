"""Training runs of a second on the small random SAM 3 and the pictures of the goldens.

Not a test: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import tiny_base
import torch

from sam3_lora.tokenizer import SMALL_FILE, learn_merges, load_tokenizer, write_vocabulary

PICTURES = tiny_base.GOLDENS / "data" / "train"
ANNOTATIONS = PICTURES / "_annotations.coco.json"


def write_base(folder: Path, dropout: float | None = None) -> Path:
    """A checkpoint with random weights, and a small vocabulary beside it.

    Args:
        dropout: of the base itself, in training; None: as the goldens have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder / SMALL_FILE, learn_merges(["bolt", "nut", "washer"]))
    words = load_tokenizer(folder).size
    path = tiny_base.write(folder / "base.pt", tiny_base.content(words=words), words)
    if dropout is not None:
        config = path.with_suffix(".json")
        text = re.sub(r'(dropout": )[0-9.]+', rf"\g<1>{dropout}", config.read_text())
        config.write_text(text)
    return path


def write_pictures(folder: Path, copies: int) -> Path:
    """The goldens' second picture several times: all hold the same objects, and ask the same."""
    folder.mkdir(parents=True)
    content = json.loads(ANNOTATIONS.read_text())
    image = content["images"][1]
    objects = [one for one in content["annotations"] if one["image_id"] == image["id"]]
    content["images"] = [
        {**image, "id": number, "file_name": f"{number}.png"} for number in range(copies)
    ]
    content["annotations"] = [
        {**one, "image_id": number, "id": 100 * number + one["id"]}
        for number in range(copies)
        for one in objects
    ]
    for number in range(copies):
        shutil.copy(PICTURES / image["file_name"], folder / f"{number}.png")
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def settings(base: Path, output: Path, **given: Any) -> dict[str, Any]:
    """Settings of two epochs over three pictures, two updates each; names with __ for the dot."""
    found = {
        "paths.sam3_checkpoint": base,
        "dataset.train_img_folder": PICTURES,
        "dataset.train_ann_file": ANNOTATIONS,
        "dataset.val_img_folder": PICTURES,
        "dataset.val_ann_file": ANNOTATIONS,
        "dataset.resolution": 84,
        "dataset.num_workers": 0,
        "training.max_epochs": 2,
        "training.learning_rate": 1e-2,
        "logging.log_steps": 1,
        "logging.log_dir": output / "logs",
        "checkpoint.save_dir": output / "checkpoints",
        "tensorboard": False,
        "device": "cpu",
    }
    return found | {name.replace("__", "."): value for name, value in given.items()}


def command(base: Path, output: Path, **given: Any) -> list[str]:
    """Flags of `settings`."""
    pairs = settings(base, output, **given).items()
    return [word for name, value in pairs for word in (f"--{name}", str(value))]


def rows(output: Path, split: str = "") -> list[dict[str, str]]:
    """The figures of a run, without what time decides."""
    with (output / "logs" / "metrics.csv").open(newline="") as file:
        found = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    return [row for row in found if split in ("", row["split"])]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The adapter in a single file."""
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["tensors"]
    return found


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (output / "checkpoints" / "training_summary.json").read_text()
    )
    return found


def same(one: Path, other: Path) -> bool:
    """Whether two adapter files hold the same bits."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
