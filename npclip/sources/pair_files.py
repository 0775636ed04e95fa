"""The pairs of one file: of a webdataset tar, a Parquet file, a table. See pairs.py."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import NoneType
from typing import Any, TypeAlias

from ..errors import InputError
from . import parquet, tars, texts
from .items import MAX_BYTES, check_regular, file_id, has_image_name, reason_of

FILE_NAMES = (  # of columns with the paths of images
    *("file_name", "filename", "file", "filepath", "file_path"),
    *("path", "image", "image_path", "img", "picture", "photo"),
)
TEXT_NAMES = (*texts.TEXT_NAMES, "texts", "captions")
TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # and what separates their columns


@dataclass(frozen=True)
class Pair:
    """An image and its texts, or the reason why they are none.

    The image is a file, size bytes of one from start on, or data, where it cannot be read at its
    place: a row of Parquet, a member of a compressed tar.
    """

    id: str
    texts: tuple[str, ...] = ()  # at least one; none is blank
    path: str = ""
    start: int = 0
    size: int | None = None
    data: bytes | None = None
    reason: str = ""


@dataclass(frozen=True)
class Columns:
    """What open_pairs is asked for."""

    image: str | None = None
    text: str | None = None
    images: str | None = None  # where the paths in tables begin


def is_source(path: str) -> bool:
    """Whether its extension is one of a file of pairs."""
    return tars.is_tar(path) or parquet.is_parquet(path) or _extension(path) in TABLES


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def check_columns(path: str, columns: Columns) -> None:
    """Raises InputError where it can be read and has no such columns, or pyarrow is missing."""
    try:
        if parquet.is_parquet(path):
            with parquet.opened(path) as file:
                _parquet_columns(file, path, columns)
        elif _extension(path) in (".csv", ".tsv"):
            with open(path, "rb") as stream:
                _header(texts.csv_rows(stream, TABLES[_extension(path)]), path, columns)
    except InputError:
        raise
    except Exception:  # of a damaged file, of which its pairs tell
        return


def pairs_of(path: str, columns: Columns) -> Iterator[Pair]:
    """Of one file; what of it cannot be read is one pair more, with the reason."""
    count = 0
    read = _table_pairs
    if tars.is_tar(path):
        read = _tar_pairs
    elif parquet.is_parquet(path):
        read = _parquet_pairs
    try:
        check_regular(path)
        for pair in read(path, file_id(path), columns):
            count += 1
            yield pair
    except Exception as error:  # tarfile, zlib and pyarrow fail in many ways on damaged files
        after = f"unreadable after {count} pairs: " if count else ""
        yield Pair(file_id(path), reason=after + reason_of(error))


def _texts(value: object) -> tuple[str, ...]:
    """Of a str or a list of them, stripped. Raises InputError where there is none, saying why."""
    stripped = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, (str, NoneType)):
            raise InputError(f"a {type(text).__name__} instead of a text")
        if text and text.strip():
            stripped.append(text.strip())
    if not stripped:
        raise InputError("no text")
    try:
        "".join(stripped).encode()
    except UnicodeEncodeError:
        raise InputError("a text that is not UTF-8") from None
    return tuple(stripped)


Members: TypeAlias = "Iterable[tuple[str, tarfile.TarInfo]]"


def _tar_pairs(path: str, where: str, columns: Columns) -> Iterator[Pair]:
    with open(path, "rb") as raw:
        compressed = tars.is_compressed(raw)
        file = tars.Capped(gzip.GzipFile(fileobj=raw) if compressed else raw)  # type: ignore[arg-type]
        for key, group in groupby(tars.members(file), lambda named: _sample_name(named[1].name)):
            try:
                pair = _sample(f"{where}::{key}", path, group, file, compressed, columns)
            except InputError as error:
                pair = Pair(f"{where}::{key}", reason=str(error))
            if pair is not None:
                yield pair


def _sample_name(member: str) -> str:
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _sample(
    id: str, path: str, members: Members, file: tars.Capped, compressed: bool, columns: Columns
) -> Pair | None:
    """A sample's pair; None where it has neither image nor text. Raises InputError."""
    image: Pair | None = None
    found: dict[str, str] = {}
    for _, member in members:
        extension = _extension(member.name)
        is_image = has_image_name(member.name)
        if member.name.rpartition("/")[2].startswith(".") or not (
            is_image or extension in (".txt", ".json")
        ):
            continue
        if not member.isreg() or member.issparse() or not 0 < member.size <= MAX_BYTES:
            raise InputError(f"{member.name} in the tar is empty, too large, or no plain file")
        start, size = member.offset_data, member.size
        if not is_image:
            data = _read(file, start, size)
            found[extension] = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        elif image is None:
            stored = _read(file, start, size) if compressed else None
            image = Pair(id, (), path, start, size, stored)
    if image is None and not found:
        return None
    if image is None:
        raise InputError("no image in the sample")
    text = _texts(_text_of(found, columns))
    return Pair(id, text, image.path, image.start, image.size, image.data)


