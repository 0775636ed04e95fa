"""errors.jsonl: what could not be embedded, {"id", "path", "reason"} a line, each id once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from ..whole_file import replacing
from .ids import HASH, Ids, each, escape, hash_of


class Failures:
    """The open file. Its methods raise OSError; after that it must be opened again."""

    def __init__(self, path: Path, embedded: Ids) -> None:
        """Cut off a torn last line, and find which of the listed were embedded after all.

        Raises StoreError where a line before the last is none of ours.
        """
        self._path = path
        self._listed = Ids()
        self._embedded: set[bytes] = set()  # of the listed
        if path.exists():
            self._read(embedded)

    def _read(self, embedded: Ids) -> None:
        with open(self._path, "r+b") as stream:
            end, wrong, listed = 0, None, list[bytes]()
            for number, line in enumerate(stream, 1):
                if wrong:
                    raise StoreError(f"{self._path}, line {wrong}: not what npclip writes")
                if (one := _hash(line)) is None:
                    wrong = number
                    continue
                end += len(line)
                listed.append(one)
                if one in embedded:
                    self._embedded.add(one)
            self._listed = Ids(np.array(listed, HASH))
            if wrong:
                stream.truncate(end)
                os.fsync(stream.fileno())

    def __len__(self) -> int:
        """How many are listed and not embedded since."""
        return len(self._listed) - len(self._embedded)

    def add(self, id: str, path: str, reason: str) -> None:
        """Durable when it returns. An id that is listed already stays as it is."""
        if (one := hash_of(escape(id))) in self._listed:
            return
        line = {"id": escape(id), "path": escape(path), "reason": escape(reason)}
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with open(self._path, "ab", buffering=0) as stream:
            if stream.write(content) < len(content):
                raise OSError(f"{self._path}: only a part of a line could be written")
            os.fsync(stream.fileno())
        self._listed.add(np.array([one], HASH))

    def embedded(self, more: NDArray[np.bytes_]) -> None:
        """Ids, as HASH [n], that were embedded now."""
        if len(self._listed):
            found = more[self._listed.find(more)]
            self._embedded.update(each(found))

    def close(self) -> None:
        """Write the file anew without those that were embedded."""
        if not self._embedded:
            return
        with open(self._path, "rb") as old, replacing(self._path, sync=True) as new:
            for line in old:
                one = _hash(line)
                if one is not None and one not in self._embedded:
                    new.write(line)


def _hash(line: bytes) -> bytes | None:
    """Of a line's id; None of what is no whole line."""
    try:
        id = json.loads(line)["id"]
        return hash_of(id) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
