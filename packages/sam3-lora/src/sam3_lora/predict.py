"""`sam3-lora predict`: the objects of phrases in pictures.

For every picture it writes `<stem>_overlay.png`, and for all together `predictions.json`, a COCO
data set whose annotations are COCO results: box, mask, score, and the phrase. The objects of a
picture are kept when they are found: a stopped command goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from sam3_lora.model_options import ModelOptions
from sam3_lora.user_prompts import Prompt, prompts_of_flags, read_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_core.kept_results import KeptResults
    from sam3_lora.predictor import Prediction, Predictor

RESULTS = "predictions.json"
# Settings that change no object of a picture.
WITHOUT_EFFECT = ("images", "phrases", "boxes", "labels", "prompts", "output", "overwrite")


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `sam3-lora predict`."""

    images: list[str] = option(MISSING, "Pictures, or folders of pictures.", "input")
    phrases: list[str] = option(
        [], 'What to look for: short noun phrases, --phrases "bolt" "rusty nut".', "input"
    )
    boxes: list[str] = option(
        [],
        "Example boxes x0,y0,x1,y1 in pixels, for one phrase or without any: objects like these.",
        "input",
    )
    labels: list[int] = option(
        [], "1 (an example) or 0 (not what is meant) for each box; default: all 1.", "input"
    )
    prompts: str | None = option(
        None,
        'JSON file with phrases and boxes for each picture: {"a.jpg": ["bolt", {"phrase": "nut", '
        '"boxes": [[x0, y0, x1, y1]], "labels": [1]}]}.',
        "input",
    )
    threshold: float = option(
        0.5,
        "Keep objects with a score above this, 0 to 1; sam3-lora evaluate suggests a value.",
        "output",
    )
    nms: float | None = option(
        None,
        "Drop an object whose mask overlaps a better one of its phrase by an IoU above this.",
        "output",
    )
    masks: bool = option(True, "Masks beside boxes.", "output")
    compare: bool = option(
        False, "With --adapter: overlays show the base model beside the adapted one.", "output"
    )
    output: str = option("predictions", "Folder for the results.", "output")
    overwrite: bool = option(False, "Replace results that are there.", "output")

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(listing(problems))

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.threshold <= 1:
            yield f"--threshold is {self.threshold}: it must be 0 to 1"
        if self.nms is not None and not 0 <= self.nms <= 1:
            yield f"--nms is {self.nms}: it must be 0 to 1"
        if self.nms is not None and not self.masks:
            yield "--nms compares masks: leave out --masks false"
        if self.compare and not self.adapter:
            yield "--compare shows the base beside the adapter: give --adapter"
        if self.prompts and (self.phrases or self.boxes or self.labels):
            yield (
                "--prompts FILE already holds the phrases and boxes: leave out --phrases, --boxes "
                "and --labels"
            )
        try:
            self.input_size()
            if not self.prompts:
                prompts_of_flags(self.phrases, self.boxes, self.labels)
        except ConfigError as error:
            yield str(error)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the process exit code.

    Raises:
        UserError: anything that the user can put right. Pictures that cannot be decoded are named
            at the end, when the results of the others are written.
    """
    options = parse(
        Options, argv, prog="sam3-lora predict", description="Find the objects of phrases."
    )
    prompts = ready(options)

    from lora_core.kept_results import UNFINISHED, KeptResults
    from lora_core.report import say
    from lora_core.tensor_file import write_json
    from sam3_lora.data import notes_on_length

    predictor = options.predictor()
    phrases = list(dict.fromkeys(one.phrase for asked in prompts.values() for one in asked))
    for note in notes_on_length(phrases, predictor.words):
        say(f"note: {note}")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    damaged: list[str] = []
    kept = KeptResults(folder / UNFINISHED)
    content = coco(predict_all(predictor, prompts, options, damaged, kept), phrases)
    write_json(folder / RESULTS, content, indent=None)
    kept.remove()
    done = len(content["images"])
    say(f"{done} picture{'s' * (done != 1)} -> {folder.absolute()}")
    if damaged:
        raise DataError(listing(damaged))
    if not content["annotations"]:
        say("nothing found: try a lower --threshold")
    return 0


# -- before any weight is read -------------------------------------------------------------------


def ready(options: Options) -> dict[Path, list[Prompt]]:
    """What is asked of each picture; refuses what can be known before the weights are read.

    Raises:
        ConfigError: libraries, folders or a device that cannot work, or results that are there.
        DataError: pictures or a file of prompts that cannot be used.
        CheckpointError: no such base or adapter, as far as headers tell.
    """
    from lora_core.pictures.files import find_images
    from lora_core.preflight import check_all, writable

    writable(options.output, "--output")
    images = find_images(options.images, "_overlay.png")
    prompts = read_prompts(images, options.phrases, options.boxes, options.labels, options.prompts)
    refuse_results(options, images)
    check_all(options.check_device, options.glance)
    return prompts


def refuse_results(options: Options, images: Sequence[Path]) -> None:
    """Earlier results stay, and results do not lie among the pictures.

    Raises:
        ConfigError: with the first file that is there.
    """
    from lora_core.kept_results import UNFINISHED

    folder = Path(options.output)
    if any(folder.resolve() == Path(name).resolve() for name in options.images):
        raise ConfigError(
            f"--output {one_line(folder)} is the folder of the pictures: overlays there would be "
            "taken for pictures the next time; choose another one"
        )
    overlays = [f"{image.stem}_overlay.png" for image in images]
    # Beside unfinished results they are those of the command that was stopped.
    wanted = [RESULTS, *(() if (folder / UNFINISHED).is_dir() else overlays)]
    there = [name for name in wanted if (folder / name).exists()]
    if there and not options.overwrite:
        raise ConfigError(
            f"--output {one_line(folder.absolute())} holds {len(there)} of the results already, "
            f"such as {one_line(there[0])}: choose another folder, or add --overwrite"
        )


# -- looking -------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What was found in a picture: its size is (H, W), its objects are those of `objects_of`."""

    name: str
    size: tuple[int, int]
    objects: list[dict[str, Any]]


