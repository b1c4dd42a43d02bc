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
from sam2_lora import demo
from sam2_lora.formats import find

INDEX = demo.photo_index()
OBJECTS = [
    (picture, item, demo.decode(item["counts"], tuple(picture["box"][:1:-1])))
    for picture in INDEX["pictures"]
    for item in picture["objects"]
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


def test_no_photograph_is_in_two_splits_and_every_split_has_several():
    splits = {split: set() for split in demo.SPLITS}
    for picture in INDEX["pictures"]:
        splits[picture["split"]].add(picture["photo"])
    names = sorted(name for group in splits.values() for name in group)
    assert names == sorted(INDEX["photos"])  # each once
    assert all(len(group) >= 2 for group in splits.values())


def test_masks_belong_to_the_installed_photographs():
    import skimage

    data = Path(skimage.__file__).parent / "data"
    for name, facts in INDEX["photos"].items():
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == facts["sha256"]


def test_pictures_lie_inside_their_photographs():
    for picture in INDEX["pictures"]:
        x, y, width, height = picture["box"]
        rows, columns = INDEX["photos"][picture["photo"]]["size"]
        assert min(x, y) >= 0
        assert min(width, height) >= 32
        assert x + width <= columns
        assert y + height <= rows
        assert picture["objects"]


def test_run_lengths_give_the_stated_areas():
    for picture, item, mask in OBJECTS:
        width, height = picture["box"][2:]
        assert mask.shape == (height, width)
        assert int(mask.sum()) == item["area"]


def test_masks_agree_with_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    for _, item, mask in OBJECTS[::7]:
        compressed = coco.frPyObjects(
            {"size": list(mask.shape), "counts": item["counts"]}, *mask.shape
        )
        np.testing.assert_array_equal(coco.decode(compressed), mask)


def test_objects_of_a_picture_do_not_overlap():
    for picture in INDEX["pictures"]:
        masks = [mask for owner, _, mask in OBJECTS if owner is picture]
        assert np.sum(masks, axis=0, dtype=int).max() == 1


def test_objects_are_one_piece_and_large_enough_at_128_pixels():
    for _, item, mask in OBJECTS:
        pieces, count = ndimage.label(mask, np.ones((3, 3)))
        assert np.bincount(pieces.flat)[1:].max() > 0.95 * item["area"], count
        assert item["area"] * 128**2 / mask.size > 100


def test_borders_of_masks_lie_on_edges_of_the_photographs(photos):
    """Grey changes more across the drawn borders than across borders shifted by six pixels."""
    gains = []
    for split in demo.SPLITS:
        content = json.loads((photos / split / "_annotations.coco.json").read_text("utf-8"))
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
    assert len(gains) == len(OBJECTS)
    assert np.median(gains) > 1.5
    assert np.mean(np.array(gains) > 1) > 0.95


def test_written_photos_are_the_same_bytes_every_time(photos, tmp_path):
    assert files(demo.write_photos(tmp_path)) == files(photos)


def test_written_coco_holds_every_object_with_its_box(photos):
    total = 0
    for split in demo.SPLITS:
        content = json.loads((photos / split / "_annotations.coco.json").read_text("utf-8"))
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
    assert total == len(OBJECTS)


def test_a_missing_scikit_image_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match=r'pip install "sam2-lora\[demo\]"'):
        demo.write_photos(tmp_path)


def test_a_photograph_of_another_size_is_refused(tmp_path, monkeypatch):
    index = json.loads(json.dumps(INDEX))
    name = index["pictures"][0]["photo"]
    index["photos"][name]["size"] = [7, 9]
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
