"""SigLIP 2 from a model folder of transformers: texts to vectors (pictures: `siglip_images`).

    config.json  model.safetensors  tokenizer.json      preprocessor_config.json for pictures

Both kinds of folder are read: `siglip` with pictures of one size, such as siglip2-base-patch16-512,
and `siglip2` (NaFlex). Nothing is downloaded, and no code of the folder runs.

Texts are treated as in SigLIP 2's training: lower case, Gemma's tokens, `<eos>`, then `<pad>` up to
the 64 positions of the tower, without an attention mask; the vector is that of the last position.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base_file import (
    WEIGHTS,
    no_model_folder,
    read_settings,
    refuse_misfit,
    refuse_nan,
)
from lora_core.errors import CheckpointError, DataError, one_line
from lora_core.tensor_file import open_checkpoint, read_safetensors
from scenesplat_lora.language.class_texts import TextEmbeddings, text_embeddings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = {"siglip": "Siglip", "siglip2": "Siglip2"}  # model_type -> begin of transformers' classes
TEMPLATE = "this is a {label}"  # SceneSplat's prompt
LARGEST_TOKENIZER = 200_000_000  # bytes; Gemma's has 34 million
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class TextTower:
    """The text half of a SigLIP 2 model, in float32.

    Attributes:
        positions: tokens of a text with its end and padding; 64.
    """

    folder: Path
    model: nn.Module
    tokenizer: Tokenizer
    positions: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token numbers of texts, int64 [P, positions]."""
        end, pad = (_token(self.tokenizer, name, self.folder) for name in ("<eos>", "<pad>"))
        found = self.tokenizer.encode_batch([t.lower() for t in texts], add_special_tokens=False)
        rows, cut = [], []
        for text, encoded in zip(texts, found, strict=True):
            ids = encoded.ids[: self.positions - 1]
            if len(ids) < len(encoded.ids):
                cut.append(text)
            rows.append([*ids, end, *[pad] * (self.positions - 1 - len(ids))])
        if cut:
            warnings.warn(
                f"{len(cut)} texts have more than {self.positions - 1} tokens and are cut: "
                f"{one_line(cut[0][:80])!r} ...",
                stacklevel=2,
            )
        return torch.tensor(rows, dtype=torch.long).reshape(-1, self.positions)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts as they are, float32 [P, D] on the CPU."""
        parts = []
        with torch.inference_mode():
            for begin in range(0, len(texts), TEXTS_AT_ONCE):
                ids = self.tokens(texts[begin : begin + TEXTS_AT_ONCE]).to(self.device)
                pooled = self.model(input_ids=ids).pooler_output
                parts.append(F.normalize(pooled.float(), dim=1).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    @property
    def width(self) -> int:
        """D, channels of a vector."""
        return int(self.model.head.out_features)  # type: ignore[union-attr, arg-type]

    def embed_names(self, names: Sequence[str], template: str = TEMPLATE) -> TextEmbeddings:
        """Embeddings of class names, each put into a prompt.

        Raises:
            DataError: no names, one that stands twice, or a template without `{label}`.
        """
        return text_embeddings(names, self.embed(prompts(names, template)))


def embed_texts(
    folder: str | Path,
    texts: Sequence[str],
    template: str = TEMPLATE,
    device: torch.device | str = "cpu",
) -> TextEmbeddings:
    """Embeddings of class names by the text tower in `folder`.

    Reads the folder each time: who asks often keeps `open_text_tower`'s result.

    Args:
        template: `{label}` in it is replaced by each text; "{label}" takes texts as they are.

    Raises:
        CheckpointError: no SigLIP 2 folder, or a damaged one.
        DataError: no texts, one that stands twice, or a template without `{label}`.
    """
    prompts(texts, template)  # what is wrong with them is told before weights are read
    return open_text_tower(folder, device).embed_names(texts, template)


def prompts(names: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """Each name in the place of `{label}`.

    Raises:
        DataError: a template without it.
    """
    if "{label}" not in template:
        raise DataError(f"the template is {one_line(template)!r}: it needs {{label}} for the name")
    return [template.replace("{label}", name) for name in names]


def open_text_tower(folder: str | Path, device: torch.device | str = "cpu") -> TextTower:
    """The text tower in a model folder, in evaluation mode.

    Raises:
        CheckpointError: no SigLIP 2 folder, or a damaged one.
    """
    folder = Path(folder)
    settings = model_settings(folder)
    tokenizer = read_tokenizer(folder)
    model = read_tower(folder, settings, "text").to(device)
    return TextTower(folder, model, tokenizer, int(model.config.max_position_embeddings))  # type: ignore[union-attr, arg-type]


# -- the folder ------------------------------------------------------------------------------------


def model_settings(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        CheckpointError: no folder of a SigLIP model, or weights are not in one safetensors file.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.absolute()}: no such folder: give the folder of a SigLIP 2 model, such as a "
            "download of google/siglip2-base-patch16-512"
        )
    if not (folder / "config.json").exists() or not (folder / WEIGHTS).exists():
        raise no_model_folder(folder, f"config.json and {WEIGHTS}")
    settings = read_settings(folder / "config.json")
    if settings.get("model_type") not in KINDS:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {settings.get('model_type')!r}, expected "
            f"{' or '.join(KINDS)}: SceneSplat's features are those of SigLIP 2"
        )
    return settings


def read_tower(folder: Path, settings: dict[str, Any], part: str) -> nn.Module:
    """One tower, "text" or "vision", in float32 and evaluation mode.

    Raises:
        CheckpointError: weights that do not fit the settings, are damaged or not finite.
    """
    from lora_core.preflight import torchvision

    torchvision()
    import transformers

    kind = KINDS[settings["model_type"]]
    try:
        config = getattr(transformers, f"{kind}Config")(
            **{f"{name}_config": settings.get(f"{name}_config") for name in ("text", "vision")}
        )
        with torch.device("meta"):  # initial values, of 200 million weights, would take seconds
            tower = getattr(transformers, f"{kind}{part.title()}Model")(
                getattr(config, f"{part}_config")
            )
    except Exception as error:  # transformers has no class of its own for bad settings
        reason = one_line(str(error))[:200]
        raise CheckpointError(
            f"{folder / 'config.json'}: no settings of {kind}: {reason}"
        ) from None
    _load(tower, folder / WEIGHTS, f"{part}_model.")
    _number_positions(tower)
    return tower.eval().requires_grad_(False)


def _load(tower: nn.Module, path: Path, prefix: str) -> None:
    """Take the tower's tensors from a file that holds those of the other tower too."""
    wanted = {prefix + name.removeprefix(prefix): t for name, t in tower.state_dict().items()}
    header, _ = read_safetensors(path, device="meta")
    held = {name: tensor for name, tensor in header.items() if name.startswith(prefix)}
    extra = sorted(held.keys() - wanted.keys() - {f"{prefix}embeddings.position_ids"})
    refuse_misfit(path, f"the settings in {path.parent}", held, wanted, extra)
    with safetensors.safe_open(path, framework="pt") as file:
        state = {
            name: file.get_tensor(prefix + name.removeprefix(prefix)).float()
            for name in tower.state_dict()
        }
    refuse_nan(path, state)
    tower.load_state_dict(state, assign=True)


