"""Writer: adds to a collection of embeddings, resumed after any crash; see __init__.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError, InputTypeError, StoreError
from ..provenance import Provenance
from ..whole_file import SUFFIX
from .collection import FILE, Collection, journal_path, journals, reporting, stem
from .failures import Failures
from .ids import HASH, Ids, escape, hash_of, hashes
from .journal import Journal, Record, records
from .shards import shards_of

LOCK = "writer.lock"
ERRORS = "errors.jsonl"


class Writer:
    """Adds embeddings to a collection, which it creates where there is none.

    One at a time: others are refused, also in other processes, until it is closed or its process
    ends in whatever way. It is for one thread at a time. In memory it keeps 16 bytes an id.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        provenance: Provenance,
        kind: str,
        *,
        dtype: str = "float16",
        format: str = "parquet",
        shard_rows: int = 65536,
    ) -> None:
        """Open the collection and take up what an earlier Writer left, killed or not.

        provenance: of the embeddings.
        kind: "image" or "text".
        dtype: "float16" or "float32", of storage.
        format: "parquet" or "npy". These four must be those of the collection if it exists.
        shard_rows: rows of a shard; that many embeddings are written again when it is full.

        Raises ProvenanceError, InputError where the collection is of another kind, BackendError
        where Parquet is asked for without pyarrow, and StoreError where the folder is broken,
        belongs to something else, cannot be written, or has another writer.
        """
        if shard_rows < 1:
            raise InputError(f"shard_rows must be at least 1, not {shard_rows}")
        self._collection = Collection(provenance, kind, dtype, format)
        self.folder, self._shard_rows = Path(folder), shard_rows
        self._shards = shards_of(self.folder, self._collection)
        self._unusable: str | None = None
        self._lock = _locked(self.folder)
        try:
            with reporting(self.folder):
                self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        if (self.folder / FILE).exists():
            Collection.read(self.folder).check(self.folder, self._collection)
        else:
            _check_unused(self.folder)
            self._collection.write(self.folder)
        for name in ("part-*", FILE, ERRORS):
            for part in self.folder.glob(f".{name}.*{SUFFIX}"):  # of a Writer that was killed
                part.unlink()
        count = self._collection.shards(self.folder)
        self._ids, self._rows_in_shards = self._known_ids(count)
        for number in journals(self.folder):
            if number > count:
                raise StoreError(
                    f"{self.folder}: {stem(count)}.{self._collection.format} is missing"
                )
            if number < count:  # that shard was finished
                journal_path(self.folder, number).unlink()
        self._number, path, rows, end = count, journal_path(self.folder, count), 0, 0
        for record in self._records(path):
            self._ids.add(hashes(record.ids))
            rows, end = rows + len(record.ids), record.end
        self._failures = Failures(self.folder / ERRORS, self._ids)
        self._journal = Journal(path, rows, end)

    def _known_ids(self, shards: int) -> tuple[Ids, int]:
        rows = [self._shards.rows(number) for number in range(shards)]
        known, first = np.empty(sum(rows), HASH), 0
        for number in range(shards):
            for some in self._shards.ids(number):
                known[first : first + len(some)] = hashes(some)
                first += len(some)
        return Ids(known), len(known)

    def _records(self, path: Path) -> Iterator[Record]:
        return records(path, self._collection.stored, self._collection.dimension)

    def __enter__(self) -> Writer:
        """Itself; close() at the end of the block, also where that raises."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """close()."""
        self.close()

    def __len__(self) -> int:
        """Rows, also those that are in the journal only."""
        return self._rows_in_shards + self._journal.rows

    def __contains__(self, id: object) -> bool:
        """Whether that id is embedded."""
        return isinstance(id, str) and hash_of(escape(id)) in self._ids

    @property
    def dtype(self) -> str:
        """Of the stored embeddings."""
        return self._collection.dtype

    @property
    def failed(self) -> int:
        """How many are listed in errors.jsonl and not embedded since."""
        return len(self._failures)

    def append(self, ids: Sequence[str], paths: Sequence[str], embeddings: ArrayLike) -> None:
        """Add rows. They survive the end of the process, and of the power, once it returns.

        embeddings: floating-point numbers [n, D]; rounded to the dtype of the collection.

        Raises InputError, before anything is written, for an id that is there already or given
        twice, for lengths that differ, and for embeddings of another shape or dtype, or with values
        that are not finite or too large for float16; InputTypeError for ids or paths that are no
        str. Raises StoreError where it cannot be written: what was appended before is safe, and
        this Writer accepts nothing more; the next one knows what is there.
        """
        self._check_usable()
        written, rows = _escaped(ids, "ids"), self._rows(embeddings, len(ids))
        record = Record(written, _escaped(paths, "paths"), rows)
        if len(record.paths) != len(written):
            raise InputError(f"{len(written)} ids, but {len(record.paths)} paths")
        new = hashes(written)
        self._check_new(ids, new)
        first = 0
        while first < len(written):
            with self._writing():
                if self._journal.rows >= self._shard_rows:
                    self._finish_shard()
                last = first + self._shard_rows - self._journal.rows
                some = slice(first, last)
                self._journal.append(Record(record.ids[some], record.paths[some], rows[some]))
            self._ids.add(new[some])
            self._failures.embedded(new[some])
            first = last

    def _rows(self, embeddings: ArrayLike, count: int) -> NDArray[Any]:
        found = np.asarray(embeddings)
        expected = count, self._collection.dimension
        if found.dtype.kind != "f" or found.shape != expected:
            raise InputError(
                f"embeddings must be floating-point {list(expected)}, "
                f"not {found.dtype} {list(found.shape)}"
            )
        with np.errstate(over="ignore"):  # to infinity
            found = found.astype(self._collection.stored)
        if not np.isfinite(found).all():
            raise InputError(f"embeddings must be finite in {self._collection.dtype}")
        return found

    def _check_new(self, ids: Sequence[str], new: NDArray[np.bytes_]) -> None:
        known = self._ids.find(new)
        if known.any():
            raise InputError(f"the id {ids[int(known.argmax())]!r} is in {self.folder} already")
        if len(set(ids)) < len(ids):
            ((twice, _),) = Counter(ids).most_common(1)
            raise InputError(f"the id {twice!r} is given twice")

    def fail(self, id: str, path: str, reason: str) -> None:
        """List in errors.jsonl what could not be embedded; durable when it returns.

        An id that is listed already, or embedded, stays as it is. One that is embedded later is
        taken off the list by close(). Raises StoreError as append() does.
        """
        self._check_usable()
        if id not in self:
            with self._writing():
                self._failures.add(id, path, reason)

    def close(self) -> None:
        """Make a shard of the rows in the journal, and let others write. Raises StoreError.

        After an error it only lets others write: the next Writer has those rows.
        """
        try:
            if self._unusable is None:
                with self._writing():
                    self._finish_shard()
                    self._failures.close()
                    self._journal.remove()
        finally:
            self._unusable = self._unusable or "it is closed"
            self._journal.close()
            self._lock.release()

    def _finish_shard(self) -> None:
        if not self._journal.rows:
            return
        rows = self._journal.rows
        self._shards.write(self._number, rows, self._whole(self._journal.path, rows))
        self._journal.remove()
        self._journal = Journal(journal_path(self.folder, self._number + 1))
        self._number += 1
        self._rows_in_shards += rows

    def _whole(self, path: Path, rows: int) -> Iterator[Record]:
        for record in self._records(path):
            rows -= len(record.ids)
            yield record
        if rows:
            raise StoreError(f"{path}: {rows} rows that were written cannot be read")

    def _check_usable(self) -> None:
        if self._unusable:
            raise StoreError(f"{self.folder}: {self._unusable}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with reporting(self.folder):
                yield
        except BaseException as error:
            self._unusable = f"after an error nothing more can be added ({error!r})"
            raise


def _locked(folder: Path) -> Any:
    """Held by the system for this process. Raises StoreError."""
    from filelock import FileLock, Timeout

    with reporting(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise StoreError(f"{folder}: another process is writing to it") from error
        except NotImplementedError as error:  # a network's file system
            raise StoreError(f"{folder}: {error}") from error
    return lock


def _check_unused(folder: Path) -> None:
    """Raises StoreError for shards without a collection.json: there is no saying whose."""
    for pattern in ("part-*", ERRORS):
        for path in folder.glob(pattern):
            raise StoreError(f"{folder} has a {path.name} but no {FILE}: take another folder")


def _escaped(names: Sequence[str], what: str) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputTypeError(f"{what} must be a sequence of str, not {names!r:.80}")
    return [escape(name) for name in names]
