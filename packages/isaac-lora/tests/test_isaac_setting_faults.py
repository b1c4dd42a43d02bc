"""Faults of settings, their files, libraries and folders: one message each, before anything else.

What every package shares is tested in lora-core; here it is met through the commands of this one.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_isaac_run
import torch

from isaac_lora.__main__ import COMMANDS
from isaac_lora.__main__ import main as isaac_lora
from isaac_lora.config import Config
from isaac_lora.train import main, settings
from lora_core.errors import DataError
from lora_core.testing.no_device import no_device
from lora_core.testing.refusals import as_nobody, files_limited_to

Refuse = Callable[..., str]
Written = Callable[..., str]
NEEDED = ["--model_path", "m", "--data_path", "d", "--output_dir", "o"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"), train=2, val=0)
    for path in root.rglob("*.safetensors"):
        path.chmod(0o644)  # some tests are another user
    return root


@pytest.fixture
def refuse(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Call the training, and give its message after checking what every message must be."""

    def call(*words: str, **given: Any) -> str:
        given = {"val_data_path": None, "cache_dir": None} | given
        with no_device():
            status = main([*tiny_isaac_run.command(root, tmp_path / "run", **given), *words])
        message = capsys.readouterr().err
        assert status == 2, message
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert len(message) < 1200, message
        assert not (tmp_path / "run").exists()
        return message

    return call


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write a file of settings; gives its path."""

    def write(content: str | bytes, name: str = "run.yaml") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


def read(*words: str) -> Config:
    return settings([*NEEDED, *words])[0]


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.fault("C01")
@pytest.mark.parametrize("text", ["1e-4", "5e-5", "1E-4", "2.5e-4", ".5e-3"])
def test_scientific_notation_is_a_number_in_flags_and_files(text: str, written: Written) -> None:
    ways = [["--learning_rate", text], [f"--learning-rate={text}"]]
    ways += [["--options", f"learning_rate={text}"]]
    ways += [["--config", written(f"learning_rate: {text}\n")]]
    if not text.startswith("."):
        ways += [["--config", written(f'{{"learning_rate": {text}}}', "run.json")]]
    for words in ways:
        value = read(*words).learning_rate
        assert isinstance(value, float)
        assert value == float(text)


@pytest.mark.fault("C02")
@pytest.mark.parametrize(
    ("words", "content", "said"),
    [
        (["--lerning_rate", "1e-3"], "", ["--lerning_rate", "'--learning_rate'"]),
        (["--lora_rnk=8"], "", ["--lora_rnk", "'--lora_r'"]),
        ([], "seed: 1\nlora_rnk: 8\n", ["run.yaml, line 2", "lora_rnk", "'lora_r'"]),
        (["--options", "image_foldr=x"], "", ["image_foldr", "'--image_folder'"]),
    ],
)
def test_an_unknown_setting_is_named_with_its_place_and_the_nearest(
    refuse: Refuse, written: Written, words: list[str], content: str, said: list[str]
) -> None:
    message = refuse(*(["--config", written(content)] if content else []), *words)
    for part in said:
        assert part in message


@pytest.mark.fault("C02")
@pytest.mark.parametrize("verb", COMMANDS)
def test_each_command_names_an_unknown_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = ["coco"] if verb == "prepare" else []
    with no_device():
        assert isaac_lora([verb, *step, "--hlep_me", "3"]) == 2
    message = capsys.readouterr().err
    assert "unknown flag --hlep_me" in message
    assert "Traceback" not in message


@pytest.mark.fault("C03")
@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("run.yaml", "seed: 1\nlora_r: 3\nseed: 2\n", "1 and 3"),
        ("run.json", '{"seed": 1,\n"lora_r": 3,\n"seed": 2}', "1 and 3"),
    ],
)
def test_a_setting_that_stands_twice_is_refused_with_both_lines(
    refuse: Refuse, written: Written, name: str, content: str, lines: str
) -> None:
    assert f"stands twice, on lines {lines}" in refuse("--config", written(content, name))


@pytest.mark.fault("C04")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('lora_r: "four"', "lora_r: expected a whole number, not 'four'"),
        ("lora_r: 8.5", "lora_r: expected a whole number, not 8.5"),
        ("use_depth: maybe", "use_depth: expected true or false, not 'maybe'"),
        ("learning_rate: {a: 1}", "learning_rate: expected a number"),
        ("image_folder: [a]", "image_folder: expected text"),
        ("lora_bias: half", "lora_bias: expected one of none, all, lora_only, not 'half'"),
    ],
)
def test_a_value_of_another_type_is_shown_with_the_one_that_is_expected(
    refuse: Refuse, written: Written, line: str, expected: str
) -> None:
    assert expected in refuse("--config", written(line))


@pytest.mark.fault("C04")
def test_a_whole_number_may_have_a_point(written: Written) -> None:
    for words in (["--lora_r", "8.0"], ["--config", written("lora_r: 8.0")]):
        assert read(*words).lora_r == 8


@pytest.mark.fault("C05")
@pytest.mark.parametrize("word", ["yes", "off", "NO", "true"])
def test_words_that_may_be_truth_values_must_be_quoted_as_names(
    refuse: Refuse, written: Written, word: str
) -> None:
    assert "in quotes" in refuse("--config", written(f"image_folder: {word}\n"))
    assert read("--config", written(f"image_folder: '{word}'")).image_folder == word


@pytest.mark.fault("C28")
def test_resuming_and_a_warm_start_exclude_each_other(refuse: Refuse, tmp_path: Path) -> None:
    message = refuse(resume=tmp_path, adapter=tmp_path)
    assert "--resume continues a run with all its state" in message
    assert "--adapter starts a new run from weights alone" in message


# -- files of settings -----------------------------------------------------------------------------


@pytest.mark.fault("C20", "C21", "H07", "H08", "H09")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.yaml", b"", "the file is empty"),
        ("run.json", b"", "line 1, column 1"),
        ("run.yaml", b"seed: 3\nadapter: caf\xe9\n", "line 2, column 13"),
        ("run.yaml", b"lr_scheduler_kwargs:\n\ta: 1\n", "indent with spaces"),
        ("run.yaml", b"a: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        ("run.json", b'{"a": ' * 3000 + b"1" + b"}" * 3000, "nested too deeply"),
        ("run.yaml", b"a: !!python/object/apply:os.system ['touch canary']", "not allowed"),
        (
            "run.yaml",
            b"a: &a [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (now, now, b",".join([b"*%c" % before] * 9))
                for before, now in zip(b"abcdefgh", b"bcdefghi", strict=True)
            ),
            "more than 100000 values",
        ),
        ("run.json", b'{"seed": ' + b"1" * 900_000 + b"}", "thousands of digits"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_with_its_place(
    refuse: Refuse, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, content: bytes, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    message = refuse("--config", written(content, name))
    assert name in message
    assert said in message
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("C20")
def test_files_of_windows_are_read_and_what_is_no_file_is_named(
    refuse: Refuse, written: Written, tmp_path: Path
) -> None:
    assert read("--config", written(b"\xef\xbb\xbfseed: 7\r\nadapter: a b\r\n")).seed == 7
    written("seed: 1", "train.yaml")
    message = refuse("--config", str(tmp_path / "trian.yaml"))
    assert f"not found: {tmp_path}/trian.yaml" in message
    assert "did you mean 'train.yaml'?" in message
    assert f"{tmp_path} is not a file" in refuse("--config", str(tmp_path))


@pytest.mark.fault("H09")
def test_settings_of_500_megabytes_are_refused_unread(refuse: Refuse, tmp_path: Path) -> None:
    with (tmp_path / "run.json").open("wb") as sparse:
        sparse.truncate(500_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 1000000 bytes" in refuse("--config", str(tmp_path / "run.json"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.fault("C22")
@pytest.mark.parametrize("item", ["a..b=1", "=x", "a.b", "seed.x=1"])
def test_an_override_that_means_nothing_is_quoted(refuse: Refuse, item: str) -> None:
    assert item.partition("=x")[0].removesuffix("=1") in refuse("--options", item)


# -- devices and libraries -------------------------------------------------------------------------


@pytest.mark.fault("C36")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_a_gpu_that_is_not_there_is_refused_at_once(
    root: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    asked = {"predict": ["--question", "Who?"], "evaluate": ["--data_path", f"{root}/train.json"]}
    words = ["--model_path", str(root / "isaac_model"), "--output", str(tmp_path / "out")]
    with no_device():
        assert isaac_lora([verb, *words, *asked[verb], "--device", "cuda"]) == 2
    assert "use auto or cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("C36")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.filterwarnings("default::UserWarning")
def test_without_a_gpu_a_training_says_that_it_runs_on_the_cpu(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    given = {"use_cpu": None, "data_path": tmp_path / "none.json", "val_data_path": None}
    with no_device():
        assert main(tiny_isaac_run.command(root, tmp_path / "run", **given)) == 2
    told = capsys.readouterr().err
    assert told.count("running on the CPU") == 1
    assert "none.json: no such file" in told


@pytest.mark.fault("C38")
def test_a_torchvision_of_another_torch_is_named_with_the_cure(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "torchvision-0.20.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: torchvision\nVersion: 0.20.1\nRequires-Dist: torch==2.5.1\n"
    )
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").write_text("raise RuntimeError('no operator nms')\n")
    monkeypatch.syspath_prepend(site)
    message = refuse()
    for part in ("torchvision 0.20.1, made for torch==2.5.1,", torch.__version__, "nms"):
        assert part in message
    assert "pip uninstall torchvision" in message


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(root: Path) -> None:
    """Everything is: another user may not read what Python is made of."""
    assert main([*tiny_isaac_run.command(root, root / "dry", val_data_path=None), "--dry_run"]) == 0
    asks = ["--model_path", str(root / "isaac_model"), "--device", "cpu", "--max_new_tokens", "1"]
    asks += ["--data_path", str(root / "train.json"), "--image_folder", str(root / "images")]
    assert isaac_lora(["evaluate", *asks, "--output", str(root / "evaluated")]) == 0


@pytest.fixture
def open_folder(root: Path, tmp_path: Path, imported: None) -> Iterator[Path]:
    """`tmp_path`, into which now every user may go, as into `root`."""
    above = [path for path in tmp_path.parents if path.stat().st_mode & 0o077 == 0]
    modes = {path: path.stat().st_mode for path in (*above, tmp_path, root)}
    for path in modes:
        path.chmod(0o755)
    yield tmp_path
    for path, mode in modes.items():
        path.chmod(mode)


def outputs(root: Path, place: Path) -> dict[str, tuple[list[str], Path]]:
    """Command -> its words with a place for its results, and the folder that it must write in."""
    model = ["--model_path", str(root / "isaac_model")]
    asks = [*model, "--device", "cpu", "--output", str(place)]
    asked = ["--data_path", str(root / "train.json"), "--image_folder", str(root / "images")]
    short = {"val_data_path": None, "max_steps": 1}
    cached = tiny_isaac_run.depth(root) | {"cache_dir": place} | short
    ramp = [*tiny_isaac_run.command(root, root / "run", **short), "--ramp_dir", str(place)]
    merged = ["merge", *model, "--adapter", str(root / "none"), "--output", str(place)]
    return {
        "train": (["train", *tiny_isaac_run.command(root, place, cache_dir=None, **short)], place),
        "cache": (["train", *tiny_isaac_run.command(root, root / "run", **cached)], place),
        "find-lr": (["find-lr", *ramp], place),
        "predict": (["predict", *asks, "--question", "Who?"], place),
        "evaluate": (["evaluate", *asks, *asked], place),
        "merge": (merged, place.parent),
        "prepare": (["prepare", "coco", "--source", str(root), "--output", str(place)],
                    place.parent),
        "demo": (["demo", "--output", str(place)], place),
    }  # fmt: skip


OUTPUTS = ("train", "cache", "find-lr", "predict", "evaluate", "merge", "prepare", "demo")


@pytest.mark.fault("C24", "R37")
@pytest.mark.parametrize("command", OUTPUTS)
def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    command: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for place, reason in (
        (tmp_path / "file" / "x" / "y", f"{tmp_path / 'file'} is not a folder"),
        (tmp_path / ("n" * 256) / "x", "at most 255 bytes"),
    ):
        with no_device():
            assert isaac_lora(outputs(root, place)[command][0]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --"), said
        assert reason in said
        assert "Traceback" not in said
    place = tmp_path / "new"
    with files_limited_to(0), no_device():
        assert isaac_lora(outputs(root, place)[command][0]) == 2
    said = capsys.readouterr().err
    assert f"cannot write in {tmp_path}: File too large" in said, said
    assert str(place) in said


@pytest.mark.fault("C24")
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("command", ["train", "predict", "merge"])
def test_a_folder_without_the_right_to_write_is_named(
    command: str, root: Path, open_folder: Path
) -> None:
    """Also one into which this user may not even look."""
    (open_folder / "closed").mkdir(mode=0o700)
    for place in (open_folder / "models", open_folder / "closed" / "models"):
        words = outputs(root, place)[command][0]
        status, message = as_nobody(lambda words=words: isaac_lora(words))
        assert status == 2, message
        assert f"{place.parent}: Permission denied" in message, message
        assert str(place) in message
        assert "Traceback" not in message


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("command", ["train", "predict", "evaluate"])
@pytest.mark.parametrize("closed", ["", "isaac_model", "images", "train.json"])
def test_what_this_user_may_not_read_is_named(
    command: str, closed: str, root: Path, open_folder: Path
) -> None:
    words = outputs(root, open_folder / "new")[command][0]
    open_folder.chmod(0o777)
    place = root / closed
    mode = place.stat().st_mode
    place.chmod(0o700 if place.is_dir() else 0o600)
    try:
        status, message = as_nobody(lambda: isaac_lora(words))
    finally:
        place.chmod(mode)
    assert "Traceback" not in message
    if command == "predict" and closed in ("images", "train.json"):  # not asked for
        return
    assert status == 2, message
    assert str(place) in message


@pytest.mark.fault("C23", "C24", "K50")
def test_two_runs_in_one_folder_never_mix_whatever_its_name(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mein Ördner 日本 {0} %s" / ("n" * 200)
    words = tiny_isaac_run.command(root, output, val_data_path=None, max_steps=1)
    assert main(words) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert (output / "adapter_model.safetensors") in before
    for again in (words, [*words, "--lora_r", "4"]):
        assert main(again) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_an_unreadable_file_of_conversations_is_a_message(tmp_path: Path) -> None:
    from isaac_lora.conversations.records import read_conversations

    (tmp_path / "d.json").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        read_conversations(tmp_path / "d.json")
