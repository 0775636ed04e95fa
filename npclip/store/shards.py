"""The two formats of a shard: Parquet, and .npy with the ids beside it."""

from __future__ import annotations

import json
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, NpclipError, StoreError
from ..whole_file import replacing
from .collection import Collection, reporting, stem
from .journal import Record

Names: TypeAlias = "tuple[str, str]"  # id and path, escaped

GROUP = 1024  # rows of a row group: memory of a shard that is written, 30 MiB; 8192 take 110
NAMES = 65536  # ids in memory at a time
BROKEN: tuple[type[Exception], ...] = (
    *(ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError),
    *(SyntaxError, tokenize.TokenError),  # of .npy headers, which are Python literals
)
METADATA = b"npclip"  # key of the schema's metadata


class Npy:
    """part-00000.npy and part-00000.ids.jsonl. The shard exists where the .npy file does."""

    def __init__(self, folder: Path, collection: Collection) -> None:
        """Reads nothing."""
        self._folder, self._collection = folder, collection

    def rows(self, number: int) -> int:
        """How many the shard has. Raises StoreError where its array is not whole, or another."""
        return len(self._open(number))

    def _open(self, number: int) -> NDArray[Any]:
        path, collection = self._path(number), self._collection
        with _reading(path):
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if found.dtype != collection.stored or found.shape[1:] != (collection.dimension,):
                raise ValueError(f"{found.dtype} {list(found.shape)}")
            return found

    def blocks(self, number: int, max_rows: int) -> Iterator[NDArray[Any]]:
        """[n, D], memory-mapped."""
        array = np.asarray(self._open(number))
        for first in range(0, len(array), max_rows):
            yield array[first : first + max_rows]

    def ids(self, number: int) -> Iterator[list[str]]:
        """All of the shard, some at a time."""
        lines = self._lines(number)
        while some := list(islice(lines, NAMES)):
            yield [id for id, _ in self._names(number, some)]

    def names(self, number: int, wanted: NDArray[np.int64]) -> list[Names]:
        """Of the rows of the shard, in ascending order."""
        lines = dict.fromkeys(wanted.tolist(), b"")
        for row, line in enumerate(self._lines(number)):
            if row in lines:
                lines[row] = line
        return self._names(number, [lines[row] for row in wanted.tolist()])

    def _lines(self, number: int) -> Iterator[bytes]:
        path, rows, count = self._ids(number), self.rows(number), 0
        with _reading(path), open(path, "rb") as stream:
            for count, line in enumerate(stream, 1):
                if count > rows:
                    break
                yield line
        if count != rows:
            raise StoreError(f"{path}: not a line for each of {rows} embeddings")

    def _names(self, number: int, lines: list[bytes]) -> list[Names]:
        with _reading(self._ids(number)):
            found = [(each["id"], each["path"]) for each in map(json.loads, lines)]
            "".join(name for names in found for name in names).encode()  # or they are no UTF-8
            return found

    def write(self, number: int, rows: int, records: Iterable[Record]) -> None:
        """The ids first. Raises OSError."""
        header = {
            "descr": self._collection.stored.str,
            "fortran_order": False,
            "shape": (rows, self._collection.dimension),
        }
        ids, array = self._ids(number), self._path(number)
        with replacing(array, sync=True) as numbers, replacing(ids, sync=True) as names:
            np.lib.format.write_array_header_1_0(numbers, header)
            for record in records:
                numbers.write(record.embeddings.tobytes())
                for id, path in zip(record.ids, record.paths, strict=True):
                    line = json.dumps({"id": id, "path": path}, ensure_ascii=False)
                    names.write(line.encode() + b"\n")

    def _path(self, number: int) -> Path:
        return self._folder / f"{stem(number)}.npy"

    def _ids(self, number: int) -> Path:
        return self._folder / f"{stem(number)}.ids.jsonl"


