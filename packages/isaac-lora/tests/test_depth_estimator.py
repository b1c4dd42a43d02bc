"""The depth model gives the recorded depth from each form of its files, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_depth
import torch
from torch import Tensor

from isaac_lora.depth.estimator import DepthEstimator, read_depth_estimator
from lora_core.errors import ConfigError, NumericError

IO = tiny_depth.GOLDEN.io
SIZE = tiny_depth.SIZE


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_depth.write_original(tmp_path_factory.mktemp("depth") / "tiny_v2.pth")


@pytest.fixture(scope="module")
def estimator(original: Path) -> DepthEstimator:
    return read_depth_estimator(tiny_depth.find_original(original), SIZE)


# -- depth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_depth_is_the_recorded_one(estimator: DepthEstimator, number: int) -> None:
    pixels = IO.get(f"preprocessed{number}")
    if pixels is None:
        from isaac_lora.depth.preprocessing import depth_pixels

        pixels = depth_pixels(IO[f"image{number}"].numpy(), SIZE)
    found = estimator.depth(pixels)
    torch.testing.assert_close(found[None], IO[f"depth{number}"], atol=1e-4, rtol=0)


def test_features_of_the_encoder_are_the_recorded_ones(estimator: DepthEstimator) -> None:
    with torch.no_grad():
        maps = estimator.network.backbone(IO["preprocessed0"]).feature_maps
    for tap, features in enumerate(maps):
        wanted = torch.cat([IO[f"cls0.{tap}"][:, None], IO[f"features0.{tap}"]], dim=1)
        torch.testing.assert_close(features, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [0, 1])
def test_normalised_depth_of_a_picture_is_the_recorded_one(
    estimator: DepthEstimator, number: int
) -> None:
    found = estimator.normalised(IO[f"image{number}"].numpy())
    torch.testing.assert_close(found[None], IO[f"normalized{number}"], atol=1e-5, rtol=0)
    assert found.min() == 0
    assert found.max() <= 1


def test_another_input_size_resizes_the_position_table_as_the_original_does(
    original: Path,
) -> None:
    side = IO["other_size.input"].shape[-1]
    estimator = read_depth_estimator(tiny_depth.find_original(original), side)
    found = estimator.depth(IO["other_size.input"])
    torch.testing.assert_close(found[None], IO["other_size.depth"], atol=1e-4, rtol=0)


def test_transformers_own_resize_would_be_another_depth(estimator: DepthEstimator) -> None:
    """Otherwise the test above would show nothing."""
    with torch.no_grad():
        plain = estimator.network(pixel_values=IO["other_size.input"]).predicted_depth
    assert (plain - IO["other_size.depth"]).abs().max() > 0.01 * IO["other_size.depth"].max()


def test_a_picture_without_depth_differences_gives_zeros(original: Path) -> None:
    estimator = read_depth_estimator(tiny_depth.find_original(original), SIZE)
    with torch.no_grad():
        estimator.network.head.conv3.weight.zero_()
    found = estimator.normalised(IO["image0"].numpy())
    assert not found.any()


def test_the_same_picture_gives_the_same_bits_under_autocast_and_in_training_mode(
    estimator: DepthEstimator,
) -> None:
    wanted = estimator.normalised(IO["image0"].numpy())
    estimator.network.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = estimator.normalised(IO["image0"].numpy())
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert not found.requires_grad


def test_depth_that_is_not_finite_is_an_error_that_names_the_picture(original: Path) -> None:
    estimator = read_depth_estimator(tiny_depth.find_original(original), SIZE)
    with torch.no_grad():
        estimator.network.head.conv1.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match=r"record 17: the depth model .* NaN or infinite"):
        estimator.normalised(IO["image0"].numpy(), "record 17")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_depth_even_where_tf32_is_allowed(
    original: Path, estimator: DepthEstimator
) -> None:
    on_gpu = read_depth_estimator(tiny_depth.find_original(original), SIZE, "cuda")
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = on_gpu.normalised(IO["image0"].numpy())
    finally:
        torch.set_float32_matmul_precision(kept)
    wanted = estimator.normalised(IO["image0"].numpy())
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=0)


def test_input_of_another_size_is_refused(estimator: DepthEstimator) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \[1, 3, 70, 70\]"):
        estimator.depth(IO["other_size.input"])


# -- forms of files --------------------------------------------------------------------------------


def wrapped(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: {key: tensors, "epoch": 3}


@pytest.mark.parametrize(
    "form",
    [
        wrapped("model"),
        wrapped("state_dict"),
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    ],
    ids=["model", "state_dict", "module."],
)
def test_wrapped_original_files_give_the_same_depth(
    tmp_path: Path, estimator: DepthEstimator, form: Callable[[dict[str, Tensor]], object]
) -> None:
    torch.save(form(tiny_depth.GOLDEN.weights), tmp_path / "depth.pth")
    found = read_depth_estimator(tiny_depth.find_original(tmp_path / "depth.pth"), SIZE)
    assert_same(found, estimator)


@pytest.mark.parametrize("older_names", [True, False], ids=["transformers 4", "transformers 5"])
def test_folders_of_transformers_give_the_same_depth_and_fingerprint(
    tmp_path: Path, estimator: DepthEstimator, older_names: bool
) -> None:
    folder = tiny_depth.write_folder(tmp_path / "tiny", older_names, max_depth=None)
    assert_same(read_depth_estimator(folder, SIZE), estimator)


def test_a_folder_that_transformers_saved_is_read(
    tmp_path: Path, estimator: DepthEstimator
) -> None:
    estimator.network.save_pretrained(tmp_path / "saved")
    assert_same(read_depth_estimator(tmp_path / "saved", SIZE), estimator)


def test_transformers_itself_reads_the_same_weights(
    tmp_path: Path, estimator: DepthEstimator
) -> None:
    from transformers import DepthAnythingForDepthEstimation

    folder = tiny_depth.write_folder(tmp_path / "tiny", older_names=True)
    network = DepthAnythingForDepthEstimation.from_pretrained(folder)
    with torch.no_grad():
        found = network(pixel_values=IO["preprocessed0"]).predicted_depth
    assert torch.equal(found[0], estimator.depth(IO["preprocessed0"]))


def assert_same(found: DepthEstimator, wanted: DepthEstimator) -> None:
    assert found.fingerprint == wanted.fingerprint
    assert torch.equal(found.depth(IO["preprocessed0"]), wanted.depth(IO["preprocessed0"]))


def test_half_precision_files_are_computed_in_float32(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in tiny_depth.GOLDEN.weights.items()}
    path = tiny_depth.write_original(tmp_path / "half.pth", halves)
    estimator = read_depth_estimator(tiny_depth.find_original(path), SIZE)
    assert {p.dtype for p in estimator.network.parameters()} == {torch.float32}
    found = estimator.depth(IO["preprocessed0"])
    torch.testing.assert_close(found[None], IO["depth0"], atol=0.05, rtol=0)


def test_weights_are_read_even_while_a_model_is_being_built(
    original: Path, estimator: DepthEstimator
) -> None:
    """As inside of `from_pretrained`, where the original was left with random weights."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = read_depth_estimator(tiny_depth.find_original(original), SIZE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, estimator)


def test_the_model_is_frozen_and_in_evaluation_mode(original: Path) -> None:
    network = read_depth_estimator(tiny_depth.find_original(original), SIZE).network
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("size", [0, -14, 71, 10_000_004])
def test_input_sizes_that_the_patch_does_not_divide_are_refused(
    estimator: DepthEstimator, size: int
) -> None:
    with pytest.raises(ConfigError, match=f"depth_input_size {size}: expected a multiple of 14"):
        read_depth_estimator(estimator.checkpoint, size)
