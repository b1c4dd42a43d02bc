"""Isaac's processor: texts and pictures to what the model's `forward` and `generate` take.

processor = IsaacProcessor.from_pretrained("./isaac_model")
inputs = processor.apply_chat_template(
    [{"role": "user", "content": "<image>What is nearest?"}],
    images=[picture], add_generation_prompt=True, tokenize=True,
)
print(processor.decode(model.generate(**inputs)[0]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from isaac_lora.batches import Side, collate_padded
from isaac_lora.conversations.messages import Message, turns_of
from isaac_lora.conversations.pictures import read_picture
from isaac_lora.conversations.records import IMAGE
from isaac_lora.conversations.samples import Sample, assemble, with_pictures
from isaac_lora.conversations.template import Rendered, render, render_text
from isaac_lora.conversations.tokenizer_files import check_tokenizer, image_id, load_tokenizer
from isaac_lora.conversations.tokens import encode
from isaac_lora.pictures.pixels import normalise
from isaac_lora.pictures.target_size import PictureRules, patch_grid
from lora_core.base_file import read_settings
from lora_core.errors import CheckpointError, ConfigError, DataError, near, one_line
from lora_core.pictures.files import Picture, rgb_of
from lora_core.pictures.survey import digest_of
from lora_core.report import plural

SETTINGS_FILE = "processor_config.json"
# What it is called here -> in the model's config.json, and what it is where that does not say.
SETTINGS: dict[str, tuple[str, Any]] = {
    "vision_token": ("vision_token", IMAGE),
    "patch_size": ("video_patch_size", 16),
    "max_num_patches": ("vision_max_num_patches", 256),
    "min_num_patches": ("vision_min_num_patches", None),
    "pixel_shuffle_scale": ("pixel_shuffle_scale", 1),
}
Source = Picture | str | Path  # of a picture


class IsaacProcessor(ProcessorMixin):
    """Tokenizer, chat template, and the rules by which pictures become patches.

    Args:
        tokenizer: Qwen's byte-level BPE with ChatML's control tokens.
        chat_template: in place of the tokenizer's.
        vision_token: what stands in a text where a picture is.
        patch_size, max_num_patches, min_num_patches, pixel_shuffle_scale: see `PictureRules`; the
            defaults are those of Isaac-0.1.

    Raises:
        CheckpointError: another kind of tokenizer. ConfigError: settings that cannot work.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        vision_token: str = IMAGE,
        patch_size: int = 16,
        max_num_patches: int = 6144,
        min_num_patches: int | None = 256,
        pixel_shuffle_scale: int = 2,
    ) -> None:
        if not isinstance(vision_token, str) or not vision_token.strip():
            raise ConfigError(f"vision_token is {vision_token!r}: expected text")
        check_tokenizer(tokenizer)
        super().__init__(tokenizer)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.rules = PictureRules(patch_size, max_num_patches, min_num_patches, pixel_shuffle_scale)
        self.vision_token = vision_token
        # `save_pretrained` writes the attributes that have the names of the arguments.
        self.patch_size, self.pixel_shuffle_scale = patch_size, pixel_shuffle_scale
        self.max_num_patches, self.min_num_patches = max_num_patches, min_num_patches
        self.image_id = image_id(tokenizer)  # stands at places of pictures

    @property
    def chat_template(self) -> Any:
        """The tokenizer's: what conversations are written with."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        if "tokenizer" in vars(self):  # transformers sets None before there is one
            self.tokenizer.chat_template = template

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> IsaacProcessor:
        """Load the processor of a model folder, or of one that `save_pretrained` has written.

        The model's `config.json` counts where it is there: model and processor must agree.

        Args:
            settings: in place of those in the files.

        Raises:
            CheckpointError: no settings or no tokenizer there, or damaged ones.
            ConfigError: a setting of another name, or one that cannot work.
        """
        for name in settings:
            if name not in SETTINGS:
                guess = near(name, SETTINGS)
                raise ConfigError(f"{name}: expected one of {', '.join(SETTINGS)}; {guess}")
        found = _settings_of(Path(folder)) | settings
        return cls(load_tokenizer(folder), **found)

    # -- texts and pictures to inputs --------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Source | Sequence[Any] | None = None,
        *,
        padding_side: Side = "left",
        keep_pictures: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Texts, in which `vision_token` marks pictures and control tokens count, as a batch.

        Args:
            text: one or several, as a chat template has written them.
            images: in the order of the markers over all texts, or a list for each text: PIL
                pictures, uint8 [H, W, 3], paths, or data URIs.
            padding_side: left, as `generate` needs it.
            keep_pictures: give the pictures too, for depth.

        Returns:
            See `collate_padded`, without `labels`, and with `patches` float32 in -1..1.

        Raises:
            DataError: not as many pictures as markers, or one that cannot be read.
        """
        _check_tensors(return_tensors)
        texts = _texts(text, self.vision_token)
        rendered = [
            render_text(one, self.tokenizer, vision_token=self.vision_token) for one in texts
        ]
        return self._inputs(rendered, images, padding_side, keep_pictures)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        images: Source | Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        tokenize: bool = False,
        padding_side: Side = "left",
        keep_pictures: bool = False,
        return_tensors: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        """Conversations of messages {"role", "content"} as text, or with `tokenize` as a batch.

        Content is a text with `vision_token` for each picture, or a list of {"type": "text",
        "text": ...} and {"type": "image", "image": ...}; an item without its picture takes the
        next of `images`. With `tokenize`, control tokens in contents are plain text; in a text
        that is given to the processor afterwards they cannot be told from the template's.

        Args:
            enable_thinking: False: the prompt holds the empty thinking block already.

        Raises:
            DataError: messages of another form, a template that refuses them, or as `__call__`.
        """
        single = not conversation or isinstance(conversation[0], Mapping)
        chats: Any = [conversation] if single else conversation
        read = [turns_of(messages, self.vision_token) for messages in chats]
        rendered = [
            render(
                turns,
                self.tokenizer,
                vision_token=self.vision_token,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
            )
            for turns, _ in read
        ]
        if not tokenize:
            texts = [one.text for one in rendered]
            return texts[0] if single else texts
        _check_tensors(return_tensors)
        inside = [source for _, sources in read for source in sources]
        inputs = self._inputs(rendered, _one_way_only(inside, images), padding_side, keep_pictures)
        return inputs if return_dict else inputs["input_ids"]

    def _inputs(
        self,
        rendered: Sequence[Rendered],
        images: Source | Sequence[Any] | None,
        padding_side: Side,
        keep_pictures: bool,
    ) -> BatchFeature:
        counts = [len(one.images) for one in rendered]
        divided = _divided(images, counts, self.vision_token)
        samples = [
            self._sample(one, [_rgb(source) for source in sources], keep_pictures)
            for one, sources in zip(rendered, divided, strict=True)
        ]
        batch = collate_padded(
            samples,
            pad_id=self.tokenizer.pad_token_id,
            pixel_shuffle_scale=self.rules.pixel_shuffle_scale,
            padding_side=padding_side,
        )
        del batch["labels"]
        if "patches" in batch:
            batch["patches"] = normalise(batch["patches"])
        return BatchFeature(batch)

    def _sample(
        self, rendered: Rendered, pictures: Sequence[NDArray[np.uint8]], keep_pictures: bool
    ) -> Sample:
        grids = [patch_grid(p.shape[0], p.shape[1], self.rules) for p in pictures]
        pieces = encode(rendered, self.tokenizer)
        sample = assemble(pieces, grids, self.rules, self.image_id)
        return with_pictures(sample, pictures, self.rules, keep_pictures)

    def fingerprint(self) -> str:
        """Digest of all that the sequence of a conversation follows from, but its pictures."""
        parts = [self.vision_token, str(self.chat_template), repr(self.rules)]
        return digest_of(*parts, self.tokenizer.backend_tokenizer.to_str())

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of it."""
        return ["input_ids", "attention_mask", "position_ids", "image_mask", "patches", "grids"]


# -- settings and arguments ------------------------------------------------------------------------


def _settings_of(folder: Path) -> dict[str, Any]:
    """The processor's settings in the files of a folder.

    Raises:
        CheckpointError: neither file is there, or one is damaged.
    """
    config, own = folder / "config.json", folder / SETTINGS_FILE
    if config.is_file():
        written = read_settings(config)
        if "vision_patch_size" in written:  # the other name of the patch size
            written.setdefault("video_patch_size", written["vision_patch_size"])
        return {name: written.get(key, absent) for name, (key, absent) in SETTINGS.items()}
    if own.is_file():
        written = read_settings(own)
        return {name: written[name] for name in SETTINGS if name in written}
    raise CheckpointError(
        f"{one_line(folder.absolute())}: no config.json and no {SETTINGS_FILE}: give the folder of "
        "an Isaac model"
    )


def _texts(text: Any, vision_token: str) -> list[str]:
    """One or several texts.

    Raises:
        DataError: none, or something else.
    """
    texts = list(text) if isinstance(text, list | tuple) else [text]
    for one in texts:
        if not isinstance(one, str):
            raise DataError(
                f"text is {type(one).__name__}: expected text; call the processor with text=..., "
                f"images=...; a picture alone is the text {vision_token!r}"
            )
    return texts


def _check_tensors(return_tensors: str) -> None:
    if return_tensors != "pt":
        raise ConfigError(f"return_tensors is {return_tensors!r}: only 'pt', torch's tensors")


def _one_way_only(inside: list[Any], images: Any) -> Any:
    """The pictures that stand in messages, or those given beside; None in a message: the latter.

    Raises:
        DataError: both.
    """
    given = [source for source in inside if source is not None]
    if not given:
        return images
    if images is not None or len(given) < len(inside):
        raise DataError("pictures both in the messages and in images: expected one of the two")
    return given


def _divided(images: Any, counts: Sequence[int], vision_token: str) -> list[list[Source]]:
    """The pictures of each text.

    Raises:
        DataError: not as many as there are markers; names both numbers.
    """
    given = [] if images is None else images
    given = list(given) if isinstance(given, list | tuple) else [given]
    if given and all(isinstance(one, list | tuple) for one in given):
        found = [len(one) for one in given]
        if found != list(counts):
            raise DataError(
                f"{vision_token} markers of each text: {list(counts)}, images: {found}; expected "
                "equal numbers"
            )
        return [list(one) for one in given]
    if len(given) != sum(counts):
        raise DataError(
            f"{plural(sum(counts), f'{vision_token} marker')} in the text, but "
            f"{plural(len(given), 'image')}: expected equal numbers"
        )
    rest = iter(given)
    return [[next(rest) for _ in range(count)] for count in counts]


def _rgb(source: Source) -> NDArray[np.uint8]:
    if isinstance(source, str | Path):
        return read_picture(str(source))
    return rgb_of(source)
