"""The tokenizer of SAM 3's phrases: CLIP's byte-pair encoding, 32 ids, padded with 0.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; the
vocabulary is OpenAI's `bpe_simple_vocab_16e6.txt.gz` (MIT). transformers' own tokenizer differs: it
pads with the end token, does not cut, and leaves HTML entities and damaged text as they are.
"""

from __future__ import annotations

import gzip
import html
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import regex  # type: ignore[import-untyped]
import torch
from torch import Tensor

from lora_core.errors import CheckpointError, ConfigError, DataError, listing

CONTEXT = 32  # ids per phrase, start and end included
PAD = 0  # the id of "!" inside a word too: the official model hides both
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# CLIP's vocabulary is the first lines of a longer list: 49152 less 256 bytes and 2 special tokens.
MERGES = 49152 - 256 - 2
LARGEST_FILE = 64 * 2**20  # bytes, decompressed; the real ones have less than 5 MB

OFFICIAL_FILE = "bpe_simple_vocab_16e6.txt.gz"
SMALL_FILE = "vocabulary.txt"
ADVICE = (
    f"Give the folder of a transformers model with its tokenizer files, or {OFFICIAL_FILE}: it is "
    "in OpenAI's CLIP repository (folder clip), in the official sam3 repository (folder assets), "
    "and in the PyPI package open_clip_torch (folder open_clip)"
)

# CLIP's words. Its special tokens are left out: in a phrase they are text like any other.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

Pair = tuple[str, str]

# -- phrases -------------------------------------------------------------------------------------

QUOTES = str.maketrans(dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))
CONTROLS = regex.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
WIDE = regex.compile(r"[\u3000\uff01-\uffef\u0132\u0133\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06]")


def clean(phrase: str) -> str:
    """The phrase as CLIP saw text: entities resolved, repaired, single spaces, lower case.

    CLIP calls the library ftfy for the repair. What it does to a valid phrase is done here, so that
    a phrase has the same ids on every machine: UTF-8 that was read as Windows-1252 is undone,
    ligatures and full-width forms are replaced, quotes straightened, control characters removed,
    and the result composed (NFC).
    """
    text = _undo_wrong_encoding(html.unescape(phrase))
    text = WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = CONTROLS.sub("", text.translate(QUOTES))
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return " ".join(text.split()).lower()


def _undo_wrong_encoding(text: str) -> str:
    """ "cafÃ©" is "café" in UTF-8, read as Windows-1252."""
    try:
        return bytes(_windows_bytes()[character] for character in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return text


@cache
def _windows_bytes() -> dict[str, int]:
    """Windows-1252, with its five gaps filled as programs in the wild do."""
    gaps = {chr(byte): byte for byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}
    return gaps | {
        bytes([byte]).decode("cp1252"): byte for byte in set(range(256)) - set(gaps.values())
    }


# -- byte pairs ----------------------------------------------------------------------------------


@cache
def byte_symbols() -> dict[int, str]:
    """A printable character for each of the 256 bytes, in CLIP's order of ids.

    The bytes "!" to "~", "¡" to "¬" and "®" to "ÿ" come first and stand for themselves; the rest
    take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = sorted(set(range(256)) - set(printable))
    symbols = [*printable, *range(256, 256 + len(rest))]
    return dict(zip([*printable, *rest], map(chr, symbols), strict=True))


def word_symbols(word: str) -> list[str]:
    """The symbols of a word before any merge; the last one says that the word ends."""
    table = byte_symbols()
    symbols = [table[byte] for byte in word.encode("utf-8", "replace")]
    return [*symbols[:-1], symbols[-1] + WORD_END]


def merge_pair(symbols: Sequence[str], pair: Pair) -> list[str]:
    """Join every occurrence of two neighbours, from the left."""
    merged: list[str] = []
    index = 0
    while index < len(symbols):
        joined = tuple(symbols[index : index + 2]) == pair
        merged.append(pair[0] + pair[1] if joined else symbols[index])
        index += 2 if joined else 1
    return merged


class Tokenizer:
    """Phrases to ids.

    Attributes:
        ids: id of every token.
        size: rows that the embedding table needs.
    """

    def __init__(self, ids: dict[str, int], merges: Sequence[Pair], source: str = "vocabulary"):
        """Check that every word can be encoded.

        Args:
            ids: id of every token, the special ones included.
            merges: pairs of tokens, those that are joined first in front.
            source: where they come from, for messages.

        Raises:
            CheckpointError: tokens are missing.
        """
        missing = [token for token in vocabulary(merges) if token not in ids]
        if missing:
            raise CheckpointError(
                f"{source}: no vocabulary of CLIP's kind, {len(missing)} tokens are missing, such "
                f"as {', '.join(map(repr, missing[:3]))}. {ADVICE}"
            )
        self.ids = ids
        self.size = max(ids.values()) + 1
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._words: dict[str, list[int]] = {}

    def __call__(self, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`input_ids` and `attention_mask`, both i64 [P, 32].

        The mask is "id is not 0", as in the official model.

        Raises:
            DataError: an empty phrase.
        """
        rows = [self._row(phrase) for phrase in phrases]
        input_ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, CONTEXT)
        return input_ids, (input_ids != PAD).long()

    def encode(self, phrase: str) -> list[int]:
        """The ids of a phrase, without start, end and padding, and of any length."""
        return [id_ for word in WORDS.findall(clean(phrase)) for id_ in self._word(word)]

    def too_long(self, phrases: Iterable[str]) -> list[str]:
        """The phrases of which the end is cut off."""
        return [phrase for phrase in phrases if len(self.encode(phrase)) > CONTEXT - 2]

    def _row(self, phrase: str) -> list[int]:
        ids = self.encode(phrase)[: CONTEXT - 2]
        if not ids:
            raise DataError(f"phrase {phrase!r} is empty: name what to look for, such as 'red car'")
        row = [self.ids[START], *ids, self.ids[END]]
        return row + [PAD] * (CONTEXT - len(row))

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            self._words[word] = [self.ids[token] for token in self._merged(word)]
        return self._words[word]

    def _merged(self, word: str) -> list[str]:
        """Join the pair of lowest rank until none is left."""
        symbols = word_symbols(word)
        while len(symbols) > 1:
            pair = min(
                pairwise(symbols),
                key=lambda pair: self._ranks.get(pair, len(self._ranks)),
            )
            if pair not in self._ranks:
                break
            symbols = merge_pair(symbols, pair)
        return symbols


