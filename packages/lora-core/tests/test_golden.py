"""The sixteen recorded cases: outputs, every gradient, starts, several adapters, ten steps.

`goldens/<case>/README.md` says how each was made; most by PEFT 0.21.2, the attention cases by the
formula in fp64. What merging makes of them is tested in `test_merging.py`.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from golden_models import Convs, Fused, Mlp, Wrapped
from torch import nn
from torch.nn import functional as F

from lora_core.config import LoraConfig, Slices
from lora_core.functional import Branch, lora_linear
from lora_core.injection import adapters_off, full_tensors, inject, lora_layers, set_adapters
from lora_core.testing import assert_close_golden, assert_gradient_close, load_golden

GOLDENS = Path(__file__).parent / "goldens"
PREFIX = "base_model.model."


def loaded(case, model):
    golden = load_golden(GOLDENS / case)
    model.load_state_dict(golden.weights)
    return golden, model


def adapter_tensors(folder):
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def fill(model, folder, name="default"):
    """Copy an adapter directory into the injected model; every tensor must find its place."""
    tensors = adapter_tensors(folder)
    for path, layer in lora_layers(model).items():
        if name not in layer.lora_adapters:
            continue
        place = path.replace("attn.out_proj", "attn.base_layer.out_proj")
        suffixes = list(layer.lora_file_tensors(name))
        part = {suffix: tensors.pop(f"{place}.{suffix}") for suffix in suffixes}
        layer.lora_load_file_tensors(name, part)
    with torch.no_grad():
        for key, tensor in full_tensors(model, name).items():
            tensor.copy_(tensors.pop(key))
    assert not tensors, f"not loaded: {sorted(tensors)}"


def live_name(key):
    """Name of a live parameter for the key of a recorded gradient."""
    key = key.removeprefix("grad.").removeprefix(PREFIX).replace(".base_layer", "")
    key = key.replace(".modules_to_save", "")
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        key = key.replace(f"{kind}.", f"{kind}.default.")
    for kind in ("lora_embedding_A", "lora_embedding_B"):
        key = key.replace(kind, f"{kind}.default")
    return key


def check_gradients(model, golden, inputs, rtol=2e-5):
    """Compare the gradients of all recorded parameters and inputs after `backward`."""
    parameters = dict(model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    for key, expected in golden.io.items():
        if not key.startswith("grad."):
            continue
        if key.removeprefix("grad.") in inputs:
            assert_gradient_close(inputs[key.removeprefix("grad.")].grad, expected, rtol)
        else:
            assert_gradient_close(parameters[live_name(key)].grad, expected, rtol)
            trained.remove(live_name(key))
    assert not trained, f"trains without a recorded gradient: {trained}"


def lora_config(golden, **changes):
    fields = golden.config["lora"] | {"target_modules": golden.config["target_modules"]}
    saved = golden.config["modules_to_save"] or []
    return LoraConfig(**fields | {"modules_to_save": saved} | changes)


def config_of(case):
    return load_golden(GOLDENS / case).config


def case_model(case):
    """The model of a case that PEFT recorded with one input x."""
    c = config_of(case)
    if case == "embedding":
        table = nn.Embedding(c["num_embeddings"], c["embedding_dim"], c["padding_idx"])
        return Wrapped("emb", table)
    if case == "conv":
        return Convs()
    if case == "conv_dora":
        layer = nn.Conv2d(c["in_channels"], c["out_channels"], c["kernel"], padding=c["padding"])
        return Wrapped("c3", layer)
    if case == "mlp_patterns":
        return Mlp(c["dim"], c["hidden"], c["depth"], c["out"])
    layer = nn.Linear(c["in_features"], c["out_features"], bias=c.get("bias", True))
    return Wrapped("lin", layer)


@pytest.mark.filterwarnings("ignore:a rank above")  # the case `conv` has such a layer
@pytest.mark.parametrize(
    "case",
    [
        "linear",
        "linear_rslora",
        "linear_lora_bias",
        "linear_dora",
        "conv",
        "conv_dora",
        "embedding",
        "mlp_patterns",
    ],
)
def test_outputs_and_gradients_are_pefts(case):
    golden, model = loaded(case, case_model(case))
    x = golden.io["in.x"]
    if x.is_floating_point():
        x.requires_grad_()
    base = model(x)
    assert_close_golden(base, golden.io["out.base"])
    inject(model, lora_config(golden))
    assert torch.equal(model.eval()(x), base)
    fill(model, GOLDENS / case / "adapter")
    assert_close_golden(model(x), golden.io["out.lora"])
    y = model.train()(x)
    (y * golden.io["g"]).sum().backward()
    check_gradients(model, golden, {"x": x})
    with adapters_off(model):
        assert torch.equal(model(x), base)


@pytest.mark.filterwarnings("ignore:a rank above")
@pytest.mark.parametrize(
    "case", ["linear", "linear_rslora", "linear_lora_bias", "linear_dora", "conv", "conv_dora"]
)
def test_merged_weights_are_pefts(case):
    golden, model = loaded(case, case_model(case))
    inject(model, lora_config(golden))
    fill(model, GOLDENS / case / "adapter")
    seen = 0
    for path, layer in lora_layers(model).items():
        for name, weight in layer.lora_merged_weights().items():
            assert_close_golden(weight, golden.io[f"merged.{path}.{name}"])
            seen += 1
    assert seen == sum(key.startswith("merged.") for key in golden.io)


def test_bf16_base_with_fp32_adapter():
    golden, model = loaded("linear_bf16", case_model("linear_bf16").to(torch.bfloat16))
    inject(model, lora_config(golden))
    fill(model, GOLDENS / "linear_bf16" / "adapter")
    x = golden.io["in.x"].requires_grad_()
    y = model(x)
    assert y.dtype == torch.bfloat16
    exact = golden.io["out.exact_fp64"]
    assert (y.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    (y * golden.io["g"]).sum().backward()
    check_gradients(model, golden, {"x": x}, rtol=5e-3)
    layer = lora_layers(model)["lin"]
    merged = layer.lora_merged_weights()["weight"].to(torch.bfloat16)
    assert torch.equal(merged, golden.io["merged_one_rounding.lin.weight"])


def test_fused_slices_and_their_plain_expansion():
    c = config_of("fused_qkv")
    golden, model = loaded("fused_qkv", Fused(c["dim"], c["sizes"]))
    slices = {"qkv": Slices(("q", "k", "v"), tuple(c["slices"]), tuple(c["sizes"]))}
    inject(model, LoraConfig(["qkv"], r=c["r"], lora_alpha=c["alpha"], slices=slices))
    fill(model, GOLDENS / "fused_qkv" / "adapter")
    layer, io = lora_layers(model)["qkv"], golden.io
    assert layer.lora_adapters["default"].file_rank == (2 * c["r"], 2 * c["alpha"])
    A, B = layer.lora_factors("default")
    q_A, v_A, q_B, v_B = *A.split(c["r"]), *B.split(c["sizes"][0])
    for ours, key in ((q_A, "q.lora_A"), (q_B, "q.lora_B"), (v_A, "v.lora_A"), (v_B, "v.lora_B")):
        assert torch.equal(ours, io[f"slice.{key}"])
    x = io["in.x"].requires_grad_()
    y = model(x)
    assert_close_golden(y, io["out.lora"])
    (y * io["g"]).sum().backward()
    assert_gradient_close(x.grad, io["grad.x"])
    assert_gradient_close(A.grad, torch.cat([io[f"grad.slice.{n}.lora_A"] for n in "qv"]))
    assert_gradient_close(B.grad, torch.cat([io[f"grad.slice.{n}.lora_B"] for n in "qv"]))
    merged = layer.lora_merged_weights()["weight"]
    assert_close_golden(merged, io["merged.qkv.weight"])
    k_rows = slice(c["sizes"][0], sum(c["sizes"][:2]))
    assert torch.equal(merged[k_rows], golden.weights["qkv.weight"][k_rows])


def attention_inputs(golden):
    c = golden.config
    model = nn.MultiheadAttention(c["embed_dim"], c["num_heads"], batch_first=True)
    q, k, v = (golden.io[f"in.{n}"].requires_grad_() for n in ("query", "key", "value"))
    return Wrapped("attn", model), (q, k, v, golden.io["in.key_padding_mask"])


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_attention_is_the_formula_and_not_pefts_doubled_out_proj(mode):
    golden = load_golden(GOLDENS / "mha")
    model, inputs = attention_inputs(golden)
    golden, model = loaded("mha", model)
    config = LoraConfig(["attn"], r=golden.config["r"], lora_alpha=golden.config["alpha"])
    inject(model, config)
    fill(model, GOLDENS / "mha" / "adapter")
    model.train(mode == "train")
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        mode, torch.enable_grad
    )():
        y = model(*inputs)
    assert_close_golden(y, golden.io["out.lora"], rtol=1e-5, atol=2e-6)
    wrong = golden.io["out.peft_0_21_2"]
    assert (y - wrong).abs().max() > 1e-2 * wrong.abs().max()
    if mode == "train":
        (y * golden.io["g"]).sum().backward()
        names = ("query", "key", "value")
        check_gradients(model, golden, dict(zip(names, inputs[:3], strict=True)))
    for path, layer in lora_layers(model).items():
        for name, weight in layer.lora_merged_weights().items():
            assert_close_golden(weight, golden.io[f"merged.{path}.{name}"])


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_encoder_layer_sees_its_adapter_in_every_mode(mode):
    c = config_of("encoder_layer")
    layer = nn.TransformerEncoderLayer(
        c["d_model"],
        c["nhead"],
        c["dim_feedforward"],
        dropout=c["dropout"],
        activation=c["activation"],
        batch_first=True,
        norm_first=c["norm_first"],
    )
    golden, model = loaded("encoder_layer", Wrapped("layer", layer))
    targets = ["linear1", "linear2", "self_attn"]
    inject(model, LoraConfig(targets, r=c["r"], lora_alpha=c["alpha"]))
    fill(model, GOLDENS / "encoder_layer" / "adapter")
    model.train(mode == "train")
    x, mask = golden.io["in.x"].requires_grad_(), golden.io["in.src_key_padding_mask"]
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        mode, torch.enable_grad
    )():
        y = model(x, src_key_padding_mask=mask)
    assert_close_golden(y[~mask], golden.io["out.lora"][~mask], rtol=1e-5, atol=2e-6)
    assert (y - golden.io["out.base"])[~mask].abs().max() > 1e-2
    if mode == "train":
        (y * golden.io["g"])[~mask].sum().backward()
        check_gradients(model, golden, {"x": x})


def two_adapters():
    c = config_of("multi_adapter")
    golden, model = loaded("multi_adapter", Mlp(c["dim"], c["hidden"], c["depth"], c["out"]))
    for name in "ab":
        fields = dict(c[name])
        inject(model, LoraConfig(fields.pop("targets"), **fields), name)
        fill(model, GOLDENS / "multi_adapter" / f"adapter_{name}", name)
    return golden, model.eval()


def test_two_adapters_alone_together_scaled_and_off():
    golden, model = two_adapters()
    io, x = golden.io, golden.io["in.x"]
    for names, scales, key in [
        ("a", None, "a"),
        ("b", None, "b"),
        (["a", "b"], None, "a_and_b"),
        ("a", 0.5, "a_scale_half"),
        (["a", "b"], {"b": 0.0}, "a"),
    ]:
        set_adapters(model, names, scales)
        assert_close_golden(model(x), io[f"out.{key}"])
    set_adapters(model, [])
    base = model(x)
    assert_close_golden(base, io["out.disabled"])
    plain = Mlp(**{k: golden.config[k] for k in ("dim", "hidden", "depth", "out")})
    plain.load_state_dict(golden.weights)
    assert torch.equal(base, plain(x))


def test_merged_weight_of_two_adapters():
    golden, model = two_adapters()
    set_adapters(model, ["a", "b"])
    for path, layer in lora_layers(model).items():
        expected = golden.io[f"merged_a_and_b.{path}.weight"]
        assert_close_golden(layer.lora_merged_weights()["weight"], expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_move_the_base_without_touching_it(init):
    c = config_of(f"init_{init}")
    layer = nn.Linear(c["in_features"], c["out_features"], bias=False)
    golden, model = loaded(f"init_{init}", Wrapped("lin", layer))
    x, io = golden.io["in.x"], golden.io
    inject(model, LoraConfig(["lin"], r=c["r"], lora_alpha=c["lora_alpha"], init_lora_weights=init))
    assert_close_golden(model(x), io["out.after_init"], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.lin.weight, golden.weights["lin.weight"])
    layer = lora_layers(model)["lin"]
    A, B = layer.lora_factors("default")
    assert_close_golden(A.abs(), io["abs_lora_A"], 2e-5, 2e-5)
    assert_close_golden(B.abs(), io["abs_lora_B"], 2e-5, 2e-5)
    start = layer.lora_adapters["default"].scale * B @ A
    assert_close_golden(start, io["delta"], 2e-5, 2e-5)
    assert_close_golden(model.lin.weight - start, io["residual.lin.weight"], 2e-5, 2e-5)
    assert layer.lora_delta("default").abs().max() <= 1e-6


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_trained_pissa_is_the_plain_adapter_of_twice_the_rank(init):
    golden, model = loaded(f"init_{init}", Wrapped("lin", nn.Linear(24, 40, bias=False)))
    inject(model, LoraConfig(["lin"], r=4, lora_alpha=8, init_lora_weights=init))
    layer = lora_layers(model)["lin"]
    with torch.no_grad():
        for parameter in layer.lora_parameters("default").values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    r, alpha = layer.lora_adapters["default"].file_rank
    tensors = layer.lora_file_tensors("default")
    assert (r, alpha) == (8, 16)
    assert tensors["lora_A.weight"].shape == (8, 24)
    x = golden.io["in.x"]
    plain = Branch(tensors["lora_A.weight"], tensors["lora_B.weight"], alpha / r)
    expected = lora_linear(x, golden.weights["lin.weight"], None, [plain])
    assert_close_golden(model(x), expected, rtol=1e-5, atol=1e-5)


def test_ten_adamw_steps():
    c = config_of("train_adamw")
    golden, model = loaded("train_adamw", Mlp(c["dim"], c["hidden"], c["depth"], c["out"]))
    inject(
        model,
        LoraConfig(
            c["targets"], r=c["r"], lora_alpha=c["lora_alpha"], modules_to_save=c["modules_to_save"]
        ),
    )
    folder = GOLDENS / "train_adamw"
    fill(model, folder / "adapter_start")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=c["lr"], betas=c["betas"], eps=c["eps"], weight_decay=c["weight_decay"]
    )
    for step in range(c["steps"]):
        loss = F.mse_loss(model(golden.io["batches.x"][step]), golden.io["batches.y"][step])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, c["clip_grad_norm"])
        optimizer.step()
        torch.testing.assert_close(loss, golden.io["loss"][step], rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, golden.io["grad_norm"][step], rtol=2e-5, atol=0)
    ours = {
        f"{path}.{suffix}": tensor
        for path, layer in lora_layers(model).items()
        for suffix, tensor in layer.lora_file_tensors("default").items()
    }
    ours |= full_tensors(model, "default")
    expected = adapter_tensors(folder / "adapter_end")
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-4)
