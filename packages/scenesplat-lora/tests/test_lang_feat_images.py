"""`prepare lang-feat --images`: features from masks of posed images, and all that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import posed_scenes
import pytest
import siglip_folders
import torch
from PIL import Image

from lora_core.errors import ConfigError, DataError
from scenesplat_lora import prepare
from scenesplat_lora.language.siglip_images import open_vision_tower
from scenesplat_lora.language.text_embeddings import text_embeddings, write_text_embeddings
from scenesplat_lora.posed.mask_crops import mask_features, masked_box, square_box
from scenesplat_lora.scenes.files import read_scene

FEATURES = np.array([[3, 0, 4, 0], [0, 2, 0, 0]], np.float16)
UNIT = FEATURES / np.linalg.norm(FEATURES.astype(np.float32), axis=1, keepdims=True)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def made(root: Path, name: str = "office") -> dict[str, Any]:
    return read_scene(root / "data" / "train" / name, wanted=["lang_feat"])


# -- features --------------------------------------------------------------------------------------


def test_given_features_come_to_the_gaussians_of_their_masks(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, FEATURES)
    assert prepare.main(["lang-feat", *flags]) == 0
    scene = made(tmp_path)
    valid = scene["valid_feat_mask"]
    assert 0.5 < valid.mean() < 1
    features = scene["lang_feat"][valid].astype(np.float32)
    right = (features @ UNIT.T).argmax(1) == scene["segment"][valid]
    assert right.mean() > 0.97
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=2e-3)
    assert (scene["lang_feat"][~valid] == 0).all()
    manifest = json.loads((tmp_path / "data" / "train" / "manifest_lang-feat.json").read_text())
    facts = manifest["scenes"]["office"]["made"]
    assert facts == {"rows": len(valid), "valid": int(valid.sum()), "images": 3, "masks": 6}


def test_masks_may_be_classes(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, None)
    shutil.rmtree(tmp_path / "captures" / "office" / "images")  # not needed
    write_text_embeddings(
        tmp_path / "classes.npz", text_embeddings(["a", "b"], torch.from_numpy(UNIT))
    )
    prepare.main(["lang-feat", *flags, "--text", str(tmp_path / "classes.npz")])
    scene = made(tmp_path)
    valid = scene["valid_feat_mask"]
    found = (scene["lang_feat"][valid].astype(np.float32) @ UNIT.T).argmax(1)
    assert (found == scene["segment"][valid]).mean() > 0.97


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_features_of_masks_are_those_of_the_whole_model_on_crops(tmp_path: Path, kind: str) -> None:
    from transformers import AutoImageProcessor

    model = siglip_folders.write_folder(tmp_path / kind, kind)
    tower = open_vision_tower(tmp_path / kind)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    labels = np.zeros((30, 40), np.int64)
    labels[3:9, 20:38], labels[12:29, 1:6] = 1, 3
    found = mask_features(tower, image, labels)
    assert found.shape == (3, 16)
    assert (found[1] == 0).all(), "number 2 has no pixel"
    processor = AutoImageProcessor.from_pretrained(tmp_path / kind, backend="pil")
    total = torch.zeros(16)
    for crop in (image[0:18, 20:38], masked_by_hand(image, labels)):
        inputs = processor(images=[crop], return_tensors="pt")
        with torch.no_grad():
            pooled = model.get_image_features(**inputs).pooler_output
        total += torch.nn.functional.normalize(pooled[0], dim=0)
    assert np.allclose(found[0], torch.nn.functional.normalize(total, dim=0), atol=1e-5)


def masked_by_hand(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    square = np.zeros((18, 18, 3), np.uint8)
    square[6:12] = (image * (labels == 1)[..., None])[3:9, 20:38]
    return square


def test_crops_stay_inside_the_image() -> None:
    image = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    tall = (slice(0, 10), slice(18, 20))
    assert np.array_equal(square_box(image, tall), image[:, 10:20])
    wide = (slice(4, 5), slice(0, 20))
    assert np.array_equal(square_box(image, wide), image), "as high as the image is"
    labels = np.zeros((10, 20), int)
    labels[4, :] = 1
    alone = masked_box(image, labels, [wide], 0)
    assert alone.shape == (20, 20, 3)
    assert np.array_equal(alone[9], image[4])
    assert (np.delete(alone, 9, axis=0) == 0).all()


def test_a_siglip_folder_makes_the_features(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, None)
    siglip_folders.write_folder(tmp_path / "model")
    prepare.main(["lang-feat", *flags, "--model", str(tmp_path / "model"), "--every", "2"])
    scene = made(tmp_path)
    assert scene["lang_feat"].shape[1] == 16
    assert scene["valid_feat_mask"].mean() > 0.4
    near, far = (scene["lang_feat"][scene["valid_feat_mask"] & (scene["segment"] == c)].astype(
        np.float32).mean(0) for c in (0, 1))  # fmt: skip
    assert np.abs(near - far).max() > 1e-3


def test_masks_count_by_their_confidence(tmp_path: Path) -> None:
    """In view 0 the masks have the other's feature, with a tenth of the confidence or none."""
    flags = posed_scenes.write_all(tmp_path, FEATURES, ("alike", "office"))
    for name in ("alike", "office"):
        capture = tmp_path / "captures" / name
        np.save(capture / "features" / "0000.npy", FEATURES[::-1])
        (capture / "confidence").mkdir()
        for view in posed_scenes.VIEWS:
            weight = 1.0 if name == "alike" or view.key != "0000" else 0.1
            np.save(capture / "confidence" / f"{view.key}.npy", np.array([weight, 0.0]))
    prepare.main(["lang-feat", *flags])
    for name, weight in (("alike", 1.0), ("office", 0.1)):
        scene = made(tmp_path, name)
        features = scene["lang_feat"][scene["valid_feat_mask"] & (scene["segment"] == 0)]
        sums = [2 * UNIT[0] + weight * UNIT[1], UNIT[0] + weight * UNIT[1]]
        mixed = [total / np.linalg.norm(total) for total in sums]
        off = [np.abs(features.astype(np.float32) - one).max(1) for one in mixed]
        assert (np.minimum(*off) < 2e-3).mean() > 0.8
    far = made(tmp_path)["valid_feat_mask"] & (made(tmp_path)["segment"] == 1)
    assert far.mean() < 0.02, "what has no confidence gives nothing"