# -- files ---------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a vocabulary.

    Args:
        path: `bpe_simple_vocab_16e6.txt.gz`, a text of the same form, or a `tokenizer.json`; or a
            model folder with one of them (our own small one is `vocabulary.txt` there), or with
            `vocab.json` and `merges.txt`.

    Raises:
        ConfigError: there is none.
        CheckpointError: a file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return _from_tokenizer_json(path) if path.suffix == ".json" else _from_merges(path)
    if not path.is_dir():
        raise ConfigError(f"tokenizer: {path.absolute()} does not exist. {ADVICE}")
    if (path / "tokenizer.json").is_file():
        return _from_tokenizer_json(path / "tokenizer.json")
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _from_vocab_and_merges(path)
    for name in (OFFICIAL_FILE, SMALL_FILE):
        if (path / name).is_file():
            return _from_merges(path / name)
    raise ConfigError(
        f"tokenizer: {path.absolute()} has no tokenizer.json, no vocab.json with merges.txt and no "
        f"{OFFICIAL_FILE}. {ADVICE}"
    )


def vocabulary(merges: Sequence[Pair]) -> dict[str, int]:
    """CLIP's numbering: 256 bytes, the same at the end of a word, the merges, start and end."""
    symbols = byte_symbols().values()
    tokens = [*symbols, *(one + WORD_END for one in symbols)]
    tokens += [left + right for left, right in merges]
    return {token: id_ for id_, token in enumerate([*tokens, START, END])}


def _from_merges(path: Path) -> Tokenizer:
    lines = _text(path).split("\n")[1 : MERGES + 1]  # the first line is a heading
    merges = _pairs([line for line in lines if line], path)
    return Tokenizer(vocabulary(merges), merges, str(path))


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    lines = _text(folder / "merges.txt").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    ids = _ids(_json(folder / "vocab.json"), folder / "vocab.json")
    merges = _pairs([line for line in lines if line], folder / "merges.txt")
    return Tokenizer(ids, merges, str(folder))


def _from_tokenizer_json(path: Path) -> Tokenizer:
    content = _json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise CheckpointError(
            f"{path}: no byte-pair tokenizer ('model' without 'merges'). {ADVICE}"
        )
    ids = _ids(model.get("vocab"), path)
    return Tokenizer(ids, _pairs(model["merges"], path), str(path))


def _ids(values: object, path: Path) -> dict[str, int]:
    if not isinstance(values, dict) or not all(
        type(id_) is int and 0 <= id_ < 2**20 for id_ in values.values()
    ):
        raise CheckpointError(f"{path}: expected a table of tokens and their whole numbers")
    return values


def _pairs(entries: Sequence[object], path: Path) -> list[Pair]:
    """Merges, each "left right" or [left, right]."""
    pairs: list[Pair] = []
    problems: list[str] = []
    for number, entry in enumerate(entries, start=1):
        parts = entry.split() if isinstance(entry, str) else entry
        if isinstance(parts, list) and len(parts) == 2 and all(isinstance(p, str) for p in parts):
            pairs.append((parts[0], parts[1]))
        else:
            problems.append(f"{path}: merge {number} is {str(entry)[:40]!r}, expected two tokens")
    if problems:
        raise CheckpointError(listing(problems, limit=3))
    return pairs


def _json(path: Path) -> object:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: no JSON ({error})") from None


def _text(path: Path) -> str:
    """A text file, unpacked where its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise CheckpointError(f"{path} has more than 64 MB: that is no vocabulary")
        return data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {ADVICE}") from None


# -- small vocabularies --------------------------------------------------------------------------


def learn_merges(phrases: Iterable[str]) -> list[Pair]:
    """The merges that make every word of these phrases one token, the most frequent pair first.

    Sennrich et al. 2016, algorithm 1, run until nothing is left to merge; of equally frequent pairs
    the first in the alphabet.
    """
    words = sorted({word for phrase in phrases for word in WORDS.findall(clean(phrase))})
    pieces = [word_symbols(word) for word in words]
    merges: list[Pair] = []
    while True:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [merge_pair(piece, best) for piece in pieces]


def write_vocabulary(path: Path, merges: Sequence[Pair]) -> None:
    """Write a vocabulary that `load_tokenizer` reads, in the form of CLIP's."""
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
