"""Segmentation models with classes of their own: a new head trains, is saved, loaded and merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lora_models
import numpy as np
import pytest
import tiny_scenes
import torch
from torch import Tensor, nn

from lora_core import load_adapter, save_adapter
from lora_core.errors import CheckpointError, ConfigError, DataError
from scenesplat_lora import evaluate, predict
from scenesplat_lora.adapter_read import AdapterFacts, read_facts
from scenesplat_lora.labelling import Labelling, label_scene
from scenesplat_lora.lora import (
    get_lora_parameters,
    inject_lora_to_ptv3,
    inject_lora_with_preset,
    load_lora_checkpoint,
    mark_only_lora_as_trainable,
    merge_lora_weights,
    remove_lora,
    save_lora_checkpoint,
)
from scenesplat_lora.network.description import Description
from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.official import load_official, write_official
from scenesplat_lora.network.ptv3_config import PTv3Config
from scenesplat_lora.scenes.files import list_scenes, read_scene
from scenesplat_lora.train import main

NAMES = ("wall", "floor", "chair", "table", "lamp")
CONFIG = PTv3Config(**tiny_scenes.SETTINGS)
HEAD = {"seg_head.weight", "seg_head.bias"}


def write_base(path: Path, classes: int | None, config: PTv3Config = lora_models.TINY) -> Path:
    """A language model (classes None) or a segmentation model that describes itself."""
    torch.manual_seed(0)
    net = LangPretrainer(config) if classes is None else DefaultSegmentorV2(config, classes)
    names = None if classes is None else tuple(f"old {number}" for number in range(classes))
    return write_official(path, net.state_dict(), 1, Description(config, 0.05, names))


def trained(base: Path, **options: Any) -> DefaultSegmentorV2:
    model = load_official(base, num_classes=7)
    assert isinstance(model, DefaultSegmentorV2)
    model.class_names = tuple("ABCDEFG")
    inject_lora_to_ptv3(model, r=2, **options)
    mark_only_lora_as_trainable(model)
    lora_models.perturb(model)
    return model


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(lora_models.tiny_batch())


@pytest.fixture(params=[None, 4], ids=["language", "segmentation"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.pth", request.param)


def plain(base: Path) -> nn.Module:
    """What an adapter is loaded on: the base's own model, or one with room for a head."""
    model = load_official(base)
    return model if isinstance(model, DefaultSegmentorV2) else load_official(base, num_classes=7)


# -- from Python -----------------------------------------------------------------------------------


def test_a_new_head_trains_with_lora_and_nothing_else_does(base: Path) -> None:
    model = trained(base)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names >= HEAD
    assert all(".lora_" in name for name in names - HEAD)
    given = {id(parameter) for parameter in get_lora_parameters(model)}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}
    model.train()(lora_models.tiny_batch()).square().sum().backward()
    assert model.seg_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("packing", ["adapter.pth", "folder"])
