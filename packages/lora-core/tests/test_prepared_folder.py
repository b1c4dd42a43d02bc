"""What a `prepare` command may replace: a folder that one made, and nothing else."""

import pytest

from lora_core.errors import DataError
from lora_core.prepared_folder import MARK, check_output
from lora_core.validate import REPORT

OWN = ("train", "val.json")


@pytest.fixture
def made(tmp_path):
    """A folder as prepare leaves it."""
    folder = tmp_path / "made"
    (folder / "train").mkdir(parents=True)
    for name in ("train/a.png", "val.json", MARK, REPORT):
        (folder / name).write_text("x")
    return folder


def refused(output, source, overwrite=True, **more):
    with pytest.raises(DataError) as caught:
        check_output(output, source, OWN, overwrite, **more)
    return str(caught.value)


def test_what_prepare_made_is_replaced_on_request_alone(made, tmp_path):
    source = tmp_path / "source"
    check_output(tmp_path / "new", source, OWN, overwrite=False)
    assert "exists: add --overwrite" in refused(made, source, overwrite=False)
    check_output(made, source, OWN, overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    check_output(empty, source, OWN, overwrite=True)


def test_nothing_else_is_replaced(made, tmp_path):
    source = tmp_path / "source"
    (made / "notes.txt").write_text("mine")
    assert "holds 'notes.txt', which is not replaced" in refused(made, source)
    (made / "notes.txt").unlink()
    (made / MARK).unlink()
    assert "was not made by prepare" in refused(made, source)
    assert "is no folder" in refused(made / "val.json", source)
    link = tmp_path / "link"
    link.symlink_to(made)
    assert "is no folder" in refused(link, source)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    assert "exists: add --overwrite" in refused(link, source, overwrite=False)


def test_a_source_is_not_deleted(made):
    for source in (made, made / "train", made / ".." / made.name):
        assert "holds the --source" in refused(made, source)


def test_files_that_were_added_inside_are_found(made, tmp_path):
    asked = []

    def strangers(folder):
        asked.append(folder.name)
        return [folder / "b\n.png"] if folder.name == "train" else []

    said = refused(made, tmp_path / "source", strangers=strangers)
    assert "holds 'train/b\\\\n.png', which is not replaced" in said
    assert asked == ["train", "val.json"]
