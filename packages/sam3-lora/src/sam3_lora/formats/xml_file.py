"""XML of a data set, which nobody vouches for: elements and text, nothing that can refer or grow.

A document type declaration is refused: entities, which multiply or read other files, need one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from lora_core.data_file import open_regular
from lora_core.errors import DataError, one_line

MAX_BYTES = 2**23  # of one picture's annotation
MAX_ELEMENTS = 200_000
MAX_DEPTH = 20


@dataclass(slots=True)
class Element:
    """An element with its text and the elements in it; attributes are passed over."""

    name: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, name: str) -> list[Element]:
        """The elements of that name directly in this one."""
        return [child for child in self.children if child.name == name]

    def one(self, name: str) -> Element | None:
        """The element of that name directly in this one; None without it.

        Raises:
            DataError: it stands more than once.
        """
        found = self.all(name)
        if len(found) > 1:
            raise DataError(f"<{self.name}> holds {len(found)} times <{name}>, expected one")
        return found[0] if found else None

    def word(self, name: str) -> str:
        """The text of the element of that name directly in this one; "" without it.

        Raises:
            DataError: it stands more than once.
        """
        found = self.one(name)
        return found.text.strip() if found else ""


def read_xml(path: Path) -> Element:
    """The root element of an XML file.

    Raises:
        DataError: no such file, too large, nested too deeply, a document type, or no XML; with
            line and column.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise DataError(f"{one_line(path)}: more than {MAX_BYTES >> 20} MB of XML")
            data = file.read()
    except OSError as error:
        raise DataError(f"{one_line(path)}: cannot be read: {error.strerror}") from None
    return _parse(data, one_line(path))


def _parse(data: bytes, name: str) -> Element:
    top = Element("", 0)
    open_elements = [top]
    count = 0
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def begin(tag: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(open_elements) > MAX_DEPTH or count > MAX_ELEMENTS:
            what = "nested too deeply" if count <= MAX_ELEMENTS else "too many elements"
            raise DataError(f"{name}:{parser.CurrentLineNumber}: {what}")
        element = Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def text(words: str) -> None:
        open_elements[-1].text += words

    def refuse(*declaration: object) -> None:
        raise DataError(
            f"{name}:{parser.CurrentLineNumber}: a document type (<!DOCTYPE ...>), which is not "
            "read: annotations need none, remove it"
        )

    parser.StartElementHandler = begin
    parser.EndElementHandler = lambda tag: open_elements.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except DataError:  # a ValueError too
        raise
    except expat.ExpatError as error:
        place = f"{name}:{error.lineno}:{error.offset + 1}"
        raise DataError(f"{place}: not XML: {expat.errors.messages[error.code]}") from None
    except (LookupError, ValueError) as error:  # an encoding that Python or expat does not know
        raise DataError(
            f"{name}: its encoding cannot be read ({error}): save it as UTF-8"
        ) from None
    return top.children[0]
