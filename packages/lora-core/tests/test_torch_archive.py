"""Hand-written pickles that torch loads, yet that would cheat or exhaust whoever reads them."""

import contextlib
import errno
import io
import os
import struct
import zipfile

import pytest
import torch

from lora_core import torch_archive
from lora_core.errors import CheckpointError
from lora_core.tensor_file import read_safetensors, read_torch
from lora_core.testing import limited

LITTLE = 2**28  # bytes beyond what the process has
VALUES = struct.pack("<4f", 1, 2, 3, 4)


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def numbers(*values):
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"


def mapping(*pairs):
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


EMPTY = name_of("collections", "OrderedDict") + b")R"
STORAGE = b"(" + text("storage") + name_of("torch", "FloatStorage") + text("0") + text("cpu")
PARTS = STORAGE + b"K\x04tQK\0"


def tensor(shape=(4,), stride=(1,)):
    rebuild = name_of("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + PARTS + numbers(*shape) + numbers(*stride) + b"\x89" + EMPTY + b"tR"


def with_attribute(name):
    """A tensor on which the pickle sets an attribute of this name."""
    inner = PARTS + numbers(4) + numbers(1) + b"\x89" + EMPTY
    made_by = name_of("torch._utils", "_rebuild_tensor_v2") + name_of("torch", "Tensor")
    state = mapping((text(name), b"K\x01"))
    rebuild = name_of("torch._tensor", "_rebuild_from_type_v2")
    return rebuild + b"(" + made_by + b"(" + inner + b"t" + state + b"tR"


def archive(path, pickled, values=VALUES):
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        parts.writestr("archive/version", "3")
        parts.writestr("archive/byteorder", "little")
        parts.writestr("archive/data/0", values)
    return path


def test_the_hand_written_pickle_is_a_good_file(tmp_path):
    path = archive(tmp_path / "a.pt", mapping((text("x"), tensor())))
    assert read_torch(path)["x"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_byte_array_of_any_length_is_not_made(tmp_path, device):
    call = name_of("__builtin__", "bytearray") + b"(\x8a\x05\0\0\0\0\x01tR"  # of 4 GB
    path = archive(tmp_path / "a.pt", mapping((text("x"), call)))
    outcome = limited.run(lambda: read_torch(path, device=device) and None, memory=LITTLE)
    assert "a.pt is damaged or no torch file (it makes byte arrays" in outcome.problem


def test_a_long_key_above_many_values_takes_no_more_than_the_file(tmp_path):
    """The way to a tensor is only spelled for a message: 5 MB times 20,000 entries are 100 GB."""
    pickled = mapping((text("k" * 5_000_000), b"](" + b"K\x01" * 20_000 + b"e"))
    path = archive(tmp_path / "a.pt", pickled)
    assert limited.run(lambda: len(read_torch(path)), memory=LITTLE).value == 1


def test_a_key_nested_deeper_than_python_can_show_is_no_fault_of_ours(tmp_path):
    giant = tensor((10**6,), (0,))
    path = archive(tmp_path / "a.pt", b"}()" + b"\x85" * 20_000 + giant + b"u")
    with pytest.raises(CheckpointError, match=r"content\[<tuple>\] claims the shape"):
        read_torch(path)


@pytest.mark.parametrize("name", ["items", "keys", "values"])
def test_an_attribute_cannot_hide_what_a_dictionary_holds(tmp_path, name):
    giant = b"(" + text("x") + tensor((10**6, 10**6), (0, 0)) + b"u"
    state = b"}(" + text(name) + name_of("collections", "OrderedDict") + b"ub"
    path = archive(tmp_path / "a.pt", EMPTY + giant + state)
    with pytest.raises(CheckpointError, match=r"content\['x'\] claims the shape"):
        read_torch(path)


@pytest.mark.parametrize("name", ["numel", "element_size", "isfinite", "full_tensor", "to"])
def test_an_attribute_cannot_stand_for_a_method_of_a_tensor(tmp_path, name):
    path = archive(tmp_path / "a.pt", mapping((text("x"), with_attribute(name))))
    found = read_torch(path)["x"]
    assert not vars(found)
    assert found.numel() == 4


FORGED = {
    "a_later_version": (6, b"\xff\0", "torch.save never uses"),
    "patched": (8, b"\x20\0", "torch.save never uses"),
    "encrypted": (8, b"\x01\0", "compressed or encrypted"),
    "a_name_in_no_encoding": (8, b"\0\x08", "damaged where it lists its parts"),
    "a_part_outside": (42, b"\xf0\xff\xff\x7f", "wrong, or its header"),
}


@pytest.mark.parametrize("fault", FORGED)
def test_a_forged_list_of_parts_is_said_as_what_it_is(tmp_path, fault):
    place, forged, reason = FORGED[fault]
    path = archive(tmp_path / "a.pt", mapping((text("x"), tensor())))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + place : entry + place + len(forged)] = forged
    if fault == "a_name_in_no_encoding":
        data[entry + 46] = 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read_torch(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
@pytest.mark.parametrize("read", [read_torch, read_safetensors])
def test_a_disk_that_fails_is_not_told_as_damage(read):
    """Nothing is mapped at address 0, so that the kernel answers EIO."""
    with pytest.raises(CheckpointError, match=r"^cannot read /proc/self/mem: Input/output error$"):
        read("/proc/self/mem")


class FailingFile(io.BytesIO):
    """Gives EIO from some read on, as a dying disk or a lost mount does."""

    def __init__(self, data, good_reads):
        super().__init__(data)
        self.good_reads = good_reads

    def read(self, size=-1):
        self.good_reads -= 1
        if self.good_reads < 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_a_disk_that_fails_at_any_moment_of_the_check_is_not_told_as_damage(tmp_path):
    data = archive(tmp_path / "a.pt", mapping((text("x"), tensor()))).read_bytes()
    answers = []
    for good_reads in range(1000):
        with contextlib.suppress(OSError):
            file = FailingFile(data, good_reads)
            answers.append(torch_archive.fault(file, len(data), values=True))
            break
    assert answers == [""]
    assert good_reads > 10


def test_a_link_to_nothing_says_where_it_leads(tmp_path):
    (tmp_path / "a.pt").symlink_to(tmp_path / "moved.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt is a link to .*moved\.pt, which is gone"):
        read_torch(tmp_path / "a.pt")


def test_a_shape_beyond_any_tensor_is_a_damaged_file(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError, match="no possible shape is given for 'x'"):
            read_safetensors(tmp_path / "a.safetensors", device=device)


def test_tensors_without_values_are_read(tmp_path):
    torch.save({"x": torch.zeros(0, 3)}, tmp_path / "a.pt")
    assert read_torch(tmp_path / "a.pt")["x"].shape == (0, 3)


@pytest.mark.fault("H06")
@pytest.mark.parametrize(
    ("place", "value"),
    [(6, 100), (8, 0x20)],
    ids=["a later version of the format", "patched data"],
)
def test_a_zip_archive_of_a_kind_that_python_does_not_read_is_named(tmp_path, place, value):
    path = tmp_path / "new.pt"
    torch.save({"x": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    entry = data.find(b"PK\x01\x02")  # of the directory at the end, the first
    data[entry + place : entry + place + 2] = struct.pack("<H", value)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"new\.pt is damaged.*needs what torch\.save never"):
        read_torch(path)
