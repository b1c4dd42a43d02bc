"""Depth settings go with an adapter and are compared with how it is used."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from isaac_lora.depth.settings import (
    FILE,
    DepthSettings,
    check_adapter,
    read_depth_settings,
    write_depth_settings,
)
from lora_core.errors import CheckpointError, ConfigError

SETTINGS = DepthSettings("vitl", "depth_anything_v2_vitl.pth", "0123456789abcdef" * 4, 50.0, 392)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = write_depth_settings(tmp_path, SETTINGS)
    assert path == tmp_path / "depth.json"
    assert read_depth_settings(tmp_path) == SETTINGS
    assert json.loads(path.read_text()) == {
        "format": 1,
        "depth_model": "vitl",
        "depth_checkpoint": "depth_anything_v2_vitl.pth",
        "depth_checkpoint_sha256": "0123456789abcdef" * 4,
        "depth_alpha": 50.0,
        "depth_input_size": 392,
    }


def test_defaults_are_those_of_the_original() -> None:
    settings = DepthSettings("vits", "depth.pth", "0" * 64)
    assert (settings.alpha, settings.input_size) == (100.0, 518)


def test_an_adapter_that_is_used_as_it_was_trained_gives_no_remark(tmp_path: Path) -> None:
    write_depth_settings(tmp_path, SETTINGS)
    elsewhere = replace(SETTINGS, checkpoint="a_folder_with_the_same_weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_adapter(tmp_path, elsewhere) == SETTINGS
        assert check_adapter(tmp_path / "trained_without", None) is None


def test_all_differences_are_told_together(tmp_path: Path) -> None:
    write_depth_settings(tmp_path, SETTINGS)
    other = DepthSettings("vits", "depth_anything_v2_vits.pth", "f" * 64, 100.0, 518)
    with pytest.raises(CheckpointError) as error:
        check_adapter(tmp_path, other)
    for words in (
        "trained with depth_anything_v2_vitl.pth (vitl",
        "used with depth_anything_v2_vits.pth (vits, ffffffffffff)",
        "depth_alpha: trained with 50, used with 100",
        "depth_input_size: trained with 392, used with 518",
    ):
        assert words in str(error.value)


def test_an_adapter_of_depth_without_depth_is_warned_about(tmp_path: Path) -> None:
    write_depth_settings(tmp_path, SETTINGS)
    with pytest.warns(UserWarning, match=r"--depth_alpha 50 --depth_input_size 392"):
        assert check_adapter(tmp_path, None) == SETTINGS


def test_depth_with_an_adapter_that_knows_none_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="was trained without depth"):
        assert check_adapter(tmp_path, SETTINGS) is None


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 10**400])
def test_impossible_scales_are_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="expected a number above 0"):
        replace(SETTINGS, alpha=alpha)


@pytest.mark.parametrize(("size", "closest"), [(512, 518), (1, 14), (0, 14), (10**400, 5180)])
def test_impossible_input_sizes_are_refused_with_the_closest_one(size: int, closest: int) -> None:
    with pytest.raises(ConfigError, match=f"multiple of 14.* such as {closest} "):
        replace(SETTINGS, input_size=size)


# -- damaged files ---------------------------------------------------------------------------------


def changed(tmp_path: Path, **changes: object) -> Path:
    path = write_depth_settings(tmp_path, SETTINGS)
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth_alpha": None}, "depth_alpha is missing"),
        ({"depth_alpha": "100"}, "depth_alpha: expected a number, found '100'"),
        ({"depth_alpha": True}, "depth_alpha: expected a number, found true"),
        ({"depth_alpha": -1}, "expected a number above 0"),
        ({"depth_alpha": 10**400}, "at most 1e"),
        ({"depth_alhpa": 1}, "did you mean 'depth_alpha'"),
        ({"depth_input_size": 518.0}, "expected a whole number, found 518.0"),
        ({"depth_input_size": 0}, "depth_input_size 0"),
        ({"depth_checkpoint_sha256": "abc"}, "expected 64 hexadecimal digits"),
        ({"format": 0}, "format 0: expected 1"),
        ({"format": 2}, "newer than this isaac-lora knows"),
    ],
)
def test_impossible_contents_are_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_depth_settings(changed(tmp_path, **changes))


def test_all_problems_of_a_file_are_told_together(tmp_path: Path) -> None:
    folder = changed(tmp_path, depth_alpha=None, depth_model=3)
    with pytest.raises(CheckpointError, match=r"(?s)depth_alpha is missing.*depth_model: expected"):
        read_depth_settings(folder)


def test_a_file_that_is_no_json_is_not_taken_for_no_depth(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CheckpointError, match="no readable JSON"):
        read_depth_settings(tmp_path)


def test_a_broken_link_is_not_taken_for_no_depth(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="which is gone"):
        read_depth_settings(tmp_path)


def test_settings_need_no_torch() -> None:
    code = "import sys, isaac_lora.depth.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
