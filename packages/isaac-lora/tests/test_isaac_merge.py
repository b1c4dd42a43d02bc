"""Merged models: exact, in the layout of the base, read back by everything, nothing destroyed."""

import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import tiny_isaac_run
import torch
from recorded_isaac import CASE, recorded_model, sample
from torch import Tensor

from isaac_lora import IsaacForConditionalGeneration, merged_model
from isaac_lora.adapter_files import load_adapter, read_adapter, save_adapter
from isaac_lora.depth.settings import DepthSettings, read_depth_settings
from isaac_lora.lora import LoraChoice, inject
from isaac_lora.merge import main as program
from isaac_lora.merged_folder import CARD, MARK, adapters_in
from isaac_lora.merged_model import export
from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.official import load_model
from lora_core.errors import CheckpointError, ConfigError, NumericError, UserError

Capture = pytest.CaptureFixture[str]
FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
SHARD = "300KB"
DEPTH = DepthSettings("vitb", "depth_anything_v2_vitb.pth", "f" * 64, 50.0, 392)
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with the files of a published one, in shards."""
    folder = tiny_isaac_run.write_model(tmp_path / "isaac_model")
    (folder / FILE).unlink()
    recorded_model().save_pretrained(folder, max_shard_size=SHARD)
    (folder / "modular_isaac.py").write_text("raise SystemExit('executed')")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("notes")
    (folder / CARD).write_text("---\nlicense: other\n---\n\n# Isaac-0.1\n")
    return folder


def adapted(model: Any = None, **settings: Any) -> Any:
    """The recorded model, or another one, with LoRA whose effect shows."""
    model = recorded_model() if model is None else model
    inject(model, LoraChoice(**({"r": 4, "alpha": 8} | settings)))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name or ".lora_embedding_B." in name:
                weight.normal_(0, 0.1, generator=draw)
            elif weight.requires_grad and name.endswith("bias"):
                weight.add_(0.1)
    return model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of a run."""
    return save_adapter(adapted(), tmp_path / "run", {"seed": 3})


def merge(base: Path, adapter: Path, output: Path, *more: str) -> int:
    words = ["--model_path", str(base), "--adapter", str(adapter), "--output", str(output)]
    return program([*words, *more])


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(**sample("image1")).logits
    return out


# -- exact ---------------------------------------------------------------------------------------


@pytest.mark.fault("K36", "K42")
def test_a_merged_model_has_the_layout_of_the_base_and_the_adapter_in_its_weights(
    tmp_path: Path, base: Path, adapter: Path, capsys: Capture
) -> None:
    before, output = content(base), tmp_path / "merged"
    assert merge(base, adapter, output) == 0
    assert content(base) == before
    after = content(output)
    assert after.keys() == before.keys() | {MARK}
    same = {name for name in before if not name.endswith(".safetensors")} - {CARD}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    places = json.loads(before[INDEX])["weight_map"]
    assert len(set(places.values())) > 2
    for name, file in places.items():
        assert name in safetensors.torch.load(after[file])
    old, new, live = tensors(base), tensors(output), adapted()
    layers = {name for name, module in live.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) > 10
    for name, tensor in new.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            A = live.get_parameter(f"{layer}.lora_A.default.weight").double()
            B = live.get_parameter(f"{layer}.lora_B.default.weight").double()
            exact = (old[name].double() + 2 * B @ A).float()
            torch.testing.assert_close(tensor, exact, rtol=2e-7, atol=1e-8)
        else:
            assert torch.equal(tensor, old[name])
    wanted = logits(live)
    assert (wanted - logits(recorded_model())).abs().max() > 0.01
    torch.testing.assert_close(logits(load_model(output)), wanted, **TOLERANCE)
    said = capsys.readouterr().out
    assert f"{len(new)} tensors, {len(layers)} of them changed; read back, its logits" in said