def _read(file: tars.Capped, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise InputError(f"cut off: {len(data)} of {size} bytes")
    return data


def _text_of(found: dict[str, str], columns: Columns) -> object:
    """Of .txt; of .json where there is no other, or the name of its text was given."""
    if ".json" not in found or (".txt" in found and columns.text is None):
        return found.get(".txt")
    try:
        value = json.loads(found[".json"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {reason_of(error)}") from error
    return _of_object(value, TEXT_NAMES, columns.text)


def _of_object(value: object, usual: Sequence[str], wanted: str | None) -> Any:
    """What a JSON object has under a name. Raises InputError where there is no such."""
    if not isinstance(value, dict):
        raise InputError(f"a {type(value).__name__} instead of a JSON object")
    for name in usual if wanted is None else [wanted]:
        if name in value:
            return value[name]
    raise InputError(f"no {wanted or usual[0]!r} in the object")


def _parquet_pairs(path: str, where: str, columns: Columns) -> Iterator[Pair]:
    with parquet.opened(path) as file:
        names = _parquet_columns(file, path, columns)
        values = parquet.row_values(file, range(file.num_row_groups), *names)
        for row, (image, text) in enumerate(values):
            id = f"{where}::{row}"
            image = image["bytes"] if isinstance(image, dict) else image
            try:
                if not image or len(image) > MAX_BYTES:
                    raise InputError("no image in the row" if not image else "too large")
                yield Pair(id, _texts(text), path, data=image)
            except InputError as error:
                yield Pair(id, reason=str(error))


def _parquet_columns(file: Any, path: str, columns: Columns) -> tuple[str, str]:
    """Of images and of texts. Raises InputError where that is not clear."""
    schema = file.schema_arrow
    found = []
    for kind, fits, usual, wanted in (
        ("image", _is_image, parquet.IMAGE_NAMES, columns.image),
        ("text", _is_text, TEXT_NAMES, columns.text),
    ):
        fitting = [field.name for field in schema if fits(field.type)]
        option = f"{kind}_column"
        if wanted is None and not fitting:
            raise InputError(f"{path}: no column of {kind}s among {', '.join(schema.names[:50])}")
        found.append(texts.pick_column(fitting, usual, wanted, path, option))
    return found[0], found[1]


def _is_image(type: Any) -> bool:
    return parquet.fits(type, "image")


def _is_text(type: Any) -> bool:
    from pyarrow import types

    if types.is_list(type) or types.is_large_list(type):
        type = type.value_type
    return parquet.fits(type, "text")


def _table_pairs(path: str, where: str, columns: Columns) -> Iterator[Pair]:
    root = os.path.dirname(path) if columns.images is None else columns.images
    for id, row in _rows(path, where, columns):
        try:
            if isinstance(row, InputError):
                raise row
            name, text = row
            if not isinstance(name, str) or not name.strip():
                raise InputError("no path of an image")
            yield Pair(id, _texts(text), os.path.join(root, name.strip()))
        except InputError as error:
            yield Pair(id, reason=str(error))


Row: TypeAlias = "tuple[Any, Any] | InputError"  # (path of the image, text), or why not


def _rows(path: str, where: str, columns: Columns) -> Iterator[tuple[str, Row]]:
    with open(path, "rb") as stream:
        if _extension(path) == ".jsonl":
            for id, line, is_whole in texts.numbered_lines(stream, where):
                if line.strip():
                    yield id, _object(line if is_whole else "", columns)
            return
        rows = texts.csv_rows(stream, TABLES[_extension(path)])
        image, text, width = _header(rows, where, columns)
        for number, row in rows:
            id = f"{where}::{number}"
            if isinstance(row, str) or len(row) != width:
                reason = row if isinstance(row, str) else f"{len(row)} fields instead of {width}"
                yield id, InputError(reason)
            else:
                yield id, (row[image], row[text])


def _object(line: str, columns: Columns) -> Row:
    try:
        value = json.loads(line)
        name = _of_object(value, FILE_NAMES, columns.image)
        return name, _of_object(value, TEXT_NAMES, columns.text)
    except InputError as error:
        return error
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON: {reason_of(error)}")


def _header(rows: texts.Rows, where: str, columns: Columns) -> tuple[int, int, int]:
    """Which columns the image and the text are, and how many there are. Raises InputError."""
    _, header = next(rows, (0, []))
    if isinstance(header, str):
        raise InputError(f"{where}: {header}")
    image = texts.pick_column(header, FILE_NAMES, columns.image, where, "image_column")
    others = [name for name in header if name != image]
    text = texts.pick_column(others, TEXT_NAMES, columns.text, where, "text_column")
    return header.index(image), header.index(text), len(header)
