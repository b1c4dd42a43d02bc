"""Whole training runs on a small random model: what they leave behind, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_midi_run
import torch
from tiny_transformers import CASES, recorded_transformer
from torch import nn

from lora_core.config import parse
from lora_core.testing.goldens import load_golden
from midi3d_lora import data, model, objective, scene_encodings
from midi3d_lora.adapter_files import load_adapter, read_adapter
from midi3d_lora.config import Config, Scheme
from midi3d_lora.encoder_cache import Encoded, Encodings
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.train import main
from midi3d_lora.transformer.groups import official_groups

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "loss")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_midi_run.write_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is through."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(tiny_midi_run.command(scenes, folder)) == 0
    return folder


def settings(scenes: Path, output: Path, **given: Any) -> Config:
    return parse(Config, tiny_midi_run.command(scenes, output, **given), prog="train")


def figures(folder: Path) -> list[tuple[str, ...]]:
    return [(row["split"], row["loss"], row["grad_norm"]) for row in tiny_midi_run.rows(folder)]


def loss_on_val(cfg: Config, net: nn.Module) -> float:
    made = scene_encodings.encodings_of(
        cfg, model.skeleton(cfg), torch.device("cpu"), torch.float32, kept=False
    )
    evaluate = objective.evaluation(cfg, data.load(cfg).val, made, RectifiedFlowScheduler())
    assert evaluate is not None
    with torch.no_grad():
        return evaluate(net)["loss"]


# -- results ---------------------------------------------------------------------------------------


def test_a_run_writes_what_the_guide_promises(finished: Path) -> None:
    for name in ("lora-final", "lora-best", "lora-epoch-1", "lora-epoch-2"):
        assert (finished / name / "lora_weights.pth").is_file(), name
    assert json.loads((finished / "training_args.json").read_text())["lora_rank"] == 2
    assert (finished / "adapter" / "adapter_model.safetensors").is_file()
    assert (finished / "config.yaml").is_file()
    assert [p.name for p in sorted((finished / "state").iterdir())][-1] == "checkpoint-4"
    summary = json.loads((finished / "training_summary.json").read_text())
    assert summary["steps"] == 4


def test_base_and_final_adapter_are_the_trained_model(scenes: Path, finished: Path) -> None:
    cfg = settings(scenes, finished)
    rows = tiny_midi_run.rows(finished, "val")
    net = model.build(cfg)
    adapter = load_adapter(net, finished / "lora-final" / "lora_weights.pth")
    assert (adapter.rank, adapter.alpha) == (2, 4)
    assert adapter.multi_instance_blocks == tiny_midi_run.BLOCKS
    assert loss_on_val(cfg, net) == pytest.approx(min(float(r["loss"]) for r in rows), rel=1e-5)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])  # it has learnt


def test_the_adapter_says_how_it_was_made_and_not_where(finished: Path) -> None:
    facts = read_adapter(finished / "lora-final").file.metadata
    assert facts["state"] == "state/checkpoint-4"
    assert facts["settings"]["learning_rate"] == 0.01
    assert "data_dir" not in facts["settings"]


def test_training_goes_towards_data_minus_noise(scenes: Path, tmp_path: Path) -> None:
    """From the same start the loss falls far; with the sign turned it would rise."""
    given = {"num_epochs": 20, "lora_rank": 8, "lora_alpha": 8, "save_every_n_epochs": 20,
             "eval_every_n_epochs": 20, "checkpointing_steps": 1000, "log_steps": 80,
             "guidance_dropout": 0, "lr_scheduler": "constant_with_warmup"}  # fmt: skip
    assert main(tiny_midi_run.command(scenes, tmp_path / "run", **given)) == 0
    first, last = (float(row["loss"]) for row in tiny_midi_run.rows(tmp_path / "run", "val"))
    assert last < 0.6 * first


def test_some_validation_scenes_are_generated_scored_and_shown(
    scenes: Path, finished: Path, tmp_path: Path
) -> None:
    given = {"preview_scenes": 1, "preview_every_n_epochs": 2, "preview_steps": 2,
             "preview_depth": 4, "tensorboard": "true"}  # fmt: skip
    assert main(tiny_midi_run.command(scenes, tmp_path / "run", **given)) == 0
    rows = tiny_midi_run.rows(tmp_path / "run", "val")
    scored = [bool(row["chamfer"]) and 0 <= float(row["f_score"]) <= 1 for row in rows]
    assert scored == [True, False, True]  # before, after one epoch, after two
    assert figures(tmp_path / "run") == figures(finished)  # training does not notice
    if importlib.util.find_spec("tensorboard"):
        events = b"".join(p.read_bytes() for p in (tmp_path / "run").glob("events*"))
        assert b"scene_0" in events


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"cache": "off", "cache_dir": None},
        {"num_workers": 2},
        {"cache": "off", "num_workers": 1},
    ],
    ids=["cache off", "workers", "cache off in a worker"],
)
def test_runs_are_bit_for_bit_the_same(
    scenes: Path, finished: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    assert main(tiny_midi_run.command(scenes, tmp_path / "run", **given)) == 0
    assert figures(tmp_path / "run") == figures(finished)
    first, second = (
        read_adapter(folder / "lora-final").file.tensors for folder in (finished, tmp_path / "run")
    )
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_gradient_checkpointing_changes_no_more_than_rounding(
    scenes: Path, finished: Path, tmp_path: Path
) -> None:
    """Without it inputs behind a LayerNorm are made again, which rounds in another way."""
    words = tiny_midi_run.command(scenes, tmp_path / "run", gradient_checkpointing="true")
    assert main(words) == 0
    first, second = (
        read_adapter(folder / "lora-final").file.tensors for folder in (finished, tmp_path / "run")
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_a_second_run_uses_the_cache_of_the_first(
    scenes: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (finished.parent / "cache").is_dir()
    words = tiny_midi_run.command(scenes, tmp_path / "run", cache_dir=finished.parent / "cache")
    assert main(words) == 0
    assert "encoding" not in capsys.readouterr().out
    assert figures(tmp_path / "run") == figures(finished)


def test_a_cache_that_cannot_hold_all_changes_no_number_and_that_is_said(
    scenes: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_midi_run.command(scenes, tmp_path / "run", cache_gb=2e-6)
    assert main(words) == 0
    assert "what does not fit is computed again" in capsys.readouterr().out
    assert figures(tmp_path / "run") == figures(finished)


def test_a_cache_that_is_damaged_while_training_is_healed(
    scenes: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.parent / "cache", cache)
    plain = scene_encodings.fill

    def harmed(*args: Any) -> None:
        plain(*args)
        for path in cache.rglob("*.features"):
            path.write_bytes(path.read_bytes()[:-5] + b"12345")

    monkeypatch.setattr(scene_encodings, "fill", harmed)
    assert main(tiny_midi_run.command(scenes, tmp_path / "run", cache_dir=cache)) == 0
    assert figures(tmp_path / "run") == figures(finished)


# -- continuing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["checkpoint-2", "state/checkpoint-2", "lora-epoch-1", "lora-epoch-1/lora_weights.pth"],
)
def test_a_run_continues_from_what_the_guide_names(
    finished: Path, tmp_path: Path, place: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    settings = (run / "config.yaml").read_text().replace(str(finished), str(run))
    (run / "config.yaml").write_text(settings)
    assert main(["--resume_from_checkpoint", str(run / place)]) == 0
    assert figures(run) == figures(finished)
    first, second = (read_adapter(f / "lora-final").file.tensors for f in (finished, run))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_checkpoint_that_is_gone_is_told(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume_from_checkpoint", str(finished / "checkpoint-77")]) == 2
    assert "checkpoint-77 is not there; there is checkpoint-" in capsys.readouterr().err


def test_an_adapter_can_be_trained_further(scenes: Path, finished: Path, tmp_path: Path) -> None:
    words = tiny_midi_run.command(
        scenes, tmp_path / "run", adapter=finished / "lora-final", lora_rank=16
    )
    assert main(words) == 0
    first = tiny_midi_run.rows(tmp_path / "run", "val")[0]
    best = min(float(row["loss"]) for row in tiny_midi_run.rows(finished, "val"))
    assert float(first["loss"]) == pytest.approx(best, rel=1e-5)
    assert read_adapter(tmp_path / "run" / "lora-final").rank == 2


# -- what cannot work ------------------------------------------------------------------------------


@pytest.mark.fault("C31")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mi_attention_blocks": ("blocks.9",)}, "blocks.9"),
        ({"lora_target_modules": ("to_x",)}, "to_x"),
        ({"lora_target_modules": ("attn2.to_q",)}, "has no effect"),
        ({"adapter": "nothing.pth"}, "nothing.pth"),
        ({"mixed_precision": "fp16"}, "fp16"),
    ],
)
def test_what_cannot_work_is_told_before_data_is_read(
    scenes: Path,
    tmp_path: Path,
    given: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(tiny_midi_run.command(scenes, tmp_path / "run", **given)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_parts_of_different_models_are_refused(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_midi_run.MODEL, folder)
    place = folder / "image_encoder_1" / "config.json"
    place.write_text(place.read_text().replace('"projection_dim": 12', '"projection_dim": 10'))
    words = tiny_midi_run.command(scenes, tmp_path / "run", pretrained_model=folder)
    assert main(words) == 2
    assert "cross_attention_dim is 12, but projection_dim" in capsys.readouterr().err


# -- the loss --------------------------------------------------------------------------------------


class Known(Encodings):
    """Encodings that a recorded case brings with it."""

    def __init__(self, encoded: list[Encoded]) -> None:
        self.known = encoded

    def encoded(self, sample: Any, device: torch.device) -> Encoded:
        return self.known[sample["number"]]


def test_a_lora_that_has_learnt_nothing_leaves_the_loss_of_the_base(
    scenes: Path, tmp_path: Path
) -> None:
    cfg = settings(scenes, tmp_path / "run")
    net = model.build(cfg)
    net.set_multi_instance_blocks(tiny_midi_run.BLOCKS)
    before = loss_on_val(cfg, net)
    assert loss_on_val(cfg, model.adapted(net, cfg)) == before


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_learning_rates_are_diffusers_one_update_earlier(kind: str) -> None:
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup, updates = (0 if kind == "constant" else 10), 100
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=updates)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    own = [objective.lr_factor(kind, update, updates, warmup) for update in range(updates)]
    assert own[:-1] == pytest.approx(rates[1:], abs=0.012)
    assert own[max(warmup - 1, 0)] == 1
    assert all(rate > 0 for rate in own)


def test_the_warm_up_takes_at_most_a_tenth_of_a_run() -> None:
    factor = objective.schedule(Config())
    assert factor(9, 100) == pytest.approx(1.0, abs=1e-3)
    assert factor(499, 10_000) == 1.0
    assert factor(250, 10_000) == pytest.approx(251 / 500)


@pytest.mark.parametrize("scheme", ["logit_normal_dist", "cosmap", "sigma_sqrt"])
def test_the_loss_of_a_batch_is_the_official_one(scheme: Scheme) -> None:
    """Three scenes of four rows, of which some fill up, and see nothing but themselves."""
    io, rows = GOLDEN.io, len(GOLDEN.io["latents"]) // len(GOLDEN.io["u"])
    names = ("image_embeds_1", "image_embeds_2", "latents")
    parts = zip(*(io[name].split(rows) for name in names), strict=True)
    known = [Encoded(one, two, mean, torch.full_like(mean, -80)) for one, two, mean in parts]
    groups = official_groups(len(io["latents"]), io["num_instances"], io["num_instances_per_batch"])
    batch = {
        "encodings": [{"number": number} for number in range(len(known))],
        "chosen": [torch.arange(rows)] * len(known),
        "sigmas": io["u"],
        "dropped": io["drop_scene"],
        "noise": io["noise"],
        "posterior_noise": torch.ones_like(io["noise"]),
        "scene_of_row": torch.arange(len(known)).repeat_interleave(rows),
        "instance_groups": groups.tolist(),
    }
    net = recorded_transformer(CASES["dit_5_layers"])
    loss = objective.loss_of(
        Config(weighting_scheme=scheme), Known(known), RectifiedFlowScheduler()
    )
    found = loss(net, batch)[0].item()
    assert found == pytest.approx(float(io[f"loss.{scheme}"]), rel=1e-5)
    if scheme == "logit_normal_dist":
        assert abs(found - float(io["loss_wrong_sign"])) > 0.01


@pytest.mark.parametrize("name", ["lora-final", "lora-best", "lora-epoch-10"])
def test_an_adapter_of_another_program_is_not_replaced_unasked(
    name: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "run" / name / "lora_weights.pth"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"weeks of work")
    assert main(tiny_midi_run.command(scenes, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert f"holds {name}/lora_weights.pth and no config.yaml" in said
    assert "choose another --output_dir" in said.lower()
    assert theirs.read_bytes() == b"weeks of work"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
