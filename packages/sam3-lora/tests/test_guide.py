"""What the guide shows works as it stands there: configuration, commands, file names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_core.config import parse
from sam3_lora.config import ROLES, Config
from sam3_lora.train import settings

PACKAGE = Path(__file__).parent.parent
EXAMPLE = PACKAGE / "src" / "configs" / "lora_config_example.yaml"
WHOLE = """
lora:
  rank: 8
  alpha: 16.0
  dropout: 0.1
  target_modules:
    - q_proj
    - k_proj
    - v_proj
    - out_proj
    - linear1
    - linear2
dataset:
  train_img_folder: /workspace/sam3_lora/data/train
  train_ann_file: /workspace/sam3_lora/data/train/_annotations.coco.json
  val_img_folder: /workspace/sam3_lora/data/valid
  val_ann_file: /workspace/sam3_lora/data/valid/_annotations.coco.json
  resolution: 1008
  max_ann_per_img: 200
training:
  max_epochs: 20
  batch_size: 2
  learning_rate: 1e-4
  gradient_accumulation_steps: 1
  use_amp: true
  amp_dtype: bfloat16
"""


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(Config, ["--config", str(path)], prog="t")


def test_the_example_is_the_defaults() -> None:
    assert parse(Config, ["--config", str(EXAMPLE)], prog="t") == Config()


def test_the_guides_sections_are_the_defaults_but_for_their_folders(tmp_path: Path) -> None:
    cfg = read(tmp_path, WHOLE)
    assert cfg.dataset.train_img_folder == "/workspace/sam3_lora/data/train"
    assert cfg.dataset.val_ann_file == "/workspace/sam3_lora/data/valid/_annotations.coco.json"
    cfg.dataset = Config().dataset
    assert cfg == Config()
    assert isinstance(yaml.safe_load(WHOLE)["training"]["learning_rate"], str)  # YAML's own view
    assert cfg.training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "roles", "rank", "alpha"),
    [
        ("lora: {rank: 8, alpha: 16.0, target_modules: [q_proj, k_proj, v_proj, out_proj]}",
         ROLES[:4], 8, 16.0),
        ("lora:\n  rank: 16\n  alpha: 32.0\n  target_modules:\n    - all\n", ("all",), 16, 32.0),
        ('lora: {target_modules: ["q_proj", "v_proj"]}', ("q_proj", "v_proj"), 8, 16.0),
    ],
    ids=["attention", "all", "minimal"],
)  # fmt: skip
def test_the_guides_choices_of_layers_are_taken(
    tmp_path: Path, text: str, roles: tuple[str, ...], rank: int, alpha: float
) -> None:
    lora = read(tmp_path, text).lora
    assert (tuple(lora.target_modules), lora.rank, lora.alpha) == (roles, rank, alpha)


def test_masks_are_switched_on_as_the_guide_does(tmp_path: Path) -> None:
    cfg = read(tmp_path, "training:\n  enable_segmentation: true  # Enable mask prediction\n")
    assert cfg.training.enable_segmentation
    assert "mask_decoder" in cfg.lora.components(masks=True)


def test_the_guides_command_starts_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python train.py --config src/configs/lora_config_example.yaml`, in the package's folder."""
    monkeypatch.chdir(PACKAGE)
    cfg, run = settings(["--config", "src/configs/lora_config_example.yaml"])
    assert (cfg, run) == (Config(), None)
    assert (PACKAGE / "train.py").is_file()


def test_the_guides_command_resumes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_core.config import dump

    monkeypatch.chdir(tmp_path)
    example = tmp_path / "src" / "configs" / EXAMPLE.name
    example.parent.mkdir(parents=True)
    example.write_text(EXAMPLE.read_text())
    folder = Path("experiments") / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.pt").write_bytes(b"")
    dump(Config(), folder / "config.yaml")
    argv = "--config src/configs/lora_config_example.yaml --resume experiments/checkpoints/best.pt"
    cfg, run = settings(argv.split())
    assert run is not None
    assert (run.folder, run.csv.parent) == (folder, Path("experiments") / "logs")
    assert cfg.resume == "experiments/checkpoints/best.pt"
    cfg.resume = None
    assert cfg == Config()
