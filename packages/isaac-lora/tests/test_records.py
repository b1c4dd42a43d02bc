"""Reading conversation files: every alias of the format, and every fault with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
from isaac_texts import record, write_records

from isaac_lora.conversations.records import Turn, read_conversations
from lora_core.errors import DataError
from lora_core.testing import hostile


def read_one(tmp_path: Path, value: Any, **how: Any) -> Any:
    reading = read_conversations(write_records(tmp_path / "d.json", [value]), **how)
    reading.stop_if_wrong()
    assert not reading.bad, reading.bad
    return reading.records[0]


def problem_of(tmp_path: Path, value: Any) -> str:
    reading = read_conversations(write_records(tmp_path / "d.json", [value]))
    assert not reading.records
    [(_, text)] = reading.bad
    return text


def test_the_guides_example_is_read(tmp_path: Path) -> None:
    one = read_one(
        tmp_path,
        {
            "id": "example_1",
            "conversations": [
                {"from": "human", "value": "What's in this image? <image>"},
                {"from": "gpt", "value": "This image shows..."},
            ],
            "image": "path/to/image.jpg",
        },
    )
    assert one.key == "example_1"
    assert one.images == ("path/to/image.jpg",)
    assert one.turns[0] == Turn("user", "What's in this image? <image>")
    assert one.turns[1] == Turn("assistant", "This image shows...")


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("USER", "user"), ("Gpt", "assistant"), ("assistant", "assistant")],
)
def test_every_name_of_a_role_is_known_in_any_case(tmp_path: Path, name: str, role: str) -> None:
    turns = [{"from": name, "value": "a"}, {"from": "gpt", "value": "b"}]
    assert read_one(tmp_path, {"conversations": turns}).turns[0].role == role


def test_both_spellings_of_a_marker_take_images_in_order(tmp_path: Path) -> None:
    one = read_one(tmp_path, record("<IMAGE> or <image>?", images=["b.png", "a.png"]))
    assert one.turns[0].text == "<image> or <image>?"
    assert one.images == ("b.png", "a.png")


@pytest.mark.parametrize(
    "given", [{"image": ["a.png"]}, {"images": "a.png"}, {"images": ["a.png"]}]
)
def test_one_image_may_be_a_text_or_a_list_under_either_name(tmp_path: Path, given: dict) -> None:
    assert read_one(tmp_path, record("<image>", **given)).images == ("a.png",)


@pytest.mark.fault("D30")
def test_turns_may_come_in_any_order_while_one_is_an_answer(tmp_path: Path) -> None:
    names = ["gpt", "human", "human", "system", "gpt", "human"]
    turns = [{"from": name, "value": str(i)} for i, name in enumerate(names)]
    assert len(read_one(tmp_path, {"conversations": turns}).turns) == 6


def test_records_without_an_id_are_called_by_their_number(tmp_path: Path) -> None:
    reading = read_conversations(
        write_records(tmp_path / "d.json", [record(), record(id=1), record(id=0)])
    )
    assert [one.key for one in reading.records] == ["record 0", "1", "0"]


@pytest.mark.fault("D11")
@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_json_lines_are_read_with_empty_lines_and_byte_order_mark(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / "d.jsonl"
    lines = [json.dumps(record(id="a")), "", json.dumps(record("ü", id="b"), ensure_ascii=False)]
    path.write_bytes(b"\xef\xbb\xbf" + (ending or "\n").join(lines).encode() + ending.encode())
    reading = read_conversations(path)
    assert [one.key for one in reading.records] == ["a", "b"]


@pytest.mark.fault("D33")
def test_images_without_marker_are_an_error_or_go_first_if_asked(tmp_path: Path) -> None:
    value = record("What?", images=["a.png", "b.png"])
    assert "0 <image> markers in the turns, but 2 images" in problem_of(tmp_path, value)
    one = read_one(tmp_path, value, image_first=True)
    assert one.turns[0].text == "<image>\n<image>\nWhat?"


@pytest.mark.fault("D12", "D29", "D30", "D33")
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "expected an object, not an empty list"),
        ({}, "no conversations: expected a list of turns"),
        ({"conversation": [1]}, "did you mean 'conversation'"),
        ({"conversations": []}, "conversations is an empty list"),
        ({"conversations": "hi"}, "conversations is text"),
        ({"conversations": ["hi"]}, "conversations[0]: expected an object with from and value"),
        ({"conversations": [{}]}, "has no from and no value"),
        ({"conversations": [{"from": "bot", "value": ""}]}, "'bot': expected one of human, user"),
        ({"conversations": [{"from": "human", "value": None}]}, "value is null: expected text"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn"),
        (record(answer=" "), "an empty answer"),
        (record(answer="see <image>"), "an answer holds <image>"),
        (record("<image>"), "1 <image> marker in the turns, but 0 images"),
        (record("<image><image>", image="a.png"), "2 <image> markers in the turns, but 1 image"),
        (record("<Image>", image="a.png"), "write <Image> as <image>"),
        (record("<image>", img="a.png"), "did you mean 'img'"),
        (record("<image>", image=""), "image is empty"),
        (record("<image>", images=["a", 3]), "images[1] is 3"),
        (record("<image>", image="a", images=["a"]), "both image and images"),
        (record(id=[]), "id is []"),
        (record(id=True), "id is true"),
        (record(id=""), "id is ''"),
        (record("\ud800"), "half of a character"),
        (record(score=float("nan")), "score is nan"),
        (record(extra=json.loads("[" * 600 + "]" * 600)), "nested too deeply"),
    ],
)
def test_a_fault_is_said_with_file_record_and_field(tmp_path: Path, value: Any, said: str) -> None:
    text = problem_of(tmp_path, value)
    assert said in text
    assert f"{tmp_path}/d.json: record 0" in text


@pytest.mark.fault("D29")
def test_all_problems_of_all_records_are_listed_and_the_others_kept(tmp_path: Path) -> None:
    bad = {"id": "x", "conversations": [{"from": "bot", "value": 1}, {"value": "a"}], "image": 5}
    reading = read_conversations(write_records(tmp_path / "d.json", [bad, record(), {}]))
    assert [one.index for one in reading.records] == [1]
    assert [sample for sample, _ in reading.bad] == ["x", "record 2"]
    first = reading.bad[0][1]
    assert "record 0 ('x')" in first
    for part in ("conversations[0]: from is", "conversations[1]: has no from", "image is 5"):
        assert part in first


@pytest.mark.fault("D13")
def test_records_with_the_same_id_stop_the_run(tmp_path: Path) -> None:
    path = write_records(tmp_path / "d.json", [record(id="a"), record(id="a")])
    with pytest.raises(DataError, match="2 records have the id 'a'"):
        read_conversations(path).stop_if_wrong()


@pytest.mark.fault("D11")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "holds no conversations"),
        (b'"text"', "expected a list of records"),
        (b'{"a": 1,\n "b": }', "d.json:1:.*one whole record per line"),
        (b"null", "d.json: it holds null: expected a list of records"),
        (b"true", "it holds true: expected"),
        (b'{"a": 1}\n{"a": 1, "a": 2}', "d.json:2: the key 'a' stands twice"),
        (b"[{]", "d.json:1:3: not JSON"),
        (b"\x1f\x8b", "gzip"),
        ('[{"a": "ü"}]'.encode("latin-1"), "not UTF-8"),
        ('{"a": "ü"}'.encode("latin-1"), "d.json:1: not UTF-8"),
        (b'{"a": ' + b"9" * 9999 + b"}", "thousands of digits"),
        (b"", "not JSON"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_said_to_be_what_it_is(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_conversations(tmp_path / "d.json").stop_if_wrong()


@pytest.mark.fault("D11", "D12")
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"data": [record()], "version": 1}, "'data', 'version': .*if 'data' holds the records"),
        ({"a": 1, "b": 2}, "'a', 'b': expected a list of records"),
        ({"images": [], "annotations": []}, "prepare coco"),
        ({str(n): n for n in range(9)}, "'5', ...: expected"),
    ],
)
def test_one_object_in_place_of_a_list_is_called_so(
    tmp_path: Path, content: dict[str, Any], said: str, indent: int | None
) -> None:
    (tmp_path / "d.json").write_text(json.dumps(content, indent=indent))
    with pytest.raises(DataError, match=rf"^\S*d\.json: it holds one object, of .*{said}") as told:
        read_conversations(tmp_path / "d.json")
    assert "record 0" not in str(told.value)


def test_one_record_is_a_list_on_a_line_of_its_own_and_nearly_one_on_many(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(record(id="a")))
    assert [one.key for one in read_conversations(path).records] == ["a"]
    path.write_text(json.dumps(record(id="a"), indent=1))
    with pytest.raises(DataError, match=r"or one record per line; put \[ and \] around it"):
        read_conversations(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="holds an empty object: expected a list"):
        read_conversations(path)


@pytest.mark.fault("C03", "D11")
@pytest.mark.parametrize(
    ("second", "said"),
    [
        ('{"id": "b", "id": "c"}', ":3: record 1: the key 'id' stands twice"),
        ('{"conversations": [{"from": "human", "from": "gpt"}]}', ":3: record 1: the key 'from'"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_record(
    tmp_path: Path, second: str, said: str
) -> None:
    first = json.dumps(record('[1, 2], "}', id="a"))
    path = tmp_path / "d.json"
    path.write_bytes(f"\ufeff[{first},\r\n\r\n {second}, {first}]".encode())
    with pytest.raises(DataError) as told:
        read_conversations(path)
    assert f"{path}{said}" in str(told.value)
    path.write_text(f"{first}\n{second}\n")
    with pytest.raises(DataError, match=r"d\.json:2: the key"):
        read_conversations(path)
    path.write_text(f"[{first}, {second}, {{]")
    with pytest.raises(DataError, match=r"stands twice|not JSON"):
        read_conversations(path)


def test_values_are_called_as_json_has_them(tmp_path: Path) -> None:
    turn = {"from": None, "value": None}
    value = {"conversations": [turn, {"from": "human", "value": None}, None], "images": [None, 1]}
    said = problem_of(tmp_path, value)
    for part in ("from is null", "value is null", "not null", "images[0] is null", "[1] is 1"):
        assert part in said
    assert "None" not in said


def test_files_that_attack_the_reader_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nested too deeply"):
        read_conversations(hostile.json_nested(tmp_path / "deep.json"))
    with pytest.raises(DataError, match="not a regular file"):
        read_conversations(hostile.fifo(tmp_path / "pipe.json"))
    with pytest.raises(DataError, match="no such file"):
        read_conversations(tmp_path / "none.json")
