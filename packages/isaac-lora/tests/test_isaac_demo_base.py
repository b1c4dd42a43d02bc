"""The committed tiny base answers as its card says, and its depth model sees what it does not."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from isaac_lora import demo, demo_run, official
from isaac_lora.asking import answers
from isaac_lora.conversations.tokenizer_files import load_tokenizer
from isaac_lora.demo_questions import KINDS, Question, questions, words
from isaac_lora.demo_scenes import HEIGHT, RIBS, SIZES, WIDTH, Style, scene
from isaac_lora.depth.estimator import read_depth_estimator
from isaac_lora.processing import IsaacProcessor
from isaac_lora.prompts import questions_of
from isaac_lora.question_options import QuestionOptions
from lora_core.demo_folder import words as command

SCENES = 20  # of the card's 200
MARGIN = 0.1  # of shares of so few
HELD_OUT = 7  # seed of the scenes of the card
STYLES = {"sizes": SIZES, "ribs": RIBS}
ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> IsaacProcessor:
    return IsaacProcessor.from_pretrained(demo.base(demo.MODEL))


@pytest.fixture(scope="module")
def card() -> dict[str, tuple[float, float]]:
    """Kind of question -> share of right answers of both styles, from the model card."""
    text = demo.base(demo.MODEL).with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(\w+)`\s*\| ([\d.]+) \| ([\d.]+) \|", text)
    return {name: (float(sizes), float(ribs)) for name, sizes, ribs in rows}


def accuracy(processor: IsaacProcessor, folder: Path, style: Style) -> dict[str, float]:
    """Share of right answers by kind of question, as `isaac-lora evaluate` asks them."""
    scenes = {f"{n:03}": scene((HELD_OUT, n), style) for n in range(SCENES)}
    asked: list[Question] = [one for made in scenes.values() for one in questions(made)]
    path = demo.write_split(folder, "unseen", scenes, questions)
    options = QuestionOptions(
        model_path=str(demo.base(demo.MODEL)),
        data_path=str(path),
        image_folder=str(folder / demo.IMAGES),
        output=str(folder / "out"),
    )
    found = [
        one for example in options.conversations(processor, True) for one in questions_of(example)
    ]
    model = official.load_model(demo.base(demo.MODEL))
    said = answers(model, processor, found, max_new_tokens=4, batch_size=100)
    right: dict[str, list[bool]] = defaultdict(list)
    for question, text in zip(asked, said, strict=True):
        right[question.kind].append(text == question.answer)
    assert set(right) == set(KINDS)
    return {kind: float(np.mean(values)) for kind, values in right.items()}


@pytest.mark.parametrize("style", STYLES)
def test_unseen_pictures_are_answered_as_the_card_says(processor, card, tmp_path, style) -> None:
    found = accuracy(processor, tmp_path, STYLES[style])
    for kind, share in found.items():
        assert share == pytest.approx(card[kind][list(STYLES).index(style)], abs=MARGIN), kind
    if style == "ribs":
        assert found["nearest"] < 0.5  # of three boxes: what depth is for


def test_the_depth_model_orders_boxes_by_their_ribs(card) -> None:
    estimator = read_depth_estimator(demo.base(demo.DEPTH), demo.DEPTH_INPUT)
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    ordered = []
    for number in range(40):
        one = scene((HELD_OUT, number), RIBS)
        square = estimator.normalised(one.picture())[None, None]
        depth = torch.nn.functional.interpolate(square, (HEIGHT, WIDTH), mode="bilinear")[0, 0]
        means = []
        for box in one.boxes:
            inside = (abs(x - box.centre[0]) < box.half - 1) & (abs(y - box.centre[1]) < box.half)
            means.append(depth.numpy()[inside].mean())
        ordered.append(
            np.argsort(means).tolist() == np.argsort([b.nearness for b in one.boxes]).tolist()
        )
    assert np.mean(ordered) == pytest.approx(card["ordered"][1], abs=MARGIN)


# -- files -----------------------------------------------------------------------------------------


def test_the_folders_are_small_and_hold_half_precision() -> None:
    files = [path for name in (demo.MODEL, demo.DEPTH) for path in demo.base(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    for name in (demo.MODEL, demo.DEPTH):
        tensors = load_file(demo.base(name) / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_the_tokenizer_has_the_added_tokens_of_isaac_in_their_order() -> None:
    tokenizer = load_tokenizer(demo.base(demo.MODEL))
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    assert tuple(name for name, _ in added) == ADDED
    assert [index - added[0][1] for _, index in added] == list(range(len(ADDED)))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    for text in ("é ∆ 漢", "no word of ours"):  # bytes, where there is no word
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_answer_is_one_token_and_no_word_is_in_pieces() -> None:
    tokenizer = load_tokenizer(demo.base(demo.MODEL))
    for text in words():
        tokens = tokenizer.tokenize(text)
        assert len(tokens) == len(text.split(" ")) + text.count("?"), text


def test_the_demo_names_the_depth_settings_of_the_depth_model(tmp_path: Path) -> None:
    config = json.loads((demo.base(demo.DEPTH) / "config.json").read_text())
    assert config["backbone_config"]["image_size"] == demo.DEPTH_INPUT
    said = command(demo_run.depth_of(tmp_path))
    assert said[said.index("--depth_input_size") + 1] == str(demo.DEPTH_INPUT)
