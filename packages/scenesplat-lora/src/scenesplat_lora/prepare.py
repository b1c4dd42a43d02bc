"""`scenesplat-lora prepare STEP`: your files to the folders that training reads.

    ply         3D Gaussian splat files -> scene folders
    text        class names -> text embeddings of SigLIP 2
    lang-feat   labels, or posed images with masks -> language features of every Gaussian
    chunk       large scenes -> overlapping chunks

Steps over scenes take --num_shards and --shard_id, can be stopped and started again, and keep a
manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from lora_core.config import option
from lora_core.errors import ConfigError, near
from lora_core.guards import count_problem
from lora_core.report import say
from scenesplat_lora.scenes.records import Shard

STEPS = {
    "ply": "3D Gaussian splat files to scene folders",
    "import": "ScanNet, ScanNet++ or Matterport3D as distributed to labelled scenes",
    "text": "class names to text embeddings of SigLIP 2",
    "lang-feat": "language features of Gaussians from labels, or from posed images with masks",
    "chunk": "large scenes to overlapping chunks",
}


@dataclass(kw_only=True)
class ShardOptions:
    """How a step is shared between processes."""

    num_shards: int = option(1, "Processes, here or on other machines, that share the work.", "run")
    shard_id: int = option(0, "Which of them this one is, from 0.", "run")
    overwrite: bool = option(
        False, "Make anew what was prepared with other settings or from other files.", "run"
    )

    def shard(self) -> Shard:
        """The part of the work that is this process's."""
        return Shard(self.shard_id, self.num_shards)

    def shard_problems(self) -> list[str]:
        """What is wrong with the values."""
        found = list(count_problem(self, "num_shards", 1))
        if not found and not 0 <= self.shard_id < self.num_shards:
            found.append(
                f"--shard_id is {self.shard_id} with --num_shards {self.num_shards}: it must be 0 "
                f"to {self.num_shards - 1}"
            )
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    words = list(argv or [])
    if not words or words[0] in ("-h", "--help"):
        say(usage())
        return 0
    step, *rest = words
    if step not in STEPS:
        hint = near(step, STEPS) or f"the steps are {', '.join(STEPS)}"
        raise ConfigError(f"scenesplat-lora prepare has no step {step!r}; {hint}")
    module = import_module(f"scenesplat_lora.prepare_{step.replace('-', '_')}")
    status: int = module.main(rest)
    return status


def usage() -> str:
    """What `prepare --help` prints."""
    listed = "\n".join(f"  {name:<10} {what}" for name, what in STEPS.items())
    return (
        f"usage: scenesplat-lora prepare STEP [options]\n\n{listed}\n\n"
        "`scenesplat-lora prepare STEP --help` lists a step's options with their defaults."
    )


def tell(step: str, done: int, before: int, place: object) -> None:
    """Say what a step did."""
    say(f"{step}: {done} scenes prepared, {before} were already -> {place}")
