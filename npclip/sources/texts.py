"""Texts in files: .txt, a text a line; .jsonl; .csv and .tsv with a header.

An id is the file and the number of the line, from 1, at which the text begins, or what the column
id_column says. Lines are split at line feeds alone, a carriage return before one is dropped, and
so is a byte order mark. What is not UTF-8 is an item that fails, line by line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TypeAlias

from ..errors import InputError
from .items import (
    Item,
    Options,
    check_regular,
    failed_item,
    file_id,
    reason_of,
    text_item,
)

MAX_LINE = 16 << 20  # bytes; a text has some hundreds
BOM = b"\xef\xbb\xbf"
TEXT_NAMES = "text", "caption", "txt"  # of columns


def pieces(stream: IO[bytes], separator: bytes | None = b"\n") -> Iterator[tuple[bytes, bool]]:
    """What lies between separators, as it arrives, and whether it is whole (up to MAX_LINE).

    separator: None: NUL if one is among the first bytes, as `find -print0` writes, else b"\\n".
    """
    chunk = _read(stream).removeprefix(BOM)
    if separator is None:
        separator = b"\0" if b"\0" in chunk else b"\n"
    rest, is_whole = b"", True
    while chunk:
        *found, rest = (rest + chunk).split(separator)
        for piece in found:
            yield piece[:MAX_LINE], is_whole and len(piece) <= MAX_LINE
            is_whole = True
        if len(rest) > MAX_LINE or not is_whole:
            rest, is_whole = rest[:1], False
        chunk = _read(stream)
    if rest:
        yield rest, is_whole


def _read(stream: IO[bytes]) -> bytes:
    read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
    return read(1 << 16)


def line_items(
    stream: IO[bytes], where: str, separator: bytes | None = b"\n", with_hash: bool = False
) -> Iterator[Item]:
    """A text a line; blank ones are skipped.

    with_hash: of the text in its id, for a stream that has other lines the next time.
    """
    for path, line, is_whole in numbered_lines(stream, where, separator):
        hashed = f"::{text_hash(line)}" if with_hash else ""
        if not is_whole:
            yield failed_item(path, path, "text", f"a line of more than {MAX_LINE} bytes")
        elif line.strip():
            yield text_item(path + hashed, path, line)


def text_hash(text: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def numbered_lines(
    stream: IO[bytes], where: str, separator: bytes | None = b"\n"
) -> Iterator[tuple[str, str, bool]]:
    """(where::number, line, whether it is whole); bytes that are no UTF-8 are surrogates in it."""
    for number, (piece, is_whole) in enumerate(pieces(stream, separator), 1):
        line = piece.decode("utf-8", "surrogateescape")
        yield f"{where}::{number}", line.removesuffix("\r"), is_whole


def _json_items(stream: IO[bytes], where: str, options: Options) -> Iterator[Item]:
    """Strings, or objects with the column."""
    for path, line, is_whole in numbered_lines(stream, where):
        if not is_whole:
            yield failed_item(path, path, "text", f"a line of more than {MAX_LINE} bytes")
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield failed_item(path, path, "text", f"not JSON: {reason_of(error)}")
            continue
        id, column = path, options.column or "text"
        if isinstance(value, dict):
            id = row_id(value.get(options.id_column or ""), path)
            if column not in value:
                yield failed_item(id, path, "text", f"no {column!r} in the object")
                continue
            value = value[column]
        yield text_item(id, path, value)


def row_id(value: object, otherwise: str) -> str:
    """Of a row whose id_column has that value."""
    if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
        return str(value)
    return otherwise


Rows: TypeAlias = "Iterator[tuple[int, list[str] | str]]"


def csv_rows(stream: IO[bytes], delimiter: str) -> Rows:
    """(number of the line at which it begins, fields, or why there are none)."""
    reader = csv.reader(_csv_lines(stream), delimiter=delimiter)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, reason_of(error)
            continue
        if row:
            yield first, row


def _csv_lines(stream: IO[bytes]) -> Iterator[str]:
    for piece, is_whole in pieces(stream):
        if is_whole:
            yield piece.decode("utf-8", "surrogateescape") + "\n"
        else:
            yield "x" * (csv.field_size_limit() + 1)  # a row that fails, as long fields do


def _csv_items(stream: IO[bytes], where: str, options: Options, delimiter: str) -> Iterator[Item]:
    rows = csv_rows(stream, delimiter)
    column, id_column, width = _columns(rows, where, options)
    for number, row in rows:
        path = f"{where}::{number}"
        if isinstance(row, str):
            yield failed_item(path, path, "text", row)
            continue
        id = row_id(row[id_column] if id_column is not None and id_column < len(row) else "", path)
        if len(row) != width:
            yield failed_item(id, path, "text", f"{len(row)} fields instead of {width}")
        else:
            yield text_item(id, path, row[column])


def _columns(rows: Rows, where: str, options: Options) -> tuple[int, int | None, int]:
    """Which columns the text and the id are, and how many there are."""
    _, header = next(rows, (0, []))
    if isinstance(header, str):
        raise InputError(f"{where}: {header}")
    column = pick_column(header, TEXT_NAMES, options.column, where)
    id_column = options.id_column
    if id_column is not None:
        id_column = pick_column(header, (), id_column, where)
    return header.index(column), None if id_column is None else header.index(id_column), len(header)


def pick_column(
    columns: Sequence[str],
    usual: Iterable[str],
    wanted: str | None,
    where: str,
    option: str = "--column NAME",
) -> str:
    """The column wanted, or else the only one, or the only one with a usual name.

    Raises InputError, with the names of all, where there is none such.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise InputError(f"{where}: no column {wanted!r} among {_listed(columns)}")
    named = [name for name in columns if name.lower() in usual]
    for candidates in (named, columns):
        if len(candidates) == 1:
            return candidates[0]
    raise InputError(f"{where}: which of the columns {_listed(columns)}? Say {option}")


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns[:50]) or "none"


def is_text_file(path: str) -> bool:
    """Whether its extension is one of these formats'."""
    return _extension(path) in (".txt", ".jsonl", ".csv", ".tsv")


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def check_columns(path: str, options: Options) -> None:
    """Raises InputError where a table has no such columns; what cannot be read passes."""
    if (extension := _extension(path)) in (".csv", ".tsv"):
        try:
            check_regular(path)
            with open(path, "rb") as stream:
                _columns(csv_rows(stream, _delimiter(extension)), path, options)
        except OSError:
            return


def _delimiter(extension: str) -> str:
    return "\t" if extension == ".tsv" else ","


def text_items(path: str, options: Options) -> Iterator[Item]:
    """The texts of a file. What of it cannot be read is an item that fails."""
    where, extension = file_id(path), _extension(path)
    try:
        check_regular(path)
        with open(path, "rb") as stream:
            if extension == ".jsonl":
                yield from _json_items(stream, where, options)
            elif extension == ".txt":
                yield from line_items(stream, where)
            else:
                yield from _csv_items(stream, where, options, _delimiter(extension))
    except (OSError, ValueError) as error:  # InputError is a ValueError
        yield failed_item(where, path, "text", reason_of(error))
