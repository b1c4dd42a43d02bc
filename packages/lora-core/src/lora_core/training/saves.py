"""Saving a training and taking it up again: what is in a checkpoint, and when saving fails."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import checkpoint
from lora_core.checkpoint.state import pack
from lora_core.distributed import finishing, first_rank_decides
from lora_core.errors import CheckpointError
from lora_core.report import say
from lora_core.training import resume_check, sharding
from lora_core.training.checks import untouched

if TYPE_CHECKING:
    from lora_core.trainer import LoraTrainer

FULL = (errno.ENOSPC, errno.EDQUOT)


def save(trainer: LoraTrainer) -> None:
    """Write adapter, optimizer, schedule, random states and counters; nothing of the base.

    Called in all processes: the first one writes.

    Raises:
        CheckpointError: see `write`.
    """
    ranks = trainer._gather(own_state(trainer))

    def first() -> dict[str, Any] | None:
        try:
            with finishing():
                write(trainer, ranks)
        except Exception as error:
            error.add_note(f"while saving at step {trainer.state.global_step}")
            raise
        return trainer.best  # where saving has failed it is the one before

    with sharding.whole(trainer.sharded):
        trainer.best = first_rank_decides(first, trainer.args.device)
    trainer.new_best = False


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
            checkpoint.save(run, step, state, fill, record(trainer))
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
    if not full or _is_last(trainer):
        raise CheckpointError(
            f"{message}\n{kept_line}; make room or restore the access, then resume"
            f"{trainer.how_to_resume()}"
        ) from error
    say(f"warning: {message}. {kept_line}; the training goes on, the next save tries again")


def _is_last(trainer: LoraTrainer) -> bool:
    """Whether the training ends here, so that a failed save cannot be made up for."""
    ends = trainer.state.global_step >= trainer.state.max_steps
    return trainer.control.should_training_stop or ends


def record(trainer: LoraTrainer) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run."""
    return {
        "config": trainer.settings,
        "fingerprints": trainer.fingerprints,
        "world": _world(trainer),
    }


def _world(trainer: LoraTrainer) -> dict[str, int]:
    return {
        "processes": trainer.args.world_size,
        "batch_size": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
    }


def _names(trainer: LoraTrainer) -> dict[int, str]:
    return {id(parameter): name for name, parameter in trainer.network.named_parameters()}


def _state(trainer: LoraTrainer, ranks: list[Any]) -> dict[str, Any]:
    optimizer, scaler = trainer.plain_optimizer(), trainer.scaler
    return {
        "tensors": checkpoint.tensors(trainer.network),
        "optimizer": checkpoint.optimizer_state(optimizer, _names(trainer)),
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
        _world(trainer),
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
    checkpoint.load_optimizer_state(trainer.plain_optimizer(), _names(trainer), state["optimizer"])
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
