"""What `sam3-lora evaluate` tells: a table for people, and `evaluation.json`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.errors import printable
from lora_core.report import table
from lora_core.tensor_file import write_json

if TYPE_CHECKING:
    from sam3_lora.evaluate import Options, Pictures, Result

ROWS = {
    "segm_mAP": "masks: mAP", "segm_mAP50": "masks: mAP50", "segm_mAP75": "masks: mAP75",
    "bbox_mAP": "boxes: mAP", "bbox_mAP50": "boxes: mAP50", "bbox_mAP75": "boxes: mAP75",
    "cgF1": "cgF1 = pmF1 x MCC", "cgF1_50": "cgF1 at IoU 0.50", "cgF1_75": "cgF1 at IoU 0.75",
    "pmF1": "pmF1: objects", "MCC": "MCC: is the phrase there?",
    "precision": "precision", "recall": "recall",
    "IL_F1": "F1: is the phrase there?", "IL_FPR": "found of own absent phrases",
    "absent_FPR": "found of absent concepts",
}  # fmt: skip
MAX_LISTED = 30  # phrases in the printed table
WORSE_FPR = 0.01  # by so much more often absent concepts may be found


def report(results: Mapping[str, Result], pictures: Pictures) -> str:
    """The tables for people: figures, AP of each phrase, thresholds, and what to be careful of."""
    counts = pictures.counts
    rows = [
        [caption, *(_cell(one.figures.get(name)) for one in results.values())]
        for name, caption in ROWS.items()
        if any(name in one.figures for one in results.values())
    ]
    notes = dict.fromkeys([*pictures.notes, *(n for one in results.values() for n in one.notes)])
    return printable(
        "\n".join([
            f"{counts.objects.total()} objects in {counts.pictures} pictures; "
            f"{counts.absent} questions for phrases that are not there",
            table(["", *results], rows),
            "",
            _by_phrase(results, pictures),
            "",
            *_thresholds(results),
            *warnings(results),
            *(f"note: {note}" for note in notes),
        ])
    )  # fmt: skip


def _cell(value: float | None) -> str:
    """-1 is pycocotools' word for nothing to score."""
    return "-" if value is None or value == -1 or math.isnan(value) else f"{value:.4f}"


def _by_phrase(results: Mapping[str, Result], pictures: Pictures) -> str:
    kind = next(iter(next(iter(results.values())).categories))
    rows: list[list[object]] = [
        [
            phrase,
            pictures.counts.objects[phrase],
            *(_cell(one.categories[kind].get(phrase)) for one in results.values()),
        ]
        for phrase in pictures.phrases[:MAX_LISTED]
    ]
    what = {"segm": "mask", "bbox": "box"}[kind]
    lines = [table(["phrase", "objects", *(f"{what} mAP, {name}" for name in results)], rows)]
    if len(pictures.phrases) > MAX_LISTED:
        lines.append(f"... and {len(pictures.phrases) - MAX_LISTED} more in evaluation.json")
    return "\n".join(lines)


def _thresholds(results: Mapping[str, Result]) -> Iterator[str]:
    for name, one in results.items():
        best = one.calibration
        if best is None:
            yield f"{name}: no threshold, since no detection meets an object with an IoU of 0.5"
        else:
            yield (
                f"{name}: best threshold {best.threshold:.3g}: F1 {best.f1:.4f} (precision "
                f"{best.precision:.4f}, recall {best.recall:.4f}); at 0.5: F1 {best.f1_at_half:.4f}"
            )


def warnings(results: Mapping[str, Result]) -> Iterator[str]:
    """Where the adapter did harm; none without both models."""
    if not {"base", "LoRA"} <= results.keys():
        return
    base, lora = results["base"].figures, results["LoRA"].figures
    for name in ("segm_mAP", "bbox_mAP", "cgF1"):
        loss = base.get(name, 0.0) - lora.get(name, 0.0)
        if loss > 0:
            yield f"warning: with the adapter {name} is {loss:.4f} lower than the base's"
    more = lora.get("absent_FPR", 0.0) - base.get("absent_FPR", 0.0)
    if more > WORSE_FPR:
        yield (
            f"warning: with the adapter absent concepts are found more often, by {more:.4f}: the "
            "model may have come to fire on any phrase; train with more negatives or fewer epochs"
        )


def write(
    path: Path,
    results: Mapping[str, Result],
    pictures: Pictures,
    options: Options,
    size: tuple[int, int],
) -> None:
    """Write all figures as JSON; what cannot be scored is null."""
    content = {
        "checkpoint": options.checkpoint,
        "adapter": options.adapter,
        "img_folder": options.img_folder,
        "ann_file": pictures.cfg.dataset.val_ann_file,
        "image_size": list(size),
        "pictures": pictures.counts.pictures,
        "objects": dict(pictures.counts.objects),
        "absent_queries": pictures.counts.absent,
        "models": {name: _plain(one) for name, one in results.items()},
        "notes": pictures.notes,
    }
    write_json(path, content)


def _plain(result: Result) -> dict[str, Any]:
    return {
        "figures": {name: _known(value) for name, value in result.figures.items()},
        "per_category_AP": result.categories,
        "calibration": None if result.calibration is None else asdict(result.calibration),
        "notes": result.notes,
    }


def _known(value: float) -> float | None:
    """JSON has no NaN, and -1 is no figure."""
    return value if math.isfinite(value) and value != -1 else None
