"""How a module becomes an adapted one, and itself again.

- wrap: the class gets a fast `forward` from `lora_core.functional`. For Linear, Conv1d/2d/3d and
  Embedding whose own `__call__` is what the model uses.
- parametrize: other code computes with the weight: `nn.MultiheadAttention` and its `out_proj`,
  the evaluation path of `nn.TransformerEncoderLayer`, tied weights, layers of unknown kind. The
  class gets a property in the parameter's place: reading `weight` gives `W + s B A`, while the raw
  parameter stays registered under its name, so state dicts do not notice. A Linear has the fast
  `forward` as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import functional as lora
from lora_core import initialise
from lora_core.layers import BIAS_OF, AdapterSpec, Factor, Kind, LoraLayer

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class WrappedLayer(LoraLayer):
    """An adapted layer with a fast forward pass of its own."""

    def lora_forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        base: lora.Base,
        adapted: Callable[[Tensor, Tensor, Tensor | None, Sequence[lora.Branch]], Tensor],
    ) -> Tensor:
        """The layer's output; `base(x, W, b)` and `adapted(x, W, b, branches)` are its kind's."""
        W, live = self.lora_raw("weight"), self.lora_live()
        if not any(self.lora_adapters[name].use_dora for name in live):
            bias = self.lora_added_bias(bias, live)
            if not live:
                return base(x, W, bias)
            return adapted(x, W, bias, self.lora_branches("weight", live))
        (name, *others) = live
        if others or self.lora_scales[name] != 1:  # several magnitudes: add up the weights
            return base(x, self.lora_weight("weight"), self.lora_added_bias(bias, live))
        (branch,) = self.lora_branches("weight", live)
        ratio = self._lora_ratio(name, W.to(branch.A.dtype), branch.A, branch.B)
        if base is F.linear:
            return lora.dora_linear(x, W, bias, branch, ratio)
        return lora.dora_layer(x, W, bias, branch, ratio, base, adapted)


class LoraLinear(WrappedLayer):
    """nn.Linear with adapters."""

    def forward(self, input: Tensor) -> Tensor:
        return self.lora_forward(input, self._parameters["bias"], F.linear, lora.lora_linear)


class LoraConv(WrappedLayer):
    """nn.Conv1d, 2d or 3d with adapters; stride, padding, dilation and groups are the base's."""

    groups: int
    _conv_forward: lora.Base

    def forward(self, input: Tensor) -> Tensor:
        adapted = functools.partial(lora.lora_conv, conv=self._conv_forward, groups=self.groups)
        return self.lora_forward(input, self._parameters["bias"], self._conv_forward, adapted)


