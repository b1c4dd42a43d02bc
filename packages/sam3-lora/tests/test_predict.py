"""`sam3-lora predict` as a user runs it, its prompts and files, and the Python predictor."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_base
import tiny_run
import torch
from numpy.typing import NDArray
from PIL import Image

from lora_core.errors import CheckpointError, ConfigError, DataError
from lora_core.kept_results import KeptResults
from lora_core.pictures.files import read_image
from lora_core.testing.no_device import no_device
from sam3_lora import Predictor, predict
from sam3_lora import model as m
from sam3_lora import network as net
from sam3_lora.postprocess import detections, full_masks, mask_iou
from sam3_lora.predictor import only
from sam3_lora.transforms import preprocess
from sam3_lora.user_prompts import Prompt, read_prompts

PICTURE = tiny_run.PICTURES / "img_0.png"  # 61 x 47 pixels
EXAMPLES = Prompt("bolt", ((10, 5, 30, 40), (35, 10, 50, 20)), (1, 0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of every component that changes what is found."""
    return m.save_adapter(tiny_base.adapted(base), tmp_path_factory.mktemp("adapter") / "best.pt")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("img_0.png", "img_1.png"):
        shutil.copy(tiny_run.PICTURES / name, folder)
    return folder


@pytest.fixture(scope="module")
def predictor(base: Path) -> Predictor:
    return Predictor.load(base, device="cpu")


@pytest.fixture
def rgb(predictor: Predictor) -> NDArray[np.uint8]:
    """A picture that the predictor looks at."""
    pixels = read_image(PICTURE)
    predictor.set_image(pixels)
    return pixels


def run(base: Path, images: Path, output: Path, *flags: str) -> dict[str, Any]:
    argv = ["--checkpoint", str(base), "--images", str(images), "--output", str(output),
            "--device", "cpu", *flags]  # fmt: skip
    assert predict.main(argv) == 0
    content: dict[str, Any] = json.loads((output / "predictions.json").read_text())
    return content


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the command ---------------------------------------------------------------------------------


