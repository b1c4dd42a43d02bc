"""Pictures to pixel values: transformers' own numbers, without that library."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_core.errors import CheckpointError
from lora_core.testing import load_golden
from midi3d_lora.conditioning.pixel_values import (
    FILE,
    PictureSettings,
    center_crop,
    mask_values,
    pixel_values,
    read_picture_settings,
    write_picture_settings,
)

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "pipeline")
MODEL = GOLDEN.folder / "model"
# Another resize, a crop that cuts, a picture that is too small for it, and squeezing.
OTHERS = (
    {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 42}},
    {"size": {"shortest_edge": 20}, "crop_size": {"height": 29, "width": 28}},
    {"size": {"height": 33, "width": 50}, "do_center_crop": False, "resample": 2},
    {"do_resize": False, "do_center_crop": False, "do_normalize": False},
    {"do_rescale": False},
)


def settings_of(tmp_path: Path, content: dict) -> PictureSettings:
    (tmp_path / FILE).write_text(json.dumps(content))
    return read_picture_settings(tmp_path)


# -- recorded, and transformers ----------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "name"), [(1, "clip_pixel_values"),
                                              (2, "dino_pixel_values_instance")])  # fmt: skip
def test_pixel_values_are_the_official_ones_bit_for_bit(encoder: int, name: str) -> None:
    settings = read_picture_settings(MODEL / f"feature_extractor_{encoder}")
    made = np.stack([pixel_values(p, settings) for p in GOLDEN.io["instance_rgb"].numpy()])
    assert made.dtype == np.float32
    assert np.array_equal(made, GOLDEN.io[name].numpy())


def test_the_scene_is_prepared_as_officially() -> None:
    settings = read_picture_settings(MODEL / "feature_extractor_2")
    made = pixel_values(GOLDEN.io["rgb"].numpy(), settings)
    assert np.array_equal(made, GOLDEN.io["dino_pixel_values_scene"].numpy()[0])


@pytest.mark.parametrize("content", OTHERS)
@pytest.mark.parametrize("shape", [(40, 71), (71, 40), (24, 24)])
def test_other_settings_give_the_numbers_of_transformers(
    content: dict, shape: tuple[int, int], tmp_path: Path
) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    settings = settings_of(tmp_path, content)
    wanted = BitImageProcessorPil(**content)(picture, input_data_format="channels_last")
    made = pixel_values(picture, settings)
    assert np.array_equal(made, np.asarray(wanted["pixel_values"][0], dtype=np.float32))
    assert made.shape[1:] == settings.output(*shape)


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", OTHERS)
def test_a_mask_lies_over_its_picture_also_where_something_is_cropped(
    content: dict, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, {**content, "resample": 0, "do_normalize": False})
    mask = np.zeros((60, 60), np.uint8)
    mask[6:40, 20:55] = 255
    picture = np.repeat(mask[..., None], 3, axis=2)
    shown = pixel_values(picture, settings)[0] > 0.5
    made = mask_values(mask, settings)
    assert made.shape == shown.shape
    assert set(np.unique(made)) <= {0.0, 1.0}
    # Two rules for the nearest pixel: they may differ by one pixel, along the outline only.
    rows = [np.flatnonzero(m.any(1))[[0, -1]] for m in (shown, made > 0)]
    columns = [np.flatnonzero(m.any(0))[[0, -1]] for m in (shown, made > 0)]
    assert np.abs(rows[0] - rows[1]).max() <= 1
    assert np.abs(columns[0] - columns[1]).max() <= 1


def test_a_crop_larger_than_the_picture_is_laid_on_zeros() -> None:
    made = center_crop(np.ones((1, 2, 5), np.uint8), (5, 3))
    assert made[0].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]


# -- the file --------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for folder, processor in (("feature_extractor_1", "CLIPImageProcessor"),
                              ("feature_extractor_2", "BitImageProcessor")):  # fmt: skip
        settings = read_picture_settings(MODEL / folder)
        write_picture_settings(settings, tmp_path / folder, processor)
        assert read_picture_settings(tmp_path / folder) == settings
        written = json.loads((tmp_path / folder / FILE).read_text())
        assert written == json.loads((MODEL / folder / FILE).read_text())


def test_old_files_with_one_number_for_a_size_are_read(tmp_path: Path) -> None:
    old = {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert settings_of(tmp_path, old) == PictureSettings()


def test_all_that_is_wrong_in_the_file_is_told_at_once(tmp_path: Path) -> None:
    wrong = {"image_meen": [0, 0, 0], "size": {"longest_edge": 3}, "resample": "cubic",
             "image_std": [1, 1, 0], "do_pad": True}  # fmt: skip
    with pytest.raises(CheckpointError) as told:
        settings_of(tmp_path, wrong)
    for word in ("did you mean 'image_mean'", "shortest_edge", "resample", "above 0", "do_pad"):
        assert word in str(told.value)
    assert str(tmp_path / FILE) in str(told.value)


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: no such file"):
        read_picture_settings(tmp_path)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_levels_by_table_are_those_by_arithmetic(rescale: bool, normalize: bool) -> None:
    settings = PictureSettings(
        do_resize=False,
        do_rescale=rescale,
        do_normalize=normalize,
        crop_size=(("height", 9), ("width", 20)),
    )
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    wide = np.pad(picture, ((0, 0), (2, 2), (0, 0)))[3:12]
    slow = np.moveaxis(wide, -1, 0).astype(np.float32)
    if rescale:
        slow = (np.moveaxis(wide, -1, 0) * np.float64(1 / 255)).astype(np.float32)
    if normalize:
        mean, std = (
            np.array(n, np.float32)[:, None, None]
            for n in (settings.image_mean, settings.image_std)
        )
        slow = (slow - mean) / std
    quick = pixel_values(picture, settings)
    np.testing.assert_array_equal(quick, slow)
    assert quick.flags.c_contiguous
