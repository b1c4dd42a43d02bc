"""Training checkpoints: everything that an exact continuation needs, and nothing of the base.

`run/checkpoint-<step>/` holds `adapter/` (for people and PEFT), `state.safetensors` (all tensors),
`state.json` (all else), transformers' `trainer_state.json`, and `manifest.json`, written last. A
checkpoint is made in a hidden, private sibling, flushed to the disk, and then renamed: whenever the
process or the machine dies, the checkpoints before are untouched, and the new one is there whole or
not at all. Nothing is deleted but what this module made; links are never followed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_core.checkpoint.folders import (
    LEFT,
    MARK,
    NAME,
    NEW,
    OLD,
    aside,
    delete,
    empty,
    folder,
    hidden,
    is_ours,
    publish,
    workspace,
)
from lora_core.checkpoint.manifest_file import FORMAT, MANIFEST, Damaged, trust, verify
from lora_core.checkpoint.manifest_file import read as read_manifest
from lora_core.checkpoint.manifest_file import write as write_manifest
from lora_core.checkpoint.state import (
    from_json,
    load_optimizer_state,
    load_schedule,
    load_tensors,
    optimizer_state,
    pack,
    random_state,
    set_random_state,
    tensors,
    to_json,
    unpack,
)
from lora_core.errors import CheckpointError, ConfigError
from lora_core.report import say
from lora_core.run_lock import InUse, hold, lock
from lora_core.tensor_file import (
    read_safetensors,
    read_torch,
    remove_partial,
    safetensors_bytes,
    sync_folder,
)

__all__ = [
    "clean",
    "folder",
    "latest",
    "load",
    "load_optimizer_state",
    "load_schedule",
    "load_tensors",
    "lock",
    "manifest",
    "optimizer_state",
    "prune",
    "random_state",
    "save",
    "set_aside",
    "set_random_state",
    "steps",
    "tensors",
]

VALUES, TENSORS = "state.json", "state.safetensors"
FORMAT_1 = "state.pt"  # the whole state, where format 1 had it


# -- finding ---------------------------------------------------------------------------------------


def steps(run: str | Path) -> list[int]:
    """List the steps of the checkpoints in a run's folder in ascending order, as they say."""
    return sorted({step for step, _ in _found(run)})


def latest(run: str | Path) -> Path:
    """Give the checkpoint with the highest step, by what its manifest says, that is whole.

    First it puts right what a killed process left. Every damaged one is said and left out.

    Raises:
        CheckpointError: there is none; or one was written by a later program, which may be newer
            than those that can be read.
    """
    clean(run)
    found = sorted(_found(run), reverse=True)
    for _, path in found:
        try:
            _check(path)
        except Damaged as error:
            say(f"left out: {error}")
        else:
            return path
    if found:
        raise CheckpointError(
            f"{Path(run).absolute()}: none of its {len(found)} training checkpoints is whole. "
            "Start anew, or continue with the weights of an adapter file"
        )
    raise CheckpointError(
        f"{Path(run).absolute()} holds no training checkpoint to resume: it was stopped before its "
        "first one. Start it anew, with --overwrite"
    )


def _found(run: str | Path) -> Iterator[tuple[int, Path]]:
    """Every folder named as a checkpoint that looks like ours, with its step."""
    for path in Path(run).iterdir() if Path(run).is_dir() else ():
        match = NAME.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir():
            continue
        if any((path / name).is_file() for name in (MANIFEST, VALUES, FORMAT_1)):
            try:
                yield read_manifest(path)["step"], path
            except CheckpointError:  # whoever loads it gets the reason
                yield int(match[1]), path


