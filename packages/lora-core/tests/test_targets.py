"""Which modules an entry names, and what a wrong entry is answered."""

import pytest
from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.targets import glob, resolve


def attention():
    module = nn.Module()
    module.q_proj, module.v_proj, module.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
    return module


def block():
    module = nn.Module()
    module.attn, module.fc1, module.act = attention(), nn.Linear(4, 8), nn.ReLU()
    return module


def tower():
    module = nn.Module()
    module.blocks = nn.ModuleList([block() for _ in range(3)])
    return module


@pytest.fixture
def model():
    module = nn.Module()
    module.vision, module.text = tower(), tower()
    module.head = nn.Linear(4, 2)
    module.mixer = nn.MultiheadAttention(4, 2)
    return module


def paths(model, targets, roles=None, **settings):
    return resolve(model, LoraConfig(targets, **settings), roles)


def test_a_full_path_names_one_module(model):
    assert paths(model, ["vision.blocks.1.attn.q_proj"]) == ["vision.blocks.1.attn.q_proj"]


def test_the_end_of_a_path_names_all_in_module_order(model):
    found = paths(model, ["fc1", "attn.q_proj"])
    assert found == [
        f"{t}.blocks.{i}.{end}"
        for t in ("vision", "text")
        for i in range(3)
        for end in ("attn.q_proj", "fc1")
    ]


def test_an_end_begins_at_a_dot(model):
    with pytest.raises(ConfigError, match=r"'proj' matches no module.*'q_proj'"):
        paths(model, ["proj"])


def test_globs_stay_within_a_component_unless_doubled(model):
    assert paths(model, ["vision.blocks.*.fc1"]) == [f"vision.blocks.{i}.fc1" for i in range(3)]
    assert len(paths(model, ["vision.**"])) == 9
    assert paths(model, ["vision.blocks.[01].attn.?_proj"]) == [
        f"vision.blocks.{i}.attn.{n}_proj" for i in range(2) for n in "qv"
    ]
    with pytest.raises(ConfigError, match="matches no module"):
        paths(model, ["vision.*.fc1"])


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("**.head", "head", True),
        ("**.head", "a.b.head", True),
        ("**.head", "a.behead", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.**", "a.b.c", True),
        ("a.[!b]", "a.b", False),
        ("a.[!b]", "a.c", True),
        ("a+b.*", "a+b.c", True),
    ],
)
def test_glob(pattern, path, hit):
    assert (glob(pattern).fullmatch(path) is not None) == hit


def test_expressions_match_whole_paths(model):
    assert paths(model, [r"re:vision\.blocks\.\d\.fc1"]) == paths(model, ["vision.blocks.*.fc1"])
    assert paths(model, r"vision.*\.fc1") == paths(model, ["vision.**.fc1"])
    with pytest.raises(ConfigError, match="matches no module"):
        paths(model, "fc1")


def test_a_function_chooses_by_name_and_module(model):
    found = paths(model, lambda name, module: isinstance(module, nn.Linear) and "text" in name)
    assert len(found) == 9
    with pytest.raises(ConfigError, match="chose no module"):
        paths(model, lambda name, module: False)
    with pytest.raises(ConfigError, match=r"vision.blocks.0.act \(ReLU\)"):
        paths(model, lambda name, module: isinstance(module, nn.ReLU))


def test_roles_stand_for_patterns(model):
    roles = {"attention": ["vision.**.q_proj", "vision.**.v_proj"], "fc1": ["text.blocks.0.fc1"]}
    assert len(paths(model, ["attention"], roles)) == 6
    assert paths(model, ["fc1"], roles) == ["text.blocks.0.fc1"]
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        paths(model, ["atention"], roles)


def test_exclusion_wins_by_full_path_and_over_what_lies_inside(model):
    assert paths(model, ["fc1"], exclude_modules=["text"]) == paths(model, ["vision.**.fc1"])
    assert paths(model, ["fc1"], exclude_modules=r"text\..*") == paths(model, ["vision.**.fc1"])
    left = paths(model, ["q_proj", "v_proj"], exclude_modules=["vision.blocks.0.attn", "text"])
    assert left == [f"vision.blocks.{i}.attn.{n}_proj" for i in (1, 2) for n in "qv"]
    with pytest.raises(ConfigError, match="exclude_modules: 'txt' matches no module"):
        paths(model, ["fc1"], exclude_modules=["txt"])
    with pytest.raises(ConfigError, match="leave none"):
        paths(model, ["vision.**.fc1"], exclude_modules=["vision"])


def test_modules_to_save_are_not_adapted(model):
    assert "head" not in paths(model, ["**"], modules_to_save=["head"])


def test_last_blocks_keep_the_end_of_a_list(model):
    found = paths(model, ["fc1"], last_blocks={"vision.blocks": 2, "text.blocks": 1})
    assert found == ["vision.blocks.1.fc1", "vision.blocks.2.fc1", "text.blocks.2.fc1"]
    with pytest.raises(ConfigError, match=r"has 3 blocks, 4 were asked for \(1 to 3\)"):
        paths(model, ["fc1"], last_blocks={"vision.blocks": 4})
    with pytest.raises(ConfigError, match=r"Lists: text\.blocks, vision\.blocks"):
        paths(model, ["fc1"], last_blocks={"vision.layers": 1})
    with pytest.raises(ConfigError, match="is no list of blocks"):
        paths(model, ["fc1"], last_blocks={"vision": 1})


def test_each_entry_must_match_and_all_failures_are_told(model):
    with pytest.raises(ConfigError, match="did you mean 'fc1'") as error:
        paths(model, ["q_proj", "fc2", "hed"])
    assert "'hed' matches no module. did you mean 'head'?" in str(error.value)


def test_named_modules_that_cannot_be_adapted_are_refused_with_their_kind(model):
    for target, words in [
        ("norm", r"text.blocks.0.attn.norm \(LayerNorm\)"),
        ("vision.blocks", r"vision.blocks \(ModuleList\)"),
        ("attn", "name the layers inside"),
        ("**.norm", r"only modules that cannot be adapted: .*\(LayerNorm\)"),
    ]:
        with pytest.raises(ConfigError, match=words):
            paths(model, [target])


def test_a_path_that_is_also_an_end_is_ambiguous():
    model = tower()
    model.extra = tower()
    with pytest.raises(ConfigError, match=r"also the end of extra.blocks.0.fc1.*'re:blocks"):
        paths(model, ["blocks.0.fc1"])
    assert paths(model, [r"re:blocks\.0\.fc1"]) == ["blocks.0.fc1"]
    assert paths(model, ["**.blocks.0.fc1"]) == ["blocks.0.fc1", "extra.blocks.0.fc1"]


def test_an_attention_layer_brings_its_output_projection(model):
    assert paths(model, ["mixer"]) == ["mixer", "mixer.out_proj"]
    assert paths(model, ["mixer"], exclude_modules=["out_proj"]) == ["mixer"]
    assert paths(model, ["out_proj"]) == ["mixer.out_proj"]
