"""From sources to items: through folders, lists, and what patterns match."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import InputError
from . import parquet, tars, texts
from .items import (
    Item,
    Kind,
    Options,
    begins_as_image,
    failed_item,
    file_id,
    file_item,
    has_image_name,
    reason_of,
)

# files of a store.Writer, perhaps of this very run, which are no sources of it
OF_COLLECTIONS = re.compile(r"part-\d+\..*|errors\.jsonl|collection\.json|writer\.lock")


def is_found(path: str, kind: Kind) -> bool:
    """Whether a file is a source, or an image, where nobody said that it is."""
    if tars.is_tar(path) or parquet.is_parquet(path):
        return True
    if kind == "text":
        return texts.is_text_file(path)
    return has_image_name(path) or begins_as_image(path)


def matches(pattern: str) -> list[str]:
    """Sorted. pathlib's "**" follows no links to folders, glob's does, and in circles, too."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root, wanted = Path(*parts[:fixed]), parts[fixed:]
    try:
        found = {path.relative_to(root) for path in root.glob(os.path.join(*wanted))}
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{pattern}: {reason_of(error)}") from error
    if not any(part.startswith(".") for part in wanted):
        found = {path for path in found if not any(part[0] == "." for part in path.parts)}
    return sorted(str(root / path) for path in found)


def found(source: str) -> str | list[str]:
    """The source, or what its pattern matches.

    Raises InputError where it does not exist, or matches nothing.
    """
    if source == "-":
        if sys.stdin is None:
            raise InputError("-: there is no standard input")
        return source
    if os.path.lexists(source):
        return source
    if source.startswith("@"):
        if not os.path.exists(source[1:]) or os.path.isdir(source[1:]):
            raise InputError(f"{source}: there is no file {source[1:]!r}")
        return source
    if not glob.has_magic(source):
        raise InputError(f"{source}: no such file or folder")
    if not (matched := matches(source)):
        raise InputError(f"{source}: matches nothing")
    return matched


