"""Official model directories: every packing in, strictly, and every misfit named."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import CASES, GOLDENS, inputs_of
from torch import Tensor

from lora_core.errors import CheckpointError, ConfigError
from lora_core.weight_files import read_weights
from midi3d_lora.official import find_model, find_weights
from midi3d_lora.official_model import load_component
from midi3d_lora.transformer.dit import TripoSGDiTModel

STEM = "diffusion_pytorch_model"
WHOLE = f"{STEM}.safetensors"
OFFICIAL = GOLDENS / "pipeline" / "model"


def tiny_model() -> TripoSGDiTModel:
    torch.manual_seed(0)
    return TripoSGDiTModel(
        num_attention_heads=2,
        width=8,
        in_channels=4,
        num_layers=3,
        cross_attention_dim=6,
        cross_attention_2_dim=5,
    )


STATE = tiny_model().state_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a transformer alone, in a model directory."""
    tiny_model().save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def loaded(folder: Path, **kwargs: Any) -> dict[str, Tensor]:
    model = load_component(TripoSGDiTModel, folder.parent, "transformer", **kwargs)
    assert not model.training
    return model.state_dict()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Edit the tensors of the only file."""
    tensors = load_file(folder / WHOLE)
    edit(tensors)
    save_file(tensors, folder / WHOLE)


def set_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# -- what is read --------------------------------------------------------------------------------


def test_a_directory_of_the_official_pipeline_is_read_without_its_package() -> None:
    found = find_model(OFFICIAL)
    assert "midi." in (found / "model_index.json").read_text()
    model = load_component(TripoSGDiTModel, found, "transformer")
    assert "midi" not in sys.modules
    inputs = inputs_of(CASES["dit_5_layers"], "single")
    with torch.no_grad():
        assert model(**inputs).sample.isfinite().all()
    assert_same(model.state_dict(), load_file(OFFICIAL / "transformer" / WHOLE))


def test_what_save_pretrained_writes_is_read_back_equal(folder: Path) -> None:
    model = TripoSGDiTModel.from_pretrained(folder)
    assert_same(model.state_dict(), STATE)
    model.save_pretrained(folder.parent / "again")
    again = TripoSGDiTModel.from_pretrained(folder.parent, subfolder="again")
    assert_same(again.state_dict(), STATE)
    settings = {name: value for name, value in again.config.items() if name[0] != "_"}
    assert settings == {n: v for n, v in tiny_model().config.items() if n[0] != "_"}


def repack(folder: Path, packing: str) -> dict[str, Any]:
    """Write the weights in another packing; gives the arguments that ask for it."""
    (folder / WHOLE).unlink()
    model = tiny_model()
    if packing == "shards":
        model.save_pretrained(folder, max_shard_size=2000)
    elif packing == "variant":
        model.save_pretrained(folder, variant="fp16")
        return {"variant": "fp16"}
    elif packing == "only variant":
        model.save_pretrained(folder, variant="bf16")
    elif packing == "shards of a variant":
        model.save_pretrained(folder, variant="fp16", max_shard_size=2000)
    elif packing == "bin":
        model.save_pretrained(folder, safe_serialization=False)
    elif packing == "shards of bin":
        model.save_pretrained(folder, safe_serialization=False, max_shard_size=2000)
    return {}


@pytest.mark.parametrize(
    "packing", ["shards", "variant", "only variant", "shards of a variant", "bin", "shards of bin"]
)
def test_every_packing_gives_the_same_tensors(folder: Path, packing: str) -> None:
    wanted = repack(folder, packing)
    assert not (folder / WHOLE).exists()
    assert (len(list(folder.iterdir())) > 4) == packing.startswith("shards")
    assert_same(read_weights(find_weights(folder, wanted.get("variant"))), STATE)
    assert_same(loaded(folder, **wanted), STATE)


def test_the_dtype_is_float32_or_the_one_asked_for(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    assert {tensor.dtype for tensor in loaded(folder).values()} == {torch.float32}
    asked = loaded(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in asked.values()} == {torch.bfloat16}


def test_a_foreign_class_name_and_private_settings_are_ignored(folder: Path) -> None:
    set_config(folder, _class_name="Tripo2VAEModel", _anything=[1])
    assert_same(loaded(folder), STATE)


def test_settings_that_are_missing_take_the_released_values(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"matched the TripoSGDiTModel of .*config\.json"):
        loaded(folder)
    with torch.device("meta"):
        assert TripoSGDiTModel.from_config({}).config.width == 2048


# -- what is refused -----------------------------------------------------------------------------


def test_missing_unexpected_and_wrongly_shaped_tensors_are_named_together(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.stranger"] = torch.ones(1)
        tensors["proj_in.weight"] = torch.ones(3, 3)
        del tensors["norm_out.bias"]

    change(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    text = str(caught.value)
    assert f"{len(STATE) - 2} of {len(STATE)} tensors matched" in text
    assert "1 missing: norm_out.bias" in text
    assert "1 unexpected: blocks.0.stranger" in text
    assert "1 other shape: proj_in.weight [3, 3] instead of [8, 4]" in text


def test_unknown_settings_are_refused(folder: Path) -> None:
    set_config(folder, num_layer=4)
    with pytest.raises(CheckpointError, match=r"unknown settings 'num_layer'.*'num_layers'"):
        loaded(folder)
    with pytest.raises(ConfigError, match="unknown settings 'depth'"):
        TripoSGDiTModel.from_config({"depth": 4})


@pytest.mark.parametrize("said", [True, False])
def test_a_triposg_transformer_is_told_from_midi(folder: Path, said: bool) -> None:
    def without_second(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "2_2" in name]:
            del tensors[name]

    change(folder, without_second)
    if said:
        set_config(folder, cross_attention_2_dim=None)
    with pytest.raises(CheckpointError, match="this is a TripoSG model"):
        loaded(folder)


def test_values_that_are_not_finite_are_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors["proj_in.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"values in 1 tensor \(proj_in\.weight\)"):
        loaded(folder)


def test_all_that_a_directory_lacks_is_told_at_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(OFFICIAL, model)
    shutil.rmtree(model / "vae")
    (model / "image_encoder_2" / "model.safetensors").unlink()
    (model / "image_encoder_dinov2").mkdir()
    with pytest.raises(CheckpointError) as caught:
        find_model(model)
    assert str(caught.value).splitlines() == [
        f"{model} is no MIDI-3D model:",
        f"{model / 'image_encoder_2'}: no weights named model.safetensors",
        f"{model / 'vae' / 'config.json'} is missing",
        "this is a TripoSG model with one picture encoder, not MIDI-3D, which has two",
    ]
    with pytest.raises(CheckpointError, match="VAST-AI/MIDI-3D"):
        find_model(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no folder owner/model"):
        find_model("owner/model")


def test_a_choice_of_variants_is_left_to_the_user(folder: Path) -> None:
    shutil.copy(folder / WHOLE, folder / f"{STEM}.fp16.safetensors")
    (folder / WHOLE).rename(folder / f"{STEM}.bf16.safetensors")
    with pytest.raises(CheckpointError, match="there are the variants bf16, fp16"):
        loaded(folder)
    with pytest.raises(CheckpointError, match="no weights of the variant 'fp8' named"):
        loaded(folder, variant="fp8")
    assert_same(loaded(folder, variant="bf16"), STATE)


def test_shards_must_be_those_of_their_list(folder: Path) -> None:
    repack(folder, "shards")
    index = folder / f"{WHOLE}.index.json"
    content = json.loads(index.read_text())
    first = sorted(set(content["weight_map"].values()))[0]

    def listed(change: dict[str, str]) -> None:
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | change}))

    listed({"proj_in.bias": "../other.safetensors"})
    with pytest.raises(CheckpointError, match="names files of other folders"):
        find_weights(folder)
    listed({"more.weight": first})
    with pytest.raises(CheckpointError, match=r"differ in 1 tensor: more\.weight"):
        loaded(folder)
    listed({})
    shutil.copy(folder / first, folder / "twice.safetensors")
    listed({"more.weight": "twice.safetensors"})
    with pytest.raises(CheckpointError, match="both have"):
        loaded(folder)
    listed({})
    (folder / first).unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        loaded(folder)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("run"),))


def test_a_pickle_that_would_run_a_program_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / WHOLE).unlink()
    torch.save(STATE | {"x": Hostile()}, folder / f"{STEM}.bin")
    with pytest.raises(CheckpointError, match=r"unrestricted load|cannot be read"):
        loaded(folder)
    (folder / f"{STEM}.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError):
        loaded(folder)
    assert not (folder / "run").exists()
