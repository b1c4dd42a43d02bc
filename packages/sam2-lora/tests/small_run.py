"""A run of seconds on pictures with hostile names, and packages that only seem to be installed.

Not a test: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sam2_lora import demo

SIDE = 64
HOSTILE_NAME = "{0.__class__} %s%n $(touch canary) <img src=x onerror=alert(1)>"


def write_coco(root: Path) -> Path:
    """Four pictures with one square each as COCO, with names and addresses meant to do harm."""
    rng = np.random.default_rng(0)
    for split, numbers in {"train": (0, 1, 2), "val": (3,)}.items():
        (root / split).mkdir(parents=True)
        content: dict[str, list[dict[str, object]]] = {
            "images": [], "annotations": [],
            "categories": [
                {"id": 1, "name": HOSTILE_NAME, "supercategory": "{x!r}"},
                {"id": 2, "name": "no"},
            ],
        }  # fmt: skip
        for number in numbers:
            name = f"{{0.__class__}}%s {number} <img src=x>.png"
            rgb = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            x = 6 + 4 * number
            rgb[x : x + 24, x : x + 24] = 255
            Image.fromarray(rgb).save(root / split / name)
            content["images"].append(
                {"id": number, "file_name": name, "width": SIDE, "height": SIDE,
                 "coco_url": "http://192.0.2.1/picture.png"}
            )  # fmt: skip
            corners = [x, x, x + 24, x, x + 24, x + 24, x, x + 24]
            content["annotations"].append(
                {"id": number, "image_id": number, "category_id": 1 + number % 2, "iscrowd": 0,
                 "area": 576, "bbox": [x, x, 24, 24], "segmentation": [corners]}
            )  # fmt: skip
        facts = {"info": {"script": "http://192.0.2.1/load.py", "trust_remote_code": True}}
        text = json.dumps({**facts, **content})
        (root / split / "_annotations.coco.json").write_text(text)
    return root


def command(data: Path, output: Path, **given: object) -> list[str]:
    """Flags of a small run on the packaged base."""
    words: dict[str, object] = {
        "data_root": data,
        "checkpoint": demo.base_checkpoint(),
        "image_size": SIDE,
        "steps": 1,
        "eval_steps": 1,
        "num_workers": 0,
        "tensorboard": False,
        "output_dir": output,
        "logs_dir": output / "logs",
        **given,
    }
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def install(folder: Path, name: str, version: str, needs: list[str], code: str = "") -> Path:
    """A package that is installed as far as Python can tell, at the front of the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    if code:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    return folder
