"""Faults of libraries, folders and bases that are found before anything is read."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import command, install

from lora_core.errors import ConfigError
from lora_core.testing.no_device import no_device
from lora_core.testing.refusals import as_nobody, files_limited_to
from sam2_lora import demo
from sam2_lora.__main__ import main as sam2_lora
from sam2_lora.artifacts import new_run, unfinished
from sam2_lora.config import Config
from sam2_lora.train import main

Refuse = Callable[..., str]
Capture = pytest.CaptureFixture[str]
PACKAGE = Path(__file__).parent.parent
SECRET = "hf_canary0123456789"


# -- libraries -------------------------------------------------------------------------------------


@pytest.mark.fault("C37")
@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["train", "--help"], ["train", "--version"]]
)
def test_help_and_version_answer_in_two_seconds_with_a_broken_torch(
    words: list[str], tmp_path: Path
) -> None:
    for name in ("torch", "transformers", "accelerate"):
        (tmp_path / name).mkdir()
        broken = "import time\ntime.sleep(30)\nraise ImportError('libcuda.so.1: no such file')\n"
        (tmp_path / name / "__init__.py").write_text(broken)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "sam2_lora", *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=29,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("usage: sam2-lora", "sam2-lora 0."))
    # Processor time: how long others keep the machine busy is not the command's fault.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.fault("C38")
def test_a_torchvision_for_another_torch_is_named_with_both_versions_and_the_cure(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    coco_pictures: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
    wrong = install(tmp_path / "site", "torchvision", "0.20.1", ["torch==2.5.1"], code)
    monkeypatch.syspath_prepend(wrong)
    message = refuse()
    for part in ("torchvision 0.20.1, made for torch==2.5.1,", torch.__version__, "nms"):
        assert part in message
    assert "pip uninstall torchvision" in message
    from sam2_lora import model

    with pytest.raises(ConfigError, match=r"torchvision 0\.20\.1"):
        model.load(demo.base_checkpoint())
    data = ["--data_root", str(coco_pictures), "--split", "val"]
    assert sam2_lora(["evaluate", "--checkpoint", str(demo.base_checkpoint()), *data]) == 2
    assert "torchvision 0.20.1" in capsys.readouterr().err


@pytest.mark.fault("C38")
@pytest.mark.slow
def test_transformers_own_message_about_that_torchvision_never_shows(
    tmp_path: Path, coco_pictures: Path
) -> None:
    code = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
    wrong = install(tmp_path / "site", "torchvision", "0.20.1", ["torch==2.5.1"], code)
    done = subprocess.run(
        [sys.executable, "-m", "sam2_lora", "train", *command(coco_pictures, tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(wrong)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: torchvision 0.20.1, made for torch==2.5.1,")
    assert "Traceback" not in done.stderr


def declared() -> list[str]:
    """What the package says that it needs."""
    with (PACKAGE / "pyproject.toml").open("rb") as text:
        return tomllib.load(text)["project"]["dependencies"]


@pytest.mark.fault("C39")
@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [
        ("transformers", "4.40.0", "transformers>="),
        ("accelerate", "0.21.0", "accelerate>="),
        ("peft", "0.4.0", "peft>="),
        ("torch", "1.13.1", "torch>="),
        ("safetensors", "0.3.0", "safetensors>="),
        ("lora-core", "9.9.0", "lora-core<0.2"),
    ],
)
def test_a_library_outside_its_range_stops_the_start_with_both_versions(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, version: str, wanted: str,
) -> None:  # fmt: skip
    # Installed from a clone, the package needs the lora-core beside it, in any version.
    site = install(tmp_path / "site", "sam2-lora", "0.1.0", declared())
    monkeypatch.syspath_prepend(install(site, name, version, []))
    message = refuse()
    assert f"{name} {version} is installed, " in message
    assert wanted in message
    assert 'pip install "' in message


@pytest.mark.fault("C39")
def test_a_release_that_the_package_excludes_is_too_new(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranges are read from what is installed, so a later bound needs no change of code."""
    bounded = [f"{n},<5.16" if n.startswith("transformers") else n for n in declared()]
    site = install(tmp_path / "site", "sam2-lora", "0.1.0", bounded)
    install(tmp_path / "site", "transformers", "99.0.0", [])
    monkeypatch.syspath_prepend(site)
    message = refuse()
    assert "transformers 99.0.0 is installed, sam2-lora needs transformers<5.16" in message


