"""The comparison of LoRA with full fine-tuning: what is chosen, and what may be concluded."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location(
    "compare_full_finetuning", TOOLS / "compare_full_finetuning.py"
)
assert SPEC is not None
assert SPEC.loader is not None
compare = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = compare  # dataclasses look their module up
SPEC.loader.exec_module(compare)

BASE = {"val": 0.4, "test": 0.5, "test box": 0.6}
WHAT = SimpleNamespace(
    chooses="val", compared=("test",), falling=frozenset(), about="IoU", sample="picture"
)
LOSSES = SimpleNamespace(**vars(WHAT) | {"falling": frozenset(["val", "test"])})


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`full_finetuning` and `sam3_base` lie beside the program."""
    monkeypatch.syspath_prepend(str(TOOLS))


def runs(method: str, rate: float, val: list[float], test: list[float]) -> list:
    share = {"LoRA": 0.05, "full": 1.0}[method]
    return [
        compare.Run(method, rate, seed, share, dict(zip(BASE, (*scores, 0.7), strict=True)))
        for seed, scores in enumerate(zip(val, test, strict=True))
    ]


def test_the_rate_is_chosen_on_validation_and_never_on_test() -> None:
    everything = [
        *runs("LoRA", 1e-3, [0.50, 0.52], [0.60, 0.62]),
        *runs("LoRA", 1e-2, [0.49, 0.52], [0.90, 0.92]),
        *runs("full", 1e-2, [0.99, 0.99], [0.10, 0.10]),
    ]
    assert {run.rate for run in compare.chosen(WHAT, everything, "LoRA")} == {1e-3}
    assert {run.rate for run in compare.chosen(WHAT, everything, "full")} == {1e-2}
    assert {run.rate for run in compare.chosen(LOSSES, everything, "LoRA")} == {1e-2}


def test_the_share_is_taken_seed_by_seed() -> None:
    everything = [
        *runs("LoRA", 1e-3, [0.5, 0.5, 0.5], [0.68, 0.70, 0.72]),  # gains 0.18 0.20 0.22
        *runs("full", 1e-3, [0.5, 0.5, 0.5], [0.70, 0.70, 0.72]),  # gains 0.20 0.20 0.22
    ]
    text, valid = compare.report(WHAT, BASE, everything, compare.arguments(["sam2"]))
    assert valid
    assert "LoRA reaches 97 ± 6 % of that gain." in text  # 90, 100, 100 %
    assert "| LoRA | 5.0 % | 0.001 | 0.500 ± 0.000 | 0.700 ± 0.020 |" in text
    assert "| base | 0 % | | 0.400 | 0.500 | 0.600 |" in text


def test_a_loss_gains_by_falling() -> None:
    everything = [
        *runs("LoRA", 1e-3, [0.3, 0.3], [0.40, 0.41]),  # gains 0.10 0.09
        *runs("full", 1e-3, [0.3, 0.3], [0.40, 0.40]),  # gains 0.10 0.10
    ]
    text, valid = compare.report(LOSSES, BASE, everything, compare.arguments(["sam2"]))
    assert valid
    assert "LoRA reaches 95 ± 7 % of that gain." in text
    rising, valid = compare.report(WHAT, BASE, everything, compare.arguments(["sam2"]))
    assert not valid
    assert "LoRA reaches" not in rising


def test_nothing_is_concluded_from_a_small_full_gain() -> None:
    everything = [
        *runs("LoRA", 1e-3, [0.5, 0.5], [0.60, 0.61]),
        *runs("full", 1e-3, [0.5, 0.5], [0.55, 0.65]),  # 0.10 ± 0.07
    ]
    text, valid = compare.report(WHAT, BASE, everything, compare.arguments(["sam2"]))
    assert not valid
    assert "LoRA reaches" not in text


def test_one_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.arguments(["sam2", "--seeds", "1"])
    assert "--seeds 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("package", ["isaac", "midi3d", "sam2", "sam3", "scenesplat"])
def test_both_methods_train_from_the_same_start(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "scenesplat":
        monkeypatch.setattr("full_finetuning.scenesplat.SPLITS", {"train": 4, "val": 4})
        monkeypatch.setattr("full_finetuning.scenesplat.TEST_ROOMS", 4)
    if package == "isaac":
        monkeypatch.setattr("isaac_lora.demo.SPLITS", {"train": 20, "val": 4, "test": 0})
        for name in ("TEST_SCENES", "OLD_SCENES"):
            monkeypatch.setattr(f"full_finetuning.isaac.{name}", 6)
    if package == "midi3d":
        monkeypatch.setattr("midi3d_lora.demo.SPLITS", {"train": 4, "val": 2, "test": 0})
        for name in ("TEST_SCENES", "OLD_SCENES", "GENERATED"):
            monkeypatch.setattr(f"full_finetuning.midi3d.{name}", 2)
    words = ["--steps", "2", "--seeds", "2", "--rates", "1e-3", "--runs", str(tmp_path / "runs")]
    args = compare.arguments([package, *words])
    comparison = compare.prepare(args, tmp_path / "data")
    base, done = comparison.base(), compare.train_all(comparison, args)
    places = [(run.method, run.seed) for run in done]
    assert places == [("LoRA", 0), ("LoRA", 1), ("full", 0), ("full", 1)]
    assert 0 < done[0].share_trained < 0.4  # the tiny networks are narrow for their ranks
    whole = 0.873 if package == "isaac" else 1  # it leaves the vision tower as it is
    assert done[2].share_trained == pytest.approx(whole, abs=1e-3)
    for name in comparison.compared:
        assert all(abs(run.figures[name] - base[name]) < 0.3 for run in done)
    assert len({run.figures[comparison.chooses] for run in done}) == 4
    assert compare.train_all(None, args) == done  # nothing is trained twice
