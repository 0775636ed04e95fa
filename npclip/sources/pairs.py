"""Images with their texts, for training: of webdataset tars, of Parquet, of tables.

    for pair in open_pairs(["shards/*.tar", "photos/captions.csv"]):
        pair.id, pair.texts, pair.path

A sample of a tar is the members of one name up to its first dot, which follow one another: an
image, and a text in .txt, or in .json under a name of TEXT_NAMES. A row of a Parquet file has an
encoded image and a text. A row of a .csv or .tsv, or an object of a .jsonl, has the path of an
image, relative to the table's folder, and a text. In Parquet and JSON a text may be a list of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ..errors import InputError, InputTypeError
from .items import Item, Options, failed_item, file_id, file_item
from .pair_files import Columns, Pair, check_columns, is_source, pairs_of
from .walk import Walk, found

__all__ = ["Pair", "open_pairs"]


def open_pairs(
    sources: Sequence[str],
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    images: str | None = None,
) -> Iterator[Pair]:
    """All pairs of all sources, lazily, in an order that is the same in every run.

    sources: as open_sources takes them; those that are files are .tar (.tar.gz, .tgz), .parquet,
        .csv, .tsv or .jsonl, and in folders only such files count. Not "-".
    image_column: of Parquet and of tables. By default the only one that fits, or that has a usual
        name.
    text_column: likewise, also of the .json in tars.
    images: the folder where the paths in tables begin, instead of each table's own.

    Raises InputError, before the first pair, for a source that does not exist or is of no such
    kind, or whose columns are not clear; InputTypeError where sources is no sequence of str. What
    is wrong later is a pair with a reason; whether the file of an image exists is not looked at.
    """
    if isinstance(sources, str) or not all(isinstance(source, str) for source in sources):
        raise InputTypeError(f"sources must be a sequence of str, not {sources!r:.80}")
    columns = Columns(image_column, text_column, images)
    opened = [_checked(source, columns) for source in sources]
    return _all_pairs(opened, columns)


def _checked(source: str, columns: Columns) -> str | list[str]:
    if source == "-":
        raise InputError("-: pairs are not read from standard input")
    opened = found(source)
    first = opened[0] if isinstance(opened, list) else opened
    if not os.path.isfile(first):
        return opened
    if not is_source(first):
        if isinstance(opened, list):
            return opened
        known = ".tar, .tar.gz, .tgz, .parquet, .csv, .tsv and .jsonl"
        raise InputError(f"{source}: pairs are read from {known}")
    check_columns(first, columns)
    return opened


class _Files(Walk):
    """Through the files of pairs: an item each, which is not read."""

    def _file(self, path: str, is_named: bool) -> Iterator[Item]:
        if is_source(path):
            yield file_item(path, "text")
        elif is_named:
            yield failed_item(file_id(path), path, "text", "not a file of pairs")


def _all_pairs(opened: Sequence[str | list[str]], columns: Columns) -> Iterator[Pair]:
    walk = _Files(Options("text"))
    for source in opened:
        for item in walk.matched(source) if isinstance(source, list) else walk.source(source):
            if is_source(item.path) and os.path.isfile(item.path):
                yield from pairs_of(item.path, columns)
                continue
            try:
                item.read()
            except InputError as error:
                yield Pair(item.id, reason=str(error))
