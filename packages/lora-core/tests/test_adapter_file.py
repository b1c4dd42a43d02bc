"""Adapters on disk: round trips of every kind, PEFT's own files, and strict loading."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from lora_core.adapter_file import load_adapter, read_adapter, save_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError, ConfigError
from lora_core.inject import full_tensors, inject, lora_layers, set_adapters
from lora_core.merge import merge
from lora_core.testing import assert_close_golden, disturb, load_golden

GOLDENS = Path(__file__).parent / "goldens"
pytestmark = pytest.mark.filterwarnings("ignore:a rank above:UserWarning")  # PEFT's Conv3d case
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    """One layer of every kind: tokens [3,6] -> [3,6,5]."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.grouped = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.mix = nn.ConvTranspose1d(12, 8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens).transpose(1, 2)
        x = self.mix(self.grouped(x + self.conv(x))).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.encoder(x).flatten(0, 1)).unflatten(0, tokens.shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=8, vdim=24, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused = self.qkv(x)
        q, k, v = fused.chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.cross(x, x, fused, need_weights=False)[0]


TOKENS = torch.arange(18).reshape(3, 6) % 11
FUSED = {"qkv": Slices(("q", "k", "v"), ("q", "v"), (8, 4, 12))}
CASES = {
    "linear": LoraConfig(["qkv", "proj"], r=3, lora_alpha=5, lora_dropout=0.1),
    "rslora": LoraConfig(["qkv"], r=3, use_rslora=True),
    "dora": LoraConfig(["qkv", "conv"], r=3, use_dora=True),
    "lora_bias": LoraConfig(["qkv"], r=3, lora_bias=True),
    "frozen_A": LoraConfig(["qkv"], r=3, freeze_A=True),
    "convolutions": LoraConfig(["conv", "grouped", "mix"], r=2),
    "embedding": LoraConfig(["emb"], r=2),
    "slices": LoraConfig(["qkv"], r=3, lora_alpha=7, slices=FUSED),
    "slices_rslora": LoraConfig(["qkv"], r=3, slices=FUSED, use_rslora=True, lora_bias=True),
    "patterns": LoraConfig(
        ["qkv", "proj", "attn"],
        r=3,
        rank_pattern={r"blocks\.1\.qkv": 5, "proj": 2},
        alpha_pattern={"qkv": 0.5},
    ),
    "modules_to_save": LoraConfig(["qkv"], modules_to_save=["head", "conv"]),
    "all_biases": LoraConfig(["qkv", "attn"], bias="all"),
    "adapted_biases": LoraConfig(["qkv", "attn", "conv"], bias="lora_only"),
    "attention": LoraConfig(["attn", "self_attn"], r=3),
    "in_proj_only": LoraConfig(["attn"], r=3, exclude_modules=["out_proj"], lora_dropout=0.1),
    "out_proj_only": LoraConfig(["attn.out_proj"], r=3),
    "attention_slices": LoraConfig(["attn"], r=3, slices={"attn": Slices()}),
    "separate_weights": LoraConfig(["cross"], r=3),
    "separate_v_only": LoraConfig(["cross"], r=3, slices={"cross": Slices(use=("v",))}),
    "encoder_layer": LoraConfig(["linear1", "linear2", "self_attn"], r=3),
    "pissa": LoraConfig(["qkv"], r=3, init_lora_weights="pissa"),
    "olora_slices": LoraConfig(["qkv"], r=2, init_lora_weights="olora", slices=FUSED),
    "pissa_rslora": LoraConfig(["qkv"], r=2, init_lora_weights="pissa", use_rslora=True),
}
FORMS = ["adapter", "adapter.pt"]


def trained(config, seed=0):
    model = Net()
    inject(model, config)
    disturb(model, seed=seed)
    return model.eval()


@torch.no_grad()
def out(model):
    return model.eval()(TOKENS)


def content(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_saved_loaded_and_saved_again_is_the_same(case, form, tmp_path):
    model = trained(CASES[case])
    first = save_adapter(model, tmp_path / "a" / form, metadata={"step": 3, "iou": 0.5})
    loaded = Net()
    file = load_adapter(loaded, first)
    assert file.metadata == {"step": 3, "iou": 0.5}
    assert_close_golden(out(loaded), out(model), rtol=0, atol=1e-6)
    if CASES[case].init_lora_weights is True:
        assert torch.equal(out(loaded), out(model))
    again = save_adapter(loaded, tmp_path / "b" / form, metadata={"step": 3, "iou": 0.5})
    assert content(again) == content(first)


@pytest.mark.parametrize("case", CASES)
def test_every_setting_comes_back_and_trains(case, tmp_path):
    config = CASES[case]
    model = trained(config)
    loaded = Net()
    load_adapter(loaded, save_adapter(model, tmp_path / "a"))
    before, after = lora_layers(model), lora_layers(loaded)
    assert before.keys() == after.keys()
    for path, layer in before.items():
        spec, other = layer.lora_adapters["default"], after[path].lora_adapters["default"]
        assert other.scale == pytest.approx(spec.scale)
        assert other.slices == spec.slices
        if config.init_lora_weights is True:
            assert other == spec
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert names[0] == names[1]
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    old = {key: value.clone() for key, value in loaded.state_dict().items()}
    loaded.train()(TOKENS).square().sum().backward()
    optimizer.step()
    moved = {key for key, value in loaded.state_dict().items() if not torch.equal(value, old[key])}
    statistics = {key for key in moved if "running" in key or "num_batches" in key}
    assert moved - statistics == names[1]


def test_bytes_are_the_same_in_every_process(tmp_path):
    code = (
        "import sys, torch\n"
        "from torch import nn\n"
        "from lora_core.adapter_file import save_adapter\n"
        "from lora_core.config import LoraConfig\n"
        "from lora_core.inject import inject\n"
        "torch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))\n"
        "inject(model, LoraConfig(['0', '1'], rank_pattern={'1': 2}))\n"
        "for form in ('adapter', 'adapter.pt'):\n"
        "    save_adapter(model, f'{sys.argv[1]}/{form}', metadata={'b': [1, 'x'], 'a': 'x'})\n"
    )
    for number, seed in enumerate("12"):
        folder = tmp_path / str(number)
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
    for form in FORMS:
        assert content(tmp_path / "0" / form) == content(tmp_path / "1" / form)


# -- PEFT's own files ------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, dim, hidden, depth, out):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.fc1, block.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim, bias=False)
            self.blocks.append(block)
        self.head = nn.Linear(dim, out)

    def forward(self, x):
        for block in self.blocks:
            x = x + block.fc2(F.gelu(block.fc1(x)))
        return self.head(x)


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.c3 = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.c1 = nn.Conv2d(10, 8, 1, bias=False)
        self.t = nn.Conv1d(8, 8, 3, padding=1)
        self.v = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x):
        u = self.c1(torch.relu(self.c3(x)))
        return self.v(self.t(u.flatten(2)).reshape(x.shape[0], 1, *u.shape[1:]))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        qkv = self.qkv(x)
        return torch.cat([qkv, self.proj(qkv[..., 48:])], -1)


class One(nn.Module):
    def __init__(self, name, layer):
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    def forward(self, *args, **kwargs):
        y = getattr(self, self.name)(*args, **kwargs)
        return y[0] if isinstance(y, tuple) else y


def recorded_model(case):
    """The base of a recorded case, and its inputs."""
    golden = load_golden(GOLDENS / case)
    c = golden.config
    mlp = {key: c.get(key) for key in ("dim", "hidden", "depth", "out")}
    make = {
        "conv": Convs,
        "conv_dora": lambda: One("c3", nn.Conv2d(6, 10, 3, padding=1)),
        "embedding": lambda: One("emb", nn.Embedding(50, 24, 0)),
        "encoder_layer": lambda: One(
            "layer",
            nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation="gelu", batch_first=True),
        ),
        "fused_qkv": Fused,
        "mha": lambda: One("attn", nn.MultiheadAttention(16, 4, batch_first=True)),
        "mlp_patterns": lambda: Mlp(**mlp),
        "multi_adapter": lambda: Mlp(**mlp),
        "train_adamw": lambda: Mlp(**mlp),
    }.get(case, lambda: One("lin", nn.Linear(24, 40, bias=c.get("bias", True))))
    model = make()
    model.load_state_dict(golden.weights)
    return golden, model.eval()


