"""The folder that a `prepare` command makes: replaced on request, and only if one made it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from lora_core.errors import DataError, one_line, printable
from lora_core.validate import REPORT

MARK = "prepared.json"  # says that a folder was made by prepare


def check_output(
    output: Path,
    source: str | Path,
    own: Collection[str],
    overwrite: bool,
    strangers: Callable[[Path], Iterable[Path]] = lambda _: (),
) -> None:
    """Never delete what was not made by prepare.

    Args:
        output: an absolute path.
        source: the data set that it is made from.
        own: names of files and folders that prepare writes, besides its mark and bad samples.
        overwrite: the user wants a folder that was made by prepare to be replaced.
        strangers: one of `own` that is there -> the files in it that prepare did not write.

    Raises:
        DataError: there is something at the output that must not be replaced.
    """
    place = printable(output)
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise DataError(f"{place} exists: add --overwrite, or choose another --output")
    if output.is_symlink() or not output.is_dir():
        raise DataError(f"{place} is no folder, and is not replaced: choose another --output")
    if Path(source).resolve().is_relative_to(output.resolve()):
        raise DataError(f"{place} holds the --source: choose another --output")
    names = {path.name for path in output.iterdir()}
    strange = sorted(names - {MARK, REPORT, *own})
    if names and MARK not in names and not strange:
        raise DataError(f"{place} was not made by prepare, and is not replaced: remove it first")
    for name in sorted(names & set(own)) if not strange else ():
        strange += [str(path.relative_to(output)) for path in strangers(output / name)]
    if strange:
        what = one_line(strange[0])
        raise DataError(f"{place} holds {what!r}, which is not replaced: remove it first")
