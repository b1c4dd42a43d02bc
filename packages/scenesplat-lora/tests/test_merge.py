"""From an adapter to a merged checkpoint: official names, untouched tensors, the same results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_models
import pytest
import tiny_scenes
import torch
import use_fixtures
from safetensors.torch import load_file
from torch import Tensor

from lora_core.config import parse
from lora_core.errors import CheckpointError, ConfigError, NumericError
from lora_core.injection import adapters_off, lora_layers
from lora_core.merged_file import same_bits
from scenesplat_lora import __main__ as program
from scenesplat_lora import artifacts, model
from scenesplat_lora import export as x
from scenesplat_lora.config import Config
from scenesplat_lora.lora import (
    inject_lora_to_ptv3,
    mark_only_lora_as_trainable,
    save_lora_checkpoint,
)
from scenesplat_lora.network.models import DefaultSegmentorV2
from scenesplat_lora.network.official import load_official, read_official, write_official
from scenesplat_lora.network.ptv3_config import PTv3Config

CONFIG = PTv3Config(**tiny_scenes.SETTINGS)
CLASSES = 5


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_scenes.write_base(tmp_path / "base.pth")


def state(path: Path) -> dict[str, Tensor]:
    return read_official(path).tensors


def adapted(path: Path, classes: int | None = None, **given: Any) -> Any:
    """A base with LoRA, and what trains with it, at other values than the first ones."""
    net: Any = load_official(path, config=CONFIG, num_classes=classes)
    inject_lora_to_ptv3(net, 4, 8, **given)
    lora_models.perturb(net)
    return net


def changed(path: Path, before: dict[str, Tensor]) -> set[str]:
    return {n for n, t in state(path).items() if n not in before or not same_bits(t, before[n])}


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.fault("K36", "K42")
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["merged.pth", "merged.safetensors"])
def test_the_merged_file_has_the_official_names_and_does_what_the_adapted_model_does(
    prefix: str, name: str, tmp_path: Path
) -> None:
    path = tiny_scenes.write_base(tmp_path / "base.pth")
    before = state(path)
    write_official(path, {prefix + key: tensor for key, tensor in before.items()}, epoch=7)
    live = adapted(path).train()
    kept = {key: tensor.clone() for key, tensor in live.state_dict().items()}
    merged = x.export(live, read_official(path), tmp_path / name, grid_size=0.05)
    assert merged.difference <= 1e-5
    assert live.training
    assert all(torch.equal(kept[key], tensor) for key, tensor in live.state_dict().items())

    content = torch.load(tmp_path / name, weights_only=True) if name.endswith("pth") else None
    own = load_file(tmp_path / name) if content is None else content["state_dict"]
    assert own.keys() == {prefix + key for key in before}
    assert content is None or content["epoch"] == 7
    adapted_keys = {f"{layer}.weight" for layer in lora_layers(live)}
    assert changed(tmp_path / name, before) == adapted_keys
    assert (merged.tensors, merged.changed) == (len(before), len(adapted_keys))
    with adapters_off(live):
        assert x.compare(live, load_official(tmp_path / name)) > 1e-3, "LoRA does nothing"
    said = read_official(tmp_path / name).description
    assert said is not None
    assert (said.backbone, said.grid_size) == (CONFIG, 0.05)


def test_trained_biases_are_merged_too(base: Path) -> None:
    live = adapted(base)
    mark_only_lora_as_trainable(live, bias="all")
    lora_models.perturb(live)
    x.export(live, read_official(base), base.parent / "merged.pth")
    biases = {name for name in state(base) if name.endswith(".bias")}
    assert biases <= changed(base.parent / "merged.pth", state(base))


@pytest.mark.parametrize("own", [None, CLASSES, 9], ids=["language model", "same number", "other"])
def test_a_new_head_is_in_the_merged_model(own: int | None, tmp_path: Path) -> None:
    """The base may be the language model, without any head, or have one of other classes."""
    path = tiny_scenes.write_base(tmp_path / "base.pth", classes=own)
    live: Any = load_official(path, config=CONFIG, num_classes=CLASSES)
    inject_lora_to_ptv3(live, 4, 8, train_head=True)
    lora_models.perturb(live)
    live.class_names = tiny_scenes.CLASSES
    save_lora_checkpoint(live, tmp_path / "adapter.pth")
    write_settings(tmp_path / "tiny.py")
    words = command(path, tmp_path / "adapter.pth", tmp_path / "merged.pth")
    assert program.main([*words, "--network", str(tmp_path / "tiny.py")]) == 0
    merged = load_official(tmp_path / "merged.pth")
    assert isinstance(merged, DefaultSegmentorV2)
    assert merged.seg_head.out_features == CLASSES
    assert merged.class_names == tiny_scenes.CLASSES
    assert x.compare(live, merged) <= 1e-5
    content = torch.load(tmp_path / "merged.pth", weights_only=True)["state_dict"]
    assert list(content)[:2] == ["seg_head.weight", "seg_head.bias"]


@pytest.mark.fault("K42")
@pytest.mark.parametrize("dtype", ["fp32", "keep"])
def test_a_half_precision_base_is_merged_exactly_or_kept_small(base: Path, dtype: Any) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in state(base).items()}
    write_official(base, half)
    merged = x.export(adapted(base), read_official(base), base.parent / "merged.pth", dtype=dtype)
    found = state(base.parent / "merged.pth")
    wanted = torch.float32 if dtype == "fp32" else torch.float16
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {wanted}
    worst = merged.difference
    assert worst <= 1e-5 if dtype == "fp32" else 1e-5 < worst < 1e-1


@pytest.mark.fault("K36")
def test_a_file_with_other_outputs_is_not_kept(base: Path) -> None:
    live = adapted(base)
    live.backbone.embedding.stem["norm"].eps = 10.0  # what no file tells
    with pytest.raises(NumericError, match="other outputs than the adapted model"):
        x.export(live, read_official(base), base.parent / "merged.pth")
    assert {path.name for path in base.parent.iterdir()} == {"base.pth", "base.json"}


@pytest.mark.fault("K38")
def test_values_that_are_not_finite_are_never_merged(base: Path) -> None:
    live = adapted(base)
    with torch.no_grad():
        live.backbone.enc.enc0.block0.attn.qkv.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"enc0\.block0\.attn\.qkv"):
        x.export(live, read_official(base), base.parent / "merged.pth")
    assert not (base.parent / "merged.pth").exists()


# -- the command -----------------------------------------------------------------------------------


def command(base: Path, adapter: Path, output: Path, *more: str) -> list[str]:
    paths = {"checkpoint": base, "adapter": adapter, "output": output}
    return ["merge", *(w for name, path in paths.items() for w in (f"--{name}", str(path))), *more]


def write_settings(path: Path) -> None:
    fields = ", ".join(f"{name}={value!r}" for name, value in tiny_scenes.BACKBONE.items())
    path.write_text(f'model = dict(backbone=dict(type="PT-v3m1", {fields}))\n')


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that needs its settings, LoRA for it, texts, and a labelled room."""
    folder = tmp_path_factory.mktemp("use")
    use_fixtures.write_model(folder)
    adapted = inject_lora_to_ptv3(use_fixtures.model())
    lora_models.perturb(adapted)
    save_lora_checkpoint(adapted, folder / "adapter.pth")
    use_fixtures.write_rooms(folder / "data", count=1)
    return folder


