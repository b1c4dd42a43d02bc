"""Whole training runs on a small random model: what they leave behind, and what they refuse."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_scenes
import torch
from torch import nn

from lora_core.config import parse
from lora_core.errors import UserError
from lora_core.testing.program import signal_at_first_checkpoint
from scenesplat_lora import data, objective, validation
from scenesplat_lora import model as models
from scenesplat_lora.config import Config
from scenesplat_lora.lora import load_lora_checkpoint
from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.official import load_official
from scenesplat_lora.network.ptv3_config import PTv3Config
from scenesplat_lora.schedule import OneCycle
from scenesplat_lora.train import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_scenes.write_base(folder / "base.pth")
    tiny_scenes.write_scenes(folder / "data")
    tiny_scenes.write_texts(folder / "texts.npz")
    return folder


def command(files: Path, output: Path, **given: Any) -> list[str]:
    return tiny_scenes.command(files / "base.pth", files / "data", output, **given)


def settings(files: Path, output: Path, **given: Any) -> Config:
    return parse(Config, command(files, output, **given), prog="train")


def with_adapter(files: Path, adapter: Path) -> LangPretrainer:
    """A new base network with a saved adapter, as a user of the guide has it."""
    config = PTv3Config.from_dict(tiny_scenes.BACKBONE)
    net = load_official(files / "base.pth", config=config)
    load_lora_checkpoint(net, adapter)
    assert isinstance(net, LangPretrainer)
    return net.eval()


def loss_on_val(cfg: Config, net: nn.Module) -> float:
    needs = data.Needs(True, 11, tiny_scenes.WIDTH)
    evaluate = validation.evaluation(cfg, data.load(cfg, needs), needs, None)
    assert evaluate is not None
    with torch.no_grad():
        return evaluate(net)["loss"]


# -- results ---------------------------------------------------------------------------------------


def test_base_and_saved_adapter_are_the_trained_model_prompts_and_all(
    files: Path, tmp_path: Path
) -> None:
    given = {"lora__enable_prompt": "true", "optimizer__lr": 1e-3}
    assert main(command(files, tmp_path / "run", **given)) == 0
    cfg = settings(files, tmp_path / "run", **given)
    last = tiny_scenes.rows(tmp_path / "run", "val")[-1]
    net = with_adapter(files, tmp_path / "run" / "model" / "lora_epoch_2.pth")
    assert loss_on_val(cfg, net) == pytest.approx(float(last["loss"]), rel=1e-4)
    first = tiny_scenes.rows(tmp_path / "run", "val")[0]
    assert float(last["loss"]) < float(first["loss"])  # it has learnt
    assert not (tmp_path / "run" / "adapter").exists()  # PEFT knows no prompt MLPs


def test_the_merged_model_is_base_and_adapter_under_the_official_names(
    files: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = command(files, run, lora_training__merge_on_end="true", epoch=1)
    assert main(words) == 0
    config = PTv3Config.from_dict(tiny_scenes.BACKBONE)
    merged = load_official(run / "model" / "model_best.pth", config=config)
    cfg = settings(files, run)
    here = loss_on_val(cfg, with_adapter(files, run / "model" / "lora_best.pth"))
    assert loss_on_val(cfg, merged) == pytest.approx(here, rel=1e-5)
    assert here != loss_on_val(cfg, load_official(files / "base.pth", config=config))


def test_zero_shot_figures_are_measured_where_classes_have_texts(
    files: Path, tmp_path: Path
) -> None:
    given = {"data__text_embeddings": files / "texts.npz", "epoch": 1, "data__excluded": "wall",
             "lora_training__merge_before_eval": "true"}  # fmt: skip
    assert main(command(files, tmp_path / "run", **given)) == 0
    rows = tiny_scenes.rows(tmp_path / "run", "val")
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("mIoU", "fg_mIoU"))
    best = json.loads((tmp_path / "run" / "training_summary.json").read_text())["best"]
    assert next(iter(best)) == "fg_mIoU"


def test_a_segmentation_model_trains_on_labels(files: Path, tmp_path: Path) -> None:
    base = tiny_scenes.write_base(tmp_path / "segmentation.pth", classes=5)
    words = tiny_scenes.command(base, files / "data", tmp_path / "run", epoch=1)
    assert main(words) == 0
    row = tiny_scenes.rows(tmp_path / "run", "train")[0]
    assert float(row["CrossEntropyLoss"]) > 0
    assert float(row["LovaszLoss"]) > 0


# -- updates ---------------------------------------------------------------------------------------


def test_an_update_without_any_gradient_moves_nothing() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)

    def step(scale: float) -> torch.Tensor:
        optimizer.zero_grad()
        (scale * layer(torch.ones(1, 3)).sum()).backward()
        objective.SkipEmpty().on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        return layer.weight.detach().clone()

    moved = step(1.0)
    assert torch.equal(step(0.0), moved)
    assert not torch.equal(step(1.0), moved)


# -- data ------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_epoch_and_index_alone(files: Path, tmp_path: Path) -> None:
    cfg, needs = settings(files, tmp_path), data.Needs(True, 11, tiny_scenes.WIDTH)
    one, other = (data.load(cfg, needs).train for _ in range(2))
    first = one[1]
    one[0], other[2]
    assert torch.equal(other[1]["feat"], first["feat"])
    one.set_epoch(1)
    assert one[1]["feat"].shape != first["feat"].shape or not torch.equal(
        one[1]["feat"], first["feat"]
    )


def test_neighbours_are_mixed_as_the_first_of_them_has_drawn(files: Path, tmp_path: Path) -> None:
    train = data.load(settings(files, tmp_path), data.Needs(True, 11, tiny_scenes.WIDTH)).train
    samples = [train[0], train[1]]
    draw = samples[0]["mix"]
    assert len(data.collate(samples, draw + 1e-6)["offset"]) == 1
    apart = data.collate(samples, draw)
    assert len(apart["offset"]) == 2
    assert apart["keys"] == ["train/room_0", "train/room_1"]


def test_scenes_with_nothing_to_learn_from_are_left_out(tmp_path: Path) -> None:
    import numpy as np

    root = tiny_scenes.write_scenes(tmp_path / "data")
    mask = root / "train" / "room_1" / "valid_feat_mask.npy"
    np.save(mask, np.zeros_like(np.load(mask)))
    tiny_scenes.write_base(tmp_path / "base.pth")
    splits = data.load(settings(tmp_path, tmp_path), data.Needs(True, 11, tiny_scenes.WIDTH))
    assert [record.key for record in splits.train.records] == ["train/room_0", "train/room_2"]
    assert "nothing to learn" in str(splits)


def test_faults_of_all_scenes_are_told_together(tmp_path: Path) -> None:
    root = tiny_scenes.write_scenes(tmp_path / "data")
    (root / "train" / "room_0" / "coord.npy").write_bytes(b"no array")
    (root / "val" / "room_0" / "quat.npy").unlink()
    tiny_scenes.write_base(tmp_path / "base.pth")
    with pytest.raises(UserError) as caught:
        data.load(settings(tmp_path, tmp_path), data.Needs(True, 11, tiny_scenes.WIDTH))
    assert "coord.npy" in str(caught.value)
    assert "quat.npy" in str(caught.value)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"model__criteria": '[{"type": "CosinSimilarity"}]'}, "CosineSimilarity"),
        ({"model__criteria": '[{"type": "LovaszLoss"}]'}, "LovaszLoss"),
        ({"data__train__transform": '[{"type": "GridSampel"}]'}, "GridSample"),
        ({"model__type": "DefaultSegmentorV2"}, "seg_head"),
        ({"lora__target_stages": "[7]"}, "7"),
        ({"data__excluded": "wall"}, "excluded"),
        ({"adapter": "missing.pth"}, "missing.pth"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    given: dict[str, Any],
    part: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(files, tmp_path / "run", **given)) == 2
    error = capsys.readouterr().err
    assert part in error, error
    assert not (tmp_path / "run").exists()


def test_the_network_of_other_shape_needs_its_settings(files: Path, tmp_path: Path) -> None:
    cfg = settings(files, tmp_path)
    cfg.model.backbone = {}
    with pytest.raises(UserError, match="neither released shape"):
        models.skeleton(cfg)
    cfg.model.backbone = {**tiny_scenes.BACKBONE, "enc_chanels": 3}
    with pytest.raises(UserError, match="enc_channels"):
        models.skeleton(cfg)
    cfg.model.backbone = tiny_scenes.BACKBONE
    assert not isinstance(models.skeleton(cfg), DefaultSegmentorV2)


def test_one_cycle_gives_adamw_its_first_beta_too_and_resumes_exactly(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        group = self.param_groups[0]
        found.setdefault(run, []).append((group["lr"], group["betas"][0]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    given = {"scheduler__type": "OneCycleLR", "scheduler__pct_start": 0.5, "batch_size": 1}
    run = "whole"
    assert main(command(files, tmp_path / run, **given)) == 0
    run = "stopped"
    with signal_at_first_checkpoint(signal.SIGTERM):
        assert main(command(files, tmp_path / run, **given)) == 143
    assert len(found[run]) < 6
    assert main(["--resume", str(tmp_path / run)]) == 0
    assert found["stopped"] == found["whole"]

    cycle = OneCycle(6, pct_start=0.5)
    assert found["whole"] == [
        pytest.approx((1e-2 * cycle.lr_factor(update), cycle.beta1(update))) for update in range(6)
    ]
    assert cycle.beta1(2) == pytest.approx(0.85)
    assert tiny_scenes.rows(tmp_path / "stopped") == tiny_scenes.rows(tmp_path / "whole")


def test_the_learning_rate_warms_up_and_falls_to_its_least() -> None:
    cfg = Config()
    factor = objective.schedule(cfg, 10)
    rates = [cfg.optimizer.lr * factor(update, 500) for update in (0, 50, 499)]
    assert rates == pytest.approx([1e-5, 1e-4, 1e-6])
