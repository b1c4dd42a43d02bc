"""The model folder: every packing in, strictly, and every misfit named before weights are read."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_depth
import torch
from recorded_isaac import GOLDENS, recorded_model, sample
from safetensors.torch import load_file, save_file
from torch import Tensor

from isaac_lora import model as run_model
from isaac_lora.adapter_files import read_adapter, save_adapter
from isaac_lora.config import Config
from isaac_lora.depth.settings import write_depth_settings
from isaac_lora.lora import lora_parameters
from isaac_lora.model_options import ModelOptions
from isaac_lora.official import check_folder, find_model, load_model, read_config
from lora_core.errors import CheckpointError, ConfigError, DataError

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its tokenizer, which nobody changes."""
    folder = tmp_path_factory.mktemp("models") / "isaac_model"
    recorded_model().save_pretrained(folder)
    for file in (GOLDENS / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(source, tmp_path / "isaac_model"))


def config(folder: Path, **settings: Any) -> Config:
    needed = {"model_path": str(folder), "data_path": "d.json", "output_dir": "o"}
    return Config(**(needed | {"lora_r": 4, "lora_alpha": 8.0} | settings))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})


def set_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(**sample("image1")).logits
    return out


# -- what is read --------------------------------------------------------------------------------


def test_one_file_and_shards_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    recorded_model().save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    wanted = logits(recorded_model())
    for place in (folder, tmp_path / "shards"):
        model = load_model(place)
        assert not model.training
        assert torch.equal(logits(model), wanted)


def test_weights_are_read_in_the_dtype_that_is_asked_for(source: Path) -> None:
    model = load_model(source, torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_code_and_other_models_of_the_folder_are_left_alone(folder: Path) -> None:
    (folder / "modular_isaac.py").write_text("raise SystemExit('executed')")
    set_config(folder, auto_map={"AutoModel": "modular_isaac.IsaacModel"}, use_depth=True)
    change(
        folder, lambda tensors: tensors.update({"model.depth_model.pretrained.a": torch.ones(1)})
    )
    check_folder(folder)
    model = load_model(folder)
    assert model.depth is None
    assert not model.config.use_depth


def test_a_head_that_is_the_embedding_need_not_be_in_the_file(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- what is refused -----------------------------------------------------------------------------


def test_what_is_no_model_folder_is_told(folder: Path, tmp_path: Path) -> None:
    for place, said in (
        ("PerceptronAI/Isaac-0.1", "nothing is downloaded here"),
        (folder / "missing", "no checkpoint"),
        (folder / "config.json", "is a file"),
        (tmp_path, "a model folder needs"),
    ):
        with pytest.raises(CheckpointError, match=said):
            find_model(place)
    (folder / FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Pickled weights are not read"):
        find_model(folder)


def test_an_adapter_beside_the_model_or_in_place_of_it_is_told(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a LoRA adapter .*--model_path.*--adapter"):
        load_model(folder)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="This is a LoRA adapter: pass it as --adapter"):
        find_model(tmp_path)


def test_a_folder_of_shards_without_settings_is_not_told_to_do_without_shards(
    tmp_path: Path,
) -> None:
    recorded_model().save_pretrained(tmp_path, max_shard_size="300KB")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs config\.json and .*shards") as caught:
        find_model(tmp_path)
    assert "shards are not read" not in str(caught.value)


def test_missing_shards_and_a_wrong_list_are_told(tmp_path: Path) -> None:
    recorded_model().save_pretrained(tmp_path, max_shard_size="300KB")
    index = json.loads((tmp_path / INDEX).read_text())
    places = index["weight_map"]
    other = next(file for file in places.values() if file != places["lm_head.weight"])
    wrong = index | {"weight_map": places | {"lm_head.weight": other}}
    (tmp_path / INDEX).write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match="list of shards and the shards differ"):
        check_folder(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="files of other folders"):
        find_model(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        find_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "qwen3"}, "model_type is 'qwen3', expected 'isaac'"),
        ({"pixel_shuffle_scale": 4}, "pixel_shuffle_scale is 4"),
        ({"hidden_size": "wide"}, "makes no Isaac"),
    ],
)
def test_settings_of_no_isaac_are_refused(
    folder: Path, settings: dict[str, Any], said: str
) -> None:
    set_config(folder, **settings)
    with pytest.raises(CheckpointError, match=said):
        read_config(folder)


@pytest.mark.fault("C26")
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda t: t.update(strange=torch.ones(1)), "1 unexpected: strange"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"\[3\] instead of \[64\]"),
        (
            lambda t: t.update({"model.language_model.norm.weight": t.pop("model.norm.weight")}),
            "names of a later port",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "do not train on quantised weights",
        ),
    ],
    ids=["missing", "unexpected", "shape", "port", "quantised"],
)
def test_tensors_of_another_model_are_refused_by_their_headers(
    folder: Path, edit: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=said):
        check_folder(folder)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