@pytest.mark.fault("C40")
@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        ("wandb", "--trainer.report_to wandb: it is not installed; pip install wandb"),
        ("[mlflow,clearml]", "pip install mlflow"),
        ("wanb", "did you mean 'wandb'?"),
        ("3", "report_to"),
    ],
)
def test_a_reporting_tool_that_is_not_installed_is_named_before_anything_is_read(
    refuse: Refuse, tool: str, expected: str
) -> None:
    assert expected in refuse("--trainer.report_to", tool)


@pytest.mark.fault("C41")
def test_a_metric_cannot_be_chosen_and_the_message_lists_those_there_are(refuse: Refuse) -> None:
    message = refuse("--trainer.metric_for_best_model", "eval_mAP")
    assert "the best follows the package's first metric (iou, dice, box_iou" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainer.optim", "adamm"], "unknown 'adamm'"),
        (["--trainer.lr_scheduler_type", "cosin"], "did you mean 'cosine'"),
        (["--trainer.hub_token", SECRET], "secrets do not belong into settings"),
    ],
)
@pytest.mark.fault("C04", "H29")
def test_settings_of_the_trainer_are_checked_before_data_and_weights(
    refuse: Refuse, words: list[str], expected: str
) -> None:
    message = refuse(*words)
    assert expected in message
    assert SECRET not in message


@pytest.mark.fault("C04")
def test_optimiser_settings_that_torch_refuses_are_faults_of_the_user(
    coco_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command(coco_pictures, tmp_path / "out"), "--trainer.adam_beta1", "2"]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert "Invalid beta parameter at index 0: 2.0" in message
    assert "Traceback" not in message


@pytest.mark.fault("C40", "C04")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainer.optim", "stable_adamw"], "--trainer.optim"),
        (["--trainer.optim", "galore_adamw"], "--trainer.optim"),
        (["--trainer.log_level", "nonsense"], "--trainer.log_level"),
        (["--trainer.torch_compile_backend", "nonsense"], "--trainer.torch_compile_backend"),
        (["--trainer.save_total_limit", "9"], "keep_last"),
    ],
)
def test_settings_of_the_trainer_that_cannot_work_here_are_no_fault_of_ours(
    refuse: Refuse, words: list[str], expected: str
) -> None:
    """An optimiser that is not installed, a name that is none, a limit that has no effect."""
    assert expected in refuse(*words)


