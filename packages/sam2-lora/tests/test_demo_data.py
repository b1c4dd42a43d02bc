"""The embedded data sets: photographs with masks, and strips of steel in the Severstal format."""

import base64
import hashlib
import io
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lora_core.errors import DataError, UserError
from lora_core.pictures.encodings import encode_counts
from sam2_lora import demo
from sam2_lora.formats import find

INDEX = demo.photo_index()
OBJECTS = [
    (name, item, demo.decode(item["counts"], facts["size"]))
    for name, facts in INDEX.items()
    for item in facts["objects"]
]


def files(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return demo.write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def severstal(tmp_path_factory):
    return demo.write_severstal(tmp_path_factory.mktemp("severstal"), train=6, val=4, test=4)


# -- photographs -------------------------------------------------------------------------------


def coco(folder: Path, split: str) -> dict:
    return json.loads((folder / split / "_annotations.coco.json").read_text("utf-8"))


def test_no_photograph_is_in_two_splits_and_every_split_has_several(photos):
    stems = {
        split: {image["file_name"].rsplit("_", 1)[0] for image in coco(photos, split)["images"]}
        for split in demo.SPLITS
    }
    assert all(len(group) >= 3 for group in stems.values())
    # The two views of the stereo pair count as one photograph.
    names = [
        stem.removesuffix("_left").removesuffix("_right") for g in stems.values() for stem in g
    ]
    assert len(names) == len(set(names)) == len(INDEX)


def test_the_set_is_small_and_has_enough_objects(photos):
    pictures = {split: len(coco(photos, split)["images"]) for split in demo.SPLITS}
    assert 10 <= pictures["train"] <= 30
    assert 6 <= pictures["val"] <= 12
    assert 6 <= pictures["test"] <= 12
    assert len(OBJECTS) > 150


def test_the_description_states_the_right_numbers(photos):
    text = (demo.HERE / "demo_data" / "README.md").read_text("utf-8")
    assert f"{len(OBJECTS)} objects on {len(INDEX)} photographs" in text
    for split in demo.SPLITS:
        content = coco(photos, split)
        names = [Path(name).stem for name, facts in INDEX.items() if facts["split"] == split]
        sizes = f"{len(content['images'])} | {len(content['annotations'])}"
        assert f"| {split} | {', '.join(names)} | {sizes} |" in text


def test_masks_belong_to_the_installed_photographs():
    import skimage

    data = Path(skimage.__file__).parent / "data"
    for name, facts in INDEX.items():
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == facts["sha256"]


def test_cut_outs_lie_inside_their_photographs():
    for facts in INDEX.values():
        rows, columns = facts["size"]
        for x, y, width, height in facts["boxes"]:
            assert min(x, y) >= 0
            assert x + width <= columns
            assert y + height <= rows


def test_run_lengths_give_the_stated_areas():
    for name, item, mask in OBJECTS:
        assert list(mask.shape) == INDEX[name]["size"]
        assert int(mask.sum()) == item["area"]


@pytest.mark.parametrize("corner", [False, True])
def test_encode_inverts_decode(corner):
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    mask[0, 0] = corner
    counts = encode_counts(mask)
    assert sum(counts) == mask.size
    assert sum(counts[1::2]) == mask.sum()
    np.testing.assert_array_equal(demo.decode(counts, (5, 7)), mask)


def test_run_lengths_go_down_the_columns_from_background(photos):
    """Pixel p of COCO's numbering is row p mod H of column p div H."""
    for split in demo.SPLITS:
        for item in coco(photos, split)["annotations"]:
            (height, width), counts = item["segmentation"]["size"], item["segmentation"]["counts"]
            flat, start = np.zeros(height * width, bool), 0
            for number, length in enumerate(counts):
                flat[start : start + length] = number % 2 == 1
                start += length
            assert start == flat.size
            mask = demo.decode(counts, (height, width))
            pixels = np.arange(flat.size)
            np.testing.assert_array_equal(mask[pixels % height, pixels // height], flat)


def test_objects_of_a_photograph_do_not_overlap():
    for name in INDEX:
        masks = [mask for owner, _, mask in OBJECTS if owner == name]
        assert np.sum(masks, axis=0, dtype=int).max() == 1


def test_every_object_is_one_piece_without_holes():
    for name, _, mask in OBJECTS:
        box = ndimage.find_objects(mask.view(np.uint8))[0]
        crop = np.pad(mask[box], 1)
        assert ndimage.label(crop, np.ones((3, 3)))[1] == 1, name
        assert (ndimage.binary_fill_holes(crop) & ~crop).sum() < 0.02 * crop.sum(), name


def test_every_object_is_shown_by_some_cut_out():
    for name, item, mask in OBJECTS:
        boxes = INDEX[name]["boxes"]
        shown = max(mask[y : y + h, x : x + w].sum() for x, y, w, h in boxes)
        assert shown >= demo.VISIBLE * item["area"]


def test_objects_are_not_hopelessly_small_at_128_pixels(photos):
    for split in demo.SPLITS:
        content = coco(photos, split)
        pixels = {image["id"]: image["width"] * image["height"] for image in content["images"]}
        side = [
            128 * np.sqrt(item["area"] / pixels[item["image_id"]])
            for item in content["annotations"]
        ]
        assert min(side) > 7
        assert np.median(side) > 12


def test_borders_of_masks_lie_on_edges_of_the_photographs(photos):
    """Grey changes more across the drawn borders than across borders shifted by six pixels."""
    gains = []
    for split in demo.SPLITS:
        content = coco(photos, split)
        for image in content["images"]:
            with Image.open(photos / split / image["file_name"]) as file:
                rgb = np.asarray(file, dtype=float)
            edges = sum(ndimage.gaussian_gradient_magnitude(rgb[..., c], 1) for c in range(3))
            for item in content["annotations"]:
                if item["image_id"] != image["id"]:
                    continue
                mask = demo.decode(item["segmentation"]["counts"], rgb.shape[:2])
                border = mask & ~ndimage.binary_erosion(mask, border_value=1)
                shifted = [np.roll(border, d, (0, 1)) for d in ((6, 0), (-6, 0), (0, 6), (0, -6))]
                gains.append(edges[border].mean() / np.mean([edges[s].mean() for s in shifted]))
    assert len(gains) > 300
    assert np.median(gains) > 1.5
    assert np.mean(np.array(gains) > 1) > 0.95


def test_written_photos_are_the_same_bytes_every_time(photos, tmp_path):
    assert files(demo.write_photos(tmp_path)) == files(photos)


def test_written_coco_holds_every_object_with_its_box(photos):
    total = 0
    for split in demo.SPLITS:
        content = coco(photos, split)
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for image in content["images"]:
            with Image.open(photos / split / image["file_name"]) as file:
                assert file.mode == "RGB"
                assert file.size == (image["width"], image["height"])
        for item in content["annotations"]:
            mask = demo.decode(item["segmentation"]["counts"], sizes[item["image_id"]])
            x, y, width, height = item["bbox"]
            assert mask[y : y + height, x : x + width].sum() == mask.sum() == item["area"]
            assert mask[y].any()
            assert mask[:, x + width - 1].any()
        total += len(content["annotations"])
    assert total > len(OBJECTS)  # an object may be in several cut-outs


def test_a_missing_scikit_image_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match=r'pip install "sam2-lora\[demo\]"'):
        demo.write_photos(tmp_path)


def test_a_photograph_of_another_size_is_refused(tmp_path, monkeypatch):
    index = json.loads(json.dumps(INDEX))
    name = next(iter(index))
    index[name]["size"] = [7, 9]
    monkeypatch.setattr(demo, "photo_index", lambda: index)
    with pytest.raises(DataError, match=rf"{name}.* instead of 9x7"):
        demo.write_photos(tmp_path)


# -- steel -------------------------------------------------------------------------------------


def bitmaps(path: Path):
    """(class title, mask [256, 1600]) of a Supervisely file, read without the package."""
    content = json.loads(path.read_text("utf-8"))
    assert content["size"] == {"height": 256, "width": 1600}
    for item in content["objects"]:
        png = zlib.decompress(base64.b64decode(item["bitmap"]["data"]))
        alpha = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))[..., 3]
        x, y = item["bitmap"]["origin"]
        mask = np.zeros((256, 1600), bool)
        mask[y : y + alpha.shape[0], x : x + alpha.shape[1]] = alpha > 0
        yield item["classTitle"], mask


