"""Preparing many scenes: in parallel, once, atomically, and by several processes if need be.

Every scene is a folder that appears whole, with a record of what it was made from in it. A scene
whose record says the same as would be written now is not made again, so that a run may be stopped
and started anew, or be shared between machines as shards, in any order. What is made depends on
source, settings and name alone: the folder is the same in the end, byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core import shielded
from lora_core.errors import DataError, listing, one_line
from lora_core.report import Progress, plural, say
from lora_core.run_lock import InUse, hold
from midi3d_lora.scenes.dataset_info import extents, remember_failures, write_info
from midi3d_lora.scenes.prepared_scene import PreparedScene, record_of, write_files
from midi3d_lora.scenes.scene_folders import SceneSettings, remarks, scene_facts

SECONDS = 3600.0  # that one scene may take
PATIENCE = 0.5  # seconds between looks at what another process is making


@dataclass(frozen=True)
class Source:
    """What a scene is made from.

    Attributes:
        name: of the scene, and of its folder.
        files: all that the scene depends on.
        root: folder below which records name them.
        place: what messages call it by.
    """

    name: str
    files: tuple[Path, ...]
    root: Path
    place: Path

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path below `root`."""
        found = {}
        for file in sorted(self.files):
            with contextlib.suppress(OSError):  # the builder will say so
                found[Path(os.path.relpath(file, self.root)).as_posix()] = file.stat().st_size
        return found


@dataclass(frozen=True)
class Work:
    """How scenes are made, and where.

    Attributes:
        output: folder of the scenes.
        build: makes one; raises DataError with everything that is wrong with its source.
        settings: all that scenes depend on besides their source, plain values.
        reading: what the scenes must be good for.
    """

    output: Path
    build: Callable[[Source], PreparedScene]
    settings: Mapping[str, Any]
    reading: SceneSettings

    def origin(self, source: Source) -> dict[str, Any]:
        """By what a scene's record is known again."""
        return {"settings": dict(self.settings), "source": source.sizes()}


# -- what is there ---------------------------------------------------------------------------------


