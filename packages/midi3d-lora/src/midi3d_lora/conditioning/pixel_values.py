"""Pictures to the numbers that the image encoders take, as preprocessor_config.json says.

The steps of transformers' processors on Pillow (`CLIPImageProcessorPil`, `BitImageProcessorPil`),
bit for bit, without importing that library: resize, centre crop, rescale, normalise. A mask takes
the same resize and crop as its picture; the official code squeezes the whole mask to the size of
the cropped picture, so that the two no longer match wherever something was cropped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_core.base_file import read_settings
from lora_core.errors import CheckpointError, listing, near
from lora_core.tensor_file import write_json
from midi3d_lora.conditioning.pictures import nearest

FILE = "preprocessor_config.json"
# Names of classes, and what concerns calls only: nothing of it changes a number.
INERT = frozenset({
    "image_processor_type", "feature_extractor_type", "processor_class", "data_format",
    "input_data_format", "return_tensors", "default_to_square", "device", "disable_grouping",
    "image_seq_length", "use_fast", "do_convert_rgb",
})  # fmt: skip
OFF = frozenset({"do_pad", "pad_size", "size_divisor", "do_reduce_labels", "use_square_size"})
LARGEST = 4096  # pixels of an edge


@dataclass(frozen=True)
class PictureSettings:
    """What a processor does; the defaults are those of transformers' CLIP and BiT processors.

    Attributes:
        size: {"shortest_edge": n}, or {"height": h, "width": w}.
        resample: Pillow's number of the filter; 3 is bicubic.
        crop_size: {"height": h, "width": w}.
        image_mean, image_std: of values 0..1, per channel.
    """

    do_resize: bool = True
    size: tuple[tuple[str, int], ...] = (("shortest_edge", 224),)
    resample: int = 3
    do_center_crop: bool = True
    crop_size: tuple[tuple[str, int], ...] = (("height", 224), ("width", 224))
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture after its resize: the shorter edge is exact."""
        size = dict(self.size)
        if not self.do_resize:
            return height, width
        if "height" in size:
            return size["height"], size["width"]
        edge = size["shortest_edge"]
        if width <= height:
            return int(edge * height / width), edge
        return edge, int(edge * width / height)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what the encoder gets for a picture of this size."""
        crop = dict(self.crop_size)
        if self.do_center_crop:
            return crop["height"], crop["width"]
        return self.resized(height, width)

    def content(self) -> dict[str, Any]:
        """As in the JSON file."""
        table = asdict(self)
        return table | {
            "size": dict(self.size),
            "crop_size": dict(self.crop_size),
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }


# -- the file --------------------------------------------------------------------------------------


def read_picture_settings(folder: str | Path) -> PictureSettings:
    """The settings in a folder's preprocessor_config.json; what it does not say is the default.

    Raises:
        CheckpointError: missing, unreadable, unknown or impossible settings, all together.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path.absolute()}: no such file: a model directory needs it to prepare pictures"
        )
    found = {name: value for name, value in read_settings(path).items() if name[:1] != "_"}
    problems = [
        f"{name} is {found[name]!r}: not supported, expected false or no such key"
        for name in OFF & found.keys()
        if found[name]
    ]
    found = {name: value for name, value in found.items() if name not in INERT | OFF}
    known = {field.name: field.default for field in fields(PictureSettings)}
    values: dict[str, Any] = {}
    for name, value in found.items():
        if name not in known:
            problems.append(f"unknown key {name!r}: {near(name, known) or 'remove it'}")
        elif value is not None:
            try:
                values[name] = _value(name, value, known[name])
            except (TypeError, ValueError) as error:
                problems.append(f"{name} is {value!r}, expected {error}")
    if problems:
        raise CheckpointError(listing([f"{path}: {problem}" for problem in sorted(problems)]))
    return PictureSettings(**values)


def write_picture_settings(settings: PictureSettings, folder: Path, processor: str) -> None:
    """Write preprocessor_config.json.

    Args:
        processor: transformers' name of the class, CLIPImageProcessor or BitImageProcessor.
    """
    content = {"do_convert_rgb": True, "image_processor_type": processor} | settings.content()
    write_json(folder / FILE, content)


