"""`midi3d-lora prepare`: folders of meshes become scenes, with given or rendered pictures.

raw/<scene>/*.glb|obj|ply|stl|off|gltf      instances: each file, or each geometry of a single one
raw/<scene>/rgb.png, seg.png, scene_rgb.png    optional; without them the scene is rendered
raw/<scene>.glb                                a scene of one file
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from lora_core.config import option, parse
from lora_core.guards import unnamed
from lora_core.report import say
from midi3d_lora.prepare import SceneOptions, Up, steps_text

TEXT = "Turn meshes and scene files into scenes to train on."


@dataclass(kw_only=True)
class Options(SceneOptions):
    """Settings of `midi3d-lora prepare`."""

    input_dir: str = option(MISSING, "Folder with a folder or a mesh file per scene.", "data")
    up: Up = option(
        "y",
        "Axis that points up in .obj, .ply, .stl and .off files, which do not say it themselves.",
        "data",
    )
    instances: Literal["auto", "scene"] = option(
        "auto",
        "auto: each mesh file is an instance, or each geometry of a single file; scene: all are "
        "one instance.",
        "data",
    )
    render: bool = option(False, "Render also scenes that have pictures of their own.", "data")
    full_mask: bool = option(
        False,
        "Take a picture without a map of instances as one instance that fills it.",
        "data",
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from unnamed(self, ("input_dir",))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    text = f"{TEXT} {steps_text()}"
    options = parse(Options, argv or [], prog="midi3d-lora prepare", description=text)
    from midi3d_lora.prepare_run import Work, run_all
    from midi3d_lora.sources.folder_scenes import axes, build, find_sources

    output = options.begin()
    sources = find_sources(Path(options.input_dir))
    settings = options.made_with("meshes", "up", "instances", "render", "full_mask")
    work = Work(output, lambda source: build(source, options), settings, options.reading())
    say(f"up axis: {axes(sources, options.up)}; the scenes will have y up")
    run_all(work, sources, options.shard(), options.overwrite, options.num_workers or None)
    return 0
