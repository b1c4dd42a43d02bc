"""Texts of classes as vectors: what they are, and what they must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import DataError


@dataclass(frozen=True)
class TextEmbeddings:
    """What rows are compared with.

    Attributes:
        names: of the classes.
        features: float32 [P, D], L2-normalised, one per prompt.
        classes: the class index of each prompt; as a rule 0 ... P - 1, one prompt per class.
    """

    names: tuple[str, ...]
    features: Tensor
    classes: tuple[int, ...]


def text_embeddings(
    names: Sequence[str], features: Tensor, classes: Sequence[int] | None = None, where: str = ""
) -> TextEmbeddings:
    """Check and normalise text embeddings.

    Args:
        features: [P, D] of any length. classes: class index of each prompt; None: one per class.
        where: begin of messages, such as the file.

    Raises:
        DataError: everything that is wrong, in one message.
    """
    names, where = tuple(names), where and f"{where}: "
    if features.dim() != 2 or 0 in features.shape or not features.is_floating_point():
        raise DataError(
            f"{where}text embeddings are {features.dtype} {tuple(features.shape)}: expected "
            "floating-point numbers, a row for each prompt"
        )
    problems = _name_problems(names)
    if classes is None:
        classes = range(len(features))
        if len(names) != len(features):
            problems.append(
                f"{len(names)} class names for {len(features)} embeddings: give as many, or "
                "`classes`, the class index of every embedding"
            )
    else:
        problems += _class_problems(classes, len(features), len(names))
    features = features.detach().float().cpu()
    norms = features.norm(dim=1)
    bad = torch.nonzero(~((norms > 0) & norms.isfinite())).flatten().tolist()
    if bad:
        problems.append(f"embeddings {bad[:10]} are zero or not finite")
    if problems:
        raise DataError("\n".join(where + problem for problem in problems))
    return TextEmbeddings(names, F.normalize(features, dim=1), tuple(classes))


def check_names(names: Sequence[str], classes: Sequence[int] | None, where: str = "") -> None:
    """Refuse names of texts, and the classes of the texts, before anything is made of them.

    Raises:
        DataError: everything that is wrong, in one message.
    """
    problems = _name_problems(names)
    if classes is not None:
        problems += _class_problems(classes, len(names), len(set(classes)))
    if problems:
        raise DataError("\n".join((where and f"{where}: ") + problem for problem in problems))


def _name_problems(names: Sequence[str]) -> list[str]:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if not repeated and names:
        return []
    return [f"class names must be different and at least one: {repeated[:10]}"]


def _class_problems(classes: Sequence[int], texts: int, count: int) -> list[str]:
    """What is wrong with the class indices of `texts` texts of `count` classes."""
    if len(classes) != texts:
        return [f"classes has {len(classes)} entries for {texts} embeddings"]
    if set(classes) != set(range(count)):
        return [f"classes must hold every index from 0 to {count - 1}, found {classes}"]
    return []


def grouped(text: TextEmbeddings, classes: Sequence[int]) -> TextEmbeddings:
    """The same texts as prompts of fewer classes, each named by its first text.

    Args:
        classes: class index of each text; every index from 0 on.

    Raises:
        DataError: another number of them than of texts, or an index without a text.
    """
    first = {index: name for name, index in zip(text.names[::-1], classes[::-1], strict=False)}
    return text_embeddings([first[index] for index in sorted(first)], text.features, classes)
