"""What a collection of embeddings is: collection.json, and the names of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, StoreError
from ..provenance import Provenance
from ..whole_file import replacing

FILE = "collection.json"
VERSION = 1  # of the format
MAX_DIMENSION = 1 << 20  # of embeddings in collection.json; CLIP's have about a thousand
CHOICES = {
    "kind": ("image", "text"),
    "dtype": ("float16", "float32"),
    "format": ("parquet", "npy"),
}
JOURNAL = re.compile(r"part-(\d{5,})\.journal")
SHARD = re.compile(r"part-(\d{5,})\.(parquet|npy)")


@dataclass(frozen=True)
class Collection:
    """What all its shards have in common."""

    provenance: Provenance
    kind: str
    dtype: str
    format: str

    def __post_init__(self) -> None:
        """Raises InputError for a value that is none of CHOICES."""
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} must be {' or '.join(choices)}, not {value!r}")

    @property
    def stored(self) -> np.dtype[Any]:
        """Of an embedding's numbers, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.provenance.dimension

    def check(self, folder: Path, asked: Collection) -> None:
        """Raises ProvenanceError or InputError where something else is to be added to it."""
        self.provenance.check(asked.provenance, f"what is to be added to {folder}")
        for name in CHOICES:
            here, there = getattr(self, name), getattr(asked, name)
            if here != there:
                raise InputError(f"{folder} is a collection of {name} {here}, not {there}")

    def as_json(self) -> str:
        """Of collection.json, and of the metadata of Parquet shards."""
        values = {"version": VERSION, "provenance": self.provenance.as_dict()}
        return json.dumps(values | {name: getattr(self, name) for name in CHOICES}, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Collection:
        """The inverse. Raises StoreError."""
        try:
            values = json.loads(text)
            if values["version"] != VERSION:
                raise StoreError(
                    f"{where}: format {values['version']!r}; this npclip knows format {VERSION}"
                )
            provenance = Provenance.from_dict(values["provenance"])
            found = cls(provenance, *(values[name] for name in CHOICES))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{where}: not of a collection of embeddings: {error!r}") from error
        if not 1 <= found.dimension <= MAX_DIMENSION:
            raise StoreError(f"{where}: embeddings of length {found.dimension}")
        return found

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        with replacing(folder / FILE, sync=True) as stream:
            stream.write(self.as_json().encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Collection:
        """Raises StoreError where there is none."""
        path = folder / FILE
        with reporting(folder):
            if not path.exists():
                raise StoreError(f"{folder} is not a collection of embeddings: it has no {FILE}")
            return cls.from_json(path.read_bytes(), path)

    def shards(self, folder: Path) -> int:
        """How many there are. Raises StoreError where one is missing or of another format."""
        with reporting(folder):
            found = sorted(
                (int(match[1]), match[2])
                for match in (SHARD.fullmatch(path.name) for path in folder.iterdir())
                if match
            )
        for expected, (number, format) in enumerate(found):
            if number != expected:
                raise StoreError(f"{folder}: {stem(expected)}.{self.format} is missing")
            if format != self.format:
                raise StoreError(f"{folder}: {stem(number)}.{format} is not {self.format}")
        return len(found)


def stem(number: int) -> str:
    """Of a shard's files."""
    return f"part-{number:05d}"


def journals(folder: Path) -> list[int]:
    """The shards that there are journals of. Raises OSError."""
    matches = (JOURNAL.fullmatch(path.name) for path in folder.iterdir())
    return [int(match[1]) for match in matches if match]


def journal_path(folder: Path, number: int) -> Path:
    """Of the journal that becomes that shard."""
    return folder / f"{stem(number)}.journal"


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """What the system refuses, as StoreError."""
    try:
        yield
    except OSError as error:
        named = error.filename or path
        raise StoreError(f"{named}: {error.strerror or error}") from error
