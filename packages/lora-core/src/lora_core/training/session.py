"""What surrounds a training: processes that meet, signals, explained errors, workers that end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from lora_core import checkpoint
from lora_core.distributed import first_rank_decides, together
from lora_core.report import say
from lora_core.training import numerics, sharding
from lora_core.training.out_of_memory import explained
from lora_core.training.signals import Signals, Stopped, name

if TYPE_CHECKING:
    from lora_core.trainer import LoraTrainer

T = TypeVar("T")


def run(trainer: LoraTrainer, resume: str | bool | None, train: Callable[[str | None], T]) -> T:
    """Call `train` with the checkpoint to continue from, in the run's folder; see `Trainer.train`.

    Args:
        resume: a checkpoint folder of the run, or True: the latest.

    Raises:
        Stopped: a signal came.
        CheckpointError: another process has the folder, or nothing is to be resumed.
    """
    trainer.stop_signal = 0
    device = trainer.args.device
    with ExitStack() as stack:
        stack.enter_context(together(device))
        stack.enter_context(trainer.samples.explaining())
        stack.enter_context(explained(trainer.network, lambda: _where(trainer), trainer.advice))
        trainer.signals = stack.enter_context(Signals(trainer.how_to_resume()))
        first_rank_decides(lambda: _take_folder(trainer, stack), device)
        if resume is True:
            folder = str(trainer.args.output_dir)
            resume = first_rank_decides(lambda: str(checkpoint.latest(folder)), device)
        with _put_back(trainer):
            sharding.scatter(trainer.sharded)
            output = train(resume or None)
            sharding.gather(trainer.sharded)
    if signal := trainer.stop_signal or trainer.signals.received:  # it may come after the last step
        raise Stopped(signal, f"stopped by {name(signal)} {_progress(trainer)}")
    if trainer.dropped:
        say(numerics.dropped(trainer.dropped))
    return output


def _take_folder(trainer: LoraTrainer, stack: ExitStack) -> None:
    """Keep other processes out of the run's folder, and clear what a killed one has left."""
    stack.enter_context(checkpoint.lock(trainer.args.output_dir))
    checkpoint.clean(trainer.args.output_dir)


@contextmanager
def _put_back(trainer: LoraTrainer) -> Iterator[None]:
    """Modules get their modes back, and the workers of the loader end."""
    modes = {module: module.training for module in trainer.network.modules()}
    children = set(multiprocessing.active_children())
    trainer.leaving.value = 0
    try:
        yield
    finally:
        trainer.leaving.value = 1
        # A traceback keeps the loader, which would wait seconds for its workers later.
        for worker in set(multiprocessing.active_children()) - children:
            worker.terminate()
        if trainer.progress:
            trainer.progress.close()
        for module, mode in modes.items():
            module.training = mode


def _where(trainer: LoraTrainer) -> str:
    """What is going on, for messages."""
    step = trainer.state.global_step + (trainer.phase == "training")
    batch = f", {trainer.advice.describe(trainer._batches[-1])}" if trainer._batches else ""
    return f"{trainer.phase} at step {step}{batch}"


def _progress(trainer: LoraTrainer) -> str:
    """How far a stopped training came, where it is saved, and how it continues."""
    step, state = trainer.state.global_step, trainer.state
    return (
        f"after step {step} of {state.max_steps or step}; saved in "
        f"{checkpoint.folder(trainer.args.output_dir, step)}{trainer.how_to_resume()}"
    )
