"""`midi3d-lora evaluate`: how near generated scenes are to the true ones, base beside LoRA.

Every scene starts from noise of its own that is the same for all models, so that models differ by
what they make of it. Scores of a scene are kept when it is done: a stopped evaluation goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.guards import count_problem, unnamed
from lora_core.preflight import check_all, writable
from midi3d_lora.model_options import ModelOptions

if TYPE_CHECKING:
    from midi3d_lora.scene_scores import Scores
    from midi3d_lora.scenes.scene_folders import SceneSettings

RESULTS = "evaluation.json"
TEXT = "Generate the scenes of a data folder and score them against the true surfaces."


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `midi3d-lora evaluate`."""

    data_dir: str = option(MISSING, "Folder of scenes, as for training.", "data")
    max_scenes: int | None = option(None, "Only the first ones, by name; null: all.", "data")
    image_size: int = option(512, "Pixels of the square pictures, as in training.", "data")
    num_points: int = option(20480, "Points that are compared, of each instance.", "data")
    normalize: bool = option(
        False, "Bring points outside of [-1, 1] into it, a scene as a whole.", "data"
    )
    max_instances: int = option(32, "Of a scene.", "data")
    tau: float = option(0.1, "F-score: distance at which a point is met, in scene units.", "scores")
    compare_base: bool = option(True, "With --lora_path: score the base model too.", "scores")
    merged_model: str | None = option(
        None, "Folder of a merged model, which is scored besides.", "scores"
    )
    save_meshes: bool = option(False, "Keep the scenes as <output>/<model>/<scene>.glb.", "output")
    output: str = option("evaluation", "Folder for evaluation.json.", "output")
    overwrite: bool = option(False, "Replace an evaluation that is there.", "output")

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = super().problems()
        found += unnamed(self, ("data_dir", "merged_model", "output"))
        for name in ("image_size", "num_points", "max_instances"):
            found += count_problem(self, name, 14 if name == "image_size" else 1)
        if self.max_scenes is not None:
            found += count_problem(self, "max_scenes", 1)
        if not 0 < self.tau < 10:
            found.append(f"--tau is {self.tau}: it must be scene units above 0")
        return found

    @property
    def models(self) -> list[str]:
        """Names of what is scored; LoRA first, since taking it off gives the base."""
        own = ["LoRA"] if self.lora_path else ["model"]
        base = ["base"] if self.lora_path and self.compare_base else []
        return own + base + (["merged"] if self.merged_model else [])

    def reading(self) -> SceneSettings:
        """How scenes are read."""
        from midi3d_lora.scenes.scene_folders import SceneSettings

        return SceneSettings(self.image_size, self.num_points, self.normalize, self.max_instances)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="midi3d-lora evaluate", description=TEXT)
    folders = ready(options)

    from lora_core.report import say
    from lora_core.tensor_file import write_json
    from midi3d_lora.scene_scores import score_models

    scores = score_models(folders, options)
    say(report(scores))
    file = Path(options.output) / RESULTS
    write_json(file, content(scores, options))
    say(f"-> {file.absolute()}")
    return 0


# -- before any weight is read ---------------------------------------------------------------------


def ready(options: Options) -> list[Path]:
    """The scenes; refuses what can be known before the weights are read.

    Raises:
        ConfigError: folders or a device that cannot work, or an evaluation that is there.
        DataError: what is wrong with the scenes, of all together.
        CheckpointError: no such model or adapter, as far as headers tell.
    """
    from midi3d_lora import official

    check_all(
        lambda: writable(options.output, "--output"),
        lambda: refuse_results(options),
        options.check_device,
        options.glance,
        lambda: options.merged_model and official.find_model(options.merged_model),
    )
    return checked_scenes(options)


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


def checked_scenes(options: Options) -> list[Path]:
    """The folders of the scenes, each looked at wholly.

    Raises:
        DataError: what is wrong, of all scenes together.
        ConfigError: multi-instance blocks that cannot be.
    """
    from lora_core.report import say
    from midi3d_lora.scenes.scene_folders import list_scenes, look_at, remarks

    folders = list_scenes(options.data_dir)[: options.max_scenes]
    outcomes = look_at(folders, options.reading(), Path(options.data_dir))
    if problems := [line for one in outcomes for line in one.problem.splitlines()]:
        raise DataError(listing([*problems, "mend or remove these scenes"]))
    options.check_blocks(max(len(one.value["labels"]) for one in outcomes))
    facts = {folder.name: one.value for folder, one in zip(folders, outcomes, strict=True)}
    for note in remarks(facts):
        say(f"note: {note}")
    return folders


# -- telling ---------------------------------------------------------------------------------------


def report(scores: Mapping[str, Scores]) -> str:
    """The mean of every score over the scenes, a column for each model."""
    from lora_core.report import table
    from midi3d_lora.meshes.metrics import mean_scores

    means = {name: mean_scores(list(scenes.values())) for name, scenes in scores.items()}
    rows = [(key, *(one[key] for one in means.values())) for key in next(iter(means.values()))]
    return table(("mean over scenes", *means), rows)


def content(scores: Mapping[str, Scores], options: Options) -> dict[str, Any]:
    """What `evaluation.json` holds: settings, and of each model the means and every scene."""
    from midi3d_lora.meshes.metrics import mean_scores
    from midi3d_lora.scene_scores import plain

    return {
        "settings": asdict(options),
        "multi_instance_blocks": options.blocks,
        "models": {
            name: {
                "mean": plain(mean_scores(list(scenes.values()))),
                "scenes": {scene: plain(one) for scene, one in scenes.items()},
            }
            for name, scenes in scores.items()
        },
    }
