"""Augmentation and preparation of scenes: functions of (scene, numpy Generator) -> scene."""

from scenesplat_lora.transforms.pipeline import (
    Transform,
    build_transform,
    compose,
    evaluation_fragments,
    evaluation_transforms,
    training_transforms,
    validation_transforms,
)

__all__ = [
    "Transform",
    "build_transform",
    "compose",
    "evaluation_fragments",
    "evaluation_transforms",
    "training_transforms",
    "validation_transforms",
]
