"""`isaac-lora prepare coco`: COCO boxes become conversations, or all that is wrong is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from isaac_lora.answers.tags import parse
from isaac_lora.conversations.pictures import picture_size
from isaac_lora.conversations.records import read_conversations
from isaac_lora.prepare import main
from isaac_lora.prepare_coco import Options, prepare
from lora_core.errors import ConfigError, DataError
from lora_core.prepared_folder import MARK
from lora_core.testing import coco as faulty
from lora_core.testing import hostile
from lora_core.testing.console import HEAVY
from lora_core.testing.refusals import files_limited_to

SIZE = (40, 80)  # height, width


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "conversations"


def picture(path: Path, seed: int = 0, **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **save)
    return path


def coco(pictures: int = 4) -> dict[str, Any]:
    """A box in each picture, of "rust" and of "dent" in turn."""
    return {
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": SIZE[0], "width": SIZE[1]}
            for k in range(pictures)
        ],
        "annotations": [
            {
                "id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [8, 10, 32, 20],
                "segmentation": [[8, 10, 40, 10, 40, 30]], "iscrowd": 0,
            }
            for k in range(pictures)
        ],
        "categories": [{"id": 1, "name": "rust"}, {"id": 2, "name": "dent"}],
    }  # fmt: skip


def written(root: Path, content: dict[str, Any] | str, split: str = "train") -> Path:
    folder = root / split
    names = ["0.png", "1.png", "2.png", "3.png"]
    if isinstance(content, dict):
        names = [item.get("file_name") for item in content["images"]]
    for number, name in enumerate(names):
        if isinstance(name, str) and re.fullmatch(r"[0-9a-z_.]+\.png", name):
            picture(folder / name, sum(map(ord, split)) + 1000 * number)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content) if isinstance(content, dict) else content
    (folder / "_annotations.coco.json").write_text(text)
    return root


def run(source: Path, output: Path, **more: Any) -> dict[str, list[Any]]:
    more = {"val_fraction": 0, **more}
    prepare(Options(source=str(source), output=str(output), **more))
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in output.glob("*.json")
        if path.name != MARK
    }


# -- what is made ----------------------------------------------------------------------------------


def test_boxes_become_questions_and_tags(source: Path, output: Path) -> None:
    content = coco(2)
    content["annotations"].append({"id": 9, "image_id": 0, "category_id": 2, "bbox": [0, 0, 8, 4]})
    made = run(written(source, content), output)
    assert made.keys() == {"train"}
    assert made["train"][0] == {
        "id": "train/0.png",
        "image": "train/0.png",
        "conversations": [
            {"from": "human", "value": "<hint>BOX</hint>"},
            {"from": "human", "value": "<image>"},
            {
                "from": "human",
                "value": "Your goal is to segment out the following categories: rust, dent",
            },
            {
                "from": "gpt",
                "value": '<point_box mention="dent"> (0,0) (100,100) </point_box> '
                '<point_box mention="rust"> (100,250) (500,750) </point_box>',
            },
        ],
    }


def test_what_is_made_is_what_training_reads(source: Path, output: Path) -> None:
    content = coco()
    content["categories"][0]["name"] = 'driver\'s "rust" & 螺栓'
    run(written(source, content), output)
    reading = read_conversations(output / "train.json")
    assert (reading.problems, reading.bad) == ([], [])
    assert len(reading.records) == 4
    for record in reading.records:
        assert (source / record.images[0]).is_file()
        answer = parse(record.turns[-1].text)
        assert len(answer.tags) == 1
        assert not answer.damaged
        assert answer.tags[0].mention in {'driver\'s "rust" & 螺栓', "dent"}


def test_points_are_the_middle_of_boxes(source: Path, output: Path) -> None:
    made = run(written(source, coco()), output, answer="point", question="Where is {categories}?")
    turns = made["train"][1]["conversations"]
    assert turns[0]["value"] == "<hint>POINT</hint>"
    assert turns[2]["value"] == "Where is rust, dent?"
    assert turns[-1]["value"] == '<point mention="dent"> (300,500) </point>'


def test_pictures_without_objects_are_answered_or_left_out(source: Path, output: Path) -> None:
    content = coco()
    del content["annotations"][0]
    made = run(written(source, content), output)["train"]
    assert len(made) == 4
    assert made[0]["conversations"][-1]["value"] == "None."
    made = run(source, output, overwrite=True, ask_for="present")["train"]
    assert [record["id"] for record in made] == ["train/1.png", "train/2.png", "train/3.png"]
    assert made[0]["conversations"][2]["value"].endswith(": dent")


def test_the_placeholder_of_roboflow_is_not_asked_for(source: Path, output: Path) -> None:
    content = coco()
    for item in content["categories"]:
        item["supercategory"] = "defects"
    content["categories"].insert(0, {"id": 0, "name": "defects", "supercategory": "none"})
    made = run(written(source, content), output)["train"]
    assert made[0]["conversations"][2]["value"].endswith("categories: rust, dent")


def test_crowds_and_empty_boxes_are_left_out_and_counted(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = coco()
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][1]["bbox"] = [5, 5, 0, 10]
    made = run(written(source, content), output)["train"]
    assert [record["conversations"][-1]["value"] for record in made][:2] == ["None.", "None."]
    said = capsys.readouterr().out
    assert "crowds, left out: 1" in said
    assert "boxes without width or height, left out: 1" in said


@pytest.mark.fault("D19")
def test_without_a_bbox_the_box_is_that_of_the_mask(source: Path, output: Path) -> None:
    content = coco()
    for item in content["annotations"]:
        del item["bbox"]
    runs = [8 * 40 + 10] + 31 * [20, 20] + [20, 40 * 40 + 10]  # 10 <= y < 30, 8 <= x < 40
    content["annotations"][1]["segmentation"] = {"size": [40, 80], "counts": runs}
    content["annotations"][2]["segmentation"] = {"size": [40, 80], "counts": [3200]}
    made = run(written(source, content), output)["train"]
    answers = [record["conversations"][-1]["value"] for record in made]
    assert "(100,250) (500,750)" in answers[0]
    assert "(100,250) (500,750)" in answers[1]
    assert answers[2] == "None."
    content["annotations"][1]["segmentation"]["counts"] = [5]
    with pytest.raises(DataError, match="annotation 1: run lengths: the counts sum to 5"):
        run(written(source, content), output, overwrite=True)


@pytest.mark.fault("D18")
def test_a_box_that_leaves_its_picture_is_cut_and_counted(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = coco()
    content["annotations"][0]["bbox"] = [-40, 20, 80, 90]
    made = run(written(source, content), output)["train"]
    assert "(0,500) (500,1000)" in made[0]["conversations"][-1]["value"]
    assert "boxes that leave their picture, cut: 1" in capsys.readouterr().out


@pytest.mark.fault("D03")
def test_boxes_mean_the_upright_picture(source: Path, output: Path) -> None:
    written(source, content := coco())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(source / "train" / "0.png", exif=exif)
    with pytest.raises(DataError, match="EXIF orientation"):
        run(source, output)
    content["images"][0] |= {"height": 80, "width": 40}
    written(source, content)
    picture(source / "train" / "0.png", exif=exif)
    made = run(source, output)["train"]
    assert "(200,125) (1000,375)" in made[0]["conversations"][-1]["value"]


# -- splits ----------------------------------------------------------------------------------------


def test_splits_of_the_data_set_are_kept(source: Path, output: Path) -> None:
    for split in ("train", "valid", "test"):
        written(source, coco(3), split)
    made = run(source, output, val_fraction=0.5)
    assert {name: len(records) for name, records in made.items()} == {
        "train": 3, "val": 3, "test": 3,
    }  # fmt: skip
    assert made["val"][0]["image"] == "valid/0.png"


def test_a_picture_never_changes_sides(source: Path, output: Path, tmp_path: Path) -> None:
    few = run(written(source, coco(12)), output, val_fraction=0.4)
    many = run(written(source, coco(20)), tmp_path / "more", val_fraction=0.4)
    for split in ("train", "val"):
        assert {one["id"] for one in few[split]} <= {one["id"] for one in many[split]}
        assert few[split]


@pytest.mark.fault("D09")
def test_one_picture_and_no_picture(source: Path, output: Path) -> None:
    made = run(written(source, coco(1)), output, val_fraction=0.1)
    assert made.keys() == {"train"}
    empty = written(output.parent / "empty", coco(1) | {"annotations": []})
    with pytest.raises(DataError, match="no objects to train on"):
        run(empty, output, overwrite=True)
    with pytest.raises(DataError, match=r"no COCO files found; expected one of\n"):
        run(picture(output.parent / "pictures" / "a.png").parent, output.parent / "x")
    with pytest.raises(DataError, match="no such folder"):
        run(source / "nowhere", output.parent / "x")


@pytest.mark.fault("D10")
def test_a_picture_of_both_splits_is_told(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid"):
        written(source, coco(2), split)
    (source / "valid" / "0.png").write_bytes((source / "train" / "1.png").read_bytes())
    run(source, output)
    assert "1 picture of val in train too" in capsys.readouterr().out


# -- what cannot be used ---------------------------------------------------------------------------


@pytest.mark.fault("D16", "D18")
def test_all_bad_annotations_are_named_at_once(source: Path, output: Path) -> None:
    content = coco()
    content["annotations"][0]["bbox"] = [1, 2, 3]
    content["annotations"][1]["bbox"] = [50, 10, -3, 5]
    content["annotations"][2]["image_id"] = 77
    content["annotations"][3]["category_id"] = "1"
    content["images"].append({"id": 9, "file_name": "gone.jpg", "height": 40, "width": 80})
    content["annotations"] += [
        {"id": k + 10, "image_id": 0, "category_id": 1, "bbox": bbox}
        for k, bbox in enumerate(
            ["a", None, [1, 2, 3, "4"], [100, 100, 5, 5], [40, 20, 60, 30], [0, 0, 10**400, 3]]
        )
    ]
    with pytest.raises(DataError) as error:
        run(written(source, content), output)
    text = str(error.value)
    for part in (
        "annotation 0: bbox [1, 2, 3]: expected the numbers",
        "annotation 1: bbox [50, 10, -3, 5]: a width or height below 0",
        "annotation 2: image_id 77 is not among the images",
        "annotation 3: category_id '1' is not among the categories; there is the number 1",
        "annotation 10: bbox 'a'",
        "annotation 11: it has neither bbox nor segmentation",
        "annotation 12: bbox [1, 2, 3, '4']",
        "annotation 13: bbox [100, 100, 5, 5]: it lies outside of the picture of 80 x 40",
        "annotation 15: bbox [0, 0, 1000",
        "gone.jpg: no such file",
        "--on_bad_sample skip",
    ):
        assert part in text, text
    assert "annotation 14" not in text
    assert not output.exists()


@pytest.mark.fault("D18")
def test_corners_instead_of_widths_are_suspected(source: Path, output: Path) -> None:
    content = coco(6)
    for item in content["annotations"]:
        item["bbox"] = [30, 10, 70, 35]
    with pytest.raises(DataError, match=r"6 of 6 boxes leave their picture.*write widths"):
        run(written(source, content), output)


def test_with_skip_bad_pictures_are_left_out_and_listed(source: Path, output: Path) -> None:
    content = coco()
    content["annotations"][2]["bbox"] = [1, 2]
    written(source, content)
    made = run(source, output, on_bad_sample="skip", max_bad_fraction=0.3)
    assert [record["id"] for record in made["train"]] == [f"train/{k}.png" for k in (0, 1, 3)]
    lines = (output / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == ["train/2.png"]
    with pytest.raises(DataError, match="1 of 4 samples are bad, more than --max_bad_fraction"):
        run(source, output.parent / "other", on_bad_sample="skip", max_bad_fraction=0.2)


@pytest.mark.fault("D11")
@pytest.mark.parametrize("kind", faulty.ENCODINGS)
def test_a_file_that_is_no_json_is_named(source: Path, output: Path, kind: str) -> None:
    written(source, coco())
    damage, pattern = faulty.ENCODINGS[kind]
    path = source / "train" / "_annotations.coco.json"
    path.write_bytes(damage(json.dumps(coco())))
    with pytest.raises(DataError, match=pattern) as error:
        run(source, output)
    assert str(path) in str(error.value)


@pytest.mark.fault("D12")
@pytest.mark.parametrize("place", ["bbox", "image"])
def test_numbers_that_json_does_not_have_are_named(source: Path, output: Path, place: str) -> None:
    text, expected = faulty.not_finite(coco(), place, "NaN")
    with pytest.raises(DataError, match=re.escape(expected)):
        run(written(source, text), output)


@pytest.mark.fault("D13")
@pytest.mark.parametrize("kind", faulty.DOUBLES)
def test_what_stands_twice_is_named(source: Path, output: Path, kind: str) -> None:
    content = coco()
    expected = faulty.doubled(content, kind)
    with pytest.raises(DataError, match=re.escape(expected)):
        run(written(source, content), output)


@pytest.mark.fault("H15")
def test_file_names_that_leave_the_folder_are_named(source: Path, output: Path) -> None:
    content = coco()
    content["images"] += [
        {"id": 10 + k, "file_name": name} for k, name in enumerate(hostile.ESCAPES)
    ]
    with pytest.raises(DataError) as error:
        run(written(source, content), output)
    assert f"{len(hostile.ESCAPES)} problems" in str(error.value)


@pytest.mark.fault("H16")
def test_links_out_of_the_data_are_refused_unless_allowed(source: Path, output: Path) -> None:
    written(source, coco())
    target = picture(output.parent / "elsewhere.png")
    (source / "train" / "0.png").unlink()
    (source / "train" / "0.png").symlink_to(target)
    with pytest.raises(DataError, match="a link that leads out of"):
        run(source, output)
    made = run(source, output, follow_links=True)["train"]
    assert len(made) == 4
    for record in made:  # what training takes
        assert picture_size(record["image"], source) == SIZE


@pytest.mark.fault("H47")
def test_names_of_categories_are_text_and_nothing_else(source: Path, output: Path) -> None:
    for number, name in enumerate(hostile.TEMPLATES[:-1]):
        content = coco()
        content["categories"][0]["name"] = name
        folder = output.parent / str(number)
        made = run(written(folder / "data", content), folder / "out")["train"][0]
        assert made["conversations"][2]["value"].endswith(f": {name}, dent")
        assert parse(made["conversations"][-1]["value"]).tags[0].mention == name


@pytest.mark.parametrize("name", ["", "  ", "a <IMAGE> b", "a\x1b[2J", "\u202e"])
def test_a_category_that_cannot_be_asked_for_is_named(
    source: Path, output: Path, name: str
) -> None:
    content = coco()
    content["categories"][0]["name"] = name
    with pytest.raises(DataError, match="category 1 is called"):
        run(written(source, content), output)


# -- the output folder -----------------------------------------------------------------------------


def test_nothing_is_replaced_that_was_not_made_here(source: Path, output: Path) -> None:
    written(source, coco())
    first = run(source, output)
    with pytest.raises(DataError, match="exists: add --overwrite"):
        run(source, output)
    assert run(source, output, overwrite=True) == first
    (output / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds 'notes\.txt', which is not replaced"):
        run(source, output, overwrite=True)
    (output / "notes.txt").unlink()
    (output / MARK).unlink()
    with pytest.raises(DataError, match="was not made by prepare"):
        run(source, output, overwrite=True)
    assert (output / "train.json").is_file()


def test_a_fault_leaves_the_old_folder_as_it_was(source: Path, output: Path) -> None:
    written(source, coco())
    first = run(source, output)
    content = coco()
    content["annotations"][0]["bbox"] = "x"
    written(source, content)
    with pytest.raises(DataError):
        run(source, output, overwrite=True)
    assert json.loads((output / "train.json").read_text()) == first["train"]
    assert {path.name for path in output.parent.iterdir()} == {"source", "conversations"}


def test_a_failure_of_the_disk_leaves_nothing_behind(source: Path, output: Path) -> None:
    written(source, coco())
    with files_limited_to(500), pytest.raises(DataError, match="cannot be written"):
        run(source, output)
    assert [path.name for path in output.parent.iterdir()] == ["source"]


# -- the command -----------------------------------------------------------------------------------


def test_the_command_says_what_it_made_and_how_to_train(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(source, coco(12))
    words = ["coco", "--source", str(source), "--output", str(output), "--val_fraction", "0.4"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"train\.json +\d+ +0 +\d+ +2", said)
    assert f"isaac-lora train --data_path {output}/train.json --val_data_path" in said
    assert f"--image_folder {source}" in said


@pytest.mark.fault("C37")
def test_help_needs_no_library_that_takes_seconds() -> None:
    code = (
        "import sys; from isaac_lora.prepare import main; from lora_core.errors import run; "
        "status = run(main, ['coco', '--help']); "
        f"sys.exit(status or str({{*{HEAVY}}} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert "--ask_for" in done.stdout


def test_wrong_words_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "coco" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no step 'cocoo'; did you mean 'coco'"):
        main(["cocoo"])
    with pytest.raises(ConfigError, match="--source"):
        main(["coco"])
    with pytest.raises(ConfigError) as error:
        Options(source="", val_fraction=1, nothing=" ", question="<image>?")
    assert len(str(error.value).splitlines()) == 4
