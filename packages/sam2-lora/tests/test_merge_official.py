"""From an adapter to a merged checkpoint: exact keys, untouched video memory, verified masks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.errors import CheckpointError, ConfigError, NumericError
from lora_core.injection import adapters_off, lora_layers
from sam2_lora import export as x
from sam2_lora import merge, names, official, placement
from sam2_lora import model as m
from sam2_lora.config import Config


def adapted(base: Path, **settings: Any) -> Any:
    """The network with an adapter that has learnt something: B is not zero."""
    network = m.load(base)
    placement.adapt(network, Config(lora_dropout=0.1, **settings))
    generator = torch.Generator().manual_seed(7)
    for layer in lora_layers(network).values():
        _, B = layer.lora_factors("default")
        with torch.no_grad():
            B.normal_(std=0.02, generator=generator)
    return network


def masks(network: Any) -> Tensor:
    """Logits for one click, at the network's own size, in evaluation mode."""
    height, width = m.image_size(network)
    picture = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    network.eval()
    with torch.no_grad():
        features = m.encode(network, picture)
        point = torch.tensor([[[0.3 * width, 0.4 * height]]])
        return m.decode(network, features, torch.tensor([0]), point).masks


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def work(tmp_path: Path, golden_base: Path) -> Path:
    """A folder with a copy of the small base, so that tests may change it."""
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"base{suffix}").write_bytes(golden_base.with_suffix(suffix).read_bytes())
    return tmp_path


# -- the official file ---------------------------------------------------------------------------


@pytest.mark.fault("K42", "K36")
@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
def test_merged_tiny_has_the_official_keys_and_the_adapted_masks(
    tiny_checkpoint: Path, tmp_path: Path, version: str
) -> None:
    base = torch.load(tiny_checkpoint, weights_only=True)["model"]
    if version == "sam2":
        for name in ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"):
            del base[name]
    path = tmp_path / f"{version}_hiera_tiny.pt"
    torch.save({"model": base}, path)
    network = adapted(path, image_size="256")
    m.set_image_size(network, (128, 128))
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    merged = x.export(network, tmp_path / "merged.torch")

    assert set(merged.difference) == {"point", "box", "correction"}
    assert max(merged.difference.values()) <= 1e-4
    assert (merged.tensors, merged.changed) == (len(base), 56)
    content = torch.load(tmp_path / "merged.torch", weights_only=True)
    assert list(content) == ["model"]
    assert list(content["model"]) == list(base)
    assert len(base) == (468 if version == "sam2" else 471)
    targets = {f"{names.module_to_official(path)}.weight" for path in lora_layers(network)}
    for name, tensor in content["model"].items():
        assert tensor.dtype == base[name].dtype
        assert torch.equal(tensor, base[name]) is (name not in targets), name
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert network.training
    assert m.image_size(network) == (128, 128)
    with adapters_off(network):
        plain = masks(network)
    live, again = masks(network), masks(m.load(tmp_path / "merged.torch", (128, 128)))
    assert (live - plain).abs().max() > 0.1, "the adapter does nothing: the test shows nothing"
    torch.testing.assert_close(again, live, rtol=0, atol=1e-4)


@pytest.mark.fault("K42")
@pytest.mark.parametrize("variant", official.VARIANTS)
def test_every_adapted_weight_has_its_official_key(facts: dict[str, Any], variant: str) -> None:
    network = m.network(official.published(variant))
    placement.adapt(network, Config(targets="default"))
    keys = {f"{names.module_to_official(path)}.weight" for path in lora_layers(network)}
    assert keys <= facts["keys"][variant].keys()
    assert not any(map(names.is_video, keys))
    expected = {"tiny": 56, "small": 64, "base_plus": 80, "large": 128}
    assert len(keys) == expected[variant.rpartition("hiera_")[2]]