def test_cameras_of_a_world_that_was_turned_and_scaled_are_turned_too(tmp_path: Path) -> None:
    """Splats went through `prepare ply --up y_down --unit 2`; the cameras did not."""
    from scenesplat_lora.prepare_ply import placed
    from scenesplat_lora.scenes.files import write_scene

    write_scene(
        tmp_path / "data" / "train" / "office", placed(posed_scenes.two_planes(), "y_down", 2)
    )
    posed_scenes.write_capture(tmp_path / "captures" / "office", FEATURES)
    flags = ["--data_root", str(tmp_path / "data"), "--images", str(tmp_path / "captures")]
    prepare.main(["lang-feat", *flags, "--up", "y_down", "--unit", "2"])
    scene = made(tmp_path)
    valid = scene["valid_feat_mask"]
    found = (scene["lang_feat"][valid].astype(np.float32) @ UNIT.T).argmax(1)
    assert valid.mean() > 0.5
    assert (found == scene["segment"][valid]).mean() > 0.97


def test_arrays_are_masks_too_and_images_may_lie_deeper(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path / "a", FEATURES)
    other = posed_scenes.write_all(tmp_path / "b", FEATURES)
    capture = tmp_path / "b" / "captures" / "office"
    for name in ("images", "masks", "features"):
        (capture / name).rename(capture / "left")
        (capture / name).mkdir()
        (capture / "left").rename(capture / name / "left")
    for file in list((capture / "masks" / "left").iterdir()):
        np.save(file.with_suffix(".npy"), np.array(Image.open(file)).astype(np.uint16))
        file.unlink()
    cameras = capture / "transforms.json"
    cameras.write_text(cameras.read_text().replace("images/", "images/left/"))
    for words in (flags, other):
        prepare.main(["lang-feat", *words])
    for name in ("lang_feat.npy", "valid_feat_mask.npy"):
        one, two = (tmp_path / part / "data" / "train" / "office" / name for part in "ab")
        assert one.read_bytes() == two.read_bytes()


# -- shards ----------------------------------------------------------------------------------------


def test_shards_in_any_order_equal_one_run_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    names = ("hall", "office")
    for run, order in (("one", [0]), ("two", [1, 0])):
        flags = posed_scenes.write_all(tmp_path / run, FEATURES, names)
        for shard in order:
            words = ["--num_shards", str(len(order)), "--shard_id", str(shard)]
            prepare.main(["lang-feat", *flags, *words])
        file = tmp_path / run / "data" / "train" / "hall" / "lang_feat.npy"
        when = file.stat().st_mtime_ns
        prepare.main(["lang-feat", *flags])
        assert file.stat().st_mtime_ns == when
    assert tree(tmp_path / "one" / "data") == tree(tmp_path / "two" / "data")


def test_other_settings_or_masks_are_refused_without_overwrite(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, FEATURES)
    prepare.main(["lang-feat", *flags])
    before = tree(tmp_path / "data")
    with pytest.raises(DataError, match="office: prepared with other settings"):
        prepare.main(["lang-feat", *flags, "--min_views", "2"])
    mask = tmp_path / "captures" / "office" / "masks" / "0000.png"
    np.save(mask.with_suffix(".npy"), np.ones(posed_scenes.SIZE, np.uint8))
    mask.unlink()
    with pytest.raises(DataError, match="or from other files"):
        prepare.main(["lang-feat", *flags])
    assert tree(tmp_path / "data") == before
    prepare.main(["lang-feat", *flags, "--overwrite"])
    assert tree(tmp_path / "data") != before


