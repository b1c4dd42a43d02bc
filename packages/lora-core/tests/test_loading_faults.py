"""Files of tensors that are damaged, of something else, or hostile: nothing loads silently wrong.

Nothing in a file is ever run, and no file makes the program take more memory than its size.
"""

import argparse
import collections
import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_core import tensor_file
from lora_core.adapters.file import load_adapter, read_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError
from lora_core.injection import inject
from lora_core.tensor_file import read_safetensors, read_torch
from lora_core.testing import corrupt, disturb, limited

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


class Net(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.two(self.one(x))


X = torch.linspace(-1, 1, 16).reshape(2, 8)


def trained():
    model = Net()
    inject(model, LoraConfig(["one", "two"], r=3))
    disturb(model, 0.3)
    return model


def plain_message(error):
    """The message is for people: short, without the words of the library that failed."""
    text = str(error.value)
    assert text.count("\n") <= 2, text
    for word in ("Traceback", "weights_only", "PytorchStreamReader", "Unpickl", "0x"):
        assert word not in text, text
    return text


# -- damaged files -------------------------------------------------------------------------------

ADAPTER_FILES = [f"adapter/{WEIGHTS}", f"adapter/{CONFIG}", "a.torch", "a.pth", "a.pt"]


@pytest.mark.fault("K29", "K45", "C25")
@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.parametrize("damage", corrupt.DAMAGE)
def test_a_damaged_adapter_is_named_and_the_model_stays_as_it_was(tmp_path, name, damage):
    adapter = save_adapter(trained(), tmp_path / name.partition("/")[0])
    if name.endswith(CONFIG):  # a missing line end does no harm
        (tmp_path / name).write_text((tmp_path / name).read_text().rstrip())
    corrupt.DAMAGE[damage](tmp_path / name)
    model = Net()
    with pytest.raises(CheckpointError) as error:
        load_adapter(model, adapter)
    assert Path(name).name in plain_message(error)
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.fault("K29", "H35")
@pytest.mark.parametrize("mask", [1, 0x80])
@pytest.mark.parametrize("name", ["adapter", "a.torch"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, name, mask):
    adapter = save_adapter(trained(), tmp_path / name, metadata={"step": 3})
    whole = read_adapter(adapter)
    refused = 0
    for _ in corrupt.flips(adapter / WEIGHTS if adapter.is_dir() else adapter, 400, mask):
        try:
            found = read_adapter(adapter)
        except CheckpointError:
            refused += 1
        else:
            assert found.config == whole.config
            assert found.tensors.keys() == whole.tensors.keys()
            assert all(torch.equal(found.tensors[k], t) for k, t in whole.tensors.items())
    assert refused > 100  # in the padding of a zip archive a flip harms nobody


@pytest.mark.fault("K29")
@pytest.mark.parametrize("name", ["adapter", "a.torch"])
def test_one_flipped_bit_of_a_weight_is_a_damaged_file(tmp_path, name):
    adapter = save_adapter(trained(), tmp_path / name)
    file = adapter / WEIGHTS if adapter.is_dir() else adapter
    data = bytearray(file.read_bytes())
    place = data.index(trained().one.lora_A["default"].weight.detach().numpy().tobytes()[:32])
    data[place + 1] ^= 16
    file.write_bytes(data)
    reason = "is damaged: its SHA-256" if adapter.is_dir() else "the checksum of its part"
    with pytest.raises(CheckpointError, match=reason):
        load_adapter(Net(), adapter)


@pytest.mark.fault("K30")
def test_a_flipped_bit_in_the_configuration_is_noticed_or_said(tmp_path):
    adapter = save_adapter(trained(), tmp_path / "adapter")
    whole = read_adapter(adapter)
    for position in corrupt.flips(adapter / CONFIG, 300):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found = read_adapter(adapter)
            except CheckpointError:
                continue
        spoken = any("was changed after saving" in str(w.message) for w in said)
        assert spoken or found.config == whole.config, position


@pytest.mark.fault("C25", "H05")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", corrupt.DAMAGE)
def test_a_damaged_file_of_tensors_gets_its_own_reason(tmp_path, damage, suffix):
    path = tmp_path / f"base{suffix}"
    if suffix == ".pt":
        torch.save({"model": TENSORS}, path)
    else:
        path.write_bytes(tensor_file.safetensors_bytes(TENSORS, {"k": "v"}))
    corrupt.DAMAGE[damage](path)
    with pytest.raises(CheckpointError) as error:
        (read_torch if suffix == ".pt" else read_safetensors)(path)
    text = plain_message(error)
    expected = {
        "empty": "is empty: copy or download it again",
        "web_page": "is a web page, not a checkpoint",
        "lfs_pointer": "is a Git LFS pointer, not the file itself: run `git lfs pull`",
        "text": "it does not begin as one",
        "zeros": "it does not begin as one",
        "folder": "is a folder, expected a file",
    }
    part = expected.get(damage, "damaged" if damage == "cut_after_1_of_8" else "cut off")
    assert part in text, text
    assert "base" in text


@pytest.mark.fault("C25")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for read in (read_torch, read_safetensors, read_adapter):
        with pytest.raises(CheckpointError, match=r"pipe\.pt is a device or pipe, expected a file"):
            read(tmp_path / "pipe.pt")


@pytest.mark.fault("C25")
def test_other_kinds_of_files_are_called_by_their_name(tmp_path):
    (tmp_path / "a.pt").write_bytes(tensor_file.safetensors_bytes(TENSORS, {}))
    with pytest.raises(CheckpointError, match="it does not begin as one"):
        read_torch(tmp_path / "a.pt")
    torch.save(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="it does not begin as one"):
        read_safetensors(tmp_path / "a.safetensors")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="a TorchScript program, not a state dict"):
        read_torch(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="a zip archive of something else"):
        read_torch(tmp_path / "zip.pt")


# -- pickles that would run something --------------------------------------------------------------


class Hostile:
    """Its pickle makes a folder when it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The folder that a hostile pickle would make; it must not exist in the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


def in_zip(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def in_legacy(value):
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def in_tar(value):
    """What torch wrote before 2017: pickles as members of a tar archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(value, 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def in_zip_in_zip(value):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", in_zip(value))
        archive.writestr("archive/version", "3")
    return stream.getvalue()


WRAPPINGS = {
    "zip": in_zip,
    "legacy": in_legacy,
    "tar": in_tar,
    "zip_in_zip": in_zip_in_zip,
    **{f"pickle_{n}": lambda value, n=n: pickle.dumps(value, n) for n in range(6)},
}
PLACES = {
    "alone": lambda bad: bad,
    "beside_tensors": lambda bad: {"format": 1, "config": {}, "tensors": dict(TENSORS), "x": bad},
    "in_the_tensors": lambda bad: {"format": 1, "config": {}, "tensors": {"a.lora_A.weight": bad}},
    "in_the_optimizer": lambda bad: {"optimizer": {"state": {0: {"exp_avg": bad}}}, **TENSORS},
    "in_the_random_state": lambda bad: {"rng": {"numpy": ("MT19937", bad)}, **TENSORS},
    "in_the_trainer_state": lambda bad: {"trainer": {"log_history": [{"loss": bad}]}},
    "as_a_key": lambda bad: {bad: 1},
}


@pytest.mark.fault("H01", "H02", "K45", "H35")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".torch", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_pickle_that_would_run_a_program_is_refused_and_does_not_run(canary, wrapping, suffix):
    for place, build in PLACES.items():
        path = canary.with_name(f"{place}{suffix}")
        path.write_bytes(WRAPPINGS[wrapping](build(Hostile())))
        for read in (read_torch, lambda path: load_adapter(Net(), path, lora_alpha=1)):
            with pytest.raises(CheckpointError, match=place) as error:
                read(path)
            plain_message(error)
            if wrapping in ("zip", "legacy", "pickle_2", "pickle_4"):
                assert "posix.mkdir" in str(error.value)


@pytest.mark.fault("H01", "H02")
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_hostile_file_inside_an_adapter_directory_is_refused(canary, wrapping):
    """As older PEFT named it, and under the name of a safetensors file."""
    hostile = WRAPPINGS[wrapping](Hostile())
    for name in ("adapter_model.bin", WEIGHTS):
        adapter = save_adapter(trained(), canary.with_name("adapter"))
        (adapter / WEIGHTS).unlink()
        (adapter / name).write_bytes(hostile)
        with pytest.raises(CheckpointError, match="adapter_model"):
            load_adapter(Net(), adapter)
        (adapter / name).unlink()


@dataclass
class Settings:
    rank: int = 8


OLD_OBJECTS = {
    "numpy_scalar": (np.float64(0.5), "numpy"),
    "numpy_array": (np.zeros(3), "numpy"),
    "path": (Path("runs"), "pathlib."),
    "namespace": (argparse.Namespace(lr=1), "argparse.Namespace"),
    "defaultdict": (collections.defaultdict(list, a=[1]), "collections.defaultdict"),
    "config_object": (Settings(), "Settings"),
}


@pytest.mark.fault("K46", "H03")
@pytest.mark.parametrize("wrapping", ["zip", "legacy"])
@pytest.mark.parametrize("kind", OLD_OBJECTS)
def test_objects_in_old_checkpoints_are_named_and_the_way_out_is_said(tmp_path, kind, wrapping):
    value, name = OLD_OBJECTS[kind]
    path = tmp_path / "old.pth"
    data = {"zip": in_zip, "legacy": in_legacy}[wrapping]({"args": value, "model": TENSORS})
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"old\.pth holds objects of class") as error:
        read_torch(path)
    text = plain_message(error)
    assert name in text, text
    assert "torch.save({name: tensor}" in text


# -- hostile sizes, in a child with little memory -------------------------------------------------

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LITTLE = 2**28  # bytes beyond what the process has


def handmade(header, data=b"\0" * 8, size=None):
    """A safetensors file with this header, which may claim another length of itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HEADERS = {
    "header_of_a_terabyte": (handmade({"x": F32}, size=10**12), "it does not begin as one"),
    "header_of_2_to_the_64": (handmade({"x": F32}, size=2**64 - 1), "it does not begin as one"),
    "header_longer_than_the_file": (handmade({"x": F32}, size=10**6), "cut off: the header alone"),
    "negative_offset": (handmade({"x": entry(-8, 0)}), "'x' overlaps"),
    "backwards": (handmade({"x": entry(8, 0)}), "'x' overlaps"),
    "overlap": (handmade({"x": F32, "y": entry(4, 12)}, b"\0" * 12), "'y' overlaps"),
    "same_place": (handmade({"x": F32, "y": F32}), "'y' overlaps"),
    "hole": (handmade({"x": F32, "y": entry(16, 24)}, b"\0" * 24), "leaves a hole"),
    "bytes_behind": (handmade({"x": F32}, b"\0" * 9), "bytes behind the last tensor"),
    "data_cut": (handmade({"x": F32}, b"\0" * 7), "cut off: 7 bytes of tensors"),
    "offset_of_a_terabyte": (handmade({"x": entry(0, 10**12)}), "cut off: 8 bytes of tensors"),
    "shape_of_10_to_the_12": (handmade({"x": entry(0, 8, [10**12])}), "damaged"),
    "shape_that_overflows": (handmade({"x": entry(0, 8, [2**32, 2**32])}), "damaged"),
    "negative_shape": (handmade({"x": entry(0, 8, [-2])}), "damaged"),
    "unknown_dtype": (handmade({"x": entry(0, 8, dtype="OBJECT")}), "damaged"),
    "name_twice": (
        handmade(b'{"x":%b,"x":%b}' % ((json.dumps(F32).encode(),) * 2)),
        "a name occurs twice",
    ),
    "name_with_dots": (handmade({"../../etc/passwd": F32}), "unfit name"),
    "name_with_nul": (handmade({"x\0y": F32}), "unfit name"),
    "name_with_escape": (handmade({"\x1b[2Jx": F32}), "unfit name"),
    "offsets_are_words": (handmade({"x": F32 | {"data_offsets": ["0", "8"]}}), "no place"),
    "no_offsets": (handmade({"x": {"dtype": "F32", "shape": [2]}}), "no place"),
    "entry_is_a_list": (handmade({"x": []}), "no place"),
    "deep": (handmade(b'{"x":' + b"[" * 100_000), "damaged"),
    "long_number": (handmade(b'{"x":' + b"9" * 10**6 + b"}"), "damaged"),
    "metadata_is_a_list": (handmade({"x": F32, "__metadata__": [1]}), "no dictionary"),
}


@pytest.mark.fault("H05", "H35")
@pytest.mark.parametrize("fault", HEADERS)
def test_a_hostile_safetensors_header_is_refused_in_little_memory(tmp_path, fault):
    content, reason = HEADERS[fault]
    (tmp_path / "good.safetensors").write_bytes(handmade({"x": F32}))
    assert torch.equal(read_safetensors(tmp_path / "good.safetensors")[0]["x"], torch.zeros(2))
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    problem = limited.run(lambda: load_adapter(Net(), path, lora_alpha=1), memory=LITTLE).problem
    assert "bad.safetensors is damaged or no safetensors file" in problem
    assert reason in problem


def zip_with(parts, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in parts:
            archive.writestr(name, data)
    return stream.getvalue()


def bomb():
    """A checkpoint whose tensor of 1 GB is deflated to 1 MB, which torch would inflate."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(in_zip({"x": torch.zeros(2)}))) as good:
        pickled = good.read("archive/data.pkl")
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled.replace(b"K\x02", b"J\0\0\0\x10"))
        archive.writestr("archive/version", "3")
        with archive.open("archive/data/0", "w") as member:
            for _ in range(64):
                member.write(bytes(2**24))
    return stream.getvalue()


