"""Which state-dict keys and which memory belong to the weights that adapters change."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lora_core.errors import ConfigError, listing
from lora_core.layers import BIAS_OF, LoraLayer
from lora_core.mechanisms import TiedLayer
from lora_core.module_names import clean, join


def changed_names(layer: LoraLayer, adapters: Iterable[str] | None = None) -> list[str]:
    """The parameters of a layer that these adapters, by default the active ones, change."""
    names: dict[str, None] = {}
    for adapter in layer.lora_active if adapters is None else adapters:
        spec = layer.lora_adapters[adapter]
        names |= dict.fromkeys(spec.weight_names)
        if spec.lora_bias:
            names[BIAS_OF[spec.weight_name]] = None
    return [name for name in names if layer._parameters.get(name) is not None]


def keys_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter of an adapted layer -> all its state-dict keys.

    Several where a module has two names, or where layers tied to it share the weight.
    """
    keys: dict[int, list[str]] = {}
    for path, module in [*_places(model, LoraLayer), *_places(model, TiedLayer)]:
        for name, parameter in module._parameters.items():
            keys.setdefault(id(parameter), []).append(join(clean(path), name))
    return keys


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without adapters and without the names of wrappers inside it."""
    prefixes = {join(path, "lora_") for path, module in _places(model, LoraLayer)}
    return {
        clean(key): tensor
        for key, tensor in model.state_dict().items()
        if prefixes.isdisjoint(_beginnings(key))
    }


def _beginnings(key: str) -> set[str]:
    """`a.lora_` for each way to cut a key before a part that starts with `lora_`."""
    parts = key.split(".")
    return {
        join(".".join(parts[:i]), "lora_") for i, p in enumerate(parts) if p.startswith("lora_")
    }


def _places(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Every path of every module of a kind: a shared module has several."""
    modules = model.named_modules(remove_duplicate=False)
    return [(path, module) for path, module in modules if isinstance(module, kind)]


def refuse_ties(model: nn.Module) -> None:
    """Refuse to change a weight whose memory belongs to another parameter as well.

    Layers that share an adapted weight and read it with its adapter (`TiedLayer`) are no problem.

    Raises:
        ConfigError: naming the pairs.
    """
    spans: dict[int, list[tuple[int, int, str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is None or tensor.is_meta or hasattr(tensor, "full_tensor"):
                continue
            start = tensor.data_ptr()
            stop = start + tensor.numel() * tensor.element_size()
            storage = tensor.untyped_storage().data_ptr()
            spans.setdefault(storage, []).append((start, stop, join(path, name), module))
    problems = []
    for shared in spans.values():
        for start, stop, key, module in shared:
            name = key.rpartition(".")[2]
            if not isinstance(module, LoraLayer) or name not in changed_names(module):
                continue
            problems += [
                f"{key} and {other}"
                for a, b, other, holder in shared
                if holder is not module and a < stop and start < b
                if not (isinstance(holder, TiedLayer) and holder.lora_owner is module)
            ]
    if problems:
        raise ConfigError(
            "merging would change weights that are shared:\n"
            f"{listing(problems)}\nPass untie=True to give the merged ones memory of their own"
        )
