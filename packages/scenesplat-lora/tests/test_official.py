"""Official checkpoints: every packing in, every misfit named, official names out."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_network import tiny_backbone, tiny_config, voxels
from torch import Tensor, nn

from lora_core import LoraConfig, inject
from lora_core.errors import CheckpointError
from lora_core.merged_file import same_bits
from scenesplat_lora.network import official
from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.official import (
    build_model,
    compare,
    load_official,
    load_state,
    read_official,
    released_config,
    to_official,
    write_official,
)
from scenesplat_lora.network.ptv3_config import LANGUAGE, SEGMENTATION, PTv3Config

KEYS = Path(__file__).parent / "goldens" / "keys"


def language_model(seed: int = 0) -> LangPretrainer:
    model = LangPretrainer(tiny_config()).eval()
    model.backbone.load_state_dict(tiny_backbone(seed).state_dict())
    return model


STATE = language_model().state_dict()


def trained_file(state: dict[str, Tensor]) -> dict[str, Any]:
    """As the official trainer saves it."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 7,
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": None,
        "best_metric_value": np.float64(0.3125),
    }


def renamed(prefix: str, drop: str = "") -> dict[str, Tensor]:
    return {prefix + name.removeprefix(drop): tensor for name, tensor in STATE.items()}


def wrapped() -> dict[str, Tensor]:
    """As a full checkpoint of the first LoRA code has its base weights."""
    return {
        name.replace(".attn.qkv.", ".attn.qkv.linear.").replace(".fc1.", ".fc1.linear."): tensor
        for name, tensor in STATE.items()
    }


PACKINGS: dict[str, Any] = {
    "trainer": trained_file(STATE),
    "several GPUs": trained_file(renamed("module.")),
    "flat": STATE,
    "model": {"model": STATE},
    "backbone alone": renamed("", "backbone."),
    "backbone of several GPUs": {"state_dict": renamed("module.", "backbone.")},
    "first LoRA code": {"state_dict": wrapped()},
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_model(packing: str, tmp_path: Path) -> None:
    path = tmp_path / "model_best.pth"
    torch.save(PACKINGS[packing], path)
    model = load_official(path, config=tiny_config())
    assert isinstance(model, LangPretrainer)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, STATE[name]), name


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "base.safetensors")
    model = load_official(tmp_path / "base.safetensors", language_model(seed=1))
    batch = voxels(50)
    assert torch.equal(model(batch), language_model()(batch))


def test_epoch_and_best_metric_come_as_plain_numbers(tmp_path: Path) -> None:
    torch.save(PACKINGS["trainer"], tmp_path / "a.pth")
    file = read_official(tmp_path / "a.pth")
    assert (file.epoch, file.best_metric, file.format) == (7, 0.3125, "checkpoint")
    assert type(file.best_metric) is float


def test_numpy_scalars_of_before_numpy_2_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old(pickle._Pickler):  # type: ignore[name-defined, misc]
        def save_global(self, obj: Any, name: str | None = None) -> None:
            if getattr(obj, "__name__", "") == "scalar":
                self.write(b"cnumpy.core.multiarray\nscalar\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    class Module:
        Pickler = Old
        load = pickle.load

    path = tmp_path / "old.pth"
    torch.save(PACKINGS["trainer"], path, pickle_module=Module)
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert read_official(path).best_metric == 0.3125


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


@pytest.mark.fault("H01")
def test_a_program_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "best_metric_value": Evil()}, "evil.pth")
    with pytest.raises(CheckpointError, match="could run a program"):
        read_official("evil.pth")
    assert not Path("ran").exists()
    torch.save({"state_dict": STATE, "x": np.array([1.0], dtype=object)}, "array.pth")
    with pytest.raises(CheckpointError):
        read_official("array.pth")


@pytest.mark.parametrize(
    ("kind", "config"), [("language", LANGUAGE), ("segmentation", SEGMENTATION)]
)
def test_a_released_shape_is_recognised_by_its_tensors(kind: str, config: PTv3Config) -> None:
    shapes = json.loads((KEYS / f"{kind}.json").read_text("utf-8"))
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        file = official.OfficialFile(Path("x.pth"), "flat", tensors, {})
        model = build_model(file)
    assert released_config(file) == config
    assert not compare(file, model.state_dict())


def test_another_shape_needs_its_settings(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "tiny.pth")
    with pytest.raises(CheckpointError, match=r"enc_channels \(8, 12, 16\).*model.backbone"):
        load_official(tmp_path / "tiny.pth")


def misfits() -> dict[str, Tensor]:
    state = dict(STATE)
    state["backbone.dec.dec0.block0.attn.qkv.lora_A"] = torch.zeros(4, 12)
    state["backbone.embedding.stem.conv.weight"] = torch.zeros(8, 5, 5, 5, 6)
    del state["backbone.enc.enc1.down.proj.bias"]
    return state


