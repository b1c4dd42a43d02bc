"""Pretraining of scenesplat-lora's tiny base: a run that was stopped ends as one that was not."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SPEC = importlib.util.spec_from_file_location(
    "pretrain_scenesplat_demo_base",
    Path(__file__).parent / "pretrain_scenesplat_demo_base.py",
)
pretrain = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pretrain)


@pytest.fixture(autouse=True)
def smallest_network(monkeypatch) -> None:
    """One block everywhere, and rooms scored seldom: the way is tested, not the result."""
    small = pretrain.PTv3Config(
        in_channels=11, order=pretrain.CURVES, stride=(2,), enc_depths=(1, 1),
        enc_channels=(8, 8), enc_num_head=(1, 1), enc_patch_size=(64, 64),
        dec_depths=(1,), dec_channels=(pretrain.rooms.WIDTH,), dec_num_head=(1,),
        dec_patch_size=(64,), drop_path=0.1,
    )  # fmt: skip
    monkeypatch.setattr(pretrain, "CONFIG", small)
    monkeypatch.setattr(pretrain, "score", lambda model, some: ({}, {}))


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path) -> None:
    whole = pretrain.Run(tmp_path / "whole", steps=4, batch=1)
    whole.output.mkdir()
    whole.train(log_every=10)
    first = pretrain.Run(tmp_path / "parts", steps=4, batch=1)
    first.output.mkdir()
    schedule = pretrain.OneCycle(4)
    for _ in range(2):
        pretrain.set_one_cycle(first.optimizer, schedule, first.step, [pretrain.PEAK])
        first.update()
        first.step += 1
    first.save()
    second = pretrain.Run(tmp_path / "parts", steps=4, batch=1)
    assert second.step == 2
    second.train(log_every=10)
    expected = whole.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_another_length_does_not_go_on_with_the_run(tmp_path) -> None:
    run = pretrain.Run(tmp_path, steps=4, batch=1)
    run.save()
    with pytest.raises(SystemExit, match="--steps 4"):
        pretrain.Run(tmp_path, steps=5, batch=1)


def test_the_result_is_half_precision_and_describes_itself(tmp_path) -> None:
    run = pretrain.Run(tmp_path, steps=1, batch=1)
    pretrain.finish(run, count=1)
    tensors = load_file(tmp_path / "scenesplat_demo.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16, torch.int64}
    assert all(name.startswith("backbone.") for name in tensors)
    model = pretrain.load_official(tmp_path / "scenesplat_demo.safetensors")
    assert model.backbone.config == pretrain.CONFIG


def test_augmented_rooms_are_batches_for_the_network() -> None:
    steps = pretrain.compose(pretrain.augmentation())
    sample = steps(pretrain.rooms.room(1), pretrain.np.random.default_rng(0))
    assert sample["feat"].shape == (len(sample["coord"]), 11)
    assert sample["feat"][:, :3].abs().max() <= 1
    assert sample["lang_feat"].shape == (len(sample["coord"]), pretrain.rooms.WIDTH)
