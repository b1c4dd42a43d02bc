"""Every kind of layer: identity, training, merged weights, files, modes, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError, ConfigError, NumericError
from lora_core.injection import adapters_off, inject, lora_layers, remove, set_adapters
from lora_core.layers import LoraLayer


class Scaled(nn.Linear):
    """A Linear with a forward of its own: only its weight can be adapted."""

    def forward(self, input):
        return F.linear(2 * input, self.weight, self.bias)


class Functional(nn.Module):
    """A layer of a kind that nobody knows, linear in its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 5))

    def forward(self, x):
        return torch.einsum("ndk,onmk->dom", x[:, :2].transpose(0, 1), self.weight)


class SelfAttention(nn.MultiheadAttention):
    """As models subclass it: its forward is its own."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class CrossAttention(nn.MultiheadAttention):
    def forward(self, inputs):
        query, key, value = inputs
        return super().forward(query, key, value)[0]


class Decoder(nn.TransformerDecoderLayer):
    def forward(self, x):
        return super().forward(x, x.flip(1))


def rand(*shape):
    return lambda: torch.randn(*shape)


# name -> (make the layer, make its input, slices)
KINDS = {
    "linear": (lambda: nn.Linear(5, 7), rand(3, 5), {}),
    "no bias": (lambda: nn.Linear(5, 7, bias=False), rand(2, 3, 5), {}),
    "fused": (
        lambda: nn.Linear(5, 9),
        rand(3, 5),
        {"layer": Slices(("q", "k", "v"), ("v", "q"), (4, 2, 3))},
    ),
    "own forward": (lambda: Scaled(5, 7), rand(3, 5), {}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), rand(2, 4, 9), {}),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1)),
        rand(2, 4, 9, 8),
        {},
    ),
    "reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        rand(2, 4, 7, 6),
        {},
    ),
    "circular": (
        lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
        rand(4, 9),
        {},
    ),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), rand(2, 4, 7, 6), {}),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, padding=1), rand(2, 4, 7), {}),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 1, 3), stride=(1, 2, 1)), rand(1, 2, 3, 4, 5), {}),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        rand(2, 4, 5, 4),
        {},
    ),
    "transposed groups": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2),
        rand(2, 4, 5),
        {},
    ),
    "embedding": (
        lambda: nn.Embedding(11, 6, padding_idx=0),
        lambda: torch.randint(0, 11, (3, 4)),
        {},
    ),
    "embedding bag": (
        lambda: nn.EmbeddingBag(11, 6, mode="sum"),
        lambda: torch.randint(0, 11, (3, 4)),
        {},
    ),
    "unknown": (Functional, rand(2, 4, 5), {}),
    "attention": (lambda: SelfAttention(8, 2, batch_first=True), rand(2, 5, 8), {}),
    "attention q, v": (
        lambda: SelfAttention(8, 2, batch_first=True, bias=False),
        rand(2, 5, 8),
        {"layer": Slices()},
    ),
    "attention kdim, vdim": (
        lambda: CrossAttention(8, 2, kdim=5, vdim=3),
        lambda: (torch.randn(4, 2, 8), torch.randn(6, 2, 5), torch.randn(6, 2, 3)),
        {},
    ),
    "kdim, vdim: q, v": (
        lambda: CrossAttention(8, 2, kdim=5, vdim=3, add_bias_kv=True),
        lambda: (torch.randn(4, 2, 8), torch.randn(6, 2, 5), torch.randn(6, 2, 3)),
        {"layer": Slices()},
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        rand(2, 5, 8),
        {},
    ),
    "decoder layer": (
        lambda: Decoder(8, 2, 12, dropout=0.0, batch_first=True),
        rand(2, 5, 8),
        {},
    ),
}
COMPOSED = ("encoder layer", "decoder layer")
all_kinds = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def build(kind, **settings):
    """(base model, adapted copy, input); the weights of both are the same."""
    torch.manual_seed(0)
    make, sample, slices = KINDS[kind]
    base, x = Model(make()).eval(), sample()
    model = copy.deepcopy(base)
    targets = ["**.self_attn", "linear1", "linear2"] if kind in COMPOSED else ["layer"]
    if kind == "decoder layer":
        targets.append("multihead_attn")
    inject(model, LoraConfig(**{"target_modules": targets, "r": 2, "slices": slices} | settings))
    return base, model, x


def train(model, size=0.3, adapter="default"):
    """Move every trained value, as a training would."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            if adapter in layer.lora_adapters:
                for parameter in layer.lora_parameters(adapter).values():
                    parameter.add_(size * torch.randn_like(parameter))


