"""The base model as it lies on disk or on the hub: finding it, reading it, checking what it holds.

What every package needs around its own knowledge of names and sizes. Nothing is downloaded unless
`from_hub` is called, and nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.errors import CheckpointError
from lora_core.report import plural, say
from lora_core.tensor_file import open_checkpoint, read_safetensors, read_torch

SUFFIXES = frozenset({".pt", ".pth", ".torch", ".safetensors"})
SETTINGS_LIMIT = 10_000_000  # bytes of a model's settings
WEIGHTS = "model.safetensors"  # in a model folder of transformers
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?")


@dataclass(frozen=True)
class Base:
    """Where a network's frozen weights came from; a package adds what else its file holds."""

    path: Path  # absolute
    name: str  # without folders; of a hub id with the revision: see `lasting_name`
    format: str  # how the file packs its tensors
    variant: str  # published name, or "custom" for another size
    fingerprint: str | None  # of the weights; None: the values were not read


# -- finding -------------------------------------------------------------------------------------


def find_local(
    name: str | Path, folders: Sequence[Path] = (), where_to_get: str = ""
) -> Path | None:
    """The file or folder that a name means; None for a hub id. No network.

    Only a name like `facebook/sam3` (or with `@revision`) that is no local path is a hub id.

    Args:
        folders: where a bare file name is looked for besides the working directory.
        where_to_get: end of the message when it is nowhere.

    Raises:
        CheckpointError: nothing there; lists the places tried.
    """
    path = Path(name)
    places = [folder / path for folder in folders] if path.name == str(name) else []
    for place in (path, *places):
        if os.path.exists(place):  # False also for a name that is too long
            return place
    if _HUB_ID.fullmatch(str(name)) and path.suffix not in SUFFIXES:
        return None
    tried = ", ".join(str(place.absolute()) for place in (path, *places))
    raise CheckpointError(f"no checkpoint {name}: looked at {tried}{where_to_get}")


def from_hub(name: str, files: Sequence[str]) -> Path:
    """The folder of a hub id in the hub's cache, downloaded where it is not there yet.

    Args:
        name: `owner/model`, or with `@revision`.
        files: patterns of the files that are needed; `WEIGHTS` among them is checked.

    Raises:
        CheckpointError: the hub gave none, or the cache has other bytes than the hub.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=list(files))
        )
    except Exception as error:  # network, rights, unknown name: all end the same way
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: no such local folder, and the hub gave none ({type(error).__name__}: {first})"
        ) from error
    _check_blob(folder / WEIGHTS)
    if revision != folder.name:
        say(f"{name} is now {repository}@{folder.name}: with this name it stays the same model")
    return folder


def _check_blob(path: Path) -> None:
    """Compare a file in the hub's cache with its SHA-256, by which the cache names it."""
    name = path.resolve().name
    if not path.is_file() or not re.fullmatch("[0-9a-f]{64}", name):
        return  # the reader says what is missing; without links the cache has no such names
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != name:
        raise CheckpointError(
            f"{path} is not what the hub has: its SHA-256 is {found}, expected {name}. Delete "
            f"{path.resolve()} to download it again"
        )


def lasting_name(name: str | Path, path: Path) -> str:
    """What to call a base that was asked for as `name` and found at `path`.

    The file's own name, or for a hub id the revision that was taken: the newest one changes.
    """
    if path.name == Path(name).name:
        return path.name
    return f"{str(name).partition('@')[0]}@{path.name}"


