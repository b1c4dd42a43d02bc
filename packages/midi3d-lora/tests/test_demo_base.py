"""The committed tiny base is as good as its card says, and looks at its pictures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core.demo_folder import words
from midi3d_lora import data, demo, demo_run, model, objective, prepare, scene_encodings
from midi3d_lora.config import Config
from midi3d_lora.demo_base import scenes
from midi3d_lora.flow.losses import SIGMA_GRID
from midi3d_lora.meshes.extraction import ExtractionSettings
from midi3d_lora.pipeline import MIDIPipeline

SCENES = 12  # of the card's 60
MARGIN = 0.03  # the sample is a part of the card's
CPU = torch.device("cpu")
STYLES = {"indoors": scenes.INDOORS, "outdoors": scenes.OUTDOORS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared scenes that the base has not seen, of both styles."""
    folder = tmp_path_factory.mktemp("base")
    demo.write(folder / "data", {})
    for name, style in STYLES.items():
        made = {f"{k:03}": one for k, one in enumerate(scenes.held_out(SCENES, style))}
        demo.write_meshes(folder / "data" / demo.MESHES / name, made)
        assert prepare.main(words(demo_run.preparing(folder, name))) == 0
    return folder


def settings(folder: Path, style: str) -> Config:
    found = demo_run.training(demo_run.Options(), folder)
    values = {name: str(v) if isinstance(v, Path) else v for name, v in found.items()}
    place = str(folder / "scenes" / style)
    return replace(Config(**values), data_dir=place, val_data_dir=place)  # type: ignore[arg-type]


def loss(folder: Path, style: str, *, blind: bool = False) -> float:
    """The mean validation loss of scenes of a style."""
    cfg = settings(folder, style)
    net = model.build(cfg)
    net.set_multi_instance_blocks(cfg.mi_attention_blocks)
    splits = data.load(cfg)
    encodings = scene_encodings.encodings_of(cfg, model.skeleton(cfg), CPU, torch.float32)
    scene_encodings.fill(encodings, splits, CPU)
    if blind:
        net.register_forward_pre_hook(blindly, with_kwargs=True)
    measure = objective.evaluation(cfg, splits.val, encodings, model.scheduler_of(cfg))
    assert measure is not None
    with torch.no_grad():
        figures = measure(net)
    assert len(figures) == 2 + len(SIGMA_GRID)
    return figures["loss"]


def blindly(net: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Without pictures, as a tenth of the scenes in training."""
    x, t, first, second = args
    return (x, t, torch.zeros_like(first), torch.zeros_like(second)), kwargs


def card() -> dict[str, tuple[float, float]]:
    """Name in backquotes -> figures indoors and outdoors, from the rows of the model card."""
    text = demo.base_model().with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(\w+)`\s*\| ([\d.]+) \| ([\d.]+) \|", text)
    return {name: (float(indoors), float(outdoors)) for name, indoors, outdoors in rows}


def test_unseen_scenes_score_as_the_card_says(folder: Path) -> None:
    found = loss(folder, "indoors"), loss(folder, "outdoors")
    assert found == pytest.approx(card()["loss"], abs=MARGIN)
    assert found[1] > found[0] + MARGIN  # what an adapter has to learn


def test_without_pictures_the_loss_is_worse(folder: Path) -> None:
    assert loss(folder, "indoors", blind=True) > loss(folder, "indoors") + MARGIN


def test_an_object_of_the_picture_is_generated_where_it_stands() -> None:
    pipe = MIDIPipeline.from_pretrained(demo.base_model(), multi_instance_blocks=demo.BLOCKS)
    pipe.set_progress_bar_config(disable=True)
    scene = next(one for one in scenes.held_out(20) if len(one) == 2)
    picture = scene.picture()
    made = pipe(
        picture.rgb,
        picture.instances,
        num_inference_steps=20,
        guidance_scale=2.0,
        seed=0,
        extraction=ExtractionSettings(depth=5, coarse_depth=4, smooth=False),
    )
    true = np.array([mesh.vertices.mean(axis=0) for mesh in scene.meshes()])
    for k, mesh in enumerate(made.meshes):
        assert mesh is not None
        assert np.linalg.norm(true - mesh.vertices.mean(axis=0), axis=1).argmin() == k
