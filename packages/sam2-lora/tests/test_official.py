"""Official checkpoints: names, variants, and what happens to files that are something else."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core.errors import CheckpointError
from sam2_lora import model as m
from sam2_lora import names, official

KEY_COUNTS = {"tiny": 468, "small": 516, "base_plus": 612, "large": 900}
IMAGE_PARAMETERS = {
    "tiny": 31_440_721,
    "small": 38_538_577,
    "base_plus": 73_328_401,
    "large": 216_924_865,
}


def on_meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


# -- names and variants --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", official.VARIANTS)
def test_every_published_variant_is_recognised_from_its_tensors(
    facts: dict[str, Any], variant: str
) -> None:
    tensors = on_meta(facts["keys"][variant])
    size = variant.partition("_hiera_")[2]
    assert len(tensors) == KEY_COUNTS[size] + (3 if variant.startswith("sam2.1") else 0)
    assert official.recognise(tensors) == variant
    image = {name: tensor for name, tensor in tensors.items() if not names.is_video(name)}
    assert official.recognise(image) == f"hiera_{size}"


@pytest.mark.parametrize("variant", official.VARIANTS)
def test_the_image_model_has_exactly_the_mapped_tensors(
    facts: dict[str, Any], variant: str
) -> None:
    model = m.network(official.published(variant))
    state = model.state_dict()
    image = {k: t for k, t in on_meta(facts["keys"][variant]).items() if not names.is_video(k)}
    assert shapes_of(names.to_transformers(image)) == shapes_of(state)
    assert shapes_of(names.to_official(state)) == shapes_of(image)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == IMAGE_PARAMETERS[variant.partition("_hiera_")[2]]


@pytest.mark.parametrize("size", official.SIZES)
def test_the_name_map_is_the_recorded_one(facts: dict[str, Any], size: str) -> None:
    variant = f"sam2.1_hiera_{size}"
    found = names.key_map(facts["keys"][variant])
    assert found.keys() == facts["keymap"][variant].keys()
    for name, recorded in facts["keymap"][variant].items():
        assert names.is_video(name) is isinstance(recorded, dict)
        targets = recorded["video"] if isinstance(recorded, dict) else recorded
        assert sorted(found[name]) == sorted(target.partition("[")[0] for target in targets)


@pytest.mark.parametrize("variant", official.VARIANTS)
def test_names_map_back_to_themselves(facts: dict[str, Any], variant: str) -> None:
    tensors = on_meta(facts["keys"][variant])
    back = names.to_official(names.to_transformers(tensors))
    assert shapes_of(back) == shapes_of(tensors)


def test_the_video_model_has_exactly_the_mapped_tensors(facts: dict[str, Any]) -> None:
    from transformers import Sam2VideoConfig, Sam2VideoModel

    with torch.device("meta"):
        state = Sam2VideoModel(Sam2VideoConfig()).state_dict()  # the default is tiny
    tensors = on_meta(facts["keys"]["sam2.1_hiera_tiny"])
    assert shapes_of(names.to_transformers(tensors)) == shapes_of(state)


@pytest.mark.parametrize("size", official.SIZES)
def test_module_names_become_the_official_ones(facts: dict[str, Any], size: str) -> None:
    for ours, theirs, *_ in facts["lora_targets"][f"sam2.1_hiera_{size}"]:
        assert names.module_to_official(theirs) == ours
    assert names.module_to_official("some.other.module") == "some.other.module"


def test_random_weights_survive_the_round_trip_bit_for_bit(tiny_checkpoint: Path) -> None:
    file = official.read_official(tiny_checkpoint)
    back = names.to_official(names.to_transformers(file.tensors))
    assert back.keys() == file.tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in file.tensors.items())


# -- reading -------------------------------------------------------------------------------------


def test_an_official_file_is_read_as_it_is(tiny_checkpoint: Path) -> None:
    file = official.read_official(tiny_checkpoint)
    assert (file.format, file.variant.name) == ("pt", "sam2.1_hiera_tiny")
    assert len(file.tensors) == 471
    model = m.from_file(file)
    assert model.sam2_base.variant == "sam2.1_hiera_tiny"
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    state = model.state_dict()
    for name, tensor in names.to_transformers(file.image).items():
        assert torch.equal(state[name], tensor)


def test_a_flat_state_dict_is_read_and_reported(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(tiny_checkpoint, weights_only=True)["model"]
    torch.save(state, tmp_path / "flat.pt")
    file = official.read_official(tmp_path / "flat.pt")
    assert file.format == "flat"
    assert list(file.tensors) == list(state)
    assert 'without the "model" entry' in capsys.readouterr().out


def test_half_precision_files_become_float32_networks(golden_base: Path, tmp_path: Path) -> None:
    file = official.read_official(golden_base)
    half = {name: tensor.half() for name, tensor in file.tensors.items()}
    official.write_official(tmp_path / "half.safetensors", half)
    (tmp_path / "half.json").write_text(golden_base.with_suffix(".json").read_text())
    model = m.load(tmp_path / "half.safetensors")
    weight = model.vision_encoder.backbone.blocks[0].attn.qkv.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["image_encoder.trunk.blocks.0.attn.qkv.weight"].float())


def test_a_transformers_folder_gives_the_same_network(golden_base: Path, tmp_path: Path) -> None:
    model = m.load(golden_base)
    model.save_pretrained(tmp_path / "folder")
    again = m.load(tmp_path / "folder")
    assert again.sam2_base.format == "transformers"
    assert again.sam2_base.fingerprint == model.sam2_base.fingerprint
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert again.config.to_dict()["vision_config"] == model.config.to_dict()["vision_config"]


def test_a_published_video_folder_keeps_its_video_tensors(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import Sam2VideoConfig

    tensors = official.read_official(tiny_checkpoint).tensors
    config = Sam2VideoConfig()
    config.save_pretrained(tmp_path)
    state = {k: t.clone() for k, t in names.to_transformers(tensors).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = official.read_official(tmp_path)
    assert file.variant.name == "sam2.1_hiera_tiny"
    assert file.tensors.keys() == tensors.keys()
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in tensors.items())
    assert m.from_file(file).sam2_base.fingerprint == m.load(tiny_checkpoint).sam2_base.fingerprint


def test_writing_keeps_order_and_leaves_no_partial_file(golden_base: Path, tmp_path: Path) -> None:
    tensors = official.read_official(golden_base).tensors
    one_row = {"row": torch.zeros(1000, 1000)[:1]}
    path = official.write_official(tmp_path / "out.pt", tensors | one_row)
    content = torch.load(path, weights_only=True)
    assert list(content) == ["model"]
    assert list(content["model"]) == [*tensors, "row"]
    assert path.stat().st_size < 3_000_000, "a view dragged its storage into the file"
    with pytest.raises(AttributeError):
        official.write_official(tmp_path / "broken.pt", {"x": None})  # type: ignore[dict-item]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.pt"]


# -- files that are something else ---------------------------------------------------------------


class Canary:
    """A pickle that writes a file when it is loaded without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("canary",)


