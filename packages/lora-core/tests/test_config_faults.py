"""Faults of settings from Python: the same classes and messages as on the command line."""

import json
import os
import re
import sys
import tomllib
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

from lora_core import (
    LoraConfig,
    inject,
    load_adapter,
    module_names,
    preflight,
    remove,
    save_adapter,
    summary,
)
from lora_core.config import dump, option, parse
from lora_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericError,
    UserError,
    run,
)
from lora_core.guards import Guards
from lora_core.report import Progress, RunLog, say
from lora_core.settings import as_yaml, plain
from lora_core.testing.no_device import Touched, no_device
from lora_core.testing.safe_source import unsafe_calls
from lora_core.training.arguments import choose_device, choose_precision
from lora_core.training.arguments import training_arguments as arguments
from lora_core.training.fields import check_extra

REPOSITORY = Path(__file__).parents[3]
WORKFLOWS = REPOSITORY / ".github" / "workflows"
needs_repository = pytest.mark.skipif(
    not WORKFLOWS.is_dir(), reason="needs the repository around the package"
)
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.act = nn.LayerNorm(8), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.q_proj(x) + self.v_proj(x)))


class Towers(nn.Module):
    """Two towers whose layers have the same names."""

    def __init__(self):
        super().__init__()
        self.vision = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(3))})
        self.text = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(2))})

    def forward(self, x):
        for block in (*self.vision["blocks"], *self.text["blocks"]):
            x = block(x)
        return x


def refusal(config, **more):
    model = Towers()
    before = sorted(model.state_dict())
    with pytest.raises(ConfigError) as caught:
        inject(model, LoraConfig(**config), **more)
    assert sorted(model.state_dict()) == before
    assert not hasattr(model, "_lora_configs")
    return str(caught.value)


# -- LoRA settings ---------------------------------------------------------------------------------


@pytest.mark.fault("C06", "C07", "C08")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 0}, "r is 0: a rank is a whole number of at least 1"),
        ({"r": -1}, "r is -1"),
        ({"r": 8.5}, "r is 8.5"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0: alpha must be a finite number above 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "alpha must be a finite number above 0"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e+300"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern['q_proj'] is nan"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1: it must be 0 <= p < 1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
    ],
)
def test_rank_alpha_and_dropout_that_peft_would_take_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        LoraConfig(["q_proj"], **settings)


@pytest.mark.fault("C06")
def test_a_rank_above_the_layer_is_one_warning_with_the_layers():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject(Towers(), LoraConfig(["q_proj"], r=9))
    (warning,) = caught
    text = str(warning.message)
    assert "vision.blocks.0.q_proj (r 9, weight allows 8)" in text
    assert text.count("weight allows 8") == 5


@pytest.mark.fault("C09", "C10")
def test_a_target_without_a_match_is_named_even_beside_one_that_matches():
    message = refusal({"target_modules": ["q_proj", "v_prj", "k_proj"]})
    assert "'v_prj' matches no module. did you mean 'v_proj'" in message
    assert "'k_proj' matches no module." in message
    assert "'q_proj' matches" not in message
    assert "matches no module" in refusal({"target_modules": "nothing.*"})
    assert "exclude_modules: 'v_prj' matches no module" in refusal(
        {"target_modules": ["q_proj"], "exclude_modules": ["v_prj"]}
    )
    assert "modules_to_save: 'nrm'" in refusal(
        {"target_modules": ["q_proj"], "modules_to_save": ["nrm"]}
    )


@pytest.mark.fault("C11")
def test_exclusion_wins_by_full_path_and_the_table_counts_the_blocks():
    model = Towers()
    config = LoraConfig(["q_proj", "v_proj"], exclude_modules=[r"re:vision\..*"])
    text = str(inject(model, config))
    assert "text.blocks.{0..1}.{q,v}_proj x 4 " in text
    assert "vision" not in text
    assert "4 adapted modules" in text
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith("text.") for name in trained)


