"""One thread for every test: times and bits do not depend on what else the machine does."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_core.testing import environment

environment.prepare()  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))  # for tiny_training.py

from lora_core.testing import refusals  # noqa: E402


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with refusals.small_disk(tmp_path / "disk", 2**21) as place:
        yield place


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="lora-tests-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
