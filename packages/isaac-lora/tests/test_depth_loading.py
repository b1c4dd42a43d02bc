"""The depth of an adapter travels with it, and is what its pictures get wherever it is loaded."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_depth
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from recorded_isaac import recorded_model, sample

from isaac_lora.depth.settings import FILE, read_depth_settings, write_depth_settings
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core.errors import CheckpointError, ConfigError, DataError

ALPHA = 3.0
SETTINGS: dict[str, Any] = {"depth_alpha": ALPHA, "depth_input_size": tiny_depth.SIZE}
PICTURE = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)
load = IsaacForConditionalGeneration.from_pretrained


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """Those that a test does not expect are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def isaac(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the network."""
    folder = tmp_path_factory.mktemp("models") / "isaac"
    recorded_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def depth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the depth model."""
    return tiny_depth.write_folder(tmp_path_factory.mktemp("models") / "depth")


@pytest.fixture
def model(isaac: Path, depth: Path) -> IsaacForConditionalGeneration:
    return load(isaac, use_depth=True, depth_checkpoint_path=depth, **SETTINGS)


@pytest.fixture
def adapted(model: IsaacForConditionalGeneration) -> PeftModel:
    """With an adapter of PEFT that changes answers."""
    torch.manual_seed(1)
    names = ["model.layers.0.self_attn.q_proj", "model.vision_embedding.3"]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


@pytest.fixture
def adapter(adapted: PeftModel, tmp_path: Path) -> Path:
    """Its folder."""
    adapted.save_pretrained(str(tmp_path / "adapter"))
    write_depth_settings(tmp_path / "adapter", adapted.get_base_model().depth_settings())
    return tmp_path / "adapter"


def other_depth(folder: Path) -> Path:
    """A depth model with other weights."""
    path = tiny_depth.write_folder(folder)
    tensors = {name: tensor + 0.01 for name, tensor in tiny_depth.renamed().items()}
    tiny_depth.safetensors.torch.save_file(tensors, path / "model.safetensors")
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**sample("image1"), pictures=[PICTURE]).logits
    return found


# -- adapters --------------------------------------------------------------------------------------


def test_an_adapters_folder_brings_its_depth_but_for_the_place_of_the_checkpoint(
    adapted: PeftModel, adapter: Path, depth: Path
) -> None:
    again = load(adapter, depth_checkpoint_path=depth)
    assert again.config.depth_alpha == ALPHA
    assert again.depth_settings() == read_depth_settings(adapter)
    assert torch.equal(logits(again), logits(adapted))


def test_an_adapters_folder_without_a_checkpoint_is_refused(adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"trained with depth from depth \(depth.json\), but no"):
        load(adapter)


def test_an_adapters_folder_with_other_depth_is_refused(
    adapter: Path, depth: Path, tmp_path: Path
) -> None:
    (adapter / "adapter_config.json").unlink()  # all is told before the base is looked for
    with pytest.raises(CheckpointError, match="depth_alpha: trained with 3, used with 4"):
        load(adapter, depth_checkpoint_path=depth, depth_alpha=4)
    with pytest.raises(CheckpointError, match="depth_checkpoint_path: trained with depth"):
        load(adapter, depth_checkpoint_path=other_depth(tmp_path / "other"))


def test_an_adapter_with_depth_can_be_used_without_but_not_silently(adapter: Path) -> None:
    with pytest.warns(UserWarning, match="trained with depth .* and is used without"):
        without = load(adapter, use_depth=False)
    assert without.depth is None
    assert not without.config.use_depth


def test_loading_an_adapter_into_a_model_compares_their_depth(
    model: IsaacForConditionalGeneration, adapted: PeftModel, adapter: Path, isaac: Path
) -> None:
    wanted = logits(adapted)
    same = load(
        isaac, use_depth=True, depth_checkpoint_path=model.depth.checkpoint.path, **SETTINGS
    )
    same.load_adapter(adapter)
    assert torch.equal(logits(same), wanted)
    with pytest.warns(UserWarning, match="is used without"):
        load(isaac).load_adapter(str(adapter))
    other = read_depth_settings(adapter)
    write_depth_settings(adapter, type(other)(**{**vars(other), "input_size": 98}))
    with pytest.raises(CheckpointError, match="depth_input_size: trained with 98"):
        model.load_adapter(adapter, adapter_name="other")


