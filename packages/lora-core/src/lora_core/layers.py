"""What every adapted layer holds and offers; `mechanisms` says how a module becomes one.

Adapting changes the class of a module in place to a subclass of its own class and `LoraLayer`.
Parameters, hooks, device, mode and state-dict keys stay; only keys are added:
`lora_A.<adapter>.weight`, `lora_B.<adapter>.weight` (embeddings: `lora_embedding_A.<adapter>`,
`lora_embedding_B.<adapter>`), with DoRA `lora_magnitude_vector.<adapter>.weight`.

Active adapters add up: `W' = W + sum of c dW`, where dW is what one adapter alone changes and c the
user's multiplier (1 unless set).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_core import dropout, file_layout
from lora_core import functional as lora
from lora_core.errors import CheckpointError, NumericError

Kind: TypeAlias = Literal["linear", "conv", "conv_transpose", "embedding", "attention", "weight"]
Mechanism: TypeAlias = Literal["wrap", "parametrize"]

# The bias that belongs to a weight. Separate query, key and value weights share one.
BIAS_OF = {"weight": "bias", "in_proj_weight": "in_proj_bias"}


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of one layer.

    Attributes:
        r: rank of one pair. alpha: see `scale`. dropout: p of the adapter's input.
        kind, mechanism: how the layer computes, see `mechanisms`.
        weight_names: the parameters that change; more than one only for an attention layer whose
            query, key and value weights are separate.
        slices: (name, first row, row behind the last) of each adapted part of a fused weight, each
            with a pair of its own; None: one pair for all rows.
        groups: of a convolution, each with a pair of its own.
        init: True, "gaussian", "pissa" or "olora".
        trainable: False for an adapter that was loaded for use only.
    """

    r: int
    alpha: float
    kind: Kind = "linear"
    mechanism: Mechanism = "wrap"
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    freeze_A: bool = False
    init: bool | str = True
    slices: tuple[tuple[str, int, int], ...] | None = None
    groups: int = 1
    weight_names: tuple[str, ...] = ("weight",)
    trainable: bool = True

    @property
    def scale(self) -> float:
        """s of `s B A`, without the user's multiplier."""
        return lora.scaling(self.r, self.alpha, self.use_rslora)

    @property
    def weight_name(self) -> str:
        """The first, as a rule the only, weight that changes."""
        return self.weight_names[0]

    @property
    def rows(self) -> lora.Rows | None:
        """The slices as ranges of output rows."""
        return None if self.slices is None else tuple((a, b) for _, a, b in self.slices)

    @property
    def transposed(self) -> bool:
        """Whether the first axis of the weight is the input."""
        return self.kind in ("embedding", "conv_transpose")

    @property
    def has_initial(self) -> bool:
        """PiSSA and OLoRA start from a pair that is subtracted: `s (B A - B0 A0)`."""
        return self.init in ("pissa", "olora")

    @property
    def beyond_peft(self) -> bool:
        """Whether PEFT has no layer that computes this."""
        several = self.groups > 1 or len(self.weight_names) > 1
        return several or self.kind in ("conv_transpose", "weight")

    @property
    def file_rank(self) -> tuple[int, float]:
        """(r, alpha) of the same adapter as one plain pair, as files hold it.

        k slices on a block diagonal and the initial pair multiply the rank; alpha follows, so that
        the scale stays.
        """
        factor = len(self.slices or (0,)) * (2 if self.has_initial else 1)
        return self.r * factor, self.alpha * (factor**0.5 if self.use_rslora else factor)

    def factor_name(self, weight_name: str) -> str:
        """Name of A's and B's parameter for a weight: `weight` unless there are several."""
        return "weight" if len(self.weight_names) == 1 else weight_name


class Factor(nn.Module):
    """A, B or the magnitude of one adapter: parameters by name, `weight` as a rule.

    The buffers `initial_<name>` are the pair that PiSSA and OLoRA subtract.
    """

    def __init__(self, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None = None):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in (initial or {}).items():
            self.register_buffer(f"initial_{name}", tensor.clone())


