"""Images and texts in tar files, as webdataset writes them; .tar.gz and .tgz, too.

A member's id is tar::name; the second of a name, tar::name#2. Of a damaged tar all members before
the damage are items, and the damage is one more, with the tar's own id, that fails.
"""

from __future__ import annotations

import functools
import gzip
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from ..errors import ImageError
from .items import (
    MAX_BYTES,
    Item,
    Kind,
    Unique,
    check_regular,
    failed_item,
    file_id,
    given_item,
    has_image_name,
    read_file,
    reason_of,
    text_item,
)

NAMES = ".tar", ".tar.gz", ".tgz"
GZIP = b"\x1f\x8b"


class _Header(tarfile.TarInfo):
    """Of a member. tarfile takes a broken one for the end of the file: this raises."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


class Capped:
    """A file that never reads more than MAX_BYTES at once: headers, too, say their lengths."""

    def __init__(self, file: IO[bytes]) -> None:
        """Of an open one."""
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Raises tarfile.ReadError for more."""
        if not 0 <= size <= MAX_BYTES:
            raise tarfile.ReadError(f"{size} bytes at once")
        return self._file.read(size)


def is_tar(path: str) -> bool:
    """Whether its extension is one."""
    return path.lower().endswith(NAMES)


def tar_items(path: str, kind: Kind) -> Iterator[Item]:
    """The images (by extension) or the .txt members, in the order of the file.

    Members of an uncompressed tar are read when they are asked for, those of others at once.
    """
    where, count = file_id(path), 0
    try:
        check_regular(path)
        with open(path, "rb") as raw:
            compressed = is_compressed(raw)
            file: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
            for name, member in members(Capped(file)):
                count += 1
                if _is_wanted(member.name, kind):
                    at = f"{where}::{name}"
                    data = file if compressed else None
                    yield _item(at, f"{path}::{name}", path, member, data, kind)
    except Exception as error:  # tarfile, gzip and zlib fail in many ways on damaged files
        reason = f"damaged after {count} members: {reason_of(error)}" if count else reason_of(error)
        yield failed_item(where, path, kind, reason)


def members(file: Capped) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """(unique name, header) of every member that is not a folder."""
    unique, end = Unique(), -1
    with tarfile.TarFile(
        fileobj=file,  # type: ignore[arg-type]
        tarinfo=_Header,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
            if tar.offset <= end:
                raise tarfile.ReadError("a member with a negative size")
            end = tar.offset
            if not member.isdir():
                yield unique(member.name), member


def _is_wanted(name: str, kind: Kind) -> bool:
    base = name.rpartition("/")[2]
    if base.startswith("."):
        return False
    return has_image_name(base) if kind == "image" else base.lower().endswith(".txt")


def _item(
    id: str, at: str, path: str, member: tarfile.TarInfo, compressed: IO[bytes] | None, kind: Kind
) -> Item:
    if not member.isreg():
        found = f"a link to {member.linkname!r}" if member.linkname else "a device or a FIFO"
        return failed_item(id, at, kind, f"{found} in the tar, not a file")
    if member.issparse():
        return failed_item(id, at, kind, "a sparse file in the tar")
    if not 0 < member.size <= MAX_BYTES:
        return failed_item(id, at, kind, "empty" if not member.size else f"{member.size} bytes")
    if compressed is None:
        where = path, member.offset_data, member.size
        return Item(
            id, at, functools.partial(_read_text if kind == "text" else _read_image, *where)
        )
    data = compressed.read(member.size)
    if len(data) < member.size:
        return failed_item(id, at, kind, f"cut off: {len(data)} of {member.size} bytes")
    return given_item(id, at, data) if kind == "image" else text_item(id, at, _text(data))


def _read_image(path: str, start: int, size: int) -> bytes:
    return read_file(path, "image", start, size)


def _read_text(path: str, start: int, size: int) -> str:
    text = _text(read_file(path, "text", start, size))
    read = text_item("", "", text).read()
    return cast(str, read)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").rstrip("\r\n")


def is_compressed(raw: IO[bytes]) -> bool:
    """Whether it begins as gzip does."""
    found = raw.read(len(GZIP)) == GZIP
    raw.seek(0)
    return found


def read_member(path: str, name: str) -> bytes:
    """The image that tar_items calls name. Raises ImageError, saying why not."""
    try:
        check_regular(path)
        status = os.stat(path)
        found = _index(path, status.st_size, status.st_mtime_ns).get(name)
    except OSError as error:
        raise ImageError(reason_of(error)) from error
    if found:
        return _read_image(path, *found)
    for item in tar_items(path, "image"):
        if item.path == f"{path}::{name}":
            return cast(bytes, item.read())
    raise ImageError(f"no image {name!r} in {path}")


@functools.lru_cache(maxsize=1)
def _index(path: str, size: int, changed: int) -> dict[str, tuple[int, int]]:
    """(offset, size) by name, of an uncompressed tar: all thumbnails of a page read it once."""
    with open(path, "rb") as raw:
        if is_compressed(raw):
            return {}
    reads = ((item.path, item.read) for item in tar_items(path, "image"))
    return {
        at.removeprefix(f"{path}::"): read.args[1:]
        for at, read in reads
        if isinstance(read, functools.partial) and read.func is _read_image
    }
