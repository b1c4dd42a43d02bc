import subprocess
import sys
import time
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lora_core.config import LoraConfig, Slices, dump, option, parse
from lora_core.errors import ConfigError
from lora_core.settings import file as config_file


@dataclass
class Lora:
    rank: int = option(8, "Rank.")
    blocks: list[int] = option([], "Blocks to adapt.")


@dataclass
class Settings:
    learning_rate: float = option(1e-3, "Peak learning rate.", "optimisation")
    steps: int = option(100, "Updates: 100 % of the run.", "optimisation")
    limit: int | None = option(None, "Upper bound, if any.", "optimisation")
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "Precision.", "model")
    dataset_size: Literal["full", "500"] = option("full", "Part of the data.", "data")
    image_size: str = option("1024", "Side.", "model")
    hflip: bool = option(True, "Mirror.", "data")
    adapter: str | None = option(None, "Start here.", "model")
    data_root: Path = option(Path("data"), "Folder.", "data")
    names: list[str] = option(["qkv"], "Layers.", "model")
    lora: Lora = field(default_factory=Lora)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}: it must be at least 1")


def read(*words):
    return parse(Settings, list(words), prog="test")


def refusal(*words):
    with pytest.raises(ConfigError) as caught:
        read(*words)
    return str(caught.value)


@pytest.fixture
def yaml(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# -- flags -----------------------------------------------------------------------------------------


def test_no_words_give_the_defaults():
    assert read() == Settings()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--steps 3", "steps", 3),
        ("--steps=3", "steps", 3),
        ("--steps 8.0", "steps", 8),
        ("--limit 8.0", "limit", 8),
        ("--limit 1e30", "limit", 10**30),
        ("--limit null", "limit", None),
        ("--learning_rate 1e-4", "learning_rate", 1e-4),
        ("--learning-rate 5E-5", "learning_rate", 5e-5),
        ("--learning_rate -1.5", "learning_rate", -1.5),
        ("--hflip", "hflip", True),
        ("--hflip --steps 3", "hflip", True),
        ("--hflip False", "hflip", False),
        ("--hflip=true", "hflip", True),
        ("--precision bf16", "precision", "bf16"),
        ("--dataset_size 500", "dataset_size", "500"),
        ("--image_size 512", "image_size", "512"),
        ("--adapter no", "adapter", "no"),
        ("--adapter 1e-4", "adapter", "1e-4"),
        ("--data_root a/b", "data_root", Path("a/b")),
        ("--names a b.c --steps 2", "names", ["a", "b.c"]),
        ("--names a", "names", ["a"]),
        ("--names [a,b]", "names", ["a", "b"]),
        ("--names 1 2", "names", ["1", "2"]),
        ("--options steps=7 names=[x]", "steps", 7),
    ],
)
def test_flags_are_read_as_people_write_them(words, name, value):
    got = getattr(read(*words.split()), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "name", ["\N{GRINNING FACE}.png", "a\udcff.png", "[1] a.png", 'a"b\\c', "a\nb", "null", "a, b"]
)
def test_words_of_a_list_are_taken_as_they_are(name):
    """Names of files may hold anything, letters beyond 16 bits and bytes that are none too."""
    assert read("--names", name).names == [name]
    assert read("--names", name, "x").names == [name, "x"]


def test_a_flag_with_a_wrong_value_is_not_missing_too():
    @dataclass
    class Needed:
        sizes: list[int] = option(MISSING, "Sizes.")

    with pytest.raises(ConfigError) as caught:
        parse(Needed, ["--sizes", "x"], prog="test")
    assert str(caught.value) == "--sizes: expected a list of a whole number, not '[x]'"
    with pytest.raises(ConfigError, match="--sizes is missing"):
        parse(Needed, [], prog="test")


def test_sections_lists_of_numbers_and_options_reach_nested_settings():
    assert read("--lora.rank", "4", "--lora.blocks", "1", "2").lora == Lora(4, [1, 2])
    assert read("--options", "lora.rank=4", "lora.blocks=[3]").lora == Lora(4, [3])


def test_the_trainer_field_collects_its_flags():
    words = "--trainer.ddp_timeout 60 --trainer.torch_compile --trainer.optim_args a=1,b=2"
    more = "--trainer.lr_scheduler_kwargs.min_lr 1e-5 --trainer.run_name yes"
    assert read(*words.split(), *more.split()).trainer == {
        "ddp_timeout": 60,
        "torch_compile": True,
        "optim_args": "a=1,b=2",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "run_name": "yes",
    }