@pytest.mark.fault("K34")
@pytest.mark.parametrize(
    ("names", "bias"),
    [("auto", "none"), ("q_proj,vision", "lora_only"), ("down_proj,lm_head,embed_tokens", "none"),
     ("vision", "all")],
)  # fmt: skip
def test_stock_peft_merges_our_adapter_to_the_same_weights(
    tmp_path: Path, base: Path, names: str, bias: Any
) -> None:
    folder = save_adapter(adapted(target_modules=names, bias=bias), tmp_path / "run")
    export(base, read_adapter(folder), tmp_path / "merged")
    theirs: Any = peft.PeftModel.from_pretrained(load_model(base), str(folder))
    new, wanted = tensors(tmp_path / "merged"), theirs.merge_and_unload().state_dict()
    assert new.keys() == wanted.keys()
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7, msg=name)


def test_an_adapter_of_peft_is_merged(tmp_path: Path, base: Path) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["gate_proj"], modules_to_save=["lm_head"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs: Any = peft.get_peft_model(recorded_model(), config).eval()
    with torch.no_grad():
        theirs.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    export(base, read_adapter(tmp_path / "theirs"), tmp_path / "merged")
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged")), logits(theirs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.fault("K33")
def test_an_adapter_before_its_first_step_merges_to_the_base(tmp_path: Path, base: Path) -> None:
    model = recorded_model()
    inject(model, LoraChoice(r=2))
    merged = export(base, read_adapter(save_adapter(model, tmp_path / "run")), tmp_path / "merged")
    assert (merged.changed, merged.difference) == (0, 0.0)
    new = tensors(tmp_path / "merged")
    assert all(torch.equal(new[name], tensor) for name, tensor in tensors(base).items())


@pytest.mark.fault("K41")
@pytest.mark.parametrize("names", ["lm_head", "embed_tokens", "q_proj"])
def test_a_head_that_is_the_embedding_is_merged_once(tmp_path: Path, names: str) -> None:
    def tied() -> IsaacForConditionalGeneration:
        torch.manual_seed(3)
        config = {**CASE.config, "tie_word_embeddings": True}
        return IsaacForConditionalGeneration(IsaacConfig(**config)).eval()

    base = tmp_path / "base"
    tied().save_pretrained(base)
    assert "lm_head.weight" not in tensors(base)
    model = adapted(load_model(base), target_modules=names)
    folder = save_adapter(model, tmp_path / "run")
    export(base, read_adapter(folder), tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(base).keys()
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged")), logits(model), rtol=1e-5, atol=1e-5
    )


@pytest.mark.fault("K37", "K42")
@pytest.mark.parametrize(("dtype", "kept"), [("keep", torch.bfloat16), ("fp32", torch.float32)])
def test_a_base_in_half_precision_is_merged_in_float32(
    tmp_path: Path, adapter: Path, dtype: str, kept: torch.dtype, capsys: Capture
) -> None:
    base, output = tmp_path / "half", tmp_path / "merged"
    recorded_model().bfloat16().save_pretrained(base, max_shard_size=SHARD)
    with pytest.warns() if dtype == "keep" else nullcontext() as told:
        assert merge(base, adapter, output, "--dtype", dtype) == 0
    assert told is None or "values that the adapters change are as before" in str(told[0].message)
    old, new = tensors(base), tensors(output)
    assert {tensor.dtype for tensor in new.values()} == {kept}
    assert "float32" not in (base / "config.json").read_text()
    named = json.loads((output / "config.json").read_text())["dtype"]
    assert named == str(kept).removeprefix("torch.")
    index = json.loads((output / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
    assert index["weight_map"] == json.loads((base / INDEX).read_text())["weight_map"]
    frozen = [name for name in old if "vision_embedding.0" in name]
    assert all(torch.equal(new[name], old[name].to(kept)) for name in frozen)
    live = load_model(base)
    load_adapter(live, adapter)
    difference = merged_model.compare(logits(live), logits(load_model(output)))
    assert difference < (5e-2 if dtype == "keep" else 1e-5)
    assert ("--dtype fp32 is exact" in capsys.readouterr().out) == (dtype == "keep")


def test_one_file_stays_one_file_and_other_weights_are_left_out(
    tmp_path: Path, adapter: Path, capsys: Capture
) -> None:
    base = tiny_isaac_run.write_model(tmp_path / "one")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", INDEX):
        (base / name).write_text("{}")
    (base / ".cache").mkdir()
    (base / ".cache" / "model.metadata").write_text("x")
    assert merge(base, adapter, tmp_path / "merged") == 0
    assert f"left out, since they may be weights of the base: {INDEX}, pytorch_model.bin, " in (
        capsys.readouterr().out
    )
    added = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {path.name for path in base.iterdir()} - added == {
        INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", ".cache",
    }  # fmt: skip
    assert added - {path.name for path in base.iterdir()} == {MARK, CARD}


def test_links_of_a_hubs_cache_become_files(tmp_path: Path, base: Path, adapter: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in base.iterdir():
        (linked / path.name).symlink_to(path)
    assert merge(linked, adapter, tmp_path / "merged") == 0
    files = [path for path in (tmp_path / "merged").rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in files)
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged")), logits(adapted()), **TOLERANCE
    )


# -- what the folder says ------------------------------------------------------------------------


def test_the_model_card_has_the_licences_behind_that_of_the_base(
    tmp_path: Path, base: Path
) -> None:
    folder = save_adapter(adapted(), tmp_path / "run", {"seed": 3}, DEPTH)
    assert merge(base, folder, tmp_path / "merged") == 0
    card = (tmp_path / "merged" / CARD).read_text("utf-8")
    assert card.startswith((base / CARD).read_text().rstrip() + "\n\n## Merged LoRA\n")
    for part in ("rank 4 and alpha 8", "non-production licence", "CC-BY-NC-4.0", "vitb"):
        assert part in card
    said = json.loads((tmp_path / "merged" / MARK).read_text())
    assert [one["name"] for one in said["adapters"]] == ["run"]
    assert said["adapters"][0]["trained"] == {"seed": 3}


def test_the_depth_of_the_training_stays_with_the_weights(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "run", depth=DEPTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # merging uses no depth, and nothing is wrong with that
        assert merge(base, folder, tmp_path / "merged") == 0
    assert read_depth_settings(tmp_path / "merged") == DEPTH
    with pytest.raises(ConfigError, match=r"it was trained with depth from depth_anything_v2_vitb"):
        IsaacForConditionalGeneration.from_pretrained(tmp_path / "merged")


# -- merging twice -------------------------------------------------------------------------------


@pytest.mark.fault("K39")
def test_an_adapter_is_merged_into_a_model_once(
    tmp_path: Path, base: Path, adapter: Path, capsys: Capture
) -> None:
    assert merge(base, adapter, tmp_path / "merged") == 0
    with pytest.raises(ConfigError, match=r"is merged into .*merged already"):
        merge(tmp_path / "merged", adapter, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    second = adapted(load_model(tmp_path / "merged"), target_modules="o_proj")
    folder = save_adapter(second, tmp_path / "second", depth=DEPTH)
    assert merge(tmp_path / "merged", folder, tmp_path / "both") == 0
    assert [one["name"] for one in adapters_in(tmp_path / "both")] == ["run", "second"]
    assert (tmp_path / "both" / CARD).read_text().count("## Merged LoRA") == 2
    for again in (adapter, folder):
        with pytest.raises(ConfigError, match="already"):
            merge(tmp_path / "both", again, tmp_path / "third")


def test_adapters_of_different_depth_do_not_go_together(tmp_path: Path, base: Path) -> None:
    first = save_adapter(adapted(), tmp_path / "first", depth=DEPTH)
    assert merge(base, first, tmp_path / "merged") == 0
    other = DepthSettings("vits", "vits.pth", "e" * 64, 100.0, 392)
    second = save_adapter(adapted(target_modules="o_proj"), tmp_path / "second", depth=other)
    with pytest.raises(CheckpointError, match=r"(?s)other depth than .*depth_alpha"):
        merge(tmp_path / "merged", second, tmp_path / "both")


@pytest.mark.fault("K31")
def test_the_adapter_of_another_base_is_told(tmp_path: Path, base: Path, adapter: Path) -> None:
    with torch.no_grad():
        other = recorded_model()
        other.get_parameter("model.layers.0.self_attn.q_proj.weight").add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="was trained on another base"):
        assert merge(tmp_path / "other", adapter, tmp_path / "merged") == 0


# -- nothing is destroyed ------------------------------------------------------------------------


def test_an_earlier_merge_is_replaced_only_when_asked(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "merged"
    assert merge(base, adapter, output) == 0
    first = content(output)
    with pytest.raises(ConfigError, match="add --overwrite"):
        merge(base, adapter, output)
    (output / "config.json").write_text("{}")
    assert merge(base, adapter, output, "--overwrite") == 0
    assert content(output) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["isaac_model", "merged", "run"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("isaac_model", "is or holds"),
        ("isaac_model/merged", "lies in the base"),
        (".", "is or holds"),
        ("run", "is or holds"),
        ("other", "no lora_merge.json in it"),
        ("merged", "thesis.txt"),
        ("file", "no lora_merge.json in it"),
    ],
)
def test_what_merge_did_not_write_is_never_replaced(
    tmp_path: Path, base: Path, adapter: Path, output: str, message: str
) -> None:
    shutil.copytree(base, tmp_path / "other")
    (tmp_path / "merged" / ".deep").mkdir(parents=True)
    (tmp_path / "merged" / MARK).write_text('{"adapters": [], "files": ["config.json"]}')
    (tmp_path / "merged" / ".deep" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=message):
        merge(base, adapter, tmp_path / output, "--overwrite")
    assert content(tmp_path) == before


def test_a_folder_with_other_logits_is_not_kept(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "compare", lambda wanted, found: float("nan"))
    with pytest.raises(NumericError, match="It was not kept"):
        merge(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["isaac_model", "run"]


def test_a_weight_that_was_written_wrong_is_noticed(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merged_model.write_tensors

    def wrong(path: Path, content: dict[str, Tensor]) -> None:
        write(path, {name: tensor + 1e-6 for name, tensor in content.items()})

    monkeypatch.setattr(merged_model, "write_tensors", wrong)
    with pytest.raises(NumericError, match="was read back with other values"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# -- what is refused before weights are read -----------------------------------------------------


@pytest.mark.fault("K38")
def test_values_that_are_not_finite_are_refused(tmp_path: Path, base: Path) -> None:
    model = adapted()
    with torch.no_grad():
        name = "model.layers.0.self_attn.q_proj.lora_B.default.weight"
        model.get_parameter(name)[0, 0] = float("nan")
    folder = save_adapter(model, tmp_path / "run")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        merge(base, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_all_problems_are_told_together(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "full").mkdir()
    recorded = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(recorded | {"hidden_size": 128}))
    with pytest.raises(UserError, match=r"(?s)full exists.*tensors matched"):
        merge(base, adapter, tmp_path / "full")
    (tmp_path / "none").write_text("x")
    (tmp_path / "no").mkdir()
    with pytest.raises(UserError, match=r"(?s)none is not a folder.*no holds no adapter"):
        merge(base, tmp_path / "no", tmp_path / "none" / "merged")


def test_a_disk_without_room_is_told_first(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.disk.free_space", lambda folder: 1000)
    with pytest.raises(ConfigError, match=r"1\.00 kB free, but the run will write up to"):
        merge(base, adapter, tmp_path / "merged")


def test_an_adapter_for_other_layers_is_used_in_part_only_when_asked(
    tmp_path: Path, base: Path
) -> None:
    folder = save_adapter(adapted(target_modules="q_proj,o_proj"), tmp_path / "run")
    path = folder / "adapter_model.safetensors"
    kept = safetensors.torch.load_file(path)
    some = {name: tensor for name, tensor in kept.items() if "layers.0.self_attn.o" not in name}
    safetensors.torch.save_file(some, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.o_proj"):
        merge(base, folder, tmp_path / "merged")
    with pytest.warns(UserWarning, match="is loaded in part"):
        assert merge(base, folder, tmp_path / "merged", "--allow_partial") == 0


@pytest.mark.parametrize("words", [["--model_path="], ["--adapter="], ["--output="]])
def test_empty_paths_are_told(words: list[str], tmp_path: Path) -> None:
    given = {"--model_path": "a", "--adapter": "b", "--output": str(tmp_path / "c")}
    given |= {words[0].rstrip("="): ""}
    with pytest.raises(ConfigError, match=f"{words[0].rstrip('=')} is empty"):
        program([f"{name}={value}" for name, value in given.items()])
