"""What a training checkpoint holds: the parts of a state, and their form in files.

Tensors are kept by parameter name, so that nothing lands in another parameter unnoticed. On the
disk a state is JSON, in which each tensor is a reference into a safetensors file beside it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_core.errors import CheckpointError, listing

# -- collecting and restoring ----------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Collect what training can change: adapters, trained parameters, the buffers beside them."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        prefix = f"{path}." if path else ""
        for name, parameter in own.items():
            if parameter.requires_grad or "lora_" in prefix + name:
                found[prefix + name] = parameter.detach()
        if "lora_" in prefix or any(parameter.requires_grad for parameter in own.values()):
            found |= {prefix + name: b for name, b in module.named_buffers(recurse=False)}
    return found


def load_tensors(model: nn.Module, stored: dict[str, Tensor]) -> None:
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
    """Put back what `optimizer_state` gave; the settings (lr, decay) stay those of this run.

    torch itself takes moments of any shape and only fails, or broadcasts, in the next update.
    """
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    if stored and parameters.keys() != stored.keys():
        odd = sorted(parameters.keys() ^ stored.keys())
        raise CheckpointError(
            "the checkpoint's optimizer trained other parameters\n" + listing(odd, 8)
        )
    faults = [
        f"{name}: {kind} has the shape {tuple(moment.shape)}, the parameter "
        f"{tuple(parameters[name].shape)}"
        for name, entry in stored.items()
        for kind, moment in entry.items()
        # Factored moments (Adafactor) have fewer dimensions, and names of their own.
        if (kind.startswith("exp_avg") or kind == "momentum_buffer") and isinstance(moment, Tensor)
        if moment.dim() == parameters[name].dim() and moment.shape != parameters[name].shape
    ]
    if faults:
        raise CheckpointError(
            "the checkpoint's optimizer trained parameters of other shapes\n" + listing(faults, 8)
        )
    own = optimizer.state_dict()
    state = {i: stored[name] for i, name in enumerate(parameters) if name in stored}
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


# -- as files --------------------------------------------------------------------------------------

# JSON has no tuple, no tensor, no NaN, and only strings as keys: such a value becomes an object
# with this one key, {"$": [kind, content]}.
TAG = "$"


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Give `value` as what JSON can hold exactly, and its tensors by the path to them.

    Args:
        value: None, bool, int, float, str, tensor, and dicts, lists and tuples of these. One tensor
            in two places is stored once and comes back as one.

    Raises:
        CheckpointError: anything else; the message has its path and class.
    """
    store: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of the tensors in `store`, by their id
    return _pack(value, "state", store, names), store


def _pack(value: Any, path: str, store: dict[str, Tensor], names: dict[int, str]) -> Any:
    def inner(item: Any, key: object) -> Any:
        return _pack(item, f"{path}.{key}", store, names)

    if isinstance(value, Tensor):
        if id(value) not in names:
            name = path
            while name in store:  # {"a.b": ...} beside {"a": {"b": ...}}
                name += "'"
            store[name], names[id(value)] = value, name
        return {TAG: ["tensor", names[id(value)]]}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {TAG: ["float", repr(float(value))]}
    if isinstance(value, tuple):
        return {TAG: ["tuple", [inner(item, i) for i, item in enumerate(value)]]}
    if isinstance(value, list):
        return [inner(item, i) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [[key, inner(item, key)] for key, item in value.items()]
        if all(isinstance(key, str) and key != TAG for key in value):
            return dict(items)
        return {TAG: ["dict", [[inner(key, key), item] for key, item in items]]}
    cls = type(value)
    raise CheckpointError(
        f"{path} is a {cls.__module__}.{cls.__qualname__}, which a checkpoint cannot hold: only "
        "tensors, numbers, strings, None, and dicts, lists and tuples of them"
    )


def unpack(value: Any, store: Mapping[str, Tensor]) -> Any:
    """Undo `pack`.

    Raises:
        ValueError, KeyError, TypeError: `value` did not come from it.
    """
    if isinstance(value, list):
        return [unpack(item, store) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: unpack(item, store) for key, item in value.items()}
    ((kind, content),) = value.values()
    if kind == "tensor":
        return store[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(unpack(item, store) for item in content)
    if kind == "dict":
        return {unpack(key, store): unpack(item, store) for key, item in content}
    raise ValueError(f"{kind!r} is no kind of value")


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Write packed values as standard JSON."""
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def from_json(data: bytes) -> Any:
    """Read what `to_json` wrote.

    Raises:
        ValueError: no standard JSON, or nested too deeply.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
