"""Damage files as disks, downloads and mistakes do.

    @pytest.mark.parametrize("damage", corrupt.DAMAGE)
    def test_a_damaged_file_is_refused(path, damage):
        corrupt.DAMAGE[damage](path)

A flipped byte is another matter: where it changes nothing that is read, loading may succeed, and
then has to give what it gave before. `flips` makes many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 898083611\n" % (
    b"0" * 64
)
WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
TEXT = b"These are not the weights that you are looking for.\n" * 20


def _change(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """What replaces the content of a file by a function of it."""

    def apply(path: Path) -> None:
        path.write_bytes(content(path.read_bytes()))

    return apply


def _cut(eighths: int) -> Callable[[Path], None]:
    return _change(lambda data: data[: len(data) * eighths // 8])


def _become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# Name -> what damages the file at a path, in place. None leaves all that the file held.
DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"cut_after_{n}_of_8": _cut(n) for n in range(1, 8)},
    "last_byte_missing": _change(lambda data: data[:-1]),
    "empty": _change(lambda data: b""),
    "zeros": _change(lambda data: bytes(len(data))),
    "web_page": _change(lambda data: WEB_PAGE),
    "lfs_pointer": _change(lambda data: LFS_POINTER),
    "text": _change(lambda data: TEXT),
    "folder": _become_folder,
}


def flips(path: Path, count: int = 100, mask: int = 1) -> Iterator[int]:
    """Flip one byte of a file after the other, and give its position while it is flipped.

    Args:
        count: of positions, spread over the file from its first to its last byte.
        mask: the bits to flip.
    """
    data = path.read_bytes()
    for position in sorted({i * (len(data) - 1) // max(count - 1, 1) for i in range(count)}):
        changed = bytearray(data)
        changed[position] ^= mask
        path.write_bytes(changed)
        try:
            yield position
        finally:
            path.write_bytes(data)
