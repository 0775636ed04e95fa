"""Tensor: one array of a checkpoint, read when it is needed; MappedFile: the file behind it.

A leaf, shared by the two readers: torch_file.py and safetensors_file.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

# Every dtype that a checkpoint may hold -> how its bytes read. NumPy has no bfloat16: bit patterns.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "float64": "<f8",
        "float32": "<f4",
        "float16": "<f2",
        "bfloat16": "<u2",
        "int64": "<i8",
        "int32": "<i4",
        "int16": "<i2",
        "int8": "i1",
        "uint8": "u1",
        "bool": "?",
    }.items()
}
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Tensor:
    """One array of a checkpoint.

    dtype is a key of DTYPES. read() gives the array [shape] in that dtype, bfloat16 as uint16 bit
    patterns: a read-only view of the mapped file where possible. It raises CheckpointError where
    the stored bytes turn out to be corrupt.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]


class MappedFile:
    """A file mapped read-only into memory; it stays mapped as long as a view of it lives."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file cannot be opened or is empty."""
        self.path = path
        try:
            with open(path, "rb") as file:
                if file.seek(0, 2) == 0:
                    raise CheckpointError("the file is empty")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, UnicodeError) as error:  # a shard's name may have lone surrogates
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot be read: {reason}") from error

    def __len__(self) -> int:
        """Bytes in the file."""
        return len(self.map)

    def view(
        self,
        dtype: str,
        shape: tuple[int, ...],
        offset: int,
        strides: tuple[int, ...] | None = None,
    ) -> Array:
        """The array at byte offset; strides are in bytes. NumPy refuses what leaves the file."""
        if 0 in shape:
            return np.empty(shape, DTYPES[dtype])
        return np.ndarray(shape, DTYPES[dtype], self.map, offset, strides)

    def release(self) -> None:
        """Let go of the pages read so far (they come back when touched), where the OS can."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)
