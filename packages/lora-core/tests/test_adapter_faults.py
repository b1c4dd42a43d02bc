"""Adapter files that are damaged, hostile, or of another model: refused, the model untouched."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core.adapters import file as adapter_file
from lora_core.adapters.file import load_adapter, save_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError
from lora_core.injection import inject, lora_layers
from lora_core.merging import merge
from lora_core.testing import disturb
from lora_core.testing.foreign import CONFIG, WEIGHTS, rewrite
from lora_core.testing.no_device import no_device

FORMS = ["adapter", "adapter.pt"]
PLAIN = LoraConfig(["qkv", "proj"], r=3)


class Net(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))


def trained(config):
    model = Net()
    inject(model, config)
    disturb(model)
    return model


@pytest.fixture
def saved(tmp_path):
    """An adapter directory with factors, a slice and modules trained in full."""
    config = LoraConfig(
        ["qkv", "proj"],
        r=3,
        slices={"qkv": Slices(("q", "k", "v"), ("q", "v"), (8, 4, 12))},
        modules_to_save=["head"],
    )
    return save_adapter(trained(config), tmp_path / "adapter")


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
    "missing_weight": (lambda t: t.pop("head.1.weight"), ["head.1.weight is missing"]),
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
        ["0 of 15 adapter tensors match"],
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
        ["is no LoRA adapter", "head.0."],
    ),
    "nothing": (lambda t: t.clear(), ["no tensors at all"]),
}


@pytest.mark.fault("K27", "K28", "K29", "K32", "H35")
@pytest.mark.parametrize("fault", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(saved, fault):
    change, parts = WRONG_TENSORS[fault]
    rewrite(saved, lambda _, tensors: change(tensors))
    refused(saved, *parts)


@pytest.mark.fault("K29")
def test_all_problems_are_reported_together(saved):
    def spoil(tensors):
        for key in list(tensors):
            if key.endswith("lora_A.weight"):
                tensors[key] = torch.ones(5, 8)

    rewrite(saved, lambda _, tensors: spoil(tensors))
    assert refused(saved).count("has shape (5, 8)") == 4


def test_two_adapters_for_one_shared_weight_are_refused(tmp_path):
    path = save_adapter(trained(PLAIN), tmp_path / "a.pt")
    model = Net()
    model.blocks[1]["proj"].weight = model.blocks[0]["proj"].weight
    with pytest.raises(CheckpointError, match=r"blocks\.1\.proj: its weight is also that"):
        load_adapter(model, path)


@pytest.mark.fault("K29", "H35")
def test_values_outside_the_slices_are_refused(tmp_path):
    config = LoraConfig(["qkv"], r=3, slices={"qkv": Slices(("q", "k", "v"), ("q", "v"))})
    path = save_adapter(trained(config), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    del content["config"]["lora_core"]["sha256"]
    content["tensors"]["blocks.0.qkv.lora_B.weight"][8] = 1.0  # k has no adapter
    torch.save(content, path)
    refused(path, "blocks.0.qkv", "outside the rows of the slices")


SETTINGS = {
    "alpha_negative": ({"lora_alpha": -1}, ["alpha", "-1"]),
    "alpha_nan": ({"lora_alpha": float("nan")}, ["alpha", "nan"]),
    "no_type": ({"peft_type": None}, ["type None", "expected 'LORA'"]),
    "no_alpha": ({"lora_alpha": None}, ["no lora_alpha", "0.21.2"]),
    "dropout_negative": ({"lora_dropout": -0.1}, ["dropout", "-0.1"]),
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
    "rank_pattern_list": ({"rank_pattern": [1]}, ["rank_pattern is [1]"]),
    "bad_rank_pattern": ({"rank_pattern": {"(": 1}}, ["bad pattern in rank_pattern"]),
    "targets_number": ({"target_modules": 3}, ["target_modules is 3"]),
    "conv1d_of_gpt2": ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
}


@pytest.mark.fault("K30")
@pytest.mark.parametrize("fault", SETTINGS)
def test_settings_that_cannot_be_are_refused(saved, fault):
    rewrite(saved, lambda config, tensors: None)
    change, parts = SETTINGS[fault]
    config = {
        k: v
        for k, v in (json.loads((saved / CONFIG).read_text()) | change).items()
        if v is not None or k == "task_type"
    }
    (saved / CONFIG).write_text(json.dumps(config))
    refused(saved, *parts)


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"alpha": 16}, "unreadable"),
        ({"r": [3], "alpha": 16}, "unusable configuration"),
        ({"r": 3, "alpha": 16, "slices": [["q", 0]]}, "unusable configuration"),
        ({"r": 3, "alpha": 16, "slices": [["q", 0, 99]]}, "slice sizes"),
        ({"r": 3, "alpha": float("nan")}, "nan"),
        ([], "unreadable"),
    ],
)
def test_facts_of_our_own_that_cannot_be_are_refused(tmp_path, facts, part):
    path = save_adapter(trained(PLAIN), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    content["config"]["lora_core"]["layers"]["blocks.0.qkv"] = facts
    del content["config"]["lora_core"]["sha256"]
    torch.save(content, path)
    refused(path, part)


def test_a_configuration_changed_by_hand_is_followed_as_peft_would(saved):
    config = json.loads((saved / CONFIG).read_text()) | {"lora_alpha": 1}
    (saved / CONFIG).write_text(json.dumps(config))
    loaded = Net()
    with pytest.warns(UserWarning, match=r"changed after saving \(lora_alpha 16 -> 1\)"):
        load_adapter(loaded, saved)
    assert lora_layers(loaded)["blocks.0.proj"].lora_adapters["default"].alpha == 1


DAMAGE = {
    "empty": (b"", ["is empty"]),
    "html": (b"<!DOCTYPE html><html>404</html>", ["web page"]),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["Git LFS pointer"]),
    "text": (b"these are not the weights", ["damaged"]),
    "huge_header": ((10**12).to_bytes(8, "little") + b"{}", ["damaged"]),
}


@pytest.mark.fault("K29")
@pytest.mark.parametrize("fault", DAMAGE)
@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_named_for_what_they_are(tmp_path, form, fault):
    data, parts = DAMAGE[fault]
    path = save_adapter(trained(PLAIN), tmp_path / form)
    file = path / WEIGHTS if path.is_dir() else path
    file.write_bytes(data)
    refused(path, file.name, *parts)


@pytest.mark.parametrize("form", FORMS)
def test_truncation_anywhere_is_noticed(tmp_path, form):
    path = save_adapter(trained(PLAIN), tmp_path / form)
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


@pytest.mark.fault("H01", "K45")
def test_a_pickle_that_would_run_a_program_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "config": {}, "tensors": {}, "x": Hostile()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "posix.system", "could run a program")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile()))
    refused(tmp_path / "b.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("K46")
def test_objects_of_old_checkpoints_are_named_by_their_class(tmp_path):
    torch.save({"config": Path("x"), "tensors": {}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "pathlib.")


@pytest.mark.fault("H06")
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
    rewrite(saved, lambda config, tensors: None)
    (saved / CONFIG).unlink()
    refused(saved, "adapter_config.json is missing")


@pytest.mark.fault("K57")
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_a_later_program_says_so(tmp_path, form, monkeypatch):
    monkeypatch.setattr(adapter_file, "FORMAT", 3)
    path = save_adapter(trained(PLAIN), tmp_path / form)
    refused(path, "written as format 3", "reads up to 1", "update lora-core")


def test_a_full_checkpoint_is_not_taken_for_an_adapter(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "is no LoRA adapter", lora_alpha=1)
    torch.save({"model": Net().state_dict()}, tmp_path / "nested.pt")
    refused(tmp_path / "nested.pt", "expected tensors by name", lora_alpha=1)


@pytest.mark.fault("K39")
def test_loading_over_merged_adapters_is_refused(saved):
    model = trained(PLAIN)
    merge(model)
    before = state(model)["bits"]
    with pytest.raises(CheckpointError, match="unmerge"):
        load_adapter(model, saved, "second")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


# -- in both forms ---------------------------------------------------------------------------------


def renamed(config, tensors):
    for key in list(tensors):
        tensors[f"decoder.{key}"] = tensors.pop(key)


def without(part):
    def change(config, tensors):
        for key in list(tensors):
            if part in key:
                del tensors[key]

    return change


def with_value(value):
    def change(config, tensors):
        next(iter(tensors.values()))[0, 0] = value

    return change


TAMPERED = {
    "renamed": (renamed, ["0 of 8 adapter tensors match this model", "decoder.blocks.0.proj"]),
    "layer_missing": (without("blocks.1.proj"), ["blocks.1.proj: its tensors are missing"]),
    "factor_missing": (without("blocks.1.proj.lora_A"), ["blocks.1.proj.lora_A.weight is missing"]),
    "no_layers": (without("blocks"), ["no tensors at all"]),
    "nan": (with_value(float("nan")), ["1 of 24 values are NaN or infinite"]),
    "inf": (with_value(float("-inf")), ["1 of 24 values are NaN or infinite"]),
    "alpha_zero": (lambda config, _: config.update(lora_alpha=0), ["alpha"]),
    "unknown_type": (lambda config, _: config.update(peft_type="VERA"), ["'VERA'", "PEFT 0.21.2"]),
    "newer_version": (
        lambda config, _: config.update(peft_version="1.7", use_xyz=True),
        ["use_xyz", "PEFT 1.7"],
    ),
    "other_rank": (lambda config, _: config.update(r=5), ["rank 5", "needs (5, 8)"]),
    "transposed": (
        lambda _, tensors: tensors.update({k: t.t() for k, t in tensors.items()}),
        ["has shape (8, 3)", "needs (3, 8)"],
    ),
}


@pytest.mark.fault("K27", "K28", "K29", "K30", "K32", "H35")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", TAMPERED)
def test_an_adapter_that_does_not_fit_is_refused_in_both_forms(tmp_path, form, fault):
    path = save_adapter(trained(PLAIN), tmp_path / form)
    change, parts = TAMPERED[fault]
    rewrite(path, change)
    refused(path, *parts)


@pytest.mark.fault("K28")
@pytest.mark.parametrize("form", FORMS)
def test_on_request_an_incomplete_adapter_is_used_as_far_as_it_goes(tmp_path, form):
    path = save_adapter(trained(PLAIN), tmp_path / form)

    def change(config, tensors):
        del tensors["blocks.1.proj.lora_A.weight"]
        del tensors["blocks.1.qkv.lora_A.weight"], tensors["blocks.1.qkv.lora_B.weight"]
        tensors["extra.lora_A.weight"] = torch.ones(3, 8)

    rewrite(path, change)
    refused(path, "blocks.1.qkv: its tensors are missing", "extra: no such", "allow_partial")
    model, whole = Net(), lora_layers(trained(PLAIN))
    with pytest.warns(UserWarning, match=r"in part, on 2 layers(.|\n)*blocks\.1\.proj\.lora_A"):
        load_adapter(model, path, allow_partial=True)
    layers = lora_layers(model)
    assert list(layers) == ["blocks.0.qkv", "blocks.0.proj"]
    for key, layer in layers.items():
        pairs = zip(layer.lora_factors("default"), whole[key].lora_factors("default"), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.fault("K28")
@pytest.mark.parametrize("fault", ["nan", "alpha_zero", "transposed", "renamed"])
def test_what_is_wrong_is_never_used_in_part(tmp_path, fault):
    path = save_adapter(trained(PLAIN), tmp_path / "a.pt")
    change, parts = TAMPERED[fault]
    rewrite(path, change)
    refused(path, *parts, allow_partial=True)


@pytest.mark.fault("K29")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapters_in_any_precision_load_and_train_in_fp32(tmp_path, form, dtype):
    path = save_adapter(trained(PLAIN), tmp_path / form)
    rewrite(path, lambda _, tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    model = Net()
    load_adapter(model, path)
    for key, layer in lora_layers(model).items():
        for ours, theirs in zip(
            layer.lora_factors("default"),
            lora_layers(trained(PLAIN))[key].lora_factors("default"),
            strict=True,
        ):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs.to(dtype).float())


# -- strangers -------------------------------------------------------------------------------------


@pytest.mark.fault("H35", "H14")
def test_what_a_strangers_configuration_points_to_is_not_opened(tmp_path, monkeypatch):
    path = save_adapter(trained(PLAIN), tmp_path / "adapter")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "canary.py").write_text("class Net: pass")

    def change(config, tensors):
        config["base_model_name_or_path"] = "http://localhost:1/model"
        config["auto_mapping"] = {"base_model_class": "Net", "parent_library": "canary"}

    rewrite(path, change)
    model = Net()
    with no_device(weights=True):  # nor the network
        load_adapter(model, path)
    assert lora_layers(model)
    assert "canary" not in sys.modules


@pytest.mark.fault("H35")
@pytest.mark.parametrize("kind", ["itself", "tensor", "numbers_as_keys", "long_number"])
def test_settings_that_are_no_plain_values_are_refused(tmp_path, kind):
    path = save_adapter(trained(PLAIN), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    loop = {}
    loop["x"] = loop
    odd = {
        "itself": loop,
        "tensor": torch.ones(2),
        "numbers_as_keys": {1: 2, "1": 3},
        "long_number": 10**5000,
    }
    content["config"]["lora_core"]["freeze_A"] = odd[kind]
    torch.save(content, path)
    refused(path, "a.pt")


@pytest.mark.fault("H38", "H44", "H45")
@pytest.mark.parametrize(
    "files",
    [
        ["x/../../outside.safetensors"],
        ["/etc/passwd"],
        ["missing.safetensors"],
        [f"adapter-{i}.safetensors" for i in range(100_000)],
    ],
    ids=["above", "absolute", "missing", "hundred_thousand"],
)
def test_an_index_of_shards_is_not_followed(tmp_path, files):
    """Adapters are one file; nothing reads an index, nor the pickled metadata of DCP."""
    path = save_adapter(trained(PLAIN), tmp_path / "adapter")
    (path / WEIGHTS).rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {f"blocks.{i}": file for i, file in enumerate(files)}}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    refused(path, f"no {WEIGHTS} in it", f"{WEIGHTS}.index.json")
