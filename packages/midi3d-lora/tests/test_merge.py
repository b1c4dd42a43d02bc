"""Merged models: exact, in the official layout, read back by everything, and nothing destroyed."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_transformers import GOLDENS
from torch import Tensor

from lora_core.errors import ConfigError, NumericError
from midi3d_lora import merged_model
from midi3d_lora.__main__ import main
from midi3d_lora.adapter_files import load_adapter, save_adapter
from midi3d_lora.lora import LoraChoice, inject
from midi3d_lora.merged_model import MARK, Source, compare, export, recorded_blocks
from midi3d_lora.official_model import load_component
from midi3d_lora.pipeline import MIDIPipeline
from midi3d_lora.transformer.dit import TripoSGDiTModel

MODEL = GOLDENS / "pipeline" / "model"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A complete model folder."""
    return Path(shutil.copytree(MODEL, tmp_path / "base", copy_function=shutil.copyfile))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of this model whose effect shows."""
    model = transformer(MODEL)
    inject(model, LoraChoice(2, 6, multi_instance_blocks=("blocks.1", "blocks.2")))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.05, generator=draw)
    return save_adapter(model, tmp_path / "lora" / "lora_weights.pth", {"seed": 3})


def transformer(folder: Path, adapter: Path | None = None) -> TripoSGDiTModel:
    model = load_component(TripoSGDiTModel, folder, "transformer")
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def merge(base: Path, adapter: Path, output: Path, *more: str) -> int:
    words = ["--pretrained_model", str(base), "--lora_path", str(adapter), "--output", str(output)]
    return main(["merge", *words, *more])


def tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -- exact ---------------------------------------------------------------------------------------


@pytest.mark.fault("K36", "K42")
def test_a_merged_model_is_the_base_with_the_adapter_in_its_weights(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = content(base), tmp_path / "merged"
    assert merge(base, adapter, output) == 0
    assert content(base) == before
    old, new, live = tensors(base), tensors(output), transformer(base, adapter)
    assert list(new) == list(old)
    adapted = {name for name, module in live.named_modules() if hasattr(module, "lora_A")}
    for name, tensor in new.items():
        layer = name.removesuffix(".weight")
        if layer in adapted:
            A = live.get_parameter(f"{layer}.lora_A.default.weight").double()
            B = live.get_parameter(f"{layer}.lora_B.default.weight").double()
            exact = (old[name].double() + 3 * B @ A).float()
            torch.testing.assert_close(tensor, exact, rtol=2e-7, atol=1e-8)
        else:
            assert torch.equal(tensor, old[name])
    assert compare(live, transformer(output)) < 1e-5
    assert f"{len(adapted)} of them changed" in capsys.readouterr().out
    others = {name: data for name, data in before.items() if name != WEIGHTS}
    merged = content(output)
    assert others.items() <= merged.items()
    assert merged.keys() - before.keys() == {MARK}


def test_a_merged_model_is_used_like_the_base(tmp_path: Path, base: Path, adapter: Path) -> None:
    assert merge(base, adapter, tmp_path / "merged") == 0
    pipeline = MIDIPipeline.from_pretrained(tmp_path / "merged")
    assert compare(transformer(base, adapter), pipeline.transformer) < 1e-5
    assert pipeline.transformer.multi_instance_blocks == ("blocks.1", "blocks.2")
    said = json.loads((tmp_path / "merged" / MARK).read_text())
    assert said["adapter"] == "lora_weights.pth"
    assert said["trained"]["seed"] == 3
    assert recorded_blocks(tmp_path / "merged") == ("blocks.1", "blocks.2")
    assert recorded_blocks(base) is None


def test_a_merged_model_may_lie_in_the_folder_of_the_run(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    assert merge(base, adapter.parent, tmp_path / "lora" / "merged") == 0
    assert recorded_blocks(tmp_path / "lora" / "merged") == ("blocks.1", "blocks.2")


def test_the_transformer_alone_is_a_folder_of_its_own(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    assert merge(base, adapter, tmp_path / "alone", "--transformer_only") == 0
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", MARK}
    model = TripoSGDiTModel.from_pretrained(tmp_path / "alone").eval()
    assert compare(transformer(base, adapter), model) < 1e-5


def test_the_base_of_a_transformer_alone_needs_no_other_part(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    shutil.rmtree(base / "vae")
    assert merge(base, adapter, tmp_path / "merged") == 2
    assert merge(base, adapter, tmp_path / "merged", "--transformer_only") == 0


@pytest.mark.fault("K37")
@pytest.mark.parametrize(("dtype", "kept"), [("keep", torch.bfloat16), ("fp32", torch.float32)])
def test_a_base_in_half_precision_is_merged_in_float32(
    tmp_path: Path, base: Path, adapter: Path, dtype: str, kept: torch.dtype
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in tensors(base).items()}
    (base / WEIGHTS).unlink()
    file = base / "transformer" / "diffusion_pytorch_model.bf16.safetensors"
    safetensors.torch.save_file(half, file)
    more = ["--dtype", dtype, "--variant", "bf16"]
    assert merge(base, adapter, tmp_path / "merged", *more) == 0
    new = tensors(tmp_path / "merged")
    assert {tensor.dtype for tensor in new.values()} == {kept}
    same = {name for name, tensor in half.items() if torch.equal(new[name], tensor.to(kept))}
    assert {name for name in new if ".to_" not in name} <= same
    difference = compare(transformer(base, adapter), transformer(tmp_path / "merged"))
    assert difference < (5e-2 if dtype == "keep" else 1e-5)


@pytest.mark.fault("K33")
def test_an_adapter_before_its_first_step_merges_to_the_base(tmp_path: Path, base: Path) -> None:
    model = transformer(base)
    inject(model, LoraChoice(2, multi_instance_blocks=()))
    export(model, Source(base), tmp_path / "merged")
    for name, tensor in tensors(base).items():
        assert torch.equal(tensors(tmp_path / "merged")[name], tensor)


def test_the_live_model_stays_as_it_is(tmp_path: Path, base: Path, adapter: Path) -> None:
    model = transformer(base, adapter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, Source(base), tmp_path / "merged")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.multi_instance_blocks == ("blocks.1", "blocks.2")


# -- nothing is destroyed ------------------------------------------------------------------------


def test_an_earlier_merge_is_replaced_only_when_asked(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert merge(base, adapter, output) == 0
    first = content(output)
    assert merge(base, adapter, output) == 2
    assert "add --overwrite" in capsys.readouterr().err
    (output / "vae" / "config.json").write_text("{}")
    assert merge(base, adapter, output, "--overwrite") == 0
    assert content(output) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "merged"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("base", "is or holds"),
        ("base/merged", "lies in the base"),
        (".", "is or holds"),
        ("lora", "is or holds"),
        ("other", "was not written by merge"),
        ("merged", "holds 'thesis.txt', which is not replaced"),
        ("file", "was not written by merge"),
    ],
)
def test_what_merge_did_not_write_is_never_replaced(
    tmp_path: Path,
    base: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    output: str,
    message: str,
) -> None:
    shutil.copytree(MODEL, tmp_path / "other", copy_function=shutil.copyfile)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / MARK).write_text("{}")
    (tmp_path / "merged" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = content(tmp_path)
    assert merge(base, adapter, tmp_path / output, "--overwrite") == 2
    assert message in capsys.readouterr().err
    assert content(tmp_path) == before


def test_a_file_with_other_outputs_is_not_kept(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer(base, adapter)
    monkeypatch.setattr(merged_model, "TOLERANCE", -1.0)
    with pytest.raises(NumericError, match="It was not kept"):
        export(model, Source(base), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


@pytest.mark.fault("K38")
def test_values_that_are_not_finite_are_refused_before_anything_is_written(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformer(base, adapter)
    with torch.no_grad():
        model.get_parameter("blocks.0.attn1.to_q.lora_B.default.weight")[0, 0] = float("nan")
    broken = save_adapter(model, tmp_path / "lora" / "broken.pth")
    assert merge(base, broken, tmp_path / "merged") == 2
    assert "NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


# -- what is refused -----------------------------------------------------------------------------


def test_all_problems_are_told_before_weights_are_read(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    more = ["--lora_rank", "8", "--mi_attention_blocks", "blocks.3"]
    assert merge(base, adapter, tmp_path / "full", *more) == 2
    said = capsys.readouterr().err
    assert "full exists" in said
    assert "--lora_rank 8" in said
    assert "--mi_attention_blocks blocks.3" in said


def test_half_precision_and_a_plain_model_are_refused(tmp_path: Path, base: Path) -> None:
    model = transformer(base)
    with pytest.raises(ConfigError, match="no LoRA to merge"):
        export(model, Source(base), tmp_path / "merged")
    inject(model, LoraChoice(2, multi_instance_blocks=()))
    with pytest.raises(ConfigError, match="load it in float32"):
        export(model.bfloat16(), Source(base), tmp_path / "merged")


@pytest.mark.fault("K31")
def test_the_adapter_of_another_base_is_told(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = {name: tensor + 1 for name, tensor in tensors(base).items()}
    safetensors.torch.save_file(other, base / WEIGHTS)
    with pytest.warns(UserWarning, match="was trained on another base"):
        load_adapter(transformer(base), adapter)