def test_strips_come_in_pairs_of_picture_and_annotation(severstal):
    for split, count in (("train", 6), ("val", 4), ("test", 4)):
        pictures = sorted((severstal / f"{split}_split/img").iterdir())
        notes = sorted((severstal / f"{split}_split/ann").iterdir())
        assert [f"{path.name}.json" for path in pictures] == [path.name for path in notes]
        assert len(pictures) == count
        for path in pictures:
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (1600, 256))


def test_bitmaps_decode_to_the_masks_that_were_painted(severstal):
    for split in range(3):
        folder = severstal / f"{demo.SPLITS[split]}_split" / "ann"
        by_number = sorted(folder.iterdir(), key=lambda path: path.name[5:9])
        for k, path in enumerate(by_number):
            rng = np.random.default_rng((0, split, k))
            rng.integers(16**5)  # the name
            _, defects = demo.steel(rng, 0 if k % 4 == 3 else int(rng.integers(1, 4)))
            found = list(bitmaps(path))
            assert [title for title, _ in found] == [f"defect_{kind}" for kind, _ in defects]
            for (_, mask), (_, painted) in zip(found, defects, strict=True):
                np.testing.assert_array_equal(mask, painted)


def test_every_fourth_strip_has_no_defect(severstal):
    counts = [len(list(bitmaps(p))) for p in sorted(severstal.glob("*_split/ann/*.json"))]
    assert counts.count(0) == 3  # of 6 + 4 + 4


