"""What the viewer shows: the colours of Gaussians for a choice and a query. No windows here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import DataError, near, one_line
from scenesplat_lora.language.text_embeddings import TextEmbeddings
from scenesplat_lora.picture import class_colours, label_colours
from scenesplat_lora.scene_features import SceneFeatures
from scenesplat_lora.scenes.scene import Scene, take_rows

COLOURS, PREDICTION, TRUTH, QUERY = "colours", "prediction", "labels", "query"
MOST_WORDS = 64  # of one query
# Viridis at 0, 1/4, 1/2, 3/4 and 1.
HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
OUTSIDE = 1.0  # percent of the Gaussians on either side of the range of heat

Colour = tuple[int, int, int]


class Entry(NamedTuple):
    """A line of a legend: a name, its colour, and how many Gaussians are of it."""

    name: str
    colour: Colour
    rows: int


class Shown(NamedTuple):
    """What is on the screen.

    Attributes:
        colours: uint8 [N, 3]. labels: int64 [N], classes or words, -1: none; None: no labels.
        caption: what the colours mean. legend: the most frequent name first.
    """

    colours: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    caption: str
    legend: list[Entry]


@dataclass(frozen=True)
class ViewerState:
    """A scene, what the network says of it, and how texts become vectors.

    Attributes:
        scene: its Gaussians, and `segment` if it is known.
        names: of the classes.
        prediction: int64 [N], the class of every Gaussian; -1: none.
        features: of a language model; None: there is nothing to compare a query with.
        text: the vectors of the classes; None: they have none.
        embed: unit vectors [P, D] of any names, by a text tower; None: only classes are known.
    """

    scene: Scene
    names: tuple[str, ...]
    prediction: NDArray[np.int64]
    features: SceneFeatures | None = None
    text: TextEmbeddings | None = None
    embed: Callable[[Sequence[str]], Tensor] | None = None

    def choices(self) -> list[str]:
        """What can be shown, the best first view before the others."""
        truth = self.scene.get("segment", np.array([-1]))
        fits = bool((truth >= 0).any()) and int(truth.max()) < len(self.names)
        asks = [QUERY] if self.features is not None else []
        return [*([PREDICTION] if self.names else []), COLOURS, *([TRUTH] if fits else []), *asks]

    def take(self, rows: NDArray[np.int64]) -> ViewerState:
        """The same for some Gaussians only, in the order of `rows`."""
        return replace(
            self,
            scene=take_rows(self.scene, rows),
            prediction=self.prediction[rows],
            features=self.features and self.features.take(rows),
        )

    def show(self, choice: str, query: str = "") -> Shown:
        """The colours for one of `choices`.

        Args:
            query: words, separated by commas, for the choice "query": one gives its heat map,
                several give every Gaussian the nearest of them.

        Raises:
            DataError: no words, or one without a vector.
        """
        if choice == PREDICTION:
            return labelled(self.prediction, self.names, "the nearest class of each Gaussian")
        if choice == TRUTH:
            return labelled(self.scene["segment"], self.names, "labels of the data")
        if choice == QUERY:
            return self._answer(words_of(query))
        rgb = np.asarray(self.scene["color"]).round().clip(0, 255).astype(np.uint8)
        return Shown(rgb, None, "the scene's own colours", [])

    def _answer(self, words: list[str]) -> Shown:
        if self.features is None:
            raise DataError("a segmentation model has no language features to compare words with")
        similarity = self.features.similarity(self.vectors(words))
        if len(words) == 1:
            return heat(similarity[:, 0], words[0])
        nearest: NDArray[np.int64] = similarity.argmax(axis=1)
        return labelled(nearest, words, "the nearest word of each Gaussian")

    def vectors(self, words: Sequence[str]) -> Tensor:
        """Unit vectors of words, float32 [P, D]: of classes those of --text, else by the tower.

        Raises:
            DataError: words that are no classes, without a tower; all of them.
        """
        made = {name.casefold(): vector for name, vector in self._class_vectors()}
        foreign = [word for word in words if word.casefold() not in made]
        if foreign and self.embed is None:
            raise DataError(
                "; ".join(_unknown(word, self.names) for word in foreign)
                + ". Other words need the text tower: start with --siglip"
            )
        if foreign and self.embed is not None:
            tower = self.embed(foreign)
            made |= {word.casefold(): row for word, row in zip(foreign, tower, strict=True)}
        return torch.stack([made[word.casefold()] for word in words])

    def _class_vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and unit vectors of the classes: the mean of a class's texts, of length 1."""
        if self.text is None:
            return
        for number, name in enumerate(self.text.names):
            own = [prompt for prompt, c in enumerate(self.text.classes) if c == number]
            yield name, F.normalize(self.text.features[own].mean(dim=0), dim=0)


def _unknown(word: str, names: Sequence[str]) -> str:
    hint = near(word, names)
    return f"{one_line(word)!r} is no class" + (f" ({hint})" if hint else "")


def words_of(query: str) -> list[str]:
    """The words between the commas of a query, each once.

    Raises:
        DataError: none, or too many.
    """
    parts = (part.strip() for part in query.split(","))
    words = list({part.casefold(): part for part in parts if part}.values())
    if not words:
        raise DataError("type a word, or several with commas between them")
    if len(words) > MOST_WORDS:
        raise DataError(f"{len(words)} words: at most {MOST_WORDS}")
    return words


def labelled(labels: NDArray[np.integer], names: Sequence[str], caption: str) -> Shown:
    """The colours of labels; -1 is grey."""
    count = np.bincount(labels[labels >= 0], minlength=len(names))
    rgb = class_colours(len(names)).tolist()
    order = np.argsort(-count, kind="stable")
    legend = [Entry(names[c], (rgb[c][0], rgb[c][1], rgb[c][2]), int(count[c])) for c in order]
    shown = [entry for entry in legend if entry.rows]
    return Shown(label_colours(labels, len(names)), labels.astype(np.int64), caption, shown)


def heat(similarity: NDArray[np.float32], word: str) -> Shown:
    """Colours of a similarity [N], from dark (the 1st percentile) to bright (the 99th)."""
    low, high = np.percentile(similarity, (OUTSIDE, 100 - OUTSIDE))
    share = np.clip((similarity - low) / max(high - low, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    rgb = np.stack([np.interp(share, stops, HEAT[:, i]) for i in range(3)], axis=1)
    caption = f"likeness to {word!r}: {low:.3f} (dark) to {high:.3f} (bright)"
    return Shown(rgb.round().astype(np.uint8), None, caption, [])


def some_rows(scene: Scene, most: int, seed: int = 0) -> NDArray[np.int64]:
    """At most so many rows of a scene, drawn at random, in their order."""
    rows = len(scene["coord"])
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def covariances(scene: Scene) -> NDArray[np.float32]:
    """R diag(s^2) R^T of every Gaussian, f32 [N, 3, 3], square metres."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_quat(scene["quat"], scalar_first=True).as_matrix()
    scaled = turn * scene["scale"].astype(np.float64)[:, None, :]
    found: NDArray[np.float32] = (scaled @ scaled.transpose(0, 2, 1)).astype(np.float32)
    return found
