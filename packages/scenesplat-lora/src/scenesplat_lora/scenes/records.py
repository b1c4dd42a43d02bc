"""What was prepared already: one small file per scene, and a manifest of them all.

    <folder>/.records/<step>/<scene>.json    settings, size of the source, what was made
    <folder>/manifest_<step>.json            all of them, sorted

Shards may run at once and in any order, be killed and be started again: a scene that has a record
is not made anew, one that was only begun is begun from nothing. What is made depends on settings
and source alone, so that the folder is the same in the end, byte for byte.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.data_file import read_json
from lora_core.errors import DataError, listing, one_line
from lora_core.report import Progress


@dataclass(frozen=True)
class Job:
    """A scene to prepare.

    Attributes:
        name: of the scene.
        files: what it is made from.
        place: folder that its outputs are made in.
        outputs: names there that can only be this job's outputs, whole or unfinished.
    """

    name: str
    files: tuple[Path, ...]
    place: Path
    outputs: re.Pattern[str]

    def sizes(self) -> dict[str, int]:
        """Bytes of each source file, by its name."""
        return {file.name: file.stat().st_size for file in sorted(self.files)}

    def made(self) -> list[Path]:
        """Outputs that are there."""
        if not self.place.is_dir():
            return []
        return sorted(p for p in self.place.iterdir() if self.outputs.fullmatch(p.name))


def unfinished(name: str) -> str:
    """Pattern of the names under which `write_scene` has a folder until it is whole."""
    return rf"\.{name}\.\d+"


@dataclass(frozen=True)
class Shard:
    """One part of a work that several processes share: scenes `number`, `number` + `count`, ..."""

    number: int = 0
    count: int = 1

    def of(self, jobs: Sequence[Job]) -> list[Job]:
        """This part of all jobs, which must be the same list for every part."""
        return list(jobs[self.number :: self.count])


@dataclass(frozen=True)
class Ledger:
    """Records of one step of preparing, in one folder.

    Attributes:
        step: such as "chunk". settings: all that outputs depend on besides the source.
    """

    folder: Path
    step: str
    settings: Mapping[str, Any]

    @property
    def manifest(self) -> Path:
        """The file with all records."""
        return self.folder / f"manifest_{self.step}.json"

    def record(self, job: Job) -> Path:
        """The file of a scene that was prepared."""
        return self.folder / ".records" / self.step / f"{job.name}.json"

    def begun(self, job: Job) -> Path:
        """The file of a scene that is being prepared, or whose process was killed."""
        return self.folder / ".records" / self.step / f"{job.name}.begun"

    def facts(self, job: Job) -> dict[str, Any]:
        """What outputs of a scene depend on."""
        return {"settings": dict(self.settings), "source": job.sizes()}

    def open_jobs(self, jobs: Sequence[Job], overwrite: bool) -> list[Job]:
        """The jobs that are still to be done.

        Raises:
            DataError: outputs made with other settings or from other files, without `overwrite`,
                or outputs that were not made here; of all jobs together.
        """
        still, problems = [], []
        for job in jobs:
            record = self.record(job)
            if record.exists():
                held = read_json(record)
                held = held if isinstance(held, dict) else {}  # of someone else: made anew
                same = {name: held.get(name) for name in ("settings", "source")} == self.facts(job)
                if same and job.made():
                    self.begun(job).unlink(missing_ok=True)  # killed after the last step but one
                    continue
                if not same and not overwrite:
                    problems.append(
                        f"{one_line(job.name)}: prepared with other settings or from other files: "
                        "add --overwrite, or choose another output"
                    )
            elif not self.begun(job).exists() and (there := job.made()):
                problems.append(
                    f"{one_line(there[0].absolute())}: is there already and was not made here: "
                    "move it away, or choose another output"
                )
            still.append(job)
        if problems:
            raise DataError(listing(problems))
        return still

    def run(self, job: Job, work: Callable[[Job], Mapping[str, Any]]) -> None:
        """Remove what an earlier attempt left, do the work, and write its record.

        Raises:
            DataError: whatever the work raises; nothing of the scene is left then.
        """
        write_json_in(self.begun(job), {})
        self.record(job).unlink(missing_ok=True)
        _remove(job.made())
        try:
            made = work(job)
        except DataError:
            _remove(job.made())
            self.begun(job).unlink()
            raise
        write_json_in(self.record(job), self.facts(job) | {"made": dict(made)})
        self.begun(job).unlink()

    def write_manifest(self) -> int:
        """Write all records as one file; gives their number.

        Other shards may be writing it: the one that ends last has seen all records, and who is
        overtaken while writing looks again.
        """
        folder = self.folder / ".records" / self.step
        while True:
            names = _names(folder)
            scenes = {name: read_json(folder / f"{name}.json") for name in names}
            write_json_in(self.manifest, {"step": self.step, "scenes": scenes})
            if _names(folder) == names:
                return len(names)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(p.stem for p in folder.iterdir() if p.suffix == ".json" and p.name[0] != ".")


def write_json_in(path: Path, content: object) -> None:
    """Write JSON whole or not at all, in a folder that is made where it is missing."""
    from lora_core.tensor_file import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_all(
    ledger: Ledger,
    jobs: Sequence[Job],
    shard: Shard,
    work: Callable[[Job], Mapping[str, Any]],
    overwrite: bool = False,
) -> tuple[int, int]:
    """Do one shard of the jobs, and write the manifest; gives jobs done, and done before.

    Raises:
        DataError: scenes that cannot be prepared, all together, when the others are done.
    """
    from lora_core.tensor_file import remove_partial

    mine = shard.of(jobs)
    if not mine:
        return 0, 0
    still = ledger.open_jobs(mine, overwrite)
    problems = []
    with Progress(len(still)) as progress:
        progress.figures = {"preparing": ledger.step}
        for number, job in enumerate(still, start=1):
            try:
                ledger.run(job, work)
            except DataError as error:
                problems.append(str(error))
            progress.update(number)
    ledger.write_manifest()
    for folder in {ledger.folder, ledger.record(mine[0]).parent, *(j.place for j in mine)}:
        remove_partial(folder)
    if problems:
        raise DataError(listing(problems))
    return len(still), len(mine) - len(still)
