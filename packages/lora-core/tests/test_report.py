import csv
import io
import os
import sys

import numpy as np
import pytest

from lora_core import report
from lora_core.errors import ConfigError
from lora_core.report import Progress, RunLog, copied_to, duration, figure, say, table

COLUMNS = ["step", "epoch", "split", "loss", "iou", "seconds"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Give a function that turns stdout into a terminal, from within the test: pytest's own
    capture takes stdout back after the fixtures."""

    def open_terminal(columns=60, kind="xterm"):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", kind)
        return screen

    return open_terminal


@pytest.fixture
def rows(tmp_path):
    def read():
        with (tmp_path / "log.csv").open(newline="") as file:
            return list(csv.reader(file))

    return read


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.81234, "0.8123"),
        (0.0, "0.0000"),
        (-0.5, "-0.5000"),
        (12.345, "12.3"),
        (3e-5, "3.0e-05"),
        (1.5e6, "1.5e+06"),
        (1473152, "1,473,152"),
        (float("nan"), "nan"),
        ("text", "text"),
        (True, "True"),
    ],
)
def test_figures_are_short(value, text):
    assert figure(value) == text


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0, 42, 723, 11275)] == ["0:00", "0:42", "12:03", "3:07:55"]


def test_a_table_aligns_words_left_and_numbers_right():
    text = table(["layer", "r", "share"], [["a.b", 8, 0.5], ["c", 16, 12.0]])
    assert text.splitlines() == [
        "layer   r   share",
        "-----  --  ------",
        "a.b     8  0.5000",
        "c      16    12.0",
    ]
    assert table(["only", "header"], []).splitlines() == ["only  header", "----  ------"]


def test_wide_letters_and_marks_do_not_push_a_table_out_of_line():
    """東 takes two columns of a terminal; a mark above a letter, as macOS writes names, takes none.

    Where columns begin is counted in columns of the terminal, which are not letters.
    """
    lines = table(
        ["class", "train"], [["東京", 8], ["e\u0301te\u0301", 1234], ["rust", 7]]
    ).splitlines()
    assert lines[2:] == ["東京       8", "e\u0301te\u0301    1,234", "rust       7"]
    assert lines[0] == "class  train"


def test_only_the_first_rank_speaks_and_writes(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    say("twice")
    log = RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=True)
    log.write(1, "train", loss=1.0)
    log.picture("a", np.zeros((2, 2, 3), np.uint8), 1)
    log.rewind(0)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_closed_stdout_does_not_end_a_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    say("nobody reads this")
    say("nor this")
    progress = Progress(2)
    progress.report(1, loss=1.0)
    progress.close()


def test_a_terminal_without_the_letter_gets_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("façade")
    sys.stdout.flush()
    assert raw.getvalue() == b"fa?ade\n"


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with Progress(10) as progress:
        progress.update(1)
        progress.report(5, loss=0.25, lr=1e-5)
    out = capsys.readouterr().out
    assert out == "step 5/10  loss 0.2500  lr 1.0e-05  left 0:00\n"


def test_a_dumb_terminal_gets_plain_lines(terminal):
    screen = terminal(kind="dumb")
    with Progress(10) as progress:
        progress.report(5, loss=0.25)
    assert screen.getvalue() == "step 5/10  loss 0.2500  left 0:00\n"


def test_a_terminal_gets_a_bar_that_fits_and_lets_lines_pass(terminal):
    screen = terminal()
    with Progress(10) as progress:
        progress.report(5, loss=0.25)
        say("validation")
        progress.report(10, loss=0.125)
    say("end")
    screen = screen.getvalue()
    assert "\r\x1b[Kvalidation\n\r\x1b[K[" in screen  # the bar is wiped, and drawn again
    assert screen.endswith("\nend\n")
    assert report._bar is None
    drawn = [part.split("\n")[0] for part in screen.split("\r\x1b[K")]
    assert max(map(len, drawn)) <= 59
    assert "#####" in screen
    assert "10/10  loss 0.1250  left 0:00" in screen


def test_a_narrow_terminal_gets_the_numbers_without_the_bar(terminal):
    screen = terminal(columns=20)
    with Progress(1000) as progress:
        progress.report(500, loss=0.25)
    drawn = [part.split("\n")[0] for part in screen.getvalue().split("\r\x1b[K")]
    assert max(map(len, drawn)) <= 19
    assert "500/1000" in screen.getvalue()


def test_the_time_left_counts_from_the_resumed_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    progress = Progress(1000, start=900)
    assert progress._left() == "?"
    now[0] += 60
    progress.update(950)
    assert progress._left() == "1:00"


def test_rows_are_on_disk_at_once_and_numbers_are_plain(log, rows):
    log.write(0, "val", epoch=0.0, iou=0.5)
    assert rows() == [COLUMNS, ["0", "0", "val", "", "0.5", ""]]
    log.write(100, "train", epoch=1 / 3, loss=1e-7, iou=None, seconds=12.25, unknown=3)
    assert rows()[-1] == ["100", "0.33333333", "train", "1e-07", "", "12.25"]


def test_a_step_is_logged_once_per_split(log, rows):
    log.write(5, "train", loss=1.0)
    log.write(5, "train", loss=2.0)
    log.write(5, "val", iou=0.5)
    assert [row[:4] for row in rows()[1:]] == [["5", "", "train", "1"], ["5", "", "val", ""]]


def test_a_resumed_log_has_no_duplicate_and_no_gap(tmp_path, log, rows):
    for step in (5, 10, 15):
        log.write(step, "train", loss=step / 10)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("20,0.5,tr")  # cut off by a crash
    again = RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=False)
    again.rewind(10)
    again.write(10, "train", loss=9.0)
    again.write(15, "train", loss=9.0)
    assert [(row[0], row[3]) for row in rows()[1:]] == [("5", "0.5"), ("10", "1"), ("15", "9")]


def test_what_a_kill_left_beside_the_csv_goes_with_the_next_start(tmp_path, log, monkeypatch):
    log.write(5, "train", loss=1.0)
    monkeypatch.setattr(os, "replace", lambda *paths: None)  # killed before the new name
    log.rewind(5)
    monkeypatch.undo()
    (partial,) = tmp_path.glob(".log.csv.*")
    others = [tmp_path / name for name in (".log.csv.old", ".log.csv", ".other.csv.17")]
    for path in others:
        path.touch()
    before = (tmp_path / "log.csv").read_bytes()
    RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=False)
    assert not partial.exists()
    assert (tmp_path / "log.csv").read_bytes() == before
    assert all(path.exists() for path in others)


def test_a_csv_with_other_columns_is_not_mixed(tmp_path):
    (tmp_path / "log.csv").write_text("step,iou\n1,0.5\n")
    with pytest.raises(ConfigError, match=r"log\.csv has other columns \(step, iou\)"):
        RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=False)
    assert (tmp_path / "log.csv").read_text() == "step,iou\n1,0.5\n"


def test_tensorboard_gets_scalars_and_pictures_once_per_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=True)
    for step in (1, 2, 3):
        log.write(step, "train", loss=step / 8, note="text", nothing=None)
    log.picture("overlay", np.full((4, 6, 3), 200, np.uint8), 2)
    log.rewind(2)
    log.write(3, "train", loss=7.0)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 0.125),
        (2, 0.25),
        (3, 7.0),
    ]
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(p.step, p.width, p.height) for p in events.Images("overlay")] == [(2, 6, 4)]


def test_missing_tensorboard_is_one_line_and_the_csv_goes_on(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=True)
    log.write(1, "train", loss=1.0)
    assert capsys.readouterr().out.splitlines() == [
        "TensorBoard is not installed: pip install tensorboard. The CSV has all numbers."
    ]
    assert len(rows()) == 2
    RunLog(tmp_path / "tensorboard", tmp_path / "other.csv", COLUMNS, tensorboard=None).write(
        1, "train"
    )
    assert capsys.readouterr().out == ""


def test_what_is_said_goes_into_a_file_too_and_is_appended(tmp_path, capsys):
    path = tmp_path / "logs" / "training.log"
    for text in ("first", "second ü"):
        with copied_to(path):
            say(text)
    say("not copied")
    assert path.read_text(encoding="utf-8") == "first\nsecond ü\n"
    assert capsys.readouterr().out == "first\nsecond ü\nnot copied\n"


def test_a_log_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"cannot write .*training\.log"),
        copied_to(tmp_path / "file" / "training.log"),
    ):
        pass


@pytest.mark.fault("H32")
def test_what_is_said_cannot_steer_the_terminal(capsys):
    say("a\x1b[2Jb\x07\u202e ü\n| a table |")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\\u202e ü\n| a table |\n"
