"""Isaac with depth gives the recorded numbers, from raw pictures to the loss."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_depth
import torch
from torch import Tensor

from isaac_lora.depth.checkpoint import find_depth_checkpoint
from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.encoding import encode_depth
from isaac_lora.depth.fusion import depth_encoding_of, depth_values_of
from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core.errors import DataError
from lora_core.testing.goldens import Golden, load_golden

GOLDENS = Path(__file__).parent / "goldens"
SAMPLES = ("image1", "image2", "text")
DEPTH = "model.depth_model."  # before the depth model's names in the recorded weights


@dataclass
class Case:
    """A recorded model, its samples, and its depth model."""

    golden: Golden
    model: IsaacForConditionalGeneration
    depths: DepthGrids

    @property
    def shuffle(self) -> int:
        return int(self.golden.config["pixel_shuffle_scale"])

    def pictures(self, sample: str) -> list[np.ndarray]:
        samples = json.loads((self.golden.folder / "samples.json").read_text())
        return [self.golden.io[f"images.{n}"].numpy() for n in samples[sample]["images"]]

    def inputs(self, sample: str) -> dict[str, Tensor]:
        names = ("input_ids", "image_mask", "patches", "grids")
        io = self.golden.io
        found = {name: io[f"{sample}.{name}"] for name in names if f"{sample}.{name}" in io}
        return found | {"image_mask": found["image_mask"].bool()}

    def encoding(self, sample: str) -> Tensor:
        return depth_encoding_of(
            self.pictures(sample),
            self.golden.io[f"{sample}.grids"].tolist(),
            self.shuffle,
            self.depths,
            channels=self.golden.config["hidden_size"],
            alpha=self.golden.config["depth_alpha"],
        )


@pytest.fixture(scope="module", params=[1, 2], ids=["shuffle 1", "shuffle 2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    golden = load_golden(GOLDENS / f"depth_fusion_shuffle{request.param}")
    model = IsaacForConditionalGeneration(IsaacConfig(**golden.config)).eval()
    weights = {n: t for n, t in golden.weights.items() if not n.startswith(DEPTH)}
    model.load_state_dict(weights, strict=True)
    depth_weights = {
        n.removeprefix(DEPTH): t for n, t in golden.weights.items() if n.startswith(DEPTH)
    }
    path = tmp_path_factory.mktemp("depth") / "tiny.pth"
    tiny_depth.write_original(path, depth_weights)
    found = find_depth_checkpoint(path, golden.config["depth_model_transformers"])
    return Case(golden, model, DepthGrids(found, golden.config["depth_input_size"]))


@pytest.mark.parametrize("sample", ["image1", "image2"])
def test_the_encoding_of_raw_pictures_is_the_recorded_one(case: Case, sample: str) -> None:
    found, wanted = case.encoding(sample), case.golden.io[f"{sample}.depth_encoding"]
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sample", SAMPLES)
@torch.no_grad()
def test_with_the_recorded_encoding_the_model_gives_the_recorded_logits(
    case: Case, sample: str
) -> None:
    io, inputs = case.golden.io, case.inputs(sample)
    encoding = io.get(f"{sample}.depth_encoding")
    output = case.model(**inputs, depth_encoding=encoding, labels=io[f"{sample}.labels"])
    logits = case.model(**inputs, depth_encoding=encoding).logits
    torch.testing.assert_close(logits, io[f"{sample}.logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss.view(1), io[f"{sample}.loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sample", ["image1", "image2"])
@torch.no_grad()
def test_end_to_end_the_model_gives_the_recorded_logits(case: Case, sample: str) -> None:
    logits = case.model(**case.inputs(sample), depth_encoding=case.encoding(sample)).logits
    torch.testing.assert_close(logits, case.golden.io[f"{sample}.logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("sample", ["image1", "image2"])
@torch.no_grad()
def test_depth_is_added_behind_the_projector(case: Case, sample: str) -> None:
    io, inputs = case.golden.io, case.inputs(sample)
    tokens = case.model.model.get_image_features(inputs["patches"], inputs["grids"])
    torch.testing.assert_close(tokens, io[f"{sample}.projector"], atol=1e-5, rtol=0)
    fused = case.model.model.get_image_features(
        inputs["patches"], inputs["grids"], depth_encoding=case.encoding(sample)
    )
    places = io[f"{sample}.inputs_embeds"][inputs["image_mask"]]
    torch.testing.assert_close(fused, places, atol=1e-3, rtol=0)
    assert (fused - tokens).abs().max() > 0.9  # depth is not lost


@torch.no_grad()
def test_other_depth_gives_other_logits(case: Case) -> None:
    inputs = case.inputs("image2")
    wanted = case.golden.io["image2.logits"]
    turned = case.encoding("image2").flip(0)
    assert (case.model(**inputs, depth_encoding=turned).logits - wanted).abs().max() > 0.01


@pytest.mark.parametrize("whole", [True, False], ids=["with head", "without"])
@torch.no_grad()
def test_pictures_without_depth_are_an_error_and_not_an_answer(case: Case, whole: bool) -> None:
    model = case.model if whole else case.model.model
    with pytest.raises(DataError, match="came without depth: load it with from_pretrained"):
        model(**case.inputs("image2"))
    features = case.model.model.get_vision_features(
        case.inputs("image2")["patches"], case.inputs("image2")["grids"]
    )
    kept = {name: value for name, value in case.inputs("image2").items() if name != "patches"}
    with pytest.raises(DataError, match="came without depth"):
        model(**kept, vision_features=features)
    model(**case.inputs("text"))


def test_the_grid_before_the_shuffle_is_refused_and_not_cut_to_fit(case: Case) -> None:
    """What the original passes: shuffle² too many rows."""
    inputs = case.inputs("image1")
    values = depth_values_of(case.pictures("image1"), inputs["grids"].tolist(), 1, case.depths)
    encoding = encode_depth(values, case.golden.config["hidden_size"])
    if case.shuffle == 1:
        assert len(encoding) == int(inputs["image_mask"].sum())
    else:
        with pytest.raises(DataError, match="depth_encoding has the shape"):
            case.model(**inputs, depth_encoding=encoding)


def test_a_picture_without_a_grid_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="zip"):
        depth_values_of(case.pictures("image2"), [[2, 2]], 1, case.depths)


def test_a_batch_without_pictures_has_an_empty_encoding(case: Case) -> None:
    assert depth_encoding_of([], [], case.shuffle, case.depths, channels=8).shape == (0, 8)


def test_depth_is_no_part_of_what_the_model_saves(case: Case) -> None:
    case.encoding("image1")
    assert not [name for name in case.model.state_dict() if "depth" in name]
