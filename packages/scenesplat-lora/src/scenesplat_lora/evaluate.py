"""`scenesplat-lora evaluate`: mIoU and mAcc of a base model, and of LoRA on it.

Prints both published definitions with the base beside the adapter, and writes `evaluation.json`
with the scores of every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.preflight import writable
from scenesplat_lora.model_options import Classes, ModelOptions

if TYPE_CHECKING:
    from torch import nn

    from scenesplat_lora.metrics import Confusion
    from scenesplat_lora.scenes.values import Layout

RESULTS = "evaluation.json"
TEXT = "Score semantic segmentation, zero-shot or of a trained head, of labelled scenes."
BACKGROUND = ("wall", "floor", "ceiling")


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `scenesplat-lora evaluate`."""

    data_root: str = option(MISSING, "Folder of the splits.", "data")
    split: list[str] = option(["val"], "Splits: folders of scenes in --data_root.", "data")
    points: Literal["auto", "gaussians", "cloud"] = option(
        "auto",
        "What is scored: labels of Gaussians, or the labelled point cloud of a scene (pc_coord, "
        "pc_segment), which auto takes where there is one.",
        "data",
    )
    excluded: list[str] = option(
        [], "Classes that are no foreground; default: those of wall, floor, ceiling.", "classes"
    )
    instance_vote: bool = option(
        False,
        "Each true instance gets its most frequent label, as the official tester does for scenes "
        "with instance.npy: it looks at the truth.",
        "classes",
    )
    compare_base: bool = option(True, "With --adapter: score the base model too.", "output")
    output: str = option("evaluation", "Folder for evaluation.json.", "output")
    overwrite: bool = option(False, "Replace an evaluation that is there.", "output")

    @property
    def models(self) -> list[str]:
        """Names of what is scored; LoRA first, since taking it off gives the base."""
        if not self.adapter:
            return ["model"]
        return ["LoRA", "base"] if self.compare_base and self.base_compares else ["LoRA"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="scenesplat-lora evaluate", description=TEXT)
    classes, scenes = ready(options)

    from lora_core.report import say
    from lora_core.tensor_file import write_json
    from scenesplat_lora.lora import remove_lora

    excluded = options.excluded or [name for name in BACKGROUND if name in classes.names]
    model = options.load()
    tables: dict[str, Confusion] = {}
    for name in options.models:
        if name == "base":
            remove_lora(model)
        tables[name] = score(model, name, scenes, classes, options)
    tables = {name: tables[name] for name in sorted(tables, reverse=True)}  # base first
    say(report(tables, excluded))
    if options.adapter and not options.base_compares:
        say("\nthe base has no such classes: it is not scored")
    file = Path(options.output) / RESULTS
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content(tables, excluded, scenes, options))
    say(f"-> {file.absolute()}")
    return 0


# -- before any weight is read ---------------------------------------------------------------------


def ready(options: Options) -> tuple[Classes, list[Path]]:
    """The classes and the scenes; refuses what can be known before the weights are read.

    Raises:
        ConfigError: folders, classes or a device that cannot work, or an evaluation that is there.
        DataError: faults in scenes or texts; of all scenes together.
        CheckpointError: no such base or adapter, as far as headers tell.
    """
    from lora_core.preflight import check_all
    from scenesplat_lora.scenes.files import list_scenes

    check_all(
        lambda: writable(options.output, "--output"),
        lambda: refuse_results(options),
        options.check_device,
        lambda: check_model(options),
    )
    classes = options.classes()
    scenes = list_scenes(options.data_root, options.split)
    check_scenes(scenes, classes, options)
    return classes, scenes


def refuse_results(options: Options) -> None:
    """An earlier evaluation stays.

    Raises:
        ConfigError: there is one.
    """
    file = Path(options.output) / RESULTS
    if file.exists() and not options.overwrite:
        raise ConfigError(
            f"--output: {one_line(file.absolute())} is there already: choose another folder, or "
            "add --overwrite"
        )


def check_model(options: Options) -> None:
    """Look at the model and its classes, and refuse --excluded that are none of them.

    Raises:
        ConfigError: with the nearest name. CheckpointError, DataError: see `glance`.
    """
    from scenesplat_lora.metrics import Confusion

    options.glance()
    Confusion(options.classes().names).foreground(options.excluded)