def manifest(path: str | Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself, without reading its tensors.

    Returns:
        format, step, versions, config, fingerprints, world, files; of format 1, which had no
        manifest, format and step only, and the rest empty.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of a later program.
    """
    path = Path(path)
    if _is_format_1(path):
        unknown = ("versions", "config", "fingerprints", "world", "files")
        step = _read_format_1(path)["step"]
        return {"format": 1, "step": step, **{key: {} for key in unknown}}
    _insist(path)
    return read_manifest(path)


def _insist(path: Path) -> None:
    if not path.is_dir() or not any((path / name).exists() for name in (MANIFEST, VALUES, TENSORS)):
        why = "has no " + MANIFEST if path.is_dir() else "does not exist"
        raise CheckpointError(f"no training checkpoint: {path.absolute()} {why}")


# -- reading ---------------------------------------------------------------------------------------


def load(path: str | Path) -> dict[str, Any]:
    """Read the state of a checkpoint folder, all files checked; tensors come to the CPU.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of a later program.
    """
    path = Path(path)
    if _is_format_1(path):
        return _read_format_1(path)
    _insist(path)
    try:
        step = _check(path)
        values = from_json((path / VALUES).read_bytes())
        store, _ = read_safetensors(path / TENSORS)
        state = unpack(values, store)
        return {"format": FORMAT, "step": step, **state}
    except Damaged as error:
        raise Damaged(
            f"{error}\nResume the run itself, which takes its last whole checkpoint, or copy this "
            "one again"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise Damaged(f"{path.absolute()} does not hold a state: {error!r}") from error


def _check(path: Path) -> int:
    """Give the step of a checkpoint, if it is whole."""
    if _is_format_1(path):
        return int(_read_format_1(path)["step"])
    content = verify(path)
    missing = [name for name in (VALUES, TENSORS) if name not in content["files"]]
    if missing:
        raise Damaged(f"{path.absolute()} holds no state: its manifest has no {missing[0]}")
    return int(content["step"])


def _is_format_1(path: Path) -> bool:
    return (path / FORMAT_1).is_file() and not (path / MANIFEST).exists()


def _read_format_1(path: Path) -> dict[str, Any]:
    """Read a checkpoint of the first format; it had the same state in one file of torch's."""
    file = path / FORMAT_1
    try:
        state = read_torch(file)
    except CheckpointError as error:
        raise Damaged(str(error)) from error
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is int and version != 1:
        raise CheckpointError(
            f"{file.absolute()} was written by format {version}, this program reads up to {FORMAT}:"
            " update lora-core"
        )
    if type(version) is not int or type(state.get("step")) is not int:
        raise Damaged(f"{file.absolute()} is no training checkpoint of lora-core")
    return {**state, "format": FORMAT}


# -- writing ---------------------------------------------------------------------------------------


def save(
    run: str | Path,
    step: int,
    state: Mapping[str, Any],
    fill: Callable[[Path], object],
    record: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the checkpoint of `step`, complete or not at all; it replaces one of the same step.

    Args:
        state: tensors, plain values, and dicts, lists and tuples of them.
        fill: writes the other files into the folder it is given.
        record: what the manifest says besides: config, fingerprints, world; plain values.

    Raises:
        CheckpointError: it cannot be written: then `__cause__` is the system's error, what was
            begun is removed, and the checkpoints before are as they were. Or the state holds
            something else than tensors and plain values.
    """
    final = folder(run, step)
    try:
        with workspace(final) as space:
            new = space / NEW
            new.mkdir()
            fill(new)
            values, store = pack(dict(state))
            for name, data in (
                (VALUES, to_json(values)),
                (TENSORS, safetensors_bytes(store, {"format": "pt"})),
            ):
                with open(new / name, "xb") as file:
                    file.write(data)
            write_manifest(new, step, record)
            set_aside(run, step)
            publish(new, final, space / OLD)
    except (OSError, RuntimeError, CheckpointError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise CheckpointError(
            f"cannot save {final.absolute()}: {cause.strerror or cause}"
        ) from cause
    trust(final)
    return final


def _system_error(error: Exception) -> OSError | None:
    """The OSError behind an error; torch.save hides it behind a RuntimeError of its own."""
    cause = error.__context__ if isinstance(error, RuntimeError) else error.__cause__
    return next((e for e in (error, cause) if isinstance(e, OSError)), None)


def set_aside(run: str | Path, step: int) -> None:
    """Rename the checkpoints after `step`: a run that goes on from there makes others.

    Otherwise they would count as its latest. Nothing is deleted.
    """
    for later, path in sorted(_found(run), reverse=True):
        if later > step:
            say(f"{path.absolute()} is of another course than step {step}: now {aside(path)}")


# -- deleting --------------------------------------------------------------------------------------


def prune(run: str | Path, keep_last: int, referenced: Collection[int]) -> None:
    """Delete the checkpoints before the last `keep_last` whole ones, but not the `referenced`.

    What is not ours stays: other folders, copies under another name, checkpoints of format 1, and
    those in which somebody put a file.

    Raises:
        ConfigError: `keep_last` is below 1.
    """
    if keep_last < 1:
        raise ConfigError(f"{keep_last} checkpoints to keep: it must be at least 1")
    kept, surplus = 0, []
    for step, path in sorted(_found(run), reverse=True):
        if kept < keep_last:
            kept += _is_whole(path)
        elif step not in referenced and is_ours(path):
            surplus.append(path)
    if not surplus:
        return
    try:
        gone = {path: hidden(path, "gone") for path in surplus}
        for path, place in gone.items():
            os.rename(path, place)  # at once: no half checkpoint under its name
        sync_folder(Path(run))
        for place in gone.values():
            delete(place)
    except OSError as error:
        say(f"cannot delete old checkpoints in {Path(run).absolute()}: {error.strerror}")


def clean(run: str | Path) -> None:
    """Put right what killed processes left in a run's folder.

    A save that was complete but for its name gets it; everything else half-made of ours is deleted.
    What a process that is alive works on is left alone.
    """
    if not Path(run).is_dir():
        return
    for path in sorted(Path(run).iterdir()):
        match = LEFT.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            with suppress(OSError, InUse):  # a disk that cannot be written can still be read
                _clean(path, path.with_name(match["final"]), match["kind"])
    with suppress(OSError):
        remove_partial(Path(run))


def _clean(left: Path, final: Path, kind: str) -> None:
    if kind == "gone":
        delete(left)
    elif (left / MARK).is_file():
        with hold(left / MARK):
            _finish(left, final)
            empty(left, MARK)
        left.rmdir()
    else:
        left.rmdir()  # killed before it had its mark, or after all was done


def _finish(space: Path, final: Path) -> None:
    """End a replacement that was interrupted between its two renames."""
    for name in (NEW, OLD):
        if not os.path.lexists(final) and _is_whole(space / name):
            os.rename(space / name, final)
            sync_folder(final.parent)
            say(f"{final.absolute()}: its saving was interrupted at the end and is now complete")


def _is_whole(path: Path) -> bool:
    try:
        _check(path)
    except CheckpointError:
        return False
    return True
