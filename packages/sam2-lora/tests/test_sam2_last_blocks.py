"""`--last_blocks`: adapters at the end of the image encoder alone, and what that saves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import small_run
import torch
from torch import Tensor, nn

from lora_core.config import parse
from lora_core.errors import ConfigError
from lora_core.injection import lora_layers
from lora_core.memory import estimate, size
from lora_core.testing import Case
from lora_core.testing.frozen_start import nothing_is_kept_before_the_last_blocks
from sam2_lora import data, demo, dry_run, losses, memory, placement, train
from sam2_lora import model as m
from sam2_lora.config import Config

Capture = pytest.CaptureFixture[str]
BASE = str(demo.base_checkpoint())
BLOCKS = [f"{placement.BLOCKS}.{number}" for number in range(7)]  # of the packaged base


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_coco(tmp_path_factory.mktemp("pictures"))


def config(pictures: Path, output: Path, *words: str, **given: object) -> Config:
    argv = small_run.command(pictures, output, device="cpu", **given)
    return parse(Config, [*argv, *words], prog="t")


def masks(network: nn.Module) -> Tensor:
    """Logits and scores of a picture, for a click and a box."""
    size = m.image_size(network)
    draw = torch.Generator().manual_seed(0)
    features = m.encode(network, torch.randn(1, 3, *size, generator=draw))
    image = torch.zeros(1, dtype=torch.long)
    click = m.decode(network, features, image, points=torch.tensor([[[20.0, 30.0]]]))
    box = torch.tensor([[5.0, 8.0, 50.0, 40.0]])
    boxed = m.decode(network, features, image, boxes=box)
    return torch.cat([part.flatten() for part in (*click, *boxed)])


@pytest.mark.parametrize(("targets", "count"), [("encoder", 1), ("encoder", 4), ("default", 2)])
def test_nothing_is_kept_before_the_last_blocks(tmp_path: Path, targets: str, count: int) -> None:
    last, every = (
        Case(
            lambda: m.load(BASE, (64, 64)),
            masks,
            placement.lora_config(Config(targets=targets, last_blocks=n, lora_dropout=0)),
            tolerance=2e-5,
        )
        for n in (count, None)
    )
    nothing_is_kept_before_the_last_blocks(last, every, BLOCKS, count, tmp_path)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_decoder_is_adapted_as_without(count: int) -> None:
    found, every = adapted_layers(last_blocks=count), adapted_layers()
    assert found == every[2 * (7 - count) :]
    assert sum(path.startswith("vision_encoder.") for path in found) == 2 * count


def adapted_layers(**given: int) -> list[str]:
    cfg = Config(checkpoint=BASE, **given)
    network = m.skeleton(cfg)
    placement.adapt(network, cfg)
    return list(lora_layers(network))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--last_blocks", "0"], "--last_blocks is 0: it must be at least 1"),
        (["--last_blocks", "2", "--targets", "decoder"], "--targets decoder adapts none: leave"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    pictures: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(pictures, tmp_path, *words)


def test_more_blocks_than_there_are_is_told_before_anything_is_made(
    pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert train.main(small_run.command(pictures, run, device="cpu", last_blocks=8)) == 2
    assert "has 7 blocks, 8 were asked for (1 to 7)" in capsys.readouterr().err
    assert not run.exists()


def test_a_run_trains_them_resumes_and_is_gone_on_from(
    pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = small_run.command(
        pictures, tmp_path / "run", device="cpu", last_blocks=2, targets="encoder"
    )
    assert train.main(argv) == 0
    folder = next((tmp_path / "run").glob("*/adapter"))
    network = m.load(BASE, (64, 64), folder)
    layers = [f"{block}.attn.{name}" for block in BLOCKS[5:] for name in ("qkv", "proj")]
    assert list(lora_layers(network)) == layers
    assert train.main(["--resume", str(folder.parent), "--steps", "2"]) == 0
    capsys.readouterr()
    more = small_run.command(pictures, tmp_path / "next", device="cpu", adapter=folder)
    assert train.main([*more, "--last_blocks", "2"]) == 0
    assert "its rank, alpha and layers are used" in capsys.readouterr().out
    assert train.main(["--resume", str(folder.parent), "--last_blocks", "3"]) == 2
    assert "last_blocks" in capsys.readouterr().err


def test_a_dry_run_says_what_fewer_blocks_take(
    pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The figures are those of a run with the setting."""
    cfg = config(pictures, tmp_path, batch_size=2)
    assert dry_run.run(cfg) == 0
    out = capsys.readouterr().out
    table = out[out.index("--last_blocks, fp32") :].splitlines()[:5]
    assert "memory of a step on a CPU  fp32" in out
    assert [line.split("  ")[0].strip() for line in table[2:]] == ["7, as set", "3", "1"]
    for line, count in zip(table[3:], (3, 1), strict=True):
        own = config(pictures, tmp_path, batch_size=2, last_blocks=count)
        network = dry_run.adapted(own)
        batch = memory.largest_batch(data.load(own).train, 2)
        found = estimate(network.train(), partial(losses.loss, cfg=own), batch)
        columns = [word.strip() for word in line.split("  ") if word.strip()]
        assert columns[1:] == list(map(size, (found.adapters, found.activations, found.total)))


def test_it_is_advised_when_memory_runs_out_and_not_in_use(pictures: Path, tmp_path: Path) -> None:
    def advised(**given: object) -> list[str]:
        cfg = config(pictures, tmp_path, **given)
        network = m.skeleton(cfg)
        placement.adapt(network, cfg)
        remedies = memory.advice(cfg, network).remedies
        return [text for text in remedies if text.startswith("--last_blocks")]

    assert advised() == ["--last_blocks 3 (nothing is kept of the 4 blocks before)"]
    assert advised(last_blocks=2) == advised(targets="decoder") == []
