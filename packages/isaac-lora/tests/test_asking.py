"""Questions of a batch get the answers that each gets alone, with depth and without."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import taught_isaac
import torch
from taught_isaac import BOX, POINT, examples, processor, taught, world
from transformers import GenerationConfig

from isaac_lora import official
from isaac_lora.adapter_files import load_adapter
from isaac_lora.asking import answers, asked, end_tokens
from isaac_lora.depth.checkpoint import find_depth_checkpoint
from isaac_lora.depth.controls import ConstantDepth, ShuffledDepth
from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.frozen_features import FrozenFeatures
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from isaac_lora.prompts import Question, questions_of
from isaac_lora.vision_cache import VisionFeatures
from lora_core.errors import DataError, NumericError

MOST = 64
TRUTH = ["A car.", "It is near.", BOX, "Hi.", POINT]


def questions() -> list[Question]:
    return [question for example in examples() for question in questions_of(example)]


@cache
def adapted() -> Any:
    """The taught model without depth."""
    model = official.load_model(world() / "isaac_model").requires_grad_(False)
    load_adapter(model, taught())
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_what_was_learned_by_heart_is_answered(batch_size: int) -> None:
    found = answers(adapted(), processor(), questions(), max_new_tokens=MOST, batch_size=batch_size)
    assert found == TRUTH


def test_a_batch_is_answered_as_each_alone_and_in_its_order() -> None:
    mixed = questions()
    random.Random(1).shuffle(mixed)
    model = taught_isaac.base()  # its answers are chance, and any difference would show
    told: list[int] = []
    together = asked(model, processor(), mixed, max_new_tokens=8, batch_size=3, done=told.append)
    alone = [asked(model, processor(), [one], max_new_tokens=8)[0] for one in mixed]
    assert together == alone
    assert told == [3, 5]
    assert len({said.text for said in together}) > 3


def test_vision_features_in_place_of_patches_give_the_same_answers() -> None:
    model = adapted()
    features = VisionFeatures(model.model.vision_embedding[0], processor().rules)
    given = FrozenFeatures(features, None, 1.0, model.config.hidden_size)
    found = answers(model, processor(), questions(), max_new_tokens=MOST, features=given)
    assert found == TRUTH


def test_an_answer_that_does_not_end_is_said_to_be_cut() -> None:
    tokenizer, most = processor().tokenizer, 6
    said = asked(adapted(), processor(), questions(), max_new_tokens=most)
    whole = [len(tokenizer.encode(text)) < most for text in TRUTH]  # the end takes a token, too
    assert [one.ended for one in said] == whole
    assert set(whole) == {True, False}
    for one, text in zip(said, TRUTH, strict=True):
        assert text.startswith(one.text)
        assert (one.text == text) == one.ended


def test_settings_of_generation_in_the_folder_do_not_count() -> None:
    model = taught_isaac.base()
    plain = answers(model, processor(), questions()[:2], max_new_tokens=8)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2, eos_token_id=7
    )
    try:
        assert answers(model, processor(), questions()[:2], max_new_tokens=8) == plain
        assert model.generation_config.num_beams == 2
    finally:
        model.generation_config = before


def test_the_templates_end_and_the_models_own_end_an_answer() -> None:
    end = processor().tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = taught_isaac.base()
    before = model.config.eos_token_id
    try:
        for own, wanted in ((None, [end]), (5, [end, 5]), ([5, end], [end, 5])):
            model.config.eos_token_id = own
            assert end_tokens(model, processor()) == wanted
    finally:
        model.config.eos_token_id = before


def test_a_question_on_one_line_keeps_the_markers_that_stand_between_words() -> None:
    lines = [one.line for one in questions()]
    assert lines == [
        "Tell me.", "<image> or <image>?", "<hint>BOX</hint> What is where?", "Hello?",
        "And <image>?",
    ]  # fmt: skip


def test_nothing_is_asked() -> None:
    assert answers(adapted(), processor(), []) == []


def test_a_model_that_gives_nan_is_refused_with_the_question() -> None:
    model = official.load_model(world() / "isaac_model")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericError, match=r"hinted turn 2: .*NaN.*bf16"):
        answers(model, processor(), [questions()[2]], max_new_tokens=4)


# -- depth -----------------------------------------------------------------------------------------


@cache
def with_depth() -> Any:
    """The model that was taught with depth, as a user loads it."""
    model = IsaacForConditionalGeneration.from_pretrained(
        world() / "isaac_model",
        use_depth=True,
        depth_checkpoint_path=world() / "depth",
        depth_input_size=taught_isaac.depth_settings()["depth_input_size"],
    )
    load_adapter(model, taught(depth=True))
    return model.eval()


def test_the_models_own_depth_is_used() -> None:
    found = answers(with_depth(), processor(), questions(), max_new_tokens=MOST, batch_size=3)
    assert found == TRUTH


def test_depth_that_a_model_wants_is_never_left_out() -> None:
    nothing = FrozenFeatures(None, None, 1.0, with_depth().config.hidden_size)
    with pytest.raises(DataError, match="depth"):
        answers(with_depth(), processor(), questions(), features=nothing)


def depths(folder: Path) -> DepthGrids:
    checkpoint = find_depth_checkpoint(world() / "depth")
    return DepthGrids(checkpoint, taught_isaac.depth_settings()["depth_input_size"])


def test_controls_give_other_depth_of_the_same_shape(tmp_path: Path) -> None:
    own = depths(tmp_path)
    pictures = [picture for one in examples() for picture in one.pictures(processor().rules)]
    shuffled, constant = ShuffledDepth(own, pictures), ConstantDepth(own)
    known = {picture.content: picture for picture in pictures}
    assert len(known) == 4 < len(pictures)
    assert set(shuffled.other) == set(known)
    assert {other.content for other in shuffled.other.values()} == set(known)  # each once
    for content, picture in known.items():
        assert shuffled.other[content].content != content
        true = own.joined([own.part(picture)])
        other = shuffled.joined([shuffled.part(picture)])
        flat = constant.joined([constant.part(picture)])
        assert true.shape == other.shape == flat.shape == (picture.grid[0] * picture.grid[1],)
        assert not torch.equal(true, other)
        assert flat.unique().tolist() == [0.5]


def test_shuffling_needs_two_different_pictures(tmp_path: Path) -> None:
    [picture] = examples()[0].pictures(processor().rules)
    with pytest.raises(DataError, match="not two different pictures: leave out --shuffled_depth"):
        ShuffledDepth(depths(tmp_path), [picture, picture])


def test_the_depth_of_other_pictures_changes_what_the_model_says() -> None:
    own = with_depth().depth
    model = with_depth()
    pictures = [picture for one in examples() for picture in one.pictures(processor().rules)]
    from isaac_lora.validation import token_loss

    losses = []
    for source in (own, ShuffledDepth(own, pictures), ConstantDepth(own)):
        features = FrozenFeatures(None, source, model.config.depth_alpha, model.config.hidden_size)
        losses.append(token_loss(model, examples(), processor(), batch_size=4, features=features))
    assert losses[0] < 0.1
    assert losses[1] > losses[0] + 1e-3
    assert losses[2] > losses[0] + 1e-3
