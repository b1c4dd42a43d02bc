"""What a run measures while it trains: the loss, and the mIoU.

For a language model the mIoU is the zero-shot one, where classes have texts.

Voxels are measured, as the official evaluator of an epoch does; `scenesplat-lora evaluate` measures
every Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lora_core import merging
from lora_core.errors import ConfigError
from scenesplat_lora import objective
from scenesplat_lora.config import Config
from scenesplat_lora.data import Needs, Splits, learnable_rows
from scenesplat_lora.language.zero_shot import label, probabilities
from scenesplat_lora.losses import distillation_loss, segmentation_loss
from scenesplat_lora.metrics import Confusion, epoch_scores
from scenesplat_lora.model import class_names

if TYPE_CHECKING:
    from scenesplat_lora.language.text_embeddings import TextEmbeddings


def texts(cfg: Config) -> TextEmbeddings | None:
    """The text embeddings of a configuration.

    Raises:
        DataError, CheckpointError: files that cannot be used.
    """
    if cfg.data.text_embeddings is None:
        return None
    from scenesplat_lora.language.text_embeddings import read_text_embeddings

    return read_text_embeddings(cfg.data.text_embeddings, cfg.data.class_names)


def check_texts(text: TextEmbeddings | None, needs: Needs, cfg: Config) -> None:
    """Compare texts with the model, and excluded names with the classes.

    Raises:
        ConfigError: they do not belong together.
    """
    if text is not None and not needs.language:
        raise ConfigError("--data.text_embeddings: a segmentation model has classes of its own")
    if text is not None and text.features.shape[1] != needs.width:
        raise ConfigError(
            f"--data.text_embeddings have width {text.features.shape[1]}, the model's features "
            f"{needs.width}: they are of different models"
        )
    table = _table(needs, text, cfg)
    if table is not None:
        table.foreground(cfg.data.excluded)
    elif cfg.data.excluded:
        raise ConfigError("--data.excluded needs the classes of --data.text_embeddings")


def evaluation(
    cfg: Config, splits: Splits, needs: Needs, text: TextEmbeddings | None
) -> Callable[[nn.Module], dict[str, float]] | None:
    """network -> figures, the one that best follows first; None without validation scenes."""
    if splits.val is None:
        return None
    scenes, terms = splits.val, objective.terms(cfg, needs.language)

    def evaluate(net: nn.Module) -> dict[str, float]:
        table = _table(needs, text, cfg)
        total, rows = 0.0, 0
        with _deployed(net, cfg.lora_training.merge_before_eval):
            for scene in scenes:
                batch = _on(scene, next(net.parameters()).device)
                out = net(batch)
                if table is not None:
                    _count(table, out, batch["segment"], text)
                if needs.language and "lang_feat" not in batch:
                    continue
                here = learnable_rows(batch, needs)
                total += here * float(_loss(out, batch, terms, needs))
                rows += here
        return _figures(table, total / rows if rows else None, cfg.data.excluded)

    return evaluate


def _table(needs: Needs, text: TextEmbeddings | None, cfg: Config) -> Confusion | None:
    if needs.language:
        return None if text is None else Confusion(text.names)
    names = class_names(cfg)
    return Confusion(names or [f"class {number}" for number in range(needs.classes or 0)])


def _count(table: Confusion, out: Tensor, segment: Tensor, text: TextEmbeddings | None) -> None:
    if text is None:
        found = out.argmax(1)
    else:
        found = label(probabilities(out, text), text.classes)
    table.add(segment.cpu().numpy(), found.cpu().numpy())


def _loss(out: Tensor, batch: dict[str, Any], terms: Any, needs: Needs) -> Tensor:
    if needs.language:
        objective.in_float32(batch)
        return distillation_loss(
            out, batch["lang_feat"], batch["valid_feat_mask"], batch["segment"], terms
        )[0]
    return segmentation_loss(out, batch["segment"], terms)[0]


def _figures(table: Confusion | None, loss: float | None, excluded: list[str]) -> dict[str, float]:
    """The first one is what best follows: larger is better."""
    figures: dict[str, float] = {}
    if table is not None:
        scores = epoch_scores(table, excluded)
        first = "fg_mIoU" if excluded else "mIoU"
        figures = {first: scores[first], **scores}
    if loss is not None:
        figures = (figures or {"minus_loss": -loss}) | {"loss": loss}
    return figures


@contextmanager
def _deployed(net: nn.Module, merged: bool) -> Iterator[None]:
    """With `merged` the adapter is in the weights inside, and afterwards beside them again."""
    if merged:
        merging.merge(net)
    try:
        yield
    finally:
        if merged:
            merging.unmerge(net)


def _on(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    moved: dict[str, Any] = tree_map(
        lambda value: value.to(device) if isinstance(value, Tensor) else value, batch
    )
    return moved