def predict_all(
    predictor: Predictor,
    prompts: Mapping[Path, Sequence[Prompt]],
    options: Options,
    damaged: list[str],
    kept: KeptResults,
) -> Iterator[Found]:
    """What is found in one picture after the other; their overlays are written.

    Args:
        damaged: gets what is wrong with the pictures that cannot be decoded.
        kept: what was found before, and where objects are kept.
    """
    from lora_core.kept_results import stamps
    from lora_core.pictures.files import read_image
    from lora_core.report import plural, say

    settings, reused = follows_from(predictor, options), 0
    for image, asked in prompts.items():
        facts = [settings, [asdict(one) for one in asked], stamps([image])]
        if (before := kept.find(image.name, facts)) is not None:
            reused += 1
            yield Found(image.name, tuple(before["size"]), before["objects"])
            continue
        try:
            rgb = read_image(image)
        except DataError as error:  # the header was right; the others' results are not lost for it
            damaged.append(str(error))
            continue
        models = predict_one(predictor, rgb, asked, options)
        write_overlay(Path(options.output), image, rgb, asked, models)
        _, found = models[-1]
        parts = ", ".join(f"{len(one)} {one_line(one.phrase)}" for one in found)
        say(f"{one_line(image.name)}: {parts}")
        size, objects = (rgb.shape[0], rgb.shape[1]), objects_of(found)
        kept.keep(image.name, facts, {"size": size, "objects": objects})
        yield Found(image.name, size, objects)
    if reused:
        say(f"{plural(reused, 'picture')} from the command that was stopped")


def follows_from(predictor: Predictor, options: Options) -> list[Any]:
    """What the objects of every picture follow from: the model and the settings."""
    from lora_core.kept_results import stamps

    chosen = {key: value for key, value in asdict(options).items() if key not in WITHOUT_EFFECT}
    files = stamps(Path(name) for name in (options.adapter, options.bpe_path) if name)
    base = predictor.model.sam3_base.fingerprint
    return [chosen, base, files, predictor.device.type]


def predict_one(
    predictor: Predictor, rgb: NDArray[np.uint8], prompts: Sequence[Prompt], options: Options
) -> list[tuple[str, list[Prediction]]]:
    """Captions and objects of a picture: the base's first (with --compare), then the model's."""
    from sam3_lora.predictor import only

    names = ["base", "LoRA"] if options.compare else ["LoRA" if options.adapter else "prediction"]
    found = []
    for name in names:
        with only(predictor, name):
            predictor.set_image(rgb)
            objects = predictor.predict(prompts, options.threshold, options.nms, options.masks)
            found.append((name, objects))
    return found


# -- results -------------------------------------------------------------------------------------


def write_overlay(
    folder: Path,
    image: Path,
    rgb: NDArray[np.uint8],
    prompts: Sequence[Prompt],
    models: Sequence[tuple[str, Sequence[Prediction]]],
) -> None:
    """Write a picture's overlay."""
    from lora_core.pictures.overlay import save
    from sam3_lora.overlays import colours_of, counted, drawn, sheet

    colours = colours_of(prompt.phrase for prompt in prompts)
    pictures = [
        (counted(caption, found), drawn(rgb, found, colours, prompts)) for caption, found in models
    ]
    save(folder / f"{image.stem}_overlay.png", sheet(pictures, image.name, colours))


def objects_of(found: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Objects as COCO has them, but for what follows from the other pictures.

    Without masks an area is that of the box.
    """
    from pycocotools import mask as coco_mask

    objects = []
    for one in found:
        for number in range(len(one)):
            x0, y0, x1, y1 = one.boxes[number].tolist()
            record = {
                "phrase": one.phrase,
                "score": round(float(one.scores[number]), 6),
                "bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            if one.rles is not None:
                record["segmentation"] = one.rles[number]
                record["area"] = int(coco_mask.area(one.rles[number]))
            objects.append(record)
    return objects


def coco(results: Iterable[Found], phrases: Sequence[str]) -> dict[str, Any]:
    """A COCO data set of predictions, which COCO tools read, and `sam3-lora train` too.

    Its annotations alone are what COCO calls results.

    Args:
        results: what was found in each picture.
        phrases: the categories, numbered from 1.
    """
    numbers = {phrase: number for number, phrase in enumerate(phrases, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, (height, width), objects in results:
        images.append({"id": len(images) + 1, "file_name": name, "height": height, "width": width})
        for one in objects:
            place = {
                "id": len(annotations) + 1,
                "image_id": len(images),
                "category_id": numbers[one["phrase"]],
            }
            annotations.append(place | one)
    categories = [{"id": number, "name": phrase} for phrase, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