def network(files: Path) -> list[str]:
    return ["--network", str(files / "tiny.py")]


def test_the_merged_model_scores_as_base_and_adapter_without_any_settings(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(files / "base.pth", files / "adapter.pth", tmp_path / "merged.pth")
    assert program.main([*words, *network(files)]) == 0
    assert "of them changed; read back" in capsys.readouterr().out
    base = ["--checkpoint", str(files / "base.pth"), *network(files)]
    scores = [
        scored(files, tmp_path / "a", [*base, "--adapter", str(files / "adapter.pth")])["LoRA"],
        scored(files, tmp_path / "b", ["--checkpoint", str(tmp_path / "merged.pth")])["model"],
        scored(files, tmp_path / "c", base)["model"],
    ]
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]


def scored(files: Path, output: Path, words: list[str]) -> dict[str, Any]:
    argv = ["evaluate", *words, "--text", str(files / "classes.npz"), *use_fixtures.GRIDS]
    argv += ["--data_root", str(files / "data"), "--output", str(output)]
    argv += ["--compare_base", "false"] if "--adapter" in words else []
    assert program.main(argv) == 0
    models: dict[str, Any] = json.loads((output / "evaluation.json").read_text())["models"]
    return models


def test_the_voxels_of_the_training_are_in_the_file(files: Path, tmp_path: Path) -> None:
    live: Any = load_official(files / "base.pth", config=use_fixtures.CONFIG)
    inject_lora_to_ptv3(live)
    facts = {"settings": {"data.grid_size": 0.07}}
    save_lora_checkpoint(live, tmp_path / "adapter.pth", facts)
    words = command(files / "base.pth", tmp_path / "adapter.pth", tmp_path / "merged.safetensors")
    assert program.main([*words, *network(files)]) == 0
    said = read_official(tmp_path / "merged.safetensors").description
    assert said is not None
    assert said.grid_size == 0.07


