"""The repository's own chores: the import rule and the release check find what they are for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def tool(name: str) -> ModuleType:
    """Load tools/<name>.py, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CORE, MODEL = "packages/lora-core/src/lora_core", "packages/sam2-lora/src/sam2_lora"


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        (f"{CORE}/layers.py", "import sam2_lora", "lora_core imports sam2_lora"),
        (f"{CORE}/layers.py", "def f():\n    import peft", "only peft_bridge and testing"),
        (f"{MODEL}/data.py", "from sam3_lora.data import load", "sam2_lora imports sam3_lora"),
        (f"{MODEL}/data.py", "from . import model", "relative import"),
        (f"{MODEL}/config.py", "import torch", "config must stay light"),
        (f"{MODEL}/data.py", "from tools import bench", "no part of a package"),
        (f"{MODEL}/model.py", "import sam2_lora.data", "in a circle"),
    ],
)
def test_the_import_rule_names_each_breach(
    tmp_path: Path, file: str, text: str, complaint: str
) -> None:
    sound = {
        f"{CORE}/__init__.py": "",
        f"{CORE}/peft_bridge.py": "import peft",
        f"{MODEL}/__init__.py": "import typing\nif typing.TYPE_CHECKING:\n    import torch",
        f"{MODEL}/config.py": "def f():\n    import torch",
        f"{MODEL}/data.py": "import lora_core, torch\nfrom sam2_lora.model import build",
        f"{MODEL}/model.py": "import torch",
        "packages/sam3-lora/src/sam3_lora/__init__.py": "",
    }
    check = tool("imports").check
    assert check(write(tmp_path, sound)) == []
    problems = check(write(tmp_path, {file: text}))
    assert len(problems) == 1
    assert complaint in problems[0]


def test_this_repository_follows_the_import_rule() -> None:
    assert tool("imports").check() == []


@pytest.mark.parametrize(
    ("tag", "complaint"),
    [
        ("sam2-lora-v0.3.1", None),
        ("sam2-lora-0.3.1", "is not <package>-v<version>"),
        ("sam9-lora-v0.3.1", "there is no package 'sam9-lora'"),
        ("sam2-lora-v0.3.2", "says version 0.3.1, the tag says 0.3.2"),
    ],
)
def test_a_release_needs_a_fitting_tag(tmp_path: Path, tag: str, complaint: str | None) -> None:
    root = write(
        tmp_path,
        {
            "packages/sam2-lora/pyproject.toml": "",
            "packages/sam2-lora/CHANGELOG.md": "# Changelog\n\n## 0.3.1 (2026-11-21)\n",
            f"{MODEL}/__init__.py": '__version__ = "0.3.1"\n',
        },
    )
    package, wrong = tool("release").problem(tag, root)
    assert (wrong is None and package == "sam2-lora") if complaint is None else complaint in wrong


def test_a_release_needs_a_dated_changelog_entry(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "packages/sam2-lora/pyproject.toml": "",
            "packages/sam2-lora/CHANGELOG.md": "# Changelog\n\n## 0.3.1 (unreleased)\n",
            f"{MODEL}/__init__.py": '__version__ = "0.3.1"\n',
        },
    )
    _, wrong = tool("release").problem("sam2-lora-v0.3.1", root)
    assert "has no entry '## 0.3.1 (YYYY-MM-DD)'" in wrong
