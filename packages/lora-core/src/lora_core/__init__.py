"""Exact and fast LoRA layers for any `nn.Module`.

The public names are loaded on first use, so that `import lora_core`, command-line help and the
checking of settings do not pay for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LoraConfig": "config",
    "Slices": "config",
    "adapters_off": "inject",
    "functional": "functional",
    "inject": "inject",
    "load_adapter": "adapter_file",
    "lora_layers": "inject",
    "merge": "merge",
    "merged_state_dict": "merge",
    "parameter_groups": "inject",
    "remove": "inject",
    "save_adapter": "adapter_file",
    "set_adapters": "inject",
    "summary": "inject",
    "unmerge": "merge",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from lora_core import functional as functional
    from lora_core.adapter_file import load_adapter as load_adapter
    from lora_core.adapter_file import save_adapter as save_adapter
    from lora_core.config import LoraConfig as LoraConfig
    from lora_core.config import Slices as Slices
    from lora_core.inject import adapters_off as adapters_off
    from lora_core.inject import inject as inject
    from lora_core.inject import lora_layers as lora_layers
    from lora_core.inject import parameter_groups as parameter_groups
    from lora_core.inject import remove as remove
    from lora_core.inject import set_adapters as set_adapters
    from lora_core.inject import summary as summary
    from lora_core.merge import merge as merge
    from lora_core.merge import merged_state_dict as merged_state_dict
    from lora_core.merge import unmerge as unmerge


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_core' has no attribute {name!r}")
    home = import_module(f"lora_core.{_HOME[name]}")
    # `inject` and `merge` are also names of submodules: the function must win over the module
    # that the import has just bound here.
    globals()[name] = home if name == _HOME[name] == "functional" else getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
