"""What is looked at before a run reads data or weights: library versions, and folders to write to.

Nothing here imports torch by itself.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.errors import ConfigError, UserError, listing, printable

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_NAME_LIMIT = 255  # bytes, of ext4, xfs, btrfs, apfs and ntfs alike
_PATH_LIMIT = 4096 - 256  # bytes; the rest is for the names that a run makes


def check_all(*checks: Callable[[], object]) -> None:
    """Make all checks, and report what they find in one message.

    Raises:
        UserError: of the kind of the first that failed.
    """
    found: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise type(found[0])(listing([str(error) for error in found])) from found[0]


def versions(*distributions: str, optional: Collection[str] = ()) -> None:
    """Compare the installed libraries with those that distributions declare to need.

    A distribution that is not installed, as in a plain source folder, declares nothing.

    Args:
        distributions: names, with the extras that are needed: `lora-core[train]`.
        optional: libraries that may be missing, but not in another version.

    Raises:
        ConfigError: every library that is missing, too old or too new.
    """
    problems: dict[str, None] = {}
    for distribution in distributions:
        for need in _needs(distribution):
            found = _version(need.name)
            if found is None and need.name in optional:
                continue
            if found is None or not need.specifier.contains(found, prereleases=True):
                is_there = f"{need.name} {found} is installed" if found else f"no {need.name} here"
                wanted = f"{need.name}{need.specifier}"
                problem = f'{is_there}, {distribution} needs {wanted}: pip install "{wanted}"'
                problems.setdefault(problem)
    if problems:
        raise ConfigError(listing(list(problems)))


def _needs(distribution: str) -> Iterator[Requirement]:
    from packaging.requirements import Requirement

    wanted = Requirement(distribution)
    try:
        lines = metadata.requires(wanted.name) or []
    except metadata.PackageNotFoundError:
        return
    for need in map(Requirement, lines):
        extras = ["", *wanted.extras]
        if need.marker is None or any(need.marker.evaluate({"extra": one}) for one in extras):
            yield need


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def libraries(program: str, extras: str, optional: Collection[str] = ()) -> None:
    """Refuse libraries that a command of a package cannot work with.

    Args:
        program: `sam2-lora`. extras: those of lora-core that the command needs, with commas.
        optional: as for `versions`.

    Raises:
        ConfigError: see `versions` and `torchvision`.
    """
    check_all(lambda: versions(program, f"lora-core[{extras}]", optional=optional), torchvision)


def torchvision() -> None:
    """Refuse a torchvision that cannot be imported, as after an update of torch alone.

    Nothing of ours uses it. transformers imports it wherever it is installed, and then fails with
    a message about something else.

    Raises:
        ConfigError: with the versions of both.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:  # RuntimeError, OSError, ImportError: as the linker decides
        reason = printable(str(error).strip().partition("\n")[0][:120])
        pins = [need for need in _needs("torchvision") if need.name == "torch"]
        made = f", made for torch{pins[0].specifier}," if pins else ""
        raise ConfigError(
            f"torchvision {_version('torchvision') or 'of unknown version'}{made} does not work "
            f"with the installed torch {_version('torch')}: {reason}\n"
            "pip uninstall torchvision (it is not needed here), or install the one for this torch"
        ) from error


def writable(folder: str | Path, setting: str) -> None:
    """Try whether files can be written below a folder, which need not exist; nothing stays there.

    Args:
        folder: where a run will make files and folders.
        setting: how the user names it, such as `--output_dir`.

    Raises:
        ConfigError: no name, a file is in the way, a name is too long, no right to write, or no
            space.
    """
    if not os.fspath(folder):  # of an unset variable of a shell; it would be the current folder
        raise ConfigError(f"{setting} is empty: name a folder; . is the current one")
    path = Path(folder).absolute()
    place = f"{setting} {printable(str(path)[:300])}"
    longest = max(map(len, map(os.fsencode, path.parts)))
    if "\0" in str(path) or longest > _NAME_LIMIT or len(os.fsencode(path)) > _PATH_LIMIT:
        raise ConfigError(
            f"{place}: no possible name of a folder: at most {_NAME_LIMIT} bytes for each part and "
            f"{_PATH_LIMIT} for all ({longest} and {len(os.fsencode(path))} here), and no zero byte"
        )
    there = path
    while not os.path.lexists(there):
        there = there.parent
    if not os.path.isdir(there):
        raise ConfigError(f"{place}: {printable(there)} is not a folder: choose another one")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(65536))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"{place}: cannot write in {printable(there)}: {error.strerror}. Make room or give "
            "rights there, or choose another folder"
        ) from error