RECORDED = [
    *("conv", "conv_dora", "embedding", "encoder_layer", "fused_qkv", "linear", "linear_dora"),
    *("linear_lora_bias", "linear_rslora", "mha", "mlp_patterns"),
]


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
    plain = Fused()
    plain.load_state_dict(golden.weights)
    load_adapter(plain, tmp_path)  # without our facts the expansion stays a plain adapter
    assert lora_layers(plain)["qkv"].lora_adapters["default"].slices is None
    assert_close_golden(plain(golden.io["in.x"]), golden.io["out.lora"])


def test_two_recorded_adapters_on_one_model():
    golden, model = recorded_model("multi_adapter")
    for name in "ab":
        load_adapter(model, GOLDENS / "multi_adapter" / f"adapter_{name}", name)
    for names, key in (("a", "a"), ("b", "b"), (["a", "b"], "a_and_b")):
        set_adapters(model, names)
        assert_close_golden(model(golden.io["in.x"]), golden.io[f"out.{key}"])


# -- names -----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """`fc`, and another module whose name ends with `.fc`."""

    def __init__(self):
        super().__init__()
        self.fc, self.extra = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x):
        return self.extra["fc"](self.fc(x))


def settings(path):
    return json.loads((path / CONFIG).read_text())


def test_targets_are_full_names_or_one_expression_where_a_name_is_anothers_end(tmp_path):
    model = Twice()
    inject(model, LoraConfig(["re:fc"]))
    save_adapter(model, tmp_path / "ambiguous")
    assert settings(tmp_path / "ambiguous")["target_modules"] == "^(?:fc)$"
    model = Twice()
    inject(model, LoraConfig(["fc"], exclude_modules=["re:fc"]))
    save_adapter(model, tmp_path / "unique")
    assert settings(tmp_path / "unique")["target_modules"] == ["extra.fc"]
    for name, paths in (("ambiguous", ["fc"]), ("unique", ["extra.fc"])):
        loaded = Twice()
        load_adapter(loaded, tmp_path / name)
        assert list(lora_layers(loaded)) == paths


