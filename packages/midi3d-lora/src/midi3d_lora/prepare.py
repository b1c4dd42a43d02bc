"""`midi3d-lora prepare`: meshes and scene files to the scene folders that training reads.

    prepare --input_dir raw --output_dir data/training_data     folders of meshes
    prepare 3d-front --source data/3d-front --output_dir ...    rooms of 3D-FRONT
    prepare objaverse --source ~/.objaverse --output_dir ...    objects of Objaverse

All steps take --num_shards and --shard_id, can be stopped and started again, and describe what they
made in dataset_info.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from dataclasses import MISSING, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_core.config import option
from lora_core.errors import ConfigError, DataError, listing, near
from lora_core.guards import count_problem, unnamed
from lora_core.preflight import check_all, writable
from midi3d_lora.meshes.mesh_loading import library
from midi3d_lora.sources.prepare_meshes import Drawing

if TYPE_CHECKING:
    from midi3d_lora.scenes.scene_folders import SceneSettings

VERSION = 1  # of what is made of a source; another one makes all scenes anew
STEPS = {
    "meshes": ("prepare_folders", "folders of meshes"),
    "3d-front": ("prepare_3d_front", "rooms of 3D-FRONT"),
    "objaverse": ("prepare_objaverse", "objects of Objaverse"),
}


@dataclass(kw_only=True)
class SceneOptions:
    """Settings of all steps.

    Raises:
        ConfigError: values that cannot work, all of them.
    """

    output_dir: str = option(MISSING, "Folder for the scenes.", "data")
    num_samples: int = option(20480, "Points drawn on the surface of each instance.", "scenes")
    image_size: int = option(512, "Pixels of the square pictures.", "scenes")
    normalize: bool = option(
        True,
        "Centre each scene and scale it to 0.95 as a whole, by one transform for all its "
        "instances; off: refuse scenes that reach beyond [-1.05, 1.05].",
        "scenes",
    )
    yaw: float = option(0.0, "Degrees by which scenes are turned around the up axis.", "scenes")
    max_instances: int = option(32, "Of a scene; more look like a mistake.", "scenes")
    seed: int = option(42, "Another seed draws other points.", "scenes")
    num_workers: int = option(0, "Processes at work; 0: one for each CPU.", "run")
    num_shards: int = option(1, "Runs, here or on other machines, that share the work.", "run")
    shard_id: int = option(0, "Which of them this one is, from 0.", "run")
    overwrite: bool = option(
        False, "Make anew what was prepared with other settings or from other files.", "run"
    )

    def __post_init__(self) -> None:
        found = list(self.problems())
        if found:
            raise ConfigError(listing(found))

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line; a step adds its own."""
        yield from unnamed(self, ("output_dir",))
        yield from count_problem(self, "num_samples", 64)
        yield from count_problem(self, "image_size", 14)
        if self.image_size > 8192:
            yield f"--image_size is {self.image_size}: at most 8192 pixels are drawn"
        yield from count_problem(self, "max_instances", 1)
        yield from count_problem(self, "seed", 0)
        yield from count_problem(self, "num_workers", 0)
        if not math.isfinite(self.yaw):
            yield f"--yaw is {self.yaw}: it must be degrees"
        shards = list(count_problem(self, "num_shards", 1))
        yield from shards
        if not shards and not 0 <= self.shard_id < self.num_shards:
            yield (
                f"--shard_id is {self.shard_id} with --num_shards {self.num_shards}: it must be 0 "
                f"to {self.num_shards - 1}"
            )

    def shard(self) -> tuple[int, int]:
        """Number and count."""
        return self.shard_id, self.num_shards

    def reading(self) -> SceneSettings:
        """How training will read the scenes."""
        from midi3d_lora.scenes.scene_folders import SceneSettings

        return SceneSettings(self.image_size, self.num_samples, False, self.max_instances)

    def drawing(self) -> Drawing:
        """How points and pictures are made."""
        return Drawing(self.seed, self.num_samples, self.image_size)

    def made_with(self, step: str, *names: str) -> dict[str, Any]:
        """The settings that scenes depend on, for their records."""
        common = ("num_samples", "image_size", "normalize", "yaw", "seed")
        values = {name: getattr(self, name) for name in (*common, *names)}
        return {"step": step, "version": VERSION, **values}

    def begin(self) -> Path:
        """The output folder, which can be written to.

        Raises:
            ConfigError: it cannot, or meshes cannot be read.
        """
        check_all(lambda: writable(self.output_dir, "--output_dir"), library)
        return Path(self.output_dir)


Up = Literal["y", "z"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    words = list(argv or [])
    step = "meshes" if not words or words[0].startswith("-") else words.pop(0)
    if step not in STEPS:
        hint = near(step, STEPS) or f"the steps are {', '.join(STEPS)}"
        raise ConfigError(f"midi3d-lora prepare has no step {step!r}; {hint}")
    module = import_module(f"midi3d_lora.{STEPS[step][0]}")
    status: int = module.main(words)
    return status


def steps_text() -> str:
    """The steps there are, for the page of `prepare --help`."""
    others = [f"`prepare {name}` {what}" for name, (_, what) in STEPS.items() if name != "meshes"]
    return f"Other steps: {'; '.join(others)}; each has a --help."


def refuse_many(instances: Sized, most: int) -> None:
    """Refuse a scene of more instances than can be meant.

    Raises:
        DataError: with their number.
    """
    if len(instances) > most:
        raise DataError(
            f"{len(instances)} instances, expected at most {most}: if the parts of an object were "
            "taken for instances, join them; else raise --max_instances"
        )


def require(sources: Sized, problem: str) -> None:
    """Refuse to go on with nothing.

    Raises:
        DataError: `problem`, if there are no sources.
    """
    if not sources:
        raise DataError(problem)
