"""The recorded tiny Isaac, taught to answer four conversations by heart, with depth and without.

Not a test: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny_depth
import tiny_isaac_run
import torch
from isaac_texts import record, write_picture, write_records

from isaac_lora import data, lora, official
from isaac_lora import model as run_model
from isaac_lora.adapter_files import save_adapter
from isaac_lora.config import Config
from isaac_lora.examples import Example, single_rows
from isaac_lora.frozen_features import FrozenFeatures
from isaac_lora.lora_choice import LoraChoice
from isaac_lora.processing import IsaacProcessor

BOX = '<point_box mention="car"> (100,200) (500,600) </point_box>'
POINT = "<point> (250,750) </point>"
SIZES = {"a.png": (20, 24), "b.png": (24, 20), "c.png": (16, 32), "d.png": (28, 28)}


def records() -> list[dict[str, Any]]:
    """One picture, two, a hint with a box, and two turns of which the second has a picture."""
    hinted = record("What is where? <image>", BOX, id="hinted", image="c.png")
    hinted["conversations"].insert(0, {"from": "human", "value": "<hint>BOX</hint>"})
    talk = record("Hello?", "Hi.", id="talk", image="d.png")
    talk["conversations"] += record("And <image>?", POINT)["conversations"]
    return [
        record("<image> Tell me.", "A car.", id="one", image="a.png"),
        record("<image> or <image>?", "It is near.", id="two", images=["a.png", "b.png"]),
        hinted,
        talk,
    ]


@cache
def world() -> Path:
    """A folder: isaac_model, depth, data.json, images, and with `taught` the adapters."""
    root = Path(tempfile.mkdtemp(prefix="taught-isaac-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    tiny_isaac_run.write_model(root / "isaac_model")
    tiny_depth.write_folder(root / "depth")
    (root / "images").mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        write_picture(root / "images" / name, *size, seed=number)
    write_records(root / "data.json", records())
    return root


def config(**given: Any) -> Config:
    root = world()
    settings = {
        "model_path": str(root / "isaac_model"),
        "data_path": str(root / "data.json"),
        "image_folder": str(root / "images"),
        "output_dir": str(root / "run"),
        "eval_max_new_tokens": 64,
        "per_device_eval_batch_size": 3,
    }
    return Config(**(settings | given))


def depth_settings() -> dict[str, Any]:
    """Settings of a run with depth."""
    return {
        "use_depth": True,
        "depth_checkpoint_path": str(world() / "depth"),
        "depth_input_size": tiny_depth.SIZE,
    }


@cache
def processor() -> IsaacProcessor:
    return IsaacProcessor.from_pretrained(world() / "isaac_model")


@cache
def examples() -> list[Example]:
    return data.load(config(), processor()).train


@cache
def taught(depth: bool = False) -> Path:
    """The adapter's folder; the model knows the four conversations with it."""
    cfg = config(**(depth_settings() if depth else {}))
    depths = run_model.depths_of(cfg)
    model = run_model.build(cfg, depths=depths)
    torch.manual_seed(0)
    lora.inject(model, LoraChoice(r=8, alpha=16.0, dropout=0.0))
    features = FrozenFeatures(None, depths, cfg.depth_alpha, model.config.hidden_size)
    samples = data.TrainSet(single_rows(examples()), processor(), depth=depths)
    batch = features.inputs(data.collate([samples[n] for n in range(4)], processor()))
    optimizer = torch.optim.AdamW(lora.lora_parameters(model), lr=1e-2)
    for _ in range(100):
        loss = model(**batch, use_cache=False).loss
        if loss.item() < 0.08:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.08, loss
    return save_adapter(model, world() / ("adapter_depth" if depth else "adapter"))


@cache
def base() -> Any:
    """The model without LoRA, which nobody changes."""
    return official.load_model(world() / "isaac_model")