def test_patterns_hit_one_layer_each(tmp_path):
    save_adapter(trained(CASES["patterns"]), tmp_path)
    found = settings(tmp_path)
    assert found["rank_pattern"] == {
        r"^blocks\.0\.proj": 2,
        r"^blocks\.1\.proj": 2,
        r"^blocks\.1\.qkv": 5,
    }
    assert found["alpha_pattern"] == {r"^blocks\.0\.qkv": 0.5, r"^blocks\.1\.qkv": 0.5}


def test_in_proj_alone_is_a_parameter_for_peft_and_dropout_stays_with_us(tmp_path):
    save_adapter(trained(CASES["in_proj_only"]), tmp_path)
    found = settings(tmp_path)
    assert found["target_modules"] == []
    assert found["target_parameters"] == [f"blocks.{i}.attn.in_proj_weight" for i in (0, 1)]
    assert found["lora_dropout"] == 0
    assert read_adapter(tmp_path).extra["lora_dropout"] == 0.1
    assert not (tmp_path / "README.md").exists()


def test_a_directory_says_what_peft_gets_wrong(tmp_path):
    save_adapter(trained(CASES["encoder_layer"]), tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert "twice" in text
    assert "TransformerEncoderLayer" in text
    save_adapter(trained(CASES["convolutions"]), tmp_path / "b")
    assert "grouped" in (tmp_path / "b" / "README.md").read_text()


def test_prefixes_of_wrappers_never_reach_the_file(tmp_path):
    plain = trained(CASES["modules_to_save"])
    expected = content(save_adapter(plain, tmp_path / "plain"))
    compiled = torch.compile(plain, backend="eager")
    assert content(save_adapter(compiled, tmp_path / "compiled")) == expected
    inner = Net()
    inner.blocks[0] = torch.compile(inner.blocks[0], backend="eager")
    load_adapter(inner, tmp_path / "plain")
    assert content(save_adapter(inner, tmp_path / "inner")) == expected
    assert torch.equal(out(inner), out(plain))
    threads = nn.DataParallel(plain)
    assert content(save_adapter(threads, tmp_path / "threads")) == expected


def test_renamed_modules_go_to_the_file_and_come_back(tmp_path):
    def official(path):
        return "trunk." + path.replace("blocks", "layers")

    model = trained(CASES["modules_to_save"])
    path = save_adapter(model, tmp_path / "a.torch", rename=official)
    file = read_adapter(path)
    assert {key.split(".")[0] for key in file.tensors} == {"trunk"}
    assert "trunk.layers.0.qkv.lora_A.weight" in file.tensors
    assert file.config["modules_to_save"] == ["trunk.conv", "trunk.head"]
    loaded = Net()
    load_adapter(loaded, path, rename=official)
    assert torch.equal(out(loaded), out(model))
    same = Net()  # files with the model's own names are understood as well
    load_adapter(same, save_adapter(model, tmp_path / "b.torch"), rename=official)
    assert torch.equal(out(same), out(model))


# -- forms of others -------------------------------------------------------------------------------


def test_a_single_file_is_plain_and_has_the_documented_entries(tmp_path):
    path = save_adapter(trained(CASES["slices"]), tmp_path / "a.pth", metadata={"step": 5})
    content = torch.load(path, weights_only=True)
    assert list(content) == ["format", "config", "metadata", "tensors"]
    assert content["metadata"] == {"step": 5}
    assert content["config"]["peft_type"] == "LORA"
    assert all(isinstance(value, torch.Tensor) for value in content["tensors"].values())


@pytest.mark.parametrize("spelling", ["{}", "{}.weight", "base_model.model.{}.default.weight"])
def test_bare_dicts_of_older_programs_need_only_alpha(tmp_path, spelling):
    model = trained(CASES["linear"])
    bare = {
        spelling.replace("{}", f"{path}.{part}"): layer.lora_file_tensors("default")[
            f"{part}.weight"
        ]
        for path, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }
    if spelling == "{}":  # as saved from DistributedDataParallel
        bare = {f"module.{key}": value for key, value in bare.items()}
    torch.save(bare, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"old\.pth.*lora_alpha=") as refused:
        load_adapter(Net(), tmp_path / "old.pth")
    assert "cannot be guessed" in str(refused.value)
    loaded = Net()
    load_adapter(loaded, tmp_path / "old.pth", lora_alpha=5)
    assert torch.equal(out(loaded), out(model))


def test_another_alpha_than_the_files_is_a_contradiction(tmp_path):
    path = save_adapter(trained(CASES["linear"]), tmp_path / "a")
    load_adapter(Net(), path, lora_alpha=5)
    with pytest.raises(CheckpointError, match="lora_alpha 5, not 16"):
        load_adapter(Net(), path, lora_alpha=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapters_of_any_float_dtype_load_as_fp32(tmp_path, dtype):
    path = save_adapter(trained(CASES["linear"]), tmp_path / "a")
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, path / WEIGHTS)
    loaded = Net()
    load_adapter(loaded, path)
    for layer in lora_layers(loaded).values():
        assert {p.dtype for p in layer.lora_parameters("default").values()} == {torch.float32}
    A = lora_layers(loaded)["blocks.0.qkv"].lora_factors("default")[0]
    assert torch.equal(A, tensors["base_model.model.blocks.0.qkv.lora_A.weight"].float())


def test_a_directory_of_older_peft_with_a_torch_file_loads(tmp_path):
    model = trained(CASES["linear"])
    path = save_adapter(model, tmp_path / "a")
    torch.save(safetensors.torch.load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()
    loaded = Net()
    load_adapter(loaded, path)
    assert torch.equal(out(loaded), out(model))


def test_values_are_swapped_in_place_where_the_layout_is_the_same(tmp_path):
    first, second = trained(CASES["slices"]), trained(CASES["slices"], seed=1)
    path = save_adapter(second, tmp_path / "second")
    parameters = list(first.parameters())
    load_adapter(first, path)
    assert all(a is b for a, b in zip(first.parameters(), parameters, strict=True))
    assert torch.equal(out(first), out(second))
    before = content(save_adapter(first, tmp_path / "kept"))
    with pytest.raises(CheckpointError, match=r"already has an adapter 'default'.*another layout"):
        load_adapter(first, save_adapter(trained(CASES["linear"]), tmp_path / "other"))
    assert content(save_adapter(first, tmp_path / "kept")) == before


def test_pissa_continues_in_place_on_its_own_file(tmp_path):
    model, start = trained(CASES["pissa"]), Net()
    inject(start, CASES["pissa"])
    load_adapter(start, save_adapter(model, tmp_path / "a"))
    assert torch.equal(out(start), out(model))
    assert lora_layers(start)["blocks.0.qkv"].lora_adapters["default"].r == 3


def test_an_adapter_only_for_use_does_not_train(tmp_path):
    model = Net()
    load_adapter(model, save_adapter(trained(CASES["all_biases"]), tmp_path / "a"), trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_two_adapters_are_files_of_their_own(tmp_path):
    model = trained(CASES["linear"])
    inject(model, CASES["slices"], "second")
    disturb(model, seed=2)
    paths = {n: save_adapter(model, tmp_path / n, n) for n in ("default", "second")}
    loaded = Net()
    for name, path in paths.items():
        load_adapter(loaded, path, name)
    for names in (["default"], ["second"], ["default", "second"]):
        set_adapters(model, names)
        set_adapters(loaded, names)
        assert torch.equal(out(loaded), out(model))
    with pytest.raises(ConfigError, match=r"no adapter 'secnd'.*did you mean 'second'"):
        save_adapter(model, tmp_path / "x", "secnd")


# -- strict loading --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """An adapter directory with factors, a slice and modules trained in full."""
    config = LoraConfig(["qkv", "proj"], r=3, slices=FUSED, modules_to_save=["head"])
    return save_adapter(trained(config), tmp_path / "adapter")


def edit(path, change):
    """Rewrite the tensors of a directory; our own facts go, as when PEFT saves again."""
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    change(tensors)
    prefixed = {f"base_model.model.{key}": value for key, value in tensors.items()}
    safetensors.torch.save_file(prefixed, path / WEIGHTS)


def state(model):
    return {
        "bits": {key: value.clone() for key, value in model.state_dict().items()},
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "types": [type(module) for module in model.modules()],
    }


def refused(path, *parts, **options):
    """Loading fails with the file and these parts in the message, and the model is as it was."""
    model = Net()
    before = state(model)
    with pytest.raises(CheckpointError) as failure:
        load_adapter(model, path, **options)
    message = str(failure.value)
    for part in (Path(path).name, *parts):
        assert part in message, message
    after = state(model)
    assert after["trainable"] == before["trainable"]
    assert after["types"] == before["types"]
    assert after["bits"].keys() == before["bits"].keys()
    assert all(torch.equal(after["bits"][key], value) for key, value in before["bits"].items())
    return message


A0 = "blocks.0.qkv.lora_A.weight"
WRONG_TENSORS = {
    "missing_factor": (lambda t: t.pop(A0), [f"{A0} is missing"]),
    "missing_layer": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith("blocks.1.proj.")],
        ["blocks.1.proj: its tensors are missing"],
    ),
    "missing_head": (lambda t: t.pop("head.1.bias"), ["head.1.bias is missing"]),
    "unknown_module": (
        lambda t: t.update({"blocks.0.qvk.lora_A.weight": t.pop(A0)}),
        ["blocks.0.qvk: no such module", "did you mean 'blocks.0.qkv'"],
    ),
    "unexpected_tensor": (
        lambda t: t.update({"blocks.0.proj.lora_magnitude_vector": torch.ones(8)}),
        ["blocks.0.proj.lora_magnitude_vector is unexpected"],
    ),
    "not_trained_in_full": (
        lambda t: t.update({"conv.weight": torch.ones(8, 8, 3)}),
        ["conv.weight is unexpected"],
    ),
    "all_of_another_model": (
        lambda t: [t.update({f"other.{key}": t.pop(key)}) for key in list(t)],
        ["0 of 12 adapter tensors match"],
    ),
    "wrong_shape": (
        lambda t: t.update({A0: torch.ones(6, 9)}),
        [f"{A0} has shape (6, 9)", "needs (6, 8)"],
    ),
    "wrong_rank": (
        lambda t: t.update({A0: torch.ones(4, 8), A0.replace("_A", "_B"): torch.ones(24, 4)}),
        [f"{A0} has shape (4, 8)", "rank 6", "needs (6, 8)"],
    ),
    "wrong_head": (
        lambda t: t.update({"head.1.bias": torch.ones(4)}),
        ["head.1.bias has shape (4,)"],
    ),
    "nan": (lambda t: t[A0].__setitem__((0, 0), float("nan")), [A0, "NaN"]),
    "inf": (lambda t: t[A0].__setitem__((0, 0), float("inf")), [A0, "infinite"]),
    "integers": (lambda t: t.update({A0: torch.ones(6, 8, dtype=torch.long)}), [A0, "int64"]),
    "no_lora": (
        lambda t: [t.pop(key) for key in list(t) if "lora" in key],
        ["is no LoRA adapter", "head.0.bias"],
    ),
    "nothing": (lambda t: t.clear(), ["no tensors at all"]),
}


@pytest.mark.parametrize("fault", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(saved, fault):
    change, parts = WRONG_TENSORS[fault]
    edit(saved, change)
    refused(saved, *parts)


def test_all_problems_are_reported_together(saved):
    def spoil(tensors):
        for key in list(tensors):
            if key.endswith("lora_A.weight"):
                tensors[key] = torch.ones(5, 8)

    edit(saved, spoil)
    assert refused(saved).count("has shape (5, 8)") == 4


def test_values_outside_the_slices_are_refused(saved):
    data = (saved / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    start = 8 + size + header["base_model.model.blocks.0.qkv.lora_B.weight"]["data_offsets"][0]
    row = start + 4 * 6 * 9  # row 9 belongs to k, which has no adapter
    (saved / WEIGHTS).write_bytes(data[:row] + b"\0\0\x80\x3f" + data[row + 4 :])
    refused(saved, "blocks.0.qkv", "outside the rows of the slices")


SETTINGS = {
    "alpha_zero": ({"lora_alpha": 0}, ["alpha", "0"]),
    "alpha_text": ({"lora_alpha": "big"}, ["'big'"]),
    "rank_negative": ({"r": -1}, ["-1"]),
    "other_rank": ({"r": 4}, ["rank 4"]),
    "other_method": ({"peft_type": "LOHA"}, ["'LOHA'", "0.21.2"]),
    "no_rank": ({"r": None}, ["no r"]),
    "future_field": ({"hyper_lora": {"x": 1}, "peft_version": "9.0"}, ["hyper_lora", "9.0"]),
    "dora_without_magnitude": ({"use_dora": True}, ["lora_magnitude_vector is missing"]),
    "moved_base": ({"init_lora_weights": "pissa"}, ["pissa", "Convert it"]),
    "bad_pattern": ({"target_modules": "(("}, ["bad pattern"]),
    "conv1d_of_gpt2": ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_settings_that_cannot_be_are_refused(saved, fault):
    edit(saved, lambda tensors: None)
    change, parts = SETTINGS[fault]
    config = {
        k: v for k, v in (settings(saved) | change).items() if v is not None or k == "task_type"
    }
    (saved / CONFIG).write_text(json.dumps(config))
    refused(saved, *parts)


def test_a_configuration_changed_by_hand_is_followed_as_peft_would(saved):
    config = settings(saved) | {"lora_alpha": 1}
    (saved / CONFIG).write_text(json.dumps(config))
    loaded = Net()
    with pytest.warns(UserWarning, match=r"changed after saving \(lora_alpha\)"):
        load_adapter(loaded, saved)
    assert lora_layers(loaded)["blocks.0.proj"].lora_adapters["default"].alpha == 1


DAMAGE = {
    "empty": (b"", ["is empty"]),
    "html": (b"<!DOCTYPE html><html>404</html>", ["web page"]),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["Git LFS pointer"]),
    "text": (b"these are not the weights", ["damaged"]),
    "huge_header": ((10**12).to_bytes(8, "little") + b"{}", ["damaged"]),
}


@pytest.mark.parametrize("fault", DAMAGE)
@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_named_for_what_they_are(tmp_path, form, fault):
    data, parts = DAMAGE[fault]
    path = save_adapter(trained(CASES["linear"]), tmp_path / form)
    file = path / WEIGHTS if path.is_dir() else path
    file.write_bytes(data)
    refused(path, file.name, *parts)


@pytest.mark.parametrize("form", FORMS)
def test_truncation_anywhere_is_noticed(tmp_path, form):
    path = save_adapter(trained(CASES["linear"]), tmp_path / form)
    file = path / WEIGHTS if path.is_dir() else path
    data = file.read_bytes()
    for eighth in range(1, 8):
        file.write_bytes(data[: len(data) * eighth // 8])
        refused(path, "damaged")


def test_a_header_with_a_name_twice_is_refused(saved):
    data = (saved / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip()
    entry = json.dumps(json.loads(text)[f"base_model.model.{A0}"])
    text = text[:-1] + f',"base_model.model.{A0}":{entry}}}'.encode()
    (saved / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refused(saved, "twice")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_a_pickle_that_would_run_a_program_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "config": {}, "tensors": {}, "x": Hostile()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "posix.system", "refused" if False else "could run a program")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile()))
    refused(tmp_path / "b.pt")
    assert not (tmp_path / "canary").exists()


def test_objects_of_old_checkpoints_are_named_by_their_class(tmp_path):
    torch.save({"config": Path("x"), "tensors": {}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "pathlib.")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**7, 10**5),
        torch.zeros(3, 3).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    ids=["huge_view", "sparse", "meta"],
)
def test_tensors_that_are_no_plain_values_are_refused(tmp_path, value):
    torch.save({"blocks.0.qkv.lora_A.weight": value}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "blocks.0.qkv.lora_A.weight", lora_alpha=1)


def test_missing_paths_name_what_is_there(saved):
    refused(saved.parent / "adaptor.pt", "does not exist")
    refused(saved.parent / "adaptor", "does not exist", "did you mean 'adapter'")
    refused(saved.parent, "is no adapter", "adapter")
    (saved / CONFIG).unlink()
    edit(saved, lambda tensors: None)
    refused(saved, "adapter_config.json is missing")


def test_a_file_of_a_later_program_says_so(tmp_path):
    path = save_adapter(trained(CASES["linear"]), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format": 3}, path)
    refused(path, "written as format 3", "reads up to 1")


def test_a_full_checkpoint_is_not_taken_for_an_adapter(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "is no LoRA adapter", lora_alpha=1)
    torch.save({"model": Net().state_dict()}, tmp_path / "nested.pt")
    refused(tmp_path / "nested.pt", "expected tensors by name", lora_alpha=1)


def test_loading_over_merged_adapters_is_refused(saved):
    model = trained(CASES["linear"])
    merge(model)
    before = state(model)["bits"]
    with pytest.raises(CheckpointError, match="unmerge"):
        load_adapter(model, saved, "second")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_saving_while_merged_still_writes_the_factors(tmp_path):
    model = trained(CASES["slices"])
    expected = content(save_adapter(model, tmp_path / "before"))
    merge(model)
    assert content(save_adapter(model, tmp_path / "merged")) == expected


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_crash_while_writing_leaves_the_old_adapter(tmp_path, form, monkeypatch):
    first, second = trained(CASES["linear"]), trained(CASES["slices"], seed=1)
    path = save_adapter(first, tmp_path / form)
    calls = []
    replace = os.replace

    def crash(*arguments):
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(os, "replace", crash)
    for stop in (1, 2):
        calls.clear()
        save_adapter(first, path) if stop == 0 else None
        try:
            save_adapter(second, path)
        except KeyboardInterrupt:
            pass
        loaded = Net()
        load_adapter(loaded, path)
        choices = [first] if stop == 1 else [first, second]
        assert any(torch.equal(out(loaded), out(model)) for model in choices)
    assert not [p for p in tmp_path.rglob("*.tmp")]


def test_what_cannot_be_written_is_said_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.pt", tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(CheckpointError, match=r"cannot write .*file"):
            save_adapter(trained(CASES["linear"]), path)


def test_metadata_that_is_not_plain_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="plain values"):
        save_adapter(trained(CASES["linear"]), tmp_path / "a", metadata={"x": {1, 2}})
    assert not (tmp_path / "a").exists()


def test_paths_with_spaces_and_unicode_and_moved_folders_work(tmp_path):
    model = trained(CASES["linear"])
    path = save_adapter(model, tmp_path / "mein Ordner ü" / "a b.torch")
    assert str(tmp_path).encode() not in path.read_bytes()
    folder = save_adapter(model, tmp_path / "mein Ordner ü" / "run")
    moved = folder.rename(tmp_path / "elsewhere")
    for place in (path, moved):
        loaded = Net()
        load_adapter(loaded, place)
        assert torch.equal(out(loaded), out(model))
