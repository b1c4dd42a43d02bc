"""The committed tiny base is small, as good as its card says, and reads the words."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scenesplat_lora import demo, load_official
from scenesplat_lora.demo_base import rooms
from scenesplat_lora.language.zero_shot import label, probabilities
from scenesplat_lora.metrics import Confusion, final_scores
from scenesplat_lora.scenes.collate import collate
from scenesplat_lora.transforms import compose
from scenesplat_lora.transforms.pipeline import LANGUAGE_KEYS, validation_transforms

ROOMS = 8  # of the card's 50
MARGIN = 0.05  # the sample is a part of the card's, and machines round differently


@pytest.fixture(scope="module")
def base():
    return load_official(demo.base_checkpoint())


def scored(model, style: rooms.Style, texts) -> dict[str, float]:
    """Zero-shot figures over the voxels of held-out rooms."""
    steps = compose(validation_transforms(LANGUAGE_KEYS, rooms.GRID_SIZE))
    table = Confusion(rooms.CLASSES)
    for number, room in enumerate(rooms.held_out(ROOMS, style)):
        batch = collate([steps(room, np.random.default_rng(number))])
        with torch.no_grad():
            found = label(probabilities(model(batch), texts), texts.classes)
        table.add(batch["segment"].numpy(), found.numpy())
    return final_scores(table)


def card() -> dict[str, tuple[float, float]]:
    """Name in backquotes -> figures by day and by night, from the rows of the model card."""
    text = demo.base_checkpoint().with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(\w+)`\s*\| ([\d.]+) \| ([\d.]+) \|", text)
    return {name: (float(day), float(night)) for name, day, night in rows}


def test_file_is_half_precision_and_at_most_four_megabytes() -> None:
    assert demo.base_checkpoint().stat().st_size <= 4_000_000
    kinds = {tensor.dtype for tensor in load_file(demo.base_checkpoint()).values()}
    assert kinds == {torch.float16, torch.int64}  # the counters of batch norms


def test_held_out_rooms_score_as_the_card_says(base) -> None:
    texts = demo.texts()
    day, night = (scored(base, style, texts) for style in (rooms.DAY, rooms.NIGHT))
    for name, figures in card().items():
        assert day[name] == pytest.approx(figures[0], abs=MARGIN)
        assert night[name] == pytest.approx(figures[1], abs=2 * MARGIN)  # of few rooms, it varies
    assert day["mIoU"] >= 0.8
    assert 0.2 <= night["mIoU"] <= 0.6  # another domain, of which the base sees something


def test_other_words_in_the_same_rooms_find_other_things(base) -> None:
    texts = demo.texts()
    turned = texts.features.roll(1, 0)  # every word gets the vector of its neighbour
    assert scored(base, rooms.DAY, type(texts)(texts.names, turned, texts.classes))["mIoU"] < 0.1