def test_a_custom_base_takes_its_config_along(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    for name in ("merged.pt", "merged_again.safetensors"):
        x.export(network, work / name)
        torch.testing.assert_close(masks(m.load(work / name)), masks(network), rtol=0, atol=1e-4)
    assert entries(work) == [
        "base.json",
        "base.safetensors",
        "merged.json",
        "merged.pt",
        "merged_again.json",
        "merged_again.safetensors",
    ]


@pytest.mark.parametrize("dtype", ["fp32", "keep"])
def test_a_half_precision_base_is_merged_exactly_or_kept_small(work: Path, dtype: Any) -> None:
    file = official.read_official(work / "base.safetensors")
    half = {name: tensor.half() for name, tensor in file.tensors.items()}
    official.write_official(work / "base.safetensors", half)
    network = adapted(work / "base.safetensors")
    merged = x.export(network, work / "merged.safetensors", dtype)
    tensors = official.read_official(work / "merged.safetensors").tensors
    for name, tensor in tensors.items():
        kept = dtype == "keep" or names.is_video(name)
        assert tensor.dtype == (torch.float16 if kept else torch.float32)
    worst = max(merged.difference.values())
    assert worst <= 1e-4 if dtype == "fp32" else 1e-4 < worst < 1e-1


# -- the transformers folder ---------------------------------------------------------------------


@pytest.mark.fault("K42")
def test_an_official_base_becomes_a_transformers_folder(work: Path) -> None:
    from transformers import Sam2Model

    network = adapted(work / "base.safetensors")
    x.export(network, work / "runs-v1.0")
    assert entries(work / "runs-v1.0") == ["config.json", "model.safetensors"]
    again, info = Sam2Model.from_pretrained(work / "runs-v1.0", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.architectures == ["Sam2Model"]
    torch.testing.assert_close(masks(again), masks(network), rtol=0, atol=1e-4)
    torch.testing.assert_close(masks(m.load(work / "runs-v1.0")), masks(network), rtol=0, atol=1e-4)


@pytest.mark.fault("K42")
def test_a_video_folder_stays_a_video_folder(work: Path) -> None:
    """As the published ones: config.json of more than the image part, other files beside it."""
    from safetensors.torch import load_file, save_file

    folder = work / "published"
    folder.mkdir()
    config = json.loads((work / "base.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "sam2_video", **config}))
    (folder / "preprocessor_config.json").write_text('{"size": 128}')
    base = official.read_official(work / "base.safetensors").tensors
    tensors = names.to_transformers(base)
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    network = adapted(folder)
    merged = x.export(network, work / "merged")
    assert entries(work / "merged") == entries(folder)
    for name in ("config.json", "preprocessor_config.json"):
        assert (work / "merged" / name).read_text() == (folder / name).read_text()
    written = load_file(work / "merged" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[k], t) for k, t in tensors.items() if k.startswith("memory"))
    assert (merged.tensors, merged.changed) == (len(base), 46)
    as_official = x.export(network, work / "merged.pt")
    assert (as_official.tensors, as_official.changed) == (len(base), 46)
    assert official.read_official(work / "merged.pt").tensors.keys() == base.keys()


# -- what is refused -----------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    (work / "out.pt").write_text("precious")
    with pytest.raises(ConfigError, match=r"out\.pt exists"):
        x.export(network, work / "out.pt")
    assert (work / "out.pt").read_text() == "precious"
    x.export(network, work / "out.pt", overwrite=True)
    assert official.read_official(work / "out.pt").format == "pt"
    x.export(network, work / "folder")
    with pytest.raises(ConfigError, match="folder exists"):
        x.export(network, work / "folder")
    x.export(network, work / "folder", overwrite=True)
    with pytest.raises(ConfigError, match="is the base itself"):
        x.export(network, work / "base.safetensors", overwrite=True)


@pytest.mark.fault("H43", "C23")
@pytest.mark.parametrize("kind", ["data", "adapter", "run", "readme"])
def test_a_merge_replaces_no_folder_that_holds_more_than_a_model(work: Path, kind: str) -> None:
    network = adapted(work / "base.safetensors")
    place = work / kind
    if kind == "adapter":
        m.save_adapter(network, place)
    else:
        x.export(network, place)
        name = {"data": "images/0.png", "run": "state/checkpoint-5/state.pt", "readme": "README.md"}
        (place / name[kind]).parent.mkdir(parents=True, exist_ok=True)
        (place / name[kind]).write_text("precious")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"{kind} holds '.*', which is not replaced: choose"):
        x.export(network, place, overwrite=True)
    words = ["--adapter", str(work / "none"), "--output", str(place), "--overwrite"]
    with pytest.raises(ConfigError, match="which is not replaced"):
        merge.main(words)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.fault("H43")
def test_a_merge_replaces_the_folder_of_an_earlier_one(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    x.export(network, work / "folder")
    (work / "folder" / "config.json").write_text("{}")
    x.export(network, work / "folder", overwrite=True)
    assert masks(m.load(work / "folder")).shape == masks(network).shape
    (work / "out.pt").mkdir()
    with pytest.raises(ConfigError, match=r"out\.pt is a folder: choose another"):
        x.export(network, work / "out.pt", overwrite=True)


def test_a_file_that_gives_other_masks_is_not_kept(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = adapted(work / "base.safetensors")
    monkeypatch.setattr(x, "TOLERANCE", -1.0)
    before = entries(work)
    for name in ("out.pt", "folder"):
        with pytest.raises(NumericError, match="other masks than the adapted model"):
            x.export(network, work / name)
        assert entries(work) == before


@pytest.mark.fault("K36")
def test_the_check_notices_a_single_changed_weight(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    x.export(network, work / "out.safetensors")
    assert max(x.compare(network, m.load(work / "out.safetensors")).values()) <= 1e-4
    tensors = official.read_official(work / "out.safetensors").tensors
    tensors["image_encoder.trunk.blocks.3.attn.proj.bias"][0] += 0.1
    official.write_official(work / "out.safetensors", tensors)
    differences = x.compare(network, m.load(work / "out.safetensors"))
    assert all(value > 1e-4 for value in differences.values())


def test_a_changed_base_file_is_noticed(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    tensors = official.read_official(work / "base.safetensors").tensors
    tensors["sam_mask_decoder.iou_token.weight"][0, 0] += 1
    official.write_official(work / "base.safetensors", tensors)
    with pytest.raises(CheckpointError, match="has changed since"):
        x.export(network, work / "out.pt")


@pytest.mark.fault("K38")
def test_values_that_are_not_finite_leave_no_file(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    layer = lora_layers(network)["mask_decoder.transformer.layers.0.mlp.proj_in"]
    with torch.no_grad():
        layer.lora_factors("default")[1][0, 0] = float("nan")
    before = entries(work)
    with pytest.raises(NumericError):
        x.export(network, work / "out.pt")
    assert entries(work) == before


# -- adapter files and the command ---------------------------------------------------------------


def test_adapter_files_use_the_promised_names(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    m.set_image_size(network, (64, 192))
    m.save_adapter(network, work / "best.torch", {"step": 5})
    m.save_adapter(network, work / "adapter", {"step": 5})
    content = torch.load(work / "best.torch", weights_only=True)
    assert set(content) == {"format", "config", "metadata", "tensors"}
    assert content["metadata"]["step"] == 5
    assert content["metadata"]["base"]["file"] == "base.safetensors"
    modules = {names.module_to_official(path) for path in lora_layers(network)}
    expected = {f"{module}.lora_{letter}.weight" for module in modules for letter in "AB"}
    assert set(content["tensors"]) == expected
    again = {
        name: m.load(work / "base.safetensors", adapter=work / name)
        for name in ("best.torch", "adapter")
    }
    for loaded in again.values():
        assert m.image_size(loaded) == (64, 192)
        assert not loaded.training
        assert torch.equal(masks(loaded), masks(network))
    own_size = m.load(work / "base.safetensors", (128, 128), work / "adapter")
    assert m.image_size(own_size) == (128, 128)


@pytest.mark.fault("K34")
def test_peft_loads_the_directory_on_a_transformers_model(work: Path) -> None:
    from peft import PeftModel

    network = adapted(work / "base.safetensors")
    m.save_adapter(network, work / "adapter")
    theirs = PeftModel.from_pretrained(m.load(work / "base.safetensors"), work / "adapter")
    torch.testing.assert_close(masks(theirs.base_model.model), masks(network), rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_bare_tensors_with_official_names_load(work: Path, suffix: str) -> None:
    """Files of the earlier script's kind: names and tensors, no configuration; alpha was 16."""
    network = adapted(work / "base.safetensors", lora_rank=4, lora_alpha=16)
    bare = {
        f"{names.module_to_official(path)}.lora_{letter}{suffix}": factor.detach()
        for path, layer in lora_layers(network).items()
        for letter, factor in zip("AB", layer.lora_factors("default"), strict=True)
    }
    torch.save(bare, work / "old.torch")
    loaded = m.load(work / "base.safetensors", adapter=work / "old.torch")
    assert torch.equal(masks(loaded), masks(network))


@pytest.mark.fault("K31")
def test_an_adapter_of_another_base_is_refused(work: Path) -> None:
    network = adapted(work / "base.safetensors")
    m.save_adapter(network, work / "adapter")
    tensors = official.read_official(work / "base.safetensors").tensors
    tensors["no_mem_embed"] = tensors["no_mem_embed"] + 1
    official.write_official(work / "other.safetensors", tensors)
    (work / "other.json").write_text((work / "base.json").read_text())
    with pytest.raises(CheckpointError, match=r"trained on base\.safetensors .*other\.safetensors"):
        m.load(work / "other.safetensors", adapter=work / "adapter")


def run(*words: object) -> int:
    return merge.main([str(word) for word in words])


@pytest.mark.parametrize("name", ["adapter", "adapter.torch"])
def test_the_command_merges_both_kinds_of_adapter(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    network = adapted(work / "base.safetensors")
    m.set_image_size(network, (64, 192))
    m.save_adapter(network, work / name)
    m.set_image_size(network, (128, 128))
    adapter, base = work / name, work / "base.safetensors"
    assert run("--adapter", adapter, "--checkpoint", base, "--output", work / "merged.pt") == 0
    text = capsys.readouterr().out
    assert "325 tensors, 46 of them changed" in text
    assert "point" in text
    assert "Trained at 64x192 pixels, while the model is made for 128x128" in text
    assert "video memory is the base's" in text
    torch.testing.assert_close(masks(m.load(work / "merged.pt")), masks(network), rtol=0, atol=1e-4)
    monkeypatch.chdir(work)  # the adapter knows the name of its base
    assert run("--adapter", name, "--output", "again.pt") == 0
    assert Path("again.pt").read_bytes() == Path("merged.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"merged\.pt exists"):
        run("--adapter", name, "--output", "merged.pt")


def test_the_command_says_what_is_missing(work: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter is missing"):
        run("--output", work / "out.pt")
    network = adapted(work / "base.safetensors")
    bare = {
        f"{path}.lora_{letter}.weight": factor.detach()
        for path, layer in lora_layers(network).items()
        for letter, factor in zip("AB", layer.lora_factors("default"), strict=True)
    }
    torch.save(bare, work / "bare.torch")
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        run("--adapter", work / "bare.torch", "--output", work / "out.pt")


def test_help_needs_no_torch() -> None:
    """`sam2-lora merge --help` answers at once."""
    import subprocess
    import sys

    code = (
        "import sys; from sam2_lora.merge import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout


def test_the_config_beside_a_merged_file_is_the_bases(work: Path) -> None:
    x.export(adapted(work / "base.safetensors"), work / "merged.pt")
    ours, theirs = (json.loads((work / f"{n}.json").read_text()) for n in ("merged", "base"))
    assert ours == theirs