@pytest.mark.fault("C12")
@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("norm", "vision.blocks.0.norm (LayerNorm)"),
        ("act", "vision.blocks.0.act (ReLU)"),
        ("vision.blocks", "vision.blocks (ModuleList)"),
        ("text", "text (ModuleDict)"),
        ("re:.*norm", "vision.blocks.0.norm (LayerNorm)"),
        ("**.act", "vision.blocks.0.act (ReLU)"),
    ],
)
def test_a_layer_that_cannot_take_lora_is_named_with_its_kind(target, kind):
    message = refusal({"target_modules": ["q_proj", target]})
    assert kind in message
    assert "cannot be adapted" in message


@pytest.mark.fault("C13")
def test_a_second_injection_needs_another_name():
    model = Towers()
    inject(model, LoraConfig(["q_proj"]))
    with pytest.raises(ConfigError, match="already has adapter 'default': give another name"):
        inject(model, LoraConfig(["q_proj"]))
    inject(model, LoraConfig(["q_proj"]), "second")
    remove(model, "default")
    assert len(summary(model, "second").rows) == 5


@pytest.mark.fault("C14")
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["blocks.99.q_proj"]}, "vision.blocks has 3 blocks, 0 to 2"),
        ({"target_modules": ["text.blocks.2.q_proj"]}, "text.blocks has 2 blocks, 0 to 1"),
        ({"target_modules": [r"re:text\.blocks\.7\..*"]}, "text.blocks has 2 blocks, 0 to 1"),
        ({"target_modules": ["text.blocks.99"]}, "text.blocks has 2 blocks, 0 to 1"),
        (
            {"target_modules": ["q_proj"], "last_blocks": {"text.blocks": 7}},
            "'text.blocks' has 2 blocks, 7 were asked for (1 to 2)",
        ),
        (
            {"target_modules": ["q_proj"], "last_blocks": {"text.stages": 1}},
            "'text.stages' is not in the model. Lists: text.blocks, vision.blocks",
        ),
    ],
)
def test_a_block_beyond_the_last_is_answered_with_the_range(config, expected):
    assert expected in refusal(config)


@pytest.mark.fault("H34")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [r"re:([a-z_.]+)+#"]},
        {"target_modules": r"(.|\w)+#"},
        {"target_modules": ["q_proj"], "exclude_modules": [r"re:([\w.]*)*#"]},
        {"target_modules": ["q_proj"], "rank_pattern": {r"(a|aa|\w)+#": 4}},
        {"target_modules": ["q_proj"], "alpha_pattern": {r"([\w.]+)+#": 4.0}},
    ],
)
def test_an_expression_that_would_try_for_ever_is_stopped(config, monkeypatch):
    monkeypatch.setattr(module_names, "PATIENCE", 0.2)
    module = nn.Module()
    module.add_module("a" * 60, nn.ModuleDict({"q_proj": nn.Linear(3, 3)}))
    with pytest.raises(ConfigError, match=r"takes more than 0.2 s.*without nested"):
        inject(module, LoraConfig(**config))
    assert not hasattr(module, "_lora_configs")


