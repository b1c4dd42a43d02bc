"""`sam3-lora train`: from COCO annotations and a checkpoint to an adapter for one's own phrases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_core.config import parse
from lora_core.errors import ConfigError
from lora_core.errors import run as guarded
from lora_core.report import RunLog, copied_to, say
from sam3_lora.artifacts import Artifacts, Run, checkpoint_of, find_run, new_run, refuse_existing
from sam3_lora.config import Config

if TYPE_CHECKING:
    import torch
    from transformers import Sam3Model, TrainingArguments

    from lora_core.trainer import LoraTrainer
    from sam3_lora.data import Splits
    from sam3_lora.scoring import EncodedPhrases
    from sam3_lora.tokenizer import Tokenizer

COLUMNS = (
    "step", "split", "epoch", "loss", "loss_bbox", "loss_giou", "loss_ce", "presence_loss",
    "loss_mask", "loss_dice", "loss_semantic_seg", "loss_semantic_dice", "loss_aux", "loss_o2m",
    "presence_accuracy", "bbox_mAP", "bbox_mAP50", "segm_mAP", "segm_mAP50", "cgF1", "cgF1_50",
    "pmF1", "IL_F1", "IL_FPR", "lr", "grad_norm", "seconds",
)  # fmt: skip
SHOWN = ("segm_mAP", "bbox_mAP", "cgF1", "pmF1", "loss")
# Settings that a resumed run may change. Paths may: what lies there is compared.
MAY_CHANGE = frozenset(["resume", "adapter", "overwrite", "device", "tensorboard", "trainer"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sam3-lora train` and of `train.py`; returns the process exit code."""
    return guarded(train, argv)


def train(argv: Sequence[str]) -> int:
    """Run one training from its command line, top to bottom.

    Raises:
        UserError: settings, data or checkpoints that cannot be used; nothing is lost.
    """
    cfg, run = settings(argv)
    ready(cfg, run)

    from lora_core.distributed import together
    from lora_core.training.arguments import choose_device

    device = choose_device(cfg.device)
    with together(device, cfg.trainer.get("ddp_timeout")):
        return fit(cfg, run, device)


def settings(argv: Sequence[str]) -> tuple[Config, Run | None]:
    """Read the command line; a resumed run has its own settings, changed by flags given now."""
    about = {"prog": "sam3-lora train", "description": "Train a LoRA of SAM 3 on your phrases."}
    cfg = parse(Config, argv, **about)
    if not cfg.resume:
        return cfg, None
    if cfg.adapter:
        raise ConfigError(
            "--resume continues a run with all its state, --adapter starts a new run from weights "
            "alone: give one of them"
        )
    run = find_run(cfg.resume)
    return parse(Config, ["--config", str(run.config), *argv], **about), run


def ready(cfg: Config, run: Run | None) -> None:
    """Refuse what can be known before data, weights and the GPU are touched.

    Raises:
        ConfigError: libraries, folders, a device or settings of the trainer that cannot work.
        CheckpointError: no such base, or one of another model, as far as its header tells.
    """
    from lora_core import preflight

    preflight.check_all(
        lambda: preflight.versions(
            "sam3-lora", "lora-core[train,pictures,peft]", optional=("peft",)
        ),
        preflight.torchvision,
    )
    from lora_core.training.arguments import check_device
    from sam3_lora import model

    preflight.check_all(
        partial(preflight.writable, cfg.checkpoint.save_dir, "--checkpoint.save_dir"),
        partial(preflight.writable, cfg.logging.log_dir, "--logging.log_dir"),
        lambda: check_device(cfg.device, precision(cfg), cfg.trainer, SHOWN, cfg.dry_run),
        partial(model.glance, cfg),
        *([] if run else [lambda: refuse_existing(cfg)]),
    )


def precision(cfg: Config) -> str:
    """The precision that settings ask for, as `choose_precision` has them.

    The guide's `use_amp` is for GPUs: on the CPU it means nothing.
    """
    if not cfg.training.use_amp or cfg.device == "cpu":
        return "fp32"
    if cfg.device == "auto":
        import torch

        if not torch.cuda.is_available():
            return "fp32"
    return {"bfloat16": "bf16", "float16": "fp16"}[cfg.training.amp_dtype]


def fit(cfg: Config, run: Run | None, device: torch.device) -> int:
    """Load data and weights, train, and write the results; the same in every process."""
    from lora_core.distributed import first_rank_decides
    from lora_core.trainer import LoraTrainer
    from sam3_lora import data, model

    splits = data.load(cfg, lambda make: first_rank_decides(make, device))
    say(f"{splits}\n")
    net = model.build(cfg)
    if cfg.adapter:
        model.load_adapter(net, cfg.adapter)
        say(f"starting from {cfg.adapter}; its rank, alpha and layers are used")
    else:
        say(model.adapt(net, cfg))
    net.to(device)
    words = model.tokenizer(net, cfg.paths.bpe_path)
    for note in data.notes_on_length(splits.phrases, words):
        say(f"note: {note}")
    phrases = encoded(net, words, splits, cfg)
    run = run or first_rank_decides(lambda: new_run(cfg), device)
    updates = updates_per_epoch(cfg, splits, device)

    with copied_to(run.text):
        log = RunLog(run.logs, run.csv, COLUMNS, cfg.tensorboard)
        prints = {"data": data.fingerprint(splits), "base": str(net.sam3_base.fingerprint)}
        about = {"phrases": list(splits.phrases), "data": prints["data"]}
        artifacts = Artifacts(run, net, cfg, updates, about)
        trainer = LoraTrainer(
            net,
            arguments(cfg, run, updates, device),
            splits.train,
            partial(data.collate, tokenizer=words),
            loss_of(cfg, phrases),
            evaluation(cfg, splits, phrases),
            log=log,
            shown=SHOWN,
            on_best=artifacts.best,
            on_latest=artifacts.latest,
            save_adapter=lambda path: model.save_adapter(net, path),
            referenced=artifacts.steps,
            schedule=schedule(cfg),
            guards=cfg,
            settings=asdict(cfg),
            fingerprints=prints,
            may_change=MAY_CHANGE,
            resume_with=f"sam3-lora train --resume {run.folder}",
        )
        trainer.train(resume_from_checkpoint=checkpoint_of(run, cfg.resume) if cfg.resume else None)
        if trainer.already_done and run.summary.is_file():
            say(f"nothing was changed; results: {run.folder}")
            return 0
        first_rank_decides(lambda: conclude(trainer, artifacts, splits), device)
        log.close()
    return 0


