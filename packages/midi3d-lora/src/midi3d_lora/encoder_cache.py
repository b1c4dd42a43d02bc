"""What the frozen encoders make of a scene, computed once and kept on disk.

    encodings = Encodings(encoders, plan, FeatureCache(folder, max_bytes))
    encodings.fill(scenes)                       # before training: the encoders leave the memory
    sample = encodings.sample(scene, draw)       # in any process: tensors of the cache
    encoded = encodings.encoded(sample, device)  # on the device, for the loss

A scene has one entry for its pictures and one for each draw of its points. Names of entries are
digests of all that they depend on: a picture, a mesh or an encoder that changes makes another
entry. An entry that is missing or damaged is computed again when it is needed, and without a cache
all of them are, each time: the numbers are the same, bit for bit, since the encoders always see
the instances of a scene together, in fp32 and outside of autocast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_core.cache import FeatureCache, fingerprint
from lora_core.report import Progress, plural, say
from midi3d_lora import official
from midi3d_lora.conditioning import clip, dino
from midi3d_lora.conditioning.pixel_values import read_picture_settings
from midi3d_lora.official_model import load_component
from midi3d_lora.scenes.scene_folders import SceneSettings, TrainingScene, read_scene, scene_files
from midi3d_lora.vae.autoencoder import TripoSGVAEModel

ROWS_AT_ONCE = 5  # of the VAE's encoder, as the official training has it
PICTURES = (clip.FOLDER, clip.PROCESSOR_FOLDER, dino.FOLDER, dino.PROCESSOR_FOLDER)
IMAGE_EMBEDS = ("image_embeds_1", "image_embeds_2")


@dataclass(frozen=True)
class Scene:
    """A scene that was looked at.

    Attributes:
        folder: where it lies. key: its name.
        rows: K, its instances.
        content: digest of its files, see `content_digest`.
    """

    folder: Path
    key: str
    rows: int
    content: str


@dataclass(frozen=True)
class Plan:
    """What the encodings of a scene depend on besides its files and the encoders.

    Attributes:
        scene: how scenes are read.
        num_tokens: N, the size of an instance's latent set.
        draws: of points, of which an epoch sees one.
        dtype: of the stored picture embeddings.
    """

    scene: SceneSettings
    num_tokens: int
    draws: int = 1
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Encoded:
    """Of the K instances of a scene; a dataclass of tensors.

    Attributes:
        image_embeds_1: [K, 1, C1]. image_embeds_2: [K, 1 + P, C2].
        mean, logvar: of the latents' distributions, float32 [K, N, C].
    """

    image_embeds_1: Tensor
    image_embeds_2: Tensor
    mean: Tensor
    logvar: Tensor


def content_digest(folder: Path) -> str:
    """SHA-256 of the files of a scene, with their names; not of where they lie."""
    digest = hashlib.sha256()
    for path in scene_files(folder):
        with open(path, "rb") as file:
            digest.update(
                f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}".encode()
            )
    return digest.hexdigest()


# -- the encoders ----------------------------------------------------------------------------------


class FrozenEncoders:
    """CLIP, DINOv2 and the VAE's encoder of a model directory; read when they are first needed."""

    def __init__(self, model_dir: Path, device: torch.device) -> None:
        self.folder, self.device = model_dir, device
        self._models: dict[str, nn.Module] = {}

    @cached_property
    def settings(self) -> tuple[Any, Any]:
        """How pictures are prepared for the two encoders."""
        first, second = clip.PROCESSOR_FOLDER, dino.PROCESSOR_FOLDER
        return read_picture_settings(self.folder / first), read_picture_settings(
            self.folder / second
        )

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the files of the picture encoders and of the VAE."""
        pictures = " ".join(fingerprint(self.folder / name) for name in PICTURES)
        return {"pictures": pictures, "surfaces": fingerprint(self.folder / "vae")}

    def clip(self) -> nn.Module:
        return self._model(clip.FOLDER)

    def dino(self) -> nn.Module:
        return self._model(dino.FOLDER)

    def vae(self) -> Any:
        return self._model("vae")

    def _model(self, name: str) -> nn.Module:
        if name not in self._models:
            self._models[name] = self._read(name).to(self.device)
        return self._models[name]

    def _read(self, name: str) -> nn.Module:
        if name == clip.FOLDER:
            return clip.read_clip(self.folder / name, torch.float32)
        if name == dino.FOLDER:
            return dino.read_dino(self.folder / name, torch.float32)
        vae = load_component(TripoSGVAEModel, self.folder, name, dtype=torch.float32)
        vae.decoder = nn.Identity()  # more than half of the weights
        return vae.requires_grad_(False)

    def release(self) -> None:
        """Take them out of memory, until they are needed again."""
        if self._models and self.device.type == "cuda":
            self._models.clear()
            torch.cuda.empty_cache()
        self._models.clear()


def token_count(model_dir: Path, image_size: int) -> int:
    """Tokens that DINOv2 gives for a square picture, 1 + P.

    Raises:
        CheckpointError: settings that cannot be used.
    """
    height, width = read_picture_settings(model_dir / dino.PROCESSOR_FOLDER).output(
        image_size, image_size
    )
    patch = int(dino.dino_settings(model_dir / dino.FOLDER).get("patch_size", 14))
    return 1 + (height // patch) * (width // patch)


# -- encoding --------------------------------------------------------------------------------------


class Encodings:
    """The encodings of scenes.

    Args:
        encoders: that make them.
        cache: where they are kept; None: they are made each time.
    """

    def __init__(self, encoders: FrozenEncoders, plan: Plan, cache: FeatureCache | None) -> None:
        self.encoders, self.plan, self.cache = encoders, plan, cache
        if cache is not None:
            encoders.fingerprints  # noqa: B018 - read once, before workers are started

    def fill(self, scenes: Sequence[Scene], draws: int | None = None) -> int:
        """Compute what is not in the cache yet; then take the encoders out of memory.

        Args:
            scenes: those of this process. draws: of each scene; None: all of the plan.

        Returns:
            how many entries were computed.
        """
        if self.cache is None:
            return 0
        draws = self.plan.draws if draws is None else draws
        todo = [s for s in scenes if any(not path.exists() for path in self._paths(s, draws))]
        if not todo:
            return 0
        say(f"encoding {plural(len(todo), 'scene')} for {self.cache.folder.absolute()}")
        count = 0
        with Progress(len(todo)) as progress:
            for done, scene in enumerate(todo, start=1):
                count += self._fill_scene(scene, draws)
                progress.update(done)
        self.encoders.release()
        return count

    def _paths(self, scene: Scene, draws: int) -> list[Path]:
        assert self.cache is not None
        keys = [self.picture_key(scene), *(self.surface_key(scene, d) for d in range(draws))]
        return [self.cache.path(key) for key in keys]

    def _fill_scene(self, scene: Scene, draws: int) -> int:
        assert self.cache is not None
        missing = [not path.exists() for path in self._paths(scene, draws)]
        for draw in range(draws):
            wants_pictures = draw == 0 and missing[0]
            if wants_pictures or missing[draw + 1]:
                raw = self.raw(scene, draw, pictures=wants_pictures, surface=missing[draw + 1])
                self._encode(raw)
        return sum(missing)

    def sample(self, scene: Scene, draw: int) -> dict[str, Any]:
        """What `encoded` takes, on the CPU: entries of the cache, or what the encoders see.

        Raises:
            DataError: the scene cannot be read any more.
        """
        pictures = self.cache and self.cache.find(self.picture_key(scene))
        surface = self.cache and self.cache.find(self.surface_key(scene, draw))
        found: dict[str, Any] = {**(pictures or {}), **(surface or {})}
        if pictures and surface:
            return found
        return found | self.raw(scene, draw, pictures=not pictures, surface=not surface)

    def raw(
        self, scene: Scene, draw: int, *, pictures: bool = True, surface: bool = True
    ) -> dict[str, Any]:
        """What the encoders see of a scene: pixels [K, 3 and 7, h, w], points [K, M, 6]."""
        seed = [int(scene.content[:8], 16), draw]
        read = read_scene(scene.folder, self.plan.scene, np.random.default_rng(seed))
        found: dict[str, Any] = {"scene": scene, "draw": draw}
        if pictures:
            first, second = self.encoders.settings
            found["clip"] = clip.clip_pixels(read.pictures, first)
            found["dino"] = dino.dino_pixels(read.pictures, second)
        if surface:
            found["surface"] = _points(read)
        return found

    def encoded(self, sample: Mapping[str, Any], device: torch.device) -> Encoded:
        """The encodings of a sample on a device; those that are missing are computed, and kept."""
        values = {**sample, **self._encode(sample)}
        names = (*IMAGE_EMBEDS, "mean", "logvar")
        return Encoded(**{name: values[name].to(device) for name in names})

    def _encode(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is in a sample as pixels and points, encoded."""
        made: dict[str, Tensor] = {}
        if "clip" in sample:
            made |= self._kept(self.picture_key(sample["scene"]), self._pictures(sample))
        if "surface" in sample:
            key = self.surface_key(sample["scene"], sample["draw"])
            made |= self._kept(key, self._latents(sample))
        return made

    def _kept(self, key: Mapping[str, str], value: dict[str, Tensor]) -> dict[str, Tensor]:
        return value if self.cache is None else self.cache.keep(key, value)

    @torch.no_grad()
    def _pictures(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        with torch.autocast(self.encoders.device.type, enabled=False):
            first = clip.clip_embeds(self.encoders.clip(), sample["clip"])
            second = dino.dino_embeds(self.encoders.dino(), sample["dino"])
        return {
            name: embeds.to(self.plan.dtype)
            for name, embeds in zip(IMAGE_EMBEDS, (first, second), strict=True)
        }

    @torch.no_grad()
    def _latents(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        vae, parts = self.encoders.vae(), sample["surface"].split(ROWS_AT_ONCE)
        with torch.autocast(self.encoders.device.type, enabled=False):
            found = [
                vae.encode(
                    part.to(self.encoders.device), self.plan.num_tokens, seed=sample["draw"]
                ).latent_dist
                for part in parts
            ]
        return {
            "mean": torch.cat([one.mean for one in found]),
            "logvar": torch.cat([one.logvar for one in found]),
        }

    # -- names of entries ------------------------------------------------------------------------

    def picture_key(self, scene: Scene) -> dict[str, str]:
        """What the picture embeddings of a scene depend on."""
        settings = self.plan.scene
        return {
            "kind": "midi3d pictures 1",
            "encoders": self.encoders.fingerprints["pictures"],
            "scene": scene.content,
            "settings": f"{settings.image_size} {settings.max_instances} {settings.smallest_share}",
            "numbers": f"{self.plan.dtype} {self.encoders.device.type}",
        }

    def surface_key(self, scene: Scene, draw: int) -> dict[str, str]:
        """What the latents of a scene in one draw depend on."""
        return {
            "kind": "midi3d surfaces 1",
            "encoders": self.encoders.fingerprints["surfaces"],
            "scene": scene.content,
            "settings": f"{self.plan.scene} {self.plan.num_tokens}",
            "draw": str(draw),
            "numbers": self.encoders.device.type,
        }


def _points(scene: TrainingScene) -> Tensor:
    """Points and normals of all instances, float32 [K, M, 6]."""
    return torch.from_numpy(np.stack([surface.joined() for surface in scene.surfaces]))


def check_encoders(model_dir: Path) -> None:
    """Look for the folders and settings of the encoders, without reading weights.

    Raises:
        CheckpointError: what is missing or of another model.
    """
    official.find_model(model_dir)
    read_picture_settings(model_dir / clip.PROCESSOR_FOLDER)
    read_picture_settings(model_dir / dino.PROCESSOR_FOLDER)
    clip.clip_settings(model_dir / clip.FOLDER)
    dino.dino_settings(model_dir / dino.FOLDER)
