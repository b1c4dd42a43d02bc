import os
import subprocess
import sys
import textwrap

import pytest

from lora_core import errors
from lora_core.errors import ConfigError, DataError, UserError, listing, near, printable, run


@pytest.mark.parametrize("kind", ["ConfigError", "DataError", "CheckpointError", "NumericError"])
def test_every_kind_is_a_user_error_and_a_value_error(kind):
    cls = getattr(errors, kind)
    assert issubclass(cls, UserError)
    assert issubclass(cls, ValueError)


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("lora_rnk", ["lora_rank", "lora_alpha", "steps"], "did you mean 'lora_rank'?"),
        ("LORA_RANK", ["lora_rank"], "did you mean 'lora_rank'?"),
        ("q_prj", ["q_proj", "k_proj", "fc1"], "did you mean 'q_proj'?"),
        ("proj", ["q_proj", "k_proj"], "did you mean 'q_proj' or 'k_proj'?"),
        ("zzz", ["lora_rank"], ""),
        (7, [7.5], ""),
    ],
)
def test_near_names_what_looks_alike_and_nothing_else(name, candidates, expected):
    assert sorted(near(name, candidates)) == sorted(expected)


def test_a_listing_shows_the_first_and_the_total():
    text = listing([f"problem {i}" for i in range(45)])
    assert text.splitlines()[19] == "problem 19"
    assert text.splitlines()[20:] == ["... and 25 more"]
    assert listing(["a", "b"]) == "a\nb"


def test_control_characters_of_a_file_name_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\rc") == "a\\x1b[2Jb\\rc"
    assert printable("zwei\nZeilen é😀") == "zwei\nZeilen é😀"


def test_a_user_error_is_its_message_without_traceback_and_status_2(capsys):
    def main(argv):
        raise DataError("images/17.jpg is cut off\nfetch it again")

    assert run(main, []) == 2
    assert capsys.readouterr().err == "error: images/17.jpg is cut off\nfetch it again\n"


def test_debug_keeps_the_traceback_and_is_not_passed_on(capsys):
    seen = []

    def main(argv):
        seen.extend(argv)
        raise ConfigError("no")

    assert run(main, ["--steps", "3", "--debug"]) == 2
    assert seen == ["--steps", "3"]
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, [])


@pytest.mark.parametrize(
    ("end", "status"),
    [(None, 0), (0, 0), (3, 3)],
)
def test_the_status_of_main_is_the_status_of_the_command(end, status):
    assert run(lambda argv: end, []) == status


def test_stops_have_the_status_of_their_kind(capsys):
    def stop(error):
        def main(argv):
            raise error

        return run(main, [])

    assert stop(KeyboardInterrupt()) == 130
    assert stop(SystemExit(0)) == 0
    assert stop(SystemExit(4)) == 4
    assert stop(SystemExit("message")) == 1


def test_a_reader_that_leaves_ends_the_command_quietly():
    code = (
        "import sys\nfrom lora_core.errors import run\n"
        "sys.exit(run(lambda argv: [print('x' * 80) for i in range(20000)] and 0, []))"
    )
    pipe, writer = os.pipe()
    os.close(pipe)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 0


@pytest.mark.parametrize("command", [True, False])
def test_the_end_of_a_command_does_not_wait_for_a_search_for_cycles(command):
    """With torch loaded that search takes a second, of the few that a batch system allows."""
    code = """
        import sys
        from lora_core.errors import run

        class Cycle:
            def __init__(self):
                self.own = self
            def __del__(self):
                print("searched")

        if sys.argv[1:] == ["command"]:
            run(lambda words: 0, [])
            run(lambda words: 0, [])
        Cycle()
    """
    words = ["command"] if command else []
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ("" if command else "searched\n")
    assert done.stderr == ""
