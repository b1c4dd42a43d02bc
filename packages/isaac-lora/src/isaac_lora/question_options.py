"""Conversations whose questions are asked: settings that `predict` and `evaluate` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isaac_lora.config import Config
from isaac_lora.model_options import ModelOptions
from lora_core.config import option
from lora_core.errors import DataError, listing
from lora_core.guards import count_problem, unnamed

if TYPE_CHECKING:
    from isaac_lora.examples import Example
    from isaac_lora.processing import IsaacProcessor

PART = "data"  # what messages about left out conversations call them


@dataclass(kw_only=True)
class QuestionOptions(ModelOptions):
    """A model, and a file of conversations."""

    data_path: str | None = option(None, "Conversations: a JSON list or lines.", "data")
    image_folder: str | None = option(None, "Where relative paths of images begin.", "data")
    image_first: bool = option(
        False, "Put images that no <image> places in front of the first question.", "data"
    )
    max_seq_length: int = option(
        Config.max_seq_length, "Tokens of a conversation, with those of images.", "data"
    )
    on_bad_sample: Literal["stop", "skip"] = option("stop", "As in training.", "data")
    max_bad_fraction: float = option(Config.max_bad_fraction, "As in training.", "data")
    output: str = option("answers", "Folder for the results.", "output")
    overwrite: bool = option(False, "Replace results that are there.", "output")

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = super().problems()
        found += unnamed(self, ("data_path", "image_folder"))
        found += count_problem(self, "max_seq_length", 1)
        if not 0 <= self.max_bad_fraction < 1:
            found.append(
                f"--max_bad_fraction is {self.max_bad_fraction}: it must be 0 <= share < 1"
            )
        return found

    def processor(self) -> IsaacProcessor:
        """The processor of the model; the vocabulary is read.

        Raises:
            CheckpointError: no tokenizer or settings there.
        """
        from isaac_lora.processing import IsaacProcessor

        return IsaacProcessor.from_pretrained(self.model_path)

    def conversations(self, processor: IsaacProcessor, answered: bool) -> list[Example]:
        """The conversations of --data_path, each looked at wholly.

        What may be left out is listed in the output folder.

        Args:
            answered: each must have an answer; False: one that only asks will do.

        Raises:
            DataError: faults in them, all together.
        """
        from isaac_lora.conversations.records import read_conversations
        from isaac_lora.data_survey import example_of, folder_of, folder_problems, settled
        from lora_core.pictures.survey import left_out
        from lora_core.report import say
        from lora_core.validate import REPORT, write_report

        path = str(self.data_path)
        cfg = Config(
            model_path=self.model_path,
            data_path=path,
            image_folder=self.image_folder,
            max_seq_length=self.max_seq_length,
            on_bad_sample=self.on_bad_sample,
            max_bad_fraction=self.max_bad_fraction,
            output_dir=self.output,
        )
        if problems := list(folder_problems(cfg)):
            raise DataError(listing(problems))
        reading = read_conversations(path, image_first=self.image_first, answered=answered)
        reading.stop_if_wrong()
        found, bad = settled({PART: reading}, cfg, processor, answered)
        examples = [
            example_of(record, folder_of(cfg), found[PART, record.key])
            for record in reading.records
            if (PART, record.key) in found
        ]
        if not examples:
            raise DataError(f"{Path(path).absolute()}: no conversation is left to ask about")
        if bad:
            write_report(Path(self.output) / REPORT, bad)
        for note in left_out(bad):
            say(f"note: {note}")
        return examples
