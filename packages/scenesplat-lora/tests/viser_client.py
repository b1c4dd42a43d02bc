"""A browser without a window: speaks to a viser server as its web page does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

CAMERA = {
    "type": "ViewerCameraMessage",
    "wxyz": (1.0, 0.0, 0.0, 0.0),
    "position": (0.0, -3.0, 3.0),
    "fov": 1.0,
    "near": 0.01,
    "far": 100.0,
    "image_height": 480,
    "image_width": 640,
    "look_at": (0.0, 0.0, 0.0),
    "up_direction": (0.0, 0.0, 1.0),
}


class Client:
    """A connection, and all messages that came by it."""

    def __init__(self, url: str) -> None:
        import viser
        from websockets.sync.client import connect
        from websockets.typing import Subprotocol

        version = Subprotocol(f"viser-v{viser.__version__}")
        self.socket = connect(
            url.replace("http", "ws"), subprotocols=[version], max_size=None, compression=None
        )
        self.messages: list[dict[str, Any]] = []
        self.send(CAMERA)  # the server calls nobody back before it knows where a client looks

    def send(self, message: dict[str, Any]) -> None:
        """One message, as the page packs it."""
        import msgspec.msgpack

        self.socket.send(msgspec.msgpack.encode(message))

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], since: int = 0) -> dict[str, Any]:
        """The first message like this one after the first `since`; within half a minute."""
        deadline = time.monotonic() + 30
        while True:
            found = next((message for message in self.messages[since:] if wanted(message)), None)
            if found is not None:
                return found
            assert time.monotonic() < deadline, [message["type"] for message in self.messages]
            self.receive(deadline - time.monotonic())

    def receive(self, timeout: float) -> None:
        """The next bundle of messages; arrays become bytes."""
        import msgspec.msgpack
        import zstandard

        data = self.socket.recv(timeout=timeout)
        assert isinstance(data, bytes)
        packed = int.from_bytes(data[8:16], "little")
        text = zstandard.ZstdDecompressor().decompress(data[16 : 16 + packed])
        content = msgspec.msgpack.decode(text)
        place, arrays = 16 + packed, []
        for length in content["binaryBufferLengths"]:
            place += -place % 8
            arrays.append(data[place : place + length])
            place += length
        self.messages += [filled(message, arrays) for message in content["messages"]]

    def label(self, name: str) -> dict[str, Any]:
        """The part of the page with this label."""
        return self.wait_for(lambda message: (message.get("props") or {}).get("label") == name)

    def close(self) -> None:
        self.socket.close()


def filled(value: Any, arrays: list[bytes]) -> Any:
    """A message with its arrays in their places."""
    if isinstance(value, dict):
        if "__binary_index" in value:
            return arrays[value["__binary_index"]]
        return {key: filled(item, arrays) for key, item in value.items()}
    return [filled(item, arrays) for item in value] if isinstance(value, (list, tuple)) else value
