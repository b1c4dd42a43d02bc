"""Validation asks what training has taught: the same tokens up to each answer."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from isaac_texts import THINKING, record, small_tokenizer, write_picture, write_records
from recorded_isaac import recorded_model

from isaac_lora import data
from isaac_lora.config import Config
from isaac_lora.conversations.samples import IGNORED
from isaac_lora.examples import Example
from isaac_lora.processing import IsaacProcessor
from isaac_lora.prompts import prompts, questions_of
from lora_core.errors import DataError


@cache
def small(template: str | None = None) -> IsaacProcessor:
    tokenizer = small_tokenizer(template)
    return IsaacProcessor(tokenizer, patch_size=4, max_num_patches=64, min_num_patches=16)


def load(folder: Path, value: dict[str, Any]) -> Example:
    for number, size in enumerate(((23, 31), (9, 6))):
        write_picture(folder / f"{number}.png", *size, number)
    path = write_records(folder / "d.json", [value])
    cfg = Config(
        model_path="m", data_path=str(path), image_folder=str(folder), output_dir=str(folder / "r")
    )
    return data.load(cfg, small()).train[0]


def chat() -> dict[str, Any]:
    said = [
        ("gpt", "Hello."), ("human", "<image>?"), ("gpt", "A car."), ("human", "<image> too?"),
        ("gpt", "No."), ("human", "Why?"),
    ]  # fmt: skip
    turns = [{"from": name, "value": text} for name, text in said]
    return {"id": "ex", "conversations": turns, "images": ["0.png", "1.png"]}


def test_every_answer_that_something_stands_before_is_asked_for(tmp_path: Path) -> None:
    example = load(tmp_path, chat())
    first, second = questions_of(example)
    assert (first.text, first.answer) == ("<image>?", "A car.")
    assert (second.text, second.answer) == ("<image> too?", "No.")
    assert [len(one.pictures(small())) for one in (first, second)] == [1, 2]
    assert [first.key, second.key] == ["ex turn 2", "ex turn 4"]


def test_a_question_is_the_training_sample_up_to_the_answer(tmp_path: Path) -> None:
    example = load(tmp_path, chat())
    whole = example.outline(small())
    learned = whole.labels != IGNORED
    starts = [0, *(1 + (learned[1:] & ~learned[:-1]).nonzero()[:, 0]).tolist()]
    for question, start in zip(questions_of(example), starts[-2:], strict=True):
        asked = question.outline(small())
        assert torch.equal(asked.input_ids, whole.input_ids[:start])
        assert torch.equal(asked.image_mask, whole.image_mask[:start])
        assert (asked.labels == IGNORED).all()


def test_questions_of_a_batch_are_answered_as_each_alone(tmp_path: Path) -> None:
    questions = questions_of(load(tmp_path, chat()))
    model = recorded_model()

    def answers(some: list[Any]) -> list[list[int]]:
        batch = prompts(some, small())
        out = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
        return out[:, batch["input_ids"].shape[1] :].tolist()

    assert answers(questions) == [*answers(questions[:1]), *answers(questions[1:])]
    pictures = prompts(questions, small(), keep_pictures=True)["pictures"]
    assert [picture.shape[:2] for picture in pictures] == [(23, 31), (23, 31), (9, 6)]
    with pytest.raises(DataError, match="no samples"):
        prompts([], small())


def test_a_thinking_model_is_asked_to_begin_its_answer(tmp_path: Path) -> None:
    value = record(answer="<think>\nhm\n</think>\n\nYes.")
    value["conversations"].insert(0, {"from": "human", "value": "<hint>BOX</hint>"})
    [question] = questions_of(load(tmp_path, value))
    assert question.text == "<hint>BOX</hint>\nWhat is it?"
    ids = question.outline(small(THINKING)).input_ids
    assert small_tokenizer().decode(ids).endswith("What is it?<|im_end|>\n<|im_start|>assistant\n")
