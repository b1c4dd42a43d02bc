"""Files that attack whoever reads them, and functions that do as a broken decoder does.

Every maker writes one file and returns its path; the files are small, what they announce is not.
"""

from __future__ import annotations

import io
import os
import signal
import struct
import time
import zlib
from pathlib import Path

# File names in annotations that lead out of the folder of the pictures.
ESCAPES = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b.png",
    "..\\..\\b.png",
    "C:\\x.png",
    "C:x.png",
    "\\\\server\\share\\x.png",
    "//server/share/x.png",
    "file:///etc/passwd",
    "http://localhost/x.png",
    "a\0b.png",
    "",
)
# Clears the screen, sets the window's title, forges a line of output.
CONTROL_NAME = "a\x1b[2J\x1b]0;owned\x07\r\nerror: all is well.png"
# Do something if they are ever formatted or expanded.
TEMPLATES = ("%s%n%d", "{0.__class__.__mro__}", "{}{}{x}", "$(touch owned)", "`id`", "<b>\u202e")


# -- what a decoder may do -------------------------------------------------------------------------


def crash(number: signal.Signals = signal.SIGSEGV) -> None:
    """End this process as a broken native decoder does."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    time.sleep(60)


def hang() -> None:
    """Take longer than anybody waits."""
    time.sleep(3600)


def eat_memory(size: int = 2**40) -> int:
    """Ask for `size` bytes, in pieces that are used."""
    pieces = []
    for _ in range(size // 2**24):
        pieces.append(b"\1" * 2**24)
    return len(pieces)


# -- PNG -------------------------------------------------------------------------------------------


def png(path: Path, width: int, height: int, *, data: bytes, extra: bytes = b"") -> Path:
    """A PNG of one bit per pixel: header, `extra` chunks, and `data` as it is."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG's chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(path: Path, side: int = 20_000) -> Path:
    """A valid black PNG of `side` x `side` pixels: 20,000 fit into 48 KB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    data = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    return png(path, side, side, data=data)


def png_that_claims(path: Path, width: int, height: int) -> Path:
    """A PNG whose header announces any size, up to 2^31 - 1, with nothing behind it."""
    return png(path, width, height, data=zlib.compress(b"\0\0"))


def png_text_bomb(path: Path, size: int = 2**23) -> Path:
    """A PNG of one pixel with a compressed text of `size` bytes."""
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(size), 9))
    return png(path, 1, 1, data=zlib.compress(b"\0\0"), extra=text)


def png_profile_bomb(path: Path, size: int = 2**23) -> Path:
    """A PNG of one pixel with a compressed colour profile of `size` bytes."""
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(size), 9))
    return png(path, 1, 1, data=zlib.compress(b"\0\0"), extra=profile)


# -- others ----------------------------------------------------------------------------------------


def tiff_pages(path: Path, pages: int = 100_000, loop: bool = False) -> Path:
    """A TIFF of so many pages of one pixel each; with `loop` the last leads to the first."""
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (278, 1), (279, 1)]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    first, length = 10, len(directory) + 4
    offsets = [first + length * (page + 1) for page in range(pages)]
    offsets[-1] = first if loop else 0
    body = b"".join(directory + struct.pack("<I", offset) for offset in offsets)
    path.write_bytes(b"II*\0" + struct.pack("<I", first) + b"\x7f\0" + body)
    return path


def gif_frames(path: Path, frames: int = 100_000, last: int = 1) -> Path:
    """A GIF of so many frames of one pixel each; the last one says it has `last` x `last`."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    pixels = b"\x02\x02\x44\x01\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + pixels
    end = b"," + struct.pack("<HHHHB", 0, 0, last, last, 0) + pixels
    path.write_bytes(head + frame * (frames - 1) + end + b";")
    return path


def jpeg_of_many_scans(path: Path, side: int = 1000, scans: int = 5000) -> Path:
    """A progressive JPEG whose last scan stands `scans` times: minutes of decoding, few bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (side, side), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    path.write_bytes(data[:last] + data[last:-2] * scans + data[-2:])
    return path


def jpeg_that_claims(path: Path, width: int, height: int) -> Path:
    """A JPEG whose header announces any size up to 65,535 a side."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (8, 8), 90).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    return path


def svg(path: Path) -> Path:
    """An SVG that contains itself, and an entity bomb."""
    path.write_text(
        '<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]>'
        '<svg xmlns="http://www.w3.org/2000/svg"><use href="#x" id="x"/><text>&b;</text></svg>'
    )
    return path


def eps(path: Path) -> Path:
    """PostScript, for which PIL would start Ghostscript."""
    path.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
        "(%pipe%touch owned) (w) file\nshowpage\n%%EOF\n"
    )
    return path


def fifo(path: Path) -> Path:
    """A named pipe that nobody writes to: reading it would wait for ever."""
    os.mkfifo(path)
    return path


# -- JSON ------------------------------------------------------------------------------------------


def json_nested(path: Path, depth: int = 100_000) -> Path:
    """Lists in lists."""
    path.write_text("[" * depth + "]" * depth)
    return path


def json_digits(path: Path, digits: int = 10**6) -> Path:
    """An integer of so many digits."""
    path.write_text('{"images": [], "annotations": [], "id": ' + "9" * digits + "}")
    return path


def huge(path: Path, size: int = 2**40) -> Path:
    """A file of so many zeros that takes no room (sparse)."""
    with path.open("wb") as file:
        file.truncate(size)
    return path
