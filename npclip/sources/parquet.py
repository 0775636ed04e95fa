"""Images (encoded, as bytes) and texts in the rows of Parquet files, by pyarrow.

An id is file::row, from 0, or what the column id_column says. Rows are read batch by batch, of the
columns needed alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, InputError
from .items import (
    MAX_BYTES,
    Item,
    Kind,
    Options,
    check_regular,
    failed_item,
    file_id,
    given_item,
    reason_of,
    text_item,
)
from .texts import TEXT_NAMES, pick_column, row_id

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGE_NAMES = (  # of columns
    *("image", "images", "img", "jpg", "jpeg", "png", "webp"),
    *("image_bytes", "image_data", "bytes", "content", "picture", "photo"),
)
USUAL = {"image": IMAGE_NAMES, "text": TEXT_NAMES}
BATCH_BYTES = 4 << 20  # of the rows that are read at a time
BATCH_ROWS = 1024


def is_parquet(path: str) -> bool:
    """Whether its extension is Parquet's."""
    return os.path.splitext(path)[1].lower() == ".parquet"


@contextmanager
def opened(path: str) -> Iterator[ParquetFile]:
    """Raises InputError where pyarrow is missing, anything for a file that is none."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError('Parquet needs pyarrow: pip install "npclip[parquet]"') from error
    check_regular(path)
    # Otherwise it reads whole column chunks, which may be gigabytes.
    with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        yield file


def column_of(file: ParquetFile, path: str, options: Options) -> str:
    """The column of images or texts. Raises InputError where that is not clear."""
    schema = file.schema_arrow
    fitting = [field.name for field in schema if fits(field.type, options.kind)]
    if options.column in schema.names and options.column not in fitting:
        found = schema.field(options.column).type
        raise InputError(
            f"{path}: the column {options.column!r} is of {found}, not {options.kind}s"
        )
    if not fitting:
        listed = ", ".join(schema.names[:50])
        raise NoColumnError(f"{path}: no column of {options.kind}s among {listed}: see --column")
    among = fitting if options.column is None else schema.names
    return pick_column(among, USUAL[options.kind], options.column, path)


class NoColumnError(InputError):
    """No column of a Parquet file could be one of images or texts."""


def fits(type: Any, kind: Kind) -> bool:
    """Whether a column of that type of pyarrow may have images, or texts."""
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    if kind == "text":
        return types.is_string(type) or types.is_large_string(type)
    if types.is_struct(type):  # Hugging Face's datasets.Image
        return any(field.name == "bytes" and fits(field.type, kind) for field in type)
    return types.is_binary(type) or types.is_large_binary(type)


def check_parquet(path: str, options: Options) -> None:
    """Raises InputError where pyarrow is missing or a file that can be read has no such columns."""
    try:
        with opened(path) as file:
            _columns(file, path, options)
    except InputError:
        raise
    except Exception:  # whatever pyarrow raises: parquet_items says it, too
        return


def _columns(file: ParquetFile, path: str, options: Options) -> tuple[str, str | None]:
    column = column_of(file, path, options)
    if options.id_column is not None:
        from pyarrow import types

        pick_column(file.schema_arrow.names, (), options.id_column, path)
        type = file.schema_arrow.field(options.id_column).type
        if not (types.is_integer(type) or fits(type, "text")):
            raise InputError(
                f"{path}: ids are strings or integers, {options.id_column!r} is {type}"
            )
    return column, options.id_column


def parquet_items(path: str, options: Options) -> Iterator[Item]:
    """The rows. What cannot be read is an item that fails, with the id of the file.

    Raises NoColumnError where a file has nothing that could be meant.
    """
    where, row = file_id(path), 0
    try:
        with opened(path) as file:
            column, id_column = _columns(file, path, options)
            at = path if options.column is None else f"{path}::{column}"
            for value, id in row_values(file, range(file.num_row_groups), column, id_column):
                yield _item(row_id(id, f"{where}::{row}"), f"{at}::{row}", value, options.kind)
                row += 1
    except NoColumnError:
        raise
    except Exception as error:  # pyarrow raises many types
        reason = f"unreadable after {row} rows: {reason_of(error)}" if row else reason_of(error)
        yield failed_item(where, path, options.kind, reason)


def row_values(
    file: ParquetFile, groups: range, column: str, id_column: str | None
) -> Iterator[tuple[Any, Any]]:
    """(value, id or None) of every row, in bounded memory."""
    sizes = [file.metadata.row_group(group) for group in groups]
    largest = max((size.total_byte_size / max(size.num_rows, 1) for size in sizes), default=1)
    rows = int(min(max(BATCH_BYTES // max(largest, 1), 1), BATCH_ROWS))
    columns = [column] if id_column in (None, column) else [column, str(id_column)]
    for batch in file.iter_batches(rows, row_groups=list(groups), columns=columns):
        values = batch.column(column)
        ids = None if id_column is None else batch.column(id_column)
        for i in range(batch.num_rows):
            yield _python(values[i]), None if ids is None else _python(ids[i])


def _python(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:  # Parquet's strings may be any bytes
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def _item(id: str, path: str, value: Any, kind: Kind) -> Item:
    if kind == "text":
        return text_item(id, path, value)
    if isinstance(value, dict):
        value = value["bytes"]
    if not value:
        return failed_item(id, path, kind, "no image in the row" if value is None else "empty")
    if len(value) > MAX_BYTES:
        return failed_item(id, path, kind, f"more than {MAX_BYTES} bytes")
    return given_item(id, path, value)


def read_row(path: str, column: str | None, row: int) -> bytes:
    """The image in a row, counted from 0. Raises ImageError, saying why not."""
    try:
        with opened(path) as file:
            name = column_of(file, path, Options("image", column))
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first <= row < first + count:
                    rows = row_values(file, range(group, group + 1), name, None)
                    values = (value for i, (value, _) in enumerate(rows, first) if i == row)
                    if (value := next(values, rows)) is rows:
                        raise ImageError(f"{path} has fewer rows than its footer says")
                    found = _item("", "", value, "image").read()
                    assert isinstance(found, bytes)
                    return found
                first += count
    except Exception as error:  # likewise
        raise ImageError(reason_of(error)) from error
    raise ImageError(f"{path} has {first} rows, no row {row}")