@pytest.mark.fault("C26")
def test_strict_loading_names_all_misfits_and_changes_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": misfits()}, tmp_path / "a.pth")
    model = language_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_official(tmp_path / "a.pth", model)
    text = str(caught.value)
    assert f"{len(STATE) - 2} of {len(STATE)} tensors matched the LangPretrainer" in text
    assert "1 missing: backbone.enc.enc1.down.proj.bias" in text
    assert "1 unexpected: backbone.dec.dec0.block0.attn.qkv.lora_A" in text
    assert "conv.weight [8, 5, 5, 5, 6] instead of [8, 5, 5, 5, 11]" in text
    assert "1 of them are of a LoRA" in text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_lenient_loading_takes_what_fits_and_says_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": misfits()}, tmp_path / "a.pth")
    model = language_model(seed=1)
    kept = model.backbone.embedding.stem["conv"].weight.clone()
    load_official(tmp_path / "a.pth", model, strict=False)
    output = "".join(capsys.readouterr())
    assert "1 missing: backbone.enc.enc1.down.proj.bias; 1 unexpected" in output
    assert torch.equal(model.backbone.embedding.stem["conv"].weight, kept)
    name = "backbone.enc.enc2.block1.mlp.0.fc1.weight"
    assert torch.equal(model.state_dict()[name], STATE[name])


@pytest.mark.fault("C27")
def test_a_file_of_which_nothing_fits_is_refused_in_any_case(tmp_path: Path) -> None:
    torch.save({"encoder.layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="0 of 1 tensors are of a Point Transformer V3"):
        load_official(tmp_path / "other.pth", language_model(), strict=False)
    torch.save({"backbone.enc.enc9.x": torch.zeros(2, 2)}, tmp_path / "far.pth")
    with pytest.raises(CheckpointError, match=f"0 of {len(STATE)} tensors matched"):
        load_official(tmp_path / "far.pth", language_model(), strict=False)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    torch.save({"lora_state_dict": {}, "metadata": {}}, tmp_path / "adapter.pth")
    with pytest.raises(CheckpointError, match="load it with load_lora_checkpoint"):
        read_official(tmp_path / "adapter.pth")


def test_nan_is_refused(tmp_path: Path) -> None:
    state = {**STATE, "backbone.dec.dec0.block0.norm1.0.bias": torch.full((12,), torch.nan)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*norm1.0.bias"):
        load_official(tmp_path / "a.pth", language_model())


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    name = "backbone.dec.dec0.block0.norm1.0.bias"
    torch.save({**STATE, f"module.{name}": STATE[name]}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="are the same tensor"):
        read_official(tmp_path / "a.pth")


def test_a_backbone_takes_its_part_and_a_segmentation_model_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DefaultSegmentorV2(tiny_config(), 5).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "seg.pth")
    backbone = load_official(tmp_path / "seg.pth", tiny_backbone(1))
    assert torch.equal(backbone(voxels(40)), model.backbone(voxels(40)))
    again = load_official(tmp_path / "seg.pth", config=tiny_config())
    assert torch.equal(again(voxels(40)), model(voxels(40)))
    with pytest.raises(CheckpointError, match=r"2 unexpected: seg_head.weight, seg_head.bias"):
        load_official(tmp_path / "seg.pth", language_model())


def test_a_model_with_adapters_takes_a_base_and_keeps_them(tmp_path: Path) -> None:
    torch.save({"state_dict": renamed("module.")}, tmp_path / "a.pth")
    model = language_model(seed=1)
    inject(model, LoraConfig([r"re:.*\.attn\.qkv"], r=2, lora_alpha=2))
    load_official(tmp_path / "a.pth", model)
    assert torch.equal(model(voxels(40)), language_model()(voxels(40)))


@pytest.mark.parametrize("packing", ["several GPUs", "backbone alone", "first LoRA code"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_written_has_the_names_of_its_base(
    packing: str, suffix: str, tmp_path: Path
) -> None:
    content = PACKINGS[packing]
    torch.save(content, tmp_path / "base.pth")
    base = read_official(tmp_path / "base.pth")
    changed = language_model(seed=3).state_dict()
    path = write_official(tmp_path / f"merged{suffix}", to_official(base, changed), base.epoch)
    file = read_official(path)
    expected = content.get("state_dict", content)
    own = {name.replace(".linear.", ".") for name in expected}
    assert set(file.spelled.values()) == own
    assert file.epoch == (base.epoch if suffix == ".pth" else 0)
    model = language_model(seed=1)
    assert not load_state(model, file)
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, changed[name])


def test_a_tensor_without_a_place_in_the_base_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "base.pth")
    base = read_official(tmp_path / "base.pth")
    with pytest.raises(CheckpointError, match=r"has no tensors seg_head.bias"):
        to_official(base, {**STATE, "seg_head.bias": torch.zeros(3)})
