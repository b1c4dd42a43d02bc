"""What a file of `torch.save` holds, as far as it can be told without loading it.

torch would inflate compressed parts and make byte arrays of any length that a pickle asks for, so
that a small file could fill the memory; and it does not look at the checksums.
"""

from __future__ import annotations

import errno
import pickletools
import re
import zipfile
from contextlib import suppress
from typing import BinaryIO

PICKLE_LIMIT = 10_000_000  # bytes of a pickle that are searched for names
_BYTES = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")  # as the protocol of torch has it


def fault(file: BinaryIO, size: int, values: bool) -> str:
    """Why this cannot be what `torch.save` wrote; "" where it may be.

    Args:
        size: of the file, in bytes.
        values: True: compare the parts with their checksums, which reads the whole file.

    Raises:
        OSError: the file cannot be read, which says nothing about its content.
    """
    start = file.read(512)
    if start[257:262] == b"ustar":
        return "a tar archive, as torch wrote before 2017"
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        return "it does not begin as one"
    try:
        if start.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                wrong = _wrong_parts(archive.infolist(), size)
                wrong = wrong or (_damaged_part(archive) if values else "")
            if wrong:
                return wrong
        if _BYTES.search(_pickle(file)):
            return "it makes byte arrays, which could fill the memory; torch.save needs none"
    except (zipfile.BadZipFile, EOFError) as error:
        _raise_of_disk(error.__context__)  # zipfile hides it
        return "cut off, or damaged at its end"
    except NotImplementedError:  # patched or newer zip archives
        return "it needs what torch.save never uses of zip archives"
    except (ValueError, OSError) as error:  # names in no encoding; places before 0 or beyond 2^63
        _raise_of_disk(error)
        return "damaged where it lists its parts"
    return ""


def of_disk(error: BaseException | None) -> bool:
    """Whether an error is the system's (EIO, ESTALE, EACCES), not that of a damaged file.

    EINVAL is what seeking to a place before the file's start gives; no number, what Python's own
    file objects say.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def _raise_of_disk(error: BaseException | None) -> None:
    if error is not None and of_disk(error):
        raise error


def _wrong_parts(parts: list[zipfile.ZipInfo], size: int) -> str:
    names = [part.filename.partition("/")[2] for part in parts]
    if "data.pkl" not in names or len(set(names)) < len(names):
        return "a zip archive of something else"
    if "constants.pkl" in names:
        return "a TorchScript program, not a state dict"
    if any(part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1 for part in parts):
        return "compressed or encrypted, which torch.save never does"
    if sum(part.file_size for part in parts) > size:
        return "its parts claim more bytes than the file has"
    return ""


def _damaged_part(archive: zipfile.ZipFile) -> str:
    for part in archive.infolist():
        if not part.CRC:  # torch writes 0 where it was told not to compute checksums
            continue
        try:
            with archive.open(part) as content:
                while content.read(1 << 20):
                    pass
        except (zipfile.BadZipFile, EOFError):
            return f"the checksum of its part {part.filename[:80]} is wrong, or its header"
    return ""


def foreign(file: BinaryIO) -> list[str]:
    """Classes beyond torch's that a pickle names, found without running it."""
    found: list[str] = []
    words: list[str] = []
    with suppress(Exception):  # it ends where the damage begins
        for operation, value, _ in pickletools.genops(_pickle(file)):
            if operation.name in ("GLOBAL", "INST"):
                found.append(str(value).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                found.append(".".join(words[-2:]))
            elif isinstance(value, str):
                words.append(value)
    return [name for name in found if not name.startswith(("torch.", "collections.OrderedDict"))]


def _pickle(file: BinaryIO) -> bytes:
    """The pickle of what `torch.save` wrote; in its older format, several and the values behind."""
    file.seek(0)
    if file.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            name = next(n for n in names if n.partition("/")[2] == "data.pkl")
            with archive.open(name) as part:
                return part.read(PICKLE_LIMIT)
    file.seek(0)
    return file.read(PICKLE_LIMIT)
