"""Scenes with phrases to ask for, as batches of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sam3_base.new_network import GRID
from sam3_lora.config import PATCH
from sam3_lora.demo_base import scenes
from sam3_lora.outputs import Targets
from sam3_lora.prompts import PADDING
from sam3_lora.tokenizer import Tokenizer

MOST = 8  # things in a scene, at most


class Scenes(Dataset):
    """Item i is a function of (seed, i): a scene, and phrases to ask for, as arrays."""

    def __init__(self, style: scenes.Style | None, phrases: int, count: int, seed: int) -> None:
        """Without a style half of the scenes are easy, half full."""
        self.style, self.phrases, self.count, self.seed = style, phrases, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, NDArray]:
        rng = np.random.default_rng((self.seed, i, 1))
        style = self.style or (scenes.EASY, scenes.FULL)[rng.integers(2)]
        return as_arrays(scenes.scene((self.seed, i, 0), style), self.phrases, rng)


def as_arrays(scene: scenes.Scene, phrases: int, rng: np.random.Generator) -> dict[str, NDArray]:
    """A scene and P' phrases to ask for.

    Returns:
        pixels f32 [3, S, S]; text and example i64 [P']; of the things boxes f32 [8, 4], masks bool
        [8, S, S] and named bool [8, P], which phrases describe them; owner i64 [g, g], the thing
        that fills most of a cell, -1: none.
    """
    count = len(scene.things)
    named = np.zeros((MOST, len(scenes.PHRASES)), bool)
    for p, phrase in enumerate(scenes.PHRASES):
        named[scene.answers(phrase), p] = True
    boxes = np.full((MOST, 4), 0.5, np.float32)
    masks = np.zeros((MOST, *scene.image.shape[:2]), bool)
    for k, thing in enumerate(scene.things):
        boxes[k], masks[k] = thing.box, thing.mask
    filled = masks.reshape(MOST, GRID, PATCH, GRID, PATCH).mean((2, 4))
    return {
        "pixels": (scene.image / 127.5 - 1).transpose(2, 0, 1).astype(np.float32),
        "text": choose(named[:count], phrases, rng),
        # A thing whose box is shown with the phrase that describes it: about every tenth one.
        "example": rng.integers(-MOST, MOST, phrases),
        "boxes": boxes,
        "masks": masks,
        "named": named,
        "owner": np.where(filled.max(0) > 0.25, filled.argmax(0), -1),
    }


def choose(named: NDArray[np.bool_], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Phrases to ask for: half are answered; of the others half share a word with an answered one.

    Args:
        named: bool [T, P].
    """
    present, chosen = named.any(0), []
    absent = np.flatnonzero(~present)
    for k in range(count):
        if k % 2 == 0 and len(named):  # of a random thing a random phrase
            chosen.append(int(rng.choice(np.flatnonzero(named[rng.integers(len(named))]))))
            continue
        near = absent
        if k % 4 == 1 and chosen:
            near = absent[CLOSE[chosen[-1], absent]]
        chosen.append(int(rng.choice(near if len(near) else absent)))
    return np.array(chosen, np.int64)


def _close() -> NDArray[np.bool_]:
    words = [set(phrase.split()) for phrase in scenes.PHRASES]
    return np.array([[a != b and bool(a & b) for b in words] for a in words])


CLOSE = _close()  # [P, P]: different phrases that share a word


@dataclass(frozen=True)
class Phrases:
    """All phrases as tokens, without the padding that none of them needs."""

    ids: Tensor  # i64 [P, L]
    mask: Tensor


def phrases_of(tokenizer: Tokenizer, device: torch.device) -> Phrases:
    ids, mask = tokenizer(list(scenes.PHRASES))
    longest = int(mask.sum(1).max())
    return Phrases(ids[:, :longest].to(device), mask[:, :longest].to(device))


def make_batch(items: dict[str, Tensor], phrases: Phrases, device: torch.device) -> dict[str, Any]:
    """The network's batch, the targets of its queries, and what the probes read."""
    items = {name: tensor.to(device, non_blocking=True) for name, tensor in items.items()}
    images, asked = items["text"].shape
    image_ids = torch.arange(images, device=device).repeat_interleave(asked)
    text_ids = items["text"].flatten()
    named = items["named"][image_ids, :, text_ids]  # [B, T]
    query, thing = named.nonzero(as_tuple=True)
    example = items["example"].flatten()
    shown = named.gather(1, example.clamp(min=0)[:, None])[:, 0] & (example >= 0)
    return {
        "pixel_values": items["pixels"],
        "input_ids": phrases.ids,
        "attention_mask": phrases.mask,
        "image_ids": image_ids,
        "text_ids": text_ids,
        "exemplars": items["boxes"][image_ids, example.clamp(min=0)][:, None],
        "exemplar_labels": torch.where(shown, 1, PADDING)[:, None],
        "owner": items["owner"],
        "named": items["named"],
        "thing_boxes": items["boxes"],
        "targets": Targets(
            items["boxes"][image_ids[query], thing],
            named.sum(1),
            items["masks"][image_ids[query], thing],
        ),
    }
