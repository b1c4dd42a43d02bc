"""The programs of the README run as they stand there."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_depth
import torch
from PIL import Image
from recorded_isaac import GOLDENS, recorded_model

import isaac_lora.depth.checkpoint as depth_checkpoint

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and the files that the README speaks of."""
    recorded_model().save_pretrained(tmp_path / "isaac_model")
    for path in (GOLDENS / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "isaac_model")
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "boxes.jpg")
    tiny_depth.write_original(tmp_path / "depth_anything_v2_vits.pth")
    # The recorded depth model has none of the published sizes.
    monkeypatch.setattr(depth_checkpoint, "_published", lambda path: tiny_depth.SETTINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_question_is_answered_and_otherwise_with_depth(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(PROGRAMS) == 2
    names: dict[str, Any] = {}
    exec(PROGRAMS[0], names)
    printed, without = capsys.readouterr().out, names["answer"]
    new = without[0, names["inputs"]["input_ids"].shape[1] :]
    assert printed.strip() == names["processor"].decode(new).strip()
    exec(PROGRAMS[1], names)
    assert not torch.equal(names["answer"], without)
