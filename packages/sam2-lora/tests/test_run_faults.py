"""Whole runs: what they leave and show, whatever surrounds them."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import sysconfig
import termios
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import HOSTILE_NAME, command

from lora_core.testing.no_device import no_device
from lora_core.testing.safe_source import unsafe_calls
from sam2_lora.train import main

Refuse = Callable[..., str]
PACKAGE = Path(__file__).parent.parent
SECRET = "hf_canary0123456789"


# -- whole runs ------------------------------------------------------------------------------------


class Whole:
    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out = folder, out
        (self.run,) = [path for path in folder.iterdir() if path.name.startswith("sam2_")]

    def rows(self) -> list[dict[str, str]]:
        (path,) = (self.folder / "logs").iterdir()
        with path.open(newline="", encoding="utf-8") as text:
            return list(csv.DictReader(text))


@pytest.fixture(scope="module")
def whole(coco_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """One run with recomputed activations and TensorBoard, secrets around it, the network cut."""
    folder = tmp_path_factory.mktemp("whole")
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET, "MY_PASSWORD": SECRET}
    argv = command(
        coco_pictures, folder, steps=3, eval_steps=2, log_steps=1, tensorboard=True,
        gradient_checkpointing=True, learning_rate=1e-2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name, value in secrets.items():
            patch.setenv(name, value)
        warnings.filterwarnings("error", message="None of the inputs")
        out = io.StringIO()
        with contextlib.redirect_stdout(out), no_device(weights=True):
            assert main(argv) == 0
    return Whole(folder, out.getvalue())


@pytest.mark.fault("C32")
def test_steps_that_are_no_multiple_of_the_interval_end_with_a_validation(whole: Whole) -> None:
    validated = [row["step"] for row in whole.rows() if row["split"] == "val"]
    assert validated == ["0", "2", "3"]


@pytest.mark.fault("C32")
def test_an_interval_longer_than_the_run_validates_at_its_end(
    coco_pictures: Path, tmp_path: Path
) -> None:
    assert main(command(coco_pictures, tmp_path, steps=2, eval_steps=1000)) == 0
    (path,) = (tmp_path / "logs").iterdir()
    with path.open(newline="", encoding="utf-8") as text:
        rows = [row["step"] for row in csv.DictReader(text) if row["split"] == "val"]
    assert rows == ["0", "2"]


@pytest.mark.fault("C40", "H40")
def test_training_needs_no_network_and_follows_no_address_in_the_data(whole: Whole) -> None:
    assert (whole.run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.fault("C42")
def test_recomputed_activations_leave_every_adapter_its_gradient(whole: Whole) -> None:
    (path,) = whole.run.glob("final_lora_step3.torch")
    tensors = torch.load(path, weights_only=True)["tensors"]
    factors = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}
    assert len(factors) > 20
    assert [name for name, tensor in factors.items() if not tensor.any()] == []


@pytest.mark.fault("H29")
def test_no_file_of_a_run_holds_a_secret_of_the_environment(whole: Whole) -> None:
    files = [path for path in whole.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in whole.out


@pytest.mark.fault("H30", "H47")
def test_names_from_the_data_are_text_everywhere(whole: Whole) -> None:
    assert HOSTILE_NAME[:40] in whole.out  # neither formatted nor run
    events = b"".join(path.read_bytes() for path in (whole.run / "tensorboard").iterdir())
    assert b"&lt;img src=x" in events
    assert b"<img src=x" not in events
    assert not Path("canary").exists()


# -- terminals -------------------------------------------------------------------------------------


@pytest.mark.fault("R30")
@pytest.mark.parametrize("closed", ["stdout", "both", "reader"])
def test_a_run_ends_well_when_nobody_listens(
    coco_pictures: Path, tmp_path: Path, closed: str
) -> None:
    argv = command(coco_pictures, tmp_path, targets="decoder_attention")

    def work() -> int:
        if closed == "reader":
            reader, writer = os.pipe()
            os.dup2(writer, 1)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            os.close(reader)
        else:
            sys.stdout = None  # type: ignore[assignment] # as Python has it after `>&-`
            os.close(1)
            if closed == "both":
                sys.stderr = None  # type: ignore[assignment]
        return main(argv)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.glob("sam2_*/training_summary.json"))


@pytest.mark.fault("R30")
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_narrow_terminal_gets_lines_that_fit_and_a_dumb_one_no_bar(
    coco_pictures: Path, tmp_path: Path, terminal: str
) -> None:
    argv = command(coco_pictures, tmp_path, targets="decoder_attention", steps=2, log_steps=1)
    child, screen = pty.fork()
    if child == 0:
        status = 1
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 40, 0, 0))
            os.environ["TERM"] = terminal
            os.environ.pop("COLUMNS", None)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
            status = main(argv)
            sys.stdout.flush()
        finally:
            os._exit(status)
    shown = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    text = shown.decode()
    assert "step 1/2" in text if terminal == "dumb" else "\x1b[K" in text
    if terminal == "dumb":
        assert "\x1b" not in text
    else:
        bars = [piece for piece in text.split("\r\x1b[K") if "/2" in piece.splitlines()[:1]]
        bars += [piece.splitlines()[0] for piece in text.split("\r\x1b[K")[1:] if piece.strip()]
        drawn = [bar for bar in bars if "left" in bar or bar.startswith("[")]
        assert drawn
        assert max(map(len, drawn)) < 40


# -- safety ----------------------------------------------------------------------------------------


@pytest.mark.fault("H26")
def test_the_package_runs_no_text_and_no_shell() -> None:
    assert unsafe_calls(PACKAGE / "src" / "sam2_lora") == []


@pytest.mark.fault("H27")
def test_modules_in_the_working_directory_are_not_imported(
    settings_file: Callable[..., str], tmp_path: Path
) -> None:
    script = Path(sysconfig.get_path("scripts")) / "sam2-lora"
    assert script.is_file(), "the tests need the package installed: pip install -e"
    canary = tmp_path / "canary"
    for name in ("yaml", "torch", "numpy", "jsonargparse", "lora_core", "sam2_lora", "json",
                 "sitecustomize", "usercustomize", "sam2_lora_plugin", "conftest"):  # fmt: skip
        (tmp_path / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(script), "train", "--config", settings_file("seed: 3"), "--print_config"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seed: 3" in done.stdout
    assert not canary.exists()
