"""Pretraining of midi3d-lora's tiny base: a run that was stopped ends as one that was not."""

from dataclasses import replace
from pathlib import Path

import pretrain_midi3d_demo_base as pretrain
import pytest
import torch
from midi3d_base import figures, flow, networks, shapes
from PIL import Image

from midi3d_lora.conditioning.dino import dino_pixels
from midi3d_lora.demo_base import scenes
from midi3d_lora.meshes.extraction import ExtractionSettings
from midi3d_lora.pipeline import MIDIPipeline


@pytest.fixture(autouse=True, scope="module")
def small_batches():
    """The way is tested, not the result."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        yield


def shrink(monkeypatch) -> None:
    for name, value in {"batch": 2, "points": 64, "queries": 32, "measured": 8}.items():
        monkeypatch.setattr(shapes.Shapes, name, value)
    monkeypatch.setattr(flow.Flow, "batch", 2)
    monkeypatch.setattr(flow, "HELD_OUT", 2)
    monkeypatch.setattr(flow, "POINTS", 128)
    monkeypatch.setattr(shapes.Shapes, "figures", lambda self: {})


def new_run(folder: Path, steps=(2, 3)) -> "pretrain.Run":
    folder.mkdir(exist_ok=True)
    return pretrain.Run(folder, steps, scenes=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> "pretrain.Run":
    """A run that nobody stopped."""
    run = new_run(tmp_path_factory.mktemp("run") / "whole")
    run.train(log_every=10)
    return run


def stop_after(monkeypatch, steps: int) -> None:
    """The process ends before the update after so many."""
    update, left = pretrain.Run.update, [steps]

    def stopping(self):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return update(self)

    monkeypatch.setattr(pretrain.Run, "update", stopping)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, whole, steps) -> None:
    monkeypatch.setattr(pretrain, "SAVE_EVERY", -1)
    with monkeypatch.context() as stopped:
        stop_after(stopped, steps)
        with pytest.raises(KeyboardInterrupt):
            new_run(tmp_path / "parts").train(log_every=10)
    second = new_run(tmp_path / "parts")
    assert (second.stage, second.step) == ((0, 1) if steps == 1 else (1, steps - 2))
    second.train(log_every=10)
    expected = whole.networks.state()
    for name, state in second.networks.state().items():
        for key, tensor in state.items():
            assert torch.equal(tensor, expected[name][key]), f"{name} {key}"


def test_another_length_does_not_go_on_with_the_stage(tmp_path) -> None:
    new_run(tmp_path).save()
    with pytest.raises(SystemExit, match=r"--steps \[2, 3\]"):
        new_run(tmp_path, steps=(2, 4))


def test_the_result_is_a_small_model_directory_in_half_precision(tmp_path) -> None:
    run = new_run(tmp_path)
    pipe = pretrain.finish(run, count=0)
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert size < 6_000_000
    halves = MIDIPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float16)
    mine, found = run.networks.transformer.state_dict(), halves.transformer.state_dict()
    assert all(torch.equal(mine[name].half(), tensor) for name, tensor in found.items())
    assert pipe.transformer.multi_instance_blocks == networks.MULTI_INSTANCE_BLOCKS
    assert pipe.transformer.config.width == scenes.NUM_TOKENS  # so that the default is right


def test_a_generated_scene_is_scored_from_its_picture(tmp_path, monkeypatch) -> None:
    pipe = pretrain.finish(new_run(tmp_path), count=0)
    monkeypatch.setattr(figures, "STEPS", 2)
    monkeypatch.setattr(figures, "POINTS", 50)
    monkeypatch.setattr(figures, "EXTRACTION", ExtractionSettings(depth=3, coarse_depth=3))
    table = figures.table_of(pipe, count=1)
    assert set(table) == {f"{s}, {w}" for s in ("indoors", "outdoors")
                          for w in ("generated", "rebuilt")}  # fmt: skip
    assert all(0 <= row["scene_f_score"] <= 1 for row in table.values())
    figures.draw(pipe, tmp_path / "generated.png", count=1, size=20)
    with Image.open(tmp_path / "generated.png") as picture:
        assert picture.size == (80, 40)
        assert picture.getextrema()[0][0] < 200  # the true scene is drawn


def test_standardised_latents_have_unit_variance_and_the_same_fields() -> None:
    vae = networks.new_networks(3).vae.eval()
    data = shapes.batch((1, 0), 6, 256, 40)
    before = vae.encode(data[0], 16, seed=0).latent_dist
    fields = vae.decode(before.mean, data[1]).sample.detach()
    networks.standardise_latents(vae, before.mean.detach())
    after = vae.encode(data[0], 16, seed=0).latent_dist
    channels = after.mean.reshape(-1, after.mean.shape[-1])
    assert channels.mean(0).abs().max() < 1e-4
    assert (channels.std(0) - 1).abs().max() < 1e-4
    assert torch.allclose(vae.decode(after.mean, data[1]).sample, fields, atol=1e-5)
    shrunk = before.mean.reshape(-1, channels.shape[1]).std(0)
    assert torch.allclose(after.std * shrunk, before.std, rtol=1e-4)


def test_the_encoder_is_trained_on_the_pixels_that_users_give_it() -> None:
    pool = flow.make_pool(networks.new_networks(0), [(7, 0), (7, 1)], scenes.INDOORS)
    settings = networks.picture_settings()[1]
    pixels = [
        dino_pixels(flow.pictures_of(rgb.numpy(), instances.numpy()), settings)
        for rgb, instances in zip(pool.rgb, pool.instances, strict=True)
    ]
    assert torch.equal(flow.dino_input(pool.rgb, pool.instances, pool.counts), torch.cat(pixels))


def test_rows_of_scenes_are_those_of_their_objects() -> None:
    none = torch.zeros(0)
    pool = flow.Pool(none, none, torch.tensor([2, 1, 3]), none, none, none)
    assert pool.rows(torch.tensor([2, 0])).tolist() == [3, 4, 5, 0, 1]


def test_the_styles_of_the_autoencoder_hold_those_of_both_domains() -> None:
    both = {*scenes.INDOORS.kinds, *scenes.OUTDOORS.kinds}
    assert set(scenes.ALL.kinds) == both
    assert {s.name for s in shapes.objects((1, 0), 200)} == both
    assert replace(scenes.ALL, kinds=scenes.INDOORS.kinds) == scenes.INDOORS
