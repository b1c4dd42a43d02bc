"""MIDIPipeline: one picture and a map of its instances to one mesh per instance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.report import say
from lora_core.tensor_file import write_json
from midi3d_lora import official
from midi3d_lora.conditioning import clip, dino
from midi3d_lora.conditioning.embeddings import ImageEmbeddings, embed_scene
from midi3d_lora.conditioning.pictures import ScenePictures, pad_border, split
from midi3d_lora.conditioning.pixel_values import (
    PictureSettings,
    read_picture_settings,
    write_picture_settings,
)
from midi3d_lora.conditioning.seg_maps import SegMap, seg_map
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.flow.sampling import OnStep, guided_velocity, initial_noise, sample_latents
from midi3d_lora.lora_choice import RELEASED_LAYERS
from midi3d_lora.merged_model import recorded_blocks
from midi3d_lora.meshes.extraction import ExtractionSettings, Mesh, extract_meshes
from midi3d_lora.official_model import load_component
from midi3d_lora.transformer.dit import RELEASED_MULTI_INSTANCE_BLOCKS, TripoSGDiTModel
from midi3d_lora.vae.autoencoder import TripoSGVAEModel

PictureLike = Image.Image | NDArray[np.uint8]
Dtypes = torch.dtype | Mapping[str, torch.dtype]  # of all models, or by their names
# What the official package needs to read what we save. Nothing here is imported.
MODEL_INDEX = {
    "_class_name": "MIDIPipeline",
    "_diffusers_version": diffusers.__version__,
    clip.PROCESSOR_FOLDER: ["transformers", clip.PROCESSOR],
    dino.PROCESSOR_FOLDER: ["transformers", dino.PROCESSOR],
    clip.FOLDER: ["transformers", "CLIPVisionModelWithProjection"],
    dino.FOLDER: ["transformers", "Dinov2Model"],
    "scheduler": ["midi.schedulers.scheduling_rectified_flow", "RectifiedFlowScheduler"],
    "transformer": ["midi.models.transformers.triposg_transformer", "TripoSGDiTModel"],
    "vae": ["midi.models.autoencoders.autoencoder_kl_triposg", "TripoSGVAEModel"],
}


@dataclass
class MIDIPipelineOutput(BaseOutput):
    """The instances of a scene, in the order of the map.

    Attributes:
        labels: of the map, as text; see `SegMap.names`.
        latents: float32 [K, N, C].
        meshes: None for an instance whose field is empty; no entries for `output_type` "latent".
    """

    labels: list[str]
    latents: Tensor
    meshes: list[Mesh | None]

    @property
    def scene(self) -> dict[str, Mesh | None]:
        """The meshes by label, as `mesh_files.write_scene` takes them."""
        return dict(zip(self.labels, self.meshes, strict=False))


class MIDIPipeline(DiffusionPipeline):
    """MIDI-3D under the official component names, for models of this package's classes.

    Args:
        feature_extractor_1, feature_extractor_2: how pictures are prepared for the encoders.
        image_encoder_1: transformers' `CLIPVisionModelWithProjection`.
        image_encoder_2: transformers' `Dinov2Model` with 7 channels.
    """

    model_cpu_offload_seq = "image_encoder_1->image_encoder_2->transformer"
    _exclude_from_cpu_offload = ["vae"]  # noqa: RUF012 - its parts are called, not its forward

    def __init__(
        self,
        vae: TripoSGVAEModel,
        transformer: TripoSGDiTModel,
        scheduler: RectifiedFlowScheduler,
        image_encoder_1: nn.Module,
        image_encoder_2: nn.Module,
        feature_extractor_1: PictureSettings,
        feature_extractor_2: PictureSettings,
    ) -> None:
        super().__init__()
        check_fit(transformer, vae, image_encoder_1, image_encoder_2)
        self.register_modules(
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            image_encoder_1=image_encoder_1,
            image_encoder_2=image_encoder_2,
            feature_extractor_1=feature_extractor_1,
            feature_extractor_2=feature_extractor_2,
        )

    # -- on disk ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: Dtypes | None = None,
        variant: str | None = None,
        multi_instance_blocks: Iterable[str] | None = None,
    ) -> Self:
        """Read a model directory sub-folder by sub-folder, strictly; no network, no foreign code.

        Args:
            torch_dtype: of all models, or as diffusers takes it: {"vae": torch.float32, "default":
                torch.bfloat16}. None: float32 for the transformer and the VAE, and the encoders as
                their files have it.
            variant: of the weight files, as "fp16".
            multi_instance_blocks: whose self-attention runs over all instances; empty: none. None:
                those that a merged model was trained with, or blocks.8 to blocks.12, for a
                transformer of the released depth.

        Raises:
            CheckpointError: what is missing, damaged, or not of this model.
            ConfigError: blocks that the transformer does not have, or parts that do not fit.
        """
        dtypes = _dtypes(torch_dtype)
        folder = official.find_model(pretrained_model_name_or_path)
        settings_1, settings_2 = (
            read_picture_settings(folder / name)
            for name in (clip.PROCESSOR_FOLDER, dino.PROCESSOR_FOLDER)
        )
        clip.clip_settings(folder / clip.FOLDER)  # what is wrong with them is told before
        dino.dino_settings(folder / dino.FOLDER)  # gigabytes are read
        scheduler = RectifiedFlowScheduler.from_pretrained(folder, subfolder="scheduler")
        transformer = load_component(
            TripoSGDiTModel, folder, "transformer", variant, dtypes["transformer"]
        )
        if multi_instance_blocks is None:
            multi_instance_blocks = recorded_blocks(folder)
        choose_blocks(transformer, multi_instance_blocks)
        return cls(
            vae=load_component(TripoSGVAEModel, folder, "vae", variant, dtypes["vae"]),
            transformer=transformer,
            scheduler=scheduler,
            image_encoder_1=clip.read_clip(folder / clip.FOLDER, dtypes[clip.FOLDER], variant),
            image_encoder_2=dino.read_dino(folder / dino.FOLDER, dtypes[dino.FOLDER], variant),
            feature_extractor_1=settings_1,
            feature_extractor_2=settings_2,
        )

    def save_pretrained(self, save_directory: str | Path, variant: str | None = None) -> None:
        """Write a model directory that this class and the official package read."""
        folder = Path(save_directory)
        for name in official.MODELS | official.ENCODERS:
            getattr(self, name).save_pretrained(folder / name, variant=variant)
        self.scheduler.save_pretrained(folder / "scheduler")
        for name, processor, settings in (
            (clip.PROCESSOR_FOLDER, clip.PROCESSOR, self.feature_extractor_1),
            (dino.PROCESSOR_FOLDER, dino.PROCESSOR, self.feature_extractor_2),
        ):
            write_picture_settings(settings, folder / name, processor)
        write_json(folder / "model_index.json", MODEL_INDEX)

    # -- the steps -------------------------------------------------------------------------------

    def encode_image(self, scene: ScenePictures) -> ImageEmbeddings:
        """Both embeddings of a scene's instances; see `embed_scene`."""
        return embed_scene(
            scene,
            self.image_encoder_1,
            self.feature_extractor_1,
            self.image_encoder_2,
            self.feature_extractor_2,
        )

    def prepare_latents(self, rows: int, seed: int, num_tokens: int | None = None) -> Tensor:
        """The noise that sampling starts from, float32 [rows, N, C], drawn and left on the CPU.

        Args:
            num_tokens: N; None: the transformer's width, as officially.

        Raises:
            ConfigError: fewer than one token.
        """
        config = self.transformer.config
        if num_tokens is not None and num_tokens < 1:
            raise ConfigError(f"num_tokens {num_tokens}: expected at least 1")
        return initial_noise(rows, num_tokens or config.width, config.in_channels, seed)

    def sample(
        self,
        embeds: ImageEmbeddings,
        noise: Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.0,
        on_step: OnStep | None = None,
        one_pass: bool = True,
    ) -> Tensor:
        """Latents of the K instances of one scene, float32 [K, N, C], from noise of that shape.

        Args:
            one_pass: guidance doubles the rows of a call; False: the calls, in half the memory.
        """
        embeds = embeds.to(noise.device)
        groups = torch.zeros(len(embeds), dtype=torch.long, device=noise.device)
        velocity = guided_velocity(
            self._velocity,
            embeds.image_embeds_1,
            embeds.image_embeds_2,
            groups,
            guidance_scale,
            one_pass,
        )
        return sample_latents(velocity, noise, self.scheduler, num_inference_steps, on_step=on_step)

    def _velocity(
        self, x: Tensor, t: Tensor, embeds_1: Tensor, embeds_2: Tensor, groups: Tensor
    ) -> Tensor:
        predicted = self.transformer(
            x, t, embeds_1, embeds_2, instance_groups=groups, return_dict=False
        )
        return predicted[0]

    def extract(
        self, latents: Tensor, settings: ExtractionSettings | None = None
    ) -> list[Mesh | None]:
        """A mesh for each row of latents [K, N, C], in one common frame; None for an empty one."""
        return list(extract_meshes(self.vae.fields(latents), settings or ExtractionSettings()))

    # -- all of it -------------------------------------------------------------------------------

    def __call__(
        self,
        image: PictureLike,
        seg_image: PictureLike | SegMap,
        scene_image: PictureLike | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.0,
        seed: int = 42,
        num_tokens: int | None = None,
        do_image_padding: bool = False,
        latents: Tensor | None = None,
        extraction: ExtractionSettings | None = None,
        output_type: str = "mesh",
        on_step: OnStep | None = None,
    ) -> MIDIPipelineOutput:
        """Generate a scene.

        Args:
            image: RGB, of the size of the map.
            seg_image: the map of instances: grey, palette or colour; 0 or black is background.
            scene_image: the whole scene, where `image` does not show it.
            seed: of the noise, which is drawn on the CPU: the same on every device.
            num_tokens: N. None: the transformer's width, as officially; 2048 in the released model.
            do_image_padding: space around instances that touch the border, as in official demos.
            latents: the noise itself [K, N, C]; then `seed` and `num_tokens` say nothing.
            output_type: "mesh", or "latent": without decoding.
            on_step: called after each step with its number and the latents.

        Raises:
            DataError: pictures of different sizes, or a map that is none.
            ConfigError: impossible settings.
            NumericError: NaN on the way.
        """
        if output_type not in ("mesh", "latent"):
            raise ConfigError(f"output_type {output_type!r}: expected mesh or latent")
        scene = scene_pictures(image, seg_image, scene_image)
        if do_image_padding:
            scene = pad_border(scene)
        embeds = self.encode_image(scene)
        if latents is None:
            latents = self.prepare_latents(len(scene), seed, num_tokens)
        latents = latents.to(self._execution_device, torch.float32)
        found = self.sample(embeds, latents, num_inference_steps, guidance_scale, on_step)
        self.maybe_free_model_hooks()
        meshes = self.extract(found, extraction) if output_type == "mesh" else []
        return MIDIPipelineOutput(labels=list(scene.seg.names), latents=found, meshes=meshes)