def check_scenes(scenes: Sequence[Path], classes: Classes, options: Options) -> None:
    """Read every scene wholly.

    Raises:
        DataError: what is wrong, of all scenes together.
    """
    from lora_core.report import say
    from lora_core.validate import validate
    from scenesplat_lora.scenes.values import LAYOUTS
    from scenesplat_lora.survey import array_files, limits, remarks

    layout, count = LAYOUTS[options.layout], len(classes.names)
    specs = [{"type": "GridSample", "grid_size": options.voxels()}]
    chosen: dict[str, Any] = {
        "points": options.points,
        "classes": count,
        "also": options.wanted,
        "specs": specs,
    }
    outcomes = validate(
        scenes,
        partial(_look, layout=layout, **chosen),
        kind=f"scenesplat evaluate 2 {options.layout} {chosen}",
        root=Path(options.data_root),
        files=array_files,
        what="scenes",
        limits=limits(scenes),
    )
    if problems := [line for o in outcomes for line in o.problem.splitlines()]:
        raise DataError(listing([*problems, "mend or remove these scenes"]))
    if not any(outcome.value["labelled"] for outcome in outcomes):
        raise DataError(f"{options.data_root}: no point has a label, so that nothing can be scored")
    for note in remarks({("", s.name): o.value for s, o in zip(scenes, outcomes, strict=True)}):
        say(f"note: {note}")


def _look(
    folder: Path,
    layout: Layout,
    points: str,
    classes: int,
    also: tuple[str, ...],
    specs: list[dict[str, Any]],
) -> dict[str, Any]:
    from scenesplat_lora.scenes.facts import scene_facts

    return scene_facts(folder, layout, (*wanted(folder, points), *also), classes, specs=specs)


def wanted(folder: Path, points: str) -> tuple[str, ...]:
    """What a scene must hold to be scored: its labelled cloud, or labels of Gaussians."""
    cloud = points == "cloud" or (points == "auto" and (folder / "pc_coord.npy").exists())
    return ("pc",) if cloud else ("segment",)


# -- measuring -------------------------------------------------------------------------------------


def score(
    model: nn.Module, name: str, scenes: Sequence[Path], classes: Classes, options: Options
) -> Confusion:
    """Label every scene and count true against predicted classes."""
    from lora_core.report import Progress
    from scenesplat_lora.metrics import Confusion

    table = Confusion(classes.names)
    with Progress(len(scenes)) as progress:
        progress.figures = {"scoring": name}
        for number, folder in enumerate(scenes, start=1):
            table.add(*truth_and_prediction(model, folder, classes, options))
            progress.update(number)
    return table


def truth_and_prediction(
    model: nn.Module, folder: Path, classes: Classes, options: Options
) -> tuple[Any, Any]:
    """True and predicted classes of a scene's labelled points, both integers [P]; -1: none."""
    from scenesplat_lora.labelling import label_scene
    from scenesplat_lora.language.zero_shot import instance_vote, vote
    from scenesplat_lora.scenes.files import read_scene
    from scenesplat_lora.scenes.values import LAYOUTS

    needed = wanted(folder, options.points)
    scene = read_scene(folder, LAYOUTS[options.layout], (*needed, *options.wanted))
    labels = label_scene(model, scene, classes.text, options.labelling())
    valid = scene.get("valid_feat_mask")
    valid = None if valid is None or not valid.any() else valid  # else nobody could vote
    if "pc" in needed:
        points, k = scene["pc_coord"], max(options.vote_k, 1)  # one: that of the nearest
        return scene["pc_segment"], vote(labels, scene["coord"], points, valid, k)
    if options.vote_k:
        labels = vote(labels, scene["coord"], None, valid, options.vote_k)
    if options.instance_vote:
        labels = instance_vote(labels, scene["instance"])
    return scene["segment"], labels


# -- telling ---------------------------------------------------------------------------------------


def report(tables: dict[str, Confusion], excluded: Sequence[str]) -> str:
    """Both definitions of the scores as tables, and the IoU of each class."""
    from lora_core.report import table
    from scenesplat_lora.metrics import class_scores, epoch_scores, final_scores

    parts = []
    for title, measure in (("tester", final_scores), ("evaluator", epoch_scores)):
        scores = {name: measure(counts, excluded) for name, counts in tables.items()}
        rows = [(key, *(s[key] for s in scores.values())) for key in next(iter(scores.values()))]
        parts.append(table((title, *tables), rows))
    classes = {name: class_scores(counts) for name, counts in tables.items()}
    first = next(iter(classes.values()))
    rows = [
        (name, first[name]["points"], *(c[name]["IoU"] for c in classes.values()))
        for name in first
        if first[name]["points"]
    ]
    parts.append(table(("class", "points", *(f"IoU {name}" for name in tables)), rows))
    return "\n\n".join(parts)


def content(
    tables: dict[str, Confusion], excluded: Sequence[str], scenes: Sequence[Path], options: Options
) -> dict[str, Any]:
    """What `evaluation.json` holds: settings, and of each model both scores and all classes."""
    from dataclasses import asdict

    from scenesplat_lora.metrics import class_scores, epoch_scores, final_scores

    return {
        "settings": asdict(options),
        "excluded": list(excluded),
        "scenes": [folder.name for folder in scenes],
        "models": {
            name: {
                "tester": final_scores(counts, excluded),
                "evaluator": epoch_scores(counts, excluded),
                "classes": {
                    label: {key: None if value != value else value for key, value in one.items()}
                    for label, one in class_scores(counts).items()
                },
            }
            for name, counts in tables.items()
        },
    }
