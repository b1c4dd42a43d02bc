"""Weight files of a model folder: one, or shards with their list."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_core.errors import CheckpointError
from lora_core.weight_files import WeightFiles, find_shards, read_weights

STATE = {name: torch.full((2, 3), float(n)) for n, name in enumerate("abc")}
PLACES = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


@pytest.fixture
def index(tmp_path):
    """The list of two shards."""
    for file in set(PLACES.values()):
        save_file({n: t for n, t in STATE.items() if PLACES[n] == file}, tmp_path / file)
    return listed(tmp_path / "model.safetensors.index.json", PLACES)


def listed(index, places):
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_are_read_as_one_file_is(index, tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    found = find_shards(index, "fp16")
    assert [path.name for path in found.files] == ["one.safetensors", "two.safetensors"]
    assert (found.variant, found.safetensors) == ("fp16", True)
    for files in (found, WeightFiles((tmp_path / "model.safetensors",))):
        tensors = read_weights(files)
        assert tensors.keys() == STATE.keys()
        assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)


def test_headers_alone_are_read_onto_the_meta_device(index):
    tensors = read_weights(find_shards(index), device="meta")
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(2, 3)}


def test_pickled_files_of_tensors_are_told_from_safetensors(tmp_path):
    torch.save(STATE, tmp_path / "model.bin")
    found = WeightFiles((tmp_path / "model.bin",))
    assert not found.safetensors
    assert read_weights(found).keys() == STATE.keys()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected a JSON object"),
        ("{", "no readable JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "../one.safetensors"}}', "names files of other folders"),
        ('{"weight_map": {"a": "x\\\\one.safetensors"}}', "names files of other folders"),
        ('{"weight_map": {"a": "three.safetensors"}}', "1 of 1 shards are missing: three"),
    ],
)
def test_a_list_that_leads_nowhere_is_told_before_a_shard_is_opened(index, content, said):
    index.write_text(content)
    with pytest.raises(CheckpointError, match=said):
        find_shards(index)


def test_shards_must_hold_what_their_list_says(index):
    with pytest.raises(CheckpointError, match="differ in 1 tensor: d"):
        read_weights(find_shards(listed(index, PLACES | {"d": "one.safetensors"})))
    with pytest.raises(CheckpointError, match="differ in 1 tensor: b"):
        read_weights(find_shards(listed(index, PLACES | {"b": "two.safetensors"})))
    save_file({"a": STATE["a"]}, index.parent / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors and one\.safetensors both have a"):
        read_weights(find_shards(listed(index, PLACES)))
