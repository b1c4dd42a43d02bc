"""Look at every sample of a data set before anything slow: wholly, in parallel, and only once.

    outcomes = validate(records, look, kind="sam2 record 1", root=folder, files=lambda r: [r.image])
    bad = [Bad("train", r.key, o.problem) for r, o in zip(records, outcomes) if o.problem]
    stop_or_skip(bad, {"train": len(good)}, "skip", 0.01, root=folder, report=runs / REPORT)

What was looked at and is good is remembered in the user's cache folder by path, size and time of
change, so that a second start, or one after Ctrl-C, looks at the rest alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_core import shielded
from lora_core.errors import DataError, listing, one_line
from lora_core.report import Progress, duration, plural, say
from lora_core.shielded import Limits, Outcome

REPORT = "bad_samples.jsonl"
MOST_BYTES = 2**28  # of remembered outcomes of one data set; then they are begun anew

T = TypeVar("T")
V = TypeVar("V")
Share = Callable[[Callable[[], Any]], Any]


# -- in a run of several processes ---------------------------------------------------------------


def read_and_settle(read: Callable[[], T], settle: Callable[[T], V], share: Share) -> tuple[T, V]:
    """What `read` gives in each process, and what `settle` makes of it in the first one.

    Args:
        share: calls its argument in the first process of the run and gives its value in all, such
            as `first_rank_decides`: samples are looked at once, and all leave out the same.
    """
    here: list[T] = []

    def first() -> V:
        here.append(read())
        return settle(here[0])

    settled = share(first)
    return (here[0] if here else read()), settled


# -- looking at all samples ------------------------------------------------------------------------


def validate(
    samples: Sequence[T],
    look: Callable[[T], Any],
    *,
    kind: str,
    root: Path,
    files: Callable[[T], Iterable[Path]],
    name: Callable[[T], str] = str,
    content: Callable[[T], str] = lambda sample: "",
    what: str = "samples",
    limits: Limits | None = None,
    workers: int | None = None,
) -> list[Outcome]:
    """Look at every sample, in worker processes that may crash, hang or run out of memory.

    Args:
        look: decodes a sample wholly; gives plain facts about it, as JSON has them, or raises
            DataError with the sample's name and what is wrong with it.
        kind: name and version of `look` with the settings that change its facts; facts of another
            kind are not taken over.
        root: folder of the data set.
        files: those that are decoded. While path, size and time of change of all are as they were,
            a good sample is not looked at again.
        name: of a sample, in problems of the decoder.
        content: digest of whatever else a sample's facts follow from, such as its annotations.
        what: the samples are called in lines about progress.

    Returns:
        For each sample its facts, or its problem.

    Raises:
        RuntimeError: `look` raised something other than a DataError.
    """
    outcomes: list[Outcome | None] = [None] * len(samples)
    with Remembered(_memory(kind, root)) as remembered:
        keys = [_key(list(files(sample)), content(sample)) for sample in samples]
        for index, key in enumerate(keys):
            if key in remembered.facts:
                outcomes[index] = Outcome(remembered.facts[key])
        todo = [index for index, outcome in enumerate(outcomes) if outcome is None]
        answers = shielded.each(
            lambda number: look(samples[todo[number]]),
            len(todo),
            name=lambda number: one_line(name(samples[todo[number]])),
            limits=limits,
            workers=workers,
        )
        # Closed by name: after Ctrl-C the traceback would keep the workers alive.
        with contextlib.closing(_told(answers, len(todo), what)) as told:
            for number, outcome in told:
                outcomes[todo[number]] = outcome
                if not outcome.problem:
                    remembered.add(keys[todo[number]], outcome.value)
    return [outcome for outcome in outcomes if outcome is not None]


def _key(files: Sequence[Path], content: str) -> str:
    """Digest of what a sample's facts follow from; "" if a file is missing."""
    parts: list[Any] = [content]
    for path in files:
        try:
            status = path.stat()
        except (OSError, ValueError):
            return ""
        parts += [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    text = json.dumps(parts).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _told(
    answers: Generator[tuple[int, Outcome], None, None], total: int, what: str
) -> Generator[tuple[int, Outcome], None, None]:
    """Pass answers on; show how far it is if that takes longer than a second."""
    began = said = time.monotonic()
    progress: Progress | None = None
    try:
        for done, answer in enumerate(answers, start=1):
            yield answer
            now = time.monotonic()
            if progress is None and now - began > 1:
                progress = Progress(total)
                progress.figures, progress.began = {"checking": what}, began
            if progress is not None:
                progress.update(done)
                if not progress.live and now - said > 10:
                    said = now
                    left = duration((now - began) / done * (total - done))
                    say(f"checked {done} of {total} {what}, {left} left")
    finally:
        answers.close()
        if progress is not None:
            progress.close()


# -- what is remembered ----------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Folder for what can be computed again: `$XDG_CACHE_HOME/lora-core`, `~/.cache/lora-core`;
    None without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "lora-core"
    home = os.environ.get("HOME", "")
    return Path(home) / ".cache" / "lora-core" if os.path.isabs(home) else None


def _memory(kind: str, root: Path) -> Path | None:
    """File of remembered outcomes, never inside the data set."""
    folder = cache_folder()
    place = root.resolve()
    if folder is None or folder.resolve().is_relative_to(place):
        return None
    digest = hashlib.sha256(f"{kind}\0{place}".encode("utf-8", "surrogateescape")).hexdigest()
    return folder / "validated" / f"{digest[:32]}.jsonl"


class Remembered:
    """Facts by key, in a file of lines: each a checksum and [key, facts].

    Runs that share the file each add whole lines to its end. Whatever cannot be read is looked at
    again; where nothing can be written, nothing is remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self._new: list[bytes] = []
        self._written = time.monotonic()
        if path is not None:
            self._load(path)

    def add(self, key: str, facts: Any) -> None:
        """Remember facts; what is new is written every second."""
        if not key:
            return
        self.facts[key] = facts
        self._new.append(_line(key, facts))
        if time.monotonic() - self._written > 1:
            self._write()

    def _load(self, path: Path) -> None:
        try:
            if path.stat().st_size > MOST_BYTES:
                path.unlink()
            data = path.read_bytes()
        except OSError:  # none yet, or none that can be read
            return
        damaged = 0
        for line in data.splitlines(keepends=True):
            checksum, _, text = line.partition(b" ")
            if checksum == b"%08x" % zlib.crc32(text):  # of the line's end too
                key, facts = json.loads(text)
                self.facts[key] = facts
            else:
                damaged += 1
        if damaged:
            say(f"{path}: {plural(damaged, 'damaged line')}; what stood there is looked at again")
            self._rewrite(path)

    def _rewrite(self, path: Path) -> None:
        """Put a file with the good lines in place of the damaged one."""
        with self._going_on():
            descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=".validated-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.writelines(_line(key, facts) for key, facts in self.facts.items())
                os.replace(partial, path)
            except OSError:
                os.unlink(partial)
                raise

    def _write(self) -> None:
        """Add the new lines to the file in one piece, so that runs do not mix theirs."""
        data, self._new = b"".join(self._new), []
        self._written = time.monotonic()
        if self.path is None or not data:
            return
        with self._going_on():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            descriptor = os.open(self.path, flags, 0o600)
            try:
                written = os.write(descriptor, data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            say(f"{self.path}: {error.strerror}; the next run looks at the whole data set again")
            self.path = None

    def __enter__(self) -> Remembered:
        return self

    def __exit__(self, *reason: object) -> None:
        self._write()


def _line(key: str, facts: Any) -> bytes:
    text = json.dumps([key, facts], separators=(",", ":")).encode() + b"\n"
    return b"%08x %b" % (zlib.crc32(text), text)


# -- what is wrong ---------------------------------------------------------------------------------


class Bad(NamedTuple):
    """A sample that cannot be used."""

    split: str
    sample: str  # its name in the data set
    reason: str  # whole message: file, record, what was expected


def stop_or_skip(
    bad: Sequence[Bad],
    good: Mapping[str, int],
    on_bad_sample: str,
    max_bad_fraction: float,
    root: Path,
    report: Path | None,
) -> None:
    """Return if the samples that are bad may be left out, by the settings of that name.

    Args:
        good: number of the other samples, by split.
        root: of the data set, for the message.
        report: file that lists all bad samples when they are too many; None: none is written.

    Raises:
        DataError: there are bad samples and `on_bad_sample` is "stop", or more than
            `max_bad_fraction` of a split; all of them, the first 20 in full.
    """
    if not bad:
        return
    problems = list(dict.fromkeys(line for one in bad for line in one.reason.splitlines()))
    title = f"{root.absolute()}: {plural(len(problems), 'problem')}"
    if on_bad_sample == "stop":
        count = len(samples(bad))
        what = "it, or leave it out" if count == 1 else f"them, or leave the {count} samples out"
        remedy = f"mend or remove {what} with --on_bad_sample skip"
        raise DataError("\n".join([title, listing(problems), remedy]))
    shares = []
    for split, count in Counter(split for split, _ in samples(bad)).items():
        total = count + good.get(split, 0)
        if count > max_bad_fraction * total:
            shares.append(
                f"{split}: {count} of {total} samples are bad, more than "
                f"--max_bad_fraction {max_bad_fraction:g} allows"
            )
    if shares:
        lines = [*shares, listing(problems)]
        if report is not None:
            try:
                write_report(report, bad)
                lines.append(f"all with their reasons: {report.absolute()}")
            except DataError as error:
                lines.append(str(error))
        raise DataError("\n".join(lines))


def samples(bad: Iterable[Bad]) -> dict[tuple[str, str], None]:
    """(split, name) of the samples that are bad, each once, in order."""
    return dict.fromkeys((one.split, one.sample) for one in bad)


def write_report(path: Path, bad: Sequence[Bad]) -> None:
    """Write one JSON object per bad sample: split, sample, reason.

    Raises:
        DataError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(json.dumps(one._asdict()) + "\n" for one in bad), "ascii")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(f"{path.absolute()}: cannot be written: {error.strerror}") from error
