"""Questions that want tags have the form of Isaac's own demo, in training and in use."""

from __future__ import annotations

from isaac_texts import THINKING, small_tokenizer

from isaac_lora.answers.questions import asking_for, question_turns
from isaac_lora.answers.tags import Tag, write
from isaac_lora.conversations.records import Turn
from isaac_lora.conversations.template import render


def test_hint_picture_and_question_are_messages_of_their_own() -> None:
    answer = write([Tag("box", ((1, 2), (3, 4)), "rust")])
    turns = [*question_turns(asking_for(["rust", "dent"]), "box"), Turn("assistant", answer)]
    rendered = render(turns, small_tokenizer(THINKING), vision_token="<image>")
    spans = [rendered.text[start:end] for start, end in rendered.trained]
    assert spans == [f"<think>\n\n</think>\n\n{answer}<|im_end|>"]
    assert rendered.text == (
        "<|im_start|>user\n<hint>BOX</hint><|im_end|>\n"
        "<|im_start|>user\n<image><|im_end|>\n"
        "<|im_start|>user\nYour goal is to segment out the following categories: rust, dent"
        f"<|im_end|>\n<|im_start|>assistant\n{spans[0]}\n"
    )


def test_a_question_without_a_hint_wants_words() -> None:
    assert question_turns("What is nearest?") == (
        Turn("user", "<image>"),
        Turn("user", "What is nearest?"),
    )
    assert asking_for(["a", "{b}"], "Where is {categories}{x}?") == "Where is a, {b}{x}?"