def _number_positions(tower: nn.Module) -> None:
    """Fill the buffers that no file holds: 0, 1, 2 ..., the numbers of the positions."""
    for name, buffer in list(tower.named_buffers()):
        if not name.endswith("position_ids"):
            raise RuntimeError(f"transformers has a new buffer {name} in its SigLIP")
        home, _, own = name.rpartition(".")
        tower.get_submodule(home).register_buffer(
            own, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False
        )


def read_tokenizer(folder: Path) -> Tokenizer:
    """Gemma's tokenizer, as tokenizer.json has it, without padding.

    Read by the library itself: which class transformers puts around it, and what that adds, depends
    on the version.

    Raises:
        CheckpointError: missing, damaged, or another tokenizer.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        raise no_model_folder(folder, "tokenizer.json")
    with open_checkpoint(path, LARGEST_TOKENIZER) as file:
        data = file.read()
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(
            f"{path} is no tokenizer of the library tokenizers: {one_line(str(error))[:200]}"
        ) from None
    for name in ("<eos>", "<pad>"):
        _token(tokenizer, name, folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "<eos>" in a class name is text
    return tokenizer


def _token(tokenizer: Tokenizer, name: str, folder: Path) -> int:
    number = tokenizer.token_to_id(name)
    if number is None:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has no {name}: it is not that of SigLIP 2 (SigLIP 1 has "
            "another one, and other vectors)"
        )
    return int(number)