# -- refused ---------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_told_at_once_before_anything_is_written(
    tmp_path: Path,
) -> None:
    names = ("a_no_camera", "b_missing", "c_size", "d_rows", "e_nan", "f_negative", "g_empty", "h")
    flags = posed_scenes.write_all(tmp_path, FEATURES, names)
    a, b, c, d, e, f, g, h = (tmp_path / "captures" / name for name in names)
    (a / "transforms.json").unlink()
    (b / "masks" / "0001.png").unlink()
    (b / "features" / "0002.npy").unlink()
    Image.fromarray(np.ones((5, 7), np.uint8)).save(c / "masks" / "0000.png")
    np.save(d / "features" / "0000.npy", FEATURES[:1])
    np.save(e / "features" / "0000.npy", FEATURES * np.nan)
    (f / "masks" / "0000.png").unlink()
    np.save(f / "masks" / "0000.npy", np.full(posed_scenes.SIZE, -1))
    for file in (g / "masks").iterdir():
        Image.fromarray(np.zeros(posed_scenes.SIZE, np.uint8)).save(file)
    (h / "confidence").mkdir()
    for number, values in enumerate(([1, -1], [1], [[1, 1]])):
        np.save(h / "confidence" / f"000{number}.npy", np.array(values, np.float32))
    before = tree(tmp_path / "data")
    with pytest.raises(DataError) as told:
        prepare.main(["lang-feat", *flags])
    message = str(told.value)
    for part in (
        "a_no_camera: no cameras: expected transforms.json",
        "b_missing: 2 files of 3 images are missing: masks/0001.png, features/0002.npy; --model",
        "masks/0000.png: 7 x 5 pixels (width x height), but the image has 64 x 48",
        "0000.npy: 1 rows, but its masks go up to 2: row m - 1 is of mask m",
        "e_nan/features/0000.npy: rows [0, 1] of 2 hold NaN",
        "f_negative/masks/0000.npy: -1 ... -1: expected 0 for no mask",
        "g_empty: no image has a mask",
        "h/confidence/0000.npy: confidences must be finite and not below 0",
        "h/confidence/0001.npy: 1 rows, but its masks go up to 2",
        "h/confidence/0002.npy: float32 [1, 2], expected [M]",
    ):
        assert part in message, f"{part}\n{message}"
    assert tree(tmp_path / "data") == before


def test_images_of_another_size_or_missing_are_told(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, None)
    siglip_folders.write_folder(tmp_path / "model")
    images = tmp_path / "captures" / "office" / "images"
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(images / "0000.png")
    words = ["lang-feat", *flags, "--model", str(tmp_path / "model")]
    with pytest.raises(DataError, match=r"0000\.png: 32 x 24 pixels.*its camera has 64 x 48"):
        prepare.main(words)
    (images / "0001.png").unlink()
    with pytest.raises(DataError, match=r"1 files of 3 images are missing: images/0001\.png"):
        prepare.main(words)


def test_masks_beyond_the_classes_and_features_of_other_widths_are_told(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, FEATURES, ("hall", "office"))
    text = text_embeddings(["a"], torch.ones(1, 4))
    write_text_embeddings(tmp_path / "classes.npz", text)
    with pytest.raises(DataError, match="mask 2, but there are 1 classes: mask m is class m - 1"):
        prepare.main(["lang-feat", *flags, "--text", str(tmp_path / "classes.npz")])
    for file in (tmp_path / "captures" / "office" / "features").iterdir():
        np.save(file, np.ones((2, 3), np.float32))
    with pytest.raises(DataError, match="different widths: 3 in office, 4 in hall"):
        prepare.main(["lang-feat", *flags])


def test_links_out_of_the_folder_are_followed_when_asked_for(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, FEATURES)
    masks = tmp_path / "captures" / "office" / "masks"
    masks.rename(tmp_path / "elsewhere")
    masks.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"a link that leads out of .* --follow_links true"):
        prepare.main(["lang-feat", *flags])
    assert prepare.main(["lang-feat", *flags, "--follow_links", "true"]) == 0


def test_cameras_that_see_nothing_of_the_scene_are_told(tmp_path: Path) -> None:
    flags = posed_scenes.write_all(tmp_path, FEATURES)
    with pytest.raises(DataError, match="same coordinates; give --up and --unit"):
        prepare.main(["lang-feat", *flags, "--up", "z_down", "--unit", "0.001"])
    assert not (tmp_path / "data" / "train" / "office" / "lang_feat.npy").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --text .* or --images"),
        (["--model", "m"], "give --images too"),
        (["--images", "a", "--model", "m", "--text", "t"], "come from one of them"),
        (["--images", "a", "--every", "0", "--min_views", "0"], "every is 0.*\n.*min_views is 0"),
        (["--images", "a", "--depth_side", "5000"], "at most 4096"),
        (["--images", "a", "--depth_tolerance", "-1"], "depth_tolerance is -1"),
        (["--images", "a", "--unit", "0"], "unit is 0.0: it must be metres above 0"),
        (["--images", ""], "--images is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare.main(["lang-feat", *words])
