"""The committed tiny base is small, as good as its card says, and does what the phrase asks.

The pictures come from the generator that trained it, by a seed that training never used.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from lora_core.data_file import read_json
from sam3_lora import Predictor, demo, evaluate
from sam3_lora.demo_base import scenes
from sam3_lora.model import load, tokenizer

PICTURES = 30  # of the card's 200
MARGIN = 0.06  # the sample is a part of the card's, and machines round differently


@pytest.fixture(scope="module")
def predictor():
    return Predictor.load(demo.base_checkpoint())


def scored(predictor, folder, style, count=PICTURES):
    """Figures of the evaluation command on held-out pictures, asked for all pretrained phrases."""
    demo.write_pictures(folder, scenes.held_out(count, style), scenes.PHRASES)
    options = evaluate.Options(
        img_folder=str(folder),
        checkpoint=str(demo.base_checkpoint()),
        max_negatives=len(scenes.PHRASES),
        absent_images=0,
        output=str(folder / "evaluation"),
    )
    pictures = evaluate.ready(options)
    val = pictures.set_for((scenes.SIZE, scenes.SIZE))
    result = evaluate.measured(predictor, "model", val, pictures, options)
    figures = result.figures
    return {"f1": result.calibration.f1_at_half, "false_fire": figures["IL_FPR"], **figures}


@pytest.fixture(scope="module")
def figures(predictor, tmp_path_factory):
    return scored(predictor, tmp_path_factory.mktemp("held_out"), scenes.FULL)


def card() -> dict[str, float]:
    """Name in backquotes -> figure of held-out pictures, from the rows of the model card."""
    text = demo.base_checkpoint().with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    return {name: float(value) for name, value in re.findall(r"`(\w+)`\s*\| ([\d.]+) \|", text)}


def test_file_is_half_precision_and_at_most_four_megabytes() -> None:
    assert demo.base_checkpoint().stat().st_size <= 4_000_000
    assert {tensor.dtype for tensor in load_file(demo.base_checkpoint()).values()} == {
        torch.float16
    }


def test_its_vocabulary_and_its_architecture_belong_together() -> None:
    network = load(demo.base_checkpoint())
    words = tokenizer(network)
    config = read_json(demo.base_checkpoint().with_suffix(".json"))["text_config"]
    ids, mask = words(list(scenes.PHRASES))
    assert int(ids.max()) == config["eos_token_id"] == config["vocab_size"] - 1
    assert (ids[:, 0] == config["bos_token_id"]).all()
    assert int(mask.sum(1).max()) <= 5  # start, at most three words, end: every word is one token


@pytest.mark.parametrize("name", ["f1", "segm_mAP", "bbox_mAP", "cgF1", "false_fire"])
def test_held_out_pictures_score_as_the_card_says(figures, name: str) -> None:
    assert figures[name] == pytest.approx(card()[name], abs=MARGIN)


def test_base_is_useful(figures) -> None:
    assert figures["f1"] >= 0.8
    assert figures["false_fire"] <= 0.05


def test_the_other_domain_is_harder(predictor, figures, tmp_path) -> None:
    other = scored(predictor, tmp_path, scenes.SHIFTED, 10)
    assert other["segm_mAP"] < figures["segm_mAP"] - 0.2


def test_another_phrase_finds_another_object(predictor) -> None:
    obeyed = []
    for scene in scenes.held_out(20):
        predictor.set_image(scene.image)
        asked = {f"{thing.colour} {thing.shape}": thing for thing in scene.things}
        once = [phrase for phrase in asked if len(scene.answers(phrase)) == 1]
        for found in predictor.predict(once) if once else []:
            own = asked[found.phrase].mask
            overlaps = [(mask & own).sum() / (mask | own).sum() for mask in found.masks]
            obeyed.append(len(overlaps) == 1 and overlaps[0] > 0.5)
    assert len(obeyed) > 30
    assert sum(obeyed) / len(obeyed) >= 0.8
