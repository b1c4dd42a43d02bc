"""The generated scenes: what they say about themselves is true of their pixels."""

import hashlib

import numpy as np
import pytest

from sam3_lora.demo_base import scenes
from sam3_lora.tokenizer import Tokenizer, learn_merges, vocabulary

STYLES = {"easy": scenes.EASY, "full": scenes.FULL, "shifted": scenes.SHIFTED}


def some(style: scenes.Style, count: int = 60) -> list[scenes.Scene]:
    return [scenes.scene((5, i, 0), style) for i in range(count)]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_scene_is_a_function_of_its_seed(style: scenes.Style) -> None:
    def digest(seed: tuple[int, ...]) -> str:
        found = scenes.scene(seed, style)
        parts = [found.image, *(thing.mask for thing in found.things)]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    assert digest((1, 2, 3)) == digest((1, 2, 3))
    assert digest((1, 2, 3)) != digest((1, 2, 4))


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_boxes_are_tight_and_things_apart(style: scenes.Style) -> None:
    for found in some(style):
        assert 1 <= len(found.things) <= style.objects[1]
        covered = np.sum([thing.mask for thing in found.things], axis=0)
        assert covered.max() == 1
        for thing in found.things:
            x0, y0, x1, y1 = thing.corners
            assert thing.mask[y0:y1, x0:x1].sum() == thing.mask.sum()
            for edge in (thing.mask[y0], thing.mask[y1 - 1]):
                assert edge.any()
            for edge in (thing.mask[:, x0], thing.mask[:, x1 - 1]):
                assert edge.any()
            cx, cy, w, h = thing.box
            assert np.allclose(
                (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2),
                np.array(thing.corners) / scenes.SIZE,
            )


def test_the_pixels_have_the_colour_and_size_that_the_words_say() -> None:
    things = [(thing, found.image) for found in some(scenes.EASY, 150) for thing in found.things]
    names = list(scenes.COLOURS)
    palette = np.array(list(scenes.COLOURS.values()))
    for thing, image in things:
        bright = np.median(image[thing.mask][image[thing.mask].max(1) > 100], axis=0) / 255
        nearest = np.abs(palette - bright).sum(1).argmin()
        assert names[nearest] == thing.colour
    longest = {size: [max(thing.box[2:]) for thing, _ in things if thing.size == size]
               for size in scenes.SIZES}  # fmt: skip
    assert max(longest["small"]) < min(longest["large"])


def test_shapes_fill_their_boxes_as_their_outlines_do() -> None:
    share: dict[str, list[float]] = {shape: [] for shape in scenes.SHAPES}
    for found in some(scenes.EASY, 200):
        for thing in found.things:
            x0, y0, x1, y1 = thing.corners
            share[thing.shape].append(thing.mask.sum() / ((x1 - x0) * (y1 - y0)))
    means = {shape: np.mean(values) for shape, values in share.items()}
    # A turned box is larger: a little less than pi / 4, 1, 1 / 2, and 5 / 9 of the upright shapes.
    assert means["circle"] == pytest.approx(np.pi / 4, abs=0.03)
    assert means["square"] == pytest.approx(0.88, abs=0.06)
    assert means["triangle"] == pytest.approx(0.48, abs=0.04)
    assert means["cross"] == pytest.approx(0.53, abs=0.05)


def test_answers_are_the_things_with_all_words_of_a_phrase() -> None:
    blank = np.zeros((4, 4), bool)
    things = [
        scenes.Thing("circle", "red", "small", "plain", blank),
        scenes.Thing("circle", "red", "large", "striped", blank),
        scenes.Thing("square", "blue", "small", "striped", blank),
    ]
    found = scenes.Scene(np.zeros((4, 4, 3), np.uint8), things)
    assert found.answers("red circle") == [0, 1]
    assert found.answers("small shape") == [0, 2]
    assert found.answers("striped square") == [2]
    assert found.answers("small red circle") == [0]
    assert found.answers("blue circle") == []


def test_scenes_have_true_negatives_that_share_a_word_with_an_answer() -> None:
    for found in some(scenes.FULL, 20):
        answered = {p for p in scenes.PHRASES if found.answers(p)}
        words = {word for phrase in answered for word in phrase.split()}
        absent = [p for p in scenes.PHRASES if p not in answered]
        assert any(words & set(phrase.split()) for phrase in absent)


def test_the_other_domain_has_known_words_in_new_combinations() -> None:
    known = {word for phrase in scenes.PHRASES for word in phrase.split()}
    assert not set(scenes.PAIRS) & set(scenes.PHRASES)
    assert {word for phrase in scenes.PAIRS for word in phrase.split()} <= known


def test_the_other_domain_looks_different() -> None:
    def background(found: scenes.Scene) -> np.ndarray:
        return found.image[~np.any([thing.mask for thing in found.things], axis=0)] / 255

    def colourful(style: scenes.Style) -> float:
        return float(np.mean([np.ptp(background(s).mean(0)) for s in some(style)]))

    def rough(style: scenes.Style) -> float:
        return float(np.mean([background(s).std(0).mean() for s in some(style)]))

    assert colourful(scenes.SHIFTED) > 2 * colourful(scenes.FULL)
    assert rough(scenes.SHIFTED) > 1.5 * rough(scenes.FULL)


def test_every_word_is_one_token_of_the_small_vocabulary() -> None:
    merges = learn_merges(scenes.PHRASES)
    tokenizer = Tokenizer(vocabulary(merges), merges)
    assert [len(tokenizer.encode(phrase)) for phrase in scenes.PAIRS] == [3] * len(scenes.PAIRS)
