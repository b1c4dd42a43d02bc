"""Merging: exact, two-phase, reversible to the bit; errors that leave the model as it was."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core import merging
from lora_core.adapters.file import load_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError, ConfigError, NumericError
from lora_core.injection import inject, lora_layers, remove, set_adapters
from lora_core.merging import deltas, merge, merged_state_dict, unmerge
from lora_core.testing import assert_close_golden, disturb, load_golden

GOLDENS = Path(__file__).parent / "goldens"


class Net(nn.Module):
    """x (2,5,8) -> (2,5,8) through a layer of every kind."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.emb = nn.Embedding(9, 8, padding_idx=0)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 8, 1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens):
        x = self.emb(tokens)
        x = x + self.proj(self.qkv(x))
        x = x + self.up(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.norm(x + self.attn(x, x, x, need_weights=False)[0])


TOKENS = torch.arange(10).reshape(2, 5) % 9
CASES = {
    "linear": LoraConfig(["qkv", "proj"], r=3, lora_dropout=0.1),
    "rslora": LoraConfig(["proj"], r=3, use_rslora=True),
    "dora": LoraConfig(["qkv", "conv", "emb"], r=2, use_dora=True),
    "lora_bias": LoraConfig(["qkv"], r=3, lora_bias=True),
    "embedding": LoraConfig(["emb"], r=3),
    "convolutions": LoraConfig(["conv", "up"], r=2),
    "attention": LoraConfig(["attn"], r=3),
    "slices": LoraConfig(["qkv", "attn"], r=2, slices={"qkv": Slices(), "attn": Slices()}),
    "pissa": LoraConfig(["qkv"], r=3, init_lora_weights="pissa"),
    "saved_and_biases": LoraConfig(["qkv"], r=3, modules_to_save=["norm"], bias="all"),
}


def trained(config, size=0.1):
    model = Net()
    inject(model, config)
    disturb(model, size)
    return model.eval()


@torch.no_grad()
def out(model):
    return model.eval()(TOKENS)


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [key for key, value in after.items() if not same_bits(value, before[key])]
    assert not changed


def same_bits(a, b):
    """Bit for bit: unlike torch.equal this tells 0 from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


@pytest.mark.fault("K36")
@pytest.mark.parametrize("case", CASES)
def test_merged_output_is_the_adapters(case):
    model = trained(CASES[case])
    expected = out(model)
    assert (expected - out(Net())).abs().max() > 1e-3
    report = merge(model, probe=out)
    assert_close_golden(out(model), expected, atol=1e-5)
    assert report.output_error <= 1e-5
    assert f"merged {len(report.noise)} weights" in str(report)


@pytest.mark.fault("K40")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_then_unmerge_restores_bits(case, dtype):
    model = trained(CASES[case]).to(dtype)
    with torch.no_grad():
        model.qkv.weight[3] = -0.0
    before, expected = bits(model), out(model)
    for _ in range(10):
        merge(model)
        unmerge(model)
    assert_same(model, before)
    assert torch.equal(out(model), expected)


@pytest.mark.parametrize("case", CASES)
def test_merged_state_dict_is_a_plain_model_and_leaves_the_live_one(case):
    model = trained(CASES[case])
    before, expected = bits(model), out(model)
    state = merged_state_dict(model)
    assert_same(model, before)
    plain = Net()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    assert_close_golden(out(plain), expected, atol=1e-5)
    merge(model)
    again = merged_state_dict(model)
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.fault("K37")
def test_bf16_merge_is_the_exact_sum_rounded_once():
    golden = load_golden(GOLDENS / "linear_bf16")
    model = nn.ModuleDict({"lin": nn.Linear(24, 40)}).to(torch.bfloat16)
    model.load_state_dict(golden.weights)
    load_adapter(model, GOLDENS / "linear_bf16" / "adapter")
    exact = golden.io["merged_one_rounding.lin.weight"]
    assert not torch.equal(exact, golden.io["merged_peft_safe.lin.weight"])
    assert torch.equal(merged_state_dict(model)["lin.weight"], exact)
    merge(model)
    assert torch.equal(model.lin.weight, exact)


@pytest.mark.parametrize("case", ["linear", "linear_lora_bias", "linear_dora", "conv_dora"])
def test_merged_weights_are_the_recorded_ones(case):
    golden = load_golden(GOLDENS / case)
    name = "c3" if case == "conv_dora" else "lin"
    layer = nn.Conv2d(6, 10, 3, padding=1) if case == "conv_dora" else nn.Linear(24, 40)
    model = nn.ModuleDict({name: layer})
    model.load_state_dict(golden.weights)
    load_adapter(model, GOLDENS / case / "adapter")
    merge(model)
    for key, value in model.state_dict().items():
        if f"merged.{key}" in golden.io:
            assert_close_golden(value, golden.io[f"merged.{key}"])
    assert_close_golden(model[name].eval()(golden.io["in.x"]), golden.io["out.merged"])


def test_rows_between_slices_keep_their_bits():
    model = trained(CASES["slices"])
    with torch.no_grad():
        model.qkv.weight[8:16:2] = -0.0
    before = bits(model)
    state = merged_state_dict(model)
    for key in ("qkv.weight", "attn.in_proj_weight"):
        assert same_bits(state[key][8:16], before[key][8:16])
        assert not torch.equal(state[key][:8], before[key][:8])


@pytest.mark.fault("K39")
def test_active_adapters_are_merged_with_their_scales():
    model = trained(CASES["linear"])
    inject(model, LoraConfig(["qkv", "conv"], r=2), "second")
    disturb(model, 0.1, seed=1)
    for names, scales in ((["default", "second"], [0.5, 2.0]), ("second", None), ("default", -1.0)):
        set_adapters(model, names, scales)
        expected = out(model)
        merge(model)
        assert_close_golden(out(model), expected, atol=1e-5)
        unmerge(model)


def test_deltas_are_what_merging_adds():
    model = trained(CASES["lora_bias"])
    inject(model, LoraConfig(["qkv", "proj"], r=2), "second")
    disturb(model, 0.1, seed=1)
    set_adapters(model, ["default", "second"], [0.5, 1.0])
    before, changes = bits(model), deltas(model)
    assert sorted(changes) == ["proj.weight", "qkv.bias", "qkv.weight"]
    merged = merged_state_dict(model)
    for key, change in changes.items():
        assert change.dtype == torch.float32
        assert_close_golden(before[key] + change, merged[key])


def test_a_merged_state_dict_does_not_follow_the_live_model():
    model = trained(CASES["saved_and_biases"])
    merge(model)
    state = merged_state_dict(model)
    before = {key: value.clone() for key, value in state.items()}
    unmerge(model)
    disturb(model, seed=3)
    assert all(torch.equal(state[key], value) for key, value in before.items())


# -- into the original file ------------------------------------------------------------------------


@pytest.mark.fault("K42")
def test_merging_into_the_original_file_keeps_its_names_order_dtypes_and_extras():
    original = {f"module.{key}": value.double() for key, value in Net().state_dict().items()}
    original = {"memory": torch.ones(3, dtype=torch.float16), **original}
    model = trained(CASES["saved_and_biases"]).to(torch.bfloat16)
    state = merged_state_dict(model, base=original, rename=lambda key: f"module.{key}")
    assert list(state) == list(original)
    assert [t.dtype for t in state.values()] == [t.dtype for t in original.values()]
    assert state["memory"] is original["memory"]
    assert state["module.emb.weight"] is original["module.emb.weight"]
    exact = original["module.qkv.weight"] + deltas(model)["qkv.weight"].double()
    assert_close_golden(state["module.qkv.weight"], exact, atol=1e-6)  # not rounded to bf16
    assert torch.equal(state["module.norm.weight"], model.norm.weight.double())
    assert torch.equal(state["module.qkv.bias"], model.qkv.bias.double())


def test_switched_off_adapters_leave_the_file_as_it_is():
    base = {key: value.double() for key, value in Net().state_dict().items()}
    model = trained(CASES["saved_and_biases"]).to(torch.bfloat16)
    set_adapters(model, [])
    state = merged_state_dict(model, base)
    assert all(state[key] is value for key, value in base.items())


def test_dora_takes_its_norm_from_the_file():
    model = trained(CASES["dora"])
    base = Net().state_dict()
    base["qkv.weight"] = base["qkv.weight"] * 2
    layer = lora_layers(model)["qkv"]
    A, B = layer.lora_factors("default")
    V = base["qkv.weight"] + layer.lora_adapters["default"].scale * B @ A
    m = layer.lora_magnitude("default")
    expected = (m / V.norm(dim=1))[:, None] * V
    assert_close_golden(merged_state_dict(model, base)["qkv.weight"], expected)


def test_a_file_merged_over_a_merged_model_has_one_delta():
    model, base = trained(CASES["linear"]), Net().state_dict()
    expected = merged_state_dict(model, base)
    merge(model)
    again = merged_state_dict(model, base)
    assert all(torch.equal(again[key], value) for key, value in expected.items())


def test_a_base_that_does_not_fit_is_refused():
    model = trained(CASES["linear"])
    base = Net().state_dict()
    with pytest.raises(CheckpointError, match=r"no proj\.weight; did you mean 'prj\.weight'"):
        merged_state_dict(
            model,
            {
                **{k: v for k, v in base.items() if k != "proj.weight"},
                "prj.weight": base["proj.weight"],
            },
        )
    with pytest.raises(CheckpointError, match=r"proj\.weight has shape \(4, 4\).*another base"):
        merged_state_dict(model, base | {"proj.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match="quantised"):
        merged_state_dict(model, base | {"proj.weight": torch.ones(8, 24, dtype=torch.int8)})


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.fault("K37")
def test_noise_of_a_weak_adapter_in_bf16_is_reported_and_warned_about():
    model = trained(CASES["linear"], size=0.0005).to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"rounding took a large part .* fp32 base"):
        report = merge(model)
    before = dict(Net().to(torch.bfloat16).named_parameters())
    unmerge(model)
    change = deltas(model)["proj.weight"].double()
    exact = before["proj.weight"].double() + change
    noise = (exact.to(torch.bfloat16).double() - exact).norm() / change.norm()
    assert report.noise["proj.weight"] == pytest.approx(noise.item(), rel=1e-3)
    assert report.noise["proj.weight"] > 0.1


def test_fp32_merges_without_noise():
    assert max(merge(trained(CASES["linear"])).noise.values()) < 1e-6


def test_a_sum_in_fp64_is_possible():
    model = trained(CASES["linear"])
    layer = lora_layers(model)["proj"]
    exact = layer.lora_merged_weights(dtype=torch.float64)["weight"]
    assert torch.equal(merged_state_dict(model, dtype=torch.float64)["proj.weight"], exact.float())


# -- errors that leave everything as it was --------------------------------------------------------


@pytest.mark.fault("K38")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_in_the_last_layer_leaves_every_layer_untouched(value):
    model = trained(CASES["linear"])
    with torch.no_grad():
        lora_layers(model)["proj"].lora_factors("default")[1][0, 0] = value
    before = bits(model)
    for attempt in (merge, merged_state_dict):
        with pytest.raises(NumericError, match=r"proj\.weight: the adapter holds NaN"):
            attempt(model)
    assert_same_with_nan(model, before)
    assert not any(layer.lora_merged for layer in lora_layers(model).values())


def assert_same_with_nan(model, before):
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


def test_a_base_that_is_broken_already_is_told_apart():
    model = trained(CASES["linear"])
    with torch.no_grad():
        model.proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"proj\.weight: the base's weight holds NaN"):
        merge(model)


@pytest.mark.fault("K37")
def test_overflow_of_fp16_is_refused():
    model = trained(CASES["linear"]).half()
    with torch.no_grad():
        for parameter in lora_layers(model)["proj"].lora_parameters("default").values():
            parameter.fill_(200.0)
    before = bits(model)
    with pytest.raises(
        NumericError, match=r"proj\.weight: merged values up to .* do not fit torch.float16"
    ):
        merge(model)
    assert_same(model, before)


@pytest.mark.fault("K39")
def test_merging_twice_and_unmerging_what_is_not_merged_are_errors():
    model = trained(CASES["linear"])
    with pytest.raises(ConfigError, match="nothing is merged"):
        unmerge(model)
    merge(model)
    before = bits(model)
    with pytest.raises(ConfigError, match="merged already"):
        merge(model)
    assert_same(model, before)
    with pytest.raises(ConfigError, match=r"unmerge\(model\) first"):
        remove(model)
    unmerge(model)
    with pytest.raises(ConfigError, match="nothing is merged"):
        unmerge(model)


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ConfigError, match="has no adapter"):
        merge(Net())
    model = trained(CASES["linear"])
    set_adapters(model, [])
    with pytest.raises(ConfigError, match="no adapter is active"):
        merge(model)


@pytest.mark.fault("K39")
@pytest.mark.parametrize("case", ["linear", "attention"])
def test_training_merged_adapters_is_an_error(case):
    model = trained(CASES[case])
    merge(model)
    with pytest.raises(NumericError, match=r"Call unmerge\(model\) first"):
        model.train()(TOKENS)
    unmerge(model)
    model.train()(TOKENS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_a_copy_there_is_no_way_back():
    model = trained(CASES["linear"])
    merge(model, keep=False)
    with pytest.raises(ConfigError, match="without a copy"):
        unmerge(model)


def test_a_probe_that_changes_too_much_undoes_the_merge():
    model, calls = trained(CASES["linear"]).train(), []
    before = bits(model)

    def drifting(model):
        assert not model.training
        calls.append(1)
        return out(model) * len(calls)

    with pytest.raises(NumericError, match=r"changed the probe's output by 1\.0e"):
        merge(model, probe=drifting)
    assert_same(model, before)


def test_a_copy_of_a_merged_model_is_merged_and_can_be_unmerged():
    model = trained(CASES["linear"])
    before = bits(model)
    merge(model)
    twin = copy.deepcopy(model)
    assert torch.equal(out(twin), out(model))
    unmerge(model)
    unmerge(twin)
    assert_same(twin, before)


# -- shared weights --------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight, the second through a view that torch does not see as the same."""

    def __init__(self, view):
        torch.manual_seed(0)
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        weight = nn.Parameter(self.one.weight.detach()) if view else self.one.weight
        self.two.weight = weight

    def forward(self, x):
        return self.two(self.one(x))


X = torch.linspace(-1, 1, 12).reshape(2, 6)


def tied(view):
    model = Tied(view)
    inject(model, LoraConfig(["one"], r=2))
    disturb(model, 0.1)
    return model.eval()


@pytest.mark.fault("K41")
def test_one_parameter_in_two_layers_is_merged_for_both():
    model = tied(view=False)
    expected = model(X)
    state = merged_state_dict(model)
    assert torch.equal(state["one.weight"], state["two.weight"])
    plain = Tied(view=False)
    plain.load_state_dict(state)
    assert_close_golden(plain(X), expected)
    merge(model)
    assert model.one.weight is model.two.weight
    assert_close_golden(model(X), expected)
    unmerge(model)
    assert torch.equal(model(X), expected)


@pytest.mark.fault("K41")
def test_memory_that_an_unadapted_layer_shares_is_refused_unless_untied():
    model = tied(view=True)
    expected, before = model(X), bits(model)
    for attempt in (merge, merged_state_dict):
        with pytest.raises(ConfigError, match=r"one\.weight and two\.weight.*\n.*untie=True"):
            attempt(model)
    assert_same(model, before)
    merge(model, untie=True)
    assert_close_golden(model(X), expected)
    assert torch.equal(model.two.weight, before["two.weight"])
    unmerge(model)
    assert torch.equal(model(X), expected)
    assert model.one.weight.data_ptr() == model.two.weight.data_ptr()


@pytest.mark.fault("K41")
def test_a_file_holds_a_shared_weight_once_or_twice():
    model = tied(view=False)
    expected = merged_state_dict(model)
    base = Tied(view=False).state_dict()
    for keys in (["one.weight"], ["two.weight"], ["one.weight", "two.weight"]):
        file = {key: base[key] for key in [*keys, "one.bias", "two.bias"]}
        state = merged_state_dict(model, file)
        assert list(state) == list(file)
        assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.fault("K41")
def test_a_module_under_two_names_is_merged_once():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    inject(model, LoraConfig(["0"], r=2))
    disturb(model, 0.1)
    expected = model.eval()(X)
    state = merged_state_dict(model)
    assert torch.equal(state["0.weight"], state["2.weight"])
    merge(model)
    assert_close_golden(model(X), expected)


def test_wrappers_do_not_matter():
    model = trained(CASES["linear"])
    expected = merged_state_dict(model)
    wrapped = nn.DataParallel(model)
    assert list(merged_state_dict(wrapped)) == list(expected)
    merge(wrapped)
    unmerge(wrapped)
    model.qkv = torch.compile(model.qkv, backend="eager")
    state = merged_state_dict(model)
    assert list(state) == list(expected)
    assert torch.equal(state["qkv.weight"], expected["qkv.weight"])


def test_public_names_are_functions_whatever_was_imported_before():
    code = (
        "import lora_core, lora_core.testing\n"
        "from lora_core import inject, merge\n"
        "assert callable(lora_core.merge) and callable(lora_core.inject), lora_core.merge\n"
        "assert callable(merge) and callable(inject)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_merged_alike_in_blocks_of_any_size_and_in_any_layout(dtype, monkeypatch):
    found = []
    for size in (1 << 15, 7):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20, dtype=dtype), nn.Linear(20, 12, dtype=dtype))
        model[1].weight = nn.Parameter(model[1].weight.detach().t().contiguous().t())
        assert not model[1].weight.is_contiguous()
        inject(model, LoraConfig(["0", "1"], r=3))
        for layer in model:
            nn.init.normal_(layer.lora_B["default"].weight)
        expected = [layer.lora_merged_weights()["weight"].to(dtype) for layer in model]
        monkeypatch.setattr(merging, "CPU_BLOCK", size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what bf16 rounds away
            report = merge(model)
        for layer, weight in zip(model, expected, strict=True):
            assert torch.equal(layer.weight, weight)
        found.append((report.unchanged, *report.noise.values()))
    assert found[0] == pytest.approx(found[1])
    assert (found[0][1] == 0) == (dtype == torch.float32)
