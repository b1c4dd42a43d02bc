"""The folder of a merged model, all but its weights: what is copied from the base, what is added.

the base's files      as they are; its Python files are copied and not executed
depth.json            of the adapter, or of a base that was merged with one
README.md             the base's model card, and what was merged, with the licences
lora_merge.json       the adapters that are in the weights, and the files that merge has written
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from isaac_lora import official
from isaac_lora.adapter_files import DEPTH_LICENCE, Adapter
from isaac_lora.depth import settings as depth_settings
from isaac_lora.depth.settings import DepthSettings, differences, read_depth_settings
from lora_core import base_file
from lora_core.adapters.origin import versions
from lora_core.cache import fingerprint
from lora_core.errors import CheckpointError, ConfigError, listing, one_line
from lora_core.merged_file import refuse_inputs
from lora_core.tensor_file import atomic_write, write_json
from lora_core.weight_files import read_weights

MARK = "lora_merge.json"
CARD = "README.md"
# Copies of the base's weights in other formats, which would not be those of the merged model.
WEIGHTS = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".torch", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"]
)
LIST_OF_SHARDS = ".index.json"
LICENCE = (
    "These weights are made from those of Isaac, which are under Perceptron's own non-production "
    "licence, and so are these."
)


# -- what is refused -------------------------------------------------------------------------------


def refuse_output(output: Path, overwrite: bool, base: Path, adapter: Path) -> None:
    """Never write over what is read, nor over anything but an earlier merge, and that only asked.

    Raises:
        ConfigError: it would.
        CheckpointError: the earlier merge's list of files is damaged.
    """
    refuse_inputs(output, overwrite, base, adapter)
    if not os.path.lexists(output):
        return
    own = _own_files(output)
    if own is None:
        strange = [f"no {MARK} in it"]
    else:
        strange = sorted(str(path) for path in _files(output, hidden=True) if str(path) not in own)
    if strange:
        raise ConfigError(
            f"{output.absolute()} was not written by merge alone ({one_line(strange[0])}) and is "
            "not replaced: choose another --output, or remove it first"
        )


def _own_files(output: Path) -> set[str] | None:
    """The files that an earlier merge says it has written; None: there was none."""
    if not (output / MARK).is_file():
        return None
    return {MARK, *map(str, read_mark(output).get("files", ()))}


def refuse_history(base: Path, adapter: Adapter) -> None:
    """Refuse what an earlier merge into the base contradicts.

    Raises:
        ConfigError: the adapter is in the base's weights already.
        CheckpointError: the base was merged with an adapter of other depth.
    """
    if _identity(adapter) in [one["fingerprint"] for one in adapters_in(base)]:
        raise ConfigError(
            f"{adapter.path} is merged into {base} already ({MARK} there): give the base that it "
            "was trained on"
        )
    before = read_depth_settings(base)
    if before and adapter.depth and (different := differences(adapter.depth, before)):
        raise CheckpointError(
            f"{base} holds an adapter of other depth than {adapter.path}:\n{listing(different)}"
        )


# -- what merges say of themselves -----------------------------------------------------------------


def read_mark(folder: Path) -> dict[str, Any]:
    """What `lora_merge.json` in a folder says; empty: there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / MARK
    if not path.is_file():
        return {}
    content = base_file.read_settings(path)
    adapters, files = content.get("adapters"), content.get("files")
    lists = isinstance(adapters, list) and isinstance(files, list)
    entries = adapters if isinstance(adapters, list) else []
    if not lists or not all(isinstance(one, dict) and "fingerprint" in one for one in entries):
        raise CheckpointError(f"{path} is damaged: copy the folder again, or merge again")
    return content


def adapters_in(folder: Path) -> list[dict[str, Any]]:
    """The adapters in the weights of a model folder, in the order of their merges."""
    return list(read_mark(folder).get("adapters", ()))


def _identity(adapter: Adapter) -> str:
    return fingerprint(adapter.file.tensors)


# -- the base's files ------------------------------------------------------------------------------


def _files(folder: Path, hidden: bool = False) -> Iterator[Path]:
    """Yield the files of a folder and of those in it, relative to it."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if hidden or not name.startswith(".")]
        for name in sorted(names):
            if hidden or not name.startswith("."):
                yield Path(place, name).relative_to(folder)


def others(base: Path) -> tuple[list[Path], list[Path]]:
    """(what is copied, what is left out) of a base besides the weights that are read."""
    found = official.find_weights(base)
    read = {path.name for path in found.files} | ({official.INDEX} if found.index else set())
    copied, left = list[Path](), list[Path]()
    for path in _files(base):
        if str(path) in read or str(path) == MARK:
            continue
        weights = path.suffix in WEIGHTS or path.name.endswith(LIST_OF_SHARDS)
        (left if weights else copied).append(path)
    return copied, left


def bytes_of(base: Path, dtype: str) -> int:
    """Bytes that a merged model takes on the disk, at most.

    Raises:
        CheckpointError: no weights, or damaged headers.
    """
    weights = read_weights(official.find_weights(base), device="meta").values()
    numbers = sum(t.numel() * (t.itemsize if dtype == "keep" else 4) for t in weights)
    return numbers + sum((base / path).stat().st_size for path in others(base)[0]) + 1_000_000


def write_rest(base: Path, adapter: Adapter, folder: Path) -> list[str]:
    """Put everything but the weights into a folder; returns the names of what was left out.

    Links are followed, as a hub's cache has them.

    Raises:
        CheckpointError: it cannot be written.
    """
    copied, left = others(base)
    for path in copied:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / path).exists():  # config.json may have been written with another dtype
            shutil.copyfile(base / path, folder / path)
    if adapter.depth is not None:
        depth_settings.write_depth_settings(folder, adapter.depth)
    _write_text(folder / CARD, card(base, adapter))
    entry = {
        "name": adapter.path.name,
        "fingerprint": _identity(adapter),
        "trained": adapter.file.metadata,
    }
    said = {
        "adapters": [*adapters_in(base), entry],
        "made": versions(),
        "files": sorted(map(str, _files(folder))),
    }
    write_json(folder / MARK, said)
    return [str(path) for path in left]


# -- the model card --------------------------------------------------------------------------------


def card(base: Path, adapter: Adapter) -> str:
    """The base's model card, and behind it what was merged and the licences."""
    path = base / CARD
    before = path.read_text("utf-8", "replace").rstrip() if path.is_file() else "# Isaac"
    lines = [
        before,
        "## Merged LoRA",
        f"An adapter of rank {adapter.r} and alpha {adapter.alpha:g} is part of these weights; "
        f"`{MARK}` says which.",
        *_remarks(adapter.depth),
    ]
    return "\n\n".join(lines) + "\n"


def _remarks(depth: DepthSettings | None) -> Iterable[str]:
    if depth is None:
        return [LICENCE]
    return [
        f"It was trained with depth from {depth.checkpoint} ({depth.model}): load the folder with "
        "`IsaacForConditionalGeneration.from_pretrained(folder, depth_checkpoint_path=...)`; "
        f"`{depth_settings.FILE}` has the other settings of depth.",
        LICENCE,
        DEPTH_LICENCE,
    ]


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