def many_parts():
    parts = [(f"archive/data/{i}", b"") for i in range(30_000)]
    return zip_with([("archive/data.pkl", b"\x80\x02}."), *parts])


def claims_more():
    """A legacy file whose storage says that it has 10^12 elements."""
    return in_legacy({"x": torch.zeros(2)}).replace(b"K\x02", b"\x8a\x06\0\x10\xa5\xd4\xe8\0")


def boast():
    """Parts whose sizes in the directory are 2 GB each."""
    content = zip_with([("archive/data.pkl", b"\x80\x02}."), ("archive/data/0", b"1234")])
    return content.replace(b"\4\0\0\0" * 2, b"\xff\xff\xff\x7f" * 2)


def itself():
    loop: list = []
    loop.append(loop)
    return in_zip({"x": loop, "y": torch.zeros(2)})


def deep():
    stream = io.BytesIO()
    pickled = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")
    return stream.getvalue()


def aliases():
    value: list = [torch.zeros(1)]
    for _ in range(9):
        value = [value] * 9
    return in_zip({"x": value})


GIANTS = {
    "zero_strides": (
        lambda: in_zip({"x": torch.zeros(1).expand(10**6, 10**6)}),
        "claims the shape",
    ),
    "zero_strides_in_a_list": (
        lambda: in_legacy({"a": [{"b": torch.zeros(1).expand(10**12)}]}),
        "content['a'][0]['b'] claims the shape (1000000000000,)",
    ),
    "meta": (lambda: in_zip({"x": torch.ones(10**12, device="meta")}), "no ordinary dense tensor"),
    "sparse": (
        lambda: in_zip({"x": torch.sparse_coo_tensor([[0]], [1.0], (10**12,))}),
        "no ordinary dense tensor",
    ),
    "deflated_bomb": (bomb, "compressed"),
    "legacy_claim": (claims_more, "damaged"),
    "nested_deeply": (deep, "nested too deeply"),
    "parts_that_claim_more": (boast, "claim more bytes than the file has"),
    "many_parts": (many_parts, "damaged"),
}