def merged(base, model):
    """The base with the merged weights of the model's active adapters."""
    result = copy.deepcopy(base)
    for path, layer in lora_layers(model).items():
        plain = result.get_submodule(path)
        for name, weight in layer.lora_merged_weights().items():
            plain._parameters[name].data = weight
    return result


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@all_kinds
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_a_fresh_adapter_changes_no_bit(kind, mode):
    base, model, x = build(kind)
    # torch.matmul picks its kernel, and with it the last bit, by `requires_grad` of the weight.
    base.requires_grad_(mode != "no_grad")
    for module in (base, model):
        module.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        assert torch.equal(model(x), base(x))


DORA_KINDS = [
    kind for kind in KINDS if kind != "fused" and "dim" not in kind and "q, v" not in kind
]


@pytest.mark.parametrize("kind", DORA_KINDS)  # the others are refused, see test_inject
def test_a_fresh_dora_changes_no_bit(kind):
    base, model, x = build(kind, use_dora=True)
    assert torch.equal(model(x), base(x))


@all_kinds
def test_adapting_adds_keys_and_removing_restores_everything(kind):
    base, _, x = build(kind)
    keys, before, modules = list(base.state_dict()), bits(base), dict(base.named_modules())
    classes = {path: type(module) for path, module in modules.items()}
    parameters = dict(base.named_parameters())
    dicts = {path: set(vars(module)) for path, module in modules.items()}
    y = base(x)
    inject(base, LoraConfig(["re:.*"], r=2))
    train(base)
    assert not torch.equal(base(x), y)
    state = base.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in keys)
    assert all("lora_" in key for key in set(state) - set(keys))
    assert dict(base.named_modules()).items() >= modules.items()
    assert all(isinstance(module, classes[path]) for path, module in modules.items())
    remove(base)
    assert list(base.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert {path: type(module) for path, module in base.named_modules()} == classes
    assert {path: set(vars(module)) for path, module in base.named_modules()} == dicts
    assert dict(base.named_modules()) == modules
    assert all(parameter is parameters[key] for key, parameter in base.named_parameters())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(base(x), y)


@all_kinds
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 3}])
def test_adapted_output_is_that_of_the_merged_weights(kind, settings):
    base, model, x = build(kind, **settings)
    train(model)
    expected = merged(base, model)(x)
    assert (expected - base(x)).abs().max() > 1e-3
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    ["linear", "conv2d", "grouped", "transposed groups", "embedding", "attention", "unknown"],
)
def test_dora_output_is_that_of_the_merged_weights(kind):
    base, model, x = build(kind, use_dora=True)
    train(model)
    expected = merged(base, model)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    set_adapters(model, "default", 0.5)
    torch.testing.assert_close(model(x), merged(base, model)(x), rtol=1e-5, atol=1e-5)


@all_kinds
def test_only_the_adapter_learns(kind):
    _, model, x = build(kind)
    before = bits(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if ".lora_" in key}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):  # at the first step the gradient of one factor is zero
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != (key in trained), key
    assert all(p.grad is None for key, p in model.named_parameters() if key not in trained)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "attention", "transposed"])
def test_gradients_are_those_of_the_summed_weight(kind):
    base, model, x = build(kind)
    train(model)
    if kind == "embedding":
        x = x.clamp(min=1)  # the padding row has no gradient, but its token has one for B
    layers = lora_layers(model)
    (model(x) ** 2).sum().backward()
    summed = merged(base, model)
    (summed(x) ** 2).sum().backward()
    for path, layer in layers.items():
        spec = layer.lora_adapters["default"]
        dW = summed.get_submodule(path)._parameters[spec.weight_name].grad
        dW = dW.transpose(0, 1) if spec.transposed else dW
        A, B = layer.lora_factors("default")
        dB = spec.scale * dW.flatten(1) @ A.detach().flatten(1).t()
        dA = spec.scale * B.detach().flatten(1).t() @ dW.flatten(1)
        torch.testing.assert_close(B.grad.flatten(1), dB, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(A.grad.flatten(1), dA, rtol=1e-4, atol=1e-4)


@all_kinds
def test_file_layout_round_trip_restores_the_bits(kind):
    for settings in ({}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"use_dora": True}):
        try:
            _, model, x = build(kind, **settings)
        except ConfigError:
            continue  # which combinations are refused is in test_inject
        train(model)
        y, state = model(x), bits(model)
        files = {p: layer.lora_file_tensors("default") for p, layer in lora_layers(model).items()}
        train(model)
        assert not torch.equal(model(x), y)
        for path, layer in lora_layers(model).items():
            layer.lora_load_file_tensors("default", files[path])
        assert torch.equal(model(x), y)
        assert all(torch.equal(v, state[key]) for key, v in model.state_dict().items())


