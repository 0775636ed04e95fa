"""What a source consists of: items, each with an id and a function that reads it.

read() is picklable, so that any process may call it, and raises errors of npclip alone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeAlias

from ..errors import ImageError, InputError, NpclipError

Kind: TypeAlias = Literal["image", "text"]
ERRORS: dict[Kind, type[NpclipError]] = {"image": ImageError, "text": InputError}

MAX_BYTES = 1 << 30  # of an image file, of a member, of a text: what is larger is an error
NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow names and cannot decode
SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
MAGIC = (  # how files of images begin
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"II+\0",  # BigTIFF
    b"MM\0+",
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"8BPS",
    b"qoif",
)


@dataclass(frozen=True)
class Item:
    """An image or a text of a source."""

    id: str  # the same in every run, and no other's
    path: str  # where it is: what sources.read_path() opens, if it is an image
    read: Callable[[], bytes | str]  # an encoded image, or a text; raises ImageError or InputError


@dataclass(frozen=True)
class Options:
    """What open_sources is asked for."""

    kind: Kind
    column: str | None = None
    id_column: str | None = None


def file_item(path: str, kind: Kind) -> Item:
    """The file as one item, be it readable or not."""
    return Item(file_id(path), path, functools.partial(read_file, path, kind))


def given_item(id: str, path: str, value: bytes | str) -> Item:
    """Of a value that has been read already."""
    return Item(id, path, functools.partial(_given, value))


def text_item(id: str, path: str, text: object) -> Item:
    """Of what was read where a text is expected; bytes that are no UTF-8 are surrogates in it."""
    if not isinstance(text, str):
        found = "nothing" if text is None else f"a {type(text).__name__}"
        return failed_item(id, path, "text", f"{found} instead of a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        return failed_item(id, path, "text", "not UTF-8")
    return given_item(id, path, text)


def failed_item(id: str, path: str, kind: Kind, reason: str) -> Item:
    """One whose read() raises."""
    return Item(id, path, functools.partial(_fail, kind, reason))


def _given(value: bytes | str) -> bytes | str:
    return value


def _fail(kind: Kind, reason: str) -> NoReturn:
    raise ERRORS[kind](reason)


def reason_of(error: Exception) -> str:
    """One line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def file_id(path: str) -> str:
    """The path with "/" between its parts, normalised where no ".." may lead through a link."""
    parts = path.replace(os.sep, "/").split("/")
    return (path if ".." in parts else os.path.normpath(path)).replace(os.sep, "/")


def read_file(path: str, kind: Kind = "image", start: int = 0, size: int | None = None) -> bytes:
    """A regular file, or size bytes of it.

    Raises ImageError, or InputError for the kind "text", saying why: it cannot be read, is empty,
    ends too early, has more than MAX_BYTES, or is a FIFO, a socket or a device, which are not
    opened.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            file.seek(start)
            all_of_it = min(os.fstat(file.fileno()).st_size, MAX_BYTES) + 1
            found = file.read(all_of_it if size is None else size)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ERRORS[kind](reason_of(error)) from error
    if size is not None and len(found) < size:
        raise ERRORS[kind](f"cut off: {len(found)} of {size} bytes")
    if len(found) > MAX_BYTES:
        raise ERRORS[kind](f"more than {MAX_BYTES} bytes")
    if not found:
        raise ERRORS[kind]("empty")
    return found


def check_regular(path: str) -> None:
    """Raises OSError for what is no regular file."""
    mode = stat.S_IFMT(os.stat(path).st_mode)
    if mode != stat.S_IFREG:
        raise OSError(f"{SPECIAL.get(mode, 'something')}, not a file")


@functools.cache
def image_extensions() -> frozenset[str]:
    """Of the formats that Pillow reads, in lower case, with the dot."""
    import PIL.Image

    PIL.Image.init()
    formats = PIL.Image.OPEN.keys() - NO_IMAGES
    return frozenset(e for e, name in PIL.Image.registered_extensions().items() if name in formats)


def has_image_name(name: str) -> bool:
    """Whether its extension is an image's."""
    return os.path.splitext(name)[1].lower() in image_extensions()


def begins_as_image(path: str) -> bool:
    """Whether it is a regular file that can be read and begins as one of an image."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            head = file.read(32)
    except (OSError, ValueError):
        return False
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_avif = head[4:12] in (b"ftypavif", b"ftypavis")
    is_bmp = head[:2] == b"BM" and head[6:10] == bytes(4)  # reserved: two letters alone are text
    return head.startswith(MAGIC) or is_webp or is_avif or is_bmp


class Unique:
    """Names that were taken once; the next of the same name becomes name#2, and so on."""

    def __init__(self) -> None:
        """None yet."""
        self._taken: set[bytes] = set()  # hashes: names may be long
        self._counts: dict[str, int] = {}  # of those that came twice

    def __call__(self, name: str) -> str:
        """The name, or the first of name#2, name#3 ... that is not taken."""
        found, count = name, self._counts.get(name, 1)
        while (key := _hash(found)) in self._taken:
            count += 1
            found = f"{name}#{count}"
        if found != name:
            self._counts[name] = count
        self._taken.add(key)
        return found


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
