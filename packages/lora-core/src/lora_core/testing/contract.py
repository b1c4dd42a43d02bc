"""The promises of LoRA that every model package keeps.

In a package's tests the whole contract is

    @pytest.mark.parametrize("promise", testing.CONTRACT, ids=lambda promise: promise.__name__)
    def test_contract(promise, tmp_path):
        promise(testing.Case(make_model, run, config), tmp_path)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.adapters.file import load_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.injection import (
    adapters_off,
    configs,
    full_tensors,
    inject,
    lora_layers,
    remove,
    trainable_parameters,
)
from lora_core.merging import merge, merged_state_dict, unmerge
from lora_core.module_names import join
from lora_core.testing.goldens import assert_close_golden


@dataclass
class Case:
    """A model under test.

    Attributes:
        make_model: builds the base, with the same weights at every call.
        run: the model's output as one tensor, computed from a fixed input, differentiable.
        config: where LoRA goes.
        roles: the package's names for groups of layers, as `inject` takes them.
        rename: module path -> path in single files, as `save_adapter` takes it.
        tolerance: allowed error of computations that are equal but for rounding, as a share of the
            largest output.
    """

    make_model: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    config: LoraConfig
    roles: Mapping[str, Sequence[str]] | None = None
    rename: Callable[[str], str] | None = None
    tolerance: float = 1e-5

    def base(self, like: nn.Module | None = None) -> nn.Module:
        """The base in evaluation mode, frozen, or with the parameters trainable that are in `like`.

        torch chooses other kernels for a product with a weight that requires gradients, which may
        round otherwise: models whose bits are compared must agree in this.
        """
        model = self.make_model().eval().requires_grad_(False)
        trainable = {} if like is None else dict(_trainable(like))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        return model

    def adapted(self, trained: bool = True) -> nn.Module:
        """A model with an adapter, in evaluation mode; trained: with random values."""
        model = self.make_model().eval()
        inject(model, self.config, roles=self.roles)
        if trained:
            disturb(model)
        return model

    @torch.no_grad()
    def out(self, model: nn.Module) -> Tensor:
        """The output in evaluation mode."""
        return self.run(model.eval()).detach().clone()

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        """Require equality up to `tolerance`."""
        assert_close_golden(actual, expected, rtol=0, atol=self.tolerance)


def disturb(model: nn.Module, size: float = 0.03, seed: int = 0) -> None:
    """Add the same Gaussian noise to all trainable parameters, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.add_(noise.to(parameter))


def injection_changes_no_bit(case: Case, _: Path) -> None:
    """A fresh adapter leaves the output, the base's keys and its values as they were."""
    model = case.adapted(trained=False)
    base = case.base(like=model)
    state = model.state_dict()
    for key, value in base.state_dict().items():
        assert torch.equal(state[key], value), f"{key} changed"
    assert torch.equal(case.out(model), case.out(base)), "the output changed"


def only_adapters_train(case: Case, _: Path) -> None:
    """Two optimizer steps change every trainable tensor and nothing else of the model.

    Factors that start at zero move in the first step, their partners in the second.
    """
    model = case.adapted(trained=False).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = dict(_trainable(model))
    own = _of_adapters(model)
    beside = trainable.keys() - own
    assert not beside, f"trains besides the adapters: {sorted(beside)[:5]}"
    at_zero = {name for name, p in trainable.items() if not p.any()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, weight_decay=0)
    for expected in (at_zero, set(trainable)):
        optimizer.zero_grad()
        y = case.run(model)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        (y * direction).sum().backward()
        optimizer.step()
        still = {name for name in expected if torch.equal(trainable[name], before[name])}
        assert not still, f"{len(still)} of {len(expected)} did not move: {sorted(still)[:5]}"
    for name, parameter in model.named_parameters():
        assert name in trainable or parameter.grad is None, f"a gradient reaches frozen {name}"
    for key, value in model.state_dict().items():  # statistics of trained modules may move too
        assert key in own or torch.equal(value, before[key]), f"frozen {key} changed"


def _of_adapters(model: nn.Module) -> set[str]:
    """Names of all parameters that belong to adapters, or that adapters train in full."""
    layers = lora_layers(model).items()
    own = {
        join(path, key)
        for path, layer in layers
        for name in layer.lora_adapters
        for key in layer.lora_parameters(name)
    }
    return own | {key for name in configs(model) for key in full_tensors(model, name)}


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def files_restore_the_adapter(case: Case, folder: Path) -> None:
    """Saved, loaded into a new base, saved again: the same outputs, the same bytes, trainable."""
    model = case.adapted()
    expected = case.out(model)
    for name in ("adapter", "adapter.pt"):
        rename = case.rename if name.endswith(".pt") else None
        first = save_adapter(model, folder / "first" / name, metadata={"step": 3}, rename=rename)
        loaded = case.make_model()
        load_adapter(loaded, first, rename=rename)
        assert torch.equal(case.out(loaded), expected), f"{name}: other outputs after loading"
        names = [sorted(n for n, _ in _trainable(m)) for m in (model, loaded)]
        assert names[0] == names[1], f"{name}: other parameters train after loading"
        again = save_adapter(loaded, folder / "again" / name, metadata={"step": 3}, rename=rename)
        assert _bytes(again) == _bytes(first), f"{name}: other bytes when saved again"


def _bytes(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def peft_computes_the_same(case: Case, folder: Path) -> None:
    """PEFT on the base with our adapter directory gives the outputs of our adapted model."""
    import peft

    model = case.adapted()
    path = save_adapter(model, folder / "adapter")
    theirs = peft.PeftModel.from_pretrained(case.base(), str(path))
    case.assert_close(case.out(theirs), case.out(model))


def merging_keeps_the_output(case: Case, _: Path) -> None:
    """Merged in place and as a new state dict: the adapter's output with the base's keys."""
    model, plain = case.adapted(), case.base()
    expected = case.out(model)
    plain.load_state_dict(merged_state_dict(model))
    case.assert_close(case.out(plain), expected)
    merge(model)
    case.assert_close(case.out(model), expected)


def unmerging_restores_every_bit(case: Case, _: Path) -> None:
    """After merge and unmerge the model is what it was."""
    model = case.adapted()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = case.out(model)
    merge(model)
    unmerge(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} is not what it was"
    assert torch.equal(case.out(model), expected)


def adapters_off_is_the_base(case: Case, _: Path) -> None:
    """With all adapters off the output is the base's, bit for bit."""
    model = case.adapted()
    with adapters_off(model):
        assert torch.equal(case.out(model), case.out(case.base()))


def removal_restores_the_model(case: Case, _: Path) -> None:
    """Without its adapters the model has the base's modules, classes, keys and bits again."""
    model = case.make_model()
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inject(model, case.config, roles=case.roles)
    disturb(model)
    remove(model)
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == modules
    assert not lora_layers(model)
    after = model.state_dict()
    assert list(after) == list(before), "other state-dict keys"
    for key, value in before.items():
        assert torch.equal(after[key], value), f"{key} is not what it was"


CONTRACT: tuple[Callable[[Case, Path], None], ...] = (
    injection_changes_no_bit,
    only_adapters_train,
    files_restore_the_adapter,
    peft_computes_the_same,
    merging_keeps_the_output,
    unmerging_restores_every_bit,
    adapters_off_is_the_base,
    removal_restores_the_model,
)
