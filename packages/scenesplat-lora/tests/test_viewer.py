"""The viewer's page: it is served, and a query by the browser changes what is drawn."""

from __future__ import annotations

import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import siglip_folders
import tiny_network
import tiny_scenes
import use_fixtures as made
import viewer_scenes
from viser_client import Client

from lora_core.errors import CheckpointError, ConfigError, DataError, run
from scenesplat_lora import view
from scenesplat_lora.labelling import label_scene
from scenesplat_lora.language.siglip import open_text_tower
from scenesplat_lora.language.zero_shot import vote
from scenesplat_lora.picture import label_colours
from scenesplat_lora.scenes.files import read_scene
from scenesplat_lora.viewer import Viewer, check_address, legend_html
from scenesplat_lora.viewer_state import QUERY, Entry

needs_viser = pytest.mark.skipif(find_spec("viser") is None, reason="needs viser")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    made.write_rooms(tmp_path / "data", 1)
    words = [*made.write_model(tmp_path), *made.GRIDS, "--device", "cpu", "--port", "0"]
    return [*words, "--scene", str(tmp_path / "data" / "val" / "room0")]


@pytest.fixture(params=["gaussians", "points"])
def viewer(request: pytest.FixtureRequest) -> Iterator[Viewer]:
    found = Viewer(viewer_scenes.state(), "127.0.0.1", 0, points=request.param == "points")
    yield found
    found.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- the page --------------------------------------------------------------------------------------


@needs_viser
def test_the_page_is_served_and_a_query_changes_the_colours(viewer: Viewer) -> None:
    with urllib.request.urlopen(viewer.url, timeout=10) as answer:
        assert answer.status == 200
        assert b"<html" in answer.read().lower()
    client = Client(viewer.url)
    first = client.wait_for(lambda m: m.get("name") == "/scene")
    assert drawn(first["props"]) == expected(viewer, label_colours(viewer.state.prediction, 3))

    since = len(client.messages)
    client.send(
        {
            "type": "GuiUpdateMessage",
            "uuid": client.label("Words")["uuid"],
            "updates": {"value": "floor, lamp"},
        }
    )
    client.send({"type": "GuiFormSubmitMessage", "uuid": client.label("Query")["uuid"]})
    update = client.wait_for(lambda m: m["type"] == "SceneNodeUpdateMessage", since)
    assert viewer.shown.labels is not None
    assert set(viewer.shown.labels) == {0, 1}
    assert drawn(update["updates"]) == expected(viewer, label_colours(viewer.shown.labels, 2))
    legend = client.wait_for(lambda m: "lamp (" in str(m.get("updates")), since)
    assert "wall" not in str(legend)
    chosen = client.label("Show")["uuid"]
    told = client.wait_for(lambda m: m.get("uuid") == chosen and "updates" in m, since)
    assert told["updates"] == {"value": QUERY}

    since = len(client.messages)
    client.send({"type": "GuiUpdateMessage", "uuid": chosen, "updates": {"value": "colours"}})
    update = client.wait_for(lambda m: m["type"] == "SceneNodeUpdateMessage", since)
    assert drawn(update["updates"]) == expected(viewer, viewer.state.scene["color"])
    client.close()


def drawn(props: dict[str, bytes]) -> bytes:
    """The colours in what was sent: rgb, with opacity behind in the last word of a Gaussian."""
    if "colors" in props:
        return props["colors"]
    return np.frombuffer(props["buffer"], np.uint8).reshape(-1, 32)[:, 28:31].tobytes()


def expected(viewer: Viewer, colours: np.ndarray) -> bytes:
    assert len(colours) == len(viewer.state.scene["coord"])
    return colours.astype(np.uint8).tobytes()


@needs_viser
def test_a_query_that_cannot_be_answered_is_told_and_changes_nothing(viewer: Viewer) -> None:
    before = viewer.shown
    viewer.ask("<script>, florr")
    assert viewer.shown is before
    said = viewer.message.content
    assert "&lt;script&gt;" in said
    assert "did you mean" in said
    assert "--siglip" in said
    viewer.ask("lamp")
    assert viewer.shown.labels is None
    assert "likeness to" in viewer.message.content


@needs_viser
def test_it_stops_cleanly_and_the_port_is_free_again() -> None:
    port = free_port()
    for _ in range(2):
        found = Viewer(viewer_scenes.state(), "127.0.0.1", port)
        assert found.url == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"--port {port}"):
            check_address("127.0.0.1", port)
        found.stop()
    check_address("127.0.0.1", port)


@pytest.mark.fault("H31")
def test_only_this_machine_is_listened_to_unless_asked() -> None:
    assert view.Options(checkpoint="base.pth", scene="room0").host == "127.0.0.1"


@needs_viser
@pytest.mark.fault("H31")
def test_nobody_gets_a_public_address(viewer: Viewer) -> None:
    client = Client(viewer.url)
    client.send({"type": "ShareUrlRequest"})
    since = len(client.messages)
    viewer.ask("lamp")  # answered after it
    client.wait_for(lambda m: m["type"] == "SceneNodeUpdateMessage", since)
    assert not [m for m in client.messages if m["type"] == "ShareUrlUpdated"]
    theme = client.wait_for(lambda m: m["type"] == "ThemeConfigurationMessage")
    assert theme["show_share_button"] is False
    client.close()