@pytest.mark.fault("H01")
def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "args": Canary()}, "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt holds objects of class \S*mkdir"):
        official.read_official("evil.pt")
    assert not Path("canary").exists()


BAD_FILES = {
    "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "page.pt": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "empty.safetensors": (b"", "is empty"),
    "noise.pt": (b"\x00\x01garbage" * 40, "damaged or no torch file"),
    "noise.safetensors": (b"\x00\x01garbage" * 40, "damaged or no safetensors file"),
}


@pytest.mark.fault("C25")
@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        official.read_official(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.fault("C25")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_truncation_is_refused(golden_base: Path, tmp_path: Path, suffix: str) -> None:
    tensors = official.read_official(golden_base).tensors
    whole = official.write_official(tmp_path / f"whole{suffix}", tensors).read_bytes()
    for eighth in range(1, 8):
        path = tmp_path / f"part{suffix}"
        path.write_bytes(whole[: len(whole) * eighth // 8])
        with pytest.raises(CheckpointError, match="part"):
            official.read_official(path)


def test_a_missing_published_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        official.read_official(tmp_path / "sam2_hiera_large.pt")
    assert str(tmp_path / "sam2_hiera_large.pt") in str(error.value)
    assert "/072824/sam2_hiera_large.pt" in str(error.value)


@pytest.mark.fault("C26")
def test_weights_of_another_size_than_the_config_list_names_and_counts(
    golden_base: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """A transformers folder whose config.json is of another model than its weights."""
    file = official.read_official(tiny_checkpoint)
    state = {k: t.clone() for k, t in names.to_transformers(file.image).items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(golden_base.with_suffix(".json").read_text())
    with pytest.raises(CheckpointError) as error:
        m.load(tmp_path)
    text = str(error.value)
    assert re.search(r"\d+ of \d+ tensors matched", text)
    assert re.search(r"\d+ unexpected: image_encoder\.trunk\.blocks", text)
    assert re.search(r"\d+ other shape: \S+ \[.*\] instead of \[", text)
    assert "the tensors look like hiera_tiny" in text


@pytest.mark.fault("C26")
def test_missing_and_unexpected_tensors_are_named(golden_base: Path, tmp_path: Path) -> None:
    tensors = official.read_official(golden_base).tensors
    del tensors["sam_mask_decoder.conv_s0.bias"]
    tensors["sam_mask_decoder.hq_token.weight"] = torch.zeros(1)
    official.write_official(tmp_path / "odd.safetensors", tensors)
    (tmp_path / "odd.json").write_text(golden_base.with_suffix(".json").read_text())
    with pytest.raises(CheckpointError) as error:
        m.load(tmp_path / "odd.safetensors")
    assert "1 missing: sam_mask_decoder.conv_s0.bias" in str(error.value)
    assert "1 unexpected: sam_mask_decoder.hq_token.weight" in str(error.value)


@pytest.mark.fault("C27")
def test_another_model_matches_nothing(tmp_path: Path) -> None:
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="0 of 1 tensors matched"):
        official.read_official(tmp_path / "other.pt")


def test_other_contents_are_refused_with_a_reason(tmp_path: Path, golden_base: Path) -> None:
    torch.save({"format": 1, "config": {}, "metadata": {}, "tensors": {}}, tmp_path / "lora.torch")
    with pytest.raises(CheckpointError, match="LoRA adapter, not a base model"):
        official.read_official(tmp_path / "lora.torch")
    torch.save({"step": 3, "optimizer": {}}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="found: step, optimizer"):
        official.read_official(tmp_path / "state.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="found: list"):
        official.read_official(tmp_path / "list.pt")
    (tmp_path / "alone.safetensors").write_bytes(golden_base.read_bytes())
    with pytest.raises(CheckpointError, match=r"Put its Sam2Config beside it as alone\.json"):
        official.read_official(tmp_path / "alone.safetensors")


def test_bad_configs_and_folders_are_refused(tmp_path: Path, golden_base: Path) -> None:
    (tmp_path / "base.safetensors").write_bytes(golden_base.read_bytes())
    config = tmp_path / "base.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"base\.json is no readable JSON"):
        m.load(tmp_path / "base.safetensors")
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="no Sam2Config"):
        m.load(tmp_path / "base.safetensors")
    config.write_text('{"vision_config": {"fpn_hidden_size": "wide"}}')
    with pytest.raises(CheckpointError, match="not the config of a SAM 2"):
        m.load(tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match=r"needs config\.json and model\.safetensors"):
        official.read_official(tmp_path)


def test_two_different_positional_matrices_are_refused(golden_base: Path) -> None:
    state = m.load(golden_base).state_dict()
    state["shared_image_embedding.positional_embedding"] = torch.zeros(2, 16)
    with pytest.raises(CheckpointError, match="differs from its second copy"):
        names.to_official(state)


def test_the_golden_config_is_json(golden_base: Path) -> None:
    """The fixture is the documented form: `<stem>.json` beside `<stem>.safetensors`."""
    assert "vision_config" in json.loads(golden_base.with_suffix(".json").read_text())


# -- finding a checkpoint ------------------------------------------------------------------------


def test_a_bare_name_is_also_looked_for_in_the_usual_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        official.find_checkpoint("sam2_hiera_large.pt")
    for place in ("", "checkpoints/", "libs/sam2base/checkpoints/"):
        assert f"{tmp_path}/{place}sam2_hiera_large.pt" in str(error.value)
    assert "https://" in str(error.value)
    deep = Path("libs/sam2base/checkpoints/sam2_hiera_large.pt")
    deep.parent.mkdir(parents=True)
    deep.touch()
    assert official.find_checkpoint("sam2_hiera_large.pt") == deep
    Path("sam2_hiera_large.pt").touch()
    assert official.find_checkpoint("sam2_hiera_large.pt") == Path("sam2_hiera_large.pt")
