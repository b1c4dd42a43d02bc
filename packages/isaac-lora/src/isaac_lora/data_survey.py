"""The conversation files of a run, read, and each conversation looked at with all its pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isaac_lora.conversations.records import Conversation, place_of, read_conversations
from isaac_lora.conversations.shortening import first_turns
from isaac_lora.conversations.survey import content_of, facts, files_of
from isaac_lora.examples import Example, divided
from lora_core.data_file import open_regular
from lora_core.errors import DataError, listing, one_line
from lora_core.pictures.reading import Reading
from lora_core.shielded import Outcome
from lora_core.validate import REPORT, Bad, stop_or_skip, validate

if TYPE_CHECKING:
    from isaac_lora.config import Config
    from isaac_lora.processing import IsaacProcessor

Facts = dict[tuple[str, str], Mapping[str, Any]]  # by split and name; see `facts`
Parts = dict[str, Reading]  # by split


def find_files(cfg: Config) -> None:
    """Look whether the conversation files and the folder of pictures are there; none is read.

    Raises:
        DataError: missing, or no regular files; all of them together.
    """
    problems = list(folder_problems(cfg))
    for place in filter(None, (cfg.data_path, cfg.val_data_path)):
        try:
            open_regular(Path(place)).close()
        except DataError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{one_line(Path(place).absolute())}: {error.strerror}")
    if problems:
        raise DataError(listing(problems))


def read_parts(cfg: Config) -> Parts:
    """The conversation files, read: of train, and of val if there is any. No picture is opened.

    Raises:
        DataError: files that are missing, damaged or empty; all of them together.
    """
    places = {"train": cfg.data_path} | ({"val": cfg.val_data_path} if cfg.val_data_path else {})
    parts, problems = Parts(), []
    for split, place in places.items():
        try:
            parts[split] = read_conversations(place, image_first=cfg.image_first)
            parts[split].stop_if_wrong()
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listing(problems))
    if not cfg.val_data_path:
        whole = parts["train"]
        train, val = divided(whole.records, cfg.val_fraction)
        parts["train"].records = train
        if val:
            parts["val"] = Reading(whole.root, records=val)
    return parts


def folder_of(cfg: Config) -> Path | None:
    """What relative paths of pictures start from; None: the working directory."""
    return Path(cfg.image_folder) if cfg.image_folder else None


def folder_problems(cfg: Config) -> Iterator[str]:
    """Yield what is wrong with the folder of pictures: one line, and not one per conversation."""
    folder = folder_of(cfg)
    if folder is None:
        return
    try:
        os.stat(os.path.join(folder, "."))  # what lies in it can be found
        return
    except FileNotFoundError:
        found = "is not there"
    except NotADirectoryError:
        found = "is no folder"
    except OSError as error:
        found = f"cannot be entered: {error.strerror}"
    yield f"--image_folder: {one_line(folder.absolute())} {found}"


def settled(
    parts: Parts, cfg: Config, processor: IsaacProcessor, answered: bool = True
) -> tuple[Facts, list[Bad]]:
    """Facts of the good conversations, and the bad ones, if they may be left out.

    Args:
        answered: something must be learned in each.

    Raises:
        DataError: there are bad ones, and they may not be left out; all of them.
    """
    found, bad = Facts(), list[Bad]()
    for split, reading in parts.items():
        bad += [Bad(split, name, reason) for name, reason in reading.bad]
        outcomes = _looked_at(reading, cfg, processor, answered)
        for record, outcome in zip(reading.records, outcomes, strict=True):
            if outcome.problem:
                bad.append(Bad(split, record.key, outcome.problem))
            else:
                found[split, record.key] = outcome.value
    good = {split: sum(of == split for of, _ in found) for split in parts}
    report = None if cfg.dry_run else Path(cfg.output_dir) / REPORT
    stop_or_skip(bad, good, cfg.on_bad_sample, cfg.max_bad_fraction, Path(cfg.data_path), report)
    return found, bad


def _looked_at(
    reading: Reading, cfg: Config, processor: IsaacProcessor, answered: bool
) -> list[Outcome]:
    """The outcome for each record of a file."""
    folder, length, cut = folder_of(cfg), cfg.max_seq_length, cfg.cut_long_samples
    asks = "" if answered else " asks"

    def place(record: Conversation) -> str:
        return place_of(reading.root, record.index, record.name)

    def look(record: Conversation) -> dict[str, Any]:
        try:
            return facts(record, processor, folder, length, cut, answered)
        except DataError as error:
            lines = str(error).splitlines()
            raise DataError("\n".join(f"{place(record)}: {line}" for line in lines)) from None

    return validate(
        reading.records,
        look,
        kind=f"isaac conversation 1 {processor.fingerprint()} {length} {cut}" + asks,
        root=folder or reading.root.parent,
        files=lambda record: files_of(record, folder),
        name=place,
        content=content_of,
        what="conversations",
    )


def example_of(record: Conversation, folder: Path | None, found: Mapping[str, Any]) -> Example:
    """A record with its facts; cut as they say."""
    return Example(
        first_turns(record, found["turns"]),
        folder,
        found["tokens"],
        found["image_tokens"],
        found["label_tokens"],
        tuple((height, width) for height, width in found["sizes"]),
        tuple(found["contents"]),
    )