class LoraEmbedding(WrappedLayer):
    """nn.Embedding with adapters."""

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool

    def forward(self, input: Tensor) -> Tensor:
        return self.lora_forward(input, None, self._base, self._adapted)

    def _lookup(self, tokens: Tensor, table: Tensor, **norm: Any) -> Tensor:
        return F.embedding(
            tokens, table, self.padding_idx, **norm, scale_grad_by_freq=self.scale_grad_by_freq
        )

    def _base(self, tokens: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        # max_norm rescales rows of the table in place: the base's business, never A's.
        return self._lookup(tokens, table, max_norm=self.max_norm, norm_type=self.norm_type)

    def _adapted(
        self,
        tokens: Tensor,
        table: Tensor,
        bias: Tensor | None,
        branches: Sequence[lora.Branch],
    ) -> Tensor:
        return lora.lora_embedding(self._base(tokens, table), tokens, branches, self._lookup)


class TiedLayer(nn.Module):
    """A module whose weight belongs to an adapted layer too: it reads the adapted one."""

    lora_base_class: type[nn.Module]
    lora_owner: LoraLayer
    lora_owner_weight: str


_FORWARDS: dict[Kind, type[LoraLayer]] = {
    "linear": LoraLinear,
    "conv": LoraConv,
    "embedding": LoraEmbedding,
}


def kind_of(module: nn.Module) -> Kind | None:
    """What kind of adaptable layer this is; None: it has no weight that an adapter could change."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    weight = module._parameters.get("weight")
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    if weight is None or weight.dim() < 2 or isinstance(module, norms):
        return None
    if not weight.is_floating_point() or weight.element_size() < 2:  # quantised storage
        return None
    kinds: list[tuple[Any, Kind]] = [
        (nn.Linear, "linear"),
        (CONVS, "conv"),
        (TRANSPOSED_CONVS, "conv_transpose"),
        (nn.Embedding, "embedding"),
    ]
    return next((kind for classes, kind in kinds if isinstance(module, classes)), "weight")


def runs_torch_forward(module: nn.Module) -> bool:
    """Whether the module runs torch's own forward of its kind, so that ours may stand in for it."""
    classes = (nn.Linear, *CONVS, nn.Embedding)
    own = next((cls for cls in classes if isinstance(module, cls)), None)
    base = getattr(module, "lora_base_class", type(module))
    return (
        own is not None
        and base.forward is own.forward
        and getattr(base, "_conv_forward", None) is getattr(own, "_conv_forward", None)
        and "forward" not in vars(module)
    )


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of an adaptable layer that an adapter changes."""
    if not isinstance(module, nn.MultiheadAttention):
        return ("weight",)
    if module._qkv_same_embed_dim:
        return ("in_proj_weight",)
    return ("q_proj_weight", "k_proj_weight", "v_proj_weight")


# Changing and restoring the class


_SUBCLASSES: dict[tuple[type[nn.Module], type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _subclass(
    mixin: type[nn.Module], base: type[nn.Module], properties: tuple[str, ...]
) -> type[nn.Module]:
    """The one class that adds `mixin` and properties in place of these parameters to `base`."""
    key = (mixin, base, properties)
    if key not in _SUBCLASSES:
        body: dict[str, Any] = {"lora_base_class": base, "__module__": base.__module__}
        # deepcopy and pickle must not look for the class by its name: there is none to import.
        body["__reduce_ex__"] = lambda self, protocol: (_rebuild, key, self.__getstate__())
        body |= {name: _reading(mixin, name) for name in properties}
        _SUBCLASSES[key] = type(f"Lora{base.__name__}", (mixin, base), body)
    return _SUBCLASSES[key]


def _rebuild(
    mixin: type[nn.Module], base: type[nn.Module], properties: tuple[str, ...]
) -> nn.Module:
    cls = _subclass(mixin, base, properties)
    return cls.__new__(cls)


def _reading(mixin: type[nn.Module], name: str) -> property:
    """The property that stands in the place of a parameter."""
    if mixin is TiedLayer:
        return property(lambda self: self.lora_owner.lora_weight(self.lora_owner_weight))
    if name in BIAS_OF.values():
        return property(lambda self: self.lora_read_bias(name))
    return property(lambda self: self.lora_weight(name))


def adapt(module: nn.Module, name: str, spec: AdapterSpec, seed: int) -> None:
    """Add an adapter to a module in place; its pair starts as a function of `seed`.

    It is not active yet, and trains as `spec` says. A and B are fp32 (fp64 for an fp64 base) and
    lie on the weight's device.
    """
    if not isinstance(module, LoraLayer):
        _become(module, spec)
    assert isinstance(module, LoraLayer)
    downs, ups = {}, {}
    for weight in spec.weight_names:
        pair = initialise.pair(module.lora_raw(weight), spec, initialise.module_seed(seed, weight))
        downs[spec.factor_name(weight)], ups[spec.factor_name(weight)] = pair
    module.lora_adapters[name] = spec
    module.lora_scales[name] = 1.0
    if spec.kind == "embedding":
        for container, factor in (("lora_embedding_A", downs), ("lora_embedding_B", ups)):
            held = _container(module, container, nn.ParameterDict)
            held[name] = nn.Parameter(factor["weight"])
    else:
        initial_A, initial_B = (downs, ups) if spec.has_initial else ({}, {})
        bias = {"bias": ups["weight"].new_zeros(ups["weight"].shape[0])} if spec.lora_bias else {}
        _container(module, "lora_A", nn.ModuleDict)[name] = Factor(downs, initial_A)
        _container(module, "lora_B", nn.ModuleDict)[name] = Factor(ups | bias, initial_B)
    if spec.use_dora:
        A, B = module.lora_factors(name)
        start = initialise.magnitude(module.lora_raw(spec.weight_name), A, B, spec)
        held = _container(module, "lora_magnitude_vector", nn.ModuleDict)
        held[name] = Factor({"weight": start})
    set_trainable(module, name, spec.trainable)


def set_trainable(module: LoraLayer, name: str, trainable: bool) -> None:
    """Let the parameters of one adapter require gradients, or not; a frozen A stays frozen."""
    frozen_A = module.lora_adapters[name].freeze_A
    for key, parameter in module.lora_parameters(name).items():
        is_A = key.startswith(("lora_A.", "lora_embedding_A."))
        parameter.requires_grad_(trainable and not (is_A and frozen_A))


def drop(module: LoraLayer, name: str) -> None:
    """Take one adapter away; the last one gives the module back as it was."""
    if set(module.lora_adapters) == {name}:
        strip(module)
        return
    for container in _CONTAINERS:
        if name in (held := getattr(module, container, {})):
            del held[name]
    del module.lora_adapters[name], module.lora_scales[name]
    module.lora_active = [active for active in module.lora_active if active != name]


def strip(module: nn.Module) -> None:
    """Give an adapted or tied module its own class back and forget every adapter.

    The raw weights are left as they are: with merged adapters they stay merged.
    """
    if isinstance(module, LoraLayer | TiedLayer):
        for name in (*_CONTAINERS, *_STATE, *_TIE):
            module.__dict__.pop(name, None)
            module._modules.pop(name, None)
        module.__class__ = module.lora_base_class  # type: ignore[assignment]


def tie(module: nn.Module, weight_name: str, owner: LoraLayer, owner_weight: str) -> None:
    """Let `module`, whose raw weight is also that of `owner`, read the adapted one."""
    module.__dict__["lora_owner"] = owner  # not a submodule: that would double the owner's keys
    module.__dict__["lora_owner_weight"] = owner_weight
    module.__class__ = _subclass(TiedLayer, type(module), (weight_name,))


_CONTAINERS = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
_STATE = ("lora_adapters", "lora_active", "lora_scales", "lora_merged", "lora_kept")
_TIE = ("lora_owner", "lora_owner_weight")


def _become(module: nn.Module, spec: AdapterSpec) -> None:
    fast = runs_torch_forward(module)
    mixin = _FORWARDS[spec.kind] if fast and spec.kind in _FORWARDS else LoraLayer
    properties: tuple[str, ...] = ()
    if spec.mechanism == "parametrize":
        properties = weight_names(module)
        biases = (BIAS_OF[name] for name in properties if name in BIAS_OF)
        properties += tuple(bias for bias in biases if module._parameters.get(bias) is not None)
    module.__class__ = _subclass(mixin, type(module), properties)
    module.__dict__.update(
        lora_adapters={}, lora_active=[], lora_scales={}, lora_merged=(), lora_kept=None
    )


def _container(module: nn.Module, name: str, kind: Callable[[], Any]) -> Any:
    if name not in module._modules:
        setattr(module, name, kind())
    return module._modules[name]