def test_every_picture_gets_an_overlay_and_the_json_all_objects(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--phrases", "bolt", "hex nut", "--threshold", "0.1")
    content = run(base, pictures, tmp_path / "out", *flags)
    assert names(tmp_path / "out") == ["img_0_overlay.png", "img_1_overlay.png", "predictions.json"]
    assert [image["file_name"] for image in content["images"]] == ["img_0.png", "img_1.png"]
    assert content["images"][0] | {"id": 1, "height": 47, "width": 61} == content["images"][0]
    assert content["categories"] == [{"id": 1, "name": "bolt"}, {"id": 2, "name": "hex nut"}]
    assert {one["phrase"] for one in content["annotations"]} == {"bolt", "hex nut"}
    counts = [sum(one["image_id"] == image for one in content["annotations"]) for image in (1, 2)]
    said = capsys.readouterr().out
    for number, count in enumerate(counts):
        line = next(line for line in said.splitlines() if line.startswith(f"img_{number}.png"))
        assert sum(int(word) for word in line.split() if word.isdigit()) == count > 0


def test_the_json_is_what_the_predictor_finds(
    base: Path, predictor: Predictor, rgb: NDArray[np.uint8], tmp_path: Path
) -> None:
    flags = ("--phrases", "bolt", "nut", "--threshold", "0.15")
    content = run(base, PICTURE, tmp_path / "out", *flags)
    found = predictor.predict(["bolt", "nut"], threshold=0.15)
    assert len(content["annotations"]) == sum(map(len, found)) > 0
    objects = [(one, k) for one in found for k in range(len(one))]
    for record, (one, k) in zip(content["annotations"], objects, strict=True):
        assert (record["phrase"], record["score"]) == (one.phrase, round(float(one.scores[k]), 6))
        x, y, width, height = record["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], one.boxes[k], atol=2e-3)
        assert record["area"] == one.masks[k].sum()
        assert record["score"] > 0.15
        assert 0 <= x < x + width <= 61.001
        assert 0 <= y < y + height <= 47.001


def test_pycocotools_reads_the_json_as_data_set_and_its_annotations_as_results(
    base: Path, predictor: Predictor, rgb: NDArray[np.uint8], tmp_path: Path
) -> None:
    from pycocotools.coco import COCO

    content = run(base, PICTURE, tmp_path / "out", "--phrases", "bolt", "--threshold", "0.1")
    data = COCO(str(tmp_path / "out" / "predictions.json"))
    masks = [data.annToMask(one) > 0 for one in data.loadAnns(data.getAnnIds(imgIds=1))]
    (found,) = predictor.predict(["bolt"], threshold=0.1)
    assert (np.stack(masks) == found.masks).all()
    keys = ("image_id", "category_id", "score", "bbox", "segmentation")
    results = data.loadRes([{key: one[key] for key in keys} for one in content["annotations"]])
    assert len(results.getAnnIds()) == len(content["annotations"])


def test_without_masks_the_json_has_boxes_alone(base: Path, tmp_path: Path) -> None:
    flags = ("--phrases", "bolt", "--threshold", "0.1", "--masks", "false")
    content = run(base, PICTURE, tmp_path / "out", *flags)
    assert content["annotations"]
    for one in content["annotations"]:
        assert "segmentation" not in one
        assert one["area"] == pytest.approx(one["bbox"][2] * one["bbox"][3], rel=1e-2)


def test_comparing_shows_the_base_as_it_is_alone_and_writes_the_adapted_objects(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    flags = ("--phrases", "bolt", "nut", "--threshold", "0.2")
    lora = ("--adapter", str(adapter))
    alone = run(base, PICTURE, tmp_path / "base", *flags)
    adapted = run(base, PICTURE, tmp_path / "lora", *flags, *lora)
    both = run(base, PICTURE, tmp_path / "both", *flags, *lora, "--compare")
    assert both == adapted != alone
    one, two = (
        np.asarray(Image.open(tmp_path / folder / "img_0_overlay.png"))
        for folder in ("base", "both")
    )
    assert two.shape[1] > 1.8 * one.shape[1]
    rows = slice(60, one.shape[0] - 60)  # below the captions, above the legend
    width = one.shape[1] - 30
    assert (two[rows, :width] == one[rows, :width]).all()


def test_example_boxes_alone_are_asked_as_the_official_model_is(
    base: Path, predictor: Predictor, rgb: NDArray[np.uint8], tmp_path: Path
) -> None:
    flags = ("--boxes", "10,5,30,40", "35,10,50,20", "--labels", "1", "0", "--threshold", "0.1")
    content = run(base, PICTURE, tmp_path / "out", *flags)
    assert content["categories"] == [{"id": 1, "name": "visual"}]
    asked = Prompt("visual", EXAMPLES.boxes, EXAMPLES.labels)
    (found,) = predictor.predict([asked], threshold=0.1)
    expected = [round(float(score), 6) for score in found.scores]
    assert [one["score"] for one in content["annotations"]] == expected != []


def test_a_file_asks_each_picture_for_its_own(base: Path, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    nut = {"phrase": "nut", "boxes": [[10, 5, 30, 40]], "labels": [1]}
    file.write_text(json.dumps({"img_1.png": ["bolt"], "img_0.png": ["washer", nut]}))
    content = run(base, pictures, tmp_path / "out", "--prompts", str(file), "--threshold", "0.1")
    asked = {
        image["file_name"]: {
            one["phrase"] for one in content["annotations"] if one["image_id"] == image["id"]
        }
        for image in content["images"]
    }
    assert asked == {"img_0.png": {"washer", "nut"}, "img_1.png": {"bolt"}}


def test_nothing_found_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(base, PICTURE, tmp_path / "out", "--phrases", "bolt", "--threshold", "0.99")
    assert content["annotations"] == []
    assert "lower --threshold" in capsys.readouterr().out


def test_a_phrase_that_is_cut_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(base, PICTURE, tmp_path / "out", "--phrases", "a very long phrase " * 9)
    assert "cut to 32 tokens" in capsys.readouterr().out


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "say what to look for"),
        (("--phrases", "bolt", " "), "phrase ' ' is empty"),
        (("--phrases", "hex nut", "Hex  Nut"), "'Hex Nut' is asked for twice"),
        (("--phrases", "bolt", "nut", "--boxes", "1,2,3,4"), "several --phrases"),
        (("--phrases", "bolt", "--labels", "1"), "--labels without --boxes"),
        (("--boxes", "1,2,3"), "expected x0,y0,x1,y1"),
        (("--boxes", "5,2,3,4"), "x0 < x1"),
        (("--boxes", "1,2,3,nan"), "expected x0,y0,x1,y1"),
        (("--boxes", "1,2,3,4", "--labels", "2"), "a label is 1"),
        (("--boxes", "1,2,3,4", "--labels", "1", "0"), "2 labels for 1 boxes"),
        (("--boxes", "1,2,3,4", "--labels", "0"), "need a phrase"),
        (("--phrases", "bolt", "--threshold", "1.5"), "--threshold is 1.5"),
        (("--phrases", "bolt", "--nms", "-1"), "--nms is -1"),
        (("--phrases", "bolt", "--nms", "0.5", "--masks", "false"), "--nms compares masks"),
        (("--phrases", "bolt", "--compare"), "give --adapter"),
        (("--phrases", "bolt", "--resolution", "100"), "--resolution 100: not multiples of 14"),
        (("--phrases", "bolt", "--prompts", "p.json"), "leave out --phrases"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_read(
    flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        predict.main(["--images", "gone.png", "--checkpoint", "gone.pt", *flags])


def test_all_wrong_flags_are_named_at_once() -> None:
    flags = ["--phrases", "bolt", "--threshold", "2", "--nms", "7", "--compare"]
    with pytest.raises(ConfigError, match=r"--threshold(.|\n)*--nms(.|\n)*--compare"):
        predict.main(["--images", "gone.png", *flags])


def refused(kind: type[Exception], message: str, *argv: object) -> None:
    """No weight is read and no GPU touched before it."""
    with no_device(weights=True), pytest.raises(kind, match=message):
        predict.main([str(word) for word in argv])


def test_earlier_results_are_replaced_only_on_demand(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = run(base, PICTURE, out, "--phrases", "bolt", "--threshold", "0.1")
    words = ("--checkpoint", base, "--images", PICTURE, "--output", out, "--phrases", "nut")
    refused(ConfigError, "holds 2 of the results already", *words)
    (out / "predictions.json").unlink()
    refused(ConfigError, "holds 1 of the results already, such as img_0_overlay", *words)
    after = run(base, PICTURE, out, "--phrases", "nut", "--threshold", "0.1", "--overwrite")
    assert before["categories"] != after["categories"] == [{"id": 1, "name": "nut"}]


class Stop(Exception):
    """As a kill, or a lost machine."""


def test_a_stopped_command_goes_on(
    base: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--phrases", "bolt", "hex nut", "--threshold", "0.1")
    looked: list[int] = []
    predict_one = predict.predict_one

    def counted(*words: Any) -> Any:
        if len(looked) == most:
            raise Stop
        looked.append(1)
        return predict_one(*words)

    monkeypatch.setattr(predict, "predict_one", counted)
    most = 1
    for _ in range(2):  # the second time before it has looked at anything
        with pytest.raises(Stop):
            run(base, pictures, tmp_path / "out", *flags)
    assert names(tmp_path / "out") == ["img_0_overlay.png", "unfinished"]
    most = 9
    found = run(base, pictures, tmp_path / "out", *flags)
    assert len(looked) == 2
    assert "1 picture from the command that was stopped" in capsys.readouterr().out
    assert names(tmp_path / "out") == ["img_0_overlay.png", "img_1_overlay.png", "predictions.json"]
    assert found == run(base, pictures, tmp_path / "whole", *flags)
    assert len(looked) == 4


@pytest.mark.parametrize("other", ["--threshold 0.2", "--phrases bolt", "--masks false"])
def test_objects_that_were_asked_for_otherwise_are_not_used(
    other: str, base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--phrases", "bolt", "hex nut", "--threshold", "0.1")
    monkeypatch.setattr(KeptResults, "remove", lambda kept: None)
    run(base, pictures, tmp_path / "out", *flags)
    (tmp_path / "out" / "predictions.json").unlink()
    monkeypatch.undo()
    found = run(base, pictures, tmp_path / "out", *flags, *other.split())
    assert found == run(base, pictures, tmp_path / "whole", *flags, *other.split())


def test_results_do_not_go_among_the_pictures(base: Path, pictures: Path) -> None:
    words = ("--images", pictures, "--output", pictures / ".." / "pictures", "--phrases", "bolt")
    refused(ConfigError, "is the folder of the pictures", "--checkpoint", base, *words)


def test_missing_files_are_named_before_weights_are_read(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("--images", pictures, "--output", tmp_path / "out", "--phrases", "bolt")
    refused(CheckpointError, "gone.pt", "--checkpoint", tmp_path / "gone.pt", *words)
    lora = ("--adapter", tmp_path / "gone")
    refused(CheckpointError, "--adapter", "--checkpoint", base, *words, *lora)
    bare = shutil.copy(base, tmp_path / "bare.pt")
    shutil.copy(base.with_suffix(".json"), tmp_path / "bare.json")
    refused(ConfigError, "tokenizer", "--checkpoint", bare, *words)


def test_pictures_and_boxes_are_checked_together(base: Path, pictures: Path) -> None:
    for name in ("x.png", "y.png"):
        (pictures / name).write_text("nothing to see")
    words = ("--checkpoint", base, "--images", pictures, "--boxes", "10,10,200,20")
    message = r"img_0\.png: box 10,10,200,20 leaves the picture of 61 x 47(.|\n)*x\.png(.|\n)*y\.pn"
    refused(DataError, message, *words, "--output", pictures.parent / "out")


def test_a_picture_that_cannot_be_decoded_does_not_cost_the_results_of_the_others(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    path = pictures / "half.jpg"  # its header is whole
    Image.open(pictures / "img_0.png").save(path, quality=95)
    (pictures / "img_0.png").unlink()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"half\.jpg: cannot be read"):
        run(base, pictures, tmp_path / "out", "--phrases", "bolt", "--threshold", "0.1")
    assert names(tmp_path / "out") == ["img_1_overlay.png", "predictions.json"]
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["img_1.png"]
    assert {one["image_id"] for one in content["annotations"]} == {1}


def test_equal_names_and_missing_pictures_are_refused(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "img_0.png", tmp_path / "img_0.png")
    words = ("--images", pictures, tmp_path / "img_0.png", tmp_path / "gone", "--phrases", "bolt")
    refused(DataError, r"nothing at(.|\n)*both write img_0_overlay\.png", *words)


def test_faults_of_a_prompt_file_are_reported_together(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    images = sorted(pictures.iterdir())
    file.write_text(json.dumps({"Img_0.png": ["bolt"], "img_1.png": [{"boxes": [[1, 2, 1, 4]]}]}))
    with pytest.raises(DataError) as caught:
        read_prompts(images, file=str(file))
    for text in (
        "no picture 'Img_0.png' among --images; did you mean 'img_0.png'",
        "'img_1.png': boxes must be a list",
        "nothing is asked of 1 pictures, such as img_0.png",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        "bolt", [], [""], [3], [{}], [{"phrase": 3}], [{"phrase": "a", "box": []}],
        [{"phrase": "a", "boxes": [[1, 2, 3, True]]}], [{"boxes": [[1, 2, 3, 4]], "labels": [0]}],
        [{"phrase": "a", "boxes": [[1, 2, 3, 4]], "labels": [True]}], ["a", "A"],
        [{"phrase": "a", "boxes": [[1, 2, 3, 4]], "labels": 1}], [{"phrase": " ", "boxes": []}],
    ],
    ids=str,
)  # fmt: skip
def test_prompts_that_mean_nothing_are_faults_of_their_file(entry: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({PICTURE.name: entry}))
    with pytest.raises(DataError, match=r"prompts\.json: 'img_0\.png'"):
        read_prompts([PICTURE], file=str(file))


# -- from Python ---------------------------------------------------------------------------------


def direct(predictor: Predictor, rgb: NDArray[np.uint8], prompt: Prompt) -> Any:
    """The network's own forward pass for one question."""
    ids, mask = predictor.words([prompt.phrase])
    zero = torch.zeros(1, dtype=torch.int64)
    batch = {"pixel_values": preprocess(rgb, (84, 84))[None], "input_ids": ids,
             "attention_mask": mask, "image_ids": zero, "text_ids": zero}  # fmt: skip
    if prompt.boxes:
        x0, y0, x1, y1 = torch.tensor(prompt.boxes).float().unbind(1)
        boxes = [(x0 + x1) / 2 / 61, (y0 + y1) / 2 / 47, (x1 - x0) / 61, (y1 - y0) / 47]
        batch["exemplars"] = torch.stack(boxes, 1)[None]
        batch["exemplar_labels"] = torch.tensor([prompt.labels])
    with torch.no_grad():
        outputs = net.forward(predictor.model, batch, masks=True, one_to_many=False)
    return detections(outputs, [(47, 61)], 0.1)[0]


@pytest.mark.parametrize("prompt", [Prompt("hex nut"), EXAMPLES], ids=["phrase", "boxes"])
def test_objects_are_those_of_the_network_the_best_first(
    predictor: Predictor, rgb: NDArray[np.uint8], prompt: Prompt
) -> None:
    (found,) = predictor.predict([prompt], threshold=0.1)
    expected = direct(predictor, rgb, prompt)
    order = expected.scores.argsort(descending=True)
    assert len(found) > 1
    np.testing.assert_allclose(found.scores, expected.scores[order], rtol=1e-5)
    boxes = np.clip(expected.boxes[order].numpy(), 0, [61, 47, 61, 47])
    np.testing.assert_allclose(found.boxes, boxes, atol=1e-3)
    assert (found.masks == full_masks(expected)[order].numpy()).mean() > 0.999


def test_questions_asked_together_have_the_answers_of_each_alone(
    predictor: Predictor, rgb: NDArray[np.uint8]
) -> None:
    asked = ["nut", EXAMPLES, *(f"thing {number}" for number in range(20))]
    together = predictor.predict(asked, threshold=0.1)
    assert [one.phrase for one in together[:3]] == ["nut", "bolt", "thing 0"]
    for prompt, one in zip(asked, together, strict=True):
        (alone,) = predictor.predict([prompt], threshold=0.1)
        np.testing.assert_allclose(one.scores, alone.scores, rtol=1e-4)
        np.testing.assert_allclose(one.boxes, alone.boxes, atol=1e-3)


def test_example_boxes_change_what_is_found_and_so_do_their_labels(
    predictor: Predictor, rgb: NDArray[np.uint8]
) -> None:
    turned = Prompt("bolt", EXAMPLES.boxes, (0, 1))
    some = predictor.predict(["bolt", EXAMPLES, turned], threshold=0.0)
    plain, with_boxes, other = (np.sort(one.scores) for one in some)
    assert np.abs(plain - with_boxes).max() > 1e-4
    assert np.abs(with_boxes - other).max() > 1e-4


def test_nms_leaves_no_two_masks_that_overlap_more(
    predictor: Predictor, rgb: NDArray[np.uint8]
) -> None:
    (every,) = predictor.predict(["bolt"], threshold=0.0)
    (kept,) = predictor.predict(["bolt"], threshold=0.0, nms=0.6)
    assert 0 < len(kept) < len(every)
    assert kept.scores[0] == every.scores[0]
    assert kept.rles is not None
    iou = mask_iou(kept.rles)
    assert iou[~np.eye(len(kept), dtype=bool)].max(initial=0) <= 0.6
    assert len(kept) == len(kept.masks) == len(kept.boxes)


def test_the_base_is_the_base_also_where_the_text_encoder_is_adapted(
    base: Path, adapter: Path
) -> None:
    rgb = read_image(PICTURE)
    both, plain = (Predictor.load(base, file, device="cpu") for file in (adapter, None))
    plain.set_image(rgb)
    (alone,) = plain.predict(["bolt"], threshold=0.0)
    both.set_image(rgb)
    (adapted,) = both.predict(["bolt"], threshold=0.0)
    with only(both, "base"):
        both.set_image(rgb)
        (found,) = both.predict(["bolt"], threshold=0.0)
    assert (found.scores == alone.scores).all()
    assert (found.boxes == alone.boxes).all()
    assert np.abs(adapted.scores - alone.scores).max() > 1e-3
    assert both._keeps_phrases is False, "the adapter must change the text for this to show it"


def test_the_predictor_leaves_the_model_as_it_found_it(predictor: Predictor) -> None:
    predictor.model.train()
    try:
        predictor.set_image(read_image(PICTURE))
        predictor.predict(["bolt"])
        assert all(module.training for module in predictor.model.modules())
    finally:
        predictor.model.eval()


def test_wrong_use_from_python_is_refused(predictor: Predictor, rgb: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        predictor.set_image(rgb.astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="set_image first"):
        Predictor(predictor.model, predictor.words).predict(["bolt"])
    with pytest.raises(ValueError, match="masks=True"):
        predictor.predict(["bolt"], nms=0.5, masks=False)
    (found,) = predictor.predict(["bolt"], threshold=0.0, masks=False)
    with pytest.raises(ValueError, match="masks=True"):
        _ = found.masks
    with pytest.raises(DataError, match="empty"):
        predictor.predict([" "])


def test_no_questions_have_no_answers(predictor: Predictor, rgb: NDArray[np.uint8]) -> None:
    fresh = Predictor(predictor.model, predictor.words)
    fresh.set_image(rgb)
    assert fresh.predict([]) == []


def test_the_input_has_the_size_of_the_adapters_training(base: Path, adapter: Path) -> None:
    assert m.image_size(Predictor.load(base, adapter, device="cpu").model) == (84, 84)
    other = Predictor.load(base, adapter, size=(84, 112), device="cpu")
    assert m.image_size(other.model) == (84, 112)
    other.set_image(read_image(PICTURE))
    assert len(other.predict(["bolt"], threshold=0.0)[0]) == 10
