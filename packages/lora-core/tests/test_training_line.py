"""The line of a training on the terminal: short enough to read, and the same parts in each."""

import pytest

from lora_core.report import duration, figure
from lora_core.training.figures import on_a_line

OTHERS = {"lr": 1e-5}
MANY = ["loss_bbox", "loss_giou", "loss_ce", "presence_loss", "loss_mask", "loss_dice",
        "loss_semantic_seg", "loss_semantic_dice", "loss_aux", "loss_o2m", "accuracy"]  # fmt: skip


def line(shown: dict[str, float], steps: int) -> str:
    """As `Progress.report` writes it."""
    figures = "  ".join(f"{name} {figure(value)}" for name, value in shown.items())
    return f"step {steps}/{steps}  {figures}  left {duration(359_999)}"


@pytest.mark.parametrize("steps", [4, 1_000_000])
@pytest.mark.parametrize("size", [1e-9, 0.5, 54321.0])
@pytest.mark.parametrize("columns", [80, 100])
def test_a_line_fits_whatever_its_numbers_are(steps: int, size: float, columns: int) -> None:
    means = {**dict.fromkeys(MANY, size), "loss": size}
    assert len(line(on_a_line(means, OTHERS, steps, columns), steps)) <= columns


def test_the_first_parts_of_a_loss_are_shown_after_it_under_short_names() -> None:
    means = {**dict.fromkeys(MANY, 0.5), "loss": 2.0}
    shown = list(on_a_line(means, OTHERS, 4000))
    assert shown == ["loss", "bbox", "giou", "ce", "lr"]
    smaller = on_a_line(dict.fromkeys(means, 1e-7), OTHERS, 4000)
    assert list(smaller) == shown, "the same ones whatever the values are"


def test_few_parts_are_all_shown_and_none_hides_another() -> None:
    means = {"loss": 1.0, "loss_lr": 2.0, "lr_loss": 3.0, "loss_a": 4.0, "a": 5.0, "loss_": 6.0}
    shown = on_a_line(means, {"lr": 7.0}, 10, columns=200)
    assert shown == {**means, "lr": 7.0}
    assert on_a_line({"loss": 1.0, "mse": 2.0}, {}, 10) == {"loss": 1.0, "mse": 2.0}
    assert on_a_line({"mse": 2.0}, {}, 10) == {"mse": 2.0}
