"""Saving a training and taking it up again: what is in a checkpoint, and when saving fails."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import checkpoint
from lora_core.checkpoint.state import pack
from lora_core.distributed import first_rank_decides
from lora_core.errors import CheckpointError, NumericError
from lora_core.report import say
from lora_core.training import numerics, resume_check
from lora_core.training.checks import untouched

if TYPE_CHECKING:
    from lora_core.trainer import LoraTrainer

FULL = (errno.ENOSPC, errno.EDQUOT)


def own_state(trainer: LoraTrainer) -> dict[str, Any]:
    """What differs between the processes: random generators, and sums that are not logged yet."""
    return {"random": checkpoint.random_state(), "window": trainer.means.state()}


def write(trainer: LoraTrainer, ranks: list[Any]) -> None:
    """Write the checkpoint and all that belongs to it; on the first process.

    A full disk is no reason to end a run that goes on: it is said, and the next save tries again.

    Args:
        ranks: `own_state` of all processes.

    Raises:
        CheckpointError: it cannot be written; at the end of a training a full disk is one, too.
    """
    step, run = trainer.state.global_step, Path(str(trainer.args.output_dir))
    state = _state(trainer, ranks)

    def fill(folder: Path) -> None:
        trainer.write_adapter(folder / "adapter")
        trainer.state.save_to_json(str(folder / "trainer_state.json"))

    try:
        with untouched(trainer.network):
            checkpoint.save(run, step, state, fill, trainer.record())
            if trainer.new_best and trainer.best and trainer.on_best:
                trainer.on_best(step, trainer.best["metrics"])
            if trainer.on_latest:
                trainer.on_latest(step)
        trainer.best_before = trainer.best
        keep = {*trainer.referenced(), *([trainer.best["step"]] if trainer.best else [])}
        checkpoint.prune(run, trainer.guards.keep_last, keep)
    except (CheckpointError, OSError) as error:
        if trainer.new_best:  # there are no files of it
            trainer.best = trainer.best_before
        _refuse_or_go_on(trainer, error, run, state)


def _refuse_or_go_on(
    trainer: LoraTrainer, error: CheckpointError | OSError, run: Path, state: dict[str, Any]
) -> None:
    cause = error if isinstance(error, OSError) else error.__cause__
    full = isinstance(cause, OSError) and cause.errno in FULL
    step = trainer.state.global_step
    message = f"saving at step {step} failed: {error}"
    if full:
        needed = sum(tensor.nbytes for tensor in pack(state)[1].values())
        free = shutil.disk_usage(run).free
        message += (
            f" ({free / 1e6:,.1f} MB free at {run.absolute()}, the checkpoint's tensors alone are "
            f"{needed / 1e6:,.1f} MB)"
        )
    kept = checkpoint.steps(run)
    kept_line = f"The checkpoint of step {kept[-1]} is as it was" if kept else "There is none yet"
    if not full or trainer.is_last_save():
        raise CheckpointError(
            f"{message}\n{kept_line}; make room or restore the access, then resume"
            f"{trainer.how_to_resume()}"
        ) from error
    say(f"warning: {message}. {kept_line}; the training goes on, the next save tries again")


def _state(trainer: LoraTrainer, ranks: list[Any]) -> dict[str, Any]:
    optimizer, scaler = trainer.plain_optimizer(), trainer.scaler
    return {
        "tensors": checkpoint.tensors(trainer.network),
        "optimizer": checkpoint.optimizer_state(optimizer, trainer.names()),
        "schedule": trainer.lr_scheduler.last_epoch if trainer.lr_scheduler else 0,
        "scaler": scaler.state_dict() if scaler else None,
        "ranks": ranks,
        "best": trainer.best,
        "without_gain": trainer.without_gain,
        "seconds": trainer.seconds,
        "dropped": list(trainer.dropped),
        "total": trainer.state.max_steps,
        "evaluation_due": trainer.evaluation_due,
    }


# -- taking up again -------------------------------------------------------------------------------


def restore(trainer: LoraTrainer, path: str, state: dict[str, Any], with_log: bool = True) -> None:
    """Put back tensors, counters, and the log as it was; the optimizer comes when it is made.

    Raises:
        CheckpointError: it is of another model or of other settings; nothing was changed.
    """
    resume_check.check(
        checkpoint.manifest(path),
        trainer.settings,
        trainer.fingerprints,
        trainer.world(),
        trainer.may_change,
    )
    checkpoint.load_tensors(trainer.network, state["tensors"])
    trainer.best = trainer.best_before = state["best"]
    trainer.without_gain = state["without_gain"]
    trainer.dropped = list(state.get("dropped", []))
    trainer.evaluation_due = bool(state.get("evaluation_due"))
    trainer.start_clock(state["seconds"])
    trainer.means.load(_window(trainer, state["ranks"]))
    back = any(step > state["step"] for step in checkpoint.steps(str(trainer.args.output_dir)))
    if with_log:
        if trainer.args.process_index == 0:
            checkpoint.set_aside(str(trainer.args.output_dir), state["step"])
        if trainer.run_log:
            trainer.run_log.rewind(state["step"])
        say(f"continuing at step {state['step']} from {path}")

    def again() -> None:
        if with_log or state["step"] not in trainer.referenced():  # a finished run stays as it is
            write_again(trainer, state, with_log and back)

    first_rank_decides(again, trainer.args.device)


def write_again(trainer: LoraTrainer, state: dict[str, Any], back: bool) -> None:
    """Write the files beside the checkpoint that a run goes on from; mostly they are there.

    A kill may have come between the checkpoint and them.

    Args:
        back: there are later checkpoints, so that the files of the best may be of one of these.
    """
    best, step = trainer.best, state["step"]
    with untouched(trainer.network):
        if best and trainer.on_best and best["step"] == step:
            trainer.on_best(step, best["metrics"])
        elif best and trainer.on_best and back:
            _best_again(trainer, best, state)
        if trainer.on_latest:
            trainer.on_latest(step)


def _best_again(trainer: LoraTrainer, best: dict[str, Any], state: dict[str, Any]) -> None:
    try:
        then = checkpoint.load(checkpoint.folder(str(trainer.args.output_dir), best["step"]))
    except CheckpointError as error:
        say(f"warning: the files of the best step so far stay as they are: {error}")
        return
    checkpoint.load_tensors(trainer.network, then["tensors"])
    try:
        trainer.on_best(best["step"], best["metrics"])  # type: ignore[misc]
    finally:
        checkpoint.load_tensors(trainer.network, state["tensors"])


def restore_optimizer(trainer: LoraTrainer, state: dict[str, Any]) -> None:
    """Put back the moments and the place in the schedule; its shape is this run's setting."""
    checkpoint.load_optimizer_state(trainer.plain_optimizer(), trainer.names(), state["optimizer"])
    checkpoint.load_schedule(trainer.lr_scheduler, state["schedule"])
    total = state.get("total", trainer.state.max_steps)
    if total != trainer.state.max_steps:
        say(
            f"the run now ends at step {trainer.state.max_steps} instead of {total}: its learning "
            f"rates follow the new length from step {state['step']} on"
        )


