"""Where a model's tokenizer lies, and whether it is one that Isaac can use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from isaac_lora.conversations.template import END, START
from lora_core.base_file import read_settings
from lora_core.errors import CheckpointError, listing, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json")  # any of them marks the place
IMAGE_PAD = "<|image_pad|>"  # stands at places of pictures; never looked up


def tokenizer_folders(model: Path) -> list[Path]:
    """Where the tokenizer of a model folder may lie, the likeliest first."""
    model = model.absolute()
    beside = model.parent
    return [
        model,
        model / "tokenizer",
        beside / f"{model.name}_tokenizer",
        beside / "isaac_tokenizer",
        beside / "tokenizer",
    ]


def find_tokenizer(model: Path) -> Path:
    """The first of these folders that holds a tokenizer.

    Raises:
        CheckpointError: none does; lists where it was looked for.
    """
    folders = tokenizer_folders(model)
    for folder in folders:
        if any((folder / name).is_file() for name in FILES):
            return folder
    places = ", ".join(one_line(folder) for folder in folders)
    raise CheckpointError(
        f"{one_line(model.absolute())}: no tokenizer ({', '.join(FILES)}); looked for it in "
        f"{places}. Copy the tokenizer files of Isaac into the model folder"
    )


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. No code in the folder is run, nothing is fetched.

    Raises:
        CheckpointError: none there, damaged, or of another kind.
    """
    from transformers import AutoTokenizer, PreTrainedConfig, Qwen2Tokenizer

    folder = find_tokenizer(Path(model))
    settings = folder / FILES[0]
    named = settings.is_file() and "tokenizer_class" in read_settings(settings)
    loader = AutoTokenizer if named else Qwen2Tokenizer  # the latter needs no settings
    # Without one, transformers reads the model's, and warns that it does not know Isaac.
    config = {"config": PreTrainedConfig()} if named else {}
    try:
        tokenizer = loader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **config
        )
    # The library's own errors, and `Exception` itself from its Rust half, for a damaged file.
    except Exception as error:
        raise CheckpointError(
            f"{one_line(folder)}: the tokenizer cannot be read: {one_line(error)[:300]}"
        ) from error
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Require what conversations need of a tokenizer.

    Raises:
        CheckpointError: it has no offsets, no padding, or not ChatML's control tokens.
    """
    where = one_line(tokenizer.name_or_path or "the tokenizer")
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    problems = [
        f"{where}: {name} is no special token of it; use the tokenizer of Isaac (Qwen3)"
        for name in (START, END)
        if name not in special
    ]
    if not tokenizer.is_fast:
        problems.append(f"{where}: it gives no places in the text: save it with tokenizer.json")
    if tokenizer.pad_token_id is None:
        problems.append(f"{where}: it has no pad token; Isaac's is <|endoftext|>")
    if problems:
        raise CheckpointError(listing(problems))


def image_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands at places of pictures: that of `<|image_pad|>`, or of padding."""
    found = tokenizer.get_added_vocab().get(IMAGE_PAD)
    return int(tokenizer.pad_token_id if found is None else found)