def test_file_tensors_of_another_shape_or_other_slices_are_refused():
    _, model, x = build("fused")
    layer, y = model.layer, model(x)
    tensors = layer.lora_file_tensors("default")
    assert tensors["lora_A.weight"].shape == (4, 5)
    assert tensors["lora_B.weight"].shape == (9, 4)
    for key, wrong, words in [
        ("lora_A.weight", torch.zeros(2, 5), r"lora_A.weight has shape \(2, 5\)"),
        ("lora_B.weight", torch.ones(9, 4), "outside the rows of the slices"),
        ("lora_C.weight", torch.zeros(1), "expected the keys"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            layer.lora_load_file_tensors("default", tensors | {key: wrong})
    assert torch.equal(model(x), y)


@all_kinds
def test_copies_are_independent_and_pickle_works(kind):
    _, model, x = build(kind)
    train(model)
    y = model(x)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    train(model)
    assert not torch.equal(model(x), y)
    for each in copies:
        assert torch.equal(each(x), y)
        remove(each)
        assert not any(isinstance(module, LoraLayer) for module in each.modules())


@pytest.mark.parametrize("made", [lambda m: m, copy.deepcopy, lambda m: nn.Sequential(m)[0]])
def test_a_base_checkpoint_loads_strictly_after_injection(made):
    base, model, x = build("encoder layer")
    other, model = Model(KINDS["encoder layer"][0]()).eval(), made(model)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))
    assert not torch.equal(model(x), base(x))
    remove(model)
    assert not model._load_state_dict_post_hooks
    model.load_state_dict(base.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, "layer.lora_A.default.weight"),  # a part of an adapter is no base
        ({}, "layer.weight"),
        ({"use_dora": True}, "lora_"),  # its magnitudes are the old base's
        ({"bias": "lora_only"}, "lora_"),  # so are the values that are kept aside
    ],
)
def test_what_is_no_whole_base_is_refused_by_a_strict_load(settings, left_out):
    _, model, _ = build("linear", **settings)
    state = {key: value for key, value in model.state_dict().items() if left_out not in key}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state, strict=True)


def test_attributes_and_hooks_of_the_base_stay():
    layer, seen = nn.Linear(5, 7), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model = nn.Sequential(layer)
    inject(model, LoraConfig(["0"], r=2))
    model(torch.randn(3, 5))
    assert seen == [(3, 7)]
    assert model[0] is layer
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.weight, nn.Parameter)
    assert (layer.in_features, layer.out_features) == (5, 7)


# Weights that other code reads


