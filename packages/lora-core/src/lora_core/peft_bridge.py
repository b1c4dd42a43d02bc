"""Our fast linear function inside a live PeftModel; the only module that knows PEFT's classes.

    config = lora_core.peft_bridge.fast_linear(peft.LoraConfig(...))
    model = peft.get_peft_model(base, config)

Names, files and everything else stay PEFT's.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_core.functional import Branch, lora_linear

if TYPE_CHECKING:
    import peft


def fast_linear(config: peft.LoraConfig) -> peft.LoraConfig:
    """Let PEFT use our function for every exact `nn.Linear` that it adapts with plain LoRA.

    Changes and returns `config`; for a PEFT that builds its layers in an unknown way, only warns.
    """
    from peft.tuners.lora.layer import Linear

    known = {"base_layer", "adapter_name", "config", "r", "lora_alpha"}
    register = getattr(config, "_register_custom_module", None)
    if register is None or not known <= inspect.signature(Linear.__init__).parameters.keys():
        warnings.warn("unknown version of PEFT: its own layers are used", stacklevel=2)
        return config

    class FastLinear(Linear):
        """PEFT's Linear with our forward pass where it computes the same."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            base, names = self.base_layer, [n for n in self.active_adapters if n in self.lora_A]
            special = self.disable_adapters or self.merged or args or kwargs
            special = special or base._forward_hooks or base._forward_pre_hooks
            if special or any(n in self.lora_variant or self.lora_bias[n] for n in names):
                return super().forward(x, *args, **kwargs)
            return lora_linear(x, base.weight, base.bias, [self.branch(name) for name in names])

        def branch(self, name: str) -> Branch:
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            p = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
            return Branch(A, B, self.scaling[name], dropout=p)

    def build(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        # Subclasses (quantised layers, attention's out_proj) and bare parameters are PEFT's affair.
        if type(target) is not nn.Linear or kwargs.get("parameter_name") is not None:
            return None
        return FastLinear(target, adapter_name, **kwargs)

    register({nn.Linear: build})
    return config
