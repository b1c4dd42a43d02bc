"""What comes out: merged files, predictions, figures, cached features, models of the hub."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_core.injection import lora_layers
from sam2_lora import __main__ as program
from sam2_lora import export as exporting
from sam2_lora import model as m
from sam2_lora import official
from sam2_lora.config import Config

COMMIT = "c0de" * 10  # of the repository that the run of these tests is started in
ADAPTERS = ["adapter", "adapter.torch", "adapter.pth", "adapter.pt"]
Refused = Callable[..., str]
Words = Callable[..., list[str]]


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.fault("K36")
@pytest.mark.parametrize("fault", ["twice", "one_layer_left_out", "scale", "one_value"])
def test_a_merge_that_goes_wrong_is_noticed_by_its_masks_and_leaves_no_file(
    work: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    words: Words,
) -> None:
    right = exporting.merged_state_dict

    def wrong(network: Any, base: Any, rename: Any) -> dict[str, Tensor]:
        merged = right(network, base, rename=rename)
        changed = [key for key in merged if merged[key] is not base[key]]
        assert len(changed) == 46
        if fault == "one_layer_left_out":
            key = next(key for key in changed if "image_encoder" in key)
            return merged | {key: base[key]}
        if fault == "one_value":
            key = "sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight"
            merged[key][0] += 0.5
            return merged
        factor = 2.0 if fault == "twice" else 1.01
        return merged | {k: base[k] + factor * (merged[k] - base[k]) for k in changed}

    monkeypatch.setattr(exporting, "merged_state_dict", wrong)
    parts = ("the merged file gives other masks than the adapted model", "It was not kept")
    refused("merge", *parts, adapter="adapter")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert program.main(words("merge", "base.safetensors", "adapter")) == 0


@pytest.mark.fault("K36", "K37")
@pytest.mark.parametrize("fault", ["one_layer_left_out", "wrongly_rounded"])
def test_a_wrong_merge_in_half_precision_is_not_taken_for_rounding(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    words: Words,
    adapted: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    half_base(work)
    m.save_adapter(adapted(work / "other.safetensors"), "of_half")
    right = exporting.merged_state_dict

    def wrong(network: Any, base: Any, rename: Any) -> dict[str, Tensor]:
        merged = right(network, base, rename=rename)
        key = next(key for key in merged if merged[key] is not base[key] and "image_enc" in key)
        if fault == "one_layer_left_out":
            return merged | {key: base[key]}
        half = merged[key].itemsize == 2
        return merged | {key: merged[key] * (1.01 if half else 1)}

    monkeypatch.setattr(exporting, "merged_state_dict", wrong)
    line = [*words("merge", "other.safetensors", "of_half"), "--dtype", "keep"]
    assert program.main(line) == 2
    said = {
        "one_layer_left_out": "the merged file gives other masks than the adapted model",
        "wrongly_rounded": "is not the merged value, rounded once",
    }
    assert said[fault] in capsys.readouterr().err
    assert not (work / "out.pt").exists()
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert program.main(line) == 0


@pytest.mark.fault("K36")
@pytest.mark.parametrize("kind", ["point", "box", "correction"])
def test_masks_that_are_not_numbers_are_no_good_merge(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    difference = dict.fromkeys(("point", "box", "correction"), 1e-6) | {kind: math.nan}
    monkeypatch.setattr(exporting, "compare", lambda *networks: difference)
    refused("merge", "gives other masks than the adapted model", adapter="adapter")


@pytest.mark.fault("K36", "K42")
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_good_merge_prints_its_error_and_keeps_the_bases_form(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    words: Words,
    masks: Any,
) -> None:
    base = official.read_official("base.safetensors").tensors
    assert program.main(words("merge", "base.safetensors", name)) == 0
    text = capsys.readouterr().out
    assert re.search(r"differ from the adapted model by at most: point \d\.\de-0\d, box", text)
    merged = torch.load("out.pt", weights_only=True)["model"]
    assert list(merged) == list(base)
    assert [t.dtype for t in merged.values()] == [t.dtype for t in base.values()]
    torch.testing.assert_close(
        masks(m.load("out.pt")), masks(m.load("base.safetensors", adapter=name)), rtol=0, atol=1e-4
    )


def half_base(work: Path) -> None:
    tensors = official.read_official("base.safetensors").tensors
    half = {k: t.half() for k, t in tensors.items()}
    official.write_official("other.safetensors", half)


@pytest.mark.fault("K37")
def test_overflow_in_a_half_precision_file_is_refused_and_fp32_is_the_way_out(
    work: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
    words: Words,
    adapted: Any,
) -> None:
    half_base(work)
    network = adapted(work / "other.safetensors")
    layer = lora_layers(network)["mask_decoder.transformer.layers.0.mlp.proj_in"]
    with torch.no_grad():
        for factor in layer.lora_factors("default"):
            factor.fill_(400.0)
    m.save_adapter(network, "large")
    flags = [*words("merge", "other.safetensors", "large"), "--dtype", "keep"]
    assert program.main(flags) == 2
    text = capsys.readouterr().err
    assert "do not fit torch.float16; nothing was merged. Merge into an fp32" in text
    assert not (work / "out.pt").exists()
    assert not list(work.glob(".unverified*"))
    assert program.main([*flags[:-1], "fp32"]) == 0


@pytest.mark.fault("K37")
@pytest.mark.filterwarnings("default::UserWarning")
def test_rounding_that_loses_the_adapter_is_said_with_its_share(
    work: Path, capsys: pytest.CaptureFixture[str], words: Words, adapted: Any
) -> None:
    half_base(work)
    network = adapted(work / "other.safetensors")
    with torch.no_grad():
        for layer in lora_layers(network).values():
            layer.lora_factors("default")[1].mul_(1e-3)
    m.save_adapter(network, "weak")
    flags = [*words("merge", "other.safetensors", "weak"), "--dtype", "keep"]
    assert program.main(flags) == 0
    text = capsys.readouterr().err
    assert re.search(r"warning: .*\d+\.\d% of the values that the adapters change are as", text)


@pytest.mark.fault("K39")
def test_an_adapter_is_not_merged_twice(work: Path, refused: Refused, words: Words) -> None:
    """The merged file is another base: the adapter is refused on it."""
    assert program.main(words("merge", "base.safetensors", "adapter")) == 0
    Path("out.pt").rename("merged.pt")
    Path("out.json").rename("merged.json")
    parts = ("adapter was trained on base.safetensors", "differ from those of")
    refused("merge", *parts, base="merged.pt", adapter="adapter")


@pytest.mark.fault("H33")
def test_what_is_not_verified_yet_lies_in_a_private_folder_beside_the_output(
    work: Path, monkeypatch: pytest.MonkeyPatch, words: Words
) -> None:
    seen = []
    compare = exporting.compare

    def look(*arguments: Any) -> dict[str, float]:
        (folder,) = work.glob(".unverified-*")
        seen.append((folder.name, folder.stat().st_mode & 0o777, sorted(os.listdir(folder))))
        return compare(*arguments)

    monkeypatch.setattr(exporting, "compare", look)
    for _ in range(2):
        assert program.main([*words("merge", "base.safetensors", "adapter"), "--overwrite",
                             "true"]) == 0  # fmt: skip
    assert [(mode, names) for _, mode, names in seen] == [(0o700, ["out.json", "out.pt"])] * 2
    assert seen[0][0] != seen[1][0]
    assert not list(work.glob(".unverified-*"))


@pytest.mark.fault("H43")
def test_left_overs_of_a_dead_merge_go_and_links_are_not_followed(work: Path, words: Words) -> None:
    (work / "precious").mkdir()
    (work / "precious" / "file").write_text("x")
    os.utime(work / "precious", (0, 0))
    link, new, old = (
        work / f".unverified-out.pt-{name}" for name in ("linklink", "stillnew", "abcdefgh")
    )
    link.symlink_to(work / "precious")
    for folder in (new, old):
        folder.mkdir()
        (folder / "out.pt").write_bytes(b"half")
    os.utime(old, (0, 0))
    assert program.main(words("merge", "base.safetensors", "adapter")) == 0
    assert (work / "precious" / "file").exists()
    assert new.exists()
    assert not old.exists()


def test_a_merged_folder_that_fills_the_disk_says_so_and_leaves_nothing(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second file of the folder, which transformers writes."""

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Sam2Config.save_pretrained", full)
    flags = ["--checkpoint", "base.safetensors", "--adapter", "adapter", "--output", "folder"]
    assert program.main(["merge", *flags]) == 2
    text = capsys.readouterr().err
    assert f"error: cannot write {work / 'folder'}: No space left on device" in text
    assert not (work / "folder").exists()
    assert not list(work.glob(".unverified*"))


