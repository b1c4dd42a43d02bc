import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import ConfigError, DataError
from lora_core.pictures.encodings import encode_runs
from lora_core.pictures.masks import trim
from sam2_lora.config import Config
from sam2_lora.data import load
from sam2_lora.formats import find, read
from sam2_lora.prepare import Options, main, prepare
from sam2_lora.survey import objects_of

SIZE = (16, 40)


def kaggle(root: Path, count: int = 30) -> Path:
    """Pictures 0.. as JPEG; every third without defect, the others with two separate spots."""
    (root / "train_images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["ImageId,ClassId,EncodedPixels"]
    for k in range(count):
        noise = rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "train_images" / f"{k:03}.jpg")
        if k % 3:
            mask = np.zeros(SIZE, dtype=bool)
            mask[2:7, 3:9] = mask[8:14, 20 + k % 8 : 30] = True
            rows.append(f"{k:03}.jpg,{k % 3},{encode_runs(trim(mask, (0, 0), SIZE, ''))}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def options(source: Path, output: Path, **changes: object) -> Options:
    return Options(
        **{"source": str(source), "output": str(output), "subsets": [4, 9, 500]} | changes
    )


def test_kaggle_becomes_the_split_layout(tmp_path: Path) -> None:
    source, output = kaggle(tmp_path / "kaggle"), tmp_path / "deep" / "splits"
    made = prepare(options(source, output))
    names = {
        path.name: sorted(p.name for p in (path / "img").iterdir())
        for path in output.glob("*_split")
    }
    assert sorted(names) == ["test_split", "train_split", "val_split"]
    files = [file for part in names.values() for file in part]
    assert sorted(files) == [f"{k:03}.jpg" for k in range(30)]
    assert made == {name: len(files) for name, files in names.items()} | {
        "subsets/4_subset": 4,
        "subsets/9_subset": 9,
    }
    for name, files in names.items():
        for file in files:
            copied = (output / name / "img" / file).read_bytes()
            assert copied == (source / "train_images" / file).read_bytes()
            assert (output / name / "ann" / f"{file}.json").is_file()
    four, nine = (set(tree(output / "subsets" / f"{n}_subset")) for n in (4, 9))
    assert len(four) == 8
    assert four < nine < set(tree(output / "train_split"))


def test_the_objects_are_the_same_before_and_after(tmp_path: Path) -> None:
    source, output = kaggle(tmp_path / "kaggle"), tmp_path / "splits"
    prepare(options(source, output))

    def objects(root: Path) -> dict[str, list]:
        kind, sources = find(root)
        found = {}
        for part in sources.values():
            for record in read(part, kind, root).records:
                kept = objects_of(record, Config()).kept
                found[record.image.name] = [(o.label, o.origin, o.crop.tolist()) for o in kept]
        return found

    before = objects(source)
    assert before == objects(output)
    assert sorted({len(items) for items in before.values()}) == [0, 2]


def test_every_run_makes_the_same_tree(tmp_path: Path) -> None:
    source = kaggle(tmp_path / "kaggle")
    prepare(options(source, tmp_path / "one"))
    prepare(options(source, tmp_path / "two"))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_tree_can_be_trained_on(tmp_path: Path) -> None:
    prepare(options(kaggle(tmp_path / "kaggle"), tmp_path / "splits"))
    splits = load(Config(data_root=str(tmp_path / "splits"), image_size="64"))
    assert splits.classes == ("defect_1", "defect_2")
    assert "note" not in str(splits)
    with pytest.raises(ConfigError, match="500_subset"):
        load(Config(data_root=str(tmp_path / "splits"), dataset_size="500"))


def test_splits_that_exist_are_kept(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    prepare(options(kaggle(tmp_path / "kaggle"), first))
    prepare(options(first, second))
    assert tree(first) == tree(second)


def test_an_existing_folder_is_not_touched_without_being_asked(tmp_path: Path) -> None:
    source, output = kaggle(tmp_path / "kaggle"), tmp_path / "splits"
    prepare(options(source, output))
    before = tree(output)
    with pytest.raises(DataError, match="exists: add --overwrite"):
        prepare(options(source, output, test_share=0.5))
    assert tree(output) == before
    prepare(options(source, output, test_share=0.5, overwrite=True))
    assert tree(output) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kaggle", "splits"]


def test_overwriting_never_deletes_what_was_not_made_here(tmp_path: Path) -> None:
    source = kaggle(tmp_path / "kaggle")
    before = tree(tmp_path)
    for output, reason in ((source, "holds the --source"), (tmp_path, "holds the --source")):
        with pytest.raises(DataError, match=reason):
            prepare(options(source, output, overwrite=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds 'thesis.txt', which is not replaced"):
        prepare(options(source, tmp_path / "mine", overwrite=True))
    assert tree(tmp_path) == before | {"mine/thesis.txt": b"x"}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    source, output = kaggle(tmp_path / "kaggle"), tmp_path / "splits"
    with (source / "train.csv").open("a") as file:
        file.write("000.jpg,1,99999 5\n")
    with pytest.raises(DataError, match="row 22: run lengths"):
        prepare(options(source, output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kaggle"]


def test_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    images, annotations = [], []
    for k, folder in enumerate("ab"):
        (tmp_path / "coco" / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "coco" / "images" / folder / "x.png")
        images.append({"id": k, "file_name": f"{folder}/x.png"})
    for name in ("train", "val"):
        content = {"images": images, "annotations": annotations, "categories": []}
        (tmp_path / "coco" / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"x\.png: another picture of its split has the same name"):
        prepare(options(tmp_path / "coco", tmp_path / "splits"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"val_share": 0.0}, "--val_share is 0.0"),
        ({"test_share": 0.95}, "--test_share is 0.95"),
        ({"test_share": -0.1}, "--test_share is -0.1"),
        ({"subsets": [0]}, "--subsets is .0."),
    ],
)
def test_impossible_settings_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        options(Path("a"), Path("b"), **changes)


def test_the_command_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, output = kaggle(tmp_path / "kaggle"), tmp_path / "splits"
    words = ["--source", str(source), "--output", str(output), "--subsets", "3", "900"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "subsets/3_subset" in text
    assert "no subset of 900" in text
    assert text.endswith(f"-> {output}\n")


@pytest.mark.fault("H19")
@pytest.mark.parametrize("label", ["../../out", "/etc/x", "a/b", "CON", "x" * 300, "a\0b", "%s{0}"])
def test_names_of_classes_never_become_names_of_files(tmp_path: Path, label: str) -> None:
    source, output = tmp_path / "source", tmp_path / "splits"
    source.mkdir()
    for k in range(6):
        Image.fromarray(np.full((*SIZE, 3), 40 * k, np.uint8)).save(source / f"{k}.png")
    box = [2, 2, 9, 2, 9, 9, 2, 9]
    content = {
        "images": [
            {"id": k, "file_name": f"{k}.png", "width": SIZE[1], "height": SIZE[0]}
            for k in range(6)
        ],
        "categories": [{"id": 1, "name": label}],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "segmentation": [box], "iscrowd": 0}
            for k in range(6)
        ],
    }
    (source / "_annotations.coco.json").write_text(json.dumps(content))
    before = set(tmp_path.iterdir())
    prepare(options(source, output))
    assert set(tmp_path.iterdir()) - before == {output}
    names = {path.name for path in output.rglob("*.*") if path.parent.name in ("img", "ann")}
    assert names == {f"{k}.png{suffix}" for k in range(6) for suffix in ("", ".json")}