@pytest.mark.fault("H06", "H18", "H35")
@pytest.mark.parametrize("kind", GIANTS)
def test_a_tensor_larger_than_its_file_is_refused_in_little_memory(tmp_path, kind):
    build, reason = GIANTS[kind]
    path = tmp_path / "giant.pt"
    path.write_bytes(build())
    outcome = limited.run(lambda: read_torch(path) and None, memory=LITTLE)
    assert "giant.pt" in outcome.problem, outcome
    assert reason in outcome.problem


@pytest.mark.fault("H06")
@pytest.mark.parametrize("build", [itself, aliases])
def test_containers_that_hold_themselves_or_each_other_many_times_end(tmp_path, build):
    path = tmp_path / "a.pt"
    path.write_bytes(build())
    outcome = limited.run(lambda: sorted(read_torch(path)), seconds=5, memory=LITTLE)
    assert "x" in outcome.value, outcome.problem


@pytest.mark.fault("H06", "H35")
@pytest.mark.parametrize("name", ["adapter", "a.pt"])
def test_a_file_larger_than_any_adapter_of_the_model_is_not_read(tmp_path, name):
    adapter = save_adapter(trained(), tmp_path / name)
    file = adapter / WEIGHTS if adapter.is_dir() else adapter
    with open(file, "r+b") as content:
        content.truncate(2**40)  # a hole: it takes no space on the disk
    outcome = limited.run(lambda: load_adapter(Net(), adapter) and None, memory=LITTLE)
    assert f"{file.name} has {2**40:,} bytes, where at most" in outcome.problem
