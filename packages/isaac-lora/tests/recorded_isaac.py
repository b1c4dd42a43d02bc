"""The recorded tiny Isaac, its samples, and batches of them padded and packed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core.testing.goldens import load_golden

GOLDENS = Path(__file__).parent / "goldens"
CASE = load_golden(GOLDENS / "model")
SAMPLES = ("text", "image1", "image2", "short")
WITH_IMAGES = ("image1", "image2", "short")
PAD = 300


def recorded_model() -> IsaacForConditionalGeneration:
    model = IsaacForConditionalGeneration(IsaacConfig(**CASE.config)).eval()
    model.load_state_dict(CASE.weights)
    return model


def sample(name: str) -> dict[str, Tensor]:
    """The inputs of one recorded sample, without labels."""
    inputs = {
        "input_ids": CASE.io[f"{name}.input_ids"],
        "image_mask": CASE.io[f"{name}.image_mask"].bool(),
    }
    for key in ("patches", "grids"):
        if f"{name}.{key}" in CASE.io:
            inputs[key] = CASE.io[f"{name}.{key}"]
    return inputs


def labels_of(name: str) -> Tensor:
    return CASE.io[f"{name}.labels"]


def images_of(names: tuple[str, ...]) -> dict[str, Tensor]:
    pictured = [sample(name) for name in names if "patches" in sample(name)]
    if not pictured:
        return {}
    return {key: torch.cat([inputs[key] for inputs in pictured]) for key in ("patches", "grids")}


def padded(names: tuple[str, ...], side: str) -> dict[str, Any]:
    """One row for each sample, padded on the left or right, with labels."""
    length = max(sample(name)["input_ids"].shape[1] for name in names)

    def row(values: Tensor, fill: int) -> Tensor:
        missing = torch.full((1, length - values.shape[1]), fill).to(values.dtype)
        return torch.cat([missing, values] if side == "left" else [values, missing], dim=1)

    ids = [sample(name)["input_ids"] for name in names]
    masks = [sample(name)["image_mask"] for name in names]
    return {
        "input_ids": torch.cat([row(one, PAD) for one in ids]),
        "image_mask": torch.cat([row(one, 0) for one in masks]),
        "attention_mask": torch.cat([row(torch.ones_like(one), 0) for one in ids]),
        "labels": torch.cat([row(labels_of(name), -100) for name in names]),
        **images_of(names),
    }


def packed(names: tuple[str, ...], padding: int = 3) -> dict[str, Any]:
    """All samples in one row, and some padding behind them, with labels."""
    ids = [sample(name)["input_ids"] for name in names]
    tail = torch.full((1, padding), PAD)
    numbers = [torch.full_like(one, index) for index, one in enumerate(ids)]
    masks = [sample(name)["image_mask"] for name in names]
    return {
        "input_ids": torch.cat([*ids, tail], dim=1),
        "image_mask": torch.cat([*masks, torch.zeros_like(tail).bool()], dim=1),
        "document_ids": torch.cat([*numbers, torch.full_like(tail, -1)], dim=1),
        "labels": torch.cat([*(labels_of(name) for name in names), tail * 0 - 100], dim=1),
        **images_of(names),
    }


def slices(names: tuple[str, ...], side: str) -> list[tuple[int, slice]]:
    """Where each sample stands in `padded` (left, right) or `packed`: its row, its places."""
    lengths = [sample(name)["input_ids"].shape[1] for name in names]
    longest, places, start = max(lengths), [], 0
    for index, length in enumerate(lengths):
        if side == "packed":
            places.append((0, slice(start, start + length)))
            start += length
        elif side == "left":
            places.append((index, slice(longest - length, longest)))
        else:
            places.append((index, slice(0, length)))
    return places
