"""Merges that would lose something: noticed before or undone after, and merges for good."""

import warnings

import pytest
import torch
from torch import nn

from lora_core.adapters.file import load_adapter, save_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError, ConfigError, NumericError
from lora_core.injection import adapters_off, inject, lora_layers, remove, set_adapters
from lora_core.layers import LoraLayer
from lora_core.merging import merge, merged_state_dict, unmerge
from lora_core.testing import disturb


class Net(nn.Module):
    """x (2,5,8) -> (2,5,8)."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(24, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = x + self.proj(self.qkv(x))
        return self.norm(x + self.attn(x, x, x, need_weights=False)[0])


X = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
PLAIN = LoraConfig(["qkv", "proj"], r=3, lora_dropout=0.1)
CASES = {
    "linear": PLAIN,
    "attention": LoraConfig(["attn"], r=3),
    "slices": LoraConfig(["qkv"], r=2, slices={"qkv": Slices(use=("q", "v"))}),
    "dora": LoraConfig(["qkv"], r=2, use_dora=True),
    "saved": LoraConfig(["qkv"], r=3, modules_to_save=["norm"], bias="all"),
}


def trained(config=PLAIN, size=0.1, dtype=torch.float32):
    model = Net()
    inject(model, config)
    disturb(model, size)
    return model.eval().to(dtype)


def out(model):
    with torch.no_grad():
        return model.eval()(X.to(next(model.parameters()).dtype))


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert not [key for key, value in after.items() if not torch.equal(value, before[key])]


# -- checked on probe inputs -----------------------------------------------------------------------


@pytest.mark.fault("K36")
@pytest.mark.parametrize("fault", ["too_much", "one_value", "rows_swapped"])
def test_a_merge_that_goes_wrong_is_noticed_by_the_outputs_and_undone(monkeypatch, fault):
    model = trained()
    before, right = bits(model), LoraLayer.lora_merged_weights

    def wrong(self, *arguments, **options):
        found = right(self, *arguments, **options)
        if self is model.proj:
            if fault == "too_much":
                found["weight"] = found["weight"] * 1.001
            elif fault == "one_value":
                found["weight"][3, 3] += 0.01
            else:
                found["weight"] = found["weight"].roll(1, 0)
        return found

    monkeypatch.setattr(LoraLayer, "lora_merged_weights", wrong)
    with pytest.raises(NumericError) as error:
        merge(model, probe=out)
    for part in ("merging changed the probe's output by", "allowed 1e-04", "nothing was merged"):
        assert part in str(error.value)
    assert_same(model, before)
    assert not any(layer.lora_merged for layer in lora_layers(model).values())
    monkeypatch.undo()
    assert "largest output error" in str(merge(model, probe=out))


# -- rounding, overflow, NaN -----------------------------------------------------------------------


@pytest.mark.fault("K37")
def test_values_that_rounding_leaves_unchanged_are_counted():
    model = trained(size=0.01, dtype=torch.bfloat16)
    touched = lost = 0
    for layer in lora_layers(model).values():
        exact = layer.lora_merged_weights(["default"])["weight"]
        raw = layer.lora_raw("weight").detach()
        touched += int((exact != raw.float()).sum())
        lost += int(((exact != raw.float()) & (exact.bfloat16() == raw)).sum())
    assert lost > 0.01 * touched
    with pytest.warns(UserWarning, match=r"\d\.\d% of the values .* are as before.*fp32 base"):
        report = merge(model)
    assert report.unchanged == lost / touched
    assert "of the values unchanged by rounding" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge(trained(size=0.01)).unchanged < 0.01


@pytest.mark.fault("K37")
def test_a_file_in_half_precision_gets_the_same_warning():
    model = trained(size=0.002)
    half = {key: value.bfloat16() for key, value in Net().state_dict().items()}
    with pytest.warns(UserWarning, match="of the values that the adapters change are as before"):
        merged_state_dict(model, half)


@pytest.mark.fault("K37")
def test_overflow_in_a_half_precision_file_is_refused():
    model = trained()
    with torch.no_grad():
        for factor in lora_layers(model)["proj"].lora_factors("default"):
            factor.fill_(300.0)
    before = bits(model)
    half = {key: value.half() for key, value in Net().state_dict().items()}
    with pytest.raises(NumericError, match=r"proj\.weight: .* do not fit torch\.float16.*bf16"):
        merged_state_dict(model, half)
    assert_same(model, before)


@pytest.mark.fault("K38")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B", "both", "fully_trained"])
def test_nan_anywhere_in_an_adapter_stops_before_the_base_is_touched(factor, value):
    model = trained(CASES["saved"])
    pair = lora_layers(model)["qkv"].lora_factors("default")
    with torch.no_grad():
        for i, name in enumerate("AB"):
            if factor in (name, "both"):
                pair[i][0, 0] = value
        if factor == "fully_trained":
            model.norm.bias[0] = value
    raw = {key: model.get_submodule(key)._parameters["weight"].clone() for key in ("qkv", "proj")}
    for attempt in (merge, merged_state_dict):
        if factor == "fully_trained" and attempt is merge:
            continue  # there is nothing to merge: it is live already
        with pytest.raises(NumericError, match="NaN or infinite"):
            attempt(model)
    for key, weight in raw.items():
        assert torch.equal(model.get_submodule(key)._parameters["weight"], weight)


@pytest.mark.fault("K40")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*merge into an fp32 base")
def test_ten_cycles_of_merging_and_unmerging_leave_every_bit(case, dtype):
    model = trained(CASES[case], dtype=dtype)
    before, expected = bits(model), out(model)
    for _ in range(10):
        merge(model)
        assert any(not torch.equal(value, before[k]) for k, value in model.state_dict().items())
        unmerge(model)
        assert_same(model, before)
    assert torch.equal(out(model), expected)


@pytest.mark.fault("K39")
def test_every_wrong_order_of_merging_is_an_error_that_changes_nothing():
    model = trained()
    inject(model, LoraConfig(["qkv"], r=2), "second")
    disturb(model, 0.1, seed=1)
    set_adapters(model, ["default", "second"])
    expected = out(model)
    with pytest.raises(ConfigError, match="nothing is merged"):
        unmerge(model)
    merge(model)
    assert torch.allclose(out(model), expected, atol=1e-5)
    merged = bits(model)
    with pytest.raises(ConfigError, match=r"merged already: call unmerge\(model\) first"):
        merge(model)
    for call in (
        lambda: set_adapters(model, "second"),
        lambda: inject(model, LoraConfig(["proj"], r=2), "third"),
        lambda: remove(model, "second"),
        lambda: adapters_off(model).__enter__(),
    ):
        with pytest.raises(ConfigError, match="unmerge"):
            call()
    with pytest.raises(NumericError, match=r"training with merged adapters .*unmerge\(model\)"):
        model.train()(X)
    assert_same(model.eval(), merged)
    unmerge(model)
    model.train()(X).sum().backward()


# -- quantised bases -------------------------------------------------------------------------------


QUANTISED = [torch.int8, torch.uint8, torch.float8_e4m3fn]


@pytest.mark.fault("K41")
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_a_quantised_file_is_refused_with_the_way_to_do_it(dtype):
    model = trained()
    base = Net().state_dict()
    base["proj.weight"] = (base["proj.weight"] * 100).to(dtype)
    before = bits(model)
    with pytest.raises(CheckpointError, match=r"proj\.weight is quantised .*full-precision"):
        merged_state_dict(model, base)
    assert_same(model, before)


@pytest.mark.fault("K41", "C12")
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_a_quantised_layer_takes_no_adapter_and_is_named(dtype):
    model = Net()
    weight = (model.proj.weight.detach() * 100).to(dtype)
    model.proj.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ConfigError, match=rf"proj \(Linear\).*{dtype}, so load the base in full"):
        inject(model, LoraConfig(["proj"], r=2))
    inject(model, LoraConfig(["qkv"], r=2))  # the others do
    disturb(model)
    state = merged_state_dict(model)
    assert state["proj.weight"].dtype == dtype
    assert torch.equal(state["proj.weight"].float(), weight.float())


# -- for good --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_merged_for_good_and_removed_is_a_plain_model(case):
    base = Net()
    kinds = [(name, type(module)) for name, module in base.named_modules()]
    model = trained(CASES[case])
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    expected, state = out(model), merged_state_dict(model)
    merge(model, keep=False)
    remove(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.allclose(out(model), expected, atol=1e-5)
    base.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(out(base), out(model))
    inject(model, CASES[case])  # and it can be adapted anew
    assert torch.allclose(out(model), expected, atol=1e-5)


def test_merged_for_good_with_tied_weights_is_a_plain_model():
    layers = [nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)]
    model = nn.Sequential(*layers)
    model[1].weight = model[0].weight
    inject(model, LoraConfig(["0"], r=2))
    disturb(model, 0.1)
    tokens = torch.arange(7)
    expected = model(tokens).detach()
    merge(model, keep=False)
    remove(model)
    assert [type(layer) for layer in model] == [nn.Embedding, nn.Linear]
    assert model[0].weight is model[1].weight
    assert torch.allclose(model(tokens), expected, atol=1e-5)


@pytest.mark.fault("K39")
def test_what_is_merged_for_good_says_that_it_is_too_late(tmp_path):
    model = trained()
    path = save_adapter(model, tmp_path / "adapter")
    merge(model, keep=False)
    merged = bits(model)
    with pytest.raises(ConfigError, match="load the base again"):
        unmerge(model)
    for call in (
        lambda: remove(model, "default"),
        lambda: set_adapters(model, []),
        lambda: inject(model, PLAIN, "other"),
    ):
        with pytest.raises(ConfigError, match=r"merged for good .* remove\(model\) gives"):
            call()
    with pytest.raises(CheckpointError, match="merged adapters"):
        load_adapter(model, path, "again")
    assert_same(model, merged)


def test_a_merge_that_is_kept_cannot_be_removed():
    model = trained()
    before = bits(model)
    merge(model)
    with pytest.raises(ConfigError, match=r"call unmerge\(model\) first to remove adapters"):
        remove(model)
    unmerge(model)
    assert_same(model, before)