def is_made(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether a scene is there, whole, and as it would be made now."""
    held = record_of(folder)
    files = held.get("files")
    if any(held.get(key) != value for key, value in origin.items()) or not isinstance(files, dict):
        return False
    with contextlib.suppress(OSError):
        return all((folder / name).stat().st_size == size for name, size in files.items())
    return False


def is_foreign(folder: Path) -> bool:
    """Whether something is there that was not made here.

    Asked twice, and for the folder first: another process may be making or replacing it.
    """
    return all(os.path.lexists(folder) and not record_of(folder) for _ in range(2))


def still_to_make(work: Work, sources: Sequence[Source], overwrite: bool) -> list[Source]:
    """Those scenes that are not there yet.

    Raises:
        DataError: folders that were not made here, or were made with other settings or from other
            files and `overwrite` is not said; all of them.
    """
    still, problems = [], []
    for source in sources:
        folder, origin = work.output / source.name, work.origin(source)
        if is_made(folder, origin):
            continue
        held = record_of(folder)
        place = one_line(folder.absolute())
        if is_foreign(folder):
            problems.append(
                f"{place}: is there already and was not made here: move it away, or choose another "
                "--output_dir"
            )
        elif held and not overwrite and any(held.get(key) != origin[key] for key in origin):
            problems.append(
                f"{place}: was prepared with other settings or from other files: add --overwrite, "
                "or choose another --output_dir"
            )
        still.append(source)
    if problems:
        raise DataError(listing(problems))
    return still


# -- one scene -------------------------------------------------------------------------------------


def make(work: Work, source: Source) -> dict[str, Any]:
    """Make a scene unless it is there meanwhile, or another process makes it; gives its notes.

    Raises:
        DataError: everything that is wrong with it.
    """
    folder, origin = work.output / source.name, work.origin(source)
    try:
        with hold(_beside(folder, "lock")):
            _sweep(folder)
            if is_made(folder, origin):
                return {"notes": []}
            scene = work.build(source)
            with _new_folder(folder) as tree:
                write_files(tree, scene, origin)
                try:
                    scene_facts(tree, work.reading)
                except DataError as error:
                    text = str(error).replace(one_line(tree), one_line(source.place))
                    raise DataError(text) from None
            return {"notes": list(scene.notes)}
    except InUse:
        return {"notes": [], "busy": True}
    except OSError as error:
        place = one_line(error.filename or folder)
        raise DataError(f"{place}: cannot be written: {error.strerror or error}") from None


def _beside(folder: Path, kind: str) -> Path:
    """A hidden sibling of a scene's folder, which belongs to whoever holds its lock."""
    return folder.with_name(f".{folder.name}.{kind}")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """The path of a folder to make, which becomes `folder` if the block ends without error."""
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Put away what an attempt has left of a scene; an older one that it had moved comes back."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for path in (_beside(folder, "partial"), old):
        shutil.rmtree(path, ignore_errors=True)


# -- all scenes ------------------------------------------------------------------------------------


def run_all(
    work: Work,
    sources: Sequence[Source],
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Make those scenes of a shard that are not there yet; describe all in a file and a picture.

    Args:
        sources: all of them, in the same order for every shard.
        shard: number and count; scenes `number`, `number` + `count`, ... are made.

    Raises:
        DataError: the scenes that cannot be prepared, when the others are done.
    """
    _refuse_twins(sources)
    mine = sources[shard[0] :: shard[1]]
    work.output.mkdir(parents=True, exist_ok=True)
    still = still_to_make(work, mine, overwrite)
    try:
        problems, notes = _all_made(work, still, workers)
    finally:
        for source in mine:
            _tidy(work.output / source.name)
    remember_failures(work.output, problems, [source.name for source in mine])
    info = write_info(work.output, notes)
    for line in [*remarks(notes), *extents(info)]:
        say(line)
    say(
        f"{len(notes)} scenes prepared, {len(mine) - len(still)} were there, {len(problems)} "
        f"failed; {info['counts']['scenes']} in all -> {one_line(work.output.absolute())}; "
        "dataset_preview.png shows the first"
    )
    if problems:
        raise DataError(listing([problems[name] for name in sorted(problems)]))


def _all_made(
    work: Work, sources: Sequence[Source], workers: int | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Make scenes; gives the problems of some and the notes of the others, by name.

    Scenes that another process is at are waited for: it may be stopped, or of a killed run.
    """
    problems: dict[str, str] = {}
    notes: dict[str, Any] = {}
    todo = list(sources)
    while todo:
        busy = []
        for source, outcome in _made(work, todo, workers):
            if outcome.problem:
                problems[source.name] = outcome.problem
            elif "busy" in outcome.value:
                busy.append(source)
            else:
                notes[source.name] = outcome.value
        if busy and len(busy) == len(todo):
            time.sleep(PATIENCE)
        todo = busy
    return problems, {name: notes[name] for name in sorted(notes)}  # not in the order of workers


def _refuse_twins(sources: Sequence[Source]) -> None:
    names: dict[str, Source] = {}
    problems = []
    for source in sources:
        other = names.setdefault(source.name, source)
        if other is not source:
            problems.append(
                f"{one_line(other.place)} and {one_line(source.place)} would both make the scene "
                f"{one_line(source.name)}: rename one"
            )
    if problems:
        raise DataError(listing(problems))


def _made(
    work: Work, sources: Sequence[Source], workers: int | None
) -> Iterator[tuple[Source, shielded.Outcome]]:
    """Each source with the notes or the problem of its scene, as they come."""
    limits = shielded.Limits(SECONDS, _memory())
    answers = shielded.each(
        lambda index: make(work, sources[index]),
        len(sources),
        name=lambda index: one_line(sources[index].place),
        limits=limits,
        workers=workers,
        worth=1,
    )
    # Closed by name: after Ctrl-C the traceback would keep the workers alive.
    with Progress(len(sources)) as progress, contextlib.closing(answers) as told:
        progress.figures = {"preparing": plural(len(sources), "scene")}
        for done, (index, outcome) in enumerate(told, start=1):
            yield sources[index], outcome
            progress.update(done)


def _memory() -> int:
    """Bytes of the machine: what takes more would only swap."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return shielded.LIMITS.memory


def _tidy(folder: Path) -> None:
    """Remove what a worker has left that crashed, or was killed, at this scene."""
    lock = _beside(folder, "lock")
    if lock.exists():
        with contextlib.suppress(InUse, OSError), hold(lock):
            _sweep(folder)