# -- inference -------------------------------------------------------------------------------------


@pytest.mark.fault("K43")
def test_dropout_never_acts_in_inference(work: Path) -> None:
    from sam2_lora.predictor import Predictor

    rgb = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    predictor = Predictor(m.load("base.safetensors", adapter="adapter"))
    assert all(
        spec.dropout == 0.5
        for layer in lora_layers(predictor.model).values()
        for spec in layer.lora_adapters.values()
    )
    found = []
    for training in (False, True, True):
        predictor.model.train(training)
        predictor.set_image(rgb)
        found.append(predictor.predict(points=[[40, 30]]).logits)
        assert predictor.model.training is training
    assert all(np.array_equal(logits, found[0]) for logits in found)


@pytest.mark.fault("R41")
def test_figures_do_not_depend_on_how_many_objects_are_decided_at_once(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam2_lora import metrics
    from sam2_lora.data import load_split

    mask = np.zeros((64, 96), np.uint8)
    for number in range(5):
        mask[8 * number : 8 * number + 6, 5 : 40 + 5 * number] = number + 1
    Image.fromarray(mask).save("data/test/masks/p.png")
    cfg = Config(data_root="data", mask_kind="instances", image_size="128")
    pictures = load_split(cfg, "test")
    assert pictures is not None
    network, found = m.load("base.safetensors", adapter="adapter"), []
    for at_once in (1, 2, 32):
        monkeypatch.setattr(metrics, "OBJECTS_AT_ONCE", at_once)
        found.append(metrics.evaluate(network, pictures, cfg))
    assert found[0]["objects"] == 5
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], nan_ok=True, abs=1e-6)


