"""What a run measures: the loss over all tokens, scores of answers, and pictures of them."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taught_isaac
import torch
from taught_isaac import BOX, config, examples, processor, taught, world

from isaac_lora import data, official, validation
from isaac_lora.adapter_files import load_adapter
from isaac_lora.asking import features_of_model
from isaac_lora.conversations.records import Turn
from isaac_lora.frozen_features import FrozenFeatures
from isaac_lora.prompts import Question, questions_of
from isaac_lora.validation import evaluation, scores, spread, token_loss
from isaac_lora.vision_cache import VisionFeatures
from lora_core.errors import NumericError


@cache
def adapted() -> Any:
    model = official.load_model(world() / "isaac_model").requires_grad_(False)
    load_adapter(model, taught())
    return model.eval()


def plain() -> FrozenFeatures:
    return features_of_model(adapted())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_weighs_every_token_the_same(batch_size: int) -> None:
    model = taught_isaac.base()
    found = token_loss(
        model, examples(), processor(), batch_size=batch_size, features=features_of_model(model)
    )
    total, tokens = 0.0, 0
    for example in examples():
        sample = data.TrainSet([], processor()).sample(example)
        batch = data.collate([[sample]], processor())
        inputs = features_of_model(model).inputs(batch)
        with torch.no_grad():
            mean = float(model(**inputs).loss)
        total += mean * sample["sample"].num_label_tokens
        tokens += sample["sample"].num_label_tokens
    assert found == pytest.approx(total / tokens, abs=1e-5)


def test_vision_features_give_the_loss_of_patches() -> None:
    model = adapted()
    tower = VisionFeatures(model.model.vision_embedding[0], processor().rules)
    losses = [
        token_loss(model, examples(), processor(), batch_size=4, features=features)
        for features in (plain(), replace(plain(), vision=tower))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_measuring_gives_the_negative_loss_first_and_the_scores_of_all_answers() -> None:
    measure, draw = evaluation(config(), examples(), processor(), plain())
    assert measure
    assert draw
    found = measure(adapted())
    assert list(found)[:2] == ["minus_loss", "loss"]
    assert found["minus_loss"] == -found["loss"] > -0.1
    expected = {"exact_match": 1, "anls": 1, "box_iou": 1, "box_f1": 1, "pointing_accuracy": 1}
    assert expected.items() <= found.items()
    assert found["damaged_tags"] == found["point_distance"] == 0
    before = measure(taught_isaac.base())
    assert before["loss"] > 5
    assert before["exact_match"] == before["box_iou"] == 0


def test_an_adapter_that_is_switched_off_measures_as_the_base() -> None:
    from lora_core import adapters_off

    measure, _ = evaluation(config(), examples(), processor(), plain())
    assert measure
    with adapters_off(adapted()):
        assert measure(adapted()) == measure(taught_isaac.base())


def test_there_is_nothing_to_measure_without_conversations() -> None:
    assert evaluation(config(), [], processor(), plain()) == (None, None)


def test_without_questions_there_is_the_loss_alone() -> None:
    cfg = config(eval_generate_samples=0)
    measure, draw = evaluation(cfg, examples(), processor(), plain())
    assert measure
    assert draw
    assert list(measure(adapted())) == ["minus_loss", "loss"]
    draw(1)


def test_so_many_questions_are_answered_from_all_over_the_set() -> None:
    all_of_them = [question for one in examples() for question in questions_of(one)]
    chosen = spread(all_of_them, 2)
    assert chosen == [all_of_them[0], all_of_them[2]]
    assert spread(all_of_them, 99) == all_of_them
    assert spread(all_of_them, 0) == spread([], 5) == []


def test_a_loss_that_is_not_finite_names_its_conversations() -> None:
    model = official.load_model(world() / "isaac_model")
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    with pytest.raises(NumericError, match=r"(one|two|hinted|talk): the loss is not finite"):
        token_loss(model, examples(), processor(), batch_size=1, features=features_of_model(model))


def test_distances_are_in_the_last_picture_before_the_answer() -> None:
    """A point far off along the longer side is farther than one along the shorter side."""
    example = examples()[1]  # two pictures, (20, 24) and (24, 20)
    turns = (example.conversation.turns[0], Turn("assistant", "<point> (0,0) </point>"))
    asked = Question(replace(example, conversation=replace(example.conversation, turns=turns)), 1)
    down, right = (
        scores([asked], [f"<point> {place} </point>"])["point_distance"]
        for place in ("(0,1000)", "(1000,0)")
    )
    assert down == pytest.approx(24 / np.hypot(20, 24))
    assert right == pytest.approx(20 / np.hypot(20, 24))


# -- pictures --------------------------------------------------------------------------------------


class Album:
    """Takes pictures as `RunLog` does."""

    shows_pictures = True

    def __init__(self) -> None:
        self.pages: list[tuple[str, Any, int]] = []

    def picture(self, tag: str, rgb: Any, step: int) -> None:
        self.pages.append((tag, rgb, step))


def test_answers_are_shown_beside_their_pictures_with_those_before_training() -> None:
    album: Any = Album()
    measure, draw = evaluation(config(), examples(), processor(), plain(), album)
    assert measure
    assert draw
    measure(taught_isaac.base())
    draw(0)
    assert album.pages == []
    measure(adapted())
    draw(7)
    names = [name for name, _, _ in album.pages]
    assert names == ["one turn 1", "two turn 1", "hinted turn 2", "talk turn 1"]
    assert {step for _, _, step in album.pages} == {7}
    assert all(page.dtype == np.uint8 and page.ndim == 3 for _, page, _ in album.pages)
    widths = [page.shape[1] for _, page, _ in album.pages]
    measure, draw = evaluation(config(), examples(), processor(), plain(), album)
    assert measure
    assert draw
    measure(adapted())  # a resumed run, which does not know what was said before training
    draw(9)
    later = [page.shape[1] for _, page, _ in album.pages[4:]]
    assert [after < before for after, before in zip(later, widths, strict=True)] == [
        False, False, True, False  # base, LoRA and truth have panels where one of them has tags
    ]  # fmt: skip


def test_a_run_log_without_tensorboard_costs_no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    from isaac_lora.answers import page

    album: Any = Album()
    album.shows_pictures = False
    monkeypatch.setattr(page, "page_of", lambda *_: pytest.fail("a page was drawn"))
    measure, draw = evaluation(config(), examples(), processor(), plain(), album)
    assert measure
    assert draw
    measure(adapted())
    draw(3)


def test_a_page_has_panels_for_each_answer_and_all_words(tmp_path: Path) -> None:
    from isaac_lora.answers.page import page, page_of

    question = questions_of(examples()[2])[0]
    one = page_of(question, [("LoRA", BOX)], processor())
    two = page_of(question, [("base", "?"), ("LoRA", BOX)], processor())
    assert two.shape[1] > one.shape[1]
    [picture] = [picture.read() for picture in question.pictures(processor())]
    half = page([picture], "?", [("LoRA", BOX)])
    other = page([picture], "?", [("LoRA", BOX.replace("car", "dog"))])
    assert half.shape == other.shape
    assert not np.array_equal(half, other)
    longer = page([picture], "word " * 300, [("LoRA", BOX)])
    assert longer.shape[0] > half.shape[0]
    endless = page([picture], "word " * 30_000, [("LoRA", "x" * 100_000)])
    assert endless.shape[0] < 3 * half.shape[0]


def test_a_tag_is_drawn_on_the_picture_that_it_names_or_else_on_the_last() -> None:
    from isaac_lora.answers.page import page

    pictures = [np.full((32, 32, 3), 128, np.uint8)] * 2
    empty = page(pictures, "?", [("LoRA", "x")])
    middle = slice(0, empty.shape[0] // 2), slice(empty.shape[0] // 2, None)

    def changed(tag: str) -> list[bool]:
        drawn = page(pictures, "?", [("LoRA", tag)])
        grey = (drawn == 128).all(-1)
        return [grey[part].sum() != (empty == 128).all(-1)[part].sum() for part in middle]

    assert changed('<point asset_idx="0"> (500,500) </point>') == [True, False]
    assert changed('<point asset_idx="1"> (500,500) </point>') == [False, True]
    assert changed("<point> (500,500) </point>") == [False, True]
    assert validation.PICTURES == 4
