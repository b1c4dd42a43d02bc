"""`sam2-lora predict` as a user runs it, its prompts and files, and the Python predictor."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from lora_core.errors import ConfigError, DataError
from lora_core.pictures.encodings import decode_counts, encode_counts
from lora_core.pictures.overlay import LARGEST, draw, panels
from lora_core.testing import hostile
from sam2_lora import predict
from sam2_lora.automatic import Grid, instance_of
from sam2_lora.model import decode, encode, image_size, load
from sam2_lora.predict import find_images, rle_string
from sam2_lora.predictor import Predictor
from sam2_lora.user_prompts import Prompt, parse_entry, read_prompts

OPEN = ["--points_per_side", "3", "--min_score", "0", "--min_stability", "0", "--max_overlap", "1",
        "--min_object_score", "-99"]  # fmt: skip


def noise(height: int = 96, width: int = 160, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, name in enumerate(("a.png", "b.png")):
        Image.fromarray(noise(seed=index)).save(folder / name)
    return folder


@pytest.fixture
def predictor(golden_base: Path) -> Predictor:
    return Predictor(load(golden_base))


# -- the command ---------------------------------------------------------------------------------


def run(base: Path, pictures: Path, tmp_path: Path, *flags: str) -> dict[str, Any]:
    argv = ["--checkpoint", str(base), "--images", str(pictures), "--output", str(tmp_path / "out")]
    assert predict.main([*argv, *flags]) == 0
    return json.loads((tmp_path / "out" / "predictions.json").read_text())


def test_without_prompts_every_picture_gets_its_masks_json_and_overlay(
    golden_base: Path, pictures: Path, tmp_path: Path
) -> None:
    content = run(golden_base, pictures, tmp_path, *OPEN)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "a_mask.png",
        "a_overlay.png",
        "b_mask.png",
        "b_overlay.png",
        "predictions.json",
    }
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png"]
    assert {entry["image_id"] for entry in content["annotations"]} == {1, 2}


def test_the_instance_map_and_the_json_hold_the_same_masks(
    golden_base: Path, pictures: Path, tmp_path: Path
) -> None:
    flags = ("--boxes", "20,10,90,70", "70,30,150,90")
    content = run(golden_base, pictures / "a.png", tmp_path, *flags)
    ids = np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))
    assert ids.dtype == np.uint8
    assert ids.shape == (96, 160)
    masks = {}
    for entry in content["annotations"]:
        item = decode_counts(entry["segmentation"]["counts"], (96, 160))
        assert entry["area"] == item.area
        x, y = item.origin
        assert entry["bbox"] == [x, y, item.crop.shape[1], item.crop.shape[0]]
        masks[entry["value_in_mask_png"]] = item.mask
    assert sorted(masks) == [1, 2]
    for number, mask in masks.items():
        assert (ids == number)[mask].any()
        assert not (ids == number)[~mask].any()
    assert ((ids > 0) == (masks[1] | masks[2])).all()


def test_the_json_is_a_coco_data_set_for_pycocotools(
    golden_base: Path, pictures: Path, tmp_path: Path
) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    run(golden_base, pictures, tmp_path, *OPEN)
    data = coco.COCO(str(tmp_path / "out" / "predictions.json"))
    ids = np.asarray(Image.open(tmp_path / "out" / "b_mask.png"))
    entries = data.loadAnns(data.getAnnIds(imgIds=2))
    together = np.zeros((96, 160), dtype=bool)
    for entry in entries:
        together |= data.annToMask(entry) > 0
    assert (together == (ids > 0)).all()


def test_points_and_boxes_from_a_file_reach_their_own_picture(
    golden_base: Path, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({
        "a.png": {"points": [[[30, 40]], [[100, 50], [90, 60]]], "labels": [[1], [1, 0]]},
        "b.png": {"points": [[50, 50]], "boxes": [20, 20, 90, 90]},
    }))  # fmt: skip
    content = run(golden_base, pictures, tmp_path, "--prompts", str(file))
    assert [entry["image_id"] for entry in content["annotations"]] == [1, 1, 2]


def test_flags_with_several_clicks_mean_one_object(
    golden_base: Path, pictures: Path, tmp_path: Path
) -> None:
    flags = ("--points", "30,40", "90.5,60", "--labels", "1", "0")
    content = run(golden_base, pictures / "a.png", tmp_path, *flags)
    predictor = Predictor.load(golden_base, device="cpu")
    predictor.set_image(noise())
    expected = predictor.predict(points=[[30, 40], [90.5, 60]], labels=[1, 0]).masks[0]
    (entry,) = content["annotations"]
    assert (decode_counts(entry["segmentation"]["counts"], (96, 160)).mask == expected).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--points", "30"), r"--points '30': expected x,y"),
        (("--boxes", "1,2,3"), r"--boxes '1,2,3': expected x0,y0,x1,y1"),
        (("--boxes", "50,20,30,90"), r"x0 < x1"),
        (("--points", "30,40", "--labels", "1", "0"), "one label for each point"),
        (("--points", "30,40", "--labels", "2"), "--labels 2: a label is 1"),
        (("--points", "30,40", "--boxes", "1,2,30,40", "5,6,70,80"), r"1 object\(s\).*2 box"),
        (("--min_score", "1.5"), "--min_score is 1.5"),
        (("--tile", "-1"), "--tile is -1"),
        (("--tile", "63"), r"--tile is 63: it must be 0 \(never\) or at least 64 pixels"),
        (("--points_per_side", "0"), "--points_per_side is 0: it must be 1 to 512"),
        (("--points_per_side", "513"), "--points_per_side is 513: it must be 1 to 512"),
        (("--min_area", "0"), "--min_area is 0: it must be at least 1"),
        (("--adapter", ""), "--adapter is empty"),
        (("--image_size", "100"), "multiples of 32"),
        (("--prompts", "p.json", "--points", "3,4"), "leave out --points"),
    ],
)
def test_wrong_flags_are_refused_before_the_model_is_loaded(
    pictures: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        predict.main(["--images", str(pictures), "--checkpoint", "no_such.pt", *flags])


def test_all_faults_of_flags_are_reported_together(pictures: Path) -> None:
    words = ["--points", "5,5,5", "a,b", "--boxes", "1,2", "--labels", "2"]
    with pytest.raises(ConfigError) as caught:
        predict.main(["--images", str(pictures), "--checkpoint", "no.pt", *words])
    assert str(caught.value).splitlines() == [
        "--labels 2: a label is 1 (on the object) or 0 (beside it)",
        "--points '5,5,5': expected x,y in pixels, without spaces",
        "--points 'a,b': expected x,y in pixels, without spaces",
        "--boxes '1,2': expected x0,y0,x1,y1 in pixels, without spaces",
    ]
    words = ["--tile", "3", "--min_score", "7", "--image_size", "100"]
    with pytest.raises(ConfigError, match=r"min_score is 7(.|\n)*tile is 3(.|\n)*size 100"):
        predict.main(["--images", str(pictures), "--checkpoint", "no.pt", *words])


@pytest.mark.parametrize("tile", [0, 64])
def test_the_smallest_tile_and_the_densest_grid_are_settings(tile: int) -> None:
    options = predict.Options(images=["x"], tile=tile, points_per_side=512)
    assert (options.tile, options.grid().points_per_side) == (tile, 512)


def test_a_picture_that_prompts_name_and_nobody_gave_is_answered_with_one_there_is(
    pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"photograph.tif": {"points": [[1, 2]]}}))
    with pytest.raises(DataError) as caught:
        read_prompts([pictures / "a.png", pictures / "b.png"], file=str(file))
    assert str(caught.value) == (
        f"{file}: no picture 'photograph.tif' among --images; there is a.png"
    )


def test_a_prompt_outside_its_picture_is_refused(pictures: Path) -> None:
    with pytest.raises(DataError, match=r"200,40 lies outside the picture of 160 x 96 pixels"):
        predict.main(["--images", str(pictures), "--checkpoint", "no.pt", "--points", "200,40"])


def test_files_that_are_no_pictures_are_reported_together(pictures: Path) -> None:
    for name in ("x.png", "y.png"):
        (pictures / name).write_text("nothing to see")
    with pytest.raises(DataError, match=r"x\.png(.|\n)*y\.png"):
        predict.main(["--images", str(pictures), "--checkpoint", "no.pt"])


def test_faults_of_a_prompt_file_are_reported_together(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"A.png": {"points": [[1, 2]]}, "b.png": {"points": [["x", 2]]},
                                "a.png": {"point": [[1, 2]]}}))  # fmt: skip
    with pytest.raises(DataError) as caught:
        predict.main(["--images", str(pictures), "--checkpoint", "no.pt", "--prompts", str(file)])
    for text in (
        "no picture 'A.png'",
        "did you mean 'a.png'",
        "'b.png': a point is",
        "'a.png': expected",
    ):
        assert text in str(caught.value)


def test_missing_pictures_and_equal_names_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at"):
        find_images([str(tmp_path / "gone")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        find_images([str(tmp_path / "empty")])
    Image.fromarray(noise()).save(pictures / "a.jpg")
    with pytest.raises(DataError, match=r"a_mask\.png"):
        find_images([str(pictures)])


def test_a_picture_named_twice_is_taken_once(pictures: Path) -> None:
    assert find_images([str(pictures), str(pictures / "a.png")]) == [
        pictures / "a.png",
        pictures / "b.png",
    ]


def test_prompt_entries_in_every_documented_form() -> None:
    assert parse_entry({}, "x") == []
    assert parse_entry({"points": [[1, 2], [3, 4]], "labels": [1, 0]}, "x") == [
        Prompt(((1.0, 2.0), (3.0, 4.0)), (1, 0))
    ]
    assert parse_entry({"points": [[[1, 2]], [[3, 4]]]}, "x") == [
        Prompt(((1.0, 2.0),), (1,)), Prompt(((3.0, 4.0),), (1,))
    ]  # fmt: skip
    assert parse_entry({"boxes": [[0, 0, 5, 5], [1, 1, 9, 9]]}, "x") == [
        Prompt(box=(0.0, 0.0, 5.0, 5.0)), Prompt(box=(1.0, 1.0, 9.0, 9.0))
    ]  # fmt: skip
    both = parse_entry({"points": [[1, 2]], "boxes": [0, 0, 5, 5]}, "x")
    assert both == [Prompt(((1.0, 2.0),), (1,), (0.0, 0.0, 5.0, 5.0))]


@pytest.mark.parametrize("entry", [
    [], {"points": "12"}, {"points": [[1, 2, 3]]}, {"points": [[1, float("nan")]]}, {"points": [5]},
    {"boxes": {"a": 1}}, {"boxes": [[0, 0, 5]]}, {"boxes": [0, 0, 10**400, 5]}, {"labels": [1]},
    {"points": [[True, 2]]}, {"points": [[[1, 2]], 5]}, {"points": [[1, 2]], "labels": [[1], 0]},
])  # fmt: skip
def test_malformed_prompt_entries_are_refused_by_name(entry: Any) -> None:
    with pytest.raises(DataError, match="some file"):
        parse_entry(entry, "some file")


def test_help_and_wrong_flags_do_not_wait_for_torch() -> None:
    code = "import sys, sam2_lora.predict, sam2_lora.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- files ---------------------------------------------------------------------------------------


def test_run_length_strings_decode_to_the_same_mask_here_and_in_pycocotools() -> None:
    mask_tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    masks = [rng.random((37, 53)) < share for share in (0.0, 0.01, 0.5, 0.99, 1.0)]
    masks.append(np.zeros((700, 900), dtype=bool))
    masks[-1][100:650, 200:880] = True  # counts of many digits and negative differences
    for mask in masks:
        text = rle_string(encode_counts(mask))
        encoded = {"size": list(mask.shape), "counts": text}
        assert (decode_counts(text, mask.shape).mask == mask).all()
        assert (mask_tools.decode(encoded).astype(bool) == mask).all()
        assert (
            text.encode() == mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        )


def test_more_than_255_instances_need_16_bits() -> None:
    masks = np.zeros((300, 20, 20), dtype=bool)
    for index in range(300):
        masks[index, index // 20, index % 20] = True
    ids = predict.instance_map([instance_of(mask, 0.5) for mask in masks], (20, 20))
    assert ids.dtype == np.uint16
    assert sorted(np.unique(ids)) == list(range(301))


def test_the_better_score_wins_where_two_instances_meet() -> None:
    left, right = np.zeros((2, 4, 9), dtype=bool)
    left[:, :6] = right[:, 3:] = True
    ids = predict.instance_map([instance_of(left, 0.9), instance_of(right, 0.6)], (4, 9))
    assert ids[0].tolist() == [1] * 6 + [2] * 3


def test_overlays_tint_the_mask_and_leave_the_rest_alone() -> None:
    grey = np.full((800, 900, 3), 128, dtype=np.uint8)
    mask = np.zeros((800, 900), dtype=bool)
    mask[100:300, 100:300] = True
    drawn = draw(grey, [mask], boxes=[(500, 500, 600, 700)], points=[(700, 100)], labels=[0])
    assert drawn.shape == grey.shape
    assert (drawn[600:, :400] == 128).all()
    assert (drawn[150:250, 150:250] == drawn[200, 200]).all()
    assert (drawn[200, 200] != 128).any()
    assert (drawn[600, 500] != 128).any()  # the box's edge
    assert (drawn[600, 550] == 128).all()  # not its inside
    assert (drawn[100, 700] != 128).any()
    assert (grey == 128).all()


def test_small_pictures_are_enlarged_and_large_ones_reduced() -> None:
    assert draw(np.zeros((64, 100, 3), dtype=np.uint8)).shape == (512, 800, 3)
    assert (
        draw(np.zeros((100, 5000, 3), dtype=np.uint8), [np.ones((100, 5000), bool)]).shape[1]
        == LARGEST
    )


def test_panels_stand_side_by_side_and_strips_below_each_other() -> None:
    square, strip = np.zeros((200, 200, 3), np.uint8), np.zeros((100, 600, 3), np.uint8)
    beside = panels([("a", square), ("b", square)], "title")
    below = panels([("a", strip), ("b", strip)])
    assert beside.shape[1] > 400 > beside.shape[0]
    assert 600 <= below.shape[1] < 700
    assert below.shape[0] > 200
    for sheet, black in ((beside, 2 * 200 * 200), (below, 2 * 100 * 600)):
        assert (sheet == 0).all(-1).sum() == black


# -- the predictor -------------------------------------------------------------------------------


def test_a_single_click_gives_the_best_scored_of_three_masks(predictor: Predictor) -> None:
    predictor.set_image(noise())
    every = predictor.predict(points=[[30, 40]], multimask=True)
    assert every.masks.shape == (1, 3, 96, 160)
    assert every.logits.shape == (1, 3, 32, 32)
    best = predictor.predict(points=[[30, 40]])
    assert best.scores[0] == every.scores.max()
    assert (best.masks[0] == every.masks[0, every.scores[0].argmax()]).all()


def test_prompts_reach_the_network_in_its_own_pixels(predictor: Predictor) -> None:
    rgb = noise()
    predictor.set_image(rgb)
    found = predictor.predict(points=[[80, 24]], labels=[0], boxes=[40, 12, 120, 72])
    from sam2_lora.image import preprocess

    with torch.no_grad():
        features = encode(predictor.model, preprocess(rgb, (128, 128))[None])
        expected = decode(
            predictor.model, features, torch.tensor([0]),
            points=torch.tensor([[[64.0, 32.0]]]), labels=torch.tensor([[0]]),
            boxes=torch.tensor([[32.0, 16, 96, 96]]), multimask=False, stability=True,
        )  # fmt: skip
    np.testing.assert_allclose(found.logits, expected.masks[:, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.scores, expected.iou[:, 0].numpy(), atol=1e-6)


def test_several_objects_at_once_equal_one_after_the_other(predictor: Predictor) -> None:
    predictor.set_image(noise())
    boxes = [[20, 10, 90, 70], [70, 30, 150, 90]]
    together = predictor.predict(boxes=boxes)
    for index, box in enumerate(boxes):
        alone = predictor.predict(boxes=box)
        np.testing.assert_allclose(together.logits[index], alone.logits[0], atol=1e-5)


def test_an_earlier_prediction_can_be_fed_back(predictor: Predictor) -> None:
    predictor.set_image(noise())
    first = predictor.predict(points=[[30, 40]])
    second = predictor.predict(points=[[30, 40], [90, 60]], labels=[1, 0], mask_input=first.logits)
    without = predictor.predict(points=[[30, 40], [90, 60]], labels=[1, 0])
    assert second.masks.shape == (1, 96, 160)
    assert np.abs(second.logits - without.logits).max() > 1e-3


@pytest.mark.fault("H19")
@pytest.mark.parametrize(("letter", "most"), [("n", 243), ("ü", 121), ("日", 81)])
def test_results_of_long_names_are_written_or_refused_before_the_model_is_read(
    golden_base: Path, pictures: Path, tmp_path: Path, letter: str, most: int
) -> None:
    (pictures / "a.png").rename(pictures / f"{letter * most}.png")
    run(golden_base, pictures, tmp_path, *OPEN)
    assert (tmp_path / "out" / f"{letter * most}_overlay.png").is_file()
    assert find_images([str(pictures)])
    (pictures / "b.png").rename(pictures / f"{letter * (most + 1)}.png")
    with pytest.raises(DataError, match="names of more than 255 bytes: rename it"):
        find_images([str(pictures)])


@pytest.mark.fault("H32")
def test_names_of_pictures_cannot_forge_output(
    golden_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "a.png").rename(pictures / hostile.CONTROL_NAME)
    run(golden_base, pictures, tmp_path, *OPEN)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\r")
    assert len(out.splitlines()) == 3


@pytest.mark.fault("K43")
def test_the_predictor_leaves_the_model_as_it_found_it(predictor: Predictor) -> None:
    predictor.model.train()
    predictor.set_image(noise())
    predictor.predict(points=[[30, 40]])
    predictor.everything(Grid(points_per_side=2))
    assert all(module.training for module in predictor.model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give points, boxes"),
        ({"points": [1, 2]}, r"expected \[P, 2\]"),
        ({"points": [[1, 2]], "labels": [1, 1]}, "labels: expected 0 or 1"),
        ({"points": [[1, 2]], "labels": [5]}, "labels: expected 0 or 1"),
        ({"labels": [1]}, "labels without points"),
        ({"boxes": [4, 0, 1, 3]}, "x0 <= x1"),
        ({"points": [[[1, 2]], [[3, 4]]], "boxes": [0, 0, 1, 3]}, "2 objects have points, but 1"),
    ],
)
def test_prompts_that_do_not_go_together_are_refused(
    predictor: Predictor, arguments: dict[str, Any], message: str
) -> None:
    predictor.set_image(noise())
    with pytest.raises(ValueError, match=message):
        predictor.predict(**arguments)


def test_pictures_of_a_wrong_form_are_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="set_image first"):
        predictor.predict(points=[[1, 2]])
    with pytest.raises(ValueError, match="uint8"):
        predictor.set_image(noise().astype(np.float32))  # type: ignore[arg-type]


def test_the_model_keeps_the_size_it_was_loaded_with(golden_base: Path) -> None:
    assert image_size(Predictor.load(golden_base, image_size=(64, 96), device="cpu").model) == (
        64,
        96,
    )