def _value(name: str, value: Any, default: Any) -> Any:
    """The value in our form.

    Raises:
        ValueError: impossible; says what is expected.
    """
    if name in ("size", "crop_size"):
        return _size(value, name == "size")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if name == "resample":
        if type(value) is not int or not 0 <= value <= 5:
            raise ValueError("the number of one of Pillow's filters, 0 to 5")
        return value
    if name == "rescale_factor":
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError("a number above 0, such as 1/255")
        return float(value)
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("three numbers, one per channel")
    if not all(isinstance(n, int | float) and abs(n) < 1e6 for n in value):
        raise ValueError("three numbers, one per channel")
    if name == "image_std" and min(value) <= 0:
        raise ValueError("three numbers above 0")
    return tuple(float(n) for n in value)


def _size(value: Any, edge: bool) -> tuple[tuple[str, int], ...]:
    """A size as it stands in newer and in older files (one number)."""
    if type(value) is int:
        value = {"shortest_edge": value} if edge else {"height": value, "width": value}
    allowed = [{"height", "width"}, *([{"shortest_edge"}] if edge else [])]
    if not isinstance(value, dict) or set(value) not in allowed:
        raise ValueError("{'height': h, 'width': w}" + " or {'shortest_edge': n}" * edge)
    if not all(type(n) is int and 1 <= n <= LARGEST for n in value.values()):
        raise ValueError(f"pixels from 1 to {LARGEST}")
    return tuple(sorted(value.items()))


# -- the numbers -----------------------------------------------------------------------------------


def pixel_values(picture: NDArray[np.uint8], settings: PictureSettings) -> NDArray[np.float32]:
    """A picture RGB uint8 [H, W, 3] as float32 [3, h, w], normalised."""
    height, width = settings.resized(*picture.shape[:2])
    if settings.do_resize:
        filter_ = Image.Resampling(settings.resample)
        picture = np.asarray(Image.fromarray(picture).resize((width, height), filter_))
    values = np.moveaxis(picture, -1, 0)
    if settings.do_center_crop:
        values = center_crop(values, settings.output(height, width))
    numbers = np.empty(values.shape, dtype=np.float32)
    for channel, levels, table in zip(numbers, values, _tables(settings), strict=True):
        np.take(table, levels, out=channel, mode="clip")
    return numbers


def _tables(settings: PictureSettings) -> NDArray[np.float32]:
    """What each of the 256 levels becomes in each channel, float32 [3, 256]."""
    levels = np.arange(256, dtype=np.float32)
    if settings.do_rescale:  # in float64, then rounded once, as transformers does
        levels = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    tables = np.stack([levels] * 3)
    if settings.do_normalize:
        mean, std = (
            np.array(n, np.float32)[:, None] for n in (settings.image_mean, settings.image_std)
        )
        tables = (tables - mean) / std
    return tables


def mask_values(mask: NDArray[np.uint8], settings: PictureSettings) -> NDArray[np.float32]:
    """A mask uint8 [H, W] of 0 and 255 as float32 [h, w] of 0 and 1, in the place of its picture.

    Resized with torch's "nearest", as officially, not Pillow's, which reads other pixels.
    """
    height, width = settings.resized(mask.shape[0], mask.shape[1])
    values = nearest(mask, (height, width))
    if settings.do_center_crop:
        values = center_crop(values, settings.output(height, width))
    return (values > 0).astype(np.float32)


def center_crop(values: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle [..., h, w] of [..., H, W]; where that is too small it is laid on zeros."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = values.shape[axis]
        if old < new:
            before = ceil((new - old) / 2)
            pads = [(0, 0)] * values.ndim
            pads[axis] = (before, new - old - before)
            values = np.pad(values, pads)
        start = (values.shape[axis] - new) // 2
        middle = slice(start, start + new)
        values = values[..., middle] if axis == -1 else values[..., middle, :]
    return values
