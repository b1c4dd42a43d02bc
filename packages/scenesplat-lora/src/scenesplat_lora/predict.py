"""`scenesplat-lora predict`: labels of scenes, by the nearest text or of a trained head.

For every scene it writes `<output>/<scene>/labels.npy` (int32 [N], -1: none), `labels.ply` with a
colour per class, and `picture.png`; for all together `predictions.json` with counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.preflight import writable
from scenesplat_lora.model_options import ModelOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from scenesplat_lora.scenes.scene import Scene
    from scenesplat_lora.scenes.sources import Source

RESULTS = "predictions.json"
TEXT = "Label scenes: labels, a coloured .ply and a picture of each."


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `scenesplat-lora predict`."""

    scenes: list[str] = option(
        MISSING, "Scene folders, 3D Gaussian .ply files, or folders that hold some.", "data"
    )
    cut_above: float = option(
        0.8, "The picture leaves out what is above this share of the height: ceilings.", "output"
    )
    output: str = option("predictions", "Folder for the results.", "output")
    overwrite: bool = option(False, "Replace results that are there.", "output")

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = super().problems()
        if not 0 < self.cut_above <= 1:
            found.append(f"--cut_above is {self.cut_above}: it must be above 0, at most 1")
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process exit code.

    Raises:
        UserError: anything that the user can put right. Scenes that cannot be used are named at
            the end, when the results of the others are written.
    """
    options = parse(Options, argv or [], prog="scenesplat-lora predict", description=TEXT)
    sources = ready(options)

    from lora_core.report import say
    from lora_core.tensor_file import write_json

    results, damaged = predict_all(sources, options)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, {"classes": list(options.classes().names), "scenes": results})
    say(f"{len(results)} scene{'s' * (len(results) != 1)} -> {folder.absolute()}")
    if damaged:
        raise DataError(listing(damaged))
    return 0


def ready(options: Options) -> list[Source]:
    """The scenes; refuses what can be known before the weights are read.

    Raises:
        ConfigError: folders or a device that cannot work, or results that are there.
        DataError: no scenes. CheckpointError: no such base or adapter, as far as headers tell.
    """
    from lora_core.preflight import check_all
    from scenesplat_lora.scenes.sources import find_sources

    sources = find_sources(options.scenes)
    check_all(
        lambda: writable(options.output, "--output"),
        lambda: refuse_results(sources, options),
        options.check_device,
        options.glance,
    )
    return sources


def refuse_results(sources: Sequence[Source], options: Options) -> None:
    """Results that are there stay, and folders that are none of ours always do.

    Raises:
        ConfigError: there are some.
    """
    taken = [
        folder for source in sources if (folder := Path(options.output) / source.name).exists()
    ]
    foreign = [folder for folder in taken if not (folder / "labels.npy").exists()]
    if foreign or (taken and not options.overwrite):
        place = one_line((foreign or taken)[0].absolute())
        remedy = "choose another folder" if foreign else "choose another, or add --overwrite"
        raise ConfigError(f"--output: {place} is there already: {remedy}")


def predict_all(
    sources: Sequence[Source], options: Options
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Label and write every scene; gives points per class, and what is wrong with other scenes."""
    from lora_core.data_file import new_tree
    from lora_core.report import Progress
    from scenesplat_lora.labelling import label_scene
    from scenesplat_lora.language.zero_shot import vote
    from scenesplat_lora.scenes.values import LAYOUTS

    classes, model = options.classes(), options.load()
    results: dict[str, dict[str, int]] = {}
    damaged = []
    with Progress(len(sources)) as progress:
        for number, source in enumerate(sources, start=1):
            try:
                scene = source.read(LAYOUTS[options.layout], options.wanted)
                labels = label_scene(model, scene, classes.text, options.labelling())
            except DataError as error:
                damaged.append(str(error))
                continue
            if options.vote_k:
                labels = vote(labels, scene["coord"], k=options.vote_k)
            with new_tree(Path(options.output) / source.name) as tree:
                write(tree, scene, labels, classes.names, options.cut_above)
            results[source.name] = counts(labels, classes.names)
            progress.update(number)
    return results, damaged


def counts(labels: NDArray[np.int64], names: Sequence[str]) -> dict[str, int]:
    """Gaussians of each class that occurs, the most frequent first; "" are those without one."""
    import numpy as np

    numbers, count = np.unique(labels, return_counts=True)
    found = {"" if n < 0 else names[n]: int(c) for n, c in zip(numbers, count, strict=True)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def write(
    folder: Path,
    scene: Scene,
    labels: NDArray[np.int64],
    names: Sequence[str],
    cut_above: float = 0.8,
) -> None:
    """Write a new folder with the labels of a scene, its coloured points and a picture."""
    import numpy as np

    from lora_core.pictures.overlay import save
    from scenesplat_lora.picture import label_colours, scene_sheet
    from scenesplat_lora.scenes.ply import write_points

    folder.mkdir()
    np.save(folder / "labels.npy", labels.astype(np.int32))
    write_points(folder / "labels.ply", scene["coord"], label_colours(labels, len(names)))
    panels: list[tuple[str, Any]] = [("labels", labels)]
    truth = scene.get("segment")
    if truth is not None and (truth >= 0).any() and truth.max() < len(names):
        panels.append(("truth", truth))
    save(folder / "picture.png", scene_sheet(scene, panels, names, cut_above))
