"""The folder of a training run: what every package keeps in it, and how a run is taken up again.

    <folder>/
        adapter/                the best adapter as PEFT reads it
        config.yaml             all settings, accepted by --config
        state/                  what a resumed run needs
        training_summary.json   written last
        bad_samples.jsonl       what was left out, and why

A package names its adapter files and logs as its guide promises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_core import settings
from lora_core.config import parse
from lora_core.errors import CheckpointError, ConfigError
from lora_core.report import plural, say
from lora_core.validate import REPORT, Bad, samples, write_report

if TYPE_CHECKING:
    import torch

C = TypeVar("C")  # a package's Config


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives; a package adds where its log is."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def summary(self) -> Path:
        """Written last, when the whole run is through."""
        return self.folder / "training_summary.json"

    def settings(self, config: type[C]) -> C:
        """Its settings as an instance of the package's `Config`.

        Raises:
            ConfigError: they are damaged, or of another version.
        """
        return parse(config, ["--config", str(self.config)], prog="")

    def write_summary(self, content: Mapping[str, Any]) -> None:
        """Write `training_summary.json`, whole or not at all."""
        from lora_core.tensor_file import write_json

        write_json(self.summary, content)

    def tidy(self) -> None:
        """Delete files half written that a killed process has left."""
        from lora_core.tensor_file import remove_partial

        for folder in (self.folder, self.adapter):
            if folder.is_dir():
                remove_partial(folder)

    def list_bad_samples(self, bad: Sequence[Bad], device: torch.device) -> None:
        """Write what was left out, and why; one process does."""
        from lora_core.distributed import first_rank_decides

        if bad:
            first_rank_decides(lambda: write_report(self.folder / REPORT, bad), device)

    def say_left_out(self, bad: Sequence[Bad]) -> None:
        """Tell how many samples were left out, and where they are listed."""
        if bad:
            number = plural(len(samples(bad)), "bad sample")
            say(f"  left out: {number}, see {self.folder / REPORT}")


R = TypeVar("R", bound=RunFolder)


def read_settings(
    config: type[C], argv: Sequence[str], find: Callable[[str], R], *, prog: str, description: str
) -> tuple[C, R | None]:
    """Read a training's command line; a resumed run has its own settings, changed by flags given.

    Args:
        config: has `resume` and `adapter`.
        find: the run that `--resume` names.

    Returns:
        the settings, and the run that is resumed.

    Raises:
        ConfigError: settings that cannot work.
        CheckpointError: of `find`.
    """
    asked: Any = parse(config, argv, prog=prog, description=description)
    if not asked.resume:
        return asked, None
    refuse_both(asked)
    run = find(asked.resume)
    words = ["--config", str(run.config), *argv]
    return parse(config, words, prog=prog, description=description), run


def refuse_both(cfg: Any) -> None:
    """Raise ConfigError for `--resume` beside `--adapter`."""
    if cfg.resume and cfg.adapter:
        raise ConfigError(
            "--resume continues a run with all its state, --adapter starts a new run from weights "
            "alone: give one of them"
        )


def named(resume: str) -> tuple[Path, Path]:
    """The path that `--resume` names, and the folder that it is or lies in.

    Raises:
        CheckpointError: there is nothing.
    """
    path = Path(resume)
    if not path.exists():
        raise CheckpointError(f"--resume {path.absolute()}: no such file or folder")
    return path, path if path.is_dir() else path.parent


def by_flag(values: Any, section: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by their names as flags have them, such as `lora.rank`."""
    for item in fields(values):
        value = getattr(values, item.name)
        if is_dataclass(value):
            yield from by_flag(value, f"{section}{item.name}.")
        else:
            yield section + item.name, value


def travelling(cfg: Any, paths: Collection[str]) -> dict[str, Any]:
    """The settings as plain values for files that are copied or published.

    Args:
        paths: the settings that name a place on one machine; these and secrets are not among them.
    """
    kept = {name: value for name, value in by_flag(cfg) if name not in paths}
    plain: dict[str, Any] = settings.plain(kept)
    return plain
