"""Our linear function inside a live PeftModel: PEFT's numbers, PEFT's files, PEFT's switches."""

import pytest
import safetensors.torch
import torch
from torch import nn

from lora_core.peft_bridge import fast_linear
from lora_core.testing import assert_close_golden, assert_gradient_close

peft = pytest.importorskip("peft", reason="the bridge is an extra of lora-core")


def base():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "first": nn.Linear(16, 24),
            "conv": nn.Conv1d(24, 24, 3, padding=1),
            "last": nn.Linear(24, 8, bias=False),
        }
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = base()

    def forward(self, x):
        h = torch.relu(self.layers["first"](x))
        h = self.layers["conv"](h.transpose(1, 2)).transpose(1, 2)
        return self.layers["last"](h)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def settings(**changes):
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "conv", "last"]}
    return peft.LoraConfig(**fields | changes)


def adapted(fast, **changes):
    config = settings(**changes)
    model = peft.get_peft_model(Net(), fast_linear(config) if fast else config)
    fill(model)
    return model


def fill(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def is_fast(layer):
    return type(layer).__name__ == "FastLinear"


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias_on_B": {"lora_bias": True},
    "dora": {"use_dora": True},
    "one_layer": {"target_modules": ["first"]},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_pefts(case):
    fast, slow = adapted(True, **CASES[case]), adapted(False, **CASES[case])
    assert is_fast(fast.base_model.model.layers["first"])
    assert not is_fast(fast.base_model.model.layers["conv"])
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((fast, slow), inputs, strict=True)]
    assert_close_golden(outputs[0], outputs[1])
    for y in outputs:
        y.square().sum().backward()
    assert_gradient_close(inputs[0].grad, inputs[1].grad)
    theirs = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None)
        if parameter.grad is not None:
            assert_gradient_close(parameter.grad, theirs[name].grad)


def test_the_forward_pass_is_ours():
    model = adapted(True)
    assert "LoraLinear" in type(model.base_model.model.layers["first"](X).grad_fn).__name__


def test_dropout_acts_in_training_only():
    model, without = adapted(True, lora_dropout=0.5), adapted(True)
    assert torch.equal(model.eval()(X), without(X))
    model.train()
    torch.manual_seed(0)
    first, other = model(X), model(X)
    torch.manual_seed(0)
    assert torch.equal(model(X), first)
    assert not torch.equal(first, other)


def test_stock_peft_loads_the_file_with_the_same_output(tmp_path):
    model = adapted(True).eval()
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert_close_golden(stock(X), model(X))
    config = fast_linear(peft.PeftConfig.from_pretrained(str(tmp_path)))
    again = peft.PeftModel.from_pretrained(Net(), str(tmp_path), config=config).eval()
    assert is_fast(again.base_model.model.layers["last"])
    assert torch.equal(again(X), model(X))
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.layers.first.lora_A.weight" in keys


def test_second_adapter_switching_disabling_and_merging_are_pefts():
    models = [adapted(True), adapted(False)]
    plain = Net().requires_grad_(False)(X)
    for model in models:
        model.add_adapter("second", settings(r=2, target_modules=["first", "last"]))
        model.base_model.set_adapter(["default", "second"])
        fill(model)
    for names in (["default"], ["second"], ["default", "second"]):
        for model in models:
            model.base_model.set_adapter(names)
        assert_close_golden(models[0](X), models[1](X))
    with models[0].disable_adapter():
        assert torch.equal(models[0](X), plain)
    models[0].merge_adapter()
    assert_close_golden(models[0](X), models[1](X))
    models[0].unmerge_adapter()
    assert_close_golden(models[0].merge_and_unload()(X), models[1](X))


def test_hooks_on_the_base_layer_still_run():
    model, calls = adapted(True), []
    layer = model.base_model.model.layers["first"].base_layer
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert_close_golden(model(X), adapted(False)(X))
    assert calls == [1]


def test_a_peft_of_unknown_make_keeps_its_own_layers(monkeypatch):
    def strange(self, base_layer, name, settings): ...

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "__init__", strange)
    config = settings()
    with pytest.warns(UserWarning, match="unknown version of PEFT"):
        assert fast_linear(config) is config
    assert config._custom_modules is None
