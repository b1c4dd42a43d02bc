"""Injection as a whole: what trains, several adapters, full training, refusals, the table."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core import mechanisms
from lora_core.adapters.file import save_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.errors import ConfigError
from lora_core.injection import (
    adapters_off,
    full_tensors,
    inject,
    lora_layers,
    parameter_groups,
    remove,
    set_adapters,
    summary,
    train_biases,
    trainable_parameters,
)


class Net(nn.Module):
    """Two blocks and a head with a running statistic."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(3)]
        )
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(5, 6)


def lora(**settings):
    return LoraConfig(**{"target_modules": ["re:blocks.*"], "r": 2} | settings)


def names_that_train(model):
    return {key for key, p in model.named_parameters() if p.requires_grad}


def step(model, x, count=2, train=False):
    """Optimizer steps, in training mode if asked for; afterwards the mode is as before."""
    mode = model.training
    model.train(train)
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model.train(mode)


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(state, before):
    return state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


# What trains


def test_rank_and_alpha_per_layer_by_the_first_pattern(net):
    inject(
        net,
        lora(
            rank_pattern={"blocks.0.0": 3, "0": 5},
            alpha_pattern={r"blocks\.[12]\.2": 7.5},
            use_rslora=True,
        ),
    )
    specs = {path: layer.lora_adapters["default"] for path, layer in lora_layers(net).items()}
    assert [(s.r, s.alpha) for s in specs.values()] == [
        (3, 16),
        (2, 16),
        (5, 16),
        (2, 7.5),
        (5, 16),
        (2, 7.5),
    ]
    assert specs["blocks.0.0"].scale == 16 / 3**0.5


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {f"blocks.{i}.2.bias" for i in range(3)}),
        (
            "all",
            {f"blocks.{i}.{j}.bias" for i in range(3) for j in (0, 2)} | {"norm.bias", "head.bias"},
        ),
    ],
)
def test_biases_that_train(net, x, bias, expected):
    before = bits(net)
    inject(net, lora(target_modules=["re:.*\\.2"], bias=bias))
    assert {key for key in names_that_train(net) if ".lora_" not in key} == expected
    trained = names_that_train(net)
    step(net, x, train=True)
    state = net.state_dict()
    moved = {key for key in before if not torch.equal(state[key], before[key])}
    statistics = {key for key in before if "running" in key or "num_batches" in key}
    assert moved == (trained & before.keys()) | statistics


def test_the_biases_that_train_may_be_chosen_anew(net):
    base = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    inject(net, lora(bias="all"))
    with torch.no_grad():
        for bias in (net.head.bias, net.blocks[0][0].bias):
            bias += 1
    train_biases(net, "default", "lora_only")
    assert torch.equal(net.head.bias, base["head.bias"])
    assert torch.equal(net.blocks[0][0].bias, base["blocks.0.0.bias"] + 1)
    assert not net.head.bias.requires_grad
    assert net.blocks[0][0].bias.requires_grad
    train_biases(net, "default", "all")
    assert net.head.bias.requires_grad
    with pytest.raises(ConfigError, match="'some': it must be one of 'none', 'all', 'lora_only'"):
        train_biases(net, "default", "some")
    train_biases(net, "default", "none")
    assert not full_tensors(net, "default")
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in base.items())


def test_attention_biases_train_and_are_used():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    inject(model, LoraConfig(["attn"], r=2, bias="lora_only", lora_bias=True))
    trained = {key for key in names_that_train(model) if "lora" not in key}
    assert trained == {"attn.in_proj_bias", "attn.out_proj.bias"}
    x = torch.randn(2, 3, 8)
    before = model["attn"](x, x, x)[0]
    with torch.no_grad():
        model["attn"].lora_B["default"].bias.fill_(0.1)
    changed = model["attn"](x, x, x)[0]
    assert not torch.equal(before, changed)
    with torch.no_grad():
        torch.testing.assert_close(model["attn"](x, x, x)[0], changed)
    changed.sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(model))


def test_frozen_a_stays_frozen(net, x):
    inject(net, lora(freeze_A=True))
    assert all(".lora_B." in key for key in names_that_train(net))
    step(net, x)
    set_adapters(net, [])
    set_adapters(net, "default")
    assert all(".lora_B." in key for key in names_that_train(net))


