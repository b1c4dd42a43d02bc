"""A model that is loaded with depth uses it in every answer, or says why it cannot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_depth
import torch
from recorded_isaac import CASE, padded, recorded_model, sample

from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.fusion import depth_encoding_of
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core.errors import CheckpointError, ConfigError, DataError

SETTINGS: dict[str, Any] = {"use_depth": True, "depth_input_size": tiny_depth.SIZE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of the network, and one of the depth model."""
    here = tmp_path_factory.mktemp("models")
    recorded_model().save_pretrained(here / "isaac")
    return here / "isaac", tiny_depth.write_folder(here / "depth")


@pytest.fixture(scope="module")
def with_depth(folders: tuple[Path, Path]) -> IsaacForConditionalGeneration:
    isaac, depth = folders
    return IsaacForConditionalGeneration.from_pretrained(
        isaac, depth_checkpoint_path=str(depth), depth_alpha=3.0, **SETTINGS
    )


def pictures(*names: str) -> list[np.ndarray]:
    """One for each image of the samples, which need not be what the patches show."""
    count = sum(len(CASE.io[f"{name}.grids"]) for name in names)
    return [
        np.random.default_rng(i).integers(0, 255, (40 + i, 50, 3), np.uint8) for i in range(count)
    ]


@torch.no_grad()
def test_pictures_give_the_encoding_of_their_depth(
    with_depth: IsaacForConditionalGeneration, folders: tuple[Path, Path]
) -> None:
    shown, inputs = pictures("image2"), sample("image2")
    assert isinstance(with_depth.depth, DepthGrids)
    encoding = depth_encoding_of(shown, inputs["grids"].tolist(), 2, with_depth.depth, 64, 3.0)
    expected = recorded_model()(**inputs, depth_encoding=encoding).logits
    assert torch.equal(with_depth(**inputs, pictures=shown).logits, expected)
    assert (expected - CASE.io["image2.logits"]).abs().max() > 0.01


def test_answers_use_depth_and_every_prompt_its_own(
    with_depth: IsaacForConditionalGeneration,
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    batch = padded(("image2", "text", "image1"), "left")
    del batch["labels"]
    shown = pictures("image2", "image1")
    together = with_depth.generate(**batch, pictures=shown, num_beams=2, **settings)[:, -5:]
    for row, name, own in ((0, "image2", shown[:2]), (2, "image1", shown[2:])):
        alone = with_depth.generate(**sample(name), pictures=own, num_beams=2, **settings)
        assert torch.equal(together[row], alone[0, -5:])
    greedy = with_depth.generate(**sample("image1"), pictures=shown[2:], **settings)[0, -5:]
    assert not torch.equal(greedy, CASE.io["image1.greedy_time_axis.tokens"])


def test_without_pictures_there_is_no_answer_and_text_needs_none(
    with_depth: IsaacForConditionalGeneration,
) -> None:
    for call in (with_depth, with_depth.generate):
        with pytest.raises(DataError, match=r"loaded with depth.*keep_pictures=True"):
            call(**sample("image1"))
        with pytest.raises(DataError, match="has 1 picture for the depth of the 2 images"):
            call(**sample("image2"), pictures=pictures("image1"))
    with torch.no_grad():
        assert torch.equal(with_depth(**sample("text")).logits, CASE.io["text.logits"])


def test_pictures_for_a_model_without_depth_are_refused() -> None:
    with pytest.raises(DataError, match="which this model was loaded without"):
        recorded_model()(**sample("image1"), pictures=pictures("image1"))


def test_depth_is_in_no_state_and_stays_in_float32(
    folders: tuple[Path, Path], with_depth: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    assert set(with_depth.state_dict()) == set(CASE.weights)
    isaac, depth = folders
    half = IsaacForConditionalGeneration.from_pretrained(
        isaac, depth_checkpoint_path=str(depth), dtype=torch.bfloat16, **SETTINGS
    )
    assert half.depth is not None
    network = half.depth.estimator().network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    half(**sample("image1"), pictures=pictures("image1"))
    half.save_pretrained(tmp_path)
    again = IsaacForConditionalGeneration.from_pretrained(tmp_path)  # its config names the depth
    assert again.config.use_depth
    assert again.depth is not None


def test_depth_that_cannot_be_had_stops_the_loading(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    isaac, depth = folders
    load = IsaacForConditionalGeneration.from_pretrained
    with pytest.raises(ConfigError, match="no depth_checkpoint_path is given"):
        load(isaac, use_depth=True)
    with pytest.raises(ConfigError, match="but use_depth is not given"):
        load(isaac, depth_checkpoint_path=str(depth))
    with pytest.raises(CheckpointError, match=r"no checkpoint .*/no: looked at"):
        load(tmp_path / "never read", use_depth=True, depth_checkpoint_path=str(tmp_path / "no"))
    with pytest.raises(ConfigError, match="71"):
        load(isaac, use_depth=True, depth_checkpoint_path=str(depth), depth_input_size=71)
    without = load(isaac, use_depth=False, depth_checkpoint_path=str(depth))
    assert without.depth is None