def test_defaults_are_not_shared_between_runs():
    read().trainer["x"] = 1
    read().names.append("x")
    read("--trainer.a", "1")
    assert read() == Settings()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--lerning_rate 3", ["unknown flag --lerning_rate", "'--learning_rate'"]),
        ("--lora.rnk 3", ["--lora.rnk", "'--lora.rank'"]),
        ("--lora 3", ["--lora is a section"]),
        ("--steps.x 3", ["--steps is a single value"]),
        ("--steps", ["--steps needs a value: a whole number"]),
        ("--steps 8.5", ["--steps: expected a whole number, not '8.5'"]),
        ("--steps true", ["--steps: expected a whole number"]),
        ("--learning_rate abc", ["--learning_rate: expected a number, not 'abc'"]),
        ("--hflip maybe", ["--hflip: expected true or false, not 'maybe'"]),
        ("--precision bf61", ["one of auto, fp32, bf16", "did you mean 'bf16'?"]),
        ("--lora.blocks 1 x", ["--lora.blocks: expected a list of a whole number"]),
        ("--steps 3 4", ["unexpected word '4' after --steps"]),
        ("steps 3", ["unexpected word 'steps'"]),
        ("--options a..b=1", ["'a..b=1'"]),
        ("--options =x", ["'=x'"]),
        ("--options a.b", ["'a.b'"]),
        ("--options steps.b=1", ["--steps is a single value"]),
        ("--trainer 3", ["--trainer.NAME VALUE"]),
        ("--trainer.a 1 --trainer.a.b 2", ["a is a single value"]),
        ("--steps 0", ["--steps is 0: it must be at least 1"]),
        ("--config", ["--config needs a value"]),
        ("nothing.yaml", ["not found", "nothing.yaml"]),
    ],
)
def test_a_wrong_word_is_named_with_what_was_expected(words, parts):
    message = refusal(*words.split())
    for part in parts:
        assert part in message


def test_all_wrong_flags_are_reported_together():
    assert len(refusal("--lerning_rate", "3", "--steps", "x", "--hflip", "2").splitlines()) == 3


def test_a_setting_without_default_must_be_given():
    @dataclass
    class Needs:
        data: str = field(metadata={"help": "Folder with pictures."})

    with pytest.raises(ConfigError, match=r"--data is missing: Folder with pictures\."):
        parse(Needs, [], prog="test")
    assert parse(Needs, ["--data", "x"], prog="test") == Needs("x")


# -- files -----------------------------------------------------------------------------------------

GOOD = """
learning_rate: 1e-4        # text to a YAML 1.1 reader
image_size: 512
dataset_size: 500
hflip: no
steps: 8.0
adapter: "no"
names: [qkv, 7]
lora: {rank: 4}
trainer:
  max_grad_norm: 5E-1
  ddp_backend: gloo
"""


def test_a_file_means_what_its_writer_meant(yaml):
    expected = Settings(
        learning_rate=1e-4,
        image_size="512",
        dataset_size="500",
        hflip=False,
        steps=8,
        adapter="no",
        names=["qkv", "7"],
        lora=Lora(rank=4),
        trainer={"max_grad_norm": 0.5, "ddp_backend": "gloo"},
    )
    got = read("--config", yaml(GOOD))
    assert got == expected
    assert isinstance(got.learning_rate, float)
    assert isinstance(got.steps, int)


def test_a_first_word_that_is_a_file_is_the_config(yaml):
    assert read(yaml('{"steps": 5,\n\t"names": ["a"]}', "run.json")).names == ["a"]
    assert read(yaml("steps: 5"), "--hflip", "false").steps == 5


def test_flags_override_files_and_later_files_earlier_ones(yaml):
    first = yaml("steps: 1\nlearning_rate: 1.0\nlora: {rank: 2}\ntrainer: {a: 1, b: 1}", "a.yaml")
    second = yaml("steps: 2\nlora: {blocks: [1]}\ntrainer: {b: 2}", "b.yaml")
    got = read("--steps", "3", "--config", first, "--config", second, "--trainer.c", "3")
    assert (got.steps, got.learning_rate, got.lora) == (3, 1.0, Lora(2, [1]))
    assert got.trainer == {"a": 1, "b": 2, "c": 3}


