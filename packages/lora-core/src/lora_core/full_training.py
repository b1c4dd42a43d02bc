"""What an adapter trains in full: `modules_to_save` and biases of the base.

They train in place, under their own names, so that the model computes with them as ever. The base's
values are kept aside: an adapter that is switched off, or removed, gives them back bit for bit.
Switching exchanges the storage behind a tensor (`.data`), so the parameter objects that an
optimizer holds stay the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.module_names import join


@dataclass
class FullTensor:
    """One tensor of the model that some adapters train, or keep statistics in, as a whole.

    Attributes:
        module, name: where it lives.
        base: the base's values.
        live: the adapter whose values the module holds now; None: the base's.
        values: adapter -> its values, for the adapters that are not live.
        trainable: adapters that train it, not loaded for use only.
    """

    module: nn.Module
    name: str
    base: Tensor
    live: str | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)

    @property
    def tensor(self) -> Tensor:
        """The tensor in the module."""
        return _raw(self.module, self.name)

    @property
    def adapters(self) -> set[str]:
        """The adapters that have values of their own for it."""
        return set(self.values) | ({self.live} if self.live else set())

    def of(self, adapter: str) -> Tensor:
        """The values of one adapter."""
        return self.tensor.detach() if adapter == self.live else self.values[adapter]

    def switch(self, adapter: str | None) -> None:
        """Let the module hold the values of `adapter`, or the base's, and train them if it does."""
        tensor = self.tensor
        if adapter != self.live:
            if self.live is None:
                self.base = tensor.data
            else:
                self.values[self.live] = tensor.data
            new = self.base if adapter is None else self.values.pop(adapter)
            tensor.data = new.to(tensor.device, tensor.dtype)
            self.live = adapter
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(adapter in self.trainable)


def _raw(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer itself, even where reading it gives an adapted one."""
    found = module._parameters.get(name)
    if found is None:
        found = module._buffers[name]  # type: ignore[assignment]
    assert found is not None
    return found


def keep_aside(
    model: nn.Module, adapter: str, full: dict[str, FullTensor], keys: Iterable[str], train: bool
) -> None:
    """Give `adapter` values of its own, the base's at first, for these state-dict keys."""
    for key in keys:
        path, _, name = key.rpartition(".")
        if key not in full:
            module = model.get_submodule(path)
            full[key] = FullTensor(module, name, _raw(module, name).data)
        entry = full[key]
        base = entry.base if entry.live is not None else entry.tensor.data
        entry.values[adapter] = base.clone()
        if train:
            entry.trainable.add(adapter)


def switch_all(full: dict[str, FullTensor], active: Collection[str]) -> None:
    """Let every tensor hold the values of the active adapter that trains it, else the base's.

    Raises:
        ConfigError: two active adapters train the same tensor; nothing is switched.
    """
    wanted: dict[str, str | None] = {}
    for key, entry in full.items():
        names = [name for name in active if name in entry.adapters]
        if len(names) > 1:
            raise ConfigError(
                f"adapters {names} each have their own {key}: only one of them can be active"
            )
        wanted[key] = names[0] if names else None
    for key, entry in full.items():
        entry.switch(wanted[key])


def forget(full: dict[str, FullTensor], adapter: str, keys: Collection[str] | None = None) -> None:
    """Drop an adapter's values, all or those of `keys`; the base's return where it was live."""
    for key in list(full) if keys is None else keys:
        entry = full[key]
        if entry.live == adapter:
            entry.switch(None)
        entry.values.pop(adapter, None)
        entry.trainable.discard(adapter)
        if not entry.adapters:
            del full[key]


def keys_of_module(path: str, module: nn.Module) -> list[str]:
    """State-dict keys of all that a module saves."""
    return [join(path, key) for key in module.state_dict(keep_vars=True)]


def bias_keys(model: nn.Module) -> list[str]:
    """State-dict keys of every bias of the base."""
    return [
        key
        for key, _ in model.named_parameters()
        if key.rsplit(".", 1)[-1].endswith("bias") and ".lora_" not in f".{key}"
    ]
