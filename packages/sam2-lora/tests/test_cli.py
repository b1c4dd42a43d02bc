"""The commands: those of the README parse, help is quick, the guide's scripts run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core.config import parse
from lora_core.errors import ConfigError
from lora_core.testing import check_commands
from lora_core.testing.console import check_light
from sam2_lora import demo, demo_run, evaluate, find_lr, merge, predict, prepare
from sam2_lora.__main__ import COMMANDS, main
from sam2_lora.config import Config

PACKAGE = Path(__file__).parent.parent
OPTIONS = {
    "train": Config,
    "evaluate": evaluate.Options,
    "predict": predict.Options,
    "merge": merge.Options,
    "prepare": prepare.Options,
    "demo": demo_run.Options,
    "find-lr": find_lr.Options,
}
GUIDE = (
    "--learning_rate 1e-3 --weight_decay 0.01 --steps 10000 --batch_size 1 "
    "--lora_rank 8 --lora_alpha 16 --lora_dropout 0.05"
)


def verb(argv: list[str]) -> None:
    parse(OPTIONS[argv[0]], argv[1:], prog=argv[0])


def settings(argv: list[str]) -> None:
    parse(Config, argv, prog="train")


# The repository's own is missing where the package was taken out of it.
@pytest.mark.parametrize("readme", [PACKAGE / "README.md", *PACKAGE.parents[1].glob("README.md")])
def test_every_command_of_the_readme_parses(readme: Path) -> None:
    scripts = {"train_lora_sam2_full_dataset.py": settings, "train_lora.py": settings}
    assert check_commands(readme, {"sam2-lora": verb, **scripts})


def test_the_guides_settings_are_the_defaults() -> None:
    cfg = parse(Config, [], prog="t")
    assert parse(Config, GUIDE.split(), prog="t") == cfg == Config()
    assert (cfg.data_root, cfg.output_dir) == ("datasets/Data/splits", "models/severstal_lora")
    assert (cfg.checkpoint, cfg.logs_dir) == ("sam2_hiera_large.pt", "logs")
    assert (cfg.log_steps, cfg.eval_steps, cfg.gradient_accumulation_steps) == (100, 500, 1)
    assert (cfg.patience, cfg.min_delta, cfg.max_grad_norm, cfg.seed) == (7, 1e-4, 1.0, 42)


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_the_guides_ablations_parse(rank: int) -> None:
    assert parse(Config, ["--lora_rank", str(rank)], prog="t").lora_rank == rank


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--lora_rnk 8", "lora_rank"),
        ("--image_size 1000", "try 992"),
        ("--image_size 256x1610", "256x1600"),
        ("--targets decodr", "decoder"),
        ("--lora_dropout 1.0", "0 <= p < 1"),
        ("--steps 0", "at least 1"),
        ("--learning_rate 0", "above 0"),
        ("--cache_dir c", "--targets decoder"),
        ("--cache_dir c --targets decoder --shard_base", "leave one of them out"),
        ("--batch_size four", "batch_size"),
    ],
)
def test_a_setting_that_cannot_work_is_named(flags: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(Config, flags.split(), prog="t")


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(command: list[str]) -> None:
    check_light("sam2-lora", command)


def test_nothing_needs_torchvision(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None; import sam2_lora.train; "
        "from sam2_lora import Predictor, demo; import numpy as np; "
        "p = Predictor.load(demo.base_checkpoint()); p.set_image(np.zeros((64, 64, 3), np.uint8)); "
        "p.predict(points=[[3, 4]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_guides_script_trains_on_the_guides_tree(tmp_path: Path) -> None:
    demo.write_severstal(tmp_path / "datasets" / "Data" / "splits", train=3, val=2, test=2)
    done = subprocess.run(
        [
            sys.executable, str(PACKAGE / "train_lora_sam2_full_dataset.py"),
            *GUIDE.replace("10000", "2").split(), "--image_size", "64x320",
            "--checkpoint", str(demo.base_checkpoint()), "--num_workers", "0",
        ],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "models" / "severstal_lora").iterdir()
    assert folder.name.startswith("sam2_custom_lora_r8_a16_lr1e-3_")
    assert list((tmp_path / "logs").glob("training_metrics_lora_*.csv"))
    assert "test split" in done.stdout
    # What there is, pictures without objects among it, is said before the training.
    assert re.search(r"split +pictures +without objects +objects", done.stdout)
    assert re.search(r"^val +2 +0 ", done.stdout, re.MULTILINE)
