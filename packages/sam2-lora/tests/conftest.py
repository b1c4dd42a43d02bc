"""One thread for every test, no network, and base checkpoints that several tests share."""

import gzip
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # torch and numpy read it when they are imported, so before them
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """Names and shapes of the published checkpoints; see goldens/names/README.md."""
    return json.loads(gzip.decompress((GOLDENS / "names" / "names.json.gz").read_bytes()))


def sam2_config(golden: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Sam2Config` from the hyper-parameters of a golden case."""
    trunk, prompts, decoder = golden["trunk"], golden["prompt_encoder"], golden["mask_decoder"]
    side, width, heads = golden["image_size"], trunk["embed_dim"], trunk["num_heads"]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "num_attention_heads": heads,
        "image_size": [side, side],
        "blocks_per_stage": trunk["stages"],
        "embed_dim_per_stage": [width * 2**k for k in range(4)],
        "num_attention_heads_per_stage": [heads * 2**k for k in range(4)],
        "window_size_per_stage": trunk["window_spec"],
        "global_attention_blocks": trunk["global_att_blocks"],
        "window_positional_embedding_background_size": trunk["window_pos_embed_bkg_spatial_size"],
    }
    return {
        "vision_config": {
            "backbone_config": backbone,
            "backbone_channel_list": golden["neck"]["backbone_channel_list"],
            "backbone_feature_sizes": [[side // s, side // s] for s in (4, 8, 16)],
            "fpn_hidden_size": golden["neck"]["d_model"],
        },
        "prompt_encoder_config": {
            "hidden_size": prompts["embed_dim"],
            "image_size": side,
            "mask_input_channels": prompts["mask_in_chans"],
        },
        "mask_decoder_config": {
            "hidden_size": decoder["transformer_dim"],
            "mlp_dim": decoder["mlp_dim"],
            "iou_head_hidden_dim": decoder["iou_head_hidden_dim"],
            "dynamic_multimask_stability_thresh": decoder["dynamic_multimask_stability_thresh"],
        },
    }


@pytest.fixture(scope="session")
def golden_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random SAM 2 of the goldens as base.safetensors with base.json beside it."""
    folder = tmp_path_factory.mktemp("golden_base")
    case = GOLDENS / "image_model"
    shutil.copy(case / "weights.safetensors", folder / "base.safetensors")
    config = sam2_config(json.loads((case / "config.json").read_text()))
    (folder / "base.json").write_text(json.dumps(config))
    return folder / "base.safetensors"


def random_tensor(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """Values that keep activations of order one: norms near 1, weights of variance 1 / fan-in."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return noise / math.sqrt(math.prod(shape[1:]))


@pytest.fixture(scope="session")
def tiny_checkpoint(facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official sam2.1_hiera_tiny.pt (471 tensors, video memory included), random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = facts["keys"]["sam2.1_hiera_tiny"]
    state = {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("tiny") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": state}, path)
    return path
