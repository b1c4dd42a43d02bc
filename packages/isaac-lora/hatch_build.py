"""Let `pip install ./packages/<package>` find lora-core beside it, without touching releases.

A wheel built inside the repository points at the sibling folder; one built from the sdist (as
`python -m build` does, and so every release) keeps the ordinary requirement.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SiblingCore(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        core = Path(self.root).resolve().parent / "lora-core"
        if version != "standard" or not (core / "pyproject.toml").is_file():
            return
        # In place: the list is what the builder writes; replacing it would change nothing.
        requirements = self.metadata.core.dependencies
        for position, requirement in enumerate(requirements):
            if requirement.startswith("lora-core"):
                extras = requirement[len("lora-core") :].partition("]")[0]
                extras = f"{extras}]" if extras.startswith("[") else ""
                requirements[position] = f"lora-core{extras} @ {core.as_uri()}"
