import numpy as np
import pytest

from lora_core.errors import DataError
from lora_core.pictures.masks import (
    Object,
    binary_object,
    components,
    objects_by_value,
    resized,
    trim,
    union,
)


def item_of(mask: object, label: str = "a") -> Object:
    mask = np.asarray(mask, dtype=bool)
    return trim(mask, (0, 0), mask.shape, label)


def coverage(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Share of each new pixel that is covered, pixel by pixel: the slow definition."""
    shares = []
    for old, new in zip(mask.shape, size, strict=True):
        edges = np.arange(new + 1) * old / new
        low, high = edges[:-1, None], edges[1:, None]
        cells = np.arange(old)
        overlap = np.minimum(high, cells + 1) - np.maximum(low, cells)
        shares.append(np.clip(overlap, 0, None) / (high - low))
    return shares[0] @ mask @ shares[1].T


@pytest.mark.parametrize("size", [(8, 8), (5, 31), (64, 48), (20, 30), (1, 1), (13, 29)])
def test_resized_masks_are_the_half_covered_pixels(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3, 0.5, 0.9):
        mask = np.zeros((20, 30), dtype=bool)
        mask[3:17, 4:29] = rng.random((14, 25)) < density
        share = coverage(mask, size)
        expected = share >= 0.5 - 1e-9
        if not expected.any():
            expected.flat[(share >= share.max() - 1e-9).argmax()] = True
        assert (resized(item_of(mask), size) == expected).all()


def test_thin_objects_do_not_vanish() -> None:
    scratch = np.zeros((256, 1600), dtype=bool)
    scratch[100, 300:340] = True
    small = resized(item_of(scratch), (32, 32))
    assert np.argwhere(small).tolist() == [[12, 6]]
    assert not resized(item_of(np.zeros((9, 9))), (32, 32)).any()


def test_an_exact_half_is_covered() -> None:
    stripes = np.zeros((4, 4), dtype=bool)
    stripes[::2] = True
    assert resized(item_of(stripes), (2, 2)).all()


def test_components_touch_at_corners() -> None:
    mask = [[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    parts = components(item_of(mask))
    assert [part.origin for part in parts] == [(0, 0), (4, 0), (0, 3)]
    assert [part.area for part in parts] == [2, 2, 2]
    assert sum(part.mask.astype(int) for part in parts).tolist() == mask


def test_union_joins_each_class() -> None:
    one, two, three = np.zeros((3, 3, 6), dtype=bool)
    one[0, 0] = two[2, 5] = two[0, 0] = three[1] = True
    both, other = union([item_of(one, "b"), item_of(three, "a"), item_of(two, "b")])[::-1]
    assert (both.label, both.area) == ("b", 2)
    assert (both.mask == (one | two)).all()
    assert (other.label, other.area) == ("a", 6)


def test_mirroring_mirrors_the_whole_picture() -> None:
    mask = np.random.default_rng(0).random((7, 12)) < 0.1
    item = item_of(mask)
    assert (item.mirrored().mask == mask[:, ::-1]).all()
    assert (item.mirrored().mirrored().mask == mask).all()


def test_empty_masks_are_empty_objects() -> None:
    item = item_of(np.zeros((3, 4)))
    assert item.area == 0
    assert item.mask.shape == (3, 4)
    assert components(item) == []


# -- mask files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [1, 255])
def test_evident_binary_masks(foreground: int) -> None:
    values = np.array([[0, foreground], [0, 0]], dtype=np.uint8)
    (item,) = binary_object(values, evident=True, label="x")
    assert item.mask.tolist() == [[False, True], [False, False]]
    assert binary_object(values * 0, evident=True, label="x") == []
    assert binary_object(values * 0 + 1, evident=True, label="x")[0].area == 4


def test_declared_binary_masks_may_use_any_value() -> None:
    values = np.array([[0, 38]], dtype=np.uint8)
    assert binary_object(values, evident=False, label="x")[0].area == 1
    with pytest.raises(DataError, match="mask values 0, 38, expected 0 and 1, or 0 and 255"):
        binary_object(values, evident=True, label="x")


def test_noise_is_never_thresholded() -> None:
    noisy = np.array([[0, 1, 2, 3, 250, 251, 252, 253]], dtype=np.uint8)
    with pytest.raises(DataError, match=r"8 different\), expected 0 and one other.*JPEG"):
        binary_object(noisy, evident=False, label="x")


def test_values_are_ids_or_classes() -> None:
    values = np.array([[0, 3, 3], [700, 0, 3]], dtype=np.uint16)
    instances = objects_by_value(values, labels=False)
    assert [(item.label, item.area) for item in instances] == [("object", 3), ("object", 1)]
    classes = objects_by_value(values, labels=True)
    assert [(item.label, item.area) for item in classes] == [("class_3", 3), ("class_700", 1)]
    with pytest.raises(DataError, match="from -1 to 3"):
        objects_by_value(np.array([[-1, 3]]), labels=True)