def test_saved_loaded_and_merged_give_the_same_logits(
    base: Path, packing: str, tmp_path: Path
) -> None:
    model = trained(base, target_modules=["attn", "mlp"])
    expected = run(model)
    assert expected.shape == (150, 7)
    path = tmp_path / packing
    if packing == "folder":
        save_adapter(model, path, metadata={"classes": list("ABCDEFG")})
        assert json.loads((path / "adapter_config.json").read_text())["modules_to_save"] == [
            "seg_head"
        ]
    else:
        save_lora_checkpoint(model, path)
    other = plain(base)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_lora_checkpoint(other, path)
    assert torch.equal(run(other), expected)
    assert other.class_names == tuple("ABCDEFG")
    assert read_facts(path) == AdapterFacts(7, tuple("ABCDEFG"))
    merged = copy.deepcopy(other)
    merge_lora_weights(merged)
    torch.testing.assert_close(run(merged), expected, atol=1e-4, rtol=1e-4)
    assert set(merged.state_dict()) == set(before) | HEAD
    remove_lora(other)
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_peft_itself_reads_the_head(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(base)
    save_adapter(model, tmp_path / "folder")
    other = peft.PeftModel.from_pretrained(load_official(base, num_classes=7), tmp_path / "folder")
    torch.testing.assert_close(run(other), run(model), atol=1e-5, rtol=1e-4)


def test_biases_and_a_head_are_trained_and_saved_together(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    mark_only_lora_as_trainable(model, "all")
    lora_models.perturb(model, scale=0.05)
    other = plain(base)
    load_lora_checkpoint(other, save_lora_checkpoint(model, tmp_path / "a.pth"))
    assert torch.equal(run(other), run(model))


def test_prompts_and_a_head_are_saved_together(base: Path, tmp_path: Path) -> None:
    model = trained(base, enable_prompt=True)
    path = save_lora_checkpoint(model, tmp_path / "a.pth")
    other = plain(base)
    load_lora_checkpoint(other, path)
    assert torch.equal(run(other), run(model))


def test_a_head_without_lora_values_stays_untouched_where_it_is_not_new(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.pth", 7)
    model = inject_lora_with_preset(load_official(base))
    assert not any(p is model.seg_head.weight for p in get_lora_parameters(model))
    remove_lora(model)
    inject_lora_to_ptv3(model, train_head=True)
    assert any(p is model.seg_head.weight for p in get_lora_parameters(model))
    with pytest.raises(ConfigError, match="num_classes"):
        inject_lora_to_ptv3(lora_models.tiny_model(), train_head=True)


def test_new_heads_are_a_function_of_the_seed_and_restored_ones_of_the_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.pth", 4)
    torch.manual_seed(1)
    one = load_official(base, num_classes=7)
    torch.manual_seed(2)
    other = load_official(base, num_classes=7)
    assert torch.equal(one.seg_head.weight, other.seg_head.weight)
    assert one.seg_head.weight.abs().max() <= 16**-0.5
    assert one.seg_head.weight.std() > 0.1
    same = load_official(base, num_classes=4)
    assert not same.new_head
    assert same.class_names == ("old 0", "old 1", "old 2", "old 3")


def test_a_model_without_room_for_the_head_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.pth", None)
    path = save_lora_checkpoint(trained(base), tmp_path / "a.pth")
    model = load_official(base)
    with pytest.raises(CheckpointError, match=r"head of 7 classes.*num_classes=7"):
        load_lora_checkpoint(model, path)
    with pytest.raises(CheckpointError):
        load_adapter(model, path)
    assert set(model.state_dict()) == set(load_official(base).state_dict())


@pytest.mark.parametrize(
    ("name", "shape"), [("bias", (3,)), ("weight", (7,)), ("weight", ()), ("weight", (7, 3))]
)
def test_a_damaged_adapter_leaves_the_old_head(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base.pth", 4)
    path = save_lora_checkpoint(trained(base), tmp_path / "a.pth")
    content = torch.load(path, weights_only=True)
    content["lora_state_dict"][f"seg_head.{name}"] = torch.zeros(shape)
    torch.save(content, path)
    model = load_official(base)
    before = model.seg_head
    with pytest.raises(CheckpointError, match=rf"seg_head\.{name}"):
        load_lora_checkpoint(model, path)
    assert model.seg_head is before
    assert not model.new_head


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_scenes.write_scenes(folder / "data", train=2)
    write_base(folder / "language.pth", None, CONFIG)
    write_base(folder / "segmentation.pth", 4, CONFIG)
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def command(files: Path, kind: str, run: Path, *more: str) -> list[str]:
    return [
        "--options", f"lora_training.pretrained_path={files / f'{kind}.pth'}", f"save_path={run}",
        f"data.train.data_root={files / 'data'}", "epoch=1", "num_worker=0", "device=cpu",
        "lora.r=2", "optimizer.lr=0.01", "tensorboard=false", *more,
    ]  # fmt: skip


def scored(words: list[str], out: Path) -> dict[str, Any]:
    assert evaluate.main([*words, "--output", str(out)]) == 0
    models: dict[str, Any] = json.loads((out / "evaluation.json").read_text())["models"]
    return models


@pytest.mark.parametrize("kind", ["language", "segmentation"])
def test_a_run_trains_a_new_head_and_what_it_writes_agrees(
    files: Path, kind: str, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    more = [f"data.class_names={files / 'names.txt'}", "lora_training.merge_on_end=true"]
    more += ["model.type=DefaultSegmentorV2", "lora_training.save_epoch=1", "data.excluded=wall"]
    assert main(command(files, kind, run_folder, *more)) == 0
    rows = tiny_scenes.rows(run_folder)
    assert float(rows[1]["LovaszLoss"]) > 0
    assert 0 <= float(rows[-1]["fg_mIoU"]) <= 1
    base, best = files / f"{kind}.pth", run_folder / "model" / "lora_best.pth"
    assert read_facts(best) == AdapterFacts(5, NAMES, 0.05)
    merged = load_official(run_folder / "model" / "model_best.pth")
    assert (merged.seg_head.out_features, merged.class_names) == (5, NAMES)
    data = ["--data_root", str(files / "data"), "--vote_k", "3"]
    lora = ["--checkpoint", str(base), "--adapter"]
    whole = ["--checkpoint", str(run_folder / "model" / "model_best.pth")]
    one = scored([*lora, str(best), *data], tmp_path / "one")
    two = scored([*lora, str(run_folder / "adapter"), *data], tmp_path / "two")
    three = scored([*whole, *data], tmp_path / "three")
    assert list(one) == ["LoRA"]  # the base has no such classes
    assert one == two
    assert one["LoRA"] == three["model"]
    assert set(one["LoRA"]["classes"]) == set(NAMES)


def test_a_resumed_run_ends_with_the_same_head(files: Path, tmp_path: Path) -> None:
    more = ["data.num_classes=5", "epoch=2", "lora_training.save_epoch=1"]
    assert main(command(files, "segmentation", tmp_path / "run", *more)) == 0
    last = tmp_path / "run" / "model" / "lora_epoch_2.pth"
    expected = torch.load(last, weights_only=True)["lora_state_dict"]
    last.unlink()
    assert main(["--resume", str(last.with_name("lora_epoch_1.pth"))]) == 0
    found = torch.load(last, weights_only=True)["lora_state_dict"]
    assert found.keys() >= HEAD
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_warm_start_takes_the_head_of_its_adapter(files: Path, tmp_path: Path) -> None:
    model = inject_lora_to_ptv3(load_official(files / "language.pth", num_classes=5), r=2)
    lora_models.perturb(model)
    path = save_lora_checkpoint(model, tmp_path / "start.pth")
    more = [f"adapter={path}", "optimizer.lr=1e-6"]
    assert main(command(files, "language", tmp_path / "run", *more)) == 0
    held = torch.load(tmp_path / "run/model/lora_best.pth", weights_only=True)["lora_state_dict"]
    torch.testing.assert_close(
        held["seg_head.weight"], model.seg_head.weight.detach(), atol=1e-4, rtol=0
    )


def test_a_new_head_needs_an_adapter_with_one_to_go_on_from(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = inject_lora_to_ptv3(load_official(files / "language.pth"), r=2)
    path = save_lora_checkpoint(model, tmp_path / "start.pth")
    more = [f"adapter={path}", "data.num_classes=5"]
    assert main(command(files, "language", tmp_path / "run", *more)) == 2
    assert "has no head to go on with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "more", "part"),
    [
        ("language", ["model.type=DefaultSegmentorV2"], "data.num_classes"),
        ("language", ["model.type=LangPretrainer", "data.num_classes=5"], "DefaultSegmentorV2"),
        ("language", ["data.class_names=names.txt"], "data.text_embeddings"),
        ("segmentation", ["data.class_names=names.txt", "data.num_classes=6"], "5 names"),
        ("segmentation", ["model.type=LangPretrainer"], "seg_head"),
        ("segmentation", ["data.num_classes=2"], "there are 2 classes"),
        ("segmentation", ["data.num_classes=5", "data.excluded=chair"], "excluded"),
    ],
)
def test_what_makes_no_model_is_refused(
    files: Path, kind: str, more: list[str], part: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(files)
    assert main(command(files, kind, tmp_path / "run", *more)) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- labels ----------------------------------------------------------------------------------------


def test_predict_labels_scenes_with_the_models_own_classes(files: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(files / "segmentation.pth"), "--output", str(tmp_path / "out")]
    assert predict.main([*words, "--scenes", str(files / "data" / "val"), "--vote_k", "0"]) == 0
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert told["classes"] == ["old 0", "old 1", "old 2", "old 3"]
    labels = np.load(tmp_path / "out" / "room_0" / "labels.npy")
    scene = read_scene(list_scenes(files / "data", "val")[0])
    model = load_official(files / "segmentation.pth")
    assert np.array_equal(labels, label_scene(model, scene, None, Labelling(0.025, 0.05)))
    assert labels.min() >= 0


def test_labels_are_those_of_the_largest_logit(files: Path) -> None:
    model = load_official(files / "segmentation.pth")
    nn.init.zeros_(model.seg_head.weight)
    model.seg_head.bias.data = torch.tensor([0.0, -5.0, 0.1, 0.05])
    scene = read_scene(list_scenes(files / "data", "val")[0])
    assert (label_scene(model, scene, None, Labelling(0.025, 0.05)) == 2).all()


def test_a_network_with_normals_is_given_them(files: Path, tmp_path: Path) -> None:
    config = PTv3Config(**{**tiny_scenes.SETTINGS, "in_channels": 14})
    base = write_base(tmp_path / "base.pth", 4, config)
    words = ["--checkpoint", str(base), "--output", str(tmp_path / "out")]
    data = tiny_scenes.write_scenes(tmp_path / "data", train=0)
    normal = data / "val" / "room_0" / "normal.npy"
    normal.rename(tmp_path / "normal.npy")
    with pytest.raises(DataError, match=r"normal\.npy"):
        predict.main([*words, "--scenes", str(data)])
    (tmp_path / "normal.npy").rename(normal)
    assert predict.main([*words, "--scenes", str(data), "--overwrite"]) == 0


def test_texts_belong_to_language_models(files: Path, tmp_path: Path) -> None:
    words = ["--data_root", str(files / "data"), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--text is needed"):
        evaluate.main(["--checkpoint", str(files / "language.pth"), *words])
    texts = str(tiny_scenes.write_texts(tmp_path / "texts.npz"))
    with pytest.raises(ConfigError, match="leave --text out"):
        evaluate.main(["--checkpoint", str(files / "segmentation.pth"), "--text", texts, *words])
    names = ["--names", str(files / "names.txt")]
    with pytest.raises(ConfigError, match="5 names, the model 4 classes"):
        evaluate.main(["--checkpoint", str(files / "segmentation.pth"), *names, *words])


def test_a_head_of_as_many_classes_is_scored_beside_the_bases(files: Path, tmp_path: Path) -> None:
    model = load_official(files / "segmentation.pth")
    inject_lora_to_ptv3(model, r=2, train_head=True)
    lora_models.perturb(model, scale=1.0)
    path = save_lora_checkpoint(model, tmp_path / "a.pth")
    data = tmp_path / "data" / "val" / "room_0"
    scene = read_scene(list_scenes(files / "data", "val")[0])
    data.mkdir(parents=True)
    for file in (files / "data" / "val" / "room_0").glob("*.npy"):
        np.save(data / file.name, np.load(file))
    np.save(data / "segment.npy", np.minimum(scene["segment"], 3))
    words = ["--checkpoint", str(files / "segmentation.pth"), "--data_root", str(tmp_path / "data")]
    both = scored([*words, "--adapter", str(path)], tmp_path / "both")
    assert list(both) == ["base", "LoRA"]
    assert both["base"] != both["LoRA"]
    assert both["base"] == scored(words, tmp_path / "alone")["model"]