@pytest.mark.fault("R44")
@pytest.mark.parametrize("clicks", [0, 2])
def test_a_batch_of_pictures_without_objects_has_a_finite_loss(
    work: Path, clicks: int, adapted: Any
) -> None:
    from sam2_lora import data, losses

    shutil.copy("data/train/images/p.png", "data/train/images/empty.png")
    Image.fromarray(np.zeros((64, 96), np.uint8)).save("data/train/masks/empty.png")
    cfg = Config(data_root="data", mask_kind="binary", image_size="128",
                 correction_clicks=clicks)  # fmt: skip
    train = data.load(cfg).train
    (empty,) = [i for i, record in enumerate(train.records) if "empty" in record.key]
    batch = data.collate([train[empty]])
    assert not batch["buckets"][0]["targets"].any()
    network = adapted(work / "base.safetensors")
    value, parts = losses.loss(network.train(), batch, cfg)
    value.backward()
    assert value.isfinite()
    assert all(np.isfinite(part) for part in parts.values())
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.fault("R44")
def test_a_test_split_without_any_object_is_scored_without_dividing_by_zero(
    work: Path, words: Words
) -> None:
    Image.fromarray(np.zeros((64, 96), np.uint8)).save("data/test/masks/p.png")
    assert program.main(words("evaluate", "base.safetensors", "adapter")) == 0
    figures = json.loads(Path("out/adapter.json").read_text())["figures"]
    assert figures["base"]["empty_images"] == 1
    assert figures["base"]["iou"] is None  # JSON has no NaN


