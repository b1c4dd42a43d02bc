"""Messages as transformers' users write them, as turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isaac_lora.conversations.records import IMAGE, ROLES, Turn
from lora_core.errors import DataError
from lora_core.settings.types import shown

Message = Mapping[str, Any]


def turns_of(messages: Sequence[Message], vision_token: str) -> tuple[list[Turn], list[Any]]:
    """Turns, and for each picture in them what stands in its message, or None.

    Raises:
        DataError: no messages, or one of another form.
    """
    if not messages:
        raise DataError("a conversation of no messages")
    turns, pictures = list[Turn](), list[Any]()
    for number, message in enumerate(messages):
        place = f"message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{place}: expected {{'role': ..., 'content': ...}}")
        role = ROLES.get(str(message["role"]).lower())
        if role is None:
            raise DataError(
                f"{place}: role is {shown(message['role'])}: expected user, assistant or system"
            )
        content = message["content"]
        if role == "assistant" and isinstance(content, str):
            text, inside = content, list[Any]()  # what looks like a marker is text there
        else:
            text, inside = _content(content, vision_token, place)
        if inside and role == "assistant":
            raise DataError(f"{place}: a picture in an answer; pictures stand in user messages")
        turns.append(Turn(role, text))
        pictures += inside
    return turns, pictures


def _content(content: Any, vision_token: str, place: str) -> tuple[str, list[Any]]:
    """A message's text with `IMAGE` for each picture, and the pictures.

    Raises:
        DataError: neither text nor a list of items of text and pictures.
    """
    if isinstance(content, str):
        return _marked(content, vision_token)
    if not isinstance(content, list | tuple):
        raise DataError(f"{place}: content is {shown(content)}: expected text or a list of items")
    texts, pictures = list[str](), list[Any]()
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str):
            text, inside = _marked(item["text"], vision_token)
        elif kind == "image":
            picture = next((item[key] for key in ("image", "path", "url") if key in item), None)
            text, inside = IMAGE, [picture]
        else:
            raise DataError(
                f"{place}: an item {shown(item)}: expected {{'type': 'text', 'text': ...}} or "
                "{'type': 'image', 'image': ...}"
            )
        texts.append(text)
        pictures += inside
    return "".join(texts), pictures


def _marked(text: str, vision_token: str) -> tuple[str, list[Any]]:
    text = text.replace(vision_token, IMAGE)
    return text, [None] * text.count(IMAGE)