def test_an_adapter_for_use_only_never_trains(net):
    inject(net, lora(modules_to_save=["head"]), trainable=False)
    assert not names_that_train(net)
    set_adapters(net, [])
    set_adapters(net, "default")
    assert not names_that_train(net)


def test_starts_do_not_depend_on_the_other_targets_nor_on_torchs_generator(net):
    other = copy.deepcopy(net)
    inject(net, lora())
    torch.manual_seed(99)
    state = torch.get_rng_state()
    inject(other, lora(target_modules=["blocks.2.0"]))
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (lora_layers(m)["blocks.2.0"].lora_factors("default") for m in (net, other))
    assert torch.equal(first[0], second[0])
    A, B = lora_layers(net)["blocks.1.0"].lora_factors("default")
    assert not torch.equal(first[0], A)
    assert not B.any()
    remove(net)
    inject(net, lora(seed=1))
    assert not torch.equal(first[0], lora_layers(net)["blocks.2.0"].lora_factors("default")[0])


def test_parameter_groups_of_lora_plus(net):
    inject(net, lora(use_dora=True, modules_to_save=["head"]))
    groups = {g["name"]: g for g in parameter_groups(net, 1e-3, 0.1, b_lr_ratio=16)}
    assert {n: (len(g["params"]), g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "A": (6, 1e-3, 0.1),
        "B": (6, 1.6e-2, 0.1),
        "full": (1, 1e-3, 0.1),
        "vectors": (7, 1e-3, 0.0),
    }
    assert sum(len(g["params"]) for g in groups.values()) == len(trainable_parameters(net))


def test_magnitudes_of_any_shape_have_no_weight_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    inject(net, LoraConfig(["0"], r=2, use_dora=True))
    groups = {g["name"]: g for g in parameter_groups(net, 1e-3, 0.1)}
    (magnitude,) = groups["vectors"]["params"]
    assert magnitude.shape == (1, 4, 1, 1)
    assert groups["vectors"]["weight_decay"] == 0


# Fully trained modules


def test_modules_to_save_train_in_place_and_switch_with_their_adapter(net, x):
    base, keys = net(x), list(net.state_dict())
    before = bits(net)
    weight = net.head.weight
    inject(net, lora(modules_to_save=["head", "norm"]))
    assert net.head.weight is weight
    assert names_that_train(net) >= {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert torch.equal(net(x), base)
    step(net, x, train=True)
    trained = net(x)
    assert not torch.equal(net.norm.running_mean, before["norm.running_mean"])
    with adapters_off(net):
        assert torch.equal(net(x), base)
        assert same({key: net.state_dict()[key] for key in keys}, before)
    assert torch.equal(net(x), trained)
    assert net.head.weight is weight
    assert set(full_tensors(net, "default")) == {key for key in keys if key[:4] in ("head", "norm")}
    set_adapters(net, [])
    assert torch.equal(net(x), base)
    assert not names_that_train(net)
    set_adapters(net, "default")
    assert torch.equal(net(x), trained)
    remove(net)
    assert same(net.state_dict(), before)


def test_switching_off_between_forward_and_backward_keeps_the_gradients(net, x):
    inject(net, lora(modules_to_save=["head"]))
    step(net, x)
    gradients = []
    for interrupt in (False, True):
        net.zero_grad()
        loss = net(x).square().sum()
        if interrupt:
            with adapters_off(net), torch.no_grad():
                net(x)
        loss.backward()
        gradients.append([p.grad for p in trainable_parameters(net)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_two_adapters_have_their_own_head_and_cannot_share_one(net, x):
    base = net(x)
    for name in "ab":
        inject(net, lora(modules_to_save=["head"]), name)
        assert torch.equal(net(x), base)
        step(net, x, count=2 if name == "a" else 4)
    b = net(x)
    set_adapters(net, "a")
    a = net(x)
    assert not torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"their own head\.weight"):
        set_adapters(net, ["a", "b"])
    assert torch.equal(net(x), a)
    set_adapters(net, "b")
    assert torch.equal(net(x), b)
    remove(net, "b")
    assert torch.equal(net(x), base)
    set_adapters(net, "a")
    assert torch.equal(net(x), a)


def test_copies_keep_fully_trained_values_apart(net, x):
    base = net(x)
    inject(net, lora(modules_to_save=["head"]))
    step(net, x)
    other, y = copy.deepcopy(net), net(x)
    step(net, x)
    assert torch.equal(other(x), y)
    remove(other)
    assert torch.equal(other(x), base)


# Several adapters


def test_only_active_adapters_train(net, x):
    inject(net, lora(), "a")
    inject(net, lora(target_modules=["re:.*\\.2"], r=3), "b")
    assert names_that_train(net) == {k for k, _ in net.named_parameters() if ".b." in k}
    set_adapters(net, ["a", "b"])
    assert names_that_train(net) == {k for k, _ in net.named_parameters() if ".lora_" in k}
    step(net, x)
    both = net(x)
    remove(net, "b")
    assert not any(".b." in key for key in net.state_dict())
    assert not torch.equal(net(x), both)


def test_scales_are_multipliers_of_the_effect(net, x):
    inject(net, lora(target_modules=["head"]))
    with adapters_off(net):
        base = net(x)
    step(net, x)
    full = net(x) - base
    for scale in (0.5, -2.0, 0.0):
        set_adapters(net, "default", scale)
        torch.testing.assert_close(net(x) - base, scale * full, rtol=1e-4, atol=1e-6)
    assert torch.equal(net(x), base)
    set_adapters(net, "default")
    torch.testing.assert_close(net(x) - base, full)


def test_an_injection_that_fails_half_way_leaves_no_trace(net, x, monkeypatch):
    before, y, trains = bits(net), net(x), names_that_train(net)
    adapt, calls = mechanisms.adapt, []

    def adapt_two(*args):
        if len(calls) == 2:
            raise MemoryError
        calls.append(args)
        adapt(*args)

    monkeypatch.setattr(mechanisms, "adapt", adapt_two)
    with pytest.raises(MemoryError):
        inject(net, lora(modules_to_save=["head"]))
    assert same(net.state_dict(), before)
    assert torch.equal(net(x), y)
    assert names_that_train(net) == trains
    assert not lora_layers(net)


@pytest.mark.fault("K44")
def test_hundred_swaps_leave_no_trace(net, x):
    before = bits(net)
    inject(net, lora(), "a")
    inject(net, lora(use_dora=True), "b")
    step(net, x)
    wanted = {}
    for name in "ab":
        set_adapters(net, name)
        wanted[name] = net(x)
    for _ in range(100):
        for name in "ab":
            set_adapters(net, name)
    assert torch.equal(net(x), wanted["b"])
    remove(net)
    assert same(net.state_dict(), before)


def test_adapters_off_restores_after_an_error(net, x):
    inject(net, lora())
    step(net, x)
    y, trains = net(x), names_that_train(net)
    with pytest.raises(KeyError), adapters_off(net):
        raise KeyError
    assert torch.equal(net(x), y)
    assert names_that_train(net) == trains


def test_removal_restores_what_required_gradients(net):
    net.head.weight.requires_grad_(False)
    before = names_that_train(net)
    inject(net, lora(), "a")
    inject(net, lora(), "b")
    remove(net, "a")
    assert names_that_train(net) == {k for k, _ in net.named_parameters() if ".b." in k}
    remove(net)
    assert names_that_train(net) == before
    assert not [name for name in vars(net) if "lora" in name]


# Refusals: nothing may have changed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"blocks.7": 2}}, "rank_pattern: 'blocks.7' hits no target"),
        ({"alpha_pattern": {"hed": 2.0}}, "alpha_pattern: 'hed' hits no target"),
        ({"slices": {"blocks.0.0": Slices()}}, "8 rows do not divide into 3 equal slices"),
        ({"slices": {"head": Slices(sizes=(1, 2, 3))}}, "add up to 6, the weight has 4 rows"),
        ({"slices": {"head": Slices("ab", "a")}, "use_dora": True}, "use_dora goes with neither"),
        ({"lora_bias": True, "use_dora": True}, "use_dora goes with neither"),
        ({"init_lora_weights": "pissa", "r": 5}, "head: init 'pissa' with r 5: .* only 4"),
        ({"modules_to_save": ["haed"]}, "modules_to_save: 'haed' matches no module. did you mean"),
    ],
)
def test_impossible_settings_are_refused_before_anything_changes(net, x, settings, words):
    before, y, trains = bits(net), net(x), names_that_train(net)
    with pytest.raises(ConfigError, match=words):
        inject(net, lora(target_modules=["re:blocks.*", "head"], **settings))
    assert same(net.state_dict(), before)
    assert names_that_train(net) == trains
    assert torch.equal(net(x), y)


@pytest.mark.parametrize(
    ("layer", "settings", "words"),
    [
        (nn.Embedding(5, 4), {"lora_bias": True}, "no bias to go to in Embedding"),
        (nn.Embedding(5, 4), {"init_lora_weights": "olora"}, "needs a Linear weight"),
        (nn.Conv2d(3, 6, 3), {"slices": {"0": Slices()}}, "slices need a Linear"),
        (nn.MultiheadAttention(4, 2, kdim=3), {"use_dora": True}, "use_dora needs one weight"),
        (
            nn.MultiheadAttention(4, 2, kdim=3),
            {"slices": {"0": Slices(("a", "b"), ("a",))}},
            r"\['q', 'k', 'v'\]",
        ),
        (nn.MultiheadAttention(4, 2, bias=False), {"lora_bias": True}, "needs a bias in the base"),
    ],
)
def test_impossible_layers_are_refused(layer, settings, words):
    model = nn.Sequential(layer)
    with pytest.raises(ConfigError, match=words):
        inject(model, LoraConfig(["0"], r=2, **settings))
    assert model[0] is layer
    assert not lora_layers(model)


def test_adapter_names(net):
    inject(net, lora())
    for name, words in [
        ("default", "already has adapter 'default'"),
        ("a.b", "letters, digits"),
        ("my_lora", "not the word 'lora'"),
        ("keys", "torch's containers"),
        ("", "letters, digits"),
    ]:
        with pytest.raises(ConfigError, match=words):
            inject(net, lora(), name)
    for call in (set_adapters, remove, summary):
        with pytest.raises(ConfigError, match=r"no adapter 'defualt'.*did you mean 'default'"):
            call(net, "defualt")


def test_scales_that_mean_nothing_are_refused(net):
    inject(net, lora())
    for scales, words in [
        ([1.0, 2.0], "2 scales for 1 adapters"),
        ({"other": 1.0}, "not among"),
        (float("nan"), "finite"),
    ]:
        with pytest.raises(ConfigError, match=words):
            set_adapters(net, "default", scales)


def test_a_name_that_stands_twice_is_refused(net):
    inject(net, lora())
    with pytest.raises(ConfigError, match="stands twice"):
        set_adapters(net, ["default", "default"])


def test_adapters_of_a_part_are_not_mixed_with_those_of_the_whole(net, tmp_path):
    inject(net.blocks, LoraConfig(["0.0"], r=2))
    for call in (
        lambda: inject(net, lora()),
        lambda: save_adapter(net, tmp_path / "adapter"),
        lambda: set_adapters(net, "default"),
    ):
        with pytest.raises(ConfigError, match=r"blocks\.0\.0 was adapted through another module"):
            call()
    remove(net.blocks)
    inject(net, lora())
    with pytest.raises(ConfigError, match="through another module"):
        inject(net.blocks, LoraConfig(["0.0"], r=2))


def test_merged_adapters_must_be_unmerged_first(net):
    inject(net, lora())
    layer = lora_layers(net)["blocks.0.0"]
    layer.lora_merged, layer.lora_kept = ("default",), {}
    calls = [
        lambda: remove(net),
        lambda: set_adapters(net, []),
        lambda: inject(net, lora(), "other"),
        lambda: adapters_off(net).__enter__(),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="unmerge"):
            call()


def test_a_rank_above_the_weight_warns_once_and_works(net, x):
    with pytest.warns(UserWarning, match=r"head \(r 5, weight allows 4\)") as caught:
        inject(net, lora(target_modules=["head", "re:blocks.*"], r=5))
    assert len(caught) == 1
    step(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(net, lora(), "small")


def test_layers_wrapped_by_other_tools_are_adapted_by_their_weight():
    # accelerate's hooks put a forward of their own on the instance; it reads the weight.
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)
    model = nn.Sequential(layer)
    inject(model, LoraConfig(["0"], r=2))
    x = torch.randn(2, 3)
    y = model(x)
    with torch.no_grad():
        layer.lora_factors("default")[1].fill_(1.0)
    assert not torch.equal(model(x), y)


# The table


def test_table_groups_like_neighbours_and_counts_everything(net):
    table = inject(net, lora(modules_to_save=["head"], rank_pattern={"blocks.2.2": 1}))
    assert [(row.path, row.r, row.parameters) for row in table.rows] == [
        ("blocks.0.0", 2, 28),
        ("blocks.0.2", 2, 28),
        ("blocks.1.0", 2, 28),
        ("blocks.1.2", 2, 28),
        ("blocks.2.0", 2, 28),
        ("blocks.2.2", 1, 14),
    ]
    assert table.full == {"head.weight": 24, "head.bias": 4}
    assert table.trainable == sum(p.numel() for p in trainable_parameters(net)) == 5 * 28 + 14 + 28
    assert table.total == sum(p.numel() for p in net.parameters())
    text = str(table)
    assert "blocks.{0..2}.0 x 3 " in text
    assert "blocks.{0..1}.2 x 2 " in text
    assert "6 adapted modules, 182 of" in text
    assert summary(net) == table


class Attention(nn.Module):
    """Names that share words, and some that share only letters."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "v_proj", "query", "key", "fc1", "fc2"):
            setattr(self, name, nn.Linear(6, 6))


def lines_of(table):
    header, _, *lines, end = str(table).splitlines()
    return header.split(), [line.rsplit(maxsplit=1) for line in lines], end


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (["q_proj", "v_proj"], "{0..1}.{q,v}_proj x 4"),
        (["fc1", "fc2"], "{0..1}.fc{1,2} x 4"),
        (["query", "key"], "{0..1}.{query,key} x 4"),
        (["q_proj", "key"], "{0..1}.{q_proj,key} x 4"),
    ],
)
def test_modules_of_one_parent_share_a_line(names, path):
    table = inject(nn.ModuleList([Attention(), Attention()]), LoraConfig(names, r=2))
    assert [row.path for row in table.rows] == [f"{i}.{name}" for i in (0, 1) for name in names]
    header, lines, end = lines_of(table)
    assert header == ["module", "parameters"]
    assert lines == [[path, "96"]]
    assert end.startswith("4 adapted modules (Linear, r 2, alpha 16), 96 of ")


def test_a_line_means_every_combination_of_its_names_and_numbers():
    blocks = nn.ModuleList([Attention(), Attention(), Attention()])
    table = inject(blocks, LoraConfig(["re:[01].[qv]_proj", "re:2.q_proj"], r=2))
    _, lines, _ = lines_of(table)
    assert lines == [["{0..2}.q_proj x 3", "72"], ["{0..1}.v_proj x 2", "48"]]
    config = LoraConfig(["q_proj", "v_proj"], r=2, rank_pattern={"v_proj": 1})
    header, lines, end = lines_of(inject(nn.ModuleList([Attention()]), config))
    assert header == ["module", "r", "parameters"]
    assert [line[0].split() for line in lines] == [["0.q_proj", "2"], ["0.v_proj", "1"]]
    assert "(Linear, alpha 16)" in end


def test_table_says_what_one_could_not_guess():
    model = nn.ModuleDict(
        {
            "attn": nn.MultiheadAttention(6, 2),
            "emb": nn.Embedding(9, 6),
            "conv": nn.Conv1d(4, 4, 3, groups=2),
            "layer": nn.TransformerEncoderLayer(8, 2, 12),
        }
    )
    table = inject(
        model,
        LoraConfig(
            ["attn", "emb", "conv", "linear1"],
            r=2,
            lora_dropout=0.1,
            slices={"attn": Slices()},
            freeze_A=True,
        ),
    )
    notes = {row.path: (row.mechanism, row.note) for row in table.rows}
    assert notes == {
        "attn": ("parametrize", "rows q[0:6] v[12:18], A frozen, dropout of input channels"),
        "attn.out_proj": ("parametrize", "A frozen, dropout of input channels"),
        "emb": ("wrap", "A frozen, no dropout on tokens"),
        "conv": ("wrap", "2 groups, not for plain PEFT, A frozen"),
        "layer.linear1": ("parametrize", "A frozen"),
    }
