"""`midi3d-lora prepare 3d-front`: rooms of 3D-FRONT become scenes.

As processed for MIDI-3D, all objects of a room in one frame:

    <source>/3D-FRONT-SURFACE/<house>/<room>/<object>.npy       points and normals
    <source>/3D-FRONT-RENDER/<house>/<room>/render_0000.webp    pictures, and
                                            semantic_0000.png   maps: value i is the i-th object
    <source>/3D-FRONT-SCENE/<house>/<room>/<object>.glb         meshes
    <source>/midi_room_ids.json, midi_furniture_ids.json        rooms, and for each its objects

As its authors distribute it:

    <source>/3D-FRONT/<house>.json                              furniture and where it stands
    <source>/3D-FUTURE-model/<jid>/raw_model.obj                meshes

Surfaces are taken with the published pictures; meshes are sampled and rendered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from lora_core.config import option, parse
from lora_core.errors import one_line
from lora_core.guards import unnamed
from lora_core.report import say
from midi3d_lora.prepare import SceneOptions

TEXT = "Turn rooms of 3D-FRONT into scenes."


@dataclass(kw_only=True)
class Options(SceneOptions):
    """Settings of `midi3d-lora prepare 3d-front`."""

    source: str = option(MISSING, "The data set's folder.", "data")
    parts: Literal["auto", "surfaces", "meshes", "raw"] = option(
        "auto",
        "What scenes are made of: published surfaces with pictures, published meshes, or the "
        "houses and models as distributed; auto: the first of these that is there.",
        "data",
    )
    rooms: str | None = option(
        None, "List of rooms, house/room, as .json or a line each; default: all.", "data"
    )
    subset: Literal["all", "train", "test"] = option(
        "all", "Of the list of rooms: its last 1000 are MIDI-3D's test set.", "data"
    )
    views: list[str] = option(["0000"], "Published views, each a scene: 0000 to 0010.", "pictures")
    pictures: Literal["render", "rerender"] = option(
        "render", "Which of the two published pictures of a view.", "pictures"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from unnamed(self, ("source", "rooms"))
        if not self.views:
            yield "--views is empty: name at least one, such as 0000"
        for view in self.views:
            if not (view.isascii() and view.isdigit() and len(view) == 4):
                yield f"--views is {one_line(view)!r}: expected four digits, such as 0000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    options = parse(Options, argv or [], prog="midi3d-lora prepare 3d-front", description=TEXT)
    from midi3d_lora.prepare_run import Work, run_all
    from midi3d_lora.sources.front_rooms import build, find_sources, parts_of

    output, root = options.begin(), Path(options.source)
    parts = parts_of(root, options)
    say(f"3d-front: scenes of {parts}")
    sources = find_sources(root, parts, options)
    settings = options.made_with("3d-front", *(["pictures"] if parts == "surfaces" else []))
    settings["parts"] = parts
    work = Work(output, lambda source: build(source, parts, options), settings, options.reading())
    run_all(work, sources, options.shard(), options.overwrite, options.num_workers or None)
    return 0