class Parquet:
    """part-00000.parquet."""

    def __init__(self, folder: Path, collection: Collection) -> None:
        """Reads nothing. Raises BackendError where there is no pyarrow."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise BackendError(
                f'Parquet needs pyarrow: pip install "npclip[parquet]" ({error}); '
                'format "npy" needs nothing'
            ) from error
        self._folder, self._collection = folder, collection
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        numbers = pyarrow.float16() if collection.dtype == "float16" else pyarrow.float32()
        # Nothing is ever null: without that the embeddings are read in half the time.
        element = pyarrow.field("element", numbers, nullable=False)
        self._embedding = pyarrow.list_(element, collection.dimension)
        self._schema = pyarrow.schema(
            [
                pyarrow.field("id", pyarrow.string(), nullable=False),
                pyarrow.field("path", pyarrow.string(), nullable=False),
                pyarrow.field("embedding", self._embedding, nullable=False),
            ],
            {METADATA: collection.as_json().encode()},
        )

    def rows(self, number: int) -> int:
        """How many the shard has. Raises StoreError where it is broken, or made otherwise.

        Raises ProvenanceError where another model made it.
        """
        with self._open(number) as file:
            if (rows := file.metadata.num_rows) < 0:
                raise ValueError(f"{rows} rows")
            return rows

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        path, arrow = self._path(number), self._arrow
        with _reading(path, (*BROKEN, arrow.ArrowException)):
            file = self._parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
            with file:
                self._check(path, file.schema_arrow)
                yield file

    def _check(self, path: Path, schema: Any) -> None:
        for field in self._schema:
            found = schema.field(field.name) if field.name in schema.names else None
            if found is None or not found.type.equals(field.type) or found.nullable:
                raise ValueError(f"no column {field}")
        text = (schema.metadata or {}).get(METADATA, b"null")
        theirs, mine = Collection.from_json(text, path), self._collection
        mine.provenance.check(theirs.provenance, str(path))
        if theirs.kind != mine.kind:
            raise ValueError(f"kind {theirs.kind}")

    def blocks(self, number: int, max_rows: int) -> Iterator[NDArray[Any]]:
        """[n, D], a row group in memory at a time."""
        for batch in self._batches(number, ["embedding"], max_rows):
            flat = batch.column(0).flatten().to_numpy(zero_copy_only=True)
            yield flat.reshape(-1, self._collection.dimension)

    def ids(self, number: int) -> Iterator[list[str]]:
        """All of the shard, some at a time."""
        for batch in self._batches(number, ["id"], NAMES):
            yield batch.column(0).to_pylist()

    def _batches(self, number: int, columns: list[str], size: int) -> Iterator[Any]:
        with self._open(number) as file:
            left = file.metadata.num_rows
            for batch in file.iter_batches(size, columns=columns, use_threads=False):
                if (left := left - len(batch)) < 0:
                    break
                yield batch
            if left:
                raise ValueError(f"not {file.metadata.num_rows} rows")

    def names(self, number: int, wanted: NDArray[np.int64]) -> list[Names]:
        """Of the rows of the shard, in ascending order."""
        found: list[Names] = []
        with self._open(number) as file:
            metadata = file.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            ends = np.cumsum(sizes)
            groups = np.searchsorted(ends, wanted, side="right")
            for group in np.unique(groups).tolist():
                table = file.read_row_group(group, columns=["id", "path"], use_threads=False)
                some = table.take(wanted[groups == group] - (ends[group] - sizes[group]))
                columns = (some.column(name).to_pylist() for name in ("id", "path"))
                found += zip(*columns, strict=True)
        return found

    def write(self, number: int, rows: int, records: Iterable[Record]) -> None:
        """Row groups of GROUP. Raises OSError."""
        compression = {"id": "zstd", "path": "zstd", "embedding.list.element": "none"}
        with (
            replacing(self._path(number), sync=True) as stream,
            self._parquet.ParquetWriter(
                stream,
                self._schema,
                compression=compression,
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            ) as writer,
        ):
            for some in _groups(records):
                writer.write_table(self._table(some), row_group_size=GROUP)

    def _table(self, some: Sequence[Record]) -> Any:
        """Made of buffers: arrow.array() would import pandas where it is installed."""
        arrow = self._arrow
        flat = np.concatenate([record.embeddings.ravel() for record in some])
        numbers = self._embedding.value_type
        values = arrow.Array.from_buffers(numbers, len(flat), [None, arrow.py_buffer(flat)])
        columns = [
            self._strings([id for record in some for id in record.ids]),
            self._strings([path for record in some for path in record.paths]),
            arrow.FixedSizeListArray.from_arrays(values, type=self._embedding),
        ]
        return arrow.Table.from_arrays(columns, schema=self._schema)

    def _strings(self, values: list[str]) -> Any:
        encoded = [value.encode() for value in values]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
        buffers = self._arrow.py_buffer(ends), self._arrow.py_buffer(b"".join(encoded))
        return self._arrow.StringArray.from_buffers(len(values), *buffers)

    def _path(self, number: int) -> Path:
        return self._folder / f"{stem(number)}.parquet"


def shards_of(folder: Path, collection: Collection) -> Npy | Parquet:
    """By the collection's format. Raises BackendError where pyarrow is needed and missing."""
    return (Npy if collection.format == "npy" else Parquet)(folder, collection)


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """So many that they have GROUP rows or a few more."""
    some: list[Record] = []
    rows = 0
    for record in records:
        some.append(record)
        rows += len(record.ids)
        if rows >= GROUP:
            yield some
            some, rows = [], 0
    if some:
        yield some


@contextmanager
def _reading(path: Path, broken: tuple[type[Exception], ...] = BROKEN) -> Iterator[None]:
    """What a broken file raises, as StoreError."""
    try:
        with reporting(path):
            yield
    except broken as error:
        if isinstance(error, NpclipError):
            raise
        raise StoreError(f"{path}: broken, or not of this collection: {error}") from error
