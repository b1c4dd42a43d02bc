"""Adapter files whose settings, names or values are of a kind that nobody expects."""

import json
import time

import pytest
import torch
from torch import nn

from lora_core.adapters.file import load_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError
from lora_core.injection import inject
from lora_core.tensor_file import read_safetensors, safetensors_bytes
from lora_core.testing import disturb

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 8)


@pytest.fixture
def saved(tmp_path):
    model = Net()
    inject(model, LoraConfig(["one", "two"], r=3))
    disturb(model)
    return save_adapter(model, tmp_path / "adapter")


def change(adapter, change_record):
    """Rewrite our own record in a file, without the digest that would tell."""
    tensors, metadata = read_safetensors(adapter / WEIGHTS)
    record = json.loads(metadata["lora_core"])
    del record["extra"]["sha256"]
    change_record(record)
    data = safetensors_bytes(tensors, {"format": "pt", "lora_core": json.dumps(record)})
    (adapter / WEIGHTS).write_bytes(data)
    (adapter / CONFIG).write_text(json.dumps(record["config"]))


def bare(tmp_path, **changes):
    """A file of bare tensors for the layer `one`."""
    tensors = {"one.lora_A.weight": torch.ones(3, 8), "one.lora_B.weight": torch.ones(24, 3)}
    torch.save(tensors | changes, tmp_path / "bare.pt")
    return tmp_path / "bare.pt"


@pytest.mark.parametrize("value", ["false", 2.5, [1], {"a": 1}])
@pytest.mark.parametrize("name", ["use_rslora", "use_dora", "lora_bias"])
def test_a_flag_that_is_no_truth_value_is_refused(saved, name, value):
    """The text "false" would count as true, and rsLoRA's scale is another one."""
    change(saved, lambda record: record["config"].update({name: value}))
    with pytest.raises(CheckpointError, match=f"{name} is .*, expected true or false"):
        load_adapter(Net(), saved)


@pytest.mark.parametrize("parts", ["x", [[]], [["a"]], [{}], {"a": 1}])
@pytest.mark.parametrize("name", ["slices", "weights"])
def test_slices_without_name_start_and_end_are_refused(saved, name, parts):
    change(saved, lambda record: record["extra"]["layers"]["one"].update({name: parts}))
    with pytest.raises(CheckpointError, match="unusable configuration"):
        load_adapter(Net(), saved)


@pytest.mark.parametrize("name", ["peft_type", "bias", "init_lora_weights", "modules_to_save"])
def test_a_message_does_not_repeat_a_value_of_any_length(saved, name):
    change(saved, lambda record: record["config"].update({name: "x" * 10**6}))
    with pytest.raises(CheckpointError) as error:
        load_adapter(Net(), saved)
    assert len(str(error.value)) < 1500


def test_tensors_as_settings_are_refused(tmp_path):
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 1, "other": torch.ones(2)}
    tensors = torch.load(bare(tmp_path), weights_only=True)
    torch.save({"format": 1, "config": config, "tensors": tensors}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="its settings are no plain values"):
        load_adapter(Net(), tmp_path / "a.pt")


def test_names_that_are_no_texts_or_too_long_are_refused(tmp_path):
    for key, part in [(1, "a name of type int"), ("x" * 5000, "'xxx")]:
        torch.save({key: torch.ones(1)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"expected tensors by name, found {part}") as e:
            load_adapter(Net(), tmp_path / "a.pt", lora_alpha=1)
        assert len(str(e.value)) < 500


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_values_of_eight_bits_are_loaded_and_checked(tmp_path, dtype):
    model, name = Net(), "one.lora_A.weight"
    load_adapter(model, bare(tmp_path, **{name: torch.ones(3, 8).to(dtype)}), lora_alpha=1)
    assert torch.equal(model.one.lora_A["default"].weight, torch.ones(3, 8))
    path = bare(tmp_path, **{name: torch.full((3, 8), float("nan")).to(dtype)})
    with pytest.raises(CheckpointError, match="24 values are NaN or infinite"):
        load_adapter(Net(), path, lora_alpha=1)


def test_values_beyond_fp32_would_be_infinite_in_the_model(tmp_path):
    large = torch.full((3, 8), 1e300, dtype=torch.float64)
    path = bare(tmp_path, **{"one.lora_A.weight": large})
    with pytest.raises(CheckpointError, match="24 values are NaN or infinite"):
        load_adapter(Net(), path, lora_alpha=1)


def test_a_wrong_name_does_not_load_the_other_file_of_the_folder(tmp_path):
    bare(tmp_path).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adaptor_model\.safetensors does not exist"):
        load_adapter(Net(), tmp_path / "adaptor_model.safetensors", lora_alpha=1)


def test_the_adapter_of_another_large_model_is_refused_in_seconds(tmp_path):
    class Stack(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({f"{name}_{q}_proj": nn.Linear(4, 4) for q in "qkvo"})
                for _ in range(150)
            )

    model = Stack("attention")
    inject(model, LoraConfig([f"attention_{q}_proj" for q in "qkvo"], r=2))
    adapter = save_adapter(model, tmp_path / "adapter")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="0 of 1200 adapter tensors match this model"):
        load_adapter(Stack("self_attention"), adapter)
    assert time.monotonic() - began < 20  # with a hint for each name, over a minute