class Walk:
    """Through the sources of one run: what was given before is not repeated."""

    def __init__(self, options: Options) -> None:
        """None was given yet."""
        self.options = options
        self._given: set[str] = set()  # ids of sources
        self._folders: set[str] = set()  # ids of those that were walked

    def source(self, source: str) -> Iterator[Item]:
        """Of a source that exists."""
        if source == "-":
            yield from self._stdin()
        elif source.startswith("@") and not os.path.lexists(source):
            yield from self._list(source[1:])
        else:
            yield from self.given(source)

    def given(self, path: str) -> Iterator[Item]:
        """Of a path that was named: a file is an item whatever it contains."""
        id = file_id(path)
        if id in self._given:
            return
        self._given.add(id)
        is_folder = os.path.isdir(path)
        if self._was_walked(id) and (is_folder or is_found(path, self.options.kind)):
            return
        if is_folder:
            yield from self._folder(path)
            self._folders.add(id)
        else:
            yield from self._file(path, is_named=True)

    def matched(self, paths: list[str]) -> Iterator[Item]:
        """Of what a pattern matched: files as in a folder."""
        for path in paths:
            if os.path.isdir(path):
                yield from self.given(path)
            elif not self._is_known(file_id(path)):
                yield from self._file(path, is_named=False)
                self._given.add(file_id(path))

    def _is_known(self, id: str) -> bool:
        return id in self._given or self._was_walked(id)

    def _was_walked(self, id: str) -> bool:
        """Whether it lies in a folder that was, and is not hidden there."""
        while self._folders and not (name := posixpath.basename(id)).startswith("."):
            if not name or os.path.splitdrive(name)[0]:
                return False
            id = posixpath.dirname(id) or "."
            if id in self._folders:
                return True
        return False

    def _stdin(self) -> Iterator[Item]:
        if "-" in self._given:
            return
        self._given.add("-")
        kind = self.options.kind
        try:
            if kind == "text":
                yield from texts.line_items(sys.stdin.buffer, "-", None, with_hash=True)
                return
            for path in _paths(sys.stdin.buffer):
                yield from self.given(path)
        except (OSError, AttributeError, ValueError) as error:  # closed in one way or another
            yield failed_item("-", "-", kind, reason_of(error))

    def _list(self, path: str) -> Iterator[Item]:
        """Of the sources in a list. What does not exist there fails as an item, not the run."""
        kind, where = self.options.kind, f"@{file_id(path)}"
        if where in self._given:
            return
        self._given.add(where)
        try:
            with open(path, "rb") as stream:
                for source in _paths(stream):
                    yield from self._listed(source)
        except OSError as error:
            yield failed_item(where, path, kind, reason_of(error))

    def _listed(self, source: str) -> Iterator[Item]:
        is_pattern = glob.has_magic(source) and not source.startswith("@")
        try:
            found = matches(source) if is_pattern and not os.path.lexists(source) else []
        except InputError as error:
            if (id := file_id(source)) not in self._given:
                self._given.add(id)
                yield failed_item(id, source, self.options.kind, reason_of(error))
        else:
            yield from self.matched(found) if found else self.source(source)

    def _file(self, path: str, is_named: bool) -> Iterator[Item]:
        options = self.options
        if tars.is_tar(path):
            yield from tars.tar_items(path, options.kind)
        elif parquet.is_parquet(path):
            try:
                yield from parquet.parquet_items(path, options)
            except parquet.NoColumnError as error:
                # beside images there are often Parquet files about them
                if is_named or options.kind == "text" or options.column is not None:
                    yield failed_item(file_id(path), path, options.kind, reason_of(error))
        elif options.kind == "image":
            if is_named or is_found(path, "image"):
                yield file_item(path, "image")
        elif texts.is_text_file(path):
            yield from texts.text_items(path, options)
        elif is_named:
            yield failed_item(file_id(path), path, "text", "not a file of texts")

    def _folder(self, root: str) -> Iterator[Item]:
        """Of all below it, sorted by name in each folder."""
        inside = os.path.join(os.path.realpath(root), "")
        entered = {os.path.realpath(root)}
        waiting = [iter([(root, True)])]  # a stack: folders may be nested a thousand deep
        while waiting:
            path, is_folder = next(waiting[-1], ("", False))
            if not path:
                waiting.pop()
            elif path != root and self._is_known(file_id(path)):
                continue
            elif not is_folder:
                yield from self._file(path, is_named=False)
            elif path == root or _may_enter(path, inside, entered):
                try:
                    waiting.append(iter(_entries(path)))
                except OSError as error:
                    yield failed_item(file_id(path), path, self.options.kind, reason_of(error))


def _entries(folder: str) -> list[tuple[str, bool]]:
    """(path, whether it is a folder) of what is neither hidden nor a file of npclip/store."""
    with os.scandir(folder) as entries:
        found = [e for e in entries if not e.name.startswith(".")]
    if {e.name for e in found} >= {"collection.json", "writer.lock"}:
        found = [e for e in found if not OF_COLLECTIONS.fullmatch(e.name)]
    return sorted((e.path, _is_folder(e)) for e in found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_enter(path: str, inside: str, entered: set[str]) -> bool:
    """Not through a link to where the walk comes anyway, or was: links may go in circles."""
    if not os.path.islink(path):
        return True
    real = os.path.realpath(path)
    there = os.path.join(real, "")
    is_hidden = "/." in there.removeprefix(inside.rstrip(os.sep)).replace(os.sep, "/")
    comes_there = there.startswith(inside) and not is_hidden
    if real in entered or comes_there or inside.startswith(there):
        return False
    entered.add(real)
    return True


def _paths(stream: IO[bytes]) -> Iterator[str]:
    """A path a line; blank ones are skipped."""
    for piece, _ in texts.pieces(stream, separator=None):
        if line := os.fsdecode(piece).removesuffix("\r"):
            yield line