def test_byte_order_mark_windows_lines_and_escapes_are_fine(yaml):
    assert read(yaml(b"\xef\xbb\xbfsteps: 3\r\nadapter: a\r\n")).steps == 3
    assert read(yaml('{"adapter": "d\\u00e9\\ud83d\\ude00"}', "x.json")).adapter == "dé😀"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: 3\nlora_rnk: 8", ["line 2", "lora_rnk", "'lora.rank'"]),
        ("zzz: 8", ["line 1", "unknown setting zzz", "see --help"]),
        ("lerning_rate: 8", ["line 1", "'learning_rate'"]),
        ("lora:\n  rnk: 8", ["line 2", "unknown setting lora.rnk", "'lora.rank'"]),
        ("steps: 8.5", ["line 1", "steps", "a whole number", "8.5"]),
        ('steps: "four"', ["steps", "a whole number", "'four'"]),
        ("steps: true", ["steps", "a whole number"]),
        ("hflip: maybe", ["hflip", "true or false", "'maybe'"]),
        ("adapter: no", ["adapter", "'no' in quotes"]),
        ("adapter: true", ["adapter", "'true' in quotes"]),
        ("image_size: null", ["image_size", "'null' in quotes"]),
        ("image_size: 1.10", ["image_size", "in quotes"]),
        ("names: [off]", ["names", "'off' in quotes"]),
        ("trainer:\n  on: 3", ["line 2", "'on' in quotes"]),
        ("trainer: {torch_compile: [yes]}", ["'yes' in quotes", "true or false"]),
        ("steps: 1\nseed: 3\nsteps: 2", ["steps stands twice, on lines 1 and 3"]),
        ("lora:\n  rank: 1\n  rank: 2", ["lora.rank stands twice, on lines 2 and 3"]),
        ("lora: 5", ["lora is a section"]),
        ("names: a", ["names", "a list of text"]),
        ("steps:\n\t- 1", ["line 2", "a tab"]),
        ("steps: [1, 2\nhflip: 3", ["line 2", "not YAML"]),
        ("", ["empty"]),
        ("- 3", ["not a single value or list"]),
        (b"steps: 3\nadapter: \xe9", ["line 2, column 10", "UTF-8"]),
        ("steps: " + "1" * 6000, ["line 1", "no usable number"]),
        ("adapter: !!python/object/apply:os.system ['touch canary']", ["tag", "not allowed"]),
        ("adapter: !secret x", ["tag !secret is not allowed"]),
        ("trainer: " + "[" * 3000 + "]" * 3000, ["nested too deeply"]),
        ("trainer: {a: " + "[" * 60 + "]" * 60 + "}", ["nested too deeply"]),
        ("trainer: &a {b: *a}", ["nested too deeply"]),
        ("? [a, b]\n: 1", ["a key must be a name"]),
    ],
)
def test_a_faulty_yaml_file_is_refused_with_its_place(yaml, tmp_path, monkeypatch, text, parts):
    monkeypatch.chdir(tmp_path)
    message = refusal("--config", yaml(text))
    assert "run.yaml" in message
    for part in parts:
        assert part in message
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"steps": 1,\n"steps": 2}', ["steps stands twice, on lines 1 and 2"]),
        ('{"steps": 1,}', ["line 1, column 1", "not JSON"]),
        ('{"learning_rate": NaN}', ["NaN is not a number in JSON"]),
        ('{"steps": ' + "1" * 6000 + "}", ["thousands of digits"]),
        ('{"trainer": ' + "[" * 30000 + "]" * 30000 + "}", ["nested too deeply"]),
    ],
)
def test_a_faulty_json_file_is_refused_with_its_place(yaml, text, parts):
    message = refusal("--config", yaml(text, "run.json"))
    for part in ["run.json", *parts]:
        assert part in message


