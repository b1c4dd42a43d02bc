"""`midi3d-lora predict` and `inference_with_lora.py`: a picture and its map to a 3D scene.

Beside `output.glb`, which has one named geometry for each instance, it writes `output.json`
(labels, counts and boxes in the order of the map, and how the scene was made) and
`output_views.png`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, one_line
from lora_core.guards import count_problem, unnamed
from lora_core.preflight import check_all, writable
from midi3d_lora.model_options import ModelOptions

if TYPE_CHECKING:
    from midi3d_lora.conditioning.pictures import ScenePictures
    from midi3d_lora.meshes.extraction import Mesh

TEXT = "Generate a 3D scene, a .glb with one mesh for each instance, from a picture and its map."
PREVIEW = "_views.png"


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `midi3d-lora predict`."""

    rgb_image: str = option(MISSING, "The picture of the scene.", "input")
    seg_image: str = option(
        MISSING,
        "The map of its instances: grey, palette or colour; 0, black and transparent are "
        "background.",
        "input",
    )
    scene_image: str | None = option(
        None, "The whole scene, where --rgb_image does not show all of it.", "input"
    )
    do_image_padding: bool = option(
        False, "Space around instances that touch the picture's border.", "input"
    )
    max_instances: int = option(32, "A map with more values than this is refused.", "input")
    smallest_share: float = option(
        0.001, "Instances with fewer than this share of the pixels are left out.", "input"
    )
    output: str = option("output.glb", "The scene; what belongs to it is beside it.", "output")
    objects: str | None = option(None, "Folder for a file of each instance, too.", "output")
    object_format: Literal["glb", "obj", "ply", "stl"] = option(
        "glb", "Of the files in --objects.", "output"
    )
    turntable: str | None = option(None, "A .gif of the scene that turns.", "output")
    turntable_frames: int = option(36, "Pictures of the --turntable.", "output")
    turntable_seconds: float = option(4.0, "Of one turn.", "output")
    views: bool = option(
        True, f"Picture, instances and two views of the scene as <output>{PREVIEW}.", "output"
    )
    view_size: int = option(384, "Pixels of each view and of the turntable.", "output")
    overwrite: bool = option(False, "Replace results that are there.", "output")

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = super().problems()
        paths = ("rgb_image", "seg_image", "scene_image", "output", "objects", "turntable")
        found += unnamed(self, paths)
        found += count_problem(self, "max_instances", 1)
        for name, least, most in (("turntable_frames", 2, 720), ("view_size", 64, 2048)):
            if not least <= getattr(self, name) <= most:
                found.append(f"--{name} is {getattr(self, name)}: it must be {least} to {most}")
        if not 0 <= self.smallest_share < 1:
            found.append(f"--smallest_share is {self.smallest_share}: it must be 0 <= share < 1")
        if not 0.1 <= self.turntable_seconds <= 600:
            found.append(
                f"--turntable_seconds is {self.turntable_seconds}: it must be 0.1 to 600 seconds"
            )
        return found

    def results(self) -> Iterator[Path]:
        """The files that are written, but those of --objects."""
        output = Path(self.output)
        yield output
        yield output.with_suffix(".json")
        if self.views:
            yield output.with_name(output.stem + PREVIEW)
        if self.turntable is not None:
            yield Path(self.turntable)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="midi3d-lora predict", description=TEXT)
    pictures = ready(options)

    from lora_core.report import Progress, plural, say
    from midi3d_lora.generation import make_latents, make_meshes

    if options.lora_path is None:
        say("no --lora_path: the base model")
    say(f"{plural(len(pictures), 'instance')}: {', '.join(pictures.seg.names)}")
    pipeline = options.load()
    with Progress(options.num_inference_steps) as progress:
        progress.figures = {"sampling": plural(len(pictures), "instance")}
        latents = make_latents(pipeline, pictures, options, options.seed, progress)
    with Progress(len(pictures)) as progress:
        progress.figures = {"decoding": "surfaces"}
        meshes = make_meshes(pipeline, pictures, latents, options, progress)
    for path in write(options, pictures, meshes):
        say(f"-> {path.absolute()}")
    return 0


# -- before any weight is read ---------------------------------------------------------------------


