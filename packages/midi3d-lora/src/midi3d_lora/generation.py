"""From the pictures of a scene to meshes, as `predict` and `evaluate` do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.report import Progress, say
from lora_core.training.inference import evaluating
from lora_core.training.out_of_memory import is_out_of_memory
from midi3d_lora.conditioning.pictures import ScenePictures
from midi3d_lora.meshes.extraction import Mesh, extract_mesh

if TYPE_CHECKING:
    from midi3d_lora.model_options import ModelOptions
    from midi3d_lora.pipeline import MIDIPipeline


@contextmanager
def memory_for(rows: int) -> Iterator[None]:
    """Say what to do when memory runs out inside.

    Args:
        rows: instances of the scene.

    Raises:
        ConfigError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"out of memory with a scene of {rows} instances. What helps, best first: "
            "1. --precision bf16 or fp16; 2. a smaller --chunk_size, if it happened while surfaces "
            "were decoded; 3. fewer instances in the map; 4. --device cpu"
        ) from error


def make_latents(
    pipeline: MIDIPipeline,
    pictures: ScenePictures,
    options: ModelOptions,
    seed: int,
    progress: Progress | None = None,
) -> Tensor:
    """Latents of the instances of a scene, float32 [K, N, C].

    Guidance takes 2 K rows at a time, or twice K if there is no memory for that.

    Args:
        seed: of the noise.
        progress: told after each step.

    Raises:
        NumericError: NaN on the way.
        ConfigError: out of memory.
    """

    def on_step(step: int, latents: Tensor) -> None:
        if progress is not None:
            progress.update(step)

    with memory_for(len(pictures)), evaluating(pipeline.transformer):
        embeds = pipeline.encode_image(pictures)
        noise = pipeline.prepare_latents(len(pictures), seed, options.num_tokens)
        sample = partial(
            pipeline.sample,
            embeds,
            noise.to(pipeline.device),
            options.num_inference_steps,
            options.guidance_scale,
            on_step,
        )
        try:
            return sample(one_pass=True)
        except Exception as error:
            if options.guidance_scale <= 1 or not is_out_of_memory(error):
                raise
        # Outside of the handler, whose error holds what filled the memory.
        say("no memory for guidance in one pass: in two, which takes a little longer")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sample(one_pass=False)


def make_meshes(
    pipeline: MIDIPipeline,
    pictures: ScenePictures,
    latents: Tensor,
    options: ModelOptions,
    progress: Progress | None = None,
) -> dict[str, Mesh | None]:
    """The meshes by the labels of the map, in its order; None for an empty one.

    Args:
        progress: told after each instance.

    Raises:
        NumericError: a field that is NaN or infinite.
        ConfigError: out of memory.
    """
    settings, fields = options.extraction(), pipeline.vae.fields(latents)
    meshes: dict[str, Mesh | None] = {}
    with memory_for(len(pictures)):
        for name, field in zip(pictures.seg.names, fields, strict=True):
            meshes[name] = extract_mesh(field, settings)
            if progress is not None:
                progress.update(len(meshes))
    return meshes
