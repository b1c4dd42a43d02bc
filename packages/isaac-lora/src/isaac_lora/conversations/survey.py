"""A look at a conversation before training: its length from the sizes of its pictures, then all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isaac_lora.conversations.pictures import locate, picture_size, read_picture
from isaac_lora.conversations.records import Conversation
from isaac_lora.conversations.samples import Sample, outline
from isaac_lora.conversations.shortening import shortened
from isaac_lora.pictures.content import content_digest
from isaac_lora.pictures.target_size import patch_grid
from lora_core.errors import DataError
from lora_core.pictures.survey import digest_of

if TYPE_CHECKING:
    from isaac_lora.processing import IsaacProcessor


def facts(
    conversation: Conversation,
    processor: IsaacProcessor,
    folder: Path | None,
    max_seq_length: int,
    cut_long: bool = False,
    answered: bool = True,
) -> dict[str, Any]:
    """Look at a conversation wholly: its tokens first, then every pixel.

    Args:
        folder: what relative paths of pictures start from; None: the working directory.
        cut_long: cut one that is too long at the end of an answer, see `shortened`.
        answered: something in it must be learned.

    Returns:
        `turns`: how many of them are kept, from the first. Of these: `tokens`, `image_tokens`,
        `label_tokens`: numbers of places; `sizes`: [height, width] of each picture; `contents`: a
        digest of each one's pixels.

    Raises:
        DataError: all that is wrong with it, a line for each.
    """
    sizes = sizes_of(conversation, processor, folder)
    if cut_long:
        conversation = shortened(conversation, sizes, processor, max_seq_length)
        sizes = sizes[: len(conversation.images)]
    sample = outline(conversation, sizes, processor)
    refuse_unusable(sample, max_seq_length, cut_long, answered)
    return {
        "turns": len(conversation.turns),
        "tokens": len(sample),
        "image_tokens": int(sample.image_mask.sum()),
        "label_tokens": sample.num_label_tokens,
        "sizes": [list(size) for size in sizes],
        "contents": _contents(conversation.images, folder),
    }


def sizes_of(
    conversation: Conversation, processor: IsaacProcessor, folder: Path | None
) -> list[tuple[int, int]]:
    """(height, width) of each picture of a conversation, from their headers.

    Raises:
        DataError: pictures that are missing, unreadable or too large, a line for each.
    """
    sizes, problems = list[tuple[int, int]](), list[str]()
    for source in conversation.images:
        try:
            size = picture_size(source, folder)
            patch_grid(*size, processor.rules)  # whether it is too large
            sizes.append(size)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return sizes


def _contents(sources: Sequence[str], folder: Path | None) -> list[str]:
    """Digests of the pixels of pictures.

    Raises:
        DataError: pictures that are damaged, a line for each.
    """
    contents, problems = list[str](), list[str]()
    for source in sources:
        try:
            contents.append(content_digest(read_picture(source, folder)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return contents


def files_of(conversation: Conversation, folder: Path | None) -> list[Path]:
    """The files that `facts` decodes; of names that no file can have it says so itself."""
    files = []
    for source in conversation.images:
        with suppress(DataError):
            path = locate(source, folder)
            files += [path] if path is not None else []
    return files


def content_of(conversation: Conversation) -> str:
    """Digest of what a conversation says, and of the pictures that stand in its record."""
    inline = [source for source in conversation.images if source[:5].lower() == "data:"]
    return digest_of(list(conversation.turns), inline, len(conversation.images))


def refuse_unusable(
    sample: Sample, max_seq_length: int, cut_long: bool = False, answered: bool = True
) -> None:
    """Require that a sample fits whole, and with `answered` that something in it is learned.

    Raises:
        DataError: it does not.
    """
    if len(sample) > max_seq_length:
        of_images = int(sample.image_mask.sum())
        if cut_long:
            remedy = "not even its first answer fits; raise the length"
        else:
            remedy = "divide it, raise the length, or cut such ones with --cut_long_samples True"
        raise DataError(
            f"{len(sample)} tokens, {of_images} of them of images, are more than --max_seq_length "
            f"{max_seq_length}: {remedy}"
        )
    if answered and sample.num_label_tokens == 0:
        raise DataError("no token of it would be learned")