@pytest.mark.fault("R29", "C17")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
    ],
)
def test_what_a_launcher_sets_beside_the_command_is_refused(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """`accelerate launch` hands its settings over in the environment, where nobody sees them."""
    monkeypatch.setenv(name, value)
    assert name in refuse()


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.fault("C24", "R37")
@pytest.mark.parametrize("setting", ["output_dir", "logs_dir", "cache_dir"])
def test_a_folder_that_cannot_be_made_is_refused_before_data_and_weights(
    refuse: Refuse, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    more = ["--targets", "decoder"] if setting == "cache_dir" else []
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refuse(*more, **{setting: path})
        assert f"--{setting} {path}: {tmp_path / 'file'} is not a folder" in message
    assert "is not a folder" in refuse(*more, **{setting: tmp_path / "link" / "below"})
    assert "at most 255 bytes" in refuse(*more, **{setting: tmp_path / ("n" * 256)})
    assert "at most 255 bytes" in refuse(*more, **{setting: tmp_path / ("ü" * 128)})
    deep = Path(*["n" * 200] * 20)
    assert "3840 for all" in refuse(*more, **{setting: tmp_path / deep})


@pytest.mark.fault("C24")
def test_a_zero_byte_in_a_folder_name_is_refused(
    settings_file: Callable[..., str],
    coco_pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(coco_pictures, tmp_path / "out")
    at = words.index("--output_dir")
    del words[at : at + 2]
    with no_device():
        assert main([*words, "--config", settings_file(r'output_dir: "a\0b"')]) == 2
    assert "no zero byte" in capsys.readouterr().err


@pytest.mark.fault("C24")
def test_a_folder_without_the_right_to_write_is_refused_at_the_start(
    open_folder: Path, coco_pictures: Path
) -> None:
    (open_folder / "closed").mkdir(mode=0o700)
    for place in (open_folder / "models", open_folder / "closed" / "models"):
        argv = command(coco_pictures, place)
        status, message = as_nobody(lambda argv=argv: main(argv))
        assert status == 2
        assert f"--output_dir {place}: cannot write in {place.parent}: Permission denied" in message
        assert "choose another folder" in message
        assert "Traceback" not in message


def assert_refused_for_room(output: Path, reason: str, data: Path, capsys: Capture) -> None:
    with no_device():
        assert main(command(data, output)) == 2
    message = capsys.readouterr().err
    assert f"--output_dir {output}: cannot write in {output.parent}: {reason}" in message
    assert "Make room" in message
    assert "Traceback" not in message


@pytest.mark.fault("C24", "R37")
def test_a_full_disk_is_refused_at_the_start(
    small_disk: Path, coco_pictures: Path, capsys: Capture
) -> None:
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filling").write_bytes(bytes(200_000))
    assert_refused_for_room(small_disk / "models", "No space left", coco_pictures, capsys)


@pytest.mark.fault("C24", "R37")
def test_a_place_that_takes_no_byte_is_refused_at_the_start(
    tmp_path: Path, coco_pictures: Path, capsys: Capture
) -> None:
    """As a full disk, without the right to make one."""
    with files_limited_to(0):
        assert_refused_for_room(tmp_path / "models", "File too large", coco_pictures, capsys)


@pytest.mark.fault("C23", "C24", "K50")
def test_runs_with_spaces_and_letters_of_all_kinds_in_long_names_never_mix(
    coco_pictures: Path, tmp_path: Path
) -> None:
    """The same command twice and a third with another rank, in the same second."""
    output = tmp_path / "mein Ördner 日本" / ("n" * 220)
    first = command(coco_pictures, output, targets="decoder_attention")
    assert main(first) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert main(first) == 0
    assert main([*first, "--lora_rank", "4"]) == 0
    runs = [path for path in output.iterdir() if path.name.startswith("sam2_")]
    tables = list((output / "logs").iterdir())
    assert (len(runs), len(tables)) == (3, 3)
    assert {path: path.read_bytes() for path in before} == before
    for path in tables:
        with path.open(newline="", encoding="utf-8") as text:
            steps = [(row["step"], row["split"]) for row in csv.DictReader(text)]
        assert len(set(steps)) == len(steps) == 3


@pytest.mark.fault("K50", "C23")
def test_runs_that_start_at_the_same_moment_have_folders_and_tables_of_their_own(
    tmp_path: Path,
) -> None:
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                rank = 4 if number % 2 else 8  # other names, but the same stamp
                where = {"output_dir": str(tmp_path / f"out{number % 2}"), "lora_rank": rank}
                run = new_run(Config(logs_dir=str(tmp_path / "logs"), **where), "tiny")
                (tmp_path / f"{number}.json").write_text(
                    json.dumps([str(run.folder), str(run.csv(Config(logs_dir="logs")))])
                )
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * 8
    made = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len({folder for folder, _ in made}) == 8
    assert len({table for _, table in made}) == 8
    assert len(list((tmp_path / "logs").iterdir())) == 8


@pytest.mark.fault("K50")
def test_of_a_dozen_runs_in_one_minute_the_last_is_continued(tmp_path: Path) -> None:
    cfg = Config(output_dir=str(tmp_path / "out"), logs_dir=str(tmp_path / "logs"))
    for _ in range(12):
        run = new_run(cfg, "tiny")
        (run.state / "checkpoint-1").mkdir(parents=True)
        assert unfinished(cfg) == run.folder


@pytest.mark.fault("K50")
def test_a_clock_that_is_set_back_leads_to_a_new_name(tmp_path: Path) -> None:
    cfg = Config(output_dir=str(tmp_path / "out"), logs_dir=str(tmp_path / "logs"))
    runs = [new_run(cfg, "tiny") for _ in range(4)]  # all at one reading of the clock, or nearly
    assert len({run.folder for run in runs}) == len({run.csv(cfg) for run in runs}) == 4


@pytest.mark.fault("C23")
def test_an_unfinished_run_with_the_same_settings_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = Config(output_dir=str(tmp_path / "out"), logs_dir=str(tmp_path / "logs"))
    run = new_run(cfg, "tiny")
    (run.state / "checkpoint-5").mkdir(parents=True)
    assert capsys.readouterr().out == ""
    again = new_run(cfg, "tiny")
    assert f"to continue it: --resume {run.folder}" in capsys.readouterr().out
    assert again.folder != run.folder
    new_run(Config(output_dir=cfg.output_dir, logs_dir=cfg.logs_dir, seed=3), "tiny")
    (run.folder / "training_summary.json").write_text("{}")  # it came to its end
    new_run(cfg, "tiny")
    assert capsys.readouterr().out == ""


@pytest.mark.fault("C24")
@pytest.mark.parametrize("verb", ["evaluate", "predict", "merge", "prepare", "demo"])
def test_every_command_refuses_an_output_that_cannot_be_made_before_it_works(
    verb: str, coco_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(demo.base_checkpoint())
    picture = next((coco_pictures / "val").glob("*.png"))
    words = {
        "evaluate": ["--checkpoint", base, "--data_root", str(coco_pictures), "--output_dir"],
        "predict": ["--checkpoint", base, "--images", str(picture), "--output"],
        "merge": ["--checkpoint", base, "--adapter", base, "--output"],
        "prepare": ["--source", str(coco_pictures), "--output"],
        "demo": ["--steps", "1", "--output"],
    }
    (tmp_path / "file").write_text("x")
    for place, reason in (
        (tmp_path / "file" / "x" / "y", "is not a folder: choose another"),
        (tmp_path / ("n" * 256) / "x", "at most 255 bytes"),
    ):
        with no_device():
            assert sam2_lora([verb, *words[verb], str(place)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {words[verb][-1]} {tmp_path}"), message
        assert reason in message


@pytest.mark.fault("H42")
def test_the_name_of_a_run_is_made_of_its_settings_and_the_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Braces and dots in a setting are plain text; nothing leaves the folder that was named."""
    monkeypatch.chdir(tmp_path)
    cfg = Config(output_dir="out/{timestamp}/%s", logs_dir="logs/{run}", lora_alpha=1e20)
    run = new_run(cfg, "tiny")
    assert run.folder.parent == Path("out/{timestamp}/%s")
    assert run.csv(cfg).parent == Path("logs/{run}")
    assert ".." not in run.folder.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out"]


@pytest.mark.fault("H42")
def test_a_run_name_with_a_path_in_it_is_refused(refuse: Refuse) -> None:
    assert "--trainer.run_name" in refuse("--trainer.run_name", "../../x")


# -- the base, and where a run begins --------------------------------------------------------------


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 898083611\n")


@pytest.mark.fault("C25")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_is_called_what_it_is(
    refuse: Refuse, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"base{suffix}"
    assert f"looked at {path}" in refuse(checkpoint=path)
    pointer(path)
    message = refuse(checkpoint=path)
    assert f"{path} is a Git LFS pointer" in message
    assert "git lfs pull" in message
    path.write_text("\n<!DOCTYPE html>\n<html><title>404</title></html>")
    assert f"{path} is a web page" in refuse(checkpoint=path)
    path.write_text("")
    assert f"{path} is empty" in refuse(checkpoint=path)
    path.write_bytes(b"\x80\x04garbage" * 100)
    assert str(path) in refuse(checkpoint=path)
    path.unlink()
    path.mkdir()
    message = refuse(checkpoint=path)
    assert "needs config.json and model.safetensors; here is: nothing" in message
    (path / "config.json").write_text("{}")
    pointer(path / "model.safetensors")
    assert str(path) in refuse(checkpoint=path)


@pytest.mark.fault("C25")
def test_a_published_name_that_is_missing_comes_with_its_address(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refuse(checkpoint="sam2.1_hiera_tiny.pt")
    assert "Download it: https://dl.fbaipublicfiles.com/segment_anything_2/092824/" in message
    assert "no checkpoint xxx" in refuse(checkpoint="x" * 300)


@pytest.mark.fault("C26")
def test_a_base_of_another_size_is_refused_with_counts_and_the_first_names(
    refuse: Refuse, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    shutil.copy(demo.base_checkpoint(), base)
    config = json.loads(demo.base_checkpoint().with_suffix(".json").read_text())
    config["vision_config"]["backbone_config"]["blocks_per_stage"][2] += 2
    base.with_suffix(".json").write_text(json.dumps(config))
    message = refuse(checkpoint=base, lines=4)
    assert f"{base}: 239 of 275 tensors matched the model of {base.with_suffix('.json')}" in message
    assert "26 missing: image_encoder.trunk.blocks.7.norm1.weight, " in message
    assert "2 unexpected: image_encoder.trunk.blocks.6.proj.bias, " in message
    assert (
        "10 other shape: image_encoder.trunk.blocks.6.attn.qkv.weight [576, 96] instead" in message
    )


@pytest.mark.fault("C27")
def test_a_base_of_which_nothing_matches_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"model": {"layer1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}}, path)
    message = refuse(checkpoint=path)
    assert "0 of 2 tensors matched the names of SAM 2" in message
    assert "layer1.weight" in message


@pytest.mark.fault("C28")
def test_resume_and_adapter_together_are_refused_with_the_difference(
    refuse: Refuse, tmp_path: Path
) -> None:
    message = refuse(resume=tmp_path, adapter=tmp_path)
    assert "--resume continues a run with all its state" in message
    assert "--adapter starts a new run from weights alone" in message
    missing = refuse(adapter=tmp_path / "gone")
    assert f"--adapter {tmp_path / 'gone'} does not exist" in missing
