"""Faults of settings and their files: each ends `sam2-lora train` with one clear message.

Every stop is tested under a guard that fails when CUDA, the network or the weights are touched.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import command

from lora_core.errors import ConfigError
from lora_core.testing.no_device import no_device
from lora_core.testing.refusals import as_nobody
from sam2_lora.__main__ import COMMANDS
from sam2_lora.__main__ import main as sam2_lora
from sam2_lora.train import main, settings

Refuse = Callable[..., str]


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.fault("C01")
@pytest.mark.parametrize("text", ["1e-4", "5e-5", "1E-4", "2.5e-4", "+1e-4", ".5e-3", "1.e-3"])
def test_scientific_notation_is_a_number_in_files_flags_and_options(
    text: str, settings_file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    ways = [["--learning_rate", text], [f"--learning-rate={text}"]]
    ways += [["--options", f"learning_rate={text}"], [settings_file(f"learning_rate: {text}\n")]]
    if text[0].isdigit() and ".e" not in text:
        ways.append([settings_file(f'{{"learning_rate": {text}}}', "run.json")])
    for words in ways:
        value = settings(words)[0].learning_rate
        assert isinstance(value, float)
        assert value == float(text)
    assert main([*ways[0], "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert settings([settings_file(printed, "printed.yaml")])[0].learning_rate == float(text)


@pytest.mark.fault("C02")
@pytest.mark.parametrize(
    ("words", "text", "parts"),
    [
        (["--lerning_rate", "1e-3"], "", ["--lerning_rate", "'--learning_rate'"]),
        (["--lora_rnk=8"], "", ["--lora_rnk", "'--lora_rank'"]),
        (["--options", "bach_size=3"], "", ["bach_size", "'--batch_size'"]),
        ([], "seed: 1\nlora_rnk: 8\n", ["run.yaml, line 2", "lora_rnk", "'lora_rank'"]),
        ([], "qqq: 8\n", ["run.yaml, line 1", "unknown setting qqq", "see --help"]),
        ([], "config: a.yaml\n", ["line 1: config is a flag of the command line, --config, and"]),
        ([], "debug: true\n", ["line 1: debug is a flag of the command line, --debug, and no"]),
        (["--trainer.adam_bta1", "0.9"], "", ["--trainer.adam_bta1", "'adam_beta1'"]),
    ],
)
def test_an_unknown_setting_is_named_with_its_place_and_the_nearest_spelling(
    refuse: Refuse, settings_file: Callable[..., str], words: list[str], text: str, parts: list[str]
) -> None:
    message = refuse(*(["--config", settings_file(text)] if text else []), *words)
    for part in parts:
        assert part in message


@pytest.mark.fault("C02")
@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_names_an_unknown_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with no_device():
        assert sam2_lora([verb, "--hlep_me", "3"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: unknown flag --hlep_me")
    assert "Traceback" not in message


@pytest.mark.fault("C03")
@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("run.yaml", "seed: 1\nsteps: 3\nseed: 2\n", "1 and 3"),
        ("run.json", '{"seed": 1,\n"steps": 3,\n"seed": 2}', "1 and 3"),
        ("run.yaml", "trainer:\n  adam_beta1: 0.8\n  adam_beta1: 0.9\n", "2 and 3"),
        ("run.json", '{"trainer": {"a": 1,\n "a": 2}}', "1 and 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(
    refuse: Refuse, settings_file: Callable[..., str], name: str, text: str, lines: str
) -> None:
    assert f"stands twice, on lines {lines}" in refuse("--config", settings_file(text, name))


@pytest.mark.fault("C04")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('batch_size: "four"', "batch_size: expected a whole number, not 'four'"),
        ("lora_rank: 8.5", "lora_rank: expected a whole number, not 8.5"),
        ("lora_rank: .inf", "lora_rank: expected a whole number, not inf"),
        ("hflip: maybe", "hflip: expected true or false, not 'maybe'"),
        ("seed: [1]", "seed: expected a whole number, not [1]"),
        ("steps: true", "steps: expected a whole number, not True"),
        ("learning_rate: {a: 1}", "learning_rate: expected a number"),
        ("output_dir: [a]", "output_dir: expected text"),
        ("precision: fp61", "precision: expected one of auto, fp32, bf16, fp16, not 'fp61'"),
        ("trainer: 3", "trainer: expected names with their values, not 3"),
        ("trainer: {adam_beta1: high}", "--trainer.adam_beta1: expected a number, not 'high'"),
    ],
)
def test_a_value_of_the_wrong_type_is_shown_with_the_type_that_is_expected(
    refuse: Refuse, settings_file: Callable[..., str], line: str, expected: str
) -> None:
    message = refuse("--config", settings_file(line))
    assert expected in message


@pytest.mark.fault("C04")
def test_a_whole_number_may_be_written_as_8_0_or_1e4(settings_file: Callable[..., str]) -> None:
    for words in (["--lora_rank", "8.0"], [settings_file("lora_rank: 8.0")]):
        assert settings(words)[0].lora_rank == 8
    for words in (["--steps", "1e4"], [settings_file("steps: 1e4")]):
        steps = settings(words)[0].steps
        assert (steps, type(steps)) == (10_000, int)


@pytest.mark.fault("C05")
@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "NO", "null", "~", "true"])
def test_words_that_some_readers_take_for_truth_values_must_be_quoted_as_names(
    refuse: Refuse, settings_file: Callable[..., str], word: str
) -> None:
    assert "in quotes" in refuse("--config", settings_file(f"output_dir: {word}\n"))
    for quoted in (f'output_dir: "{word}"', f"output_dir: '{word}'"):
        assert settings([settings_file(quoted)])[0].output_dir == word
    message = refuse("--config", settings_file(f"trainer:\n  {word}: 3\n"))
    assert "line 2" in message
    assert "in quotes" in message


@pytest.mark.fault("C06", "C07", "C08", "C18", "C19", "C41")
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lora_rank", "0", "at least 1"),
        ("lora_rank", "-4", "at least 1"),
        ("lora_rank", "1000000", "at most 65536"),
        ("lora_alpha", "0", "a finite number above 0"),
        ("lora_alpha", "-1", "a finite number above 0"),
        ("lora_alpha", ".nan", "a finite number above 0"),
        ("lora_alpha", ".inf", "a finite number above 0"),
        ("lora_alpha", "1e300", "a finite number above 0"),
        ("lora_dropout", "-0.1", "0 <= p < 1"),
        ("lora_dropout", "1.0", "0 <= p < 1"),
        ("lora_dropout", "1.5", "0 <= p < 1"),
        ("lora_dropout", ".nan", "0 <= p < 1"),
        ("learning_rate", "0", "a finite number above 0"),
        ("learning_rate", "-1e-3", "a finite number above 0"),
        ("learning_rate", ".nan", "a finite number above 0"),
        ("learning_rate", ".inf", "a finite number above 0"),
        ("weight_decay", ".nan", "a finite number of 0 or more"),
        ("min_delta", ".inf", "a finite number of 0 or more"),
        ("max_grad_norm", "0", "a finite number above 0"),
        ("batch_size", "0", "at least 1"),
        ("batch_size", "999999999999999999999", "at most 2147483647"),
        ("gradient_accumulation_steps", "0", "at least 1"),
        ("steps", "0", "at least 1"),
        ("steps", "-5", "at least 1"),
        ("eval_steps", "0", "at least 1"),
        ("log_steps", "0", "at least 1"),
        ("num_workers", "-1", "at least 0"),
        ("num_workers", "100000000000", "at most 1024"),
        ("seed", "-1", "at least 0"),
        ("seed", "4294967296", "at most 4294967295"),
        ("patience", "0", "at least 1"),
        ("keep_last", "0", "at least 1"),
        ("max_bad_fraction", ".nan", "0 <= share < 1"),
        ("image_size", "'0'", "try 32"),
        ("image_size", "'32000000000'", "at most 16384"),
        ("image_size", "'²'", "expected 1024 or HEIGHTxWIDTH"),
    ],
)
def test_a_number_that_cannot_work_is_refused_in_files_and_flags(
    refuse: Refuse, settings_file: Callable[..., str], name: str, value: str, expected: str
) -> None:
    path = settings_file(f"{name}: {value}\n")
    with pytest.raises(ConfigError, match=f"--{name}") as caught:
        settings([path])
    assert expected in str(caught.value)
    if not value.startswith("."):  # YAML's spelling of NaN and infinity
        message = refuse(f"--{name}", value.strip("'"))
        assert f"--{name}" in message
        assert expected in message


@pytest.mark.fault("C19")
def test_all_faults_of_the_values_are_reported_together(refuse: Refuse) -> None:
    message = refuse("--steps", "0", "--lora_dropout", "2", "--targets", "decodr")
    assert len(message.splitlines()) == 3
    for part in ("--steps is 0", "--lora_dropout is 2.0", "did you mean 'decoder'"):
        assert part in message


@pytest.mark.fault("C19")
def test_the_length_in_epochs_is_no_setting_of_this_command(refuse: Refuse) -> None:
    assert "unknown flag --epochs" in refuse("--epochs", "-1")
    message = refuse("--trainer.num_train_epochs", "-1")
    assert "--trainer.num_train_epochs cannot be set: the command has its own setting" in message


@pytest.mark.fault("C06", "C18")
@pytest.mark.filterwarnings("default::UserWarning")
def test_a_rank_above_the_layer_and_a_high_learning_rate_are_warned_of_once(
    coco_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"lora_rank": 500, "learning_rate": 0.2, "targets": "decoder_attention"}
    assert main(command(coco_pictures, tmp_path / "out", **given)) == 0
    told = capsys.readouterr().err
    assert told.count("warning: ") == 2, told
    assert "warning: a rank above the smaller side of the weight" in told
    assert "mask_decoder.transformer.layers.0.self_attn.q_proj (r 500, weight allows" in told
    assert "warning: learning rate 0.2 is very high" in told


@pytest.mark.fault("C09", "C14")
@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        ("decodr", "did you mean 'decoder'"),
        ("encoder+head", "'encoder+heads'"),
        ("blocks.99", "one of default, encoder, decoder"),
        ("stages[7]", "one of default, encoder, decoder"),
        ("", "one of default, encoder, decoder"),
        ("(a+)+$", "one of default, encoder, decoder"),
    ],
)
def test_targets_that_do_not_exist_are_answered_with_those_that_do(
    refuse: Refuse, targets: str, hint: str
) -> None:
    message = refuse(f"--targets={targets}")
    assert f"unknown --targets {targets!r}" in message
    assert hint in message


@pytest.mark.fault("C16", "C17", "C36")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainer.bf16", "true", "--trainer.fp16", "true"], "use the command's precision"),
        (["--precision", "fp16"], "precision fp16 does not run on cpu: use auto or fp32"),
        (["--precision", "bf16"], "precision bf16 does not run on cpu: use auto or fp32"),
        (["--trainer.tf32", "true"], "--trainer.tf32 is for NVIDIA GPUs since Ampere, not for cpu"),
        (["--device", "cuda:9"], "--device: expected one of auto, cuda, cpu, not 'cuda:9'"),
    ],
)
def test_a_precision_or_device_that_is_not_here_is_refused_with_one_that_works(
    refuse: Refuse, words: list[str], expected: str
) -> None:
    assert expected in refuse("--device", "cpu", *words)


@pytest.mark.fault("C36")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none_is_refused_at_once(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "use auto or cpu" in refuse("--device", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = refuse("--device", "cuda")
    assert "device cuda: " in message
    assert "use auto or cpu" in message


@pytest.mark.fault("C36")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.filterwarnings("default::UserWarning")
def test_hidden_gpus_mean_the_cpu_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with no_device():
        assert main(command(tmp_path / "none", tmp_path / "out", device="auto")) == 2
    told = capsys.readouterr().err
    assert told.count("running on the CPU") == 1
    assert "error: " in told  # only the data is missing


@pytest.mark.fault("C04", "C24")
@pytest.mark.parametrize(
    ("verb", "name"),
    [
        *(("train", name) for name in ("data_root", "output_dir", "logs_dir", "cache_dir")),
        *(("train", name) for name in ("checkpoint", "adapter", "resume")),
        ("find-lr", "ramp_dir"),
        ("evaluate", "data_root"),
        ("evaluate", "adapter"),
        ("evaluate", "output_dir"),
        ("predict", "output"),
        ("predict", "adapter"),
        ("predict", "prompts"),
        ("merge", "output"),
        ("merge", "adapter"),
        ("merge", "checkpoint"),
        ("prepare", "source"),
        ("prepare", "output"),
        ("demo", "output"),
    ],
)
def test_an_empty_path_is_neither_the_current_folder_nor_left_out(
    verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As `--output_dir "$OUT"` gives it where the variable is not set."""
    monkeypatch.chdir(tmp_path)
    needed = {
        "predict": ["--images", "x.png"],
        "merge": ["--adapter", "a.torch", "--output", "o.pt"],
        "prepare": ["--source", "data"],
    }
    with no_device():
        assert sam2_lora([verb, *needed.get(verb, []), f"--{name}="]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --{name} is empty: "), message
    assert not list(tmp_path.iterdir())


def test_an_empty_name_among_pictures_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert sam2_lora(["predict", "--images", "", "a.png"]) == 2
    assert capsys.readouterr().err.startswith("error: --images holds an empty name")


@pytest.mark.fault("C19")
@pytest.mark.parametrize(
    ("verb", "words", "expected"),
    [
        ("find-lr", ["--ramp_steps", "9"], "--ramp_steps is 9: it must be at least 10"),
        ("find-lr", ["--ramp_from", "0"], "--ramp_from 0.0, --ramp_to 1.0: above 0, and rising"),
        ("find-lr", ["--ramp_from", "2"], "--ramp_from 2.0, --ramp_to 1.0: above 0, and rising"),
        ("find-lr", ["--ramp_to", "1e-9"], "--ramp_to 1e-09: above 0, and rising"),
        ("find-lr", ["--ramp_to", "1e300"], "--ramp_to 1e+300: above 0, and rising"),
        ("find-lr", ["--ramp_steps", "9999999999"], "it must be at most 2147483647"),
        ("find-lr", ["--dry_run"], "--dry_run belongs to `sam2-lora train`"),
        ("find-lr", ["--resume", "latest"], "--resume belongs to `sam2-lora train`"),
        ("demo", ["--steps", "0"], "--steps is 0: it must be at least 1"),
        ("demo", ["--batch_size", "-1"], "--batch_size is -1: it must be at least 1"),
        ("demo", ["--seeds", "0"], "--seeds is 0: it must be at least 1"),
        ("demo", ["--learning_rate", "0"], "--learning_rate is 0.0: it must be a finite number"),
        ("demo", ["--learning_rate", "1e300"], "it must be a finite number above 0"),
    ],
)
def test_settings_of_the_small_commands_are_refused_before_data_and_files(
    verb: str, words: list[str], expected: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with no_device():
        assert sam2_lora([verb, *words]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("C24")
def test_a_ramp_finds_a_file_in_its_way_before_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    words = ["--data_root", str(tmp_path / "none"), "--ramp_dir", str(tmp_path / "file")]
    with no_device():
        assert sam2_lora(["find-lr", *words]) == 2
    assert f"--ramp_dir {tmp_path / 'file'}: " in capsys.readouterr().err


# -- files of settings -----------------------------------------------------------------------------


@pytest.mark.fault("C20", "C21", "H07", "H09")
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("run.yaml", b"", ["the file is empty", "seed: 1"]),
        ("run.yaml", b"---\n", ["expected settings such as"]),
        ("run.json", b"", ["line 1, column 1"]),
        ("run.yaml", b"seed: 3\nadapter: caf\xe9\n", ["line 2, column 13", "UTF-8"]),
        ("run.yaml", "seed: 1\n".encode("utf-16"), ["line 1, column 1", "UTF-8"]),
        ("run.yaml", b"trainer:\n\ta: 1\n", ["line 2, column 1", "indent with spaces"]),
        ("run.yaml", b"seed: [1, 2\n", ["line 2, column 1", "not YAML"]),
        ("run.yaml", b"seed: 1\n---\nseed: 2\n", ["line 2, column 1", "single document"]),
        ("run.yaml", b"\x00\x01\x02", ["run.yaml"]),
        ("run.yaml", b"a: " + b"[" * 3000 + b"]" * 3000, ["nested too deeply"]),
        ("run.yaml", b"a: " + b"{a: " * 3000 + b"1" + b"}" * 3000, ["nested too deeply"]),
        ("run.json", b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}", ["nested too deeply"]),
        ("run.json", b'{"a": ' * 3000 + b"1" + b"}" * 3000, ["nested too deeply"]),
        ("run.yaml", b"seed: " + b"1" * 900_000, ["line 1, column 7", "no usable number"]),
        ("run.json", b'{"seed": ' + b"1" * 900_000 + b"}", ["a number has thousands of digits"]),
        ("run.yaml", b"a: !!python/object/apply:os.system ['touch canary']", ["not allowed"]),
        ("run.yaml", b"a: !!python/name:os.system", ["not allowed"]),
        ("run.yaml", b"!!python/object/new:os.system ['touch canary']", ["run.yaml"]),
        ("run.json", b'{"seed": 1,}', ["run.json, line 1, column"]),
        ("run.json", b'{"learning_rate": NaN}', ["NaN is not a number in JSON"]),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_place(
    refuse: Refuse, settings_file: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, parts: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    message = refuse("--config", settings_file(content, name))
    assert name in message
    assert len(message) < 600
    for part in parts:
        assert part in message
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("C20")
def test_byte_order_mark_and_windows_line_ends_are_read(settings_file: Callable[..., str]) -> None:
    cfg = settings([settings_file(b"\xef\xbb\xbfseed: 7\r\nadapter: a b\r\n")])[0]
    assert (cfg.seed, cfg.adapter) == (7, "a b")
    assert settings([settings_file(b'\xef\xbb\xbf{"seed": 7}\r\n', "run.json")])[0].seed == 7


@pytest.mark.fault("C20")
def test_a_configuration_file_that_is_not_there_or_no_file_is_named(
    refuse: Refuse, settings_file: Callable[..., str], tmp_path: Path
) -> None:
    settings_file("seed: 1", "train.yaml")
    missing = tmp_path / "trian.yaml"
    message = refuse("--config", str(missing))
    assert f"not found: {missing}" in message
    assert "did you mean 'train.yaml'?" in message
    assert f"{tmp_path} is not a file" in refuse("--config", str(tmp_path))
    assert "/dev/zero is not a file" in refuse("--config", "/dev/zero")
    assert "File name too long" in refuse("--config", "x" * 5000 + ".yaml")
    assert "not found" in refuse("--config", "a\0b.yaml")


@pytest.mark.fault("C20")
def test_a_configuration_file_without_the_right_to_read_it_is_named(open_folder: Path) -> None:
    path = open_folder / "run.yaml"
    path.write_text("seed: 1")
    path.chmod(0)
    status, message = as_nobody(lambda: main(["--config", str(path)]))
    assert status == 2
    assert message == f"error: cannot read {path}: Permission denied\n"


@pytest.mark.fault("H08")
def test_an_alias_bomb_stops_at_once(refuse: Refuse, settings_file: Callable[..., str]) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for before, now in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{now}: &{now} [{','.join([f'*{before}'] * 9)}]")
    assert "more than 100000 values" in refuse("--config", settings_file("\n".join(lines)))


@pytest.mark.fault("H09")
@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_file_of_500_megabytes_is_refused_unread(
    refuse: Refuse, tmp_path: Path, name: str
) -> None:
    with (tmp_path / name).open("wb") as sparse:
        sparse.truncate(500_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 1000000 bytes" in refuse("--config", str(tmp_path / name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.fault("C21", "C22", "H09")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--options", "a..b=1"], ["'a..b=1'", "NAME=VALUE"]),
        (["--options", "=x"], ["'=x'", "NAME=VALUE"]),
        (["--options", "a.b"], ["'a.b'", "NAME=VALUE"]),
        (["--options", "seed.x=1"], ["--seed.x", "--seed is a single value"]),
        (["--options", "trainer=3"], ["--trainer is written --trainer.NAME VALUE"]),
        (["--options", "trainer..x=3"], ["'trainer..x=3'"]),
        (["--trainer.", "3"], ["--trainer is written --trainer.NAME VALUE"]),
        (["--trainer.a.b", "1", "--trainer.a", "1"], ["unknown --trainer.a"]),
        (["--trainer.a", "1", "--trainer.a.b", "1"], ["--trainer.a.b: a is a single value"]),
        (["--seed", "[" * 3000 + "]" * 3000], ["--seed: expected a whole number"]),
        (["--seed", "9" * 100_000], ["--seed: expected a whole number"]),
        (["--trainer.a", "[" * 3000 + "]" * 3000], ["--trainer.a"]),
        (["--seed"], ["--seed needs a value: a whole number"]),
        (["7"], ["unexpected word '7'"]),
    ],
)
def test_an_override_that_cannot_be_meant_is_quoted(
    refuse: Refuse, words: list[str], parts: list[str]
) -> None:
    message = refuse(*words)
    assert len(message) < 600
    for part in parts:
        assert part in message
