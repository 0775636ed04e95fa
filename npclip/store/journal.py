"""The journal of a shard that is not yet full: its rows, each append() durable when it returns.

part-00007.journal becomes shard 7; beside that shard it is stale. It is records, one an append():

    digest      16 bytes, blake2b of all that follows
    rows        uint32, little-endian, as all numbers
    length      uint32, of names in bytes
    names       JSON, UTF-8: [[id, ...], [path, ...]]
    embeddings  [rows, D] in the dtype of the collection

What a crash cut short, or anything else that does not match its digest, ends the journal.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from ..whole_file import sync_folder

DIGEST = 16
SIZES = struct.Struct("<II")


@dataclass(frozen=True)
class Record:
    """Rows of one append()."""

    ids: list[str]  # escaped, as paths
    paths: list[str]
    embeddings: NDArray[Any]  # [n, D]
    end: int = 0  # in the file, in bytes


def records(path: Path, dtype: np.dtype[Any], dimension: int) -> Iterator[Record]:
    """The whole ones; none where there is no file.

    Raises OSError, and StoreError for one that is whole and nothing that append() writes.
    """
    with suppress(FileNotFoundError), open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        while (record := _read(stream, size, dtype, dimension)) is not None:
            if not all(_are_names(n, len(record.embeddings)) for n in (record.ids, record.paths)):
                raise StoreError(f"{path}: broken, before byte {record.end}")
            yield record


def _are_names(names: Any, count: int) -> bool:
    try:
        "".join(names).encode()  # raises TypeError for what is no str, ValueError for surrogates
    except (TypeError, ValueError):
        return False
    return isinstance(names, list) and len(names) == count


def _read(stream: Any, size: int, dtype: np.dtype[Any], dimension: int) -> Record | None:
    digest, sizes = stream.read(DIGEST), stream.read(SIZES.size)
    if len(sizes) < SIZES.size:
        return None
    rows, length = SIZES.unpack(sizes)
    length_of_all = length + rows * dimension * dtype.itemsize
    if stream.tell() + length_of_all > size:
        return None
    content = stream.read(length_of_all)
    if _digest(sizes, content) != digest:
        return None
    try:
        ids, paths = json.loads(content[:length])
    except (ValueError, TypeError, RecursionError):
        ids = paths = None
    embeddings = np.frombuffer(content, dtype, offset=length).reshape(rows, dimension)
    return Record(ids, paths, embeddings, stream.tell())


def _digest(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()


class Journal:
    """One that is open for appending. Its methods raise OSError; after that it must be reopened."""

    def __init__(self, path: Path, rows: int = 0, end: int = 0) -> None:
        """Create it, or go on after the rows that end at byte end; what follows is cut off."""
        self.path, self.rows = path, rows
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115
        try:
            self._stream.truncate(end)
            self._sync()
            sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Durable when it returns."""
        names = json.dumps([record.ids, record.paths], ensure_ascii=False).encode()
        content = names + record.embeddings.tobytes()
        sizes = SIZES.pack(len(record.ids), len(names))
        rest = memoryview(_digest(sizes, content) + sizes + content)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._sync()
        self.rows += len(record.ids)

    def close(self) -> None:
        """Leave it to the next writer."""
        self._stream.close()

    def remove(self) -> None:
        """What it holds is elsewhere, or nothing."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _sync(self) -> None:
        os.fsync(self._stream.fileno())