def test_what_cannot_be_merged_is_told_together_and_leaves_everything(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live: Any = load_official(files / "base.pth", config=use_fixtures.CONFIG)
    save_lora_checkpoint(inject_lora_to_ptv3(live, enable_prompt=True), tmp_path / "prompts.pth")
    output = tmp_path / "there.pth"
    output.write_bytes(b"mine")
    words = command(files / "base.pth", tmp_path / "prompts.pth", output)
    assert program.main([*words, *network(files)]) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error
    assert "prompt MLPs, which cannot be merged into weights" in error
    assert output.read_bytes() == b"mine"


@pytest.mark.parametrize("which", ["base.pth", "adapter.pth"])
def test_inputs_are_never_replaced(
    which: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.pth"
    link.symlink_to(files / which)
    for output in (files / which, link):
        before = (files / which).read_bytes()
        words = command(files / "base.pth", files / "adapter.pth", output, "--overwrite")
        assert program.main([*words, *network(files)]) == 2
        assert "choose another one" in capsys.readouterr().err
        assert (files / which).read_bytes() == before


def test_what_is_missing_or_of_another_model_is_named(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_scenes.write_base(tmp_path / "other.pth")
    write_settings(tmp_path / "other.py")
    base, adapter, output = files / "base.pth", files / "adapter.pth", tmp_path / "m.pth"
    cases = {
        "neither released shape": command(base, adapter, output),
        "absent.pth": command(base, tmp_path / "absent.pth", output),
        "lora_A": [*command(other, adapter, output), "--network", str(tmp_path / "other.py")],
        "name a file that ends in": command(base, adapter, tmp_path / "m.onnx"),
    }
    for part, words in cases.items():
        assert program.main(words) == 2
        assert part in capsys.readouterr().err, part
    assert {path.name for path in tmp_path.iterdir()} == {"other.pth", "other.json", "other.py"}


def test_a_merge_at_the_end_of_a_training_needs_the_base_that_it_began_with(base: Path) -> None:
    words = tiny_scenes.command(base, base.parent / "data", base.parent / "run")
    cfg = parse(Config, words, prog="t")
    net = model.adapted(model.build(cfg), cfg)
    path = base.parent / "run" / "model_best.pth"
    artifacts.write_whole(net, cfg, path, epoch=3)
    assert read_official(path).epoch == 3
    write_official(base, {n: t + 1 if t.is_floating_point() else t for n, t in state(base).items()})
    with pytest.raises(CheckpointError, match="has changed since the model was built"):
        artifacts.write_whole(net, cfg, path, epoch=4)
    assert read_official(path).epoch == 3


def test_prompts_are_refused_by_the_function_too(base: Path) -> None:
    with pytest.raises(ConfigError, match="prompt MLPs"):
        x.export(adapted(base, enable_prompt=True), read_official(base), base.parent / "m.pth")
