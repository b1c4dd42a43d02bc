"""A depth checkpoint is told from its tensors, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_depth
import torch
from torch import nn

from isaac_lora.depth.checkpoint import (
    DepthCheckpoint,
    empty_network,
    find_depth_checkpoint,
    read_weights,
)
from isaac_lora.depth.checkpoint_names import original_name
from isaac_lora.depth.variants import VARIANTS, Variant, licence_of, name_of, settings_of
from lora_core.errors import CheckpointError

PARAMETERS = {"vits": 24_785_089, "vitb": 97_470_785, "vitl": 335_315_649}
TENSORS = {"vits": 239, "vitb": 239, "vitl": 407}  # of the original files


@cache
def network_of(variant: Variant) -> nn.Module:
    """A published size without values."""
    return empty_network(DepthCheckpoint(Path(), variant.name, settings_of(variant), 14))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_depth.write_original(tmp_path_factory.mktemp("depth") / "tiny_v2.pth")


# -- published sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_published_sizes_have_the_published_numbers_of_parameters_and_tensors(
    variant: Variant,
) -> None:
    network = network_of(variant)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[variant.name]
    names = {original_name(name) for name in network.state_dict()}
    assert len(names) == TENSORS[variant.name]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_size_is_told_from_the_original_file(tmp_path: Path, variant: Variant) -> None:
    path = write_shapes(tmp_path / "some_name.safetensors", variant)
    found = find_depth_checkpoint(path)
    assert (found.model, found.patch) == (variant.name, 14)
    assert found.settings["backbone_config"]["num_attention_heads"] == variant.heads


def write_shapes(path: Path, variant: Variant) -> Path:
    """A file whose tensors have the shapes of a published size: a hole, no disk space."""
    network = network_of(variant)
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        key, shape = original_name(name), list(tensor.shape)
        if key in header:
            continue
        if ".qkv." in key:
            shape[0] *= 3
        size = 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_folder_may_leave_out_the_defaults_of_transformers() -> None:
    base, small = (settings_of(variant) for variant in (VARIANTS[1], VARIANTS[0]))
    del base["backbone_config"]["hidden_size"], base["backbone_config"]["num_hidden_layers"]
    del small["fusion_hidden_size"]
    assert (name_of(base), name_of(small), name_of({})) == ("vitb", "vits", "custom")


def test_settings_that_name_a_backbone_on_the_hub_are_not_followed(tmp_path: Path) -> None:
    folder = tiny_depth.write_folder(
        tmp_path / "tiny", backbone="facebook/dinov2-small", use_pretrained_backbone=True
    )
    found = find_depth_checkpoint(folder)
    assert found.settings.keys() == settings_of(VARIANTS[0]).keys()
    assert read_weights(found).keys() == tiny_depth.renamed().keys()


def test_licences_of_the_published_weights_are_known() -> None:
    assert licence_of("vits") == "Apache-2.0"
    assert licence_of("vitb") == licence_of("vitl") == "CC-BY-NC-4.0"
    assert licence_of("custom") == ""


# -- faults ----------------------------------------------------------------------------------------


def test_a_missing_file_is_an_error_that_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*gone\.pth.*hf download"):
        find_depth_checkpoint(tmp_path / "gone.pth")


def test_nothing_is_downloaded() -> None:
    with pytest.raises(CheckpointError, match="nothing is downloaded here"):
        find_depth_checkpoint("depth-anything/Depth-Anything-V2-Small-hf")


def test_missing_unexpected_and_misshapen_tensors_are_named_as_the_file_has_them(
    tmp_path: Path,
) -> None:
    tensors = dict(tiny_depth.GOLDEN.weights)
    del tensors["pretrained.blocks.1.attn.qkv.bias"]
    tensors["pretrained.register_tokens"] = torch.zeros(1, 4, 24)
    tensors["depth_head.scratch.layer2_rn.weight"] = torch.zeros(16, 11, 3, 3)
    path = tiny_depth.write_original(tmp_path / "depth.pth", tensors)
    with pytest.raises(CheckpointError) as error:
        tiny_depth.find_original(path)
    for words in (
        "missing: pretrained.blocks.1.attn.qkv.bias",
        "1 unexpected: pretrained.register_tokens",
        "depth_head.scratch.layer2_rn.weight [16, 11, 3, 3] instead of [16, 12, 3, 3]",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("rows", [73, 75])
def test_qkv_with_other_rows_is_not_cut_to_fit(tmp_path: Path, rows: int) -> None:
    tensors = dict(tiny_depth.GOLDEN.weights)
    tensors["pretrained.blocks.0.attn.qkv.bias"] = torch.zeros(rows)
    path = tiny_depth.write_original(tmp_path / "depth.pth", tensors)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.bias"):
        tiny_depth.find_original(path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = {n: t.clone() for n, t in tiny_depth.GOLDEN.weights.items()}
    tensors["pretrained.norm.weight"][3] = float("inf")
    found = tiny_depth.find_original(tiny_depth.write_original(tmp_path / "bad.pth", tensors))
    with pytest.raises(CheckpointError, match=r"values in 1 tensor \(backbone\.layernorm"):
        read_weights(found)


def test_another_size_asks_for_a_folder(original: Path) -> None:
    with pytest.raises(CheckpointError, match=r"24 channels, expected 384 \(vits\)"):
        find_depth_checkpoint(original)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("depth_anything_v2_metric_hypersim_vits.pth", "metric model"),
        ("depth_anything_vitl14.pth", "Depth-Anything V1"),
    ],
)
def test_models_that_only_their_names_tell_apart_are_refused(
    tmp_path: Path, name: str, words: str
) -> None:
    path = tiny_depth.write_original(tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        tiny_depth.find_original(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"backbone.embeddings.cls_token": torch.zeros(1)}, "pass the folder that holds it"),
        ({"blocks.0.norm1.weight": torch.zeros(1)}, "DINOv2 encoder without depth head"),
        ({"conv.weight": torch.zeros(1)}, "expected names such as pretrained.cls_token"),
        ({}, "found nothing"),
        ({"step": 3}, "expected a state dict"),
    ],
)
def test_files_of_other_models_are_refused(tmp_path: Path, tensors, words: str) -> None:
    path = tiny_depth.write_original(tmp_path / "other.pth", tensors)
    with pytest.raises(CheckpointError, match=words):
        find_depth_checkpoint(path)


def test_a_file_that_would_run_a_program_is_refused(tmp_path: Path) -> None:
    torch.save({"pretrained.cls_token": shutil.rmtree}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"rmtree|unrestricted load"):
        find_depth_checkpoint(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "dpt"}, "found 'dpt' with 'dinov2'"),
        ({"backbone_config": {"model_type": "swin"}}, "found 'depth_anything' with 'swin'"),
        ({"backbone_config": None}, "with null"),
        ({"depth_estimation_type": "metric"}, "expected 'relative'"),
        ({"patch_size": 16}, "expected the same whole number"),
        ({"neck_hidden_sizes": "wide"}, "no possible settings"),
        ({"fusion_hidden_size": 8}, "instead of"),
    ],
)
def test_folders_of_other_models_are_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    folder = tiny_depth.write_folder(tmp_path / "tiny", **changes)
    with pytest.raises(CheckpointError, match=words):
        find_depth_checkpoint(folder)


def test_a_folder_with_an_original_file_says_to_pass_the_file(tmp_path: Path) -> None:
    tiny_depth.write_original(tmp_path / "depth_anything_v2_vitl.pth")
    with pytest.raises(CheckpointError, match=r"pass the file .*depth_anything_v2_vitl\.pth"):
        find_depth_checkpoint(tmp_path)


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    folder = tiny_depth.write_folder(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors; here is: config\.json"):
        find_depth_checkpoint(folder)