class LoraLayer(nn.Module):
    """Adapters of one module; mixed into the module's own class.

    Attributes:
        lora_adapters: adapter name -> its spec.
        lora_active: names of the adapters that act, in order.
        lora_scales: adapter name -> the user's multiplier c of its effect.
        lora_merged: names of the adapters that the raw weight contains; while there are any,
            the forward pass adds nothing.
        lora_kept: what merged weights were, for undoing: parameter name -> copy on the CPU, or the
            parameter itself where merging put another one in its place.
    """

    lora_base_class: type[nn.Module]
    lora_adapters: dict[str, AdapterSpec]
    lora_active: list[str]
    lora_scales: dict[str, float]
    lora_merged: tuple[str, ...]
    lora_kept: dict[str, Tensor] | None
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: nn.ModuleDict

    def lora_raw(self, name: str) -> Tensor:
        """The base's own parameter, whatever reading the attribute gives."""
        parameter = self._parameters[name]
        if parameter is None:
            raise AttributeError(f"{self._get_name()} has no {name}")
        return parameter

    def lora_factors(self, adapter: str, weight_name: str | None = None) -> tuple[Tensor, Tensor]:
        """The trained A and B; shapes as in `functional.Branch`."""
        spec = self.lora_adapters[adapter]
        if spec.kind == "embedding":
            return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        key = spec.factor_name(weight_name or spec.weight_name)
        # At each call: looking submodules up as attributes takes longer than a small product.
        A: Any = self._modules["lora_A"]
        B: Any = self._modules["lora_B"]
        return getattr(A._modules[adapter], key), getattr(B._modules[adapter], key)

    def lora_b_bias(self, adapter: str) -> Tensor:
        """b_B, the bias on B, over the adapted rows."""
        return self.lora_B[adapter].get_parameter("bias")

    def lora_initial(self, adapter: str, weight_name: str) -> tuple[Tensor, Tensor] | None:
        """The pair that PiSSA and OLoRA subtract."""
        spec = self.lora_adapters[adapter]
        if not spec.has_initial:
            return None
        key = "initial_" + spec.factor_name(weight_name)
        return getattr(self.lora_A[adapter], key), getattr(self.lora_B[adapter], key)

    def lora_magnitude(self, adapter: str) -> Tensor:
        """DoRA's m in the shape that files have: (do), for convolutions (1, Cout, 1, ..)."""
        return self.lora_magnitude_vector[adapter].get_parameter("weight")

    def lora_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by their names within this layer."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("lora_") and name.split(".")[1] == adapter
        }

    def lora_live(self) -> list[str]:
        """Names of the adapters that the forward pass has to add now.

        Raises:
            NumericError: training while adapters are merged; they would get no gradient.
        """
        if self.lora_merged:
            if self.training and torch.is_grad_enabled():
                raise NumericError(
                    f"training with merged adapters ({', '.join(self.lora_merged)}): their effect "
                    "is part of the base weight and cannot learn. Call unmerge(model) first."
                )
            return []
        return [name for name in self.lora_active if self.lora_scales[name] != 0]

    def lora_branches(self, weight_name: str, names: Iterable[str]) -> list[lora.Branch]:
        """The named LoRA adapters as branches of one weight, with the user's multipliers."""
        branches = []
        for name in names:
            spec = self.lora_adapters[name]
            scale = spec.scale * self.lora_scales[name]
            A, B = self.lora_factors(name, weight_name)
            p = spec.dropout if self.training else 0.0
            branches.append(lora.Branch(A, B, scale, spec.rows, p))
            initial = self.lora_initial(name, weight_name)
            if initial is not None:  # what is left of the base sees the clean input, as in PEFT
                branches.append(lora.Branch(*initial, -scale, spec.rows))
        return branches

    # The change of the weight: for `parametrize`, DoRA and merging

    def lora_weight(self, name: str) -> Tensor:
        """The weight as the live adapters make it, in the base's dtype; differentiable.

        The raw parameter itself where no live adapter changes it. In training, dropout drops whole
        input channels of A.
        """
        W = self.lora_raw(name)
        live = [a for a in self.lora_live() if name in self.lora_adapters[a].weight_names]
        if not live or _is_sharded(W, self.lora_factors(live[0], name)[0]):
            return W
        with lora.without_autocast(W.device):
            base = W.to(self.lora_factors(live[0], name)[0].dtype)
            total = base
            for adapter in live:
                change = self._lora_change(adapter, name, base, drop=self.training)
                total = torch.add(total, change, alpha=self.lora_scales[adapter])
            return total.to(W.dtype)

    def lora_read_bias(self, name: str) -> Tensor | None:
        """The bias as the live adapters make it, where other code computes with the weight."""
        bias = self._parameters[name]
        if bias is not None and _is_sharded(bias):
            return bias
        return self.lora_added_bias(bias, self.lora_live())

    def lora_added_bias(self, bias: Tensor | None, live: Iterable[str]) -> Tensor | None:
        """`b + sum of c s b_B` over the live adapters that have a bias on B."""
        for adapter in live:
            spec = self.lora_adapters[adapter]
            if spec.lora_bias:
                extra = self.lora_scales[adapter] * self._lora_bias_change(adapter)
                dtype = self.lora_raw(spec.weight_name).dtype if bias is None else bias.dtype
                bias = (extra if bias is None else bias + extra).to(dtype)
        return bias

    def lora_deltas(
        self,
        adapter: str,
        dtype: torch.dtype = torch.float32,
        base: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What one adapter adds to each weight: weight name -> dW in the weight's shape.

        `s B A`, zero in rows outside the slices; `s (B A - B0 A0)` with an initial pair;
        `(m/n) (W + s B A) - W` with DoRA, which is why `base` may name the weights to take as W.
        The user's multiplier is not in it, see `lora_merged_weights`.
        """
        with torch.no_grad():
            return {
                name: self._lora_change(
                    adapter, name, (base or {}).get(name, self.lora_raw(name)), dtype
                )
                for name in self.lora_adapters[adapter].weight_names
            }

    def lora_delta(self, adapter: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """dW of a layer with one adapted weight; see `lora_deltas`."""
        (change,) = self.lora_deltas(adapter, dtype).values()
        return change

    def lora_merged_weights(
        self,
        names: Iterable[str] | None = None,
        dtype: torch.dtype = torch.float32,
        base: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Parameter name -> `W + sum of c dW` in `dtype`, not yet rounded to the weight's own.

        Args:
            names: the adapters; by default the active ones.
            base: parameter name -> tensor to merge into in place of this module's own.

        Raises:
            CheckpointError: a bias on B, and no bias in the base that could take it.
        """
        merged: dict[str, Tensor] = {}
        for adapter in self.lora_active if names is None else names:
            c, spec = self.lora_scales[adapter], self.lora_adapters[adapter]
            changes = self.lora_deltas(adapter, dtype, base)
            if spec.lora_bias:
                changes[BIAS_OF[spec.weight_name]] = self._lora_bias_change(adapter, dtype).detach()
            for name, change in changes.items():
                start = merged.get(name, (base or {}).get(name, self._parameters.get(name)))
                if start is None:
                    raise CheckpointError(
                        f"adapter {adapter!r} has a bias on B and the base layer has no {name} "
                        "that could take it: this adapter works unmerged only"
                    )
                start, change = start.detach().to(dtype), change.to(start.device)
                merged[name] = start + (change if c == 1 else c * change)
        return merged

    def _lora_change(
        self,
        adapter: str,
        name: str,
        W: Tensor,
        dtype: torch.dtype | None = None,
        drop: bool = False,
    ) -> Tensor:
        """dW of one adapter for the weight W, in `dtype` (W's by default)."""
        spec, dtype = self.lora_adapters[adapter], dtype or W.dtype
        full_A, B = (factor.to(dtype) for factor in self.lora_factors(adapter, name))
        A = full_A
        if spec.dropout and drop:
            A = dropout.drop_columns(A, spec.dropout, spec.groups)
        change = _product(spec, A, B, W)
        initial = self.lora_initial(adapter, name)
        if initial is not None:
            A0, B0 = (factor.to(dtype) for factor in initial)
            change = change - _product(spec, A0, B0, W)
        if spec.use_dora:
            W = W.to(device=change.device, dtype=dtype)
            ratio = self._lora_ratio(adapter, W, full_A, B)
            ratio = lora.over_weight(ratio, W.shape, spec.groups, spec.transposed)
            change = (ratio - 1) * W + ratio * change
        return change

    def _lora_ratio(self, adapter: str, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """DoRA's m / n of the weight `W + s B A`: (do)."""
        spec = self.lora_adapters[adapter]
        matrix = lora.as_matrix(W, spec.groups, spec.transposed)
        norm = lora.weight_norm(matrix, A, B, spec.scale, spec.groups)
        return lora.dora_ratio(self.lora_magnitude(adapter).flatten().to(norm.dtype), norm)

    def _lora_bias_change(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """`s b_B` over all output rows of the weight."""
        spec = self.lora_adapters[adapter]
        b_B = self.lora_b_bias(adapter)
        do = self.lora_raw(spec.weight_name).shape[0]
        return spec.scale * file_layout.expand_rows(b_B.to(dtype or b_B.dtype), spec.rows, do)

    # Files

    def lora_file_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Copies of one adapter's tensors in the layout of files, see `file_layout`.

        Key behind the module's path -> tensor. Rank and alpha are those of
        `AdapterSpec.file_rank`.
        """
        return file_layout.tensors_of(self, adapter)

    def lora_load_file_tensors(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in the layout of `lora_file_tensors` into an adapter, in place.

        Raises:
            CheckpointError: other keys or shapes, or values outside the slices.
        """
        found = file_layout.assignments(self, adapter, tensors)
        with torch.no_grad():
            for target, value in found:
                target.copy_(value)


def _is_sharded(*tensors: Tensor) -> bool:
    """Whether FSDP2 holds these as shards, as between forward passes, when it looks them up.

    Within its modules' forward passes they are whole, ordinary tensors.
    """
    return all(hasattr(tensor, "full_tensor") for tensor in tensors)


def _product(spec: AdapterSpec, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
    return lora.delta(A, B, spec.scale, W.shape, spec.rows, spec.groups, spec.transposed)
