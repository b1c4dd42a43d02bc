"""Checkpoints in every packing, what is refused, and writing tensors back under their names."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Sam3Config

from lora_core.errors import CheckpointError
from lora_core.testing import load_golden
from sam3_lora import names, network, official

GOLDENS = Path(__file__).parent / "goldens"
OTHERS = {  # what stands beside the detector in the published file
    "tracker.mask_decoder.weight": torch.arange(6.0).view(2, 3),
    "tracker.maskmem.freqs": torch.tensor([7.5], dtype=torch.float16),
}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return load_golden(GOLDENS / "transformers_model").config["sam3_config"]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The official detector with the unused tensors of the published file."""
    found = load_golden(GOLDENS / "official_model").weights
    extra = {"backbone.vision_backbone.sam2_convs.0.conv_1x1.weight": torch.ones(2)}
    return {**found, **extra}


@pytest.fixture(scope="module")
def library() -> dict[str, Tensor]:
    return load_golden(GOLDENS / "transformers_model").weights


def write(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    if settings is not None:
        name = "config.json" if path.stem in ("model", "sam3") else f"{path.stem}.json"
        (path.parent / name).write_text(json.dumps(settings))
    return path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("prefix", ["detector.", "", "module.", "module.detector."])
@pytest.mark.parametrize("packing", ["flat.pt", "wrapped.pt", "flat.safetensors"])
def test_every_packing_of_the_official_names(
    tmp_path: Path,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    library: dict[str, Tensor],
    prefix: str,
    packing: str,
) -> None:
    tensors = {prefix + name: tensor for name, tensor in weights.items()}
    front = "module." if prefix.startswith("module.") else ""
    tensors.update({front + name: tensor for name, tensor in OTHERS.items()})
    if packing.endswith(".pt"):  # complex numbers, which the other format has not
        table = torch.polar(torch.ones(4, 4), torch.ones(4, 4))
        tensors[f"{prefix}backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis"] = table
    path = write(tmp_path / packing, tensors, settings)
    if packing == "wrapped.pt":
        torch.save({"model": tensors, "epoch": 3}, path)
    assert_same(official.read_state(path), library)
    file = official.read_official(path)
    assert (file.scheme, file.prefix, file.path) == ("official", prefix, path)
    shapes = official.read_state(path, "meta")
    assert {n: t.shape for n, t in shapes.items()} == {n: t.shape for n, t in library.items()}
    assert all(tensor.is_meta for tensor in shapes.values())


@pytest.mark.parametrize("prefix", ["", "detector_model.", "module."])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_names_and_folders_of_transformers(
    tmp_path: Path,
    settings: dict[str, Any],
    library: dict[str, Tensor],
    prefix: str,
    name: str,
) -> None:
    tensors = {prefix + key: tensor for key, tensor in library.items()}
    if prefix == "detector_model.":  # a video model, whose config holds the image model's
        tensors.update({"tracker_model.x": torch.ones(1), "tracker_neck.y": torch.ones(1)})
        settings = {"detector_config": settings, "tracker_config": {}}
    path = write(tmp_path / "folder" / name, tensors, settings)
    place = path.parent if name == "model.safetensors" else path
    assert_same(official.read_state(place), library)
    assert official.read_official(place).scheme == "transformers"


def test_a_folder_with_the_official_file(
    tmp_path: Path,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    library: dict[str, Tensor],
) -> None:
    write(tmp_path / "sam3.pt", {f"detector.{n}": t for n, t in weights.items()}, settings)
    assert_same(official.read_state(tmp_path), library)


def test_the_published_file_needs_no_config() -> None:
    facts = json.loads(gzip.decompress((GOLDENS / "names" / "names.json.gz").read_bytes()))
    tensors = {
        f"detector.{name}": torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in facts["official"].items()
    }
    file = official.OfficialFile(Path("sam3.pt"), "flat", "official", "detector.", tensors)
    assert official.is_published(file)
    model = network.build_network(official.network_config(file), "meta")
    official.check_fit(file, model.state_dict())
    model.load_state_dict(file.state, strict=True, assign=True)


def test_the_network_runs_on_what_was_read(
    tmp_path: Path, settings: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    path = write(tmp_path / "base.pt", {f"detector.{n}": t for n, t in weights.items()}, settings)
    file = official.read_official(official.find_checkpoint(path))
    model = network.build_network(official.network_config(file), "meta")
    model.load_state_dict(file.state, strict=True, assign=True)
    io = load_golden(GOLDENS / "official_model").io
    with torch.no_grad():
        features = network.encode_images(model, io["pixel_values"])
    torch.testing.assert_close(features.map, io["fpn.2"], rtol=0, atol=1e-3)


# -- refusals ------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        official.read_state(path)
    return str(caught.value)


def test_a_file_of_another_model_names_its_first_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "other.pt", {"image_encoder.x": torch.ones(1), "b": torch.ones(1)})
    assert "0 of 2 tensors matched the names of SAM 3 (it starts with image_encoder.x, b)" in (
        refusal(path)
    )


def test_partial_and_foreign_files_are_refused_with_the_names_they_have(
    tmp_path: Path, settings: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    tensors = {f"detector.{name}": tensor for name, tensor in weights.items()}
    tensors.pop("detector.transformer.encoder.layers.0.norm1.weight")
    tensors["detector.transformer.encoder.layers.0.self_attn.in_proj_bias"] = torch.ones(5)
    tensors["detector.extra.weight"] = torch.ones(1)
    tensors["elsewhere"] = torch.ones(1)
    text = refusal(write(tmp_path / "part.pt", tensors, settings))
    assert "1 missing: detector.transformer.encoder.layers.0.norm1.weight" in text
    assert "2 unexpected: detector.extra.weight, elsewhere" in text
    assert "in_proj_bias [5] instead of [96]" in text
    assert "332 of 334 tensors matched the model of" in text


def test_only_a_tracker_is_no_detector(tmp_path: Path) -> None:
    assert "0 of 2 tensors matched" in refusal(write(tmp_path / "tracker.pt", OTHERS))


def test_another_size_needs_its_config(
    tmp_path: Path, settings: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    path = write(tmp_path / "small.pt", weights)
    assert "put its Sam3Config beside it as small.json" in refusal(path)
    (tmp_path / "small.json").write_text("{}")
    assert "no Sam3Config" in refusal(path)
    (tmp_path / "small.json").write_text("[")
    assert "no readable JSON" in refusal(path)
    wrong = {**settings, "text_config": {"model_type": "no_such_model"}}
    (tmp_path / "small.json").write_text(json.dumps(wrong))
    assert "not the config of a SAM 3" in refusal(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked at /.*sam3.pt\. Get it from https"):
        official.find_checkpoint("no/such/sam3.pt")
    assert official.find_local("facebook/sam3") is None
    torch.save({"format": "x", "tensors": {}}, tmp_path / "adapter.pt")
    assert "is a LoRA adapter" in refusal(tmp_path / "adapter.pt")
    torch.save({"model": {"a": 3}}, tmp_path / "numbers.pt")
    assert "expected a state dict" in refusal(tmp_path / "numbers.pt")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    assert "Pickled weights are not read" in refusal(folder)


# -- writing back --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["detector.", "module."])
def test_everything_but_the_detector_comes_back_bit_for_bit(
    tmp_path: Path, settings: dict[str, Any], weights: dict[str, Tensor], prefix: str
) -> None:
    front = "module." if prefix == "module." else ""
    tensors = {prefix + name: tensor for name, tensor in weights.items()}
    tensors.update({front + name: tensor for name, tensor in OTHERS.items()})
    file = official.read_official(write(tmp_path / "base.pt", tensors, settings))
    same = official.to_official(file, file.state)
    assert list(same) == list(tensors)
    assert_same(same, tensors)
    changed = {name: tensor + 1 for name, tensor in file.state.items()}
    written = official.to_official(file, changed)
    for name, tensor in tensors.items():
        plain = name.removeprefix(prefix)
        if name.startswith(front + "tracker.") or names.is_unused(plain):
            assert torch.equal(written[name], tensor)
        elif plain == names.POSITIONS[0]:  # the class token's place is not in the network
            assert torch.equal(written[name][:, :1], tensor[:, :1])
            assert torch.equal(written[name][:, 1:], tensor[:, 1:] + 1)
        else:
            assert torch.equal(written[name], tensor + 1)


def test_transformers_files_keep_their_names(
    tmp_path: Path, settings: dict[str, Any], library: dict[str, Tensor]
) -> None:
    tensors = {f"detector_model.{n}": t for n, t in library.items()}
    path = write(tmp_path / "model.safetensors", tensors, settings)
    file = official.read_official(path.parent)
    assert_same(official.to_official(file, file.state), tensors)
    with pytest.raises(CheckpointError, match=r"has no tensors detector_model\.new"):
        official.to_official(file, {"new": torch.ones(1)})


def test_the_config_of_the_published_size_is_the_default() -> None:
    file = official.OfficialFile(Path("sam3.pt"), "flat", "official", "detector.", {})
    assert official.network_config(file).to_dict() == Sam3Config().to_dict()
