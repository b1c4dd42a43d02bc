"""Exact and fast LoRA layers for any `nn.Module`.

The public names are loaded on first use, so that `import lora_core`, command-line help and the
checking of settings do not pay for importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_core.first_use import loader

__version__ = "0.1.0"

_HOME = {
    "LoraConfig": "config",
    "Slices": "config",
    "adapters_off": "injection",
    "functional": "functional",
    "inject": "injection",
    "load_adapter": "adapters.file",
    "lora_layers": "injection",
    "merge": "merging",
    "merged_state_dict": "merging",
    "parameter_groups": "injection",
    "remove": "injection",
    "save_adapter": "adapters.file",
    "set_adapters": "injection",
    "summary": "injection",
    "unmerge": "merging",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from lora_core import functional as functional
    from lora_core.adapters.file import load_adapter as load_adapter
    from lora_core.adapters.file import save_adapter as save_adapter
    from lora_core.config import LoraConfig as LoraConfig
    from lora_core.config import Slices as Slices
    from lora_core.injection import adapters_off as adapters_off
    from lora_core.injection import inject as inject
    from lora_core.injection import lora_layers as lora_layers
    from lora_core.injection import parameter_groups as parameter_groups
    from lora_core.injection import remove as remove
    from lora_core.injection import set_adapters as set_adapters
    from lora_core.injection import summary as summary
    from lora_core.merging import merge as merge
    from lora_core.merging import merged_state_dict as merged_state_dict
    from lora_core.merging import unmerge as unmerge

__getattr__ = loader(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