@pytest.mark.fault("H34", "H35")
def test_an_expression_in_an_adapter_of_a_stranger_is_stopped_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module_names, "PATIENCE", 0.2)
    model = nn.Module()
    model.add_module("a" * 60, nn.ModuleDict({"q_proj": nn.Linear(3, 3)}))
    tensors = {f"base_model.model.{'a' * 60}.q_proj.lora_{x}.weight" for x in "AB"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    config["rank_pattern"] = {r"([\w.]+)+#": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    content = {name: torch.zeros((2, 3) if "lora_A" in name else (3, 2)) for name in tensors}
    safetensors.torch.save_file(content, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"takes more than 0.2 s"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "_lora_configs")


@pytest.mark.fault("H34")
def test_the_limit_of_time_leaves_the_timers_of_the_program_as_they_were():
    import signal

    handler = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        inject(Towers(), LoraConfig(["re:.*q_proj"]))
        assert 990 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert signal.getsignal(signal.SIGALRM) is handler


@pytest.mark.fault("H34")
@pytest.mark.parametrize("entry", ["re:(", "re:a{1000000000000}", "blocks.[z-a].q_proj", "[0"])
def test_a_pattern_that_is_none_is_shown(entry):
    with pytest.raises(ConfigError, match=r"is no (pattern|regular expression)"):
        inject(Towers(), LoraConfig([entry]))


# -- device, precision, numbers --------------------------------------------------------------------


@pytest.mark.fault("C16", "C17", "C36")
def test_precision_and_device_are_checked_with_the_choice_that_works():
    for name in ("fp16", "bf16"):
        with pytest.raises(ConfigError, match=f"{name} does not run on cpu: use auto or fp32"):
            choose_precision(name, "cpu")
    assert choose_precision("auto", "cpu") == "fp32"
    assert choose_device("cpu") == CPU
    if torch.cuda.is_available():
        return
    with pytest.raises(ConfigError, match="bf16 does not run on cuda: use auto or fp16"):
        choose_precision("bf16", "cuda")  # a GPU that cannot is told from none by its absence here
    with pytest.raises(ConfigError, match=r"device cuda: .*; use auto or cpu"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="tf32 is for NVIDIA GPUs since Ampere, not for cpu"):
        arguments("out", learning_rate=1e-3, steps=1, device="cpu", trainer={"tf32": True})


@pytest.mark.fault("C18", "C19")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be a finite number above 0"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"steps": None, "epochs": -1.0}, "epochs is -1.0: it must be a finite number above 0"),
        ({"steps": None, "epochs": 0.0}, "epochs is 0.0"),
        ({"steps": None}, "give the length of the training as steps or as epochs"),
        ({"seed": -1}, "seed is -1: it must be 0 to 4294967295"),
        ({"eval_steps": -2}, "eval_steps is -2"),
    ],
)
def test_numbers_with_which_no_run_can_be_meant_are_refused_from_python_too(settings, expected):
    given = {"learning_rate": 1e-3, "steps": 1, "device": "cpu", **settings}
    with no_device(), pytest.raises(ConfigError, match=re.escape(expected)):
        arguments("out", **given)


@pytest.mark.fault("C18")
def test_a_learning_rate_above_a_tenth_is_warned_of(tmp_path):
    for rate, expected in ((0.1, 0), (0.2, 1), (1e3, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arguments(tmp_path, learning_rate=rate, steps=1, device="cpu")
        told = [str(w.message) for w in caught if "learning rate" in str(w.message)]
        assert len(told) == expected
        assert all("1e-4 to 1e-2 is usual" in text for text in told)


@pytest.mark.fault("C40", "C41", "H42")
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"report_to": "wandb"}, "wandb: it is not installed; pip install wandb"),
        ({"report_to": ["none", "wanb"]}, "unknown tool 'wanb'; did you mean 'wandb'?"),
        ({"metric_for_best_model": "mAP"}, "first metric (iou, dice)"),
        ({"run_name": "../x"}, "run_name '../x': a name, without / \\ and .."),
        ({"run_name": "a/b"}, "run_name 'a/b'"),
        ({"optim": "adamm"}, "unknown 'adamm'"),
    ],
)
def test_settings_of_the_trainer_are_checked_without_a_model(extra, expected):
    with no_device(), pytest.raises(ConfigError, match=re.escape(expected)):
        check_extra(extra, CPU, ("iou", "dice"))


@pytest.mark.fault("C19")
def test_guards_and_the_settings_of_a_package_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Guards(max_bad_fraction=float("nan"), keep_last=0, max_nonfinite=-1)
    assert len(str(caught.value).splitlines()) == 3


# -- one class per cause ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, NumericError])
def test_every_kind_is_a_value_error_and_ends_a_command_with_status_2(kind, capsys):
    def main(argv):
        raise kind("what, where, expected, remedy")

    assert issubclass(kind, UserError)
    assert issubclass(kind, ValueError)
    assert run(main, []) == 2
    assert capsys.readouterr().err == "error: what, where, expected, remedy\n"


def test_a_broken_pipe_to_another_process_is_no_success():
    def main(argv):
        raise BrokenPipeError("a worker died")

    with pytest.raises(BrokenPipeError):
        run(main, [])


