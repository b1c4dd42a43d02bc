"""Scenes at the limits of what can be learned from: they train, or the run says why not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import faulty_scenes as faulty
import numpy as np
import pytest
import tiny_scenes
import torch
import use_fixtures
from made_scenes import made_scene

from lora_core.errors import DataError, NumericError
from scenesplat_lora import labelling
from scenesplat_lora.data import DRAWS
from scenesplat_lora.labelling import Labelling, label_scene
from scenesplat_lora.language.text_embeddings import text_embeddings
from scenesplat_lora.losses import Term, distillation_loss, segmentation_loss
from scenesplat_lora.network.official import read_official, write_official
from scenesplat_lora.scenes import collate

RNG = np.random.default_rng(0)
SMALL = {  # metres; voxels have 5 cm, patches 32 rows or more
    "one_point": np.zeros((1, 3)),
    "few_points": RNG.random((5, 3)),
    "one_voxel": 0.02 + 0.01 * RNG.random((50, 3)),
    "one_place": np.full((40, 3), 7.0),
    "a_line": np.linspace([0, 0, 0], [3, 0, 0], 70),
}


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scenes.write_base(tmp_path_factory.mktemp("base") / "base.pth")


def write_small(root: Path) -> Path:
    for split in ("train", "val"):
        for name, coord in SMALL.items():
            faulty.small_scene(root / split / name, coord)
    return root


def losses(run: Path, split: str) -> list[float]:
    return [float(row["loss"]) for row in tiny_scenes.rows(run, split)]


# -- very small scenes -----------------------------------------------------------------------------


@pytest.mark.fault("P18", "R47")
@pytest.mark.parametrize("batch_size", [1, 5])
def test_scenes_of_one_point_few_points_and_one_voxel_train(
    base: Path, tmp_path: Path, batch_size: int
) -> None:
    data, run = write_small(tmp_path / "data"), tmp_path / "run"
    texts = tiny_scenes.write_texts(tmp_path / "texts.npz")
    given = {"batch_size": batch_size, "data__text_embeddings": texts}
    assert faulty.train(base, data, run, **given) == 0
    found = losses(run, "train") + losses(run, "val")
    assert len(found) == 5 // batch_size + 2
    assert np.isfinite(found).all()


@pytest.mark.fault("P18")
@pytest.mark.parametrize("name", SMALL)
def test_every_gaussian_of_a_very_small_scene_gets_a_label(name: str) -> None:
    scene = made_scene(len(SMALL[name])) | {"coord": SMALL[name].astype(np.float32), "name": name}
    labels = label_scene(use_fixtures.model(), scene, use_fixtures.texts(), Labelling(0.01, 0.05))
    assert labels.shape == (len(scene["coord"]),)
    assert (labels >= 0).all()


# -- nothing to learn ------------------------------------------------------------------------------


def one_corner(data: Path, rows: int = 300) -> Path:
    """Scenes of which only the first row can be learned."""
    for name in ("train/room_0", "train/room_1", "val/room_0"):
        coord = np.random.default_rng(len(name)).random((rows, 3)) * [4, 4, 1]
        faulty.small_scene(data / name, coord, valid_feat_mask=np.arange(rows) == 0)
    return data


@pytest.mark.fault("P19")
def test_a_crop_without_anything_to_learn_is_drawn_again_the_same_way_and_counted(
    base: Path, tmp_path: Path
) -> None:
    data = one_corner(tmp_path / "data")
    given = {"data__point_max": 120, "data__train__loop": 10}
    one, other = (faulty.loaded(base, data, tmp_path / "run", **given).train for _ in range(2))
    samples = [one[index] for index in range(len(one))]
    thrown, empty = one.counts.sum(dim=1).tolist()
    assert thrown > 0
    assert empty < len(one)
    assert sum(not bool(sample["valid_feat_mask"].any()) for sample in samples) == empty
    for index in reversed(range(len(other))):  # in any order, as workers have them
        sample = other[index]
        for key in ("feat", "coord", "valid_feat_mask"):
            assert torch.equal(sample[key], samples[index][key])
    assert torch.equal(one.counts, other.counts)
    assert one.remarks()[0].startswith(f"{thrown} sample")
    batch = collate.collate(
        [{k: v for k, v in sample.items() if k != "name"} for sample in samples]
    )
    assert torch.equal(batch["offset"], torch.tensor([len(s["feat"]) for s in samples]).cumsum(0))


@pytest.mark.fault("P19", "P25")
def test_a_run_whose_samples_stay_empty_goes_on_and_says_how_many(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    data, run = one_corner(tmp_path / "data"), tmp_path / "run"
    given = {"data__point_max": 1, "mix_prob": 0}
    assert faulty.train(base, data, run, **given) == 0
    said = capsys.readouterr().out
    assert f"note: {2 * (DRAWS - 1)} samples drawn again: no row was left to learn from" in said
    assert f"note: 2 samples had no such row in {DRAWS} draws: no update" in said
    assert losses(run, "train") == []  # the mean over nothing
    first, last = losses(run, "val")
    assert first == last  # no weight has moved, not by weight decay either


@pytest.mark.fault("P19")
def test_a_scene_that_transforms_leave_without_rows_is_named() -> None:
    empty = {"name": "room_7", "coord": torch.zeros(0, 3), "offset": torch.tensor([0])}
    full = {"name": "room_8", "coord": torch.zeros(2, 3), "offset": torch.tensor([2])}
    with pytest.raises(DataError, match="room_7: no rows are left of this scene"):
        collate.collate([full, empty])


@pytest.mark.fault("P25")
@pytest.mark.parametrize("kinds", [("CrossEntropyLoss", "LovaszLoss"), None])
def test_a_batch_of_ignored_rows_has_loss_0_and_no_gradient_of_nan(
    kinds: tuple[str, str] | None,
) -> None:
    out = torch.randn(20, 4, requires_grad=True)
    ignored = torch.full((20,), -1)
    if kinds:
        loss, parts = segmentation_loss(out, ignored, [Term(kind) for kind in kinds])
    else:
        names = ("CosineSimilarity", "L2Loss", "AggregatedContrastiveLoss")
        terms = [Term(name) for name in names]
        nothing = torch.zeros(20, dtype=torch.bool)
        loss, parts = distillation_loss(out, torch.zeros(20, 4), nothing, ignored, terms)
    loss.backward()
    assert loss.item() == 0
    assert all(part.item() == 0 for part in parts.values())
    assert out.grad is not None
    assert (out.grad == 0).all()


@pytest.mark.fault("P27")
def test_features_of_norm_0_give_no_nan_and_no_gradient() -> None:
    out = torch.randn(6, 4, requires_grad=True)
    target = torch.randn(6, 4)
    target[2] = 0
    valid = (target != 0).any(dim=1)
    terms = [Term("CosineSimilarity"), Term("L2Loss")]
    loss, _ = distillation_loss(out, target, valid, None, terms)
    loss.backward()
    assert loss.isfinite()
    assert out.grad is not None
    assert (out.grad[2] == 0).all()
    rest = torch.arange(6) != 2
    without, _ = distillation_loss(out[rest], target[rest], valid[rest], None, terms)
    assert without.item() == pytest.approx(loss.item())


# -- attention beyond the range --------------------------------------------------------------------


def overflowing(base: Path, path: Path) -> Path:
    """A base whose attention gives NaN: its queries and keys overflow."""
    state = dict(read_official(base).tensors)
    for name in state:
        if name.endswith("attn.qkv.weight"):
            state[name] = state[name] * 1e30
    path.with_suffix(".json").write_text(base.with_suffix(".json").read_text())
    return write_official(path, state)


@pytest.mark.fault("P31")
def test_nan_in_attention_stops_the_run_with_the_scenes_and_what_to_do(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    data = faulty.write_data(tmp_path / "data")
    broken = overflowing(base, tmp_path / "overflowing.pth")
    assert faulty.train(broken, data, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert all(word in message for word in ("step 1", "train/room_", "fp32 or bf16"))
    assert "--skip_nonfinite" in message


@pytest.mark.fault("P31")
def test_updates_with_nan_in_attention_are_dropped_where_that_is_asked_for(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    data = faulty.write_data(tmp_path / "data")
    broken = overflowing(base, tmp_path / "overflowing.pth")
    given = {"skip_nonfinite": "true", "epoch": 2, "data__val__split": "[]"}
    assert faulty.train(broken, data, tmp_path / "run", **given) == 0
    assert "Update dropped (2 of at most 10)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["dropped_updates"] == [1, 2]


@pytest.mark.fault("P31")
def test_half_precision_that_overflows_is_repeated_in_float32_when_labelling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = made_scene(60) | {"name": "hall"}

    class Half(torch.nn.Module):
        """Features that float16 cannot hold, in float16 wherever precision is mixed."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(11, 6)

        def forward(self, batch: Any) -> torch.Tensor:
            feat: torch.Tensor = self.linear(batch.feat.float()).float() * 1e6
            return feat.half() if torch.is_autocast_enabled("cpu") else feat

    torch.manual_seed(0)
    net, text = Half(), text_embeddings(["a", "b"], torch.eye(2, 6))
    # Where a CPU computes, `precision` is fp32: its autocast stands for that of a GPU.
    mixed = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(labelling, "autocast", lambda device, precision: mixed())
    with pytest.warns(UserWarning, match="labelled in float32"):
        half = label_scene(net, scene, text)
    monkeypatch.undo()
    np.testing.assert_array_equal(half, label_scene(net, scene, text))
    assert (half >= 0).all()  # rows of NaN would be rejected
    with torch.no_grad():
        net.linear.weight[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"hall: .* NaN or infinity for 60 of 60 voxels"):
        label_scene(net, scene, text)