def ready(options: Options) -> ScenePictures:
    """The pictures; refuses what can be known before the weights are read.

    Raises:
        ConfigError: outputs or a device that cannot work, results that are there, or flags that
            contradict the adapter.
        DataError: pictures that cannot be used.
        CheckpointError: no such model or adapter, as far as headers tell.
    """
    read: list[ScenePictures] = []
    check_all(
        lambda: refuse_results(options),
        options.check_device,
        options.glance,
        lambda: read.append(read_pictures(options)),
    )
    options.check_blocks(len(read[0]))
    return read[0]


def refuse_results(options: Options) -> None:
    """Outputs that can be written, are no inputs, and are not there.

    Raises:
        ConfigError: otherwise.
    """
    from midi3d_lora.meshes.mesh_files import check_scene_path
    from midi3d_lora.meshes.views import check_turntable_path

    check_scene_path(options.output)
    if options.turntable is not None:
        check_turntable_path(options.turntable)
        writable(Path(options.turntable).parent, "--turntable")
    writable(Path(options.output).parent, "--output")
    if options.objects is not None:
        writable(options.objects, "--objects")
    inputs = [options.rgb_image, options.seg_image, options.scene_image]
    read = {Path(name).resolve() for name in inputs if name is not None}
    if clash := [path for path in options.results() if path.resolve() in read]:
        raise ConfigError(f"--output: {one_line(clash[0])} is one of the pictures: name another")
    there = [path for path in options.results() if path.exists()]
    if options.objects is not None:
        there += sorted(Path(options.objects).glob(f"instance_*.{options.object_format}"))
    if there and not options.overwrite:
        raise ConfigError(
            f"--output: {one_line(there[0].absolute())} is there already: choose another name, or "
            "add --overwrite"
        )


def read_pictures(options: Options) -> ScenePictures:
    """The instances of the picture; tells what was left out of the map, or brought to a size.

    Raises:
        DataError: files that are no pictures, or do not show the same; all that is wrong.
    """
    from lora_core.pictures.files import read_image
    from lora_core.report import say
    from midi3d_lora.conditioning.pictures import pad_border
    from midi3d_lora.conditioning.seg_maps import SegMap, read_seg_map
    from midi3d_lora.pipeline import scene_pictures
    from midi3d_lora.scenes.scene_folders import resized_map, resized_picture

    images, maps = list[Any](), list[SegMap]()
    least = options.smallest_share

    def read(name: str) -> None:
        images.append(read_image(Path(name)))

    named = [name for name in (options.rgb_image, options.scene_image) if name is not None]
    check_all(
        *(partial(read, name) for name in named),
        lambda: maps.append(read_seg_map(options.seg_image, options.max_instances, least)),
    )
    picture, scene, seg = images[0], images[-1], maps[0]
    height, width = picture.shape[:2]
    if seg.size != (height, width) and seg.size[0] * width == seg.size[1] * height:
        say(f"--seg_image has {seg.size[1]} x {seg.size[0]} pixels: brought to {width} x {height}")
        seg = resized_map(seg, height, width)
    if scene.shape[0] * width == scene.shape[1] * height:
        scene = resized_picture(scene, height, width)
    pictures = scene_pictures(picture, seg, scene if options.scene_image else None)
    return pad_border(pictures) if options.do_image_padding else pictures


# -- results ---------------------------------------------------------------------------------------


def write(
    options: Options, pictures: ScenePictures, meshes: dict[str, Mesh | None]
) -> Iterator[Path]:
    """Write all that was asked for, the scene first; gives each path when it is there.

    Raises:
        NumericError: no instance has a surface. CheckpointError: the disk refuses.
    """
    from lora_core.report import Progress
    from midi3d_lora.meshes import views
    from midi3d_lora.meshes.mesh_files import write_instances, write_scene

    output, shown = Path(options.output), list(meshes.values())
    images = {"picture": Path(options.rgb_image).name, "map": Path(options.seg_image).name}
    write_scene(output, meshes, options.said() | images)
    yield output
    if options.objects is not None:
        yield from write_instances(options.objects, meshes, options.object_format)
    if options.views:
        sheet = views.scene_sheet(pictures, shown, options.view_size)
        path = output.with_name(output.stem + PREVIEW)
        views.write_sheet(path, sheet)
        yield path
    if options.turntable is not None:
        stage = views.stage(shown, options.view_size, detail=2)
        frames, seconds = options.turntable_frames, options.turntable_seconds
        with Progress(frames) as progress:
            progress.figures = {"drawing": "the turntable"}
            views.write_turntable(options.turntable, stage, frames, seconds, progress.update)
        yield Path(options.turntable)
