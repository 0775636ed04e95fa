"""Where images and texts come from: files, folders, patterns, lists, tar, Parquet, standard input.

    for item in open_sources(["photos", "shards/*.tar", "@more.txt"], "image"):
        item.id, item.path, item.read()

An id says where an item was found: the path of a file as given (with "/", and normalised where it
has no ".."), with "::name" of a tar's member, "::17" of a line (from 1) or of a row (from 0); of a
line of standard input with a hash of it, too. An id_column's ids must be unique.

"@list.txt" names a file with a source a line, relative, as in the arguments of other programs, to
the working directory. "-" is standard input: a path a line of images, a text a line of texts;
NUL-separated, as by `find -print0`, where its first bytes contain a NUL. A path that was given
before, by itself or inside a folder, is not repeated; for that about 140 bytes are kept for each
path that a list, a pattern or standard input names.

open_pairs() gives images with their texts, for training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ..errors import ImageError, InputError, InputTypeError
from . import parquet, tars, texts
from .items import ERRORS, Item, Kind, Options, Unique, failed_item, read_file
from .pairs import Pair, open_pairs
from .walk import Walk, found, is_found

__all__ = ["Item", "Kind", "Pair", "open_pairs", "open_sources", "read_path"]


def open_sources(
    sources: Sequence[str], kind: Kind, *, column: str | None = None, id_column: str | None = None
) -> Iterator[Item]:
    """All images, or texts, of all sources, lazily, in an order that is the same in every run.

    sources: each a path of a file or a folder; where no such path exists, "@" and a list, or a
        pattern as of glob, with "**" for any folders; or "-". In folders, hidden files and folders
        are left out, and so are files that are neither sources nor images, by extension or by their
        first bytes.
    kind: "image" or "text".
    column: of Parquet, .csv, .tsv and .jsonl files. By default the only one that fits, or that has
        a usual name; of .jsonl "text".
    id_column: whose values are the ids; by default none.

    Raises InputError, before the first item, for a source that does not exist, that matches
    nothing, or whose column is not clear, and where all sources together have no item;
    InputTypeError where sources is no sequence of str. What is wrong later is an item whose read()
    raises ImageError (of images) or InputError (of texts); so is a line of a list or of standard
    input that names nothing.
    """
    if isinstance(sources, str) or not all(isinstance(source, str) for source in sources):
        raise InputTypeError(f"sources must be a sequence of str, not {sources!r:.80}")
    if kind not in ERRORS:
        raise InputError(f'kind must be "image" or "text", not {kind!r}')
    options = Options(kind, column, id_column)
    opened = [_check(source, options) for source in sources]
    return _all_items(opened, Walk(options))


def read_path(path: str) -> bytes:
    """The encoded image that the path of an Item names: a file, a tar's member, a Parquet row.

    Raises ImageError, saying why it cannot be read.
    """
    if not os.path.lexists(path):
        for end in _positions(path, "::"):
            file, rest = path[:end], path[end + 2 :]
            if tars.is_tar(file) and os.path.isfile(file):
                return tars.read_member(file, rest)
            if parquet.is_parquet(file) and os.path.isfile(file):
                column, _, row = rest.rpartition("::")
                if not (row.isascii() and row.isdigit()):
                    raise ImageError(f"{rest!r} is no row of {file}")
                return parquet.read_row(file, column or None, int(row))
    return read_file(path)


def _positions(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _check(source: str, options: Options) -> str | list[str]:
    """The source, or what its pattern matches. Raises InputError, see open_sources."""
    opened = found(source)
    if isinstance(opened, list):
        _check_columns(opened[0], options)
    elif source != "-" and os.path.lexists(source):
        _check_file(source, options)
    return opened


def _check_file(path: str, options: Options) -> None:
    if options.kind == "text" and os.path.isfile(path) and not is_found(path, "text"):
        known = ".txt, .jsonl, .csv, .tsv, .tar, .tar.gz, .tgz and .parquet"
        raise InputError(f"{path}: texts are read from {known}")
    _check_columns(path, options)


def _check_columns(path: str, options: Options) -> None:
    if parquet.is_parquet(path):
        parquet.check_parquet(path, options)
    elif options.kind == "text":
        texts.check_columns(path, options)


def _all_items(opened: Sequence[str | list[str]], walk: Walk) -> Iterator[Item]:
    """Of all sources. Raises InputError where there are none."""
    unique = Unique() if walk.options.id_column is not None else None
    is_empty = True
    for source in opened:
        for item in walk.matched(source) if isinstance(source, list) else walk.source(source):
            is_empty = False
            if unique is not None and (id := unique(item.id)) != item.id:
                reason = f"the id {item.id!r} was given before"
                item = failed_item(id, item.path, walk.options.kind, reason)
            yield item
    if is_empty:
        names = ", ".join(s if isinstance(s, str) else f"{s[0]} ..." for s in opened[:10])
        raise InputError(f"no {walk.options.kind}s in {names or 'no source'}")
