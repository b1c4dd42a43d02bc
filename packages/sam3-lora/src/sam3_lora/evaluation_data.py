"""What `sam3-lora evaluate` scores: pictures with COCO annotations, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_core.errors import ConfigError, DataError, one_line
from lora_core.pictures.coco import CocoFile
from lora_core.pictures.reading import Reading
from lora_core.pictures.survey import left_out, without
from lora_core.validate import Bad
from sam3_lora.coco import Split, read_split
from sam3_lora.config import Config
from sam3_lora.data import ValSet
from sam3_lora.queries import fixed, unused_prompts
from sam3_lora.records import Record
from sam3_lora.survey import Counts, counted, data_root, notes_on, places, settled

if TYPE_CHECKING:
    from sam3_lora.evaluate import Options


@dataclass
class Pictures:
    """What is scored, read and checked; `set_for` makes it ready for a model."""

    records: list[Record]
    split: Split
    counts: Counts
    notes: list[str]
    cfg: Config
    bad: list[Bad]  # what was left out, and why

    @property
    def masks(self) -> bool:
        """Whether masks are scored."""
        return self.cfg.training.enable_segmentation

    @property
    def phrases(self) -> list[str]:
        """All that can be asked for."""
        return list(self.split.phrases.numbers)

    def set_for(self, size: tuple[int, int]) -> ValSet:
        """The pictures for a model with an input of `size` (H, W)."""
        dataset = replace(self.cfg.dataset, resolution=f"{size[0]}x{size[1]}")
        return ValSet(self.records, self.split, replace(self.cfg, dataset=dataset))


def load_pictures(options: Options) -> Pictures:
    """Read the annotations, and look at every picture.

    Raises:
        DataError: faults in the data, all of them together; or no masks although they were asked
            for.
        ConfigError: --prompts names a category that the file does not have.
    """
    cfg = options.config()
    split, known, notes = read_annotations(cfg)
    if options.max_images:
        split = split._replace(records=subset(split.records, options.max_images))
    facts, bad = settled({"val": split}, known, cfg)
    good = without({"val": split.records}, bad, facts, data_root(cfg.dataset))
    counts = counted(good, {"val": split}, facts, cfg)
    masks = counts["val"].masks > 0 if options.masks is None else options.masks
    if masks and not counts["val"].masks:
        raise DataError(f"{one_line(options.img_folder)}: no object has a mask: --masks false")
    notes += [*notes_on(counts, cfg), *left_out(bad)]
    notes = [note.removeprefix("val: ").replace("--dataset.", "--") for note in notes]
    cfg = replace(cfg, training=replace(cfg.training, enable_segmentation=masks))
    return Pictures(good["val"], split, counts["val"], notes, cfg, bad)


def read_annotations(cfg: Config) -> tuple[Split, list[Bad], list[str]]:
    """The records of the COCO file, the pictures that are known to be bad, and notes.

    Raises:
        DataError: something is wrong with the data set as a whole.
        ConfigError: a prompt for a category that does not exist.
    """
    folder, file = places(cfg.dataset)["val"]
    if not folder.is_dir():
        raise DataError(f"--img_folder {one_line(folder.absolute())}: no such folder")
    reading = Reading(folder, cfg.dataset.follow_links)
    split = read_split(CocoFile(file, (folder,)), reading, cfg.dataset)
    reading.stop_if_wrong()
    if unused := unused_prompts(cfg.dataset, split.phrases.prompts):
        known = ", ".join(split.phrases.numbers)[:200]
        raise ConfigError(
            f"--prompts: no category {', '.join(unused)[:200]}; the phrases are {known}"
        )
    known_bad = [Bad("val", *pair) for pair in reading.bad]
    return split, known_bad, [*split.phrases.notes, *reading.said()]


def subset(records: Sequence[Record], count: int) -> list[Record]:
    """The same `count` records in every run, in their order."""
    chosen = set(fixed([record.key for record in records], count, ""))
    return [record for record in records if record.key in chosen]
