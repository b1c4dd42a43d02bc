"""The two matchers: the pairs that the official code finds, and what they refuse or survive."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden
from sam3_lora import matching
from sam3_lora.matching import (
    Match,
    MatchSettings,
    assigned,
    costs,
    match,
    overlaps,
    owners,
    upper_quantile,
)
from sam3_lora.outputs import Targets

GOLDENS = Path(__file__).parent / "goldens"
LAYERS = ("aux0.", "aux1.", "")  # of the recorded case; the last one is the final layer


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_golden(GOLDENS / "losses").io


def golden_targets(io: dict[str, Tensor]) -> Targets:
    return Targets(io["target.boxes"], io["target.num_boxes"])


def layers(io: dict[str, Tensor], half: str) -> tuple[Tensor, Tensor]:
    logits = torch.stack([io[f"out.{layer}pred_logits{half}"][..., 0] for layer in LAYERS])
    return logits, torch.stack([io[f"out.{layer}pred_boxes{half}"] for layer in LAYERS])


def assert_pairs(found: Match, number: int, io: dict[str, Tensor], name: str) -> None:
    pairs = found.layer == number
    for field in ("batch", "query", "target"):
        assert getattr(found, field)[pairs].tolist() == io[f"match.{name}{field}"].tolist()


def random_case(
    counts: list[int], queries: int = 12, layers: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Targets]:
    g = torch.Generator().manual_seed(seed)
    batch, total = len(counts), sum(counts)

    def boxes(*shape: int) -> Tensor:
        size = 0.05 + 0.4 * torch.rand(*shape, 2, generator=g)
        return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, generator=g), size], -1)

    logits = torch.randn(layers, batch, queries, generator=g)
    return (
        logits,
        boxes(layers, batch, queries),
        Targets(boxes(total), torch.tensor(counts, dtype=torch.int64)),
    )


def find(logits: Tensor, boxes: Tensor, targets: Targets, many: bool = False) -> Match:
    return match(logits, boxes, targets, MatchSettings(), one_to_many_last=many)


# -- recorded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "name"), [("", "o2o"), ("_o2m", "o2m_hungarian")])
def test_golden_one_to_one_pairs_of_every_layer(
    io: dict[str, Tensor], half: str, name: str
) -> None:
    found = find(*layers(io, half), golden_targets(io))
    for number, layer in enumerate(LAYERS):
        assert_pairs(found, number, io, f"{name}.{layer}")
    assert found.sizes == [5, 5, 5]
    assert found.labels.all()


@pytest.mark.parametrize("layer", LAYERS)
def test_golden_one_to_many_pairs(io: dict[str, Tensor], layer: str) -> None:
    logits, boxes = (
        io[f"out.{layer}pred_logits_o2m"][None, ..., 0],
        io[f"out.{layer}pred_boxes_o2m"],
    )
    found = find(logits, boxes[None], golden_targets(io), many=True)
    assert_pairs(found, 0, io, f"o2m_topk.{layer}")


def test_golden_train_step_pairs() -> None:
    io = load_golden(GOLDENS / "train_step").io
    names = ("aux0", "aux1", "final")
    logits = torch.stack([io[f"{name}.pred_logits"].flatten(1) for name in names])
    found = find(
        logits, torch.stack([io[f"{name}.pred_boxes"] for name in names]), golden_targets(io)
    )
    for number, name in enumerate(names):
        pairs = found.layer == number
        assert found.batch[pairs].tolist() == io[f"{name}.match_batch"].tolist()
        assert found.query[pairs].tolist() == io[f"{name}.match_query"].tolist()
        assert found.target[pairs].tolist() == io[f"{name}.match_target"].tolist()


# -- what the matchers compute ---------------------------------------------------------------------


def test_pairs_have_the_least_cost_of_all_possible_pairs() -> None:
    logits, boxes, targets = random_case([3], queries=6)
    cost = costs(logits, boxes, targets.boxes, owners(targets), MatchSettings())[0].double()
    least = min(
        sum(float(cost[t, q]) for t, q in enumerate(queries))
        for queries in itertools.permutations(range(6), 3)
    )
    found = find(logits, boxes, targets)
    assert float(cost[found.target, found.query].sum()) == pytest.approx(least)


def test_pairs_stay_within_their_phrase() -> None:
    logits, boxes, targets = random_case([2, 0, 3, 0], layers=3)
    found = find(logits, boxes, targets, many=True)
    owner = np.array([0, 0, 2, 2, 2])
    assert (found.batch == owner[found.target]).all()
    assert (np.diff(found.layer) >= 0).all()
    assert found.present.tolist() == [True, False, True, False]


def test_many_targets_are_matched_as_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case([7, 0, 9], layers=2)
    whole = find(*case, many=True)
    monkeypatch.setattr(matching, "TARGETS_AT_ONCE", 3)
    parts = find(*case, many=True)
    assert whole.target.tolist() == parts.target.tolist()
    assert whole.query.tolist() == parts.query.tolist()


@pytest.mark.parametrize("queries", [5, 6, 12, 200])
def test_the_upper_quantile_is_that_of_torch(queries: int) -> None:
    values = torch.rand(7, queries, generator=torch.Generator().manual_seed(queries))
    expected = torch.quantile(values, 1 - 4 / queries, dim=-1, keepdim=True)
    torch.testing.assert_close(upper_quantile(values, 4), expected)


@pytest.mark.parametrize("queries", [1, 3, 4])
def test_with_so_few_queries_all_good_ones_answer_for_a_target(queries: int) -> None:
    logits, boxes, targets = random_case([1, 1], queries=queries)
    boxes = targets.boxes[None, :, None].expand(1, 2, queries, 4).clone()  # IoU 1: S above 0.7
    boxes[0, 1, 0] = torch.tensor([0.99, 0.99, 0.01, 0.01])  # S below 0.4
    found = find(logits, boxes, targets, many=True)
    assert found.batch.tolist() == [0] * queries + [1] * (queries - 1)


def test_of_a_query_with_several_targets_the_last_one_sets_the_label() -> None:
    logits, boxes, targets = random_case([2], queries=3)
    targets.boxes[:] = torch.tensor([0.5, 0.5, 0.4, 0.4])
    boxes[0, 0] = targets.boxes[:1]
    found = find(logits, boxes, targets, many=True)
    assert found.query.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.target[found.labels].tolist() == [1, 1, 1]


def test_assigned_are_the_best_four_above_the_threshold() -> None:
    logits, boxes, targets = random_case([3], queries=20)
    boxes[0, 0, :10] = targets.boxes[0] * torch.linspace(0.9, 1.1, 10)[:, None]
    iou, _ = overlaps(boxes[0, 0], targets.boxes[:, None])
    score = 0.3 * logits[0, 0].sigmoid() + 0.7 * iou  # [3, 20]
    chosen = assigned(logits, boxes, targets.boxes, owners(targets), MatchSettings())[0]
    for row, values in zip(chosen, score, strict=True):
        best = [q for q in values.topk(4).indices.tolist() if values[q] > 0.4]
        assert row.nonzero()[:, 0].tolist() == sorted(best)
    assert chosen[0].sum() == 4


# -- borders ---------------------------------------------------------------------------------------


def test_without_any_target_there_are_no_pairs() -> None:
    found = find(*random_case([0, 0], layers=2), many=True)
    assert found.sizes == [0, 0]
    assert found.target.shape == (0,)
    assert not found.present.any()


def test_of_more_targets_than_queries_as_many_as_queries_are_matched() -> None:
    found = find(*random_case([9, 1], queries=4))
    assert np.bincount(found.batch).tolist() == [4, 1]
    assert sorted(found.query[:4].tolist()) == [0, 1, 2, 3]
    assert len(set(found.target.tolist())) == 5


@pytest.mark.fault("R42")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_predictions_that_are_not_finite_are_taken_last(value: float) -> None:
    logits, boxes, targets = random_case([2, 1])
    logits[0, 0, 3], boxes[0, 1, 5] = value, value
    found = find(logits, boxes, targets)
    assert len(found.query) == 3
    assert not np.isin(3, found.query[:2])
    assert found.query[2] != 5
    logits[:] = boxes[:] = value
    assert find(logits, boxes, targets).sizes == [3]


def test_overlaps_and_their_gradients_are_finite_without_any_area() -> None:
    a = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0.2], [0.2, 0.2, 0, 0]], requires_grad=True)
    b = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0.1, 0], [0.8, 0.8, 0.2, 0.2]])
    iou, giou = overlaps(a, b)
    assert iou.tolist() == [0, 0, 0]
    assert giou.min() >= -1
    assert giou.max() <= 0
    (iou + giou).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_a_target_without_area_is_matched_but_does_not_count_as_present() -> None:
    logits, boxes, targets = random_case([1, 2])
    targets.boxes[0, 2] = targets.boxes[1, 3] = 0
    found = find(logits, boxes, targets, many=True)
    assert found.present.tolist() == [False, True]
    assert find(logits, boxes, targets).sizes == [3]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "cause"),
    [
        ((320.0, 240.0, 64.0, 48.0), "look like pixels"),
        ((0.3, 0.4, 0.9, 0.8), "not xyxy"),
        ((0.5, 0.5, -0.1, 0.2), "sticks out"),
        ((0.5, float("nan"), 0.1, 0.2), "NaN"),
    ],
)
def test_target_boxes_that_are_no_shares_of_the_image_are_refused(
    box: tuple[float, ...], cause: str
) -> None:
    logits, boxes, targets = random_case([2, 0, 1])
    targets.boxes[2] = torch.tensor(box)
    with pytest.raises(DataError, match=cause) as caught:
        find(logits, boxes, targets)
    assert "1 of 3 target boxes" in str(caught.value)
    assert "target 2, of phrase 2" in str(caught.value)


def test_boxes_that_touch_the_border_are_accepted() -> None:
    logits, boxes, targets = random_case([2])
    targets.boxes[:] = torch.tensor([[0.5, 0.5, 1.0, 1.0], [1 - 0.1 / 3, 0.05, 0.2 / 3, 0.1]])
    assert find(logits, boxes, targets).sizes == [2]


def test_fields_that_do_not_fit_each_other_are_refused() -> None:
    logits, boxes, targets = random_case([2, 1])
    for counts in ([2, 2], [3], [4, -1], [900, 900]):
        wrong = Targets(targets.boxes, torch.tensor(counts))
        with pytest.raises(ValueError, match="do not divide 3 boxes among 2 phrases"):
            find(logits, boxes, wrong)
    wrong = Targets(targets.boxes, targets.counts, has_mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 entries for 3 targets"):
        find(logits, boxes, wrong)


def test_settings_that_cannot_work_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        MatchSettings(cost_giou=-1, o2m_topk=0, o2m_alpha=float("nan"))
    assert [name in str(caught.value) for name in ("cost_giou", "o2m_topk", "o2m_alpha")] == [
        True
    ] * 3
