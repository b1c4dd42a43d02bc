"""Adapters on disk: round trips of every kind, names, older forms, and atomic writing."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from lora_core.adapters.file import load_adapter, read_adapter, save_adapter, write_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError, ConfigError
from lora_core.injection import inject, lora_layers, set_adapters
from lora_core.merging import merge
from lora_core.testing import assert_close_golden, disturb

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


@pytest.mark.fault("K59")
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["linear", "patterns", "slices_rslora", "modules_to_save", "dora"])
def test_the_other_form_is_written_without_a_model_as_it_is_with_one(case, form, tmp_path):
    model, other = trained(CASES[case]), FORMS[1 - FORMS.index(form)]
    saved = save_adapter(model, tmp_path / "a" / form, metadata={"step": 3})
    wanted = content(save_adapter(model, tmp_path / "b" / other, metadata={"step": 3}))
    found = content(write_adapter(read_adapter(saved), tmp_path / "c" / other))
    for files in (wanted, found):  # what plain PEFT gets wrong is known from the model alone
        files.pop("README.md", None)
    assert found == wanted


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
        "from lora_core.adapters.file import save_adapter\n"
        "from lora_core.config import LoraConfig\n"
        "from lora_core.injection import inject\n"
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


# -- names -----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """`fc`, and another module whose name ends with `.fc`."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.fc, self.extra = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x):
        return self.extra["fc"](self.fc(x))


def settings(path):
    return json.loads((path / CONFIG).read_text())


def test_targets_are_full_names_or_one_expression_where_a_name_is_anothers_end(tmp_path):
    model = Twice()
    inject(model, LoraConfig(["re:fc"], r=2))
    save_adapter(model, tmp_path / "ambiguous")
    assert settings(tmp_path / "ambiguous")["target_modules"] == "^(?:fc)$"
    model = Twice()
    inject(model, LoraConfig(["extra.fc"], r=2))
    save_adapter(model, tmp_path / "unique")
    assert settings(tmp_path / "unique")["target_modules"] == ["extra.fc"]
    for name, paths in (("ambiguous", ["fc"]), ("unique", ["extra.fc"])):
        loaded = Twice()
        load_adapter(loaded, tmp_path / name)
        assert list(lora_layers(loaded)) == paths


@pytest.mark.fault("K59")
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
    assert "PEFT up to" not in (tmp_path / "README.md").read_text()


def test_a_directory_says_what_peft_gets_wrong(tmp_path):
    save_adapter(trained(CASES["encoder_layer"]), tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert "twice" in text
    assert "TransformerEncoderLayer" in text
    save_adapter(trained(CASES["convolutions"]), tmp_path / "b")
    assert "grouped" in (tmp_path / "b" / "README.md").read_text()
    tied = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    tied[1].weight = tied[0].weight
    inject(tied, LoraConfig(["0"], r=2))
    save_adapter(tied, tmp_path / "c")
    assert "several layers share" in (tmp_path / "c" / "README.md").read_text()


def test_a_directory_says_its_task_and_what_its_writer_remarks(tmp_path):
    model = trained(LoraConfig(["qkv"], r=2))
    save_adapter(model, tmp_path, task_type="CAUSAL_LM", remarks=["Made for a test."])
    assert settings(tmp_path)["task_type"] == "CAUSAL_LM"
    assert "Made for a test." in (tmp_path / "README.md").read_text()
    save_adapter(model, tmp_path)
    assert settings(tmp_path)["task_type"] is None


@pytest.mark.fault("K35")
def test_prefixes_of_wrappers_never_reach_the_file(tmp_path):
    plain = trained(CASES["modules_to_save"])
    expected = content(save_adapter(plain, tmp_path / "plain"))
    compiled = torch.compile(plain, backend="eager")
    assert content(save_adapter(compiled, tmp_path / "compiled")) == expected
    inner = Net()
    inner.blocks[0] = torch.compile(inner.blocks[0], backend="eager")
    load_adapter(inner, tmp_path / "plain")
    assert content(save_adapter(inner, tmp_path / "inner")) == expected
    assert_close_golden(out(inner), out(plain))
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


def test_a_lone_safetensors_file_needs_only_alpha(tmp_path):
    model = trained(CASES["linear"])
    path = save_adapter(model, tmp_path / "a") / WEIGHTS
    safetensors.torch.save_file(read_adapter(path).tensors, tmp_path / "alone.safetensors")
    loaded = Net()
    load_adapter(loaded, tmp_path / "alone.safetensors", lora_alpha=5)
    assert torch.equal(out(loaded), out(model))
    with pytest.raises(CheckpointError, match="lora_alpha="):
        load_adapter(Net(), tmp_path / "alone.safetensors")


def test_another_alpha_than_the_files_is_a_contradiction(tmp_path):
    path = save_adapter(trained(CASES["linear"]), tmp_path / "a")
    load_adapter(Net(), path, lora_alpha=5)
    with pytest.raises(CheckpointError, match="lora_alpha 5, not 16"):
        load_adapter(Net(), path, lora_alpha=16)


@pytest.mark.fault("K29")
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


@pytest.mark.fault("K34")
def test_a_directory_of_older_peft_with_a_torch_file_loads(tmp_path):
    model = trained(CASES["linear"])
    path = save_adapter(model, tmp_path / "a")
    torch.save(safetensors.torch.load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()
    loaded = Net()
    load_adapter(loaded, path)
    assert torch.equal(out(loaded), out(model))


@pytest.mark.fault("K44")
def test_values_are_swapped_in_place_where_the_layout_is_the_same(tmp_path):
    first, second = trained(CASES["slices"]), trained(CASES["slices"], seed=1)
    path = save_adapter(second, tmp_path / "second")
    parameters = list(first.parameters())
    load_adapter(first, path)
    assert all(a is b for a, b in zip(first.parameters(), parameters, strict=True))
    assert torch.equal(out(first), out(second))
    set_adapters(first, [])
    load_adapter(first, path)  # what is active stays
    assert not any(layer.lora_active for layer in lora_layers(first).values())
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


def test_saving_while_merged_still_writes_the_factors(tmp_path):
    model = trained(CASES["slices"])
    expected = content(save_adapter(model, tmp_path / "before"))
    merge(model)
    assert content(save_adapter(model, tmp_path / "merged")) == expected


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.fault("K54")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_while_writing_leaves_one_whole_adapter(tmp_path, form, renames, monkeypatch):
    """Killed before the first file is in place, or (directories) between the two."""
    first, second = trained(CASES["linear"]), trained(CASES["slices"], seed=1)
    path = save_adapter(first, tmp_path / form)
    done, replace = [], os.replace

    def crash(*arguments):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(replace(*arguments))

    monkeypatch.setattr(os, "replace", crash)
    with contextlib.suppress(KeyboardInterrupt):
        save_adapter(second, path)
    assert len(done) == renames
    loaded = Net()
    load_adapter(loaded, path)
    assert torch.equal(out(loaded), out(second if renames else first))
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_cannot_be_written_is_said_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.pt", tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(CheckpointError, match=r"cannot write .*file"):
            save_adapter(trained(CASES["linear"]), path)


def test_kinds_of_files_that_we_do_not_write_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.safetensors: name a folder, or .* \.pt, \.pth"):
        save_adapter(trained(CASES["linear"]), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_metadata_that_is_not_plain_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="plain values"):
        save_adapter(trained(CASES["linear"]), tmp_path / "a", metadata={"x": {1, 2}})
    assert not (tmp_path / "a").exists()


@pytest.mark.fault("K51")
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
