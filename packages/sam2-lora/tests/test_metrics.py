"""Scores against recorded values, and the promises of an evaluation."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.pictures.masks import trim
from sam2_lora import metrics
from sam2_lora.config import Config
from sam2_lora.data import EvalRecord
from sam2_lora.metrics import Tally, evaluate, iou_above_probability
from sam2_lora.model import load

CASE = Path(__file__).parent / "goldens" / "metrics"
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(CASE / "io.safetensors")


def tally_of(io: dict[str, Tensor], batch_size: int = 6) -> Tally:
    tally = Tally()
    pairs = zip((io["prob"] > 0.5).split(batch_size), (io["gt"] > 0).split(batch_size), strict=True)
    for masks, targets in pairs:
        tally.add(masks, targets)
    return tally


def test_golden_scores_of_every_picture(io: dict[str, Tensor]) -> None:
    tally = tally_of(io)
    for name, counts in zip(("tp", "fp", "fn"), np.array(tally.counts).T, strict=True):
        assert counts.tolist() == io[f"image.{name}"].tolist()
    for name, values in tally.scores().items():
        assert values.tolist() == pytest.approx(io[f"image.{name}"].tolist(), abs=TOLERANCE)


def test_golden_means_shares_and_pooled_scores(io: dict[str, Tensor]) -> None:
    summary = tally_of(io).summary()
    recorded = {f"mean.m{name}": name for name in ("iou", "dice", "precision", "recall", "f1")}
    recorded |= {f"pooled.{name}": f"pooled_{name}" for name in ("iou", "dice")}
    recorded |= {f"frac_iou_ge_{level}": f"iou_ge_{level}" for level in (50, 75, 90, 95)}
    for key, name in recorded.items():
        assert summary[name] == pytest.approx(io[key].item(), abs=TOLERANCE), name


@pytest.mark.parametrize("level", [50, 75, 90, 95])
def test_golden_iou_of_thresholded_probabilities(io: dict[str, Tensor], level: int) -> None:
    value = iou_above_probability(io["prob"].numpy(), io["gt"].numpy() > 0, level / 100)
    assert value == pytest.approx(io[f"legacy.iou_prob_gt_{level}"].item(), abs=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_figures_are_bit_equal_for_any_batch_size(io: dict[str, Tensor], batch_size: int) -> None:
    assert tally_of(io, batch_size).summary() == tally_of(io).summary()


def test_nothing_at_all_scores_nan_and_no_error() -> None:
    assert all(math.isnan(value) for value in Tally().summary().values())


def test_classes_have_their_own_mean() -> None:
    tally = Tally()
    tally.add_counts([(1, 0, 0), (1, 1, 0), (1, 0, 3)], ["scratch", "pit", "pit"])
    assert tally.class_iou() == {"pit": (1 / 2 + 1 / 4) / 2, "scratch": 1.0}


# -- evaluation of a network ---------------------------------------------------------------------


@pytest.fixture
def network(golden_base: Path) -> Any:
    return load(golden_base)


def pictures(count: int = 3) -> list[EvalRecord]:
    """Noisy pictures of 96 x 160 with two objects of two classes; the last one without any."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(count):
        rgb = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
        square, bar = np.zeros((2, 96, 160), dtype=bool)
        square[20:60, 30 + 10 * index : 70] = True
        bar[70:80, 20:150] = True
        objects = [trim(square, (0, 0), (96, 160), "square"), trim(bar, (0, 0), (96, 160), "bar")]
        records.append(EvalRecord(str(index), rgb, objects, small=[]))
    records[-1] = replace(records[-1], objects=[])
    return records


CONFIG = Config(image_size="128")


def test_the_first_key_is_what_best_follows(network: Any) -> None:
    figures = evaluate(network, pictures(), CONFIG)
    assert next(iter(figures)) == "iou"
    expected = {"dice", "precision", "recall", "f1", "iou_ge_50", "iou_ge_95", "box_iou"}
    expected |= {"box_dice", "click3_iou", "click5_dice", "pooled_iou"}
    expected |= {"class_iou/bar", "class_iou/square"}
    assert expected <= set(figures)
    assert all(math.isfinite(value) for value in figures.values())
    assert (figures["objects"], figures["images"], figures["empty_images"]) == (4, 3, 1)


