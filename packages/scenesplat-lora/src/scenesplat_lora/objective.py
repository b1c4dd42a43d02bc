"""What is trained, as settings say: the terms of the loss, the learning rate, the precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lora_core.errors import ConfigError, listing, near
from lora_core.training import numerics
from scenesplat_lora import losses
from scenesplat_lora.config import DISTILLATION, SEGMENTATION, Config, Scheduler
from scenesplat_lora.data import Needs, learnable_rows
from scenesplat_lora.losses import Term
from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.schedule import OneCycle, set_one_cycle, warmup_cosine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scenesplat_lora.language.text_embeddings import TextEmbeddings

    Loss = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]


# -- the loss --------------------------------------------------------------------------------------


def terms(cfg: Config, language: bool) -> list[Term]:
    """The terms of the loss.

    Raises:
        ConfigError: a term that does not exist, or not for this kind of model; all together.
    """
    known = list(Term.__dataclass_fields__)
    kinds = losses.DISTILLATION if language else losses.SEGMENTATION
    found, problems = [], []
    for number, entry in enumerate(
        cfg.model.criteria or (DISTILLATION if language else SEGMENTATION)
    ):
        place = f"model.criteria[{number}]"
        unknown = [name for name in entry if name not in known]
        if "type" not in entry or unknown:
            what = unknown[0] if unknown else "no type"
            problems.append(
                f"{place}: {what!r}; {near(what, known) or 'it has ' + ', '.join(known)}"
            )
            continue
        try:
            term = Term(**entry)
        except ConfigError as error:
            problems.append(f"{place}: {error}")
            continue
        if term.type not in kinds:
            problems.append(f"{place}: {term.type} is not for this model: use {', '.join(kinds)}")
        found.append(term)
    if problems:
        raise ConfigError(listing(problems))
    return found


def loss_of(cfg: Config, needs: Needs) -> Loss:
    """(network, batch) -> (loss, weighted terms by their type).

    Raises:
        ConfigError: see `terms`.
    """
    found = terms(cfg, needs.language)
    return partial(_distilled if needs.language else _segmented, found)


def _distilled(
    found: list[Term], net: nn.Module, batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    in_float32(batch)
    return losses.distillation_loss(
        net(batch),
        batch["lang_feat"],
        batch["valid_feat_mask"],
        batch.get("segment"),
        found,
        batch["progress"],
    )


def in_float32(batch: dict[str, Any]) -> None:
    """Take the language features, which travel in half precision, to float32, which is exact.

    In their place, so that the batch never holds both while a network runs.
    """
    batch["lang_feat"] = batch["lang_feat"].float()


def _segmented(
    found: list[Term], net: nn.Module, batch: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    return losses.segmentation_loss(net(batch), batch["segment"], found)


def count_of(cfg: Config, needs: Needs) -> Callable[[Any], float] | None:
    """batch -> the rows that its loss is the mean over; None where terms are sums."""
    if any(term.reduction == "sum" for term in terms(cfg, needs.language)):
        return None
    return lambda batch: float(learnable_rows(batch, needs))


class SkipEmpty(TrainerCallback):
    """An update whose gradient is zero everywhere, as without any valid row, changes nothing.

    Moments and weight decay of AdamW would move the weights all the same.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Take the gradients away: the optimizer leaves such parameters and their moments alone."""
        own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if own and float(numerics.total_norm([p.grad for p in own])) == 0:
            for parameter in own:
                parameter.grad = None


# -- needs -----------------------------------------------------------------------------------------


def needs_of(net: LangPretrainer | DefaultSegmentorV2, text: TextEmbeddings | None) -> Needs:
    """What a network must be given.

    Args:
        text: of the classes, for a language model.
    """
    config = net.backbone.config
    if isinstance(net, DefaultSegmentorV2):
        return Needs(False, config.in_channels, classes=net.seg_head.out_features)
    classes = None if text is None else len(text.names)
    return Needs(True, config.in_channels, config.out_channels, classes)


# -- schedule and precision ------------------------------------------------------------------------


def schedule(cfg: Config, updates_per_epoch: int) -> Callable[[int, int], float]:
    """(update, updates) -> share of the peak learning rate."""
    settings, lr = cfg.scheduler, cfg.optimizer.lr

    def one_cycle(update: int, updates: int) -> float:
        return cycle(settings, updates).lr_factor(update)

    def cosine(update: int, updates: int) -> float:
        warmup = min(int(settings.warmup_epochs * updates_per_epoch), updates // 10)
        low, first = min(settings.min_lr, lr), min(settings.warmup_lr, lr)
        return warmup_cosine(update, updates, warmup, lr, first, low) / lr

    return one_cycle if settings.type == "OneCycleLR" else cosine


def cycle(settings: Scheduler, updates: int) -> OneCycle:
    """The one cycle of a run."""
    return OneCycle(updates, settings.pct_start, settings.div_factor, settings.final_div_factor)


class CycledBeta(TrainerCallback):
    """Gives AdamW its first beta of a one-cycle run before each update, with the learning rate.

    Both are functions of the update alone, so that a resumed run goes on exactly.
    """

    def __init__(self, settings: Scheduler) -> None:
        self.settings = settings

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set them for the update that the learning rate is at."""
        peaks = [group["initial_lr"] for group in optimizer.param_groups]
        one_cycle = cycle(self.settings, state.max_steps)
        set_one_cycle(optimizer, one_cycle, lr_scheduler.last_epoch, peaks)


def callbacks(cfg: Config) -> list[TrainerCallback]:
    """What happens besides at the updates of a training."""
    cycles = cfg.scheduler.type == "OneCycleLR" and "lr_scheduler_type" not in cfg.trainer
    return [SkipEmpty(), *([CycledBeta(cfg.scheduler)] if cycles else [])]


def precision(cfg: Config) -> str:
    """The precision that settings ask for, as `choose_precision` has them; a CPU has fp32."""
    if not cfg.enable_amp or cfg.device == "cpu":
        return "fp32"
    if cfg.device == "auto":
        import torch

        if not torch.cuda.is_available():
            return "fp32"
    return {"bfloat16": "bf16", "float16": "fp16", "auto": "auto"}[cfg.amp_dtype]
