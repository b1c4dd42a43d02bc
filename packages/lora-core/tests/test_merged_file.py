"""Merged models on their way to the disk: nothing is lost, nothing unverified has the name."""

import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lora_core import LoraConfig, inject, merged_file, save_adapter
from lora_core.errors import CheckpointError, ConfigError, NumericError
from lora_core.tensor_file import read_safetensors, read_torch

TENSORS = {
    "half": torch.tensor([[-0.0, 1.5]], dtype=torch.float16),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "double": torch.tensor(2.0, dtype=torch.float64),
    "view": torch.arange(12.0).view(3, 4)[1:2],
    "transposed": torch.arange(6.0).view(2, 3).T,
    "complex": torch.polar(torch.ones(2), torch.ones(2)),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "wrapped.pt"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, name):
    path = tmp_path / name
    merged_file.write_tensors(path, TENSORS, wrapped=name == "wrapped.pt")
    if name == "a.safetensors":
        found, metadata = read_safetensors(path)
        assert metadata == {"format": "pt"}
        assert safetensors.torch.load_file(path).keys() == TENSORS.keys()
    else:
        found = read_torch(path)
        found = found["model"] if name == "wrapped.pt" else found
        assert list(found) == list(TENSORS)
    merged_file.check_written(path, found, TENSORS)
    assert path.stat().st_size < 6000, "a view dragged its storage into the file"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_other_values_and_other_names_are_noticed(tmp_path):
    zero, minus = {"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}
    with pytest.raises(NumericError, match="a was read back with other values"):
        merged_file.check_written(tmp_path, minus, zero)
    with pytest.raises(NumericError, match="other tensors"):
        merged_file.check_written(tmp_path, zero | {"b": torch.ones(1)}, zero)
    nan = torch.tensor([float("nan")])
    assert merged_file.same_bits(nan, nan.clone())
    assert not merged_file.same_bits(torch.ones(1), torch.ones(1).double())


def test_only_a_folder_that_a_merge_may_have_written_is_replaced(tmp_path):
    folder = tmp_path / "model"
    merged_file.refuse_existing(folder, overwrite=False)
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "merges.txt"):
        (folder / name).touch()
    with pytest.raises(ConfigError, match="exists: choose another --output or add --overwrite"):
        merged_file.refuse_existing(folder, overwrite=False, others=("merges.txt",))
    merged_file.refuse_existing(folder, overwrite=True, others=("merges.txt",))
    with pytest.raises(ConfigError, match=r"holds 'merges\.txt', which is not replaced"):
        merged_file.refuse_existing(folder, overwrite=True)
    (folder / "adapter_config.json").touch()
    with pytest.raises(ConfigError, match=r"holds 'adapter_config\.json'"):
        merged_file.refuse_existing(folder, overwrite=True, others=("merges.txt",))
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        merged_file.refuse_existing(tmp_path / "a.pt", overwrite=True)


def test_what_is_read_is_never_written_over(tmp_path):
    base, adapter = tmp_path / "models" / "base", tmp_path / "adapter"
    merged_file.refuse_inputs(tmp_path / "merged", False, base, adapter)
    for output in (base, adapter, tmp_path / "models", tmp_path / "x" / ".." / "adapter"):
        with pytest.raises(ConfigError, match=r"is or holds .*: choose another"):
            merged_file.refuse_inputs(output, True, base, adapter)
    with pytest.raises(ConfigError, match="lies in the base"):
        merged_file.refuse_inputs(base / "merged", True, base, adapter)
    merged_file.refuse_inputs(adapter / "merged", True, base, adapter)
    (tmp_path / "merged").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="exists: choose another --output or add --overwrite"):
        merged_file.refuse_inputs(tmp_path / "merged", False, base, adapter)
    merged_file.refuse_inputs(tmp_path / "merged", True, base, adapter)


def test_a_private_folder_goes_and_so_do_old_ones(tmp_path):
    old, new = tmp_path / ".unverified-out.pt-12345678", tmp_path / ".unverified-out.pt-abcdefgh"
    for left in (old, new):
        left.mkdir()
    past = time.time() - 2 * merged_file.STALE
    os.utime(old, (past, past))
    with merged_file.private_folder(tmp_path / "out.pt") as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [new.name]
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*/file/out\.pt"),
        merged_file.private_folder(tmp_path / "file" / "out.pt"),
    ):
        pass


def test_a_link_to_a_folder_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").touch()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "new").mkdir()
    merged_file.move([tmp_path / "new"], [tmp_path / "link"])
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "precious" / "x").exists()


def test_exact_arithmetic_is_put_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    before = torch.backends.cuda.matmul.fp32_precision

    def fail():
        with merged_file.exact(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.backends.cuda.matmul.fp32_precision == before


# -- the base of an adapter ------------------------------------------------------------------------


def test_a_base_that_is_not_found_is_told_with_the_adapter(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoraConfig(["0"], r=2))
    adapter = save_adapter(model, tmp_path / "adapter", metadata={"base": {"file": "base.pt"}})
    assert merged_file.find_base(str(adapter), Path) == Path("base.pt")

    def search(name):
        raise CheckpointError(f"no {name} here")

    with pytest.raises(CheckpointError) as error:
        merged_file.find_base(str(adapter), search)
    assert str(error.value) == (
        f"no base.pt here\n{adapter} was trained on it: add --checkpoint FILE"
    )


def test_a_base_that_has_changed_is_refused():
    merged_file.refuse_changed("base.pt", "abc", "abc")
    with pytest.raises(CheckpointError, match=r"base\.pt has changed since the model was built"):
        merged_file.refuse_changed("base.pt", "abc", "abd")