def encoded(net: Sam3Model, words: Tokenizer, splits: Splits, cfg: Config) -> EncodedPhrases | None:
    """The phrases of the data, encoded once; then the text encoder is dropped from memory.

    None where it is adapted, and so must run in every step.
    """
    import torch

    from sam3_lora.network import drop_text_encoder
    from sam3_lora.scoring import ABSENT, EncodedPhrases

    masks = cfg.training.enable_segmentation
    if "text_encoder" in cfg.lora.components(masks):
        return None
    with torch.no_grad():
        phrases = EncodedPhrases(net, words, [*splits.phrases, "visual", *ABSENT])
    drop_text_encoder(net)
    return phrases


def loss_of(cfg: Config, phrases: EncodedPhrases | None) -> Callable[[Any, dict[str, Any]], Any]:
    """(network, batch) -> (loss, parts)."""
    from sam3_lora import losses, network
    from sam3_lora.outputs import Targets

    masks, one_to_many = cfg.training.enable_segmentation, cfg.training.o2m_weight > 0
    weights = losses.LossSettings(
        masks=masks, o2m_weight=cfg.training.o2m_weight, mask_points=cfg.training.mask_points
    )

    def loss(net: Sam3Model, batch: dict[str, Any]) -> Any:
        if phrases is not None:
            rows = phrases.rows(batch["phrases"])
            batch = batch | {
                "text_features": phrases.features[rows],
                "attention_mask": phrases.mask[rows],
            }
        outputs = network.forward(net, batch, masks=masks, one_to_many=one_to_many)
        return losses.loss(outputs, Targets(**batch["targets"]), weights)

    return loss


def evaluation(
    cfg: Config, splits: Splits, phrases: EncodedPhrases | None
) -> Callable[[Any], dict[str, float]] | None:
    """network -> figures, the one that best follows first; None without validation data."""
    from sam3_lora.scoring import score

    if splits.val is None:
        return None
    val, masks = splits.val, cfg.training.enable_segmentation
    first = cfg.training.best_metric
    if first == "auto":
        first = "segm_mAP" if masks else "bbox_mAP"

    def evaluate(net: Sam3Model) -> dict[str, float]:
        assert phrases is not None
        figures = score(net, val, phrases, masks).figures()
        if first == "loss":
            figures = {"minus_loss": -figures["loss"], **figures}
        return {first: figures[first], **figures} if first in figures else figures

    return evaluate


def schedule(cfg: Config) -> Callable[[int, int], float] | None:
    """(update, updates) -> share of the peak learning rate; None: the trainer's cosine."""
    from sam3_lora.schedule import inverse_sqrt_factor

    training = cfg.training
    if training.scheduler == "cosine":
        return None

    def factor(update: int, updates: int) -> float:
        warmup = min(training.warmup_steps, updates // 10)
        if training.scheduler == "constant":
            return min(1.0, (update + 1) / (warmup + 1))
        cooldown = min(training.cooldown_steps, updates // 10)
        return inverse_sqrt_factor(update, updates, warmup, training.timescale, cooldown)

    return factor


def updates_per_epoch(cfg: Config, splits: Splits, device: torch.device) -> int:
    """Optimizer updates of one pass over the training pictures, over all processes."""
    from lora_core.distributed import world_size

    batches = math.ceil(len(splits.train) / (cfg.training.batch_size * world_size()))
    return math.ceil(batches / cfg.training.gradient_accumulation_steps)


def arguments(cfg: Config, run: Run, updates: int, device: torch.device) -> TrainingArguments:
    """The configuration as transformers' TrainingArguments.

    Raises:
        ConfigError: see `lora_core.training.arguments`.
    """
    from lora_core.training.arguments import training_arguments

    training = cfg.training
    saves = {"save_steps": updates * cfg.checkpoint.save_freq}
    return training_arguments(
        run.state,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        steps=updates * training.max_epochs,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        warmup_steps=training.warmup_steps,
        max_grad_norm=training.max_grad_norm,
        log_steps=cfg.logging.log_steps,
        eval_steps=updates * training.val_epoch_freq,
        seed=cfg.seed,
        num_workers=cfg.dataset.num_workers,
        precision=precision(cfg),
        device=device,
        trainer=saves | cfg.trainer,
    )


def conclude(trainer: LoraTrainer, artifacts: Artifacts, splits: Splits) -> None:
    """Write the last files, and say where all is."""
    run, step, best = artifacts.run, trainer.state.global_step, trainer.best
    artifacts.final(step, has_best=best is not None)
    if best is None:
        say("no validation data: best.pt is the last epoch")
    artifacts.summary(
        steps=step,
        best_step=best and best["step"],
        best=best and best["metrics"],
        dropped_updates=trainer.dropped,
    )
    say(f"\nresults: {run.folder}\n  adapter for PEFT: {run.adapter}\n  figures: {run.csv}")


if __name__ == "__main__":
    raise SystemExit(main())