# -- reading -------------------------------------------------------------------------------------


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], str]:
    """The state dict of a file, and its packing: "pt" (`{"model": ...}`), "flat", "safetensors".

    Args:
        device: "cpu", or "meta": names, shapes and dtypes only, without reading the values.

    Raises:
        CheckpointError: missing, damaged, holding more than tensors, an adapter, or something else.
    """
    if path.suffix == ".safetensors":
        tensors, _ = read_safetensors(path, device=device)
        return dict(sorted(tensors.items())), "safetensors"  # else unordered
    content = read_torch(path, device=device)
    if isinstance(content, dict) and {"format", "tensors"} <= content.keys():
        raise CheckpointError(
            f"{path} is a LoRA adapter, not a base model: pass it as --adapter, and as base the "
            "checkpoint that it was trained on"
        )
    kind = "pt" if isinstance(content, dict) and isinstance(content.get("model"), dict) else "flat"
    state = content["model"] if kind == "pt" else content
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        entries = content if isinstance(content, dict) else {type(content).__name__: None}
        raise CheckpointError(
            f'{path}: expected a state dict, or {{"model": state dict}}; found: '
            f"{', '.join(map(str, list(entries)[:5]))}"
        )
    return dict(state), kind


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a model's settings file.

    Raises:
        CheckpointError: missing, too large, no JSON, or no object.
    """
    try:
        with open_checkpoint(path, SETTINGS_LIMIT) as file:
            content = json.loads(file.read().decode("utf-8-sig"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path} is no readable JSON: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def no_model_folder(folder: Path, needs: str) -> CheckpointError:
    """The error for a folder without the files of a model: what is there, and what that may be.

    Args:
        needs: the files that are looked for, also the list of shards if these are read.
    """
    there = sorted(entry.name for entry in folder.iterdir())
    text = f"{folder.absolute()}: a model folder needs {needs}; here is: "
    text += ", ".join(there[:8]) or "nothing"
    if "adapter_config.json" in there:
        text += ". This is a LoRA adapter: pass it as --adapter, and its base in its place"
    if any(name.endswith(".index.json") for name in there) and ".index.json" not in needs:
        text += ". Models in several shards are not read: save it as one model.safetensors"
    if "pytorch_model.bin" in there:
        text += ". Pickled weights are not read: save them as model.safetensors"
    return CheckpointError(text)


# -- checking ------------------------------------------------------------------------------------


def refuse_misfit(
    path: Path,
    model: str,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    unexpected: Iterable[str],
    spelled: Callable[[str], str] = str,
    hint: str = "",
) -> None:
    """Compare the tensors of a file with those that its model must have.

    Args:
        model: what they are compared with, for the message.
        found, wanted: by the same names; meta tensors do.
        unexpected: what else the file holds, as the file has it.
        spelled: one of these names -> as the file has it.
        hint: a further line.

    Raises:
        CheckpointError: counts and the first names that are missing, unexpected or of another
            shape.
    """
    unexpected = list(unexpected)
    missing = [spelled(name) for name in wanted if name not in found]
    shapes = [
        f"{spelled(name)} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if not (missing or unexpected or shapes):
        return
    matched = len(wanted) - len(missing) - len(shapes)
    lines = [f"{path}: {matched} of {len(wanted)} tensors matched {model}"]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
        if names:
            lines.append(f"  {len(names)} {what}: {some(names)}")
    raise CheckpointError("\n".join([*lines, hint] if hint else lines))


def refuse_nan(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for values that are not finite, naming the first tensors with any."""
    # A sum is finite only if all its terms are, and takes a fortieth of the time.
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and not tensor.sum().isfinite()
        and not tensor.isfinite().all()  # finite terms may overflow
    ]
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinite values in {plural(len(bad), 'tensor')} ({some(bad)}): copy "
            "or download it again"
        )


def refuse_other_base(
    adapter: str | Path, metadata: Mapping[str, Any], here: str, fingerprint: str | None
) -> None:
    """Refuse an adapter that was trained on other weights; without a record there is no check.

    Args:
        metadata: of the adapter, with `{"base": {"file", "variant", "fingerprint"}}`.
        here: the base that is loaded, for the message.
        fingerprint: of its weights; None: they were not read.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    trained = metadata.get("base")
    if not isinstance(trained, Mapping) or fingerprint is None:
        return
    if trained.get("fingerprint") in (None, fingerprint):
        return
    raise CheckpointError(
        f"{adapter} was trained on {trained.get('file')} ({trained.get('variant')}), whose weights "
        f"differ from those of {here}: pass its own base as --checkpoint"
    )


def recorded_size(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) in pixels that an adapter was trained at, where its metadata says so."""
    size = metadata.get("image_size")
    if isinstance(size, Sequence) and len(size) == 2 and all(type(n) is int for n in size):
        return size[0], size[1]
    return None


def some(items: Sequence[str], limit: int = 5) -> str:
    """The first few items, for a message."""
    return ", ".join(items[:limit])
