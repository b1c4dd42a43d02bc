"""Files of tensors: atomic, the same bytes for the same values, and read without trust."""

import json
import stat
import zipfile

import pytest
import safetensors.torch
import torch

from lora_core.errors import CheckpointError
from lora_core.tensor_file import (
    atomic_write,
    plain,
    read_safetensors,
    read_torch,
    safetensors_bytes,
)
from lora_core.testing.refusals import files_limited_to

TENSORS = {
    "b": torch.arange(3.0),
    "a": torch.ones(2, 2, dtype=torch.bfloat16),
    "s": torch.tensor(2),
}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write(b"half of two" + None)
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_libraries_that_want_a_path_can_write_to_the_sibling(tmp_path):
    with atomic_write(tmp_path / "x.safetensors") as file:
        safetensors.torch.save_file(TENSORS, file.name)
    assert torch.equal(read_safetensors(tmp_path / "x.safetensors")[0]["b"], TENSORS["b"])


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    for sync in (True, False):
        with atomic_write(tmp_path / "ours", sync=sync) as file:
            file.write(b"x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")]
    assert modes[0] == modes[1]


def test_a_name_of_the_longest_length_can_be_written(tmp_path):
    name = "ü" * 125 + ".pt"
    with atomic_write(tmp_path / name) as file:
        file.write(b"x")
    assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize("library", ["bytes", "torch"])
def test_a_disk_that_is_full_is_said_and_the_old_file_stays(tmp_path, library):
    path, large = tmp_path / "x.pt", torch.ones(10_000)
    path.write_bytes(b"old")
    with (
        files_limited_to(2000),
        pytest.raises(CheckpointError, match=r"cannot write .*x\.pt: File too large"),
        atomic_write(path) as file,
    ):
        torch.save(large, file) if library == "torch" else file.write(large.numpy().tobytes())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_safetensors_bytes_are_canonical_and_readable_by_the_library(tmp_path):
    metadata = {"format": "pt", **{f"key{i}": "x" * i for i in range(20)}}
    data = safetensors_bytes(TENSORS, metadata)
    assert data == safetensors_bytes(
        dict(reversed(TENSORS.items())), dict(reversed(metadata.items()))
    )
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    assert list(json.loads(data[8 : 8 + size])["__metadata__"]) == sorted(metadata)
    (tmp_path / "x.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
    tensors, found = read_safetensors(tmp_path / "x.safetensors")
    assert found == metadata
    assert all(
        torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items()
    )


def test_tensors_that_share_memory_are_written_as_their_own(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    shared = {"whole": x, "row": x[0], "turned": x.t()}
    (tmp_path / "x").write_bytes(safetensors_bytes(shared, {}))
    tensors, _ = read_safetensors(tmp_path / "x")
    assert all(torch.equal(tensors[key], value) for key, value in shared.items())


def test_plain_tensors_are_cpu_contiguous_and_without_gradient():
    x = torch.ones(2, 3, requires_grad=True).t()
    assert plain(x).is_contiguous()
    assert not plain(x).requires_grad


HEADER = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def handmade(header, data=b"\0" * 8, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


BAD = {
    "header_of_a_terabyte": handmade(HEADER, size=10**12),
    "negative_offset": handmade({"x": HEADER["x"] | {"data_offsets": [-8, 0]}}),
    "overlap": handmade(HEADER | {"y": HEADER["x"]}),
    "hole": handmade({"x": HEADER["x"] | {"data_offsets": [8, 16]}}, b"\0" * 16),
    "bytes_behind": handmade(HEADER, b"\0" * 9),
    "too_short": handmade(HEADER, b"\0" * 7),
    "shape_too_large": handmade({"x": HEADER["x"] | {"shape": [10**12]}}),
    "name_twice": handmade(b'{"x":%b,"x":%b}' % ((json.dumps(HEADER["x"]).encode(),) * 2)),
    "deep": handmade(b"[" * 100_000),
    "no_dictionary": handmade(b"[1]", b""),
    "metadata_no_dictionary": handmade(HEADER | {"__metadata__": [1]}),
    "seven_bytes": b"1234567",
}


@pytest.mark.fault("H05")
@pytest.mark.parametrize("fault", BAD)
def test_bad_safetensors_are_refused(tmp_path, fault):
    (tmp_path / "good").write_bytes(handmade(HEADER))
    assert torch.equal(read_safetensors(tmp_path / "good")[0]["x"], torch.zeros(2))
    (tmp_path / "bad").write_bytes(BAD[fault])
    with pytest.raises(CheckpointError, match=r"bad is damaged or no safetensors file"):
        read_safetensors(tmp_path / "bad")


@pytest.mark.fault("H05")
def test_every_flipped_header_byte_is_refused_or_harmless(tmp_path):
    data = bytearray(handmade(HEADER))
    for position in range(len(data) - 8):
        data[position] ^= 4
        (tmp_path / "x").write_bytes(data)
        try:
            tensors, _ = read_safetensors(tmp_path / "x")
        except CheckpointError:
            pass
        else:
            assert all(t.numel() * t.element_size() == 8 for t in tensors.values())
        data[position] ^= 4


def test_damaged_torch_files_are_refused_and_good_ones_read(tmp_path):
    content = {"step": 3, "tensors": TENSORS, "names": ["a", ("b", 1.5)]}
    torch.save(content, tmp_path / "good.pt")
    found = read_torch(tmp_path / "good.pt")
    assert found["names"] == content["names"]
    assert torch.equal(found["tensors"]["b"], TENSORS["b"])
    data = (tmp_path / "good.pt").read_bytes()
    for eighth in range(1, 8):
        (tmp_path / "cut.pt").write_bytes(data[: len(data) * eighth // 8])
        with pytest.raises(CheckpointError, match=r"cut\.pt is damaged or no torch file"):
            read_torch(tmp_path / "cut.pt")


@pytest.mark.fault("H02")
def test_a_zip_in_a_zip_is_no_checkpoint(tmp_path):
    torch.save(TENSORS, tmp_path / "inner.pt")
    with zipfile.ZipFile(tmp_path / "outer.pt", "w") as archive:
        archive.write(tmp_path / "inner.pt", "archive/data.pkl")
    with pytest.raises(CheckpointError, match=r"outer\.pt is damaged or no torch file"):
        read_torch(tmp_path / "outer.pt")


@pytest.mark.fault("H06")
def test_a_nested_tensor_larger_than_its_file_is_refused_without_touching_it(tmp_path):
    torch.save({"a": [{"b": torch.zeros(1).expand(10**6, 10**6)}]}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\['a'\]\[0\]\['b'\] claims the shape"):
        read_torch(tmp_path / "x.pt")