def restore_random(trainer: LoraTrainer, state: dict[str, Any]) -> None:
    checkpoint.set_random_state(_own(trainer, state)["random"])


def _window(trainer: LoraTrainer, ranks: list[Any]) -> dict[str, list[float]]:
    """This process's sums since the last log row; of other processes than then all at rank 0."""
    if len(ranks) == trainer.args.world_size:
        own: dict[str, list[float]] = ranks[trainer.args.process_index]["window"]
        return own
    totals: dict[str, list[float]] = {}
    for each in ranks if trainer.args.process_index == 0 else []:
        for name, (total, count) in each["window"].items():
            before = totals.get(name, [0.0, 0.0])
            totals[name] = [before[0] + total, before[1] + count]
    return totals


def _own(trainer: LoraTrainer, state: dict[str, Any]) -> dict[str, Any]:
    """This process's part; with more processes than then, that of another one."""
    ranks = state["ranks"]
    own: dict[str, Any] = ranks[trainer.args.process_index % len(ranks)]
    return own


# -- an update that is not finite ------------------------------------------------------------------


def drop_update(
    trainer: LoraTrainer,
    batches: list[Any],
    random: dict[str, Any],
    gather: Callable[[Any], list[Any]],
) -> None:
    """Leave out the update under way on all ranks, if the guards allow it; or end the training.

    A dropped update counts as a step and the learning rate goes on (with fp16 it waits, as when
    the scaler drops one); weights and moments stay as they are, and its loss is not logged.

    Args:
        batches: its micro-batches. random: torch's random states when it began.

    Raises:
        NumericError: the message has the samples, and the folder that reproduces the update.
    """
    step, guards = trainer.state.global_step + 1, trainer.guards
    own = numerics.facts(trainer.network, batches, trainer.means.update)
    everyone = gather(own)
    what = numerics.explain(step, everyone)
    if not guards.skip_nonfinite or len(trainer.dropped) >= guards.max_nonfinite:
        if guards.skip_nonfinite:
            advice = f"--max_nonfinite {guards.max_nonfinite} updates were dropped before"
        else:
            advice = "or leave such updates out with --skip_nonfinite true"
        raise NumericError(
            f"{what}. No weight was changed{_bundle(trainer, step, batches, random, own)}\n"
            f"Look at these samples, lower the learning rate, use fp32 or bf16; {advice}"
        )
    trainer.dropped.append(step)
    trainer.means.clear()
    for parameter in trainer.network.parameters():
        parameter.grad = None  # the optimizer leaves such parameters and their moments alone
    say(f"{what}. Update dropped ({len(trainer.dropped)} of at most {guards.max_nonfinite})")


def _bundle(
    trainer: LoraTrainer, step: int, batches: list[Any], random: dict[str, Any], found: Any
) -> str:
    """Write what reproduces the update; gives the words that say where it is."""
    rank = f"-rank{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
    folder = Path(str(trainer.args.output_dir)) / f"nonfinite-step{step}{rank}"
    about = {"step": step, "seed": trainer.args.seed, **found, **trainer.record()}
    try:
        numerics.write_bundle(folder, batches, random, about, trainer.write_adapter)
    except (OSError, CheckpointError) as error:
        return f"; its batch could not be written: {error}"
    return f"; batch, adapter and random state: {folder.absolute()}"