def test_loading_writes_nothing_to_the_terminal(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(source)
    assert capfd.readouterr() == ("", "")


def test_values_that_are_not_finite_are_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    check_folder(folder)
    with pytest.raises(CheckpointError, match="NaN"):
        load_model(folder)


# -- a run's model -------------------------------------------------------------------------------


def test_a_run_trains_its_adapters_on_a_frozen_base(source: Path, tmp_path: Path) -> None:
    cfg = config(source, lora_bias="none", gradient_checkpointing=True)
    run_model.glance(cfg)
    base = run_model.build(cfg)
    assert base.is_activation_checkpointing
    assert not lora_parameters(base)
    model = run_model.adapted(base, cfg)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    folder = save_adapter(model, tmp_path / "adapter")
    again = config(source, adapter=str(folder))
    run_model.glance(again)
    warm = run_model.adapted(run_model.build(again), again)
    assert len(lora_parameters(warm)) == len(lora_parameters(model))
    assert len(run_model.fingerprint(cfg)) == 64


def test_a_run_says_which_parts_it_adapts(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(source)
    run_model.adapted(run_model.build(cfg), cfg)
    assert "adapted layers: decoder 14, projector 2" in capsys.readouterr().out


def test_a_run_with_depth_refuses_images_without_and_keeps_its_settings(
    source: Path, tmp_path: Path
) -> None:
    depth = tiny_depth.write_folder(tmp_path / "depth")
    cfg = config(
        source,
        use_depth=True,
        depth_checkpoint_path=str(depth),
        depth_alpha=3.0,
        depth_input_size=tiny_depth.SIZE,
    )
    run_model.glance(cfg)
    model = run_model.adapted(run_model.build(cfg), cfg)
    with pytest.raises(DataError, match="with depth"):
        logits(model)
    save_adapter(model, tmp_path / "adapter")
    trained = read_adapter(tmp_path / "adapter").depth
    assert trained is not None
    assert (trained.alpha, trained.input_size) == (3.0, tiny_depth.SIZE)
    again = config(source, adapter=str(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match="was trained with depth"):
        run_model.adapted(run_model.build(again), again)


def merged_with_depth(folder: Path, depth: Path) -> dict[str, Any]:
    """Make a folder look like one that was merged with depth; returns the settings of a run."""
    settings = {
        "use_depth": True,
        "depth_checkpoint_path": str(depth),
        "depth_alpha": 3.0,
        "depth_input_size": tiny_depth.SIZE,
    }
    depths = run_model.depths_of(config(folder, **settings))
    assert depths is not None
    write_depth_settings(folder, depths.settings(3.0))
    return settings


def test_a_base_that_was_merged_with_depth_is_compared_with_the_run(
    folder: Path, tmp_path: Path
) -> None:
    settings = merged_with_depth(folder, tiny_depth.write_folder(tmp_path / "depth"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
        assert run_model.build(config(folder, **settings)).depth is not None
    with pytest.warns(UserWarning, match="trained with depth .* and is used without"):
        assert run_model.build(config(folder)).depth is None
    with pytest.raises(CheckpointError, match="depth_alpha: trained with 3, used with 5"):
        run_model.build(config(folder, **(settings | {"depth_alpha": 5.0})))


def test_a_damaged_depth_json_is_told_before_weights_are_read(folder: Path) -> None:
    (folder / "depth.json").write_text("{}")
    with pytest.raises(CheckpointError, match="depth_alpha is missing"):
        run_model.glance(config(folder))


def test_an_adapter_of_another_model_is_told_before_weights_are_read(
    source: Path, tmp_path: Path
) -> None:
    cfg = config(source)
    model = run_model.adapted(run_model.build(cfg), cfg)
    folder = save_adapter(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    short = {name: tensor[:, :-1].clone() for name, tensor in tensors.items()}
    save_file(short, folder / "adapter_model.safetensors", {"format": "pt"})
    for check in (
        lambda: run_model.glance(config(source, adapter=str(folder))),
        ModelOptions(model_path=str(source), adapter=str(folder)).glance,
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            check()


@pytest.mark.fault("C25")
def test_all_that_is_wrong_is_told_before_weights_are_read(folder: Path) -> None:
    change(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))  # not looked at
    for file in (GOLDENS / "tokenizer").iterdir():
        (folder / file.name).unlink()
    cfg = config(
        folder,
        target_modules="q_prj",
        use_depth=True,
        depth_checkpoint_path=str(folder / "depth.pth"),
    )
    with pytest.raises((CheckpointError, ConfigError)) as told:
        run_model.glance(cfg)
    for said in ("no tokenizer", "did you mean 'q_proj'", "depth.pth"):
        assert said in str(told.value)


def test_a_depth_checkpoint_that_is_not_used_is_said(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_model.glance(config(source, depth_checkpoint_path="depth_anything_v2_vits.pth"))
    assert "without --use_depth True images have no depth" in capsys.readouterr().out


def test_a_missing_adapter_and_a_missing_model_are_told_together(tmp_path: Path) -> None:
    cfg = config(tmp_path / "nowhere", adapter=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError) as told:
        run_model.glance(cfg)
    assert "gone does not exist" in str(told.value)
    assert "nowhere" in str(told.value)
