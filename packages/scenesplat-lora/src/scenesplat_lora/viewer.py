"""The window of `scenesplat-lora view`: a web page that viser serves (the extra `viewer`)."""

from __future__ import annotations

import contextlib
import html
import io
import socket
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from lora_core.errors import ConfigError, UserError
from scenesplat_lora.viewer_state import (
    QUERY,
    Entry,
    Shown,
    ViewerState,
    covariances,
)

MOST_NAMES = 40  # in the legend
POINT = 0.01  # metres, of a point


def check_viser() -> None:
    """Refuse to begin without viser.

    Raises:
        ConfigError: with the command that installs it.
    """
    if find_spec("viser") is None:
        raise ConfigError(
            "the viewer needs viser, which is not installed: pip install 'scenesplat-lora[viewer]'"
        )


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on: viser would take another one, or wait for ever.

    Raises:
        ConfigError: no such host here, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host {host} --port {port}: {reason}: choose another port (0: a free one), or "
            "127.0.0.1, which only this machine sees"
        ) from None


class Viewer:
    """A served scene. It answers from the moment it is made, until `stop`.

    Attributes:
        state: what can be shown. shown: what is.
    """

    def __init__(
        self, state: ViewerState, host: str, port: int, points: bool = False, title: str = ""
    ) -> None:
        viser: Any = import_module("viser")
        self.state = state
        self._points = points
        self._lock = threading.Lock()  # viser calls back from several threads
        with quiet():
            self.server = viser.ViserServer(host=host, port=port, label=title, verbose=False)
        try:
            self._refuse_sharing()
            self._place_camera()
            self.shown = state.show(state.choices()[0])
            self._build_page()
            self.splats = self._add_scene()
            self._tell(self.shown)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host = self.server.get_host()
        name = "localhost" if host in ("0.0.0.0", "::", "") else host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server.get_port()}"

    def stop(self) -> None:
        """Close all connections and free the port."""
        with quiet():
            self.server.stop()

    def wait(self) -> None:
        """Serve until a signal or Ctrl-C raises an exception here.

        In short sleeps: a lock could miss a signal that another thread was given, or be broken by
        it.
        """
        while True:
            time.sleep(0.2)

    # -- what the user does ------------------------------------------------------------------------

    def ask(self, query: str) -> None:
        """Answer a query: its heat map, or the nearest of several words."""
        self._update(QUERY, query)

    def choose(self, choice: str) -> None:
        """Show one of the state's choices."""
        self._update(choice, self.query.value)

    def _update(self, choice: str, query: str) -> None:
        with self._lock:
            try:
                shown = self.state.show(choice, query)
            except UserError as error:
                self.message.content = f"<p><b>{html.escape(str(error))}</b></p>"
                return
            self.shown = shown
            if self._points:
                self.splats.colors = shown.colours
            else:
                self.splats.rgbs = shown.colours
            self.choice.value = choice
            self._tell(shown)

    # -- the page ----------------------------------------------------------------------------------

    def _build_page(self) -> None:
        gui = self.server.gui
        choices = self.state.choices()
        self.choice: Any = gui.add_dropdown("Show", choices, initial_value=choices[0])
        form = gui.add_form("Query", visible=QUERY in choices)
        with form:
            self.query: Any = gui.add_text(
                "Words", "", hint="One word: where it is. Several, with commas: which is nearest."
            )
            button = gui.add_button("Ask")
        self.message: Any = gui.add_html("")
        self.legend: Any = gui.add_html("")

        @self.choice.on_update
        def _(event: Any) -> None:
            if event.client is not None:  # not when `_update` sets it
                self.choose(self.choice.value)

        @form.on_submit
        def _(event: Any) -> None:
            self.ask(self.query.value)

        @button.on_click
        def _(event: Any) -> None:
            self.ask(self.query.value)

    def _tell(self, shown: Shown) -> None:
        self.message.content = f"<p>{html.escape(shown.caption)}</p>"
        self.legend.content = legend_html(shown.legend)

    def _add_scene(self) -> Any:
        scene = self.state.scene
        if self._points:
            return self.server.scene.add_point_cloud(
                "/scene", scene["coord"], self.shown.colours, point_size=POINT, precision="float32"
            )
        return self.server.scene.add_gaussian_splats(
            "/scene",
            scene["coord"],
            covariances(scene),
            self.shown.colours,
            scene["opacity"].reshape(-1, 1),
        )

    def _place_camera(self) -> None:
        """To the south of the scene and above it, looking at its middle; z is up."""
        low, high = np.percentile(self.state.scene["coord"].astype(np.float64), (2, 98), axis=0)
        middle, size = (low + high) / 2, max(float(np.linalg.norm(high - low)), 0.1)
        camera = self.server.initial_camera
        camera.position = middle + size * np.array([0.0, -0.7, 0.7])
        camera.look_at = middle
        camera.up = (0.0, 0.0, 1.0)

    def _refuse_sharing(self) -> None:
        """No public address by a server of viser's authors: nobody asked for that.

        Without the button any web page that is open beside it could still ask for one.
        """
        self.server.gui.configure_theme(show_share_button=False)
        self.server.request_share_url = lambda verbose=True: None


def legend_html(legend: list[Entry]) -> str:
    """Names beside their colours; names come from files and are escaped."""
    square = "display:inline-block;width:0.9em;height:0.9em;margin-right:0.5em;background:"
    lines = [
        f'<div><span style="{square}rgb{entry.colour}"></span>{html.escape(entry.name)} '
        f"({entry.rows:,})</div>"
        for entry in legend[:MOST_NAMES]
    ]
    if len(legend) > MOST_NAMES:
        lines.append(f"<div>... and {len(legend) - MOST_NAMES} others</div>")
    return "".join(lines)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the box that viser prints when it starts, and its line when it stops."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
