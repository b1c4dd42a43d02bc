"""The files of `sam2-lora evaluate`: a row per model in `evaluation.csv`, and `<exp_id>.json`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam2_lora.evaluate import Options
    from sam2_lora.predictor import Predictor

COLUMNS = (
    "exp_id", "model", "subset_size", "variant", "prompt_type", "img_size", "batch_size", "steps",
    "lr", "wd", "seed", "val_mIoU", "val_Dice", "test_mIoU", "test_Dice", "IoU@50", "IoU@75",
    "IoU@90", "IoU@95", "Precision", "Recall", "F1", "AUPRC", "avg_inference_time", "ckpt_path",
    "timestamp",
)  # fmt: skip


def csv_rows(
    predictor: Predictor, figures: dict[str, dict[str, float]], options: Options
) -> list[dict[str, Any]]:
    """One row per model, in the guide's columns, all from one click per object.

    Rank, steps and learning rate are the adapter's own metadata. AUPRC stays empty: exact, it would
    need the probabilities of all pixels of the data set in memory at once.
    """
    from sam2_lora.model import image_size

    height, width = image_size(predictor.model)
    made = adapter_facts(options.adapter)
    rows = []
    for name, values in figures.items():
        lora = made if name == "lora" else {}
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {
            "exp_id": options.name,
            "model": Path(options.checkpoint).stem,
            "subset_size": lora.get("dataset_size", ""),
            "variant": f"lora_r{lora['r']}_a{lora['lora_alpha']:g}" if lora else name,
            "prompt_type": "point",
            "img_size": str(width) if height == width else f"{height}x{width}",
            "batch_size": lora.get("batch_size", ""),
            "steps": lora.get("step", ""),
            "lr": lora.get("learning_rate", ""),
            "wd": lora.get("weight_decay", ""),
            "seed": lora.get("seed", ""),
            f"{options.split}_mIoU": values["iou"],
            f"{options.split}_Dice": values["dice"],
            **{f"IoU@{level}": values[f"iou_ge_{level}"] for level in (50, 75, 90, 95)},
            "Precision": values["precision"],
            "Recall": values["recall"],
            "F1": values["f1"],
            "avg_inference_time": values["seconds_per_picture"],
            "ckpt_path": options.adapter if name == "lora" else options.checkpoint,
            "timestamp": datetime.now().strftime("%Y%m%d_%H%M%S"),
        }
        rows.append(row)
    return rows


def adapter_facts(path: str | None) -> dict[str, Any]:
    """Configuration and metadata that an adapter carries, in one dictionary."""
    if path is None:
        return {}
    from lora_core.adapters.file import read_adapter

    file = read_adapter(Path(path))
    return {**file.metadata, **file.config}


def write(
    folder: Path,
    figures: dict[str, dict[str, float]],
    rows: Sequence[dict[str, Any]],
    options: Options,
) -> None:
    """Append the rows to `evaluation.csv` and write the JSON."""
    from lora_core.tensor_file import atomic_write, write_json

    table = folder / "evaluation.csv"
    # As bytes: a spreadsheet may have saved it in another encoding, or without its last line end.
    earlier = table.read_bytes() if table.exists() else b""
    if earlier and not earlier.endswith(b"\n"):
        earlier += b"\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not earlier:
        writer.writeheader()
    writer.writerows(rows)
    with atomic_write(table) as file:
        file.write(earlier + text.getvalue().encode("utf-8", "surrogateescape"))
    content = {
        "exp_id": options.name,
        "split": options.split,
        "checkpoint": options.checkpoint,
        "adapter": options.adapter,
        "data_root": options.data_root,
        "figures": {name: _finite(values) for name, values in figures.items()},
    }
    write_json(folder / f"{options.name}.json", content)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
