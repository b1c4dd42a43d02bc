"""Files exchanged with PEFT: its recorded ones with us, ours with the live library."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from golden_models import Convs, Fused, Mlp, Wrapped
from torch import nn
from torch.nn import functional as F

from lora_core.adapters.file import load_adapter, save_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.injection import inject, lora_layers, set_adapters
from lora_core.testing import assert_close_golden, disturb, load_golden

GOLDENS = Path(__file__).parent / "goldens"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = pytest.mark.filterwarnings("ignore:a rank above:UserWarning")  # the Conv3d case


def recorded_model(case):
    """The base of a recorded case, and its inputs."""
    golden = load_golden(GOLDENS / case)
    c = golden.config
    mlp = {key: c.get(key) for key in ("dim", "hidden", "depth", "out")}
    make = {
        "conv": Convs,
        "conv_dora": lambda: Wrapped("c3", nn.Conv2d(6, 10, 3, padding=1)),
        "embedding": lambda: Wrapped("emb", nn.Embedding(50, 24, 0)),
        "encoder_layer": lambda: Wrapped(
            "layer",
            nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation="gelu", batch_first=True),
        ),
        "fused_qkv": lambda: Fused(24, (24, 24, 24)),
        "mha": lambda: Wrapped("attn", nn.MultiheadAttention(16, 4, batch_first=True)),
        "mlp_patterns": lambda: Mlp(**mlp),
        "multi_adapter": lambda: Mlp(**mlp),
        "train_adamw": lambda: Mlp(**mlp),
    }.get(case, lambda: Wrapped("lin", nn.Linear(24, 40, bias=c.get("bias", True))))
    model = make()
    model.load_state_dict(golden.weights)
    return golden, model.eval()


RECORDED = [
    *("conv", "conv_dora", "embedding", "encoder_layer", "fused_qkv", "linear", "linear_dora"),
    *("linear_lora_bias", "linear_rslora", "mha", "mlp_patterns"),
]


@pytest.mark.fault("K34")
@pytest.mark.parametrize("case", RECORDED)
def test_files_that_peft_wrote_give_its_outputs(case):
    golden, model = recorded_model(case)
    load_adapter(model, GOLDENS / case / "adapter")
    if case == "mha":
        inputs = [golden.io[f"in.{n}"] for n in ("query", "key", "value", "key_padding_mask")]
        assert_close_golden(model(*inputs), golden.io["out.lora"])
    elif case == "encoder_layer":
        valid = ~golden.io["in.src_key_padding_mask"]
        y = model(golden.io["in.x"], src_key_padding_mask=~valid)
        assert_close_golden(y[valid], golden.io["out.lora"][valid])
    else:
        assert_close_golden(model(golden.io["in.x"]), golden.io["out.lora"])


@pytest.mark.parametrize("case", RECORDED)
def test_the_keys_and_values_we_write_are_pefts(case, tmp_path):
    _, model = recorded_model(case)
    load_adapter(model, GOLDENS / case / "adapter")
    save_adapter(model, tmp_path)
    theirs = safetensors.torch.load_file(GOLDENS / case / "adapter" / WEIGHTS)
    ours = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    settings = [
        json.loads((p / CONFIG).read_text()) for p in (tmp_path, GOLDENS / case / "adapter")
    ]
    for field in ("peft_type", "use_rslora", "use_dora", "lora_bias", "bias", "inference_mode"):
        assert settings[0][field] == settings[1][field]


def test_slices_expanded_by_us_are_the_recorded_expansion(tmp_path):
    golden, model = recorded_model("fused_qkv")
    inject(model, LoraConfig(["qkv"], r=3, lora_alpha=6, slices={"qkv": Slices()}))
    layer = lora_layers(model)["qkv"]
    A, B = layer.lora_factors("default")
    with torch.no_grad():
        A.copy_(torch.cat([golden.io[f"slice.{name}.lora_A"] for name in "qv"]))
        B.copy_(torch.cat([golden.io[f"slice.{name}.lora_B"] for name in "qv"]))
    save_adapter(model, tmp_path)
    theirs = safetensors.torch.load_file(GOLDENS / "fused_qkv" / "adapter" / WEIGHTS)
    ours = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 12)
    (tmp_path / WEIGHTS).write_bytes((GOLDENS / "fused_qkv" / "adapter" / WEIGHTS).read_bytes())
    plain = Fused(24, (24, 24, 24))
    plain.load_state_dict(golden.weights)
    load_adapter(plain, tmp_path)  # without our facts the expansion stays a plain adapter
    assert lora_layers(plain)["qkv"].lora_adapters["default"].slices is None
    assert_close_golden(plain(golden.io["in.x"]), golden.io["out.lora"])


@pytest.mark.fault("K39", "K44")
def test_two_recorded_adapters_on_one_model():
    golden, model = recorded_model("multi_adapter")
    for name in "ab":
        load_adapter(model, GOLDENS / "multi_adapter" / f"adapter_{name}", name)
    for names, key in (("a", "a"), ("b", "b"), (["a", "b"], "a_and_b")):
        set_adapters(model, names)
        assert_close_golden(model(golden.io["in.x"]), golden.io[f"out.{key}"])


# -- the live library ------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers that PEFT knows: tokens (3, 6) -> (3, 6, 5)."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.emb(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            q, k, v = block["qkv"](x).chunk(3, -1)
            x = x + block["proj"](F.scaled_dot_product_attention(q, k, v))
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x))


TOKENS = torch.arange(18).reshape(3, 6) % 11
OURS = {
    "linear": LoraConfig(["qkv", "proj"], r=3, lora_alpha=5, lora_dropout=0.1),
    "rslora": LoraConfig(["qkv"], r=3, use_rslora=True),
    "dora": LoraConfig(["qkv", "conv"], r=3, use_dora=True),
    "lora_bias": LoraConfig(["qkv"], r=3, lora_bias=True),
    "conv": LoraConfig(["conv"], r=3),
    "embedding": LoraConfig(["emb"], r=3),
    "slices": LoraConfig(["qkv"], r=2, slices={"qkv": Slices(sizes=(8, 4, 12))}),
    "patterns_and_head": LoraConfig(
        ["qkv", "proj"],
        r=3,
        rank_pattern={r"blocks\.1\.qkv": 5},
        alpha_pattern={"proj": 0.5},
        modules_to_save=["head", "norm"],
    ),
    "all_biases": LoraConfig(["qkv", "conv"], r=3, bias="all"),
    "adapted_biases": LoraConfig(["qkv", "conv"], r=3, bias="lora_only"),
    "in_proj": LoraConfig(["attn"], r=3, exclude_modules=["out_proj"], lora_dropout=0.1),
    "in_proj_and_more": LoraConfig(["attn", "proj"], r=3, exclude_modules=["out_proj"]),
    "in_proj_slices": LoraConfig(
        ["attn"], r=2, exclude_modules=["out_proj"], slices={"attn": Slices()}
    ),
    "pissa": LoraConfig(["qkv"], r=3, init_lora_weights="pissa"),
}


@torch.no_grad()
def out(model):
    return model.eval()(TOKENS)


def trained(config):
    model = Net()
    inject(model, config)
    disturb(model, size=0.1)
    return model


@pytest.mark.fault("K34")
@pytest.mark.filterwarnings("error:.*(missing|unexpected).*:UserWarning")
@pytest.mark.parametrize("case", OURS)
def test_peft_computes_what_we_saved(case, tmp_path):
    import peft

    model = trained(OURS[case])
    assert (out(model) - out(Net())).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(Net(), str(save_adapter(model, tmp_path)))
    assert_close_golden(out(theirs), out(model), rtol=0, atol=1e-5)
    merged = theirs.merge_and_unload()
    assert_close_golden(out(merged), out(model), rtol=0, atol=1e-5)


PEFTS = {
    "linear": {"target_modules": ["qkv", "proj"], "lora_alpha": 5},
    "rslora": {"target_modules": ["qkv"], "use_rslora": True},
    "dora": {"target_modules": ["qkv", "conv"], "use_dora": True},
    "lora_bias": {"target_modules": ["qkv"], "lora_bias": True},
    "conv": {"target_modules": ["conv"]},
    "embedding": {"target_modules": ["emb"]},
    "expression": {"target_modules": r".*\.1\.(qkv|proj)"},
    "last_layers": {
        "target_modules": ["qkv"],
        "layers_to_transform": [1],
        "layers_pattern": "blocks",
    },
    "excluded": {"target_modules": ["qkv", "proj"], "exclude_modules": ["0.qkv"]},
    "all_linear": {"target_modules": ["qkv", "proj", "head"]},
    "patterns_and_head": {
        "target_modules": ["qkv", "proj"],
        "rank_pattern": {"0.qkv": 5},
        "alpha_pattern": {"proj": 3},
        "modules_to_save": ["head"],
    },
    "all_biases": {"target_modules": ["qkv"], "bias": "all"},
    "adapted_biases": {"target_modules": ["qkv", "conv"], "bias": "lora_only"},
    "attention": {"target_modules": ["attn"]},
    "in_proj": {"target_modules": ["qkv"], "target_parameters": ["attn.in_proj_weight"]},
}


def train_in_peft(settings):
    """A model adapted by PEFT whose factors are not zero."""
    import peft

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # PEFT adds the update of out_proj twice; without one it is right.
            if parameter.requires_grad and ".out_proj.lora_B" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.fault("K34")
@pytest.mark.parametrize("case", PEFTS)
def test_we_compute_what_peft_saved(case, tmp_path):
    theirs = train_in_peft(PEFTS[case])
    assert (out(theirs) - out(Net())).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path)
    model = Net()
    load_adapter(model, tmp_path)
    assert_close_golden(out(model), out(theirs), rtol=0, atol=1e-5)
    again = Net()
    load_adapter(again, save_adapter(model, tmp_path / "ours"))
    assert torch.equal(out(again), out(model))


@pytest.mark.fault("K34")
def test_an_adapter_survives_peft_saving_it_again(tmp_path):
    import peft

    model = trained(OURS["slices"])
    theirs = peft.PeftModel.from_pretrained(Net(), str(save_adapter(model, tmp_path / "ours")))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = Net()
    load_adapter(loaded, tmp_path / "theirs")
    assert_close_golden(out(loaded), out(model), rtol=0, atol=1e-6)


def test_two_adapters_in_peft_and_here(tmp_path):
    import peft

    for name in ("slices", "linear"):
        save_adapter(trained(OURS[name]), tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "slices"), "one")
    theirs.load_adapter(str(tmp_path / "linear"), "two")
    model = Net()
    load_adapter(model, tmp_path / "slices", "one")
    load_adapter(model, tmp_path / "linear", "two")
    for names in (["one"], ["two"], ["one", "two"]):
        set_adapters(model, names)
        theirs.base_model.set_adapter(names)
        assert_close_golden(out(model), out(theirs), rtol=0, atol=1e-5)
