"""Settings: what the guide's names mean, and what cannot work."""

from pathlib import Path

import pytest

from lora_core.config import parse
from lora_core.errors import ConfigError
from sam3_lora.config import COMPONENTS, Config, Lora, parse_size

EXAMPLE = Path(__file__).parents[1] / "src" / "configs" / "lora_config_example.yaml"


def read(*words: str) -> Config:
    return parse(Config, words, prog="sam3-lora train")


def test_the_example_file_says_the_defaults() -> None:
    assert read("--config", str(EXAMPLE)) == Config()


@pytest.mark.fault("C33")
@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1000", "try 994"),
        ("1000x672", "try 994x672"),
        ("0", "try 14"),
        ("-14", "expected 1008 or HEIGHTxWIDTH"),
        ("large", "expected 1008 or HEIGHTxWIDTH"),
        ("1008x", "expected 1008 or HEIGHTxWIDTH"),
        ("14x14x14", "expected 1008 or HEIGHTxWIDTH"),
        ("99999", "at most 8192"),
    ],
)
def test_an_impossible_resolution_is_answered_with_one_that_works(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        read("--dataset.resolution", text)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("1008", (1008, 1008)), ("672X1008", (672, 1008)), ("14", (14, 14))]
)
def test_a_resolution_is_a_side_or_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.fault("C34")
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_limit_that_leaves_no_object_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--dataset\.max_ann_per_img"):
        read("--dataset.max_ann_per_img", value)


@pytest.mark.parametrize(
    ("switches", "masks", "expected"),
    [
        ({}, False, {"vision_encoder", "detr_encoder", "detr_decoder"}),
        ({}, True, {"vision_encoder", "detr_encoder", "detr_decoder", "mask_decoder"}),
        ({"freeze_backbone": True}, False, {"detr_encoder", "detr_decoder"}),
        ({"freeze_text_encoder": False, "freeze_encoder": True}, False,
         {"vision_encoder", "text_encoder", "detr_decoder"}),
        ({"freeze_decoder": True, "apply_to_geometry_encoder": True}, False,
         {"vision_encoder", "geometry_encoder", "detr_encoder"}),
        ({"apply_to_mask_decoder": False}, True,
         {"vision_encoder", "detr_encoder", "detr_decoder"}),
    ],
)  # fmt: skip
def test_switches_choose_components(
    switches: dict[str, bool], masks: bool, expected: set[str]
) -> None:
    found = Lora(**switches).components(masks)
    assert set(found) == expected
    assert list(found) == [one for one in COMPONENTS if one in expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.freeze_encoder", "true", "--lora.apply_to_detr_encoder", "true"],
         "--lora.freeze_encoder and --lora.apply_to_detr_encoder: give one of them"),
        (["--lora.target_modules", "q_prj"], "did you mean 'q_proj'"),
        (["--lora.target_modules", "[]"], "target_modules is empty"),
        (["--lora.apply_to_mask_decoder", "true"], "--training.enable_segmentation true"),
        (["--lora.rank", "0"], "--lora.rank"),
        (["--lora.dropout", "1"], "--lora.dropout"),
        (["--training.learning_rate", "nan"], "--training.learning_rate"),
        (["--training.max_epoch", "3"], "did you mean '--training.max_epochs'"),
        (["--dataset.val_ann_file", "null"], "give both, or neither"),
        (["--dataset.phrase", " "], "--dataset.phrase is empty"),
        (["--lora.freeze_backbone", "true", "--lora.freeze_encoder", "true",
          "--lora.freeze_decoder", "true"], "every component is switched off"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    assert message in str(caught.value)