def test_an_alias_bomb_stops_at_once(yaml):
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [
        f"{now}: &{now} [{','.join([f'*{before}'] * 9)}]"
        for before, now in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    began = time.monotonic()
    assert "aliases" in refusal("--config", yaml("\n".join(lines)))
    assert time.monotonic() - began < 5


def test_what_is_no_configuration_file_is_named(yaml, tmp_path):
    assert "not a file" in refusal("--config", str(tmp_path))
    yaml("steps: 3", "train.yaml")
    assert "did you mean 'train.yaml'?" in refusal("--config", str(tmp_path / "trian.yaml"))
    assert "more than" in refusal("--config", yaml("# " + "x" * 1_000_000, "big.yaml"))


def test_all_faults_of_a_file_are_reported_together(yaml):
    message = refusal("--config", yaml("stps: 1\nhflip: 3\nlora:\n  rnk: 8"), "--steps", "x")
    assert len(message.splitlines()) == 4


def test_dump_reads_back_equal(tmp_path, yaml):
    config = read(
        *["--learning_rate", "1e-05", "--adapter", "no", "--image_size", "010", "--names", "1e-4"],
        *["--lora.rank", "3", "--trainer.a", "[yes, 1e-4, x: y]", "--data_root", "a b/é"],
    )
    dump(config, tmp_path / "config.yaml")
    assert read("--config", str(tmp_path / "config.yaml")) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# -- --help and --print_config ---------------------------------------------------------------------


def test_help_is_grouped_with_defaults_and_describes_the_trainer_field(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help", "--lerning_rate", "3")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Updates: 100 % of the run. (default: 100)" in text
    assert text.index("optimisation:") < text.index("--steps N") < text.index("model:")
    assert "--trainer.NAME VALUE" in text
    assert text.count("--trainer") == 1
    assert "--lora.blocks N [N ...]" in text


@dataclass
class Ordered:
    group_order = ("model", "data")

    guard: int = option(1, "Guard.", "guards")
    images: str = option("", "Pictures. (required)", "data")
    model: str = option("a", "Model.", "model")


def test_groups_have_the_order_that_the_settings_name(capsys):
    with pytest.raises(SystemExit):
        parse(Ordered, ["--help"], prog="test", description="Train 100 %.\n\nRefused: all.")
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("Train 100 %.", "general:", "--model", "--images")]
    places += [text.index(word) for word in ("--guard", "Refused: all.")]
    assert places == sorted(places)
    assert "(required)\n" in text
    with pytest.raises(SystemExit):
        parse(Ordered, ["--print_config"], prog="test")
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert [name for name in names if name[:1] != "#"] == ["model", "images", "guard"]


def test_print_config_is_a_file_with_the_same_settings(capsys, yaml):
    with pytest.raises(SystemExit) as stop:
        read("--steps", "7", "--lora.rank", "3", "--print_config")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "# Peak learning rate." in text
    assert read("--config", yaml(text)) == Settings(steps=7, lora=Lora(rank=3))


def test_settings_cost_no_import_of_torch():
    code = (
        "import sys, lora_core\n"
        "from lora_core.config import parse, option\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass C:\n    steps: int = option(1, 'Steps.')\n"
        "parse(C, ['--steps', '2'], prog='x')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\nparse(C, ['--help'], prog='x')"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--steps N" in done.stdout
    assert time.monotonic() - began < 10  # torch alone takes three on a quiet machine


def test_values_read_alone_are_typed_like_those_of_a_file():
    for text, value in {"3": 3, "1e-4": 1e-4, "true": True, "[a, 1]": ["a", 1], "": None}.items():
        assert config_file.value(text) == value
    assert config_file.value("a: b: c") == "a: b: c"
    assert config_file.value("no") == "no"


# -- LoraConfig ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": 8.0}, "r is 8.0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -1.0}, "lora_alpha is -1.0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"rank_pattern": {"fc": 0}}, "rank_pattern['fc'] is 0"),
        ({"alpha_pattern": {"fc": 0}}, "alpha_pattern['fc'] is 0"),
        ({"rank_pattern": {"(": 1}}, "'(' is no regular expression"),
        ({"last_blocks": {"blocks": 0}}, "last_blocks['blocks'] is 0"),
        ({"target_modules": []}, "target_modules is []"),
        ({"target_modules": [1]}, "target_modules is [1]"),
        ({"target_modules": "("}, "'(' is no regular expression"),
        ({"modules_to_save": "("}, "'(' is no regular expression"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": False}, "init_lora_weights is False"),
        ({"init_lora_weights": "gausian"}, "did you mean 'gaussian'?"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_lora_config_refuses_what_cannot_work_and_shows_it(settings, part):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{"target_modules": ["q"], **settings})
    assert part in str(caught.value)


def test_lora_config_takes_what_peft_takes():
    config = LoraConfig(".*q_proj", lora_alpha=0.5, init_lora_weights="pissa", r=1)
    assert (config.r, config.lora_alpha, config.bias) == (1, 0.5, "none")
    assert LoraConfig(lambda name, module: True).lora_dropout == 0.0


def test_slices_take_lists_and_refuse_contradictions():
    assert Slices(["q", "kv"], ["q"], [4, 8]) == Slices(("q", "kv"), ("q",), (4, 8))
    for wrong in (
        {"use": ("x",)},
        {"use": ()},
        {"names": ("q", "q")},
        {"sizes": (1, 2)},
        {"sizes": (1, 2, 0)},
    ):
        with pytest.raises(ConfigError, match="slices"):
            Slices(**wrong)