def test_defects_change_the_strip_and_do_not_overlap():
    kinds = set()
    for seed in range(25):
        image, defects = demo.steel(np.random.default_rng(seed), 3)
        assert image.shape == (256, 1600)
        assert image.dtype == np.uint8
        if not defects:
            continue
        assert np.sum([mask for _, mask in defects], axis=0, dtype=int).max() == 1
        grey = image.astype(float)
        roughness = np.abs(grey - ndimage.gaussian_filter(grey, 12))
        anywhere = np.any([mask for _, mask in defects], axis=0)
        assert roughness[anywhere].mean() > 1.2 * roughness[~anywhere].mean()
        kinds |= {kind for kind, _ in defects}
    assert kinds == {1, 2, 3, 4}


def test_strips_depend_on_the_seed_alone(severstal, tmp_path):
    again = demo.write_severstal(tmp_path / "again", train=6, val=4, test=4)
    assert files(again) == files(severstal)
    other = demo.write_severstal(tmp_path / "other", seed=1, train=2, val=1, test=1)
    assert not set(files(other).values()) & set(files(severstal).values())


# -- both --------------------------------------------------------------------------------------


def test_write_brings_both_sets_and_the_base_with_its_config(tmp_path):
    demo.write(tmp_path)
    assert demo.base_checkpoint().read_bytes() == (tmp_path / "sam2_demo.safetensors").read_bytes()
    assert "vision_config" in json.loads((tmp_path / "sam2_demo.json").read_text("utf-8"))
    assert (tmp_path / "photos/train/_annotations.coco.json").is_file()
    assert (tmp_path / "severstal/test_split/img").is_dir()


def test_the_packages_reader_knows_both_layouts(photos, severstal):
    for folder, name in ((photos, "coco"), (severstal, "severstal")):
        data_format, sources = find(folder)
        assert data_format == name
        assert sorted(sources) == sorted(demo.SPLITS)
