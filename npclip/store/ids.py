"""Ids and paths as they are written, and sets of very many ids.

File names need not be UTF-8 (os.fsdecode makes lone surrogates of such bytes), Parquet's and JSON's
strings must be. So a surrogate is written as its six characters \\udXXX, in lower case, and the
backslash of what looks like that in a name as \\u005c. All other names are written as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

HASH = np.dtype("S16")  # compared as 16 bytes; a NumPy scalar of it lacks the zeros at its end
MERGE_AT = 1 << 16  # ids in a Python set, of about 100 bytes each

SPECIAL = re.compile(r"[\ud800-\udfff]|\\(?=u(?:d[89a-f][0-9a-f]{2}|005c))")
WRITTEN = re.compile(r"\\u(d[89a-f][0-9a-f]{2}|005c)")


def escape(name: str) -> str:
    """As it is written: a str that UTF-8 can encode."""
    if name.isascii() and "\\" not in name:
        return name
    return SPECIAL.sub(lambda found: f"\\u{ord(found[0]):04x}", name)


def unescape(written: str) -> str:
    """The inverse of escape()."""
    if "\\" not in written:
        return written
    return WRITTEN.sub(lambda found: chr(int(found[1], 16)), written)


def hashes(written: Iterable[str]) -> NDArray[np.bytes_]:
    """HASH [n] of ids as escape() gives them. Two of 10^8 ids are equal at 1 to 10^22."""
    return np.frombuffer(b"".join(map(hash_of, written)), HASH)


def hash_of(written: str) -> bytes:
    """Of one: 16 bytes."""
    return blake2b(written.encode(), digest_size=16).digest()


class Ids:
    """A set of hashes, 16 bytes each (10^8 ids: 1.6 GB; twice that for a moment while merging)."""

    def __init__(self, known: NDArray[np.bytes_] | None = None) -> None:
        """known: HASH [n], which it keeps and sorts in place."""
        self._sorted: list[NDArray[np.bytes_]] = []  # each less than half as long as the one before
        self._new: set[bytes] = set()
        if known is not None and len(known):
            known.sort()
            self._sorted.append(known)

    def __len__(self) -> int:
        """How many."""
        return sum(map(len, self._sorted)) + len(self._new)

    def __contains__(self, hash: bytes) -> bool:
        """Of one: 16 bytes."""
        return hash in self._new or any(_has(known, hash) for known in self._sorted)

    def find(self, wanted: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Which of HASH [n] are in it: bool [n]."""
        found = np.array([hash in self._new for hash in each(wanted)], bool)
        for known in self._sorted:
            places = np.searchsorted(known, wanted)
            found |= known[np.minimum(places, len(known) - 1)] == wanted
        return found

    def add(self, more: NDArray[np.bytes_]) -> None:
        """HASH [n], none of which is in it."""
        self._new.update(each(more))
        if len(self._new) < MERGE_AT:
            return
        merged = np.frombuffer(b"".join(self._new), HASH)
        self._new = set()
        merged = np.sort(merged)
        while self._sorted and len(self._sorted[-1]) < 2 * len(merged):
            merged = np.concatenate([self._sorted.pop(), merged])
            merged.sort(kind="stable")  # timsort: linear, of two sorted runs
        self._sorted.append(merged)


def _has(known: NDArray[np.bytes_], hash: bytes) -> bool:
    place = known.searchsorted(hash)
    return bool(place < len(known) and known[place] == hash.rstrip(b"\0"))


def each(some: NDArray[np.bytes_]) -> list[bytes]:
    """The 16 bytes of each of HASH [n]."""
    every = some.tobytes()
    return [every[i : i + 16] for i in range(0, len(every), 16)]
