"""Where an adapter comes from: the base it was trained on, the programs and settings that made it.

It is kept inside the adapter's file, and for people in a model card beside it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.adapters.layout import file_prefix
from lora_core.layers import AdapterSpec, LoraLayer

PACKAGES = ("lora-core", "torch", "transformers", "accelerate", "peft", "safetensors", "numpy")
SAMPLES = 256  # values of each weight that tell one base from another


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that computed an adapter, as far as installed.

    The packages that stand on lora_core and run in this process are among them.
    """
    own = {name.replace("_", "-") for name in sys.modules if re.fullmatch(r"\w+_lora", name)}
    found = {"python": platform.python_version()}
    for name in sorted({*PACKAGES, *own}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: str | Path = ".") -> str | None:
    """The commit that the git repository around a folder is at; None outside of one.

    Read from git's files: the program itself would run filters and hooks that a repository names.
    """
    start = Path(folder).absolute()
    for place in (start, *start.parents):
        try:
            head = (place / ".git" / "HEAD").read_text("utf-8").strip()
            reference = head.removeprefix("ref: ")
            if reference == head:
                return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None
            return _resolve(place / ".git", reference)
        except (OSError, ValueError):
            continue
    return None


def _resolve(git: Path, reference: str) -> str | None:
    """The commit of a branch, from its own file or from the packed ones."""
    if not re.fullmatch(r"refs/[\w./-]+", reference) or ".." in reference:
        return None
    lines = [git / reference, git / "packed-refs"]
    text = "\n".join(path.read_text("utf-8") for path in lines if path.is_file())
    found = re.search(rf"(?m)^([0-9a-f]{{40,64}})( {re.escape(reference)})?$", text)
    return found[1] if found else None


def base_print(
    model: nn.Module, specs: Mapping[str, AdapterSpec], paths: Mapping[str, str]
) -> str | None:
    """A short digest of the base's weights under an adapter, the same in fp64, fp32 and bf16.

    It is made of some values of each adapted weight, rounded to bf16, so that it costs next to
    nothing. None where they cannot be seen: on the meta device, merged without a copy; and in fp16,
    from where one value in sixteen is rounded to another bf16 than from fp32.

    Args:
        specs: live path -> the adapter there. paths: live path -> path in the file.
    """
    digest = hashlib.sha256()
    for live in sorted(specs, key=lambda live: file_prefix(model, live, paths)):
        for name in specs[live].weight_names:
            weight = _unmerged(model.get_submodule(live), name)
            if weight is None or weight.is_meta or weight.dtype == torch.float16:
                return None
            weight = weight.detach()
            if hasattr(weight, "full_tensor"):  # a shard: every rank has to call this
                weight = weight.full_tensor()
            values = weight.reshape(-1)[:: max(1, weight.numel() // SAMPLES)][:SAMPLES]
            digest.update(f"{file_prefix(model, live, paths)} {tuple(weight.shape)} ".encode())
            digest.update(values.float().bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _unmerged(module: nn.Module, name: str) -> torch.Tensor | None:
    if isinstance(module, LoraLayer) and module.lora_merged:
        return (module.lora_kept or {}).get(name)
    return module._parameters[name]


def card(
    record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], notes: Sequence[str]
) -> str:
    """The model card: what the adapter is, what it was made from and with, what PEFT gets wrong."""
    config, made = record["config"], record["extra"]["made"]
    values = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        "---\nlibrary_name: peft\ntags:\n- lora\n---",
        "# LoRA adapter",
        f"Rank {config['r']}, alpha {config['lora_alpha']}, on {len(record['extra']['layers'])} "
        f"layers: {len(tensors)} tensors with {values} values.",
        *notes,
        "## Facts",
        _block(record["metadata"]),
        "## Made with",
        _block(made),
    ]
    return "\n\n".join(lines) + "\n"


def _block(value: Any) -> str:
    """JSON as a block of code that no value can end, and that holds no markup."""
    text = json.dumps(value, indent=2, sort_keys=True)
    for sign in "`<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f"```json\n{text}\n```"
