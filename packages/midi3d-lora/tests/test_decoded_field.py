"""Latents to fields and meshes with the recorded tiny model."""

from pathlib import Path

import pytest
import torch

from lora_core.testing import load_golden
from midi3d_lora.meshes import extraction
from midi3d_lora.meshes.extraction import ExtractionSettings, extract_meshes
from midi3d_lora.meshes.grid import Grid, cube
from midi3d_lora.vae.autoencoder import TripoSGVAEModel

CASE = load_golden(Path(__file__).parent / "goldens" / "pipeline")
DEPTH = CASE.config["octree_depth"]


@pytest.fixture(scope="module")
def vae() -> TripoSGVAEModel:
    return TripoSGVAEModel.from_pretrained(CASE.folder / "model" / "vae")


def test_fields_of_both_passes_are_the_recorded_ones(vae: TripoSGVAEModel) -> None:
    corners = CASE.io["progressive.bbox_min"], CASE.io["progressive.bbox_max"]
    for i, field in enumerate(vae.fields(CASE.io["final_latents"])):
        values = extraction.dense(field, cube(CASE.config["bbox"][1], DEPTH), 1000)
        torch.testing.assert_close(
            torch.from_numpy(values), CASE.io["grid_logits"][i], rtol=0, atol=1e-5
        )
        lower, upper = (tuple(corner[i].tolist()) for corner in corners)
        values = extraction.dense(field, Grid(lower, upper, DEPTH, DEPTH), 1000)
        torch.testing.assert_close(
            torch.from_numpy(values), CASE.io["progressive.grid_logits"][i], rtol=0, atol=1e-5
        )


def test_every_instance_gets_a_mesh(vae: TripoSGVAEModel) -> None:
    settings = ExtractionSettings(depth=DEPTH, coarse_depth=DEPTH, inside="negative")
    meshes = list(extract_meshes(vae.fields(CASE.io["final_latents"]), settings))
    assert [mesh is not None for mesh in meshes] == [True, True, True]
