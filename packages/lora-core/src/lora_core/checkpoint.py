"""Training checkpoints: everything that an exact continuation needs, and nothing of the base.

`run/checkpoint-<step>/` holds `adapter/` (for people and PEFT), `state.pt` (one dict of tensors
and plain values, readable with `weights_only=True`) and transformers' `trainer_state.json`.
Tensors are kept by parameter name, so that nothing lands in another parameter unnoticed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lora_core.errors import CheckpointError, listing

FORMAT = 1
STATE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def folder(run: str | Path, step: int) -> Path:
    """Name the checkpoint of `step` in the folder of a run."""
    return Path(run) / f"checkpoint-{step}"


def steps(run: str | Path) -> list[int]:
    """List the steps of the checkpoints in a run's folder, in the order of their numbers."""
    if not Path(run).is_dir():
        return []
    found = [
        int(match.group(1))
        for path in Path(run).iterdir()
        if (match := _NAME.fullmatch(path.name)) and not path.is_symlink()
        if (path / STATE).is_file()
    ]
    return sorted(found)


def latest(run: str | Path) -> Path:
    """Give the checkpoint with the highest step.

    Raises:
        CheckpointError: the run has none.
    """
    found = steps(run)
    if not found:
        raise CheckpointError(f"{Path(run).absolute()} holds no training checkpoint to resume")
    return folder(run, found[-1])


def save(
    run: str | Path,
    step: int,
    state: dict[str, Any],
    fill: Callable[[Path], object],
) -> Path:
    """Write the checkpoint of `step`, complete or not at all.

    Args:
        state: tensors, plain values, and dicts and lists of them.
        fill: writes the other files into the folder it is given.
    """
    final = folder(run, step)
    partial = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    torch.save({"format": FORMAT, "step": step, **state}, partial / STATE)
    shutil.rmtree(final, ignore_errors=True)  # of the same step: from a run that was resumed
    os.replace(partial, final)
    return final


def load(path: str | Path) -> dict[str, Any]:
    """Read the state of a checkpoint folder; tensors come to the CPU.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of a later program.
    """
    file = Path(path) / STATE
    if not file.is_file():
        raise CheckpointError(f"no training checkpoint: {file.absolute()} does not exist")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises RuntimeError, EOFError, UnpicklingError and more for damaged files.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot read {file.absolute()}: {reason}") from error
    version = state.get("format") if isinstance(state, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{file.absolute()} is no training checkpoint of lora-core")
    if version > FORMAT:
        raise CheckpointError(
            f"{file.absolute()} was written as format {version}, this program reads up to {FORMAT}:"
            " update lora-core"
        )
    return state


def prune(run: str | Path, keep_last: int, referenced: Collection[int]) -> None:
    """Delete all but the last `keep_last` checkpoints and the `referenced` ones."""
    found = steps(run)
    for step in found[: max(len(found) - keep_last, 0)]:
        if step not in referenced:
            shutil.rmtree(folder(run, step), ignore_errors=True)


# -- the parts of a state --------------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Collect what training can change: adapters, trained parameters, the buffers beside them."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        prefix = f"{path}." if path else ""
        for name, parameter in own.items():
            if parameter.requires_grad or "lora_" in prefix + name:
                found[prefix + name] = parameter.detach()
        if "lora_" in prefix or any(parameter.requires_grad for parameter in own.values()):
            found |= {prefix + name: b for name, b in module.named_buffers(recurse=False)}
    return found


def load_tensors(model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    """Put `stored` back, in place and bit for bit, after checking all names and shapes."""
    own = tensors(model)
    faults = [f"{name}: not in the checkpoint" for name in own if name not in stored]
    faults += [f"{name}: not in this model" for name in stored if name not in own]
    for name in own.keys() & stored.keys():
        ours, theirs = tuple(own[name].shape), tuple(stored[name].shape)
        if ours != theirs:
            faults.append(f"{name}: shape {theirs} in the checkpoint, {ours} in this model")
    if faults:
        raise CheckpointError(
            "the checkpoint is of a model with other adapters: resume with the settings of its "
            "run\n" + listing(sorted(faults), 8)
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def optimizer_state(optimizer: Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Give the optimizer's state by parameter name; `names` has them by `id(parameter)`."""
    state = optimizer.state_dict()["state"]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    return {names[id(p)]: state[i] for i, p in enumerate(order) if i in state}


def load_optimizer_state(
    optimizer: Optimizer, names: dict[int, str], stored: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` gave; the settings (lr, decay) stay those of this run."""
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if stored and set(order) != set(stored):
        odd = sorted(set(order) ^ set(stored))
        raise CheckpointError(
            "the checkpoint's optimizer trained other parameters\n" + listing(odd, 8)
        )
    own = optimizer.state_dict()
    state = {i: stored[name] for i, name in enumerate(order) if name in stored}
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def load_schedule(schedule: Any, done: int) -> None:
    """Go to the place after `done` updates; the shape of the schedule stays this run's setting."""
    rates = [
        base * factor(done)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict(
        {
            "last_epoch": done,
            "_step_count": done + 1,
            "_last_lr": rates,
            "lr_lambdas": [None] * len(rates),  # functions are not stored: keep this run's
        }
    )


def random_state() -> dict[str, Any]:
    """Take the state of every random generator of this process, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [str(name), [int(key) for key in keys], position, has_gauss, float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
