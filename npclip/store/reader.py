"""Reader: the shards of a collection of embeddings, in bounded memory; see __init__.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..provenance import Provenance
from .collection import Collection, journal_path, reporting
from .ids import unescape
from .journal import records
from .shards import Npy, Parquet, shards_of


class Reader:
    """Reads the shards of a collection: those that are there when it is opened.

    It takes no lock: a Writer may be at work. The rows that this, or one that was killed, has in
    its journal are not read, see pending.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Of Parquet shards the footers are read, of .npy the headers.

        Raises StoreError where there is no collection or one is broken, ProvenanceError where
        another model made one of its shards, BackendError for Parquet without pyarrow.
        """
        self.folder = Path(folder)
        self._collection = Collection.read(self.folder)
        self._shards: Npy | Parquet = shards_of(self.folder, self._collection)
        count = self._collection.shards(self.folder)
        rows = [self._shards.rows(number) for number in range(count)]
        self._firsts = np.cumsum([0, *rows])

    @property
    def provenance(self) -> Provenance:
        """What the embeddings were made by."""
        return self._collection.provenance

    @property
    def kind(self) -> str:
        """Of what: "image" or "text"."""
        return self._collection.kind

    @property
    def dtype(self) -> str:
        """Of storage: "float16" or "float32"."""
        return self._collection.dtype

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self._collection.dimension

    @property
    def pending(self) -> int:
        """Rows in the journal, which are not read: of a Writer at work, or of one that was killed.

        The next Writer makes a shard of them, at the latest when it is closed.
        """
        path = journal_path(self.folder, len(self._firsts) - 1)
        with reporting(path):
            found = records(path, self._collection.stored, self.dimension)
            return sum(len(record.ids) for record in found)

    def __enter__(self) -> Reader:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing: no file is kept open between calls."""

    def __len__(self) -> int:
        """Rows of its shards."""
        return int(self._firsts[-1])

    def blocks(self, max_rows: int = 65536) -> Iterator[tuple[int, NDArray[Any]]]:
        """All rows in order: (number of the first, array [n, D] in the dtype), 1 <= n <= max_rows.

        Read-only. .npy shards are memory-mapped, of Parquet a block is in memory. Raises InputError
        for a max_rows below 1, StoreError where a shard is broken.
        """
        if max_rows < 1:
            raise InputError(f"max_rows must be at least 1, not {max_rows}")
        for number, first in enumerate(self._firsts[:-1].tolist()):
            for block in self._shards.blocks(number, max_rows):
                yield first, block
                first += len(block)

    def rows(self, numbers: Sequence[int] | NDArray[np.integer[Any]]) -> list[tuple[str, str]]:
        """(id, path) of rows, counted from 0, in the order given.

        Raises InputError for a number that is none, StoreError where a shard is broken.
        """
        wanted = np.asarray(numbers, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise InputError(f"rows must be within 0 and {len(self) - 1}")
        each, places = np.unique(wanted, return_inverse=True)
        shards = np.searchsorted(self._firsts, each, side="right") - 1
        found: list[tuple[str, str]] = []
        for number in np.unique(shards).tolist():
            of_shard = each[shards == number] - self._firsts[number]
            found += self._shards.names(number, of_shard)
        names = [(unescape(id), unescape(path)) for id, path in found]
        return [names[place] for place in places.tolist()]
