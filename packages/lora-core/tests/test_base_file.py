"""Base models as files: names that mean a file or a hub id, what is read, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lora_core import LoraConfig, base_file, inject, save_adapter, summary
from lora_core.adapters import on_base
from lora_core.errors import CheckpointError
from lora_core.overview import require_linears

# -- finding ---------------------------------------------------------------------------------------


def test_a_path_comes_first_then_the_usual_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "checkpoints"]
    with pytest.raises(CheckpointError) as error:
        base_file.find_local("base.pt", folders, ". Ask Ann for it")
    for part in (f"{tmp_path}/base.pt", f"{tmp_path}/checkpoints/base.pt", ". Ask Ann for it"):
        assert part in str(error.value)
    folders[0].mkdir()
    (folders[0] / "base.pt").touch()
    assert base_file.find_local("base.pt", folders) == folders[0] / "base.pt"
    (tmp_path / "base.pt").touch()
    assert str(base_file.find_local("base.pt", folders)) == "base.pt"


@pytest.mark.parametrize("name", ["runs/a/b", "weights/base.pt", "../up", "/no/such", "plain"])
def test_only_hub_ids_are_left_to_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        base_file.find_local(name)
    assert base_file.find_local("owner/model") is None
    assert base_file.find_local("owner/model-1.0@abc") is None
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert str(base_file.find_local("owner/model")) == "owner/model"


def test_a_hub_id_without_network_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no such local folder, and the hub gave none") as e:
        base_file.from_hub("nobody/no-such-model@abc123", ["*.json"])
    assert "\n" not in str(e.value)


def test_a_base_of_the_hub_is_called_by_its_revision(tmp_path):
    assert base_file.lasting_name("dir/base.pt", tmp_path / "base.pt") == "base.pt"
    assert base_file.lasting_name("o/m", tmp_path / "f00") == "o/m@f00"
    assert base_file.lasting_name("o/m@main", tmp_path / "f00") == "o/m@f00"


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_packing_of_a_state_dict_is_told_apart(tmp_path, device):
    state = {"b": torch.ones(2), "a": torch.zeros(1, 3)}
    torch.save(state, tmp_path / "flat.pt")
    torch.save({"model": state, "epoch": 3}, tmp_path / "wrapped.pt")
    save_file(state, tmp_path / "x.safetensors")
    for name, kind in (("flat.pt", "flat"), ("wrapped.pt", "pt"), ("x.safetensors", "safetensors")):
        found, said = base_file.read_tensors(tmp_path / name, device)
        assert said == kind
        assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in state.items()}
        assert {t.device.type for t in found.values()} == {device}


def test_what_is_no_base_is_named(tmp_path):
    for name, content, message in (
        ("adapter.pt", {"format": 1, "tensors": {}}, "is a LoRA adapter, not a base model"),
        ("state.pt", {"step": 3, "optimizer": {}}, "found: step, optimizer"),
        ("list.pt", [torch.zeros(1)], "found: list"),
        ("numbers.pt", {"model": {"a": 3}}, "expected a state dict, or"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            base_file.read_tensors(tmp_path / name)


def test_settings_are_one_json_object(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps({"a": 1}), "utf-8")
    assert base_file.read_settings(path) == {"a": 1}
    for text, message in (
        ("{", "no readable JSON"),
        ("[" * 100000, "too deeply"),
        ("[]", "a list"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            base_file.read_settings(path)
    with open(path, "wb") as file:
        file.truncate(base_file.SETTINGS_LIMIT + 1)
    with pytest.raises(CheckpointError, match="at most"):
        base_file.read_settings(path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("adapter_config.json", "This is a LoRA adapter"),
        ("model.safetensors.index.json", "save it as one model.safetensors"),
        ("pytorch_model.bin", "Pickled weights are not read"),
        (None, "here is: nothing"),
    ],
)
def test_a_folder_without_a_model_says_what_it_is_instead(tmp_path, name, advice):
    if name:
        (tmp_path / name).touch()
    text = str(base_file.no_model_folder(tmp_path, "model.safetensors"))
    assert f"{tmp_path}: a model folder needs model.safetensors" in text
    assert advice in text


# -- checking --------------------------------------------------------------------------------------


def test_a_misfit_is_counted_and_named_as_the_file_has_it(tmp_path):
    wanted = {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4)}
    found = {"a": torch.ones(2), "b": torch.ones(5)}
    with pytest.raises(CheckpointError) as error:
        base_file.refuse_misfit(tmp_path, "M", found, wanted, ["y"], "x.".__add__, "  a hint")
    assert str(error.value).splitlines() == [
        f"{tmp_path}: 1 of 3 tensors matched M",
        "  1 missing: x.c",
        "  1 unexpected: y",
        "  1 other shape: x.b [5] instead of [3]",
        "  a hint",
    ]
    base_file.refuse_misfit(tmp_path, "M", wanted, wanted, [], hint="  a hint")


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    large = torch.full((3,), 3e38)  # whose sum overflows
    base_file.refuse_nan(tmp_path, {"a": torch.ones(2), "n": torch.arange(3), "l": large})
    both = torch.tensor([torch.inf, -torch.inf])
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensor \(d\)"):
        base_file.refuse_nan(tmp_path, {"d": both})
    bad = {"a": torch.ones(2), "b": torch.tensor([1, float("nan")]), "c": torch.tensor(-torch.inf)}
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 2 tensors \(b, c\)"):
        base_file.refuse_nan(tmp_path, bad)


def test_an_adapter_belongs_to_its_base():
    record = {"base": {"file": "b.pt", "variant": "v", "fingerprint": "1"}}
    for metadata, fingerprint in ((record, "1"), (record, None), ({}, "2"), ({"base": 3}, "2")):
        base_file.refuse_other_base("a.pt", metadata, "here", fingerprint)
    with pytest.raises(CheckpointError, match=r"was trained on b\.pt \(v\), .* those of here"):
        base_file.refuse_other_base("a.pt", record, "here", "2")


@pytest.mark.parametrize(
    ("value", "size"),
    [([84, 112], (84, 112)), ([84], None), ([84.0, 1], None), ([True, 1], None), (None, None)],
)
def test_the_size_of_the_training_is_two_whole_numbers(value, size):
    assert base_file.recorded_size({"image_size": value}) == size


# -- an adapter on its base ------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4))


@pytest.fixture
def adapted(tmp_path):
    """A base, a network with an adapter, and its file."""
    base = base_file.Base(tmp_path / "base.pt", "base.pt", "pt", "small", "1" * 8)
    model = network()
    inject(model, LoraConfig(["0"], r=2, lora_alpha=6))
    facts = on_base.metadata(base, (64, 96))
    return base, model, save_adapter(model, tmp_path / "a.pt", metadata=facts)


def test_an_adapter_goes_onto_its_own_base_alone(adapted):
    base, _, path = adapted
    fresh = network()
    assert base_file.recorded_size(on_base.load(fresh, path, base, 16.0)) == (64, 96)
    assert summary(fresh).rows[0].alpha == 6
    with pytest.raises(CheckpointError, match=r"trained on base\.pt \(small\), whose weights"):
        on_base.load(fresh, path, replace(base, fingerprint="2" * 8), 16.0)


def test_bare_tensors_get_the_default_alpha_and_that_is_said(adapted, tmp_path, capsys):
    base, model, _ = adapted
    tensors = {k: v.detach() for k, v in model.state_dict().items() if "lora_" in k}
    torch.save(tensors, tmp_path / "bare.pt")
    fresh = network()
    assert on_base.load(fresh, tmp_path / "bare.pt", base, 16.0) == {}
    assert summary(fresh).rows[0].alpha == 16
    assert "lora_alpha is taken to be 16.0, the default" in capsys.readouterr().out


def test_an_adapter_that_is_not_there_is_missed(adapted):
    on_base.refuse_missing(None)
    on_base.refuse_missing(str(adapted[2]))
    with pytest.raises(CheckpointError, match="--adapter /no/such does not exist"):
        on_base.refuse_missing("/no/such")


def test_other_layers_than_were_asked_for_are_noticed(adapted):
    found = summary(adapted[1])
    require_linears(found, [(4, 4)], 2, "--targets all")
    with pytest.raises(RuntimeError, match="--targets all adapted 1 layers with 16 trainable"):
        require_linears(found, [(4, 4)] * 2, 2, "--targets all")
