"""`sam2-lora predict`: masks for pictures, from clicks and boxes or by themselves.

For every picture it writes `<stem>_mask.png` (0 background, 1, 2, ... the instances) and
`<stem>_overlay.png` (the base model beside the adapted one), and for all together
`predictions.json` in COCO format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing, one_line
from lora_core.guards import unnamed
from lora_core.preflight import writable
from lora_core.report import plural, say
from lora_core.settings.types import shown
from sam2_lora.config import parse_size
from sam2_lora.model_options import ModelOptions
from sam2_lora.user_prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from sam2_lora.automatic import Grid, Instance
    from sam2_lora.predictor import Predictor

OVERLAY = "_overlay.png"


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `sam2-lora predict`."""

    images: list[str] = option(MISSING, "Pictures, or folders of pictures.", "input")
    points: list[str] = option(
        [], "Clicks x,y in pixels, all on one object of each picture.", "prompts"
    )
    labels: list[int] = option([], "1 (on the object) or 0 (beside it) for each click.", "prompts")
    boxes: list[str] = option([], "Boxes x0,y0,x1,y1 in pixels, one object each.", "prompts")
    prompts: str | None = option(
        None,
        'JSON file {"a.jpg": {"points": [[x, y], ...], "labels": [1, ...], '
        '"boxes": [[x0, y0, x1, y1], ...]}}; points of several objects are one list each.',
        "prompts",
    )
    points_per_side: int = option(
        32, "Without prompts: a grid of about this number squared clicks.", "automatic"
    )
    min_score: float = option(0.8, "Keep masks with at least this predicted IoU.", "automatic")
    min_stability: float = option(
        0.95, "Keep masks whose area hardly depends on the threshold, 0 to 1.", "automatic"
    )
    min_object_score: float = option(
        0.0,
        "Keep masks where the model's logit for 'there is an object' is above this.",
        "automatic",
    )
    max_overlap: float = option(
        0.5, "Drop a mask when better ones cover more than this share of it.", "automatic"
    )
    min_area: int = option(16, "Drop masks with fewer pixels.", "automatic")
    tile: int = option(
        0,
        "Cut larger pictures into overlapping squares of this many pixels, which should be larger "
        "than the objects; 0: never.",
        "automatic",
    )
    output: str = option("predictions", "Folder for the results.", "output")
    compare_base: bool = option(
        True, "With --adapter: show the base model's masks beside the adapted ones.", "output"
    )

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise ConfigError(listing(problems))

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from unnamed(self, ("checkpoint", "adapter", "prompts", "output"))
        if "" in self.images:
            yield "--images holds an empty name: give pictures or folders"
        if self.prompts and (self.points or self.boxes):
            yield "--prompts FILE already holds the prompts: leave out --points and --boxes"
        for name in ("min_score", "min_stability", "max_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"--{name} is {getattr(self, name)}: it must be 0 to 1"
        if not 1 <= self.points_per_side <= 512:
            yield f"--points_per_side is {shown(self.points_per_side)}: it must be 1 to 512"
        if self.min_area < 1:
            yield f"--min_area is {shown(self.min_area)}: it must be at least 1"
        if self.tile and self.tile < 64:
            yield f"--tile is {shown(self.tile)}: it must be 0 (never) or at least 64 pixels"
        if self.image_size is not None:
            try:
                parse_size(self.image_size)
            except ConfigError as error:
                yield str(error)

    def grid(self) -> Grid:
        """Density and filters of the automatic grid."""
        from sam2_lora.automatic import Grid

        return Grid(
            points_per_side=self.points_per_side,
            min_score=self.min_score,
            min_stability=self.min_stability,
            min_object_score=self.min_object_score,
            max_overlap=self.max_overlap,
            min_area=self.min_area,
        )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the process exit code."""
    options = parse(Options, argv, prog="sam2-lora predict", description="Masks for pictures.")
    writable(options.output, "--output")
    images = find_images(options.images)
    prompts = read_prompts(images, options.points, options.labels, options.boxes, options.prompts)

    from lora_core.tensor_file import write_json

    predictor = options.predictor()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    content = coco(predict_all(predictor, prompts, options))
    write_json(folder / "predictions.json", content, indent=None)
    say(f"{plural(len(images), 'picture')} -> {folder.absolute()}")
    if not content["annotations"]:
        say("nothing found: try a lower --min_score and --min_stability, or give points")
    return 0


# -- what to look at -----------------------------------------------------------------------------


def find_images(names: Sequence[str]) -> list[Path]:
    """The pictures of `--images`: see `lora_core.pictures.files.find_images`."""
    from lora_core.pictures import files

    return files.find_images(names, "_mask.png")


# -- looking -------------------------------------------------------------------------------------


def predict_all(
    predictor: Predictor, prompts: Mapping[Path, Sequence[Prompt]], options: Options
) -> Iterator[tuple[str, tuple[int, int], list[Instance]]]:
    """Name, size (H, W) and instances of one picture after the other; their files are written."""
    from lora_core.pictures.files import read_image
    from lora_core.report import say

    for image, given in prompts.items():
        rgb = read_image(image)
        found = predict_one(predictor, rgb, given, options)
        write_picture(Path(options.output), image, rgb, given, found)
        _, instances = found[-1]
        say(f"{one_line(image.name)}: {plural(len(instances), 'object')}")
        yield image.name, (rgb.shape[0], rgb.shape[1]), instances


def predict_one(
    predictor: Predictor, rgb: NDArray[np.uint8], prompts: Sequence[Prompt], options: Options
) -> list[tuple[str, list[Instance]]]:
    """Captions and instances of a picture: the base's first (if asked for), then the model's."""
    from lora_core.injection import adapters_off

    rows: list[tuple[str, Callable[[], Any]]] = []
    if options.adapter and options.compare_base:
        rows.append(("base", lambda: adapters_off(predictor.model)))
    rows.append(("LoRA" if options.adapter else "prediction", nullcontext))
    found = []
    for caption, context in rows:
        with context():
            predictor.set_image(rgb)
            if prompts:
                found.append((caption, [_ask(predictor, prompt) for prompt in prompts]))
            else:
                found.append((caption, predictor.everything(options.grid(), options.tile)))
    return found


def _ask(predictor: Predictor, prompt: Prompt) -> Instance:
    from sam2_lora.automatic import instance_of

    masks, scores, _ = predictor.predict(
        points=prompt.points or None, labels=prompt.labels or None, boxes=prompt.box
    )
    return instance_of(masks[0], float(scores[0]))


# -- results -------------------------------------------------------------------------------------


def write_picture(
    folder: Path,
    image: Path,
    rgb: NDArray[np.uint8],
    prompts: Sequence[Prompt],
    found: Sequence[tuple[str, Sequence[Instance]]],
) -> None:
    """Write a picture's instance map and its overlay."""
    from lora_core.pictures.overlay import draw, panels, save

    size = (rgb.shape[0], rgb.shape[1])
    pictures = [
        (
            f"{caption}: {plural(len(instances), 'object')}",
            draw(
                rgb,
                (instance.mask(size) for instance in instances),
                boxes=[prompt.box for prompt in prompts if prompt.box],
                points=[xy for prompt in prompts for xy in prompt.points],
                labels=[sign for prompt in prompts for sign in prompt.labels],
            ),
        )
        for caption, instances in found
    ]
    save(folder / f"{image.stem}{OVERLAY}", panels(pictures, image.name))
    save(folder / f"{image.stem}_mask.png", instance_map(found[-1][1], size))


def instance_map(
    instances: Sequence[Instance], size: tuple[int, int]
) -> NDArray[np.unsignedinteger]:
    """Instance k as value k + 1 in a picture of `size` (H, W).

    Where two meet, the better score wins. uint8 for up to 255 instances, else uint16.
    """
    ids = np.zeros(size, dtype=np.uint8 if len(instances) < 256 else np.uint16)
    for index in sorted(range(len(instances)), key=lambda k: instances[k].score):
        x0, y0, x1, y1 = instances[index].box
        ids[y0:y1, x0:x1][instances[index].crop] = index + 1
    return ids


def coco(results: Iterable[tuple[str, tuple[int, int], Sequence[Instance]]]) -> dict[str, Any]:
    """A COCO data set of predictions, which COCO tools and `--data_format coco` read.

    Args:
        results: file name, size (H, W) and instances of each picture.
    """
    from lora_core.pictures.encodings import encode_counts

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, size, instances in results:
        images.append(
            {"id": len(images) + 1, "file_name": name, "height": size[0], "width": size[1]}
        )
        for number, instance in enumerate(instances, start=1):
            x0, y0, x1, y1 = instance.box
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": len(images),
                "category_id": 1,
                "segmentation": {
                    "size": list(size), "counts": rle_string(encode_counts(instance.mask(size)))
                },
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(instance.crop.sum()),
                "iscrowd": 0,
                "score": round(instance.score, 6),
                "value_in_mask_png": number,
            })  # fmt: skip
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }


def rle_string(lengths: Sequence[int]) -> str:
    """COCO's compressed form of run lengths.

    From the third on, each is written as its difference to the one two before; each number as
    groups of five bits, lowest first, bit 6 saying that another group follows, plus 48 in ASCII.
    """
    text = []
    for index, length in enumerate(lengths):
        value = length - lengths[index - 2] if index > 2 else length
        while True:
            group, value = value & 31, value >> 5
            last = value == (-1 if group & 16 else 0)  # the sign bit says the rest
            text.append(chr(48 + (group if last else group | 32)))
            if last:
                break
    return "".join(text)
