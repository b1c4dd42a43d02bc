"""The terms of the loss: recorded official values and gradients, and their borders."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden
from lora_core.testing.goldens import assert_close_golden, assert_gradient_close
from scenesplat_lora.losses import (
    Term,
    contrastive_loss,
    cosine_loss,
    distillation_loss,
    is_active,
    l2_loss,
    lovasz_loss,
    segmentation_loss,
)
from scenesplat_lora.lovasz import jaccard_steps, lovasz_softmax

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "losses")
TERMS = {
    "cosine_mean": Term("CosineSimilarity"),
    "cosine_sum": Term("CosineSimilarity", 0.5, "sum"),
    "l2_mean": Term("L2Loss"),
    "l2_sum": Term("L2Loss", 2.0, "sum"),
    "cosine_mean_nomask": Term("CosineSimilarity"),
    "contrastive": Term("AggregatedContrastiveLoss", 0.02, temperature=0.2),
    "contrastive_sum_t07": Term("AggregatedContrastiveLoss", 1.0, "sum", temperature=0.07),
}


def recorded_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    io = GOLDEN.io
    pred = io["pred"].clone().requires_grad_()
    return pred, io["target"], io["valid_feat_mask"], io["segment"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients_are_the_official_ones(name: str) -> None:
    pred, target, valid, segment = recorded_inputs()
    if name.endswith("nomask"):
        valid = torch.zeros_like(valid)
    generator = seeded(GOLDEN.config["contrastive_seed"])
    term = TERMS[name]
    total, parts = distillation_loss(pred, target, valid, segment, [term], 1.0, generator)
    assert_close_golden(total.reshape(1), GOLDEN.io[name])
    assert parts[term.type].item() == total.item()
    total.backward()
    expected = GOLDEN.io[f"{name}.grad_pred"]
    if expected.any():
        assert_gradient_close(pred.grad, expected, 1e-5)
    else:
        assert pred.grad is not None
        assert not pred.grad.any()


def test_the_order_of_the_rows_is_drawn_class_by_class() -> None:
    _, _, valid, segment = recorded_inputs()
    torch.manual_seed(GOLDEN.config["contrastive_seed"])
    counts = segment[valid & (segment != -1)].unique(return_counts=True)[1]
    for number, size in enumerate(counts[counts >= 100].tolist()):
        assert torch.equal(torch.randperm(size), GOLDEN.io[f"contrastive.perm{number}"])


def test_the_contrastive_schedule_is_the_official_one() -> None:
    pred, target, valid, segment = recorded_inputs()
    term = Term("AggregatedContrastiveLoss", 0.02, schedule="last_75")
    for progress, expected in GOLDEN.config["schedule_last_75"].items():
        generator = seeded(GOLDEN.config["contrastive_seed"])
        total, _ = distillation_loss(
            pred, target, valid, segment, [term], float(progress), generator
        )
        assert total.item() == pytest.approx(expected, rel=1e-5)


def test_a_schedule_that_is_none_is_refused() -> None:
    assert is_active("all", 0.0)
    assert not is_active("skip", 1.0)
    for schedule in ("last_0", "last_101", "first_10", "last_-5", ""):
        with pytest.raises(ConfigError, match="last_X"):
            Term("L2Loss", schedule=schedule)


def test_unit_targets_make_the_l2_term_twice_the_cosine_term() -> None:
    pred, target = (F.normalize(torch.randn(50, 8, generator=seeded(s)), dim=1) for s in (0, 1))
    torch.testing.assert_close(l2_loss(pred, target), 2 * cosine_loss(pred, target))


def test_values_of_rows_without_a_target_never_matter() -> None:
    pred, target, valid, segment = recorded_inputs()
    terms = [TERMS["cosine_mean"], TERMS["l2_mean"], TERMS["contrastive"]]
    results = []
    for value in (0.0, float("nan")):
        filled = target.where(valid[:, None], value)
        pred.grad = None
        total, _ = distillation_loss(pred, filled, valid, segment, terms, 1.0, seeded(0))
        total.backward()
        results.append((total.item(), pred.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_the_contrastive_loss_sees_small_classes_and_unlabelled_rows_never() -> None:
    pred = torch.randn(450, 6, generator=seeded(0)).requires_grad_()
    segment = torch.tensor([0] * 150 + [1] * 150 + [2] * 99 + [-1] * 51)
    contrastive_loss(pred, segment, generator=seeded(1)).backward()
    assert pred.grad[:300].any(1).all()
    assert not pred.grad[300:].any()
    without = pred.detach()[:300]
    torch.testing.assert_close(
        contrastive_loss(pred, segment, generator=seeded(1)),
        contrastive_loss(without, segment[:300], generator=seeded(1)),
    )


def test_a_contrastive_term_without_labels_is_zero() -> None:
    pred, target, valid, _ = recorded_inputs()
    total, _ = distillation_loss(pred, target, valid, None, [TERMS["contrastive"]])
    assert total.item() == 0
    assert total.requires_grad


def test_half_precision_changes_the_loss_by_rounding_only() -> None:
    pred, target, valid, segment = recorded_inputs()
    terms = [TERMS["cosine_mean"], TERMS["l2_mean"], TERMS["contrastive_sum_t07"]]
    exact, _ = distillation_loss(pred, target, valid, segment, terms, 1.0, seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        same, _ = distillation_loss(pred, target, valid, segment, terms, 1.0, seeded(0))
    assert same.dtype == torch.float32
    torch.testing.assert_close(same, exact)


def test_tensors_that_do_not_belong_together_are_named_together() -> None:
    pred, target, valid, segment = recorded_inputs()
    with pytest.raises(DataError, match=r"lang_feat \(800, 24\).*valid_feat_mask torch.int64"):
        distillation_loss(pred, target[:800], valid.long(), segment, [])
    with pytest.raises(DataError, match=r"\(900, 23\) in place of \(N, 24\)"):
        distillation_loss(pred, target[:, :23], valid, segment, [])


def test_impossible_terms_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'CosineSimilarity'"):
        Term("CosineSimilarty")
    for wrong in ({"loss_weight": -1.0}, {"temperature": 0.0}, {"reduction": "max"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Term("L2Loss", **wrong)
    with pytest.raises(ConfigError, match="not for a language model"):
        distillation_loss(*recorded_inputs(), [Term("LovaszLoss")])


# -- segmentation ----------------------------------------------------------------------------------


def exhaustive_lovasz(errors: Tensor, truth: Tensor) -> float:
    """The Lovász extension of the Jaccard loss as a maximum over orders of its greedy value.

    The set function is submodular, so its extension is the largest of these (Edmonds).
    """

    def jaccard(wrong: set[int]) -> float:
        mistaken = torch.tensor([row in wrong for row in range(len(truth))])
        kept, either = (truth & ~mistaken).sum(), (truth | mistaken).sum()
        return 1 - kept.item() / either.item()

    values = []
    for order in itertools.permutations(range(len(errors))):
        before, total = 0.0, 0.0
        for count in range(1, len(order) + 1):
            after = jaccard(set(order[:count]))
            total += errors[order[count - 1]].item() * (after - before)
            before = after
        values.append(total)
    return max(values)


def test_lovasz_is_the_convex_closure_of_the_jaccard_loss() -> None:
    probabilities = torch.rand(5, 3, generator=seeded(3), dtype=torch.float64).softmax(1)
    labels = torch.tensor([0, 1, 1, 0, 1])
    expected = [
        exhaustive_lovasz(((labels == c).double() - probabilities[:, c]).abs(), labels == c)
        for c in (0, 1)
    ]
    loss = lovasz_softmax(probabilities, labels)
    assert loss.item() == pytest.approx(sum(expected) / 2, abs=1e-12)


def test_lovasz_of_hard_decisions_is_one_minus_the_mean_iou() -> None:
    labels = torch.randint(0, 4, (200,), generator=seeded(0))
    guesses = torch.where(torch.rand(200, generator=seeded(1)) < 0.7, labels, (labels + 1) % 4)
    ious = [
        ((labels == c) & (guesses == c)).sum() / ((labels == c) | (guesses == c)).sum()
        for c in range(4)
    ]
    loss = lovasz_softmax(F.one_hot(guesses, 4).double(), labels)
    assert loss.item() == pytest.approx(1 - torch.stack(ious).mean().item(), abs=1e-6)


def test_jaccard_steps_add_up_to_one() -> None:
    truth = torch.rand(1000, generator=seeded(0)) < 0.1
    assert jaccard_steps(truth).sum().item() == pytest.approx(1, abs=1e-12)


def test_the_gradient_of_lovasz_is_that_of_finite_differences() -> None:
    logits = torch.randn(12, 3, generator=seeded(0), dtype=torch.float64)
    labels = torch.randint(0, 3, (12,), generator=seeded(1))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: lovasz_softmax(z.softmax(1), labels), (logits,))


def test_rows_without_a_label_do_not_count_in_segmentation() -> None:
    logits = torch.randn(40, 5, generator=seeded(0)).requires_grad_()
    segment = torch.randint(-1, 5, (40,), generator=seeded(1)).int()
    terms = [Term("CrossEntropyLoss"), Term("LovaszLoss")]
    total, parts = segmentation_loss(logits, segment, terms)
    labelled = segment != -1
    kept, _ = segmentation_loss(logits[labelled], segment[labelled], terms)
    torch.testing.assert_close(total, kept)
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))
    total.backward()
    assert not logits.grad[~labelled].any()
    nothing, _ = segmentation_loss(logits, torch.full((40,), -1), terms)
    nothing.backward()
    assert nothing.item() == 0


def test_a_label_beyond_the_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"labels from 0 to 5, the model 5 classes"):
        segmentation_loss(torch.randn(2, 5), torch.tensor([0, 5]), [Term("CrossEntropyLoss")])


def test_lovasz_without_labels_has_a_gradient_of_zeros() -> None:
    logits = torch.randn(4, 3).requires_grad_()
    lovasz_loss(logits, torch.full((4,), -1)).backward()
    assert torch.equal(logits.grad, torch.zeros(4, 3))