def test_a_name_that_is_too_long_for_a_file_is_the_users_to_fix(capsys, tmp_path):
    assert run(lambda argv: (tmp_path / ("x" * 5000)).exists() or 0, []) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: no possible name of a file: ")
    assert len(message) < 400


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warning_is_one_line_told_once_by_the_first_process(capsys, monkeypatch):
    def main(argv):
        for _ in range(3):
            warnings.warn("mind the \x1b[31mgap", stacklevel=1)

    assert run(main, []) == 0
    assert capsys.readouterr().err == "warning: mind the \\x1b[31mgap\n"
    monkeypatch.setenv("RANK", "1")
    assert run(main, []) == 0
    assert capsys.readouterr().err == ""


# -- before a run ----------------------------------------------------------------------------------


@pytest.mark.fault("C24", "R37")
def test_a_folder_is_tried_without_leaving_anything(tmp_path):
    preflight.writable(tmp_path / "a b" / "ü" / ("n" * 255), "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ConfigError, match=rf"--out {path}: {tmp_path}/file is not a folder"):
            preflight.writable(path, "--out")
    with pytest.raises(ConfigError, match="at most 255 bytes"):
        preflight.writable(tmp_path / ("n" * 256), "--out")
    with pytest.raises(ConfigError, match=r"cannot write in /proc: "):
        preflight.writable("/proc/x/y", "--out")
    with pytest.raises(ConfigError, match="no zero byte"):
        preflight.writable("a\0b", "--out")
    with pytest.raises(ConfigError, match="--out is empty: name a folder"):
        preflight.writable("", "--out")


@pytest.mark.fault("C39")
def test_requirements_are_compared_with_what_is_installed(tmp_path, monkeypatch):
    def install(name, version, *lines):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        text = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines]
        (info / "METADATA").write_text("\n".join(text) + "\n")

    install("toy_lib", "2.13.0+cpu")
    install("toy_old", "0.9")
    install("toy_new", "2.9.dev1")
    needs = ["toy_lib>=2.9", "toy_old>=1.0", "toy_new<3", "toy_gone", "toy_old>=9; extra == 'x'"]
    install("toy_app", "1.0", *(f"Requires-Dist: {need}" for need in needs))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        preflight.versions("toy_app")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("toy_old 0.9 is installed, toy_app needs toy_old>=1.0: pip install")
    assert lines[1] == 'no toy_gone here, toy_app needs toy_gone: pip install "toy_gone"'
    assert len(lines) == 2
    with pytest.raises(ConfigError, match=r"toy_old>=9"):
        preflight.versions("toy_app[x]")
    preflight.versions("toy_lib", "toy_absent")
    install("toy_soft", "1.0", "Requires-Dist: toy_gone")
    preflight.versions("toy_soft", optional={"toy_gone"})
    preflight.versions("lora-core[train,peft]", optional=("peft",))


def test_all_checks_are_made_and_reported_together():
    def fail(kind, text):
        raise kind(text)

    with pytest.raises(ConfigError, match="one\nthree"):
        preflight.check_all(
            lambda: fail(ConfigError, "one"), lambda: None, lambda: fail(CheckpointError, "three")
        )
    with pytest.raises(CheckpointError, match=r"^three$"):
        preflight.check_all(lambda: fail(CheckpointError, "three"))


def test_the_guard_itself_fails_when_something_is_touched(tmp_path):
    import socket

    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(Touched, match="CUDA was initialised"), no_device():
        torch.zeros(1, device="cuda")
    with pytest.raises(Touched, match="read weights"), no_device():
        torch.load(tmp_path / "a.pt", weights_only=True)
    with no_device():
        torch.load(tmp_path / "a.pt", weights_only=True, map_location="meta")
    with no_device(weights=True):
        torch.load(tmp_path / "a.pt", weights_only=True)
    for touch in (
        lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
        lambda: socket.getaddrinfo("example.invalid", 80),
    ):
        # A program that swallows it does not get away with it.
        with pytest.raises(Touched, match=r"address|connect"), no_device(), suppress(Exception):
            touch()


# -- secrets and text from elsewhere ---------------------------------------------------------------


@dataclass
class Secretive:
    api_key: str | None = option(None, "For a service.")
    hub_token: str | None = option("hf_abc", "For a hub.")
    password: str = option("pw", "For nothing.")
    key_frames: int = option(3, "No secret.")
    max_tokens: int = option(7, "No secret.")
    trainer: dict[str, Any] = field(default_factory=dict)


