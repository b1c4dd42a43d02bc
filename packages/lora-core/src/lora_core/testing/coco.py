"""Faulty COCO files, each with what a package must say of it after the file's name.

`content` is a COCO data set as plain values: four images 0.png, 1.png, ... with the ids 0, 1, ...,
as many annotations with ids, boxes and polygons, and categories, the first of the id 1.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

from lora_core.testing import corrupt

# How a file's text may be damaged, and a pattern of the message. The text must hold "rust".
ENCODINGS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "text": (lambda text: b"hello", ":1:1: not JSON"),
    "empty": (lambda text: b"", ":1:1: not JSON"),
    "cut off": (lambda text: text.encode()[:-9], ": not JSON: "),
    "UTF-16": (lambda text: text.encode("utf-16"), ": UTF-16 text: save it as UTF-8"),
    "UTF-16, no mark": (lambda text: text.encode("utf-16-be"), "UTF-16 text: save it as UTF-8"),
    "Latin-1": (lambda text: text.replace("rust", "Rö").encode("latin-1"), "not UTF-8 text"),
    "JSON Lines": (lambda text: f"{text}\n{text}".encode(), ":2:1: not JSON: .*JSON Lines"),
    "gzip": (lambda text: gzip.compress(text.encode()), ": gzip: unpack it"),
    "web page": (lambda text: corrupt.WEB_PAGE, ":1:1: not JSON"),
}
PLACES = ("bbox", "segmentation", "image")  # of a number
DOUBLES = ("images", "annotations", "categories", "file")


def not_finite(content: dict[str, Any], place: str, value: str) -> tuple[str, str]:
    """The file's text with a number that JSON does not have, and what must be said of it.

    Args:
        place: one of `PLACES`. value: "NaN", "Infinity" or "-Infinity".
    """
    if place == "image":
        content["images"][2]["height"] = 12345
        field = "image 2: height"
    elif place == "bbox":
        content["annotations"][2]["bbox"] = [1, 2, 12345, 4]
        field = "annotation 2: bbox[2]"
    else:
        content["annotations"][2]["segmentation"][0][3] = 12345
        field = "annotation 2: segmentation[0][3]"
    text = json.dumps(content).replace("12345", value)
    return text, f"{field} is {float(value)}, expected a finite number"


def doubled(content: dict[str, Any], kind: str) -> str:
    """Make something stand twice in `content`, and give what must be said of it.

    Args:
        kind: one of `DOUBLES`.
    """
    if kind == "file":
        content["images"][3]["file_name"] = "1.png"
        return "image 3: 1.png is image 1 already"
    if kind == "categories":
        content["categories"] *= 2
        return "the category id 1 stands twice"
    content[kind][2]["id"] = content[kind][1]["id"]
    content[kind][3]["id"] = content[kind][0]["id"]
    return f"{kind[:-1]} ids that stand twice: 0, 1"