def scene_pictures(
    image: PictureLike, seg_image: PictureLike | SegMap, scene_image: PictureLike | None = None
) -> ScenePictures:
    """The instances of a picture; tells what was left out of the map."""
    seg = seg_image if isinstance(seg_image, SegMap) else seg_map(seg_image)
    for note in seg.notes:
        say(note)
    seg = replace(seg, notes=())
    return split(_rgb(image), seg, None if scene_image is None else _rgb(scene_image))


def _rgb(image: PictureLike) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3]; transparent pixels are laid on white."""
    if not isinstance(image, Image.Image):
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _dtypes(torch_dtype: Dtypes | None) -> dict[str, torch.dtype | None]:
    """The dtype of each model.

    Raises:
        ConfigError: a dtype for what is no model.
    """
    names = [*official.MODELS, *official.ENCODERS]
    if not isinstance(torch_dtype, Mapping):
        return dict.fromkeys(names, torch_dtype)
    unknown = [name for name in torch_dtype if name not in (*names, "default")]
    if unknown:
        raise ConfigError(f"torch_dtype of {unknown[0]!r}: expected {', '.join(names)}, default")
    return {name: torch_dtype.get(name, torch_dtype.get("default")) for name in names}


def choose_blocks(transformer: TripoSGDiTModel, names: Iterable[str] | None = None) -> None:
    """Set the multi-instance blocks; None: the released ones, in a transformer of that depth.

    In another depth they stay unset, and a scene of several instances is refused.
    """
    if names is not None:
        transformer.set_multi_instance_blocks(names)
    elif transformer.config.num_layers == RELEASED_LAYERS:
        transformer.set_multi_instance_blocks(RELEASED_MULTI_INSTANCE_BLOCKS)


def check_fit(
    transformer: TripoSGDiTModel, vae: TripoSGVAEModel, encoder_1: Any, encoder_2: Any
) -> None:
    """Compare the widths of what is passed from part to part.

    Raises:
        ConfigError: all that differ.
    """
    config = transformer.config
    pairs = (
        ("cross_attention_dim", config.cross_attention_dim, clip.FOLDER, "projection_dim",
         encoder_1.config.projection_dim),
        ("cross_attention_2_dim", config.cross_attention_2_dim, dino.FOLDER, "hidden_size",
         encoder_2.config.hidden_size),
        ("in_channels", config.in_channels, "vae", "latent_channels", vae.config.latent_channels),
    )  # fmt: skip
    problems = [
        f"transformer: {name} is {ours}, but {field} of {folder} is {theirs}"
        for name, ours, folder, field, theirs in pairs
        if ours != theirs
    ]
    if problems:
        raise ConfigError("\n".join([*problems, "these parts are of different models"]))
