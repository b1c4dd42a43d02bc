"""`--lora.last_blocks`: adapters at the end of the image encoder alone, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_base
import tiny_run
import torch
from torch import Tensor, nn

from lora_core.config import parse
from lora_core.errors import ConfigError
from lora_core.injection import lora_layers
from lora_core.testing import Case, load_golden
from lora_core.testing.frozen_start import nothing_is_kept_before_the_last_blocks
from sam3_lora import memory, network, placement, train
from sam3_lora import model as m
from sam3_lora.config import Config, Lora, Training

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


def outputs(model: nn.Module) -> Tensor:
    """All that the network says of two pictures and two phrases."""
    io = load_golden(tiny_base.GOLDENS / "official_model").io
    batch = {name: io[name] for name in ("pixel_values", "input_ids")}
    batch |= {"attention_mask": io["input_ids"].ne(0).long(), "image_ids": io["img_ids"]}
    batch |= {"text_ids": io["text_ids"]}
    out = network.forward(model, batch, masks=True, one_to_many=False)
    last = out.one_to_one[-1]
    assert last.masks is not None
    assert out.semantic is not None
    masks = torch.stack(list(last.masks))
    parts = [last.logits, last.boxes, masks, out.presence[-1], out.semantic]
    return torch.cat([part.flatten() for part in parts])


def config(**lora: Any) -> Config:
    settings = Lora(rank=2, alpha=4, dropout=0, **lora)
    return Config(lora=settings, training=Training(enable_segmentation=True))


@pytest.mark.parametrize("again", [False, True], ids=["whole", "checkpointed"])
def test_nothing_is_kept_before_the_last_blocks(base: Path, tmp_path: Path, again: bool) -> None:
    def make() -> nn.Module:
        model = m.load(base)
        network.set_gradient_checkpointing(model, again)
        return model

    blocks = list(placement.stack(m.load(base)).blocks)
    last, every = (
        Case(make, outputs, placement.lora_config(config(last_blocks=n)), tolerance=2e-5)
        for n in (1, None)
    )
    nothing_is_kept_before_the_last_blocks(last, every, blocks, 1, tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_other_components_are_adapted_as_without(base: Path, count: int) -> None:
    def adapted(**lora: Any) -> list[str]:
        model = m.load(base)
        m.adapt(model, config(**lora))
        return list(lora_layers(model))

    found, every = adapted(last_blocks=count), adapted()
    blocks = placement.stack(m.load(base)).blocks
    first = [path for path in every if path.startswith(tuple(f"{b}." for b in blocks[:-count]))]
    assert first
    assert [path for path in every if path not in first] == found


@pytest.mark.parametrize("switch", ["freeze_backbone", "apply_to_vision_encoder"])
def test_an_encoder_that_is_not_adapted_has_no_last_blocks(switch: str) -> None:
    with pytest.raises(ConfigError, match="image encoder, which is not adapted"):
        config(last_blocks=1, **{switch: switch == "freeze_backbone"})


@pytest.mark.parametrize(
    ("last", "message"), [(0, "--lora.last_blocks is 0: it must be"), (99, "99 were asked for (1")]
)
def test_other_numbers_of_blocks_are_refused(
    base: Path, tmp_path: Path, capsys: Capture, last: int, message: str
) -> None:
    assert train.main(tiny_run.command(base, tmp_path / "run", lora__last_blocks=last)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_run_trains_them_and_a_dry_run_says_what_fewer_take(
    base: Path, tmp_path: Path, capsys: Capture
) -> None:
    count = len(placement.stack(m.load(base)).blocks)
    argv = tiny_run.command(base, tmp_path / "run", training__max_epochs=1)
    assert train.main([*argv, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "memory of a step on a CPU  fp32" in out
    table = out[out.index("--lora.last_blocks, fp32") :].splitlines()[2:4]
    assert [line.split("  ")[0].strip() for line in table] == [f"{count}, as set", f"{count // 2}"]
    assert train.main([*argv, "--lora.last_blocks", "1"]) == 0
    found = tiny_run.tensors(tmp_path / "run" / "checkpoints" / "best.pt")
    inside = {key.split(".")[3] for key in found if key.startswith(placement.BLOCKS)}
    assert inside == {str(count - 1)}
    assert any(key.startswith("detr_decoder.") for key in found)


def test_it_is_advised_when_memory_runs_out_and_not_in_use(base: Path, tmp_path: Path) -> None:
    def advised(**given: Any) -> list[str]:
        cfg = parse(Config, tiny_run.command(base, tmp_path, **given), prog="t")
        model = m.skeleton(cfg)
        m.adapt(model, cfg)
        return [text for text in memory.advice(cfg, model).remedies if "last_blocks" in text]

    half = len(placement.stack(m.load(base)).blocks) // 2
    assert len(advised()) == 1
    assert advised()[0].startswith(f"--lora.last_blocks {half} (nothing is kept of the ")
    assert advised(lora__last_blocks=1) == advised(lora__apply_to_vision_encoder="false") == []