# -- a whole run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(originals: Path, tmp_path_factory: pytest.TempPathFactory, words: Words) -> Path:
    """The folder of a short run, as `--output_dir` and `--logs_dir` of the working directory."""
    root = tmp_path_factory.mktemp("finished")
    flags = words("train", str(originals / "base.safetensors"), None)
    changed = {"data": str(originals / "data"), "out": str(root / "out"), "out/logs": str(root)}
    flags = [changed.get(word, word) for word in flags]
    (root / ".git").mkdir()
    (root / ".git" / "HEAD").write_text(COMMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert program.main([*flags, "--seed", "3"]) == 0
    (folder,) = (root / "out").glob("sam2_*")
    return folder


@pytest.mark.fault("R49")
def test_the_last_figures_are_those_of_the_exported_files_beside_the_bases(
    finished: Path, originals: Path, tmp_path: Path
) -> None:
    """The run's own, those of the adapter from its folder and from its file, the merged model's."""
    said = json.loads((finished / "training_summary.json").read_text())["test"]
    assert said.keys() == {"base", "lora"}
    (merged,) = finished.glob("*_merged_*.torch")
    (single,) = finished.glob("final_lora_*.torch")
    base = str(originals / "base.safetensors")
    models = {"folder": [base, str(finished / "adapter")], "file": [base, str(single)],
              "merged": [str(merged)]}  # fmt: skip
    for name, (checkpoint, *adapter) in models.items():
        flags = ["evaluate", "--checkpoint", checkpoint, "--data_root", str(originals / "data"),
                 "--mask_kind", "binary", "--output_dir", str(tmp_path), "--examples", "0",
                 "--exp_id", name, "--device", "cpu", "--image_size", "64"]  # fmt: skip
        assert program.main([*flags, *(["--adapter", adapter[0]] if adapter else [])]) == 0
        figures = json.loads((tmp_path / f"{name}.json").read_text())["figures"]
        for key in ("iou", "dice", "box_iou"):
            ours = figures["lora" if adapter else "model"][key]
            assert ours == pytest.approx(said["lora"][key], abs=1e-3)
            if adapter:
                assert ours == said["lora"][key]
                assert figures["base"][key] == said["base"][key]


@pytest.mark.fault("R49")
def test_an_adapter_that_makes_the_base_worse_is_said(
    work: Path, capsys: pytest.CaptureFixture[str], words: Words
) -> None:
    from sam2_lora.evaluate import worse

    assert program.main(words("evaluate", "base.safetensors", "adapter")) == 0
    figures = json.loads(Path("out/adapter.json").read_text())["figures"]
    text = capsys.readouterr().out
    assert ("warning: with the adapter the IoU is" in text) == (
        figures["lora"]["iou"] < figures["base"]["iou"]
    )
    assert worse({"base": {"iou": 0.8}, "lora": {"iou": 0.5}}) == (
        "warning: with the adapter the IoU is 0.3000 lower than the base's"
    )
    assert worse({"base": {"iou": 0.5}, "lora": {"iou": 0.8}}) == ""
    assert worse({"model": {"iou": 0.5}}) == ""


@pytest.mark.fault("K53", "K51")
def test_every_adapter_of_a_run_says_what_it_was_made_of(finished: Path, originals: Path) -> None:
    from lora_core.adapters.file import read_adapter

    adapters = [finished / "adapter", *finished.glob("*_lora_*.torch")]
    assert len(adapters) >= 3
    for path in adapters:
        file = read_adapter(path)
        assert {"torch", "transformers", "sam2-lora", "python"} <= file.extra["made"].keys()
        assert re.fullmatch("[0-9a-f]{16,}", file.metadata["data"])
        assert file.metadata["settings"]["seed"] == 3
        assert file.metadata["settings"]["lora_rank"] == file.config["r"] == 8
        assert (
            file.metadata["base"]["fingerprint"]
            == m.load(originals / "base.safetensors").sam2_base.fingerprint
        )
        assert file.metadata["commit"] == COMMIT
    card = (finished / "adapter" / "README.md").read_text()
    for part in ("base.safetensors", '"seed": 3', "transformers", '"step"', "sam2-lora"):
        assert part in card
    assert (finished / "config.yaml").is_file()


@pytest.mark.fault("K51")
def test_what_is_copied_or_published_names_no_place_of_this_machine(
    finished: Path, originals: Path
) -> None:
    states = [path for path in (finished / "state").rglob("*") if path.is_file()]
    adapters = [*(finished / "adapter").iterdir(), *finished.glob("*.torch")]
    assert {"manifest.json", "README.md"} <= {path.name for path in (*states, *adapters)}
    for path in (*states, *adapters):
        content = path.read_bytes()
        for place in (originals, finished.parent.parent):
            assert str(place).encode() not in content, path
