"""One thread for every test, no network, and base checkpoints that several tests share."""

import gzip
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_core.testing import environment

environment.prepare()  # before torch is imported

sys.path.insert(0, str(Path(__file__).parent))  # for small_run.py

import torch  # noqa: E402
from small_run import command, write_coco  # noqa: E402
from torch import Tensor  # noqa: E402

from lora_core.testing import refusals  # noqa: E402
from lora_core.testing.no_device import no_device  # noqa: E402
from sam2_lora import train  # noqa: E402

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


# -- commands on files that may be damaged ---------------------------------------------------------

ADAPTERS = ("adapter", "adapter.torch", "adapter.pth", "adapter.pt")


@pytest.fixture(scope="session")
def adapted() -> Callable[[Path], Any]:
    """Give a base's network with an adapter that has learnt something."""

    def adapt(base: Path) -> Any:
        from lora_core.injection import lora_layers
        from sam2_lora import model, placement
        from sam2_lora.config import Config

        network = model.load(base)
        placement.adapt(network, Config(lora_dropout=0.5, lora_rank=4))
        generator = torch.Generator().manual_seed(7)
        for layer in lora_layers(network).values():
            with torch.no_grad():
                layer.lora_factors("default")[1].normal_(std=0.05, generator=generator)
        return network

    return adapt


@pytest.fixture(scope="session")
def masks() -> Callable[[Any], Tensor]:
    """Give a network's logits for one click in a fixed picture, in evaluation mode."""

    def logits(network: Any) -> Tensor:
        from sam2_lora import model

        height, width = model.image_size(network)
        picture = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            features = model.encode(network.eval(), picture)
            point = torch.tensor([[[0.3 * width, 0.4 * height]]])
            return model.decode(network, features, torch.tensor([0]), point).masks

    return logits


@pytest.fixture(scope="session")
def originals(
    golden_base: Path, adapted: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a base, its adapter in every form, and pictures with masks."""
    import numpy as np
    from PIL import Image

    from sam2_lora.model import save_adapter

    root = tmp_path_factory.mktemp("originals")
    shutil.copy(golden_base, root / "base.safetensors")
    for name in ("base.json", "other.json"):
        shutil.copy(golden_base.with_suffix(".json"), root / name)
    network = adapted(root / "base.safetensors")
    for name in ADAPTERS:
        save_adapter(network, root / name, {"step": 5})
    mask = np.zeros((64, 96), np.uint8)
    mask[20:40, 30:60] = 255
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (root / "data" / split / kind).mkdir(parents=True)
        rgb = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(root / "data" / split / "images" / "p.png")
        Image.fromarray(mask).save(root / "data" / split / "masks" / "p.png")
    return root


@pytest.fixture
def work(tmp_path: Path, originals: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of `originals` that may be damaged."""
    shutil.copytree(originals, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def words() -> Callable[..., list[str]]:
    """Give the command line of a verb in `work`, whose results are `out` or `out.pt`."""

    def line(command: str, base: str, adapter: str | None) -> list[str]:
        found = {
            "merge": ["--output", "out.pt"],
            "predict": ["--images", "data/test/images", "--points", "40,30", "--output", "out"],
            "evaluate": ["--data_root", "data", "--mask_kind", "binary", "--output_dir", "out",
                         "--examples", "0"],
            "train": ["--data_root", "data", "--mask_kind", "binary", "--output_dir", "out",
                      "--logs_dir", "out/logs", "--image_size", "64", "--steps", "1",
                      "--num_workers", "0"],
        }[command]  # fmt: skip
        device = [] if command == "merge" else ["--device", "cpu"]
        adapter = adapter or ("adapter" if command == "merge" else None)
        given = ["--adapter", adapter] if adapter else []
        return [command, "--checkpoint", base, *given, *device, *found]

    return line


@pytest.fixture
def refused(
    work: Path, words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command that must fail for a reason that the user can put right; gives its message."""

    def run(command: str, *parts: str, base: str = "base.safetensors", adapter: str | None) -> str:
        from sam2_lora import __main__ as program

        capsys.readouterr()
        status = program.main(words(command, base, adapter))
        text = capsys.readouterr().err
        assert status == 2, text
        assert "Traceback" not in text
        assert text.startswith("error: ")
        for part in parts:
            assert part in text, text
        assert not [path for path in work.rglob("out/*") if path.is_file()]
        assert not (work / "out.pt").exists()
        assert not list(work.glob(".unverified*"))
        assert not (work / "canary").exists()
        return text

    return run


# -- one message for each fault of a start; see small_run.py ---------------------------------------


@pytest.fixture(scope="session")
def coco_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def refuse(
    coco_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Call the command, and give its message after checking what every message must be."""

    def call(*words: str, lines: int = 3, **given: object) -> str:
        output = tmp_path / "out"
        with no_device():
            status = train.main([*command(coco_pictures, output, **given), *words])
        message = capsys.readouterr().err
        assert status == 2, message
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert len(message.splitlines()) <= lines, message
        assert not list(tmp_path.glob("out/*")), "something was written"
        return message

    return call


@pytest.fixture
def settings_file(tmp_path: Path) -> Callable[..., str]:
    def write(text: str | bytes, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="lora-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    with refusals.small_disk(tmp_path / "disk", 2**16) as place:
        yield place