def test_fast_paths_of_torch_run_and_see_the_adapter():
    base, model, x = build("encoder layer")
    train(model)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast = model(x)
    names = {event.name for event in profile.events()}
    assert "aten::_transformer_encoder_layer_fwd" in names
    torch.testing.assert_close(fast, merged(base, model)(x), rtol=1e-5, atol=1e-5)
    _, attention, x = build("attention")
    train(attention)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast = attention(x)
    assert "aten::_native_multi_head_attention" in {event.name for event in profile.events()}
    torch.testing.assert_close(fast, attention(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_whole_encoder_with_padding_sees_the_adapter():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    model = copy.deepcopy(base)
    inject(model, LoraConfig(["self_attn", "linear1", "linear2"], r=2))
    train(model)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = merged(base, model).train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y[~mask], expected[~mask], rtol=1e-5, atol=1e-5)


def test_reading_a_parametrized_weight_gives_the_sum_and_the_raw_one_when_off():
    _, model, _ = build("attention")
    attention, raw = model.layer, model.layer.lora_raw("in_proj_weight")
    train(model)
    expected = raw + attention.lora_delta("default")
    torch.testing.assert_close(attention.in_proj_weight, expected)
    assert attention.in_proj_weight.requires_grad
    with adapters_off(model):
        assert attention.in_proj_weight is raw


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["head", "embed"]])
def test_tied_weights_stay_tied_and_every_reader_sees_the_adapter(targets):
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 11, (3, 4))
    before, y = bits(model), model(tokens)
    table = inject(model, LoraConfig(targets, r=2))
    assert len(lora_layers(model)) == len(table.rows) == 1
    assert "too, not for plain PEFT" in table.rows[0].note
    assert torch.equal(model(tokens), y)
    train(model)
    (layer,) = lora_layers(model).values()
    summed = Tied()
    summed.embed.weight.data = layer.lora_merged_weights()["weight"]
    torch.testing.assert_close(model(tokens), summed(tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
    model(tokens).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    remove(model)
    assert (type(model.embed), type(model.head)) == (nn.Embedding, nn.Linear)
    assert model.head.weight is model.embed.weight
    assert bits(model).keys() == before.keys()
    assert torch.equal(model(tokens), y)


def test_a_module_under_two_names_is_adapted_once():
    shared = nn.Linear(5, 5)
    model = nn.Module()
    model.first, model.second = shared, shared
    inject(model, LoraConfig(["first", "second"], r=2))
    assert list(lora_layers(model)) == ["first"]
    assert model.second is model.first


class Outer(nn.Module):
    """A layer with a weight of its own and another layer inside."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(torch.tanh(x @ self.weight.T))


def test_targets_inside_targets_have_adapters_of_their_own():
    torch.manual_seed(0)
    base, x = Model(Outer()), torch.randn(3, 5)
    model = copy.deepcopy(base)
    inject(model, LoraConfig(["layer", "layer.inner"], r=2))
    train(model)
    assert list(lora_layers(model)) == ["layer", "layer.inner"]
    torch.testing.assert_close(model(x), merged(base, model)(x), rtol=1e-5, atol=1e-5)
    remove(model)
    assert torch.equal(model(x), base(x))


# Dropout, modes, repeated use


def test_dropout_acts_in_training_only_and_differs_between_layers():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(50, 50, bias=False) for _ in range(2)])
    inject(model, LoraConfig(["0", "1"], r=50, lora_alpha=50, lora_dropout=0.5))
    with torch.no_grad():
        for layer in model:
            A, B = layer.lora_factors("default")
            A.copy_(torch.eye(50)), B.copy_(torch.eye(50)), layer.weight.zero_()
    x = torch.ones(20, 50)
    first, second = (layer(x) for layer in model)
    assert 0.4 < (first == 0).float().mean() < 0.6
    assert not torch.equal(first, second)
    assert not torch.equal(first, model[0](x))
    torch.manual_seed(1)
    repeated = model[0](x)
    torch.manual_seed(1)
    assert torch.equal(model[0](x), repeated)
    model.eval()
    assert torch.equal(model[0](x), x)


@pytest.mark.parametrize("kind", ["own forward", "attention", "transposed", "encoder layer"])
def test_dropout_on_a_read_weight_acts_in_training_only(kind):
    _, model, x = build(kind, lora_dropout=0.5)
    train(model)
    assert torch.equal(model(x), model(x))
    model.train()
    outputs = [model(x) for _ in range(4)]
    assert not all(torch.equal(outputs[0], y) for y in outputs[1:])
    torch.manual_seed(1)
    repeated = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), repeated)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "fused", "conv2d", "attention", "encoder layer"])
def test_activation_checkpointing_changes_no_bit(kind, p, use_reentrant):
    _, model, x = build(kind, lora_dropout=p)
    train(model)
    model.train()
    results = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=use_reentrant)):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = run(inputs)
        y.sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((y, [inputs.grad, *grads]))
    (y, grads), (checkpointed_y, checkpointed_grads) = results
    for plain, checkpointed in zip(grads, checkpointed_grads, strict=True):
        assert torch.equal(plain, checkpointed)
    if use_reentrant:  # its forward pass runs without gradients, where torch picks other kernels
        torch.testing.assert_close(y, checkpointed_y, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(y, checkpointed_y)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_used_twice_adds_its_gradients(p):
    torch.manual_seed(0)
    model = Model(nn.Linear(5, 5))
    inject(model, LoraConfig(["layer"], r=2, lora_dropout=p))
    train(model)
    x = torch.randn(3, 5, requires_grad=True)
    parameters = [x, *model.layer.lora_parameters("default").values()]
    torch.manual_seed(1)
    inner = model(x)
    twice = torch.autograd.grad(model(inner).sum(), parameters)
    other = copy.deepcopy(model)  # the same, with parameters of its own for the second use
    others = list(other.layer.lora_parameters("default").values())
    torch.manual_seed(1)
    y = other(model(x)).sum()
    once = torch.autograd.grad(y, [*parameters, *others])
    torch.testing.assert_close(twice[0], once[0])
    for both, first, second in zip(twice[1:], once[1:3], once[3:], strict=True):
        torch.testing.assert_close(both, first + second)


def test_no_batch_and_odd_inputs():
    _, model, _ = build("linear", lora_dropout=0.3)
    model.train()
    for x in (torch.randn(5), torch.randn(0, 5), torch.randn(5, 4).t(), torch.randn(2, 1, 3, 5)):
        x.requires_grad_()
        y = model(x)
        assert y.shape == (*x.shape[:-1], 7)
        y.sum().backward()
        assert x.grad.shape == x.shape
    with torch.inference_mode():
        assert model(torch.randn(3, 5)).shape == (3, 7)


def test_merged_layers_add_nothing_and_refuse_to_train():
    base, model, x = build("encoder layer")
    base.requires_grad_(False)
    train(model)
    for layer in lora_layers(model).values():
        layer.lora_merged = ("default",)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), base(x))
    with pytest.raises(NumericError, match="unmerge"):
        model.train()(x)


def test_half_precision_base_keeps_fp32_adapters():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = Model(nn.Linear(5, 7)).to(dtype)
        inject(model, LoraConfig(["layer"], r=2))
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
        y = model(torch.randn(3, 5, dtype=dtype))
        assert y.dtype == dtype
        y.float().sum().backward()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_on_b_fits_a_half_precision_base(dtype, bias):
    for layer, x in (
        (nn.Linear(5, 7, bias=bias), torch.randn(3, 5)),
        (nn.Conv1d(5, 7, 3, bias=bias), torch.randn(2, 5, 6)),
    ):
        model = Model(layer).to(dtype)
        inject(model, LoraConfig(["layer"], r=2, lora_bias=True))
        y = model(x.to(dtype))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert model.layer.lora_b_bias("default").grad.any()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "attention", "transposed"])
def test_autocast_gives_the_base_dtype_and_bf16_accuracy(kind):
    for settings in ({}, {"use_dora": True}, {"lora_dropout": 0.2}):
        base, model, x = build(kind, **settings)
        train(model, 0.1)
        expected = model(x).detach()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            assert y.dtype == base(x).dtype
            model.train()
            loss = model(x).float().square().sum()
        loss.backward()
        assert (y - expected).abs().max() < 2e-2 * expected.abs().max()
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == parameter.dtype
                assert parameter.grad.isfinite().all()


def test_meta_device_costs_no_memory_and_runs():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10_000, 100_000), nn.Linear(100_000, 10))
    inject(model, LoraConfig(["0", "1"], r=4, lora_dropout=0.1))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.empty(2, 10_000, device="meta")).shape == (2, 10)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("linear", "aot_eager"),
        ("fused", "eager"),
        ("conv2d", "eager"),
        ("embedding", "eager"),
        ("attention", "eager"),
    ],
)
def test_compiled_without_graph_breaks(kind, backend):
    for settings in ({}, {"lora_dropout": 0.3}):
        torch._dynamo.reset()
        _, model, x = build(kind, **settings)
        train(model)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        model.train()
        compiled(x).square().sum().backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_new_adapter_values_in_place_do_not_recompile():
    torch._dynamo.reset()
    _, model, x = build("linear")
    train(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x)
    other = copy.deepcopy(model)
    train(other)
    model.layer.lora_load_file_tensors("default", other.layer.lora_file_tensors("default"))
    torch.testing.assert_close(compiled(x), other(x))
    assert len(graphs) == 1