def test_an_adapter_without_depth_on_a_model_with_depth_warns(
    adapted: PeftModel, adapter: Path, model: IsaacForConditionalGeneration
) -> None:
    write_depth_settings(adapter, None)
    assert not (adapter / FILE).exists()
    with pytest.warns(UserWarning, match="trained without depth"):
        adapted.unload().load_adapter(adapter)


def test_stock_peft_gives_the_pictures_their_depth(
    adapted: PeftModel, adapter: Path, isaac: Path, depth: Path
) -> None:
    base = load(isaac, use_depth=True, depth_checkpoint_path=depth, **SETTINGS)
    again = PeftModel.from_pretrained(base, adapter).eval()
    wanted = logits(adapted)
    assert torch.equal(logits(again), wanted)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pictures": [PICTURE]}
    answer = again.generate(**sample("image1"), **settings)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)
    assert torch.equal(merged.generate(**sample("image1"), **settings), answer)
    with pytest.raises(DataError, match="loaded with depth"):
        merged(**sample("image1"))


# -- model folders ---------------------------------------------------------------------------------


def test_a_saved_model_keeps_its_depth_and_refuses_another(
    model: IsaacForConditionalGeneration, depth: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert again.depth_settings() == model.depth_settings()
    assert torch.equal(logits(again), logits(model))
    moved = load(tmp_path / "merged", depth_checkpoint_path=str(depth))  # use_depth is known
    assert moved.config.use_depth
    with pytest.raises(CheckpointError, match="trained with other depth than is used now"):
        load(tmp_path / "merged", depth_checkpoint_path=other_depth(tmp_path / "other"))


def test_a_model_that_is_saved_without_depth_leaves_no_old_depth_behind(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    recorded_model().save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    assert load(tmp_path).depth is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"use_depth": True}, "use_depth is on, but no depth_checkpoint_path is given"),
        ({"use_depth": True, "depth_checkpoint_path": "gone.pth"}, "no checkpoint gone.pth"),
        ({"use_depth": True, "depth_checkpoint_path": 1, "depth_alpha": -1}, "depth_alpha -1"),
    ],
)
def test_depth_that_cannot_be_had_is_told_before_the_weights_are_read(
    isaac: Path, depth: Path, tmp_path: Path, written: dict[str, Any], message: str
) -> None:
    config = json.loads((isaac / "config.json").read_text()) | written
    if config["depth_checkpoint_path"] == 1:
        config["depth_checkpoint_path"] = str(depth)
    (tmp_path / "config.json").write_text(json.dumps(config))  # and no weights beside it
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_depth": False}))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(tmp_path)


def test_a_model_made_from_a_configuration_has_depth_only_once_it_is_given(
    model: IsaacForConditionalGeneration,
) -> None:
    made = IsaacForConditionalGeneration(model.config).eval()
    made.load_state_dict(model.state_dict())
    with pytest.raises(DataError, match="came without depth"):
        made(**sample("image1"))
    made.depth = model.depth
    assert torch.equal(logits(made), logits(model))


def test_copies_of_a_model_have_its_depth(model: IsaacForConditionalGeneration) -> None:
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.gpu
def test_the_depth_model_goes_where_the_network_goes(model: IsaacForConditionalGeneration) -> None:
    wanted, estimator = logits(model), model.depth.estimator()
    model.cuda()
    inputs = {name: value.cuda() for name, value in sample("image1").items()}
    with torch.no_grad():
        found = model(**inputs, pictures=[PICTURE]).logits
    assert model.depth.estimator() is estimator
    assert estimator.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-3, rtol=0)
