"""The promises of a package's training command: one message per mistake, and nothing lost.

In a package's tests the whole contract is

    @pytest.mark.parametrize("promise", program.CONTRACT, ids=lambda promise: promise.__name__)
    def test_program(promise, tmp_path):
        promise(Program(train.main, small_run, continue_run, Config), tmp_path)

and another one like it, marked slow, over `program.SLOW`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapters.read import read_adapter
from lora_core.config import dump, parse
from lora_core.testing.kill_points import changes_of_names, kill_points, operations

Arguments = Callable[[Path], list[str]]


@dataclass
class Program:
    """A training command under test.

    Attributes:
        main: argv -> exit status.
        small: folder -> arguments of a run with dropout and several checkpoints that takes a
            second and writes only into that folder.
        resume: the same folder -> arguments that continue this run.
        config: the class of its settings.
        examples: configuration files that the package shows.
        base, data, output: the settings that name the base, the data, and where runs go.
        tensors: an adapter file -> its tensors, where a package has a form of its own.
    """

    main: Callable[[Sequence[str]], int]
    small: Arguments
    resume: Arguments
    config: type[Any]
    examples: Sequence[Path] = ()
    base: str = "checkpoint"
    data: str = "data_root"
    output: str = "output_dir"
    tensors: Callable[[Path], Mapping[str, Tensor]] = lambda path: read_adapter(path).tensors

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of one call."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = self.main(list(argv))
        return status, out.getvalue(), err.getvalue()

    def adapters(self, folder: Path) -> dict[str, dict[str, bytes]]:
        """Bits of all tensors of the final adapters below a folder, directories and single files.

        Not the settings beside them, which say where a run lies.
        """
        folders = [path.parent for path in folder.rglob("adapter_model.safetensors")]
        found: dict[str, Mapping[str, Tensor]] = {
            path.name: read_adapter(path).tensors
            for path in sorted(folders)
            if not path.parent.name.startswith("checkpoint-")
        }
        for path in sorted(folder.rglob("*")):
            whole = "merged" in path.name  # a whole model
            if path.suffix in (".pt", ".pth", ".torch") and not whole:
                found[path.name] = self.tensors(path)
        return {
            name: {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}
            for name, tensors in found.items()
        }


# -- settings --------------------------------------------------------------------------------------


def settings_survive_a_file(program: Program, folder: Path) -> None:
    """The settings of a run, written and read again, are the same; the shown examples parse."""
    cfg = parse(program.config, program.small(folder), prog="program")
    dump(cfg, folder / "config.yaml")
    again = parse(program.config, ["--config", str(folder / "config.yaml")], prog="program")
    assert again == cfg
    for example in program.examples:
        parse(program.config, ["--config", str(example)], prog="program")


def a_mistake_is_one_message(program: Program, folder: Path) -> None:
    """Each mistake ends with status 2 and a message that names it; no folder of a run is made."""
    written = folder / "settings"
    written.mkdir()
    for name, text in {
        "twice.yaml": "seed: 1\nseed: 2\n",
        "unknown.yaml": "sede: 1\n",
        "type.yaml": "seed: four\n",
        "cut.json": '{"seed": ',
    }.items():
        (written / name).write_text(text, encoding="utf-8")
    missing, file = folder / "missing", written / "twice.yaml"
    mistakes = [
        (["--sede", "1"], ["--sede", "seed"]),
        (["--seed", "four"], ["seed", "four"]),
        (["--seed", "1.5"], ["seed", "1.5"]),
        (["--config", str(written / "twice.yaml")], ["twice.yaml", "seed", "1", "2"]),
        (["--config", str(written / "unknown.yaml")], ["unknown.yaml", "sede", "seed"]),
        (["--config", str(written / "type.yaml")], ["seed", "four"]),
        (["--config", str(written / "cut.json")], ["cut.json"]),
        (["--config", str(missing)], [str(missing)]),
        (["--on_bad_sample", "ignore"], ["on_bad_sample", "skip"]),
        (["--keep_last", "0"], ["keep_last", "at least 1"]),
        (["--device", "cuda:99"], ["device"]),
        ([f"--{program.base}", str(missing)], [str(missing)]),
        ([f"--{program.data}", str(missing)], [str(missing)]),
        ([f"--{program.output}", str(file)], [str(file)]),
    ]
    for words, parts in mistakes:
        status, _, err = program.run([*program.small(folder / "run"), *words])
        assert status == 2, f"{words}: exit status {status}\n{err}"
        assert err.startswith("error: "), f"{words}: {err}"
        assert "Traceback" not in err, f"{words}: {err}"
        for part in parts:
            assert part in err, f"{words}: {part!r} is not in the message:\n{err}"
        left = [path for path in (folder / "run").rglob("*") if path.is_file()]
        assert not left, f"{words} left {left}"


def a_dry_run_writes_nothing(program: Program, folder: Path) -> None:
    """`--dry_run` answers with status 0, tells parameters and memory, and makes no file."""
    status, out, err = program.run([*program.small(folder / "run"), "--dry_run"])
    assert status == 0, err
    assert "parameters" in out, out
    assert "memory" in out, out
    assert not (folder / "run").exists() or not list((folder / "run").rglob("*.*"))


# -- stopping and resuming -------------------------------------------------------------------------


def a_stopped_run_resumes_to_the_same_bits(program: Program, folder: Path) -> None:
    """SIGTERM after the first checkpoint ends with 143; continued, the run ends bit for bit as
    the run that was never stopped, adapter and figures alike."""
    whole, stopped = folder / "whole", folder / "stopped"
    status, _, err = program.run(program.small(whole))
    assert status == 0, err
    with signal_at_first_checkpoint(signal.SIGTERM):
        status, out, err = program.run(program.small(stopped))
    assert status == 143, f"exit status {status}\n{out}\n{err}"
    assert "Traceback" not in err, err
    assert "resume" in err, err
    # Not by the adapters: the best one may be that of the first checkpoint in both.
    assert figures(stopped) != figures(whole), "the run was not stopped before its end"
    status, out, err = program.run(program.resume(stopped))
    assert status == 0, err
    assert program.adapters(stopped) == program.adapters(whole), "other adapters after the stop"
    assert figures(stopped) == figures(whole), "other figures after the stop"
    before = program.adapters(stopped)
    status, out, err = program.run(program.resume(stopped))
    assert status == 0, err
    assert "already finished" in out, out
    assert program.adapters(stopped) == before
    assert figures(stopped) == figures(whole)


def a_killed_run_resumes_to_the_same_bits(program: Program, folder: Path) -> None:
    """SIGKILL wherever a file gets or loses its name, or just before, between the first checkpoint
    and the end: continued, the run ends as the one that was never killed, and leaves no scraps."""
    whole, run, kept = folder / "whole", folder / "run", folder / "kept"
    status, _, err = program.run(program.small(whole))
    assert status == 0, err
    with signal_at_first_checkpoint(signal.SIGTERM):
        status, _, err = program.run(program.small(run))
    assert status == 143, err
    shutil.copytree(run, kept)
    ends = program.adapters(whole), figures(whole)

    def prepare() -> None:
        shutil.rmtree(run)
        shutil.copytree(kept, run)

    def go_on() -> None:
        status, out, err = program.run(program.resume(run))
        assert status == 0, f"{out}\n{err}"

    def check(n: int) -> None:
        where = f"killed at operation {n}, {done[n - 1]}"
        go_on()
        assert program.adapters(run) == ends[0], f"other adapters: {where}"
        assert figures(run) == ends[1], f"other figures: {where}"
        scraps = [path for path in run.rglob("*") if is_scrap(path)]
        assert not scraps, f"{scraps} left: {where}"

    done = operations(go_on)
    assert kill_points(go_on, check, prepare, at=changes_of_names(done)) > 10


def is_scrap(path: Path) -> bool:
    """Whether a file's name is that of something unfinished: of a checkpoint, or of a CSV."""
    numbered = path.name.startswith(".") and path.suffix[1:].isdigit()
    return numbered or path.suffix in (".tmp", ".gone")


_armed: list[int] = []  # the signal that the next checkpoint of this process sends
_listening: list[bool] = []


@contextlib.contextmanager
def signal_at_first_checkpoint(number: int) -> Iterator[None]:
    """Send this process a signal when it has written its first training checkpoint."""
    if not _listening:
        sys.addaudithook(_listen)  # cannot be taken back
        _listening.append(True)
    _armed.append(number)
    try:
        yield
    finally:
        _armed.clear()


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _armed and event == "os.rename":
        target = os.fsdecode(arguments[1])  # type: ignore[arg-type]
        if os.path.basename(target).startswith("checkpoint-"):
            os.kill(os.getpid(), _armed.pop())


def figures(folder: Path) -> list[list[dict[str, str]]]:
    """All CSV files below a folder, without what time decides."""
    tables = []
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            tables.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert tables, f"no figures below {folder}"
    return tables


CONTRACT: tuple[Callable[[Program, Path], None], ...] = (
    settings_survive_a_file,
    a_mistake_is_one_message,
    a_dry_run_writes_nothing,
    a_stopped_run_resumes_to_the_same_bits,
)
SLOW: tuple[Callable[[Program, Path], None], ...] = (a_killed_run_resumes_to_the_same_bits,)