def test_a_picture_without_objects_never_counts_as_iou_1(network: Any) -> None:
    with_empty, without = (
        evaluate(network, pictures(), CONFIG),
        evaluate(network, pictures()[:2], CONFIG),
    )
    assert with_empty["iou"] == without["iou"]
    assert without["empty_images"] == without["false_positive_images"] == 0


def test_a_picture_with_objects_too_small_to_score_is_not_empty(network: Any) -> None:
    first = pictures()[0]
    record = replace(first, objects=[], small=first.objects)
    figures = evaluate(network, [record], CONFIG)
    assert (figures["images"], figures["objects"], figures["empty_images"]) == (1, 0, 0)


def test_a_mask_on_an_empty_picture_is_a_false_positive(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "EMPTY_GRID", metrics.Grid(4, min_score=1.0))
    assert evaluate(network, pictures()[2:], CONFIG)["false_positive_images"] == 0
    lenient = metrics.Grid(4, min_score=0, min_stability=0, min_object_score=-99, max_area=1)
    monkeypatch.setattr(metrics, "EMPTY_GRID", lenient)
    assert evaluate(network, pictures()[2:], CONFIG)["false_positive_images"] == 1


def test_filled_box_is_what_the_box_scores_as_a_mask(network: Any) -> None:
    figures = evaluate(network, pictures(), CONFIG)
    assert figures["filled_box_iou"] == figures["filled_box_dice"] == 1.0  # they are rectangles
    triangle = np.tri(40, 40, dtype=bool)
    objects = [trim(triangle, (10, 10), (96, 160), "triangle")]
    assert (
        evaluate(network, [replace(pictures()[0], objects=objects)], CONFIG)["filled_box_iou"]
        == triangle.sum() / 40**2
    )


def test_evaluation_is_the_same_for_any_number_of_objects_at_a_time(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = evaluate(network, pictures(), CONFIG)
    monkeypatch.setattr(metrics, "OBJECTS_AT_ONCE", 1)
    assert evaluate(network, pictures(), CONFIG) == pytest.approx(together, abs=1e-3)


def test_evaluation_is_deterministic_and_draws_no_random_number(network: Any) -> None:
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002 - nobody may touch it
    first, second = evaluate(network, pictures(), CONFIG), evaluate(network, pictures(), CONFIG)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_every_modules_mode_comes_back(network: Any) -> None:
    network.train()
    network.prompt_encoder.eval()
    modes = {name: module.training for name, module in network.named_modules()}
    evaluate(network, pictures()[:1], CONFIG)
    assert modes == {name: module.training for name, module in network.named_modules()}
    assert torch.is_grad_enabled()


def test_the_encoder_runs_once_per_picture(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = metrics.encode_pictures
    monkeypatch.setattr(metrics, "encode_pictures", lambda *args: calls.append(1) or real(*args))
    evaluate(network, pictures(), CONFIG)
    assert len(calls) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_changes_the_computation_but_hardly_the_scores(
    network: Any, precision: Any
) -> None:
    network.cuda()
    exact = evaluate(network, pictures(), replace(CONFIG, precision="fp32"))
    half = evaluate(network, pictures(), replace(CONFIG, precision=precision))
    assert half["pooled_iou"] != exact["pooled_iou"]
    assert half["pooled_iou"] == pytest.approx(exact["pooled_iou"], abs=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_the_cpu_is_refused_with_what_works(network: Any, precision: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{precision} does not run on cpu: use auto or fp32"):
        evaluate(network, pictures(), replace(CONFIG, precision=precision))


def test_each_kind_of_prompt_is_decoded_as_documented(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    real = metrics.decode

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(metrics, "decode", watched)
    evaluate(network, pictures()[:1], CONFIG)
    box, *clicks = calls
    assert not box["multimask"]
    assert box["boxes"][0].tolist() == pytest.approx(
        [30 * 0.8, 20 * 128 / 96, 69 * 0.8, 59 * 128 / 96]
    )
    assert [call["points"].shape[1] for call in clicks] == [1, 2, 3, 4, 5, 6]
    assert [call["multimask"] for call in clicks] == [True] + [False] * 5
    first = clicks[0]["points"][0, 0] / torch.tensor([128 / 160, 128 / 96])
    assert 45 <= first[0] <= 54  # the middle of the square
    assert 39 <= first[1] <= 40
