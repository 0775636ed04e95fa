"""Files and folders that are whole whenever they exist."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".part"  # of the temporary names, which begin with a dot


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes path's place when the block ends; where it raises, nothing is left.

    Others see what was there before, or all of it. sync: also those that look after a power loss.
    Raises OSError.
    """
    part = path.with_name(f".{path.name[:40]}.{os.urandom(8).hex()}{SUFFIX}")
    try:
        with open(part, "xb") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(part, path)
        if sync:
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # there is none after success
            part.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that gets path's name when the block ends, with its files on the disk; where the
    block raises, nothing is left. Raises OSError, also where path has something in it by then."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
        sync_folder(temporary)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there is none after success


def sync_folder(folder: Path) -> None:
    """Make the names of its files survive a power loss, as far as the system can."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
