"""What a run measures while it trains: scores, overlays for TensorBoard, false positives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from lora_core.errors import ConfigError
from lora_core.report import RunLog, figure, say
from sam3_lora.config import Config

if TYPE_CHECKING:
    from transformers import Sam3Model

    from sam3_lora.data import Splits
    from sam3_lora.predictor import Predictor
    from sam3_lora.scoring import EncodedPhrases

PICTURES = 4  # overlays per validation in TensorBoard
MAX_RISE = 0.01  # of the share of absent concepts that are found
Phrases = Callable[[], "EncodedPhrases"]  # as the text encoder gives them at the time of the call


# -- scores ----------------------------------------------------------------------------------------


def best_metric(cfg: Config, splits: Splits) -> str:
    """The figure that best.pt follows.

    Raises:
        ConfigError: it is the same for every adapter on this data.
    """
    chosen = cfg.training.best_metric
    if chosen == "auto":
        return "segm_mAP" if cfg.training.enable_segmentation else "bbox_mAP"
    if chosen == "cgF1" and not splits.counts["val"].absent:
        raise ConfigError(
            "--training.best_metric cgF1: it is 0 for every adapter, as the validation data asks "
            "for nothing in vain: use bbox_mAP, raise --dataset.max_val_negatives, or add pictures "
            "without some of the phrases"
        )
    return chosen


def evaluation(
    cfg: Config, splits: Splits, phrases: Phrases
) -> Callable[[Any], dict[str, float]] | None:
    """network -> figures, the one that best follows first; None without validation data.

    Raises:
        ConfigError: see `best_metric`.
    """
    from sam3_lora.scoring import score

    if splits.val is None:
        return None
    val, masks, first = splits.val, cfg.training.enable_segmentation, best_metric(cfg, splits)

    def evaluate(net: Sam3Model) -> dict[str, float]:
        figures = score(net, val, phrases(), masks, val.frozen).figures()
        if first == "loss":  # the smaller the better
            return {"minus_loss": -figures["loss"], **figures}
        return {first: figures[first], **figures}

    return evaluate


# -- overlays --------------------------------------------------------------------------------------


def show(predictor: Predictor, splits: Splits, log: RunLog, step: int) -> None:
    """Overlays of some validation pictures for TensorBoard: base, LoRA, truth."""
    if splits.val is None or not log.shows_pictures or step == 0:  # when LoRA is the base
        return
    from sam3_lora.overlays import example

    for record in islice((record for record in splits.val if any(record.truth)), PICTURES):
        log.picture(record.key, example(predictor, record, ("base", "LoRA")), step)


# -- absent concepts -------------------------------------------------------------------------------


def absent_concepts(net: Sam3Model, splits: Splits, phrases: Phrases) -> dict[str, float]:
    """Share of absent concepts that the base and the adapted network find, and what it means.

    Returns:
        "base" and "lora", 0..1; {} without validation pictures.
    """
    from lora_core import adapters_off
    from sam3_lora.scoring import ABSENT, ABSENT_IMAGES, false_positives

    if splits.val is None:
        return {}
    say(
        f"\nasking {min(len(splits.val), ABSENT_IMAGES)} pictures for {len(ABSENT)} absent concepts"
    )

    def found() -> float:
        val = splits.val
        assert val is not None
        return false_positives(net, phrases(), val, splits.phrases, frozen=val.frozen)

    with adapters_off(net):
        base = found()
    rates = {"base": base, "lora": found()}
    say(f"absent concepts found: base {figure(base)}, LoRA {figure(rates['lora'])}")
    if rates["lora"] > base + MAX_RISE:
        say(
            f"warning: that is more than {MAX_RISE} above the base: the adapter fires at what it "
            "was not asked for. Add pictures without the phrases, raise --dataset.max_negatives, "
            "train for fewer epochs, or leave the text encoder as it is"
        )
    return rates