@pytest.mark.fault("H29")
def test_secrets_are_left_out_of_every_file_of_settings(tmp_path, capsys):
    cfg = Secretive(trainer={"x": {"wandb_api_key": "w", "secret": "s", "keys": [1]}})
    kept = {"api_key": None, "hub_token": "***", "password": "***", "key_frames": 3}
    inner = {"x": {"wandb_api_key": "***", "secret": "***", "keys": [1]}}
    assert plain(cfg) == {**kept, "max_tokens": 7, "trainer": inner}
    dump(cfg, tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text() == as_yaml(cfg)
    for line in ("hub_token: '***'", "password: '***'", "api_key: null", "max_tokens: 7"):
        assert line in as_yaml(cfg)
    with pytest.raises(SystemExit):
        parse(Secretive, ["--api_key", "canary", "--print_config"], prog="x")
    assert "canary" not in capsys.readouterr().out


@pytest.mark.fault("H29")
def test_secrets_are_in_no_checkpoint_and_no_adapter(tmp_path, monkeypatch):
    from tiny_training import network, train

    for name in ("HF_TOKEN", "MY_API_KEY"):
        monkeypatch.setenv(name, "canary")
    settings = {"hub_token": "canary", "trainer": {"deep": {"password": "canary"}}}
    train(tmp_path / "run", steps=1, settings=settings, save_adapter=None)
    facts = {"wandb_api_key": "canary", "note": "kept"}
    save_adapter(network(), tmp_path / "adapter", metadata=facts)
    save_adapter(network(), tmp_path / "adapter.pt", metadata=facts)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = {path.name: path.read_bytes() for path in files}
    assert {"manifest.json", "adapter_model.safetensors", "adapter.pt"} <= found.keys()
    assert [name for name, content in found.items() if b"canary" in content] == []
    assert b"kept" in found["adapter.pt"]


@pytest.mark.fault("H30")
def test_tags_of_pictures_are_escaped_for_the_browser(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(
        tmp_path / "tensorboard", tmp_path / "log.csv", ["step", "split"], tensorboard=True
    )
    log.picture("<script>alert(1)</script>", torch.zeros(4, 4, 3, dtype=torch.uint8), 1)
    log.close()
    data = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"&lt;script&gt;alert(1)" in data
    assert b"<script>" not in data


@pytest.mark.fault("H47")
def test_text_is_never_a_template(capsys, monkeypatch):
    hostile = "{0.__class__.__mro__} %s %n %(x)s {x!r}"
    say(hostile)
    assert capsys.readouterr().out == hostile + "\n"

    def main(argv):
        raise DataError(f"{hostile}: no such picture")

    assert run(main, []) == 2
    assert capsys.readouterr().err == f"error: {hostile}: no such picture\n"


# -- terminals -------------------------------------------------------------------------------------


class Terminal:
    """A terminal of which every write is kept."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.fault("R30")
@pytest.mark.parametrize("columns", ["40", "20", "5", "1"])
def test_a_bar_fits_a_narrow_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress(1000) as bar:
        bar.report(10, loss=0.123, iou=0.5, lr=1e-3)
    drawn = terminal.text.replace("\n", "").split("\r\x1b[K")
    assert max(map(len, drawn)) < int(columns)


@pytest.mark.fault("R30")
def test_without_a_terminal_or_on_a_dumb_one_there_are_plain_lines(monkeypatch, capsys):
    for stream in (None, Terminal()):
        if stream is not None:
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setenv("TERM", "dumb")
        with Progress(10) as bar:
            bar.report(1, loss=0.5)
        text = stream.text if stream else capsys.readouterr().out
        assert text == "step 1/10  loss 0.5000  left 0:00\n"


@pytest.mark.fault("R30")
def test_nothing_breaks_when_stdout_is_closed_or_its_disk_is_full(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("x")
    with Progress(10) as bar:
        bar.report(1, loss=0.5)
    assert run(lambda argv: 0, []) == 0
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        say("x" * 100_000)
        say("y")
        assert sys.stdout is not full
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is left in its buffer


# -- the source and the repository -----------------------------------------------------------------


@pytest.mark.fault("H26", "H27")
def test_the_source_runs_no_text_no_shell_and_no_plugin():
    import lora_core

    assert unsafe_calls(Path(lora_core.__file__).parent) == []
    for folder in ("tools",):
        if (REPOSITORY / folder).is_dir():
            assert unsafe_calls(REPOSITORY / folder) == []


@pytest.mark.fault("H26")
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("os.system('ls')", "os.system is called"),
        ("subprocess.run('ls', shell=True)", "shell is not plainly false"),
        ("subprocess.run(f'ls {x}')", "one text instead of a list"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=flag)", "allow_pickle is not plainly false"),
        ("eval(text)", "eval is called"),
        ("yaml.load(text)", "yaml.load is called"),
    ],
)
def test_the_search_for_unsafe_calls_finds_them(tmp_path, line, why):
    (tmp_path / "module.py").write_text(f"x = 1\n{line}\n")
    found = unsafe_calls(tmp_path)
    assert any(text.startswith("module.py:2: ") and why in text for text in found)
    (tmp_path / "module.py").write_text("subprocess.run(['ls'])\ntorch.load(p, weights_only=True)")
    assert unsafe_calls(tmp_path) == []


def workflows():
    return {path.name: yaml.safe_load(path.read_text("utf-8")) for path in WORKFLOWS.glob("*.y*ml")}


@needs_repository
@pytest.mark.fault("H37")
def test_a_stranger_s_pull_request_reaches_the_gpu_only_after_approval_and_finds_no_secret():
    found = workflows()
    assert {"ci.yml", "gpu.yml"} <= found.keys()
    for name, flow in found.items():
        triggers = flow[True]  # YAML 1.1 reads the key `on` as true
        assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(triggers), name
        assert flow["permissions"] == {"contents": "read"}, name
        for job, settings in flow["jobs"].items():
            runner = settings["runs-on"]
            if runner == "ubuntu-latest":
                continue
            assert settings["environment"], f"{name} {job} runs on {runner} without approval"
            assert all("checkout" not in str(step.get("uses"))
                       or step["with"]["persist-credentials"] is False
                       for step in settings["steps"])  # fmt: skip
            assert set(triggers) - {"push", "workflow_dispatch"} == {"pull_request"}
            assert triggers["pull_request"]["types"] == ["labeled"]  # not each new commit
    for path in WORKFLOWS.glob("*.y*ml"):
        text = path.read_text("utf-8")
        assert "secrets." not in text.replace("no secrets", ""), path
        for line in text.splitlines():
            if re.match(r"\s*(- )?run:", line):
                assert not re.search(r"\$\{\{\s*github\.(event|head_ref)", line), line


def projects():
    return sorted(REPOSITORY.glob("packages/*/pyproject.toml"))


@needs_repository
@pytest.mark.fault("H36")
def test_every_requirement_has_a_lower_bound_and_a_pinned_version():
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().split()
        if "==" in line
    )
    own = {path.parent.name for path in projects()}
    for path in projects():
        project = tomllib.loads(path.read_text("utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        for need in [*project["dependencies"], *(one for extra in extras for one in extra)]:
            name, bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(.*)", need).groups()
            assert bound.startswith(">="), f"{path}: {need}"
            assert name in own or name in pins, f"{name} is not in constraints.txt"


@needs_repository
@pytest.mark.fault("H36")
def test_install_commands_in_documents_name_only_our_folders_and_known_tools():
    known = {path.parent.name for path in projects()} | {"nox", "torch", "tensorboard", "peft"}
    documents = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("packages/*/README.md")]
    lines = [
        line
        for path in [*documents, *REPOSITORY.glob("docs/*.md")]
        for line in re.findall(r"pip install ([^`&#\n]*)", path.read_text("utf-8"))
    ]
    assert lines
    for line in lines:
        for word in re.findall(r"""[^\s"'\\]+""", line):
            name = re.match(r"[\w.-]*", word.removeprefix("./")).group()
            folder = word.startswith(("./packages/", "packages/", "-", "constraints.txt", "http"))
            assert folder or name in known, f"pip install {line}"
