"""`midi3d-lora prepare objaverse`: objects of Objaverse become scenes of one instance.

    <source>/hf-objaverse-v1/glbs/000-000/<uid>.glb          as `objaverse.load_objects` saves them
    <source>/hf-objaverse-v1/lvis-annotations.json.gz        category -> uids, for --categories

Other folders of .glb files, such as Objaverse-XL's, work as well: every file is an object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass

from lora_core.config import option, parse
from lora_core.guards import unnamed
from midi3d_lora.prepare import SceneOptions

TEXT = "Turn objects of Objaverse into scenes of one instance, with rendered pictures."


@dataclass(kw_only=True)
class Options(SceneOptions):
    """Settings of `midi3d-lora prepare objaverse`."""

    source: str = option(MISSING, "Folder with .glb files, at any depth.", "data")
    uids: str | None = option(None, "List of objects, one uid a line; default: all.", "data")
    categories: list[str] = option(
        [], "Only objects of these categories of lvis-annotations.json.gz.", "data"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from unnamed(self, ("source", "uids"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    options = parse(Options, argv or [], prog="midi3d-lora prepare objaverse", description=TEXT)
    from midi3d_lora.prepare_run import Work, run_all
    from midi3d_lora.sources.objaverse_objects import build, find_objects

    output = options.begin()
    sources = find_objects(options)
    settings = options.made_with("objaverse")
    work = Work(output, lambda source: build(source, options), settings, options.reading())
    run_all(work, sources, options.shard(), options.overwrite, options.num_workers or None)
    return 0
