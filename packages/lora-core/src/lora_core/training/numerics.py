"""When a loss or a gradient is not finite: where it happened, and what is needed to see it again.

The trainer asks before any weight or moment is touched. What it finds goes into one message and
into a folder `nonfinite-step<N>/`: the batches and the adapter as they were, and the random state
with which the update began. `replay` runs that update again.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_core.checkpoint.state import from_json, pack, to_json, unpack
from lora_core.errors import CheckpointError, one_line
from lora_core.report import figure, plural
from lora_core.tensor_file import read_safetensors, safetensors_bytes

FACTS, TENSORS = "nonfinite.json", "nonfinite.safetensors"
LISTED = 3  # names in a message


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """2-norm of all gradients together, a scalar; of sharded ones that of the whole tensors."""
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient holds a NaN or an infinity."""
    return [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]


def sample_ids(batch: Any) -> list[str]:
    """The ids that a package's collate function puts into its batches as "keys"."""
    keys = batch.get("keys") if isinstance(batch, Mapping) else None
    return [str(key) for key in keys] if isinstance(keys, (list, tuple)) else []


def facts(
    model: nn.Module, batches: Sequence[Any], parts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What one process knows about its update, as plain values.

    Args:
        batches: the micro-batches of the update.
        parts: of each, the loss and its parts.
    """
    values = [{name: float(value) for name, value in each.items()} for each in parts]
    bad = [i for i, each in enumerate(values) if not math.isfinite(each["loss"])]
    return {
        "samples": [sample_ids(batch) for batch in batches],
        "parts": values,
        "bad_batches": bad,
        "gradients": not_finite(model),
    }


def explain(step: int, everyone: Sequence[Mapping[str, Any]]) -> str:
    """Say for people what is not finite, from the facts of all processes."""
    lines = []
    for rank, found in enumerate(everyone):
        for i in found["bad_batches"]:
            where = f" (process {rank})" if len(everyone) > 1 else ""
            parts = ", ".join(
                f"{name} {figure(value)}" for name, value in found["parts"][i].items()
            )
            lines.append(f"the loss is not finite{where}: {parts}; {_samples(found['samples'][i])}")
    if not lines:
        # The gradients of all processes are one sum: any of the samples can be the cause.
        ids = [key for found in everyone for batch in found["samples"] for key in batch]
        lines.append(f"the loss is finite, its gradient is not; {_samples(ids)}")
    names = everyone[0]["gradients"]
    if names:
        lines[0] += f"; {plural(len(names), 'gradient')} not finite: {_first(names)}"
    return f"step {step}: " + lines[0] + (f" (and {len(lines) - 1} more)" if lines[1:] else "")


def _samples(ids: Sequence[str]) -> str:
    return f"samples: {_first(ids, 8)}" if ids else "the batches have no sample ids"


def _first(names: Sequence[str], count: int = LISTED) -> str:
    return ", ".join(map(one_line, names[:count])) + (", ..." if len(names) > count else "")


# -- the folder that reproduces it -----------------------------------------------------------------


def write_bundle(
    folder: Path,
    batches: Sequence[Any],
    random: Mapping[str, Any],
    found: Mapping[str, Any],
    write_adapter: Callable[[Path], object],
) -> Path:
    """Write `folder`, complete or not at all; one of an earlier attempt is replaced.

    Args:
        batches: the micro-batches of the update: tensors, plain values, dicts and lists.
        random: torch's random states when the update began, from `torch_random`.
        found: from `facts`, and whatever else should be known.

    Raises:
        OSError: it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        packed, tensors = pack(_plain({"batches": list(batches), "random": dict(random)}))
        (partial / TENSORS).write_bytes(safetensors_bytes(tensors, {}))
        about = {
            "replay": "load the adapter beside this file (load_adapter), then "
            "lora_core.training.numerics.replay(folder, model, loss) runs the update again",
            **found,
        }
        (partial / FACTS).write_bytes(to_json({"about": pack(about)[0], "state": packed}, indent=1))
        write_adapter(partial / "adapter")
        if (folder / FACTS).is_file():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def torch_random() -> dict[str, Any]:
    """State of torch's generators on the CPU and on the current GPU."""
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if gpu else None}


def replay(
    folder: str | Path, model: nn.Module, loss: Callable[[nn.Module, Any], tuple[Tensor, Any]]
) -> list[tuple[Tensor, Any]]:
    """Compute the losses of the update again, from the same batches and random state.

    Args:
        model: with the adapter of the folder loaded, in training mode as in the run.
        loss: as the trainer has it, `(model, batch) -> (scalar, parts)`.

    Returns:
        Of each micro-batch the loss, from which `backward` can be called, and its parts.

    Raises:
        CheckpointError: no such folder, or a damaged one.
    """
    batches, random = read_bundle(folder)
    device = next(model.parameters()).device
    torch.set_rng_state(random["torch"])
    if random["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return [loss(model, _moved(batch, device)) for batch in batches]


def read_bundle(folder: str | Path) -> tuple[list[Any], dict[str, Any]]:
    """Give the micro-batches, on the CPU, and torch's random states of the folder."""
    file = Path(folder) / FACTS
    try:
        content = from_json(file.read_bytes())
        state = unpack(content["state"], read_safetensors(Path(folder) / TENSORS)[0])
        return state["batches"], state["random"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read {file.absolute()}: {error}") from error


def _plain(value: Any) -> Any:
    """Reduce a batch to what a file can hold; of other objects their text stays."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value


# -- updates that were dropped ---------------------------------------------------------------------


def dropped(steps: Collection[int]) -> str:
    """Say which updates a run has dropped."""
    listed = ", ".join(map(str, sorted(steps)[:20])) + (", ..." if len(steps) > 20 else "")
    count = plural(len(steps), "update")
    return f"{count} dropped, as the loss or its gradient was not finite: {listed}"
