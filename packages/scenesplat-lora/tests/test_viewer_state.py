"""What the viewer shows for a choice and a query, without a window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import use_fixtures as made
import viewer_scenes
from made_scenes import made_scene

from lora_core.errors import DataError
from scenesplat_lora.labelling import Labelling
from scenesplat_lora.language.text_embeddings import text_embeddings
from scenesplat_lora.picture import NO_LABEL, class_colours, label_colours
from scenesplat_lora.scene_features import scene_features
from scenesplat_lora.viewer_state import HEAT, ViewerState, covariances, some_rows, words_of

TRUE = np.arange(90) // 2 % 3


def tower(words: Sequence[str]) -> torch.Tensor:
    """A text tower that knows lights, and takes all else for walls."""
    return torch.stack([torch.eye(3, 6)[2 if "light" in word else 0] for word in words])


# -- choices ---------------------------------------------------------------------------------------


def test_choices_are_what_the_scene_has() -> None:
    state = viewer_scenes.state()
    assert state.choices() == ["prediction", "colours", "labels", "query"]
    bare = ViewerState({k: v for k, v in state.scene.items() if k != "segment"}, (), TRUE)
    assert bare.choices() == ["colours"]
    state.scene["segment"][0] = 3  # a class without a name
    assert state.choices() == ["prediction", "colours", "query"]


def test_labels_have_the_colours_of_their_classes_and_a_legend() -> None:
    state = viewer_scenes.state()
    state.prediction[:5] = -1
    shown = state.show("prediction")
    assert np.array_equal(shown.colours, label_colours(state.prediction, 3))
    assert shown.colours[0].tolist() == list(NO_LABEL)
    named = [(entry.name, entry.rows) for entry in shown.legend]
    assert named == [("lamp", 29), ("wall", 28), ("floor", 28)]
    assert list(shown.legend[0].colour) == class_colours(3)[2].tolist()
    assert np.array_equal(state.show("labels").colours, label_colours(TRUE, 3))
    assert np.array_equal(state.show("colours").colours, state.scene["color"].astype(np.uint8))


# -- queries ---------------------------------------------------------------------------------------


def test_one_word_gives_heat_where_it_is() -> None:
    shown = viewer_scenes.state().show("query", " Lamp ")
    assert shown.labels is None
    assert (shown.colours[TRUE == 2] == HEAT[-1]).all()
    assert (shown.colours[TRUE != 2] == HEAT[0]).all()
    assert shown.caption.startswith("likeness to 'Lamp'")


def test_several_words_label_anew() -> None:
    state = viewer_scenes.state()
    shown = state.show("query", "lamp, floor")
    assert shown.labels is not None
    assert np.array_equal(shown.labels, np.where(TRUE == 2, 0, 1))  # walls are a little like floor
    assert [(e.name, e.rows) for e in shown.legend] == [("floor", 60), ("lamp", 30)]
    other = state.show("query", "wall, floor").labels
    assert not np.array_equal(other, shown.labels)


def test_any_words_go_through_the_text_tower_and_classes_do_not() -> None:
    asked: list[list[str]] = []

    def listening(words: Sequence[str]) -> torch.Tensor:
        asked.append(list(words))
        return tower(words)

    state = viewer_scenes.state(embed=listening)
    shown = state.show("query", "bright light, floor, brick")
    assert asked == [["bright light", "brick"]]
    assert shown.labels is not None
    assert np.array_equal(shown.labels, np.array([2, 1, 0])[TRUE])


def test_words_without_a_vector_are_told_together() -> None:
    with pytest.raises(
        DataError, match=r"'flor' is no class.*'floor'.*'sky' is no class.*--siglip"
    ):
        viewer_scenes.state().show("query", "flor, lamp, sky")


def test_a_segmentation_model_has_no_query() -> None:
    with pytest.raises(DataError, match="segmentation model"):
        viewer_scenes.state(features=None).show("query", "lamp")


def test_a_class_of_several_texts_has_their_mean() -> None:
    text = text_embeddings(["a", "b"], torch.eye(3), [0, 0, 1])
    vectors = viewer_scenes.state(text=text).vectors(["b", "A"])
    assert torch.allclose(vectors, torch.tensor([[0, 0, 1], [0.5**0.5, 0.5**0.5, 0]]))


@pytest.mark.parametrize(
    ("query", "words"),
    [("a", ["a"]), (" a ,b,, a ", ["a", "b"]), ("office chair,Rug", ["office chair", "Rug"])],
)
def test_words_stand_between_commas(query: str, words: list[str]) -> None:
    assert words_of(query) == words


@pytest.mark.parametrize("query", ["", " , ", ",".join(map(str, range(65)))])
def test_no_words_and_too_many_are_refused(query: str) -> None:
    with pytest.raises(DataError, match="word"):
        words_of(query)


# -- features --------------------------------------------------------------------------------------


def test_similarity_is_the_mean_cosine_of_the_fragments() -> None:
    scene = made_scene(400) | {"name": "a"}
    how = Labelling(0.05, 0.3)
    found = scene_features(made.model(), scene, how)
    texts = made.texts().features
    similarity = found.similarity(texts)
    assert similarity.shape == (400, 5)
    assert np.allclose(
        similarity, (found.cells.float() @ texts.T).numpy()[found.inverse], atol=1e-6
    )
    lengths = found.cells.float().norm(dim=1)
    assert (lengths <= 1.001).all()
    assert (lengths > 0.5).all()
    rows = np.array([7, 3, 3, 399])
    assert np.array_equal(found.take(rows).similarity(texts), similarity[rows])
    with pytest.raises(DataError, match="of different models"):
        found.similarity(texts[:, :7])


# -- what is drawn ---------------------------------------------------------------------------------


def test_covariances_turn_the_axes() -> None:
    half = 0.5**0.5
    scene = {
        "quat": np.array([[1, 0, 0, 0], [half, 0, 0, half]], np.float32),  # about z by 90 degrees
        "scale": np.array([[1, 2, 3], [1, 2, 3]], np.float32),
    }
    found = covariances(scene)
    assert np.allclose(found[0], np.diag([1, 4, 9]))
    assert np.allclose(found[1], np.diag([4, 1, 9]), atol=1e-6)


def test_a_large_scene_is_thinned_the_same_each_time() -> None:
    scene = made_scene(100)
    rows = some_rows(scene, 10)
    assert len(set(rows)) == 10
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, some_rows(scene, 10))
    assert np.array_equal(some_rows(scene, 100), np.arange(100))
    state = viewer_scenes.state()
    part = state.take(np.array([4, 2, 60]))
    assert part.prediction.tolist() == TRUE[[4, 2, 60]].tolist()
    assert np.array_equal(
        part.show("query", "lamp, wall").colours,
        state.show("query", "lamp, wall").colours[[4, 2, 60]],
    )