def test_names_in_the_legend_are_text() -> None:
    page = legend_html([Entry("<b>&", (1, 2, 3), 1200)] * 45)
    assert "&lt;b&gt;&amp; (1,200)" in page
    assert "<b>" not in page
    assert page.count("rgb(1, 2, 3)") == 40
    assert "5 others" in page


# -- the command -----------------------------------------------------------------------------------


def test_labels_are_those_of_predict(flags: list[str], tmp_path: Path) -> None:
    options = view.parse(view.Options, flags, prog="view")
    source = view.find_scene(options)
    state = view.prepared(source, options)
    scene = read_scene(tmp_path / "data" / "val" / "room0")
    labels = vote(
        label_scene(made.model(), scene, made.texts(), options.labelling()), scene["coord"]
    )
    assert (state.prediction == labels).mean() > 0.99  # means of cosines, not of sigmoids
    assert state.choices() == ["prediction", "colours", "labels", "query"]
    few = view.parse(view.Options, [*flags, "--max_gaussians", "50"], prog="view")
    part = view.prepared(source, few)
    rows = [np.flatnonzero((scene["coord"] == row).all(1))[0] for row in part.scene["coord"]]
    assert len(rows) == 50
    assert np.array_equal(part.prediction, state.prediction[rows])
    query = "chair, lamp"
    assert np.array_equal(
        part.show("query", query).colours, state.show("query", query).colours[rows]
    )


def test_words_alone_need_no_classes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siglip_folders.write_folder(tmp_path / "narrow")
    monkeypatch.setitem(siglip_folders.TEXT, "hidden_size", 24)
    siglip_folders.write_folder(tmp_path / "wide")
    place = flags.index("--text")
    bare = [*flags[:place], *flags[place + 2 :]]
    options = view.parse(view.Options, [*bare, "--siglip", str(tmp_path / "wide")], prog="view")
    options.glance()
    state = view.prepared(view.find_scene(options), options)
    assert state.choices() == ["colours", "query"]
    tower = open_text_tower(tmp_path / "wide")
    assert state.features is not None
    expected = state.features.similarity(tower.embed(["this is a chair", "this is a lamp"]))
    shown = state.show("query", "chair, lamp")
    assert np.array_equal(shown.labels, expected.argmax(axis=1))
    narrow = view.parse(view.Options, [*flags, "--siglip", str(tmp_path / "narrow")], prog="view")
    with pytest.raises(CheckpointError, match="width 16, the model has features of width 24"):
        view.opened_tower(narrow)


def test_a_segmentation_model_shows_its_own_classes(flags: list[str], tmp_path: Path) -> None:
    base = tiny_scenes.write_base(tmp_path / "seg.pth", classes=3)
    (tmp_path / "seg.py").write_text(f"model = {{'backbone': {tiny_network.SETTINGS!r}}}\n")
    words = ["--checkpoint", str(base), "--network", str(tmp_path / "seg.py"), *flags[-6:]]
    options = view.parse(view.Options, [*words, *made.GRIDS], prog="view")
    state = view.prepared(view.find_scene(options), options)
    assert state.choices()[:2] == ["prediction", "colours"]
    assert "query" not in state.choices()
    assert state.names == ("class 0", "class 1", "class 2")
    assert set(state.prediction) <= {0, 1, 2}
    siglip = view.parse(view.Options, [*words, "--siglip", "x"], prog="view")
    with pytest.raises(ConfigError, match="segmentation model has no language features"):
        view.check_tower(siglip)


def test_without_viser_the_extra_is_named(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scenesplat_lora.viewer.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^the viewer needs viser.*pip install.*\[viewer\]'$"):
        view.main(flags)


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["--port", "70000"], ConfigError, "--port is 70000"),
        (["--host", "203.0.113.7"], ConfigError, "--host 203.0.113.7 --port 0: "),
        (["--siglip", "nowhere"], CheckpointError, "nowhere: no such folder"),
        (["--scene", "nowhere"], DataError, "nowhere.*does not exist"),
        (["--max_gaussians", "0"], ConfigError, "--max_gaussians"),
    ],
)
def test_what_cannot_work_is_told_before_weights_are_read(
    flags: list[str],
    more: list[str],
    kind: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scenesplat_lora.viewer.find_spec", lambda name: object())
    with pytest.raises(kind, match=message):
        view.ready(view.parse(view.Options, [*flags, *more], prog="view"))


def test_several_scenes_are_refused(flags: list[str], tmp_path: Path) -> None:
    made.write_rooms(tmp_path / "two", 2)
    options = view.parse(view.Options, [*flags, "--scene", str(tmp_path / "two")], prog="view")
    with pytest.raises(ConfigError, match="holds 2 scenes: room0, room1"):
        view.find_scene(options)


@needs_viser
def test_ctrl_c_ends_the_command(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, serves = free_port(), threading.Event()
    statuses: list[int] = []
    wait = Viewer.wait

    def visit() -> None:
        """Look at the page when it is served, then press Ctrl-C."""
        if not serves.wait(30):
            return
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as answer:
                statuses.append(answer.status)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Viewer, "wait", lambda viewer: (serves.set(), wait(viewer)))
    visitor = threading.Thread(target=visit, daemon=True)
    visitor.start()
    status = run(view.main, [*flags, "--port", str(port)])
    assert (statuses, status) == ([200], 130)
    said = capsys.readouterr()
    assert said.err.endswith("stopped by Ctrl-C\n")
    assert said.out.splitlines()[-1] == f"http://127.0.0.1:{port} shows room0; Ctrl-C ends it"
    check_address("127.0.0.1", port)  # free again
